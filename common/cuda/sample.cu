// From logits to a token, a block for a sequence: penalty, temperature, truncation, one draw, and the bookkeeping of a
// step, so that steps can follow each other without the host. What is drawn is what common/src/generate/sampler.rs
// draws of the same logits, but for the last bits of sums.
//
// The vocabulary is not sorted. What top-k and top-p keep is everything above a threshold, and of the logits equal to
// it the first few; the threshold is found digit by digit, four bits in a pass over the logits (which stay in L2).
#include "chacha.h"
#include "kernels.h"

namespace device {

constexpr int SAMPLE_THREADS = 512;
constexpr int CHUNK = 1024;  // words whose weights are summed before the draw looks for its place

// Unsigned numbers in the order of the floats.
__device__ inline uint32_t order_of(float x) {
    uint32_t bits = __float_as_uint(x);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ inline float logit_of(uint32_t order) { return __uint_as_float(order ^ (order >> 31 ? 0x80000000u : 0xffffffffu)); }

// The logits of a sequence after the penalty, and how they become weights: exp((l − max) / temperature).
struct Logits {
    const float* row;
    const unsigned* seen;
    int vocab;
    float penalty;
    float max, scale, lowest;

    __device__ float penalised(float l, int i) const {
        if (seen && (seen[i / 32] >> (i % 32) & 1)) l = l > 0 ? l / penalty : l * penalty;
        return l;
    }
    __device__ float at(int i) const { return penalised(row[i], i); }
    __device__ bool allowed(float l) const { return (l - max) * scale >= lowest; }
    __device__ float weight(float l) const { return exp2_fast((l - max) * scale * LOG2E); }
};

// What is kept: logits whose order is above `order`, and the first `ties` of those at it.
struct Threshold {
    uint32_t order;
    int ties;
};

// The sum of weigh(l) over allowed logits in an order above `above`.
template <class F> __device__ float sum_above(const Logits& logits, uint32_t above, F weigh) {
    float sum = 0;
    for (int i = threadIdx.x; i < logits.vocab; i += SAMPLE_THREADS) {
        float l = logits.at(i);
        if (order_of(l) > above && logits.allowed(l)) sum += weigh(l);
    }
    return block_sum(sum);
}

// Sums of 2·HALF values over groups of 4·HALF lanes: each step halves what a lane carries, so that at last lane l has
// the sum of number l / 2 % 16. (A template, for the compiler to keep the values in registers.)
template <int HALF> __device__ inline float group_sums(const float (&x)[2 * HALF]) {
    bool upper = lane() & 2 * HALF;
    float kept[HALF];
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        kept[i] = (upper ? x[i + HALF] : x[i]) + __shfl_xor_sync(ALL, upper ? x[i] : x[i + HALF], 2 * HALF);
    }
    if constexpr (HALF > 1) {
        return group_sums<HALF / 2>(kept);
    } else {
        return kept[0] + __shfl_xor_sync(ALL, kept[0], 1);
    }
}

// The highest order from which on allowed logits weigh at least `goal`; 0 if all of them do not.
template <class F> __device__ uint32_t find(const Logits& logits, float goal, F weigh) {
    __shared__ float parts[16][SAMPLE_THREADS / WARP];
    uint32_t found = 0;
    for (int shift = 28; shift >= 0; shift -= 4) {
        float sums[16] = {};  // from each digit 1, 2, … 15 on; the last stays 0
        for (int i = threadIdx.x; i < logits.vocab; i += SAMPLE_THREADS) {
            float l = logits.at(i);
            uint32_t order = order_of(l);
            if (order < found || !logits.allowed(l)) continue;
            float w = weigh(l);
#pragma unroll
            for (int d = 0; d < 15; ++d) {
                if (order >= (found | uint32_t(d + 1) << shift)) sums[d] += w;
            }
        }
        float sum = group_sums<8>(sums);
        __syncthreads();  // the last digit's parts have been read
        if (lane() % 2 == 0) parts[lane() / 2][warp()] = sum;
        __syncthreads();
        sum = 0;
        for (int w = 0; w < SAMPLE_THREADS / WARP && lane() < 15; ++w) sum += parts[lane()][w];
        unsigned reached = __ballot_sync(ALL, lane() < 15 && sum >= goal);
        found |= uint32_t(__popc(reached)) << shift;  // sums fall from digit to digit
    }
    return found;
}

// min-p is in `allowed`; top-k takes of what it leaves, and top-p of what top-k leaves.
__device__ inline Threshold truncate(const Logits& logits, const SamplingParams& how) {
    auto weight = [&](float l) { return logits.weight(l); };
    auto one = [](float) { return 1.0f; };
    constexpr int ALL_TIES = 0x7fffffff;
    Threshold kept{0, ALL_TIES};
    if (how.top_k > 0 && how.top_k < logits.vocab) {
        kept.order = find(logits, float(how.top_k), one);
        if (kept.order > 0) kept.ties = how.top_k - int(sum_above(logits, kept.order, one));
    }
    if (how.top_p < 1.0f) {
        float mass = sum_above(logits, kept.order, weight);
        if (kept.order > 0) mass += kept.ties * logits.weight(logit_of(kept.order));
        float goal = how.top_p * mass;
        uint32_t order = find(logits, goal, weight);
        if (order >= kept.order && order > 0) {
            float each = logits.weight(logit_of(order));
            float wanted = each > 0 ? ceilf((goal - sum_above(logits, order, weight)) / each) : INFINITY;
            int ties = wanted < 1e9f ? max(int(wanted), 1) : ALL_TIES;
            kept = {order, order == kept.order ? min(ties, kept.ties) : ties};
        }
    }
    return kept;
}

// Where a draw falls: a chunk of words, the ties still to be kept and the weight still to be passed at its beginning.
struct Place {
    int chunk, ties;
    double rest;
};

// The token at which the cumulative weight passes `u` of the total; by all threads, known to all.
__device__ inline int pick(const Logits& logits, Threshold kept, double u) {
    SHARED_MEMORY(float, masses);
    int chunks = (logits.vocab + CHUNK - 1) / CHUNK;
    int* ties = reinterpret_cast<int*>(masses + chunks);
    __shared__ Place place;
    __shared__ int token;
    for (int chunk = warp(); chunk < chunks; chunk += SAMPLE_THREADS / WARP) {
        float sum = 0;
        int equal = 0;
        for_columns_of(lane(), WARP, chunk * CHUNK, min((chunk + 1) * CHUNK, logits.vocab), logits.vocab, [&](int c, auto few) {
            few = few.load(logits.row + c);
            for (int i = 0; i < int(sizeof few / 4); ++i) {
                float l = logits.penalised(few.at[i], c + i);
                if (!logits.allowed(l)) continue;
                if (order_of(l) > kept.order) sum += logits.weight(l);
                else if (order_of(l) == kept.order) ++equal;
            }
        });
        sum = warp_sum(sum);
        equal = warp_sum(equal);
        if (lane() == 0) masses[chunk] = sum, ties[chunk] = equal;
    }
    float tie_weight = logits.weight(logit_of(kept.order));
    __syncthreads();
    if (threadIdx.x == 0) {
        auto walk = [&](double rest, bool stop) {
            Place at{chunks - 1, kept.ties, 0};
            int left = kept.ties;
            for (int chunk = 0; chunk < chunks; ++chunk) {
                int taken = min(ties[chunk], left);
                double mass = masses[chunk] + (taken > 0 ? double(taken) * tie_weight : 0.0);
                if (mass > 0) at = {chunk, left, rest};  // rounding can leave a little after the last: it is that one's
                if (stop && rest < mass) break;
                rest -= mass;
                left -= taken;
            }
            return stop ? at : Place{0, 0, rest};
        };
        double total = -walk(0.0, false).rest;
        place = walk(u * total, true);
    }
    __syncthreads();
    if (warp() == 0) {
        double rest = place.rest;
        int left = place.ties, last = -1, hit = -1, first = place.chunk * CHUNK;
        constexpr int STEPS = CHUNK / WARP;
        float read[STEPS];  // all at once: one wait for memory, not one for each
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            int i = first + step * WARP + lane();
            read[step] = i < logits.vocab ? logits.at(i) : -INFINITY;
        }
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            float l = read[step];
            bool here = first + step * WARP + lane() < logits.vocab && logits.allowed(l);
            bool tie = here && order_of(l) == kept.order;
            unsigned all_ties = __ballot_sync(ALL, tie);
            bool keep = here && (order_of(l) > kept.order || (tie && __popc(all_ties & ((1u << lane()) - 1)) < left));
            left -= min(left, __popc(all_ties));
            double w = keep ? logits.weight(l) : 0.0f, sum = w;
            for (int by = 1; by < WARP; by *= 2) {
                double before = __shfl_up_sync(ALL, sum, by);
                if (lane() >= by) sum += before;
            }
            unsigned passed = __ballot_sync(ALL, w > 0 && rest < sum), some = __ballot_sync(ALL, w > 0);
            if (hit < 0 && passed) hit = step * WARP + __ffs(passed) - 1;
            if (some) last = step * WARP + 31 - __clz(some);
            rest -= __shfl_sync(ALL, sum, WARP - 1);
        }
        if (lane() == 0) token = first + (hit >= 0 ? hit : max(last, 0));
    }
    __syncthreads();
    return token;
}

// The first of the largest.
__device__ inline int greedy(const Logits& logits) {
    int first = 0x7fffffff;
    for (int i = threadIdx.x; i < logits.vocab && first == 0x7fffffff; i += SAMPLE_THREADS) {
        if (logits.at(i) == logits.max) first = i;
    }
    __shared__ int parts[WARP];
    for (int step = 16; step > 0; step /= 2) first = min(first, __shfl_xor_sync(ALL, first, step));
    if (lane() == 0) parts[warp()] = first;
    __syncthreads();
    for (int w = 0; w < SAMPLE_THREADS / WARP; ++w) first = min(first, parts[w]);
    return first < logits.vocab ? first : 0;
}

}  // namespace device

KERNEL(512, sample, const float* logits, const int* logit_rows, int vocab, SamplingParams how, const unsigned* keys,
       unsigned* seen, const int* ends, int end_count, const Sequence* sequences, const int* pages, int max_pages,
       float* logps, int* tokens, int* positions, int* cache_rows, int* finished) {
    using namespace device;
    int s = blockIdx.x;
    if (finished[s]) return;
    unsigned* own_seen = seen ? seen + (long long)s * ((vocab + 31) / 32) : nullptr;
    Logits words{logits + (long long)(logit_rows ? logit_rows[s] : s) * vocab, own_seen, vocab, how.repetition_penalty,
                 0, how.temperature > 0 ? 1.0f / how.temperature : 1.0f, logf(how.min_p)};
    // log Σ exp of the model's own logits, and the largest of the penalised.
    float top = -INFINITY, highest = -INFINITY, sum = 0;
    for_columns(0, vocab, vocab, [&](int c, auto few) {
        few = few.load(words.row + c);
        float most = top;
        for (float l : few.at) most = fmaxf(most, l);
        if (most == -INFINITY) return;
        sum *= exp2_fast((top - most) * LOG2E);  // 0 where top was −∞
        top = most;
        for (int i = 0; i < int(sizeof few / 4); ++i) {
            sum += exp2_fast((few.at[i] - top) * LOG2E);
            highest = fmaxf(highest, words.penalised(few.at[i], c + i));
        }
    });
    float own_top = top;
    top = block_max(top);
    sum = block_sum(own_top > -INFINITY ? sum * exp2_fast((own_top - top) * LOG2E) : 0.0f);
    words.max = block_max(highest);

    int n = positions[s] + 1 - sequences[s].prefix_len;
    int token = how.temperature > 0 ? pick(words, truncate(words, how), uniform(keys + (long long)s * 8, n)) : greedy(words);
    __syncthreads();  // everyone has read the state
    if (threadIdx.x > 0) return;
    logps[s] = (words.row[token] - top) - logf(sum);
    if (own_seen) own_seen[token / 32] |= 1u << (token % 32);
    bool end = false;
    for (int i = 0; i < end_count; ++i) end |= ends[i] == token;
    tokens[s] = token;
    finished[s] = end ? 1 : n + 1 >= sequences[s].limit ? 2 : 0;
    if (finished[s]) {
        cache_rows[s] = -1;
    } else {
        positions[s] += 1;
        cache_rows[s] = pages[(long long)sequences[s].own_table * max_pages + n / PAGE] * PAGE + n % PAGE;
    }
}
