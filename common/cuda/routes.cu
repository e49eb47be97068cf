// Mixtures of experts: which experts a token goes to, where its rows lie, and what their MLPs give brought together; and back.
#include "activation.h"

namespace device {

// The larger rank is the better, of equals the first.
struct Candidate {
    float rank;
    int expert;
    __device__ bool better(Candidate other) const {
        return rank > other.rank || (rank == other.rank && expert < other.expert);
    }
};

__device__ inline Candidate warp_best(Candidate best) {
    for (int step = 16; step > 0; step /= 2) {
        Candidate other{__shfl_xor_sync(ALL, best.rank, step), __shfl_xor_sync(ALL, best.expert, step)};
        if (other.better(best)) best = other;
    }
    return best;
}

constexpr int EXPERTS_EACH = MOST_EXPERTS / WARP;  // of a lane: every 32nd

// Logits of experts, -INFINITY where there is none, become scores.
__device__ inline void score(float (&own)[EXPERTS_EACH], bool by_sigmoid) {
    if (by_sigmoid) {
#pragma unroll
        for (int i = 0; i < EXPERTS_EACH; ++i) own[i] = sigmoid(own[i]);
        return;
    }
    float most = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < EXPERTS_EACH; ++i) most = fmaxf(most, own[i]);
    most = warp_max(most);
#pragma unroll
    for (int i = 0; i < EXPERTS_EACH; ++i) sum += own[i] = expf(own[i] - most);
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < EXPERTS_EACH; ++i) own[i] /= sum;
}

// A warp has a token.
__device__ inline void route(float* scores, const float* selection, int* chosen, float* worth, int* places, float* weights,
                             int count, const Routing& how) {
    long long token = (long long)blockIdx.x * 8 + warp();
    if (token >= count) return;
    float* row = scores + token * how.outputs;
    float own[EXPERTS_EACH], rank[EXPERTS_EACH];
#pragma unroll
    for (int i = 0; i < EXPERTS_EACH; ++i) {
        int expert = i * WARP + lane();
        own[i] = expert < how.experts ? row[expert] * how.logits : -INFINITY;
    }
    score(own, how.sigmoid);
#pragma unroll
    for (int i = 0; i < EXPERTS_EACH; ++i) {
        int expert = i * WARP + lane();
        rank[i] = -INFINITY;
        if (expert >= how.experts) continue;
        row[expert] = own[i];
        // Numbers that are none must choose experts that there are.
        rank[i] = fmaxf(selection ? own[i] + selection[expert] : own[i], -1e30f);
    }
    float all = 0;
    for (int place = 0; place < how.used; ++place) {
        Candidate best{-INFINITY, MOST_EXPERTS};
#pragma unroll
        for (int i = 0; i < EXPERTS_EACH; ++i) {
            Candidate one{rank[i], i * WARP + lane()};
            if (one.better(best)) best = one;
        }
        best = warp_best(best);
#pragma unroll
        for (int i = 0; i < EXPERTS_EACH; ++i) {
            if (best.expert != i * WARP + lane()) continue;
            rank[i] = -INFINITY;
            chosen[token * how.used + place] = best.expert;
            worth[token * how.used + place] = own[i];
            all += own[i];
        }
    }
    all = warp_sum(all);
    float over = how.normed ? fmaxf(all + how.plus, how.least) : 1.0f;
    __syncwarp();
    for (int place = lane(); place < how.used; place += WARP) {
        float* to = worth + token * how.used + place;
        *to = *to / over * how.scale;
    }
    if (lane() != 0 || how.each == how.used) return;
    float counts = 1;
    if (how.outputs > how.experts) counts = row[how.experts] = sigmoid(row[how.experts]);
    int shared = count * how.used + int(token);
    places[token * how.each + how.used] = shared;
    weights[shared] = counts;
}

// A run of all entries for each thread of a block.
struct Entries {
    int first, last;
    __device__ explicit Entries(int all) {
        int each = (all + int(blockDim.x) - 1) / int(blockDim.x);
        first = min(int(threadIdx.x) * each, all), last = min(first + each, all);
    }
    __device__ int count(const int* chosen, int expert) const {
        int found = 0;
        for (int i = first; i < last; ++i) found += chosen[i] == expert;
        return found;
    }
};

// The sum of `x` over the threads before this one. All threads of the block must call it.
__device__ inline int block_sum_before(int x) {
    __shared__ int warps[WARP];
    int up_to = x;
    for (int step = 1; step < WARP; step *= 2) {
        int other = __shfl_up_sync(ALL, up_to, step);
        if (lane() >= step) up_to += other;
    }
    if (lane() == WARP - 1) warps[warp()] = up_to;
    __syncthreads();
    int before = up_to - x;
    for (int w = 0; w < warp(); ++w) before += warps[w];
    return before;
}

__device__ inline int tiles_of(int rows) { return (rows + EXPERT_TILE - 1) / EXPERT_TILE; }

// A block has an expert; a thread a run of entries.
__device__ inline void place_rows(const int* chosen, const float* worth, const float* factors, const int* counts,
                                  int* starts, int* places, int* tokens, float* weights, ExpertTile* tiles, int rows,
                                  int used, int each, int tile_count) {
    int expert = blockIdx.x, experts = gridDim.x;
    int rows_before = 0, tiles_before = 0;
    for (int e = threadIdx.x; e < expert; e += blockDim.x) rows_before += counts[e], tiles_before += tiles_of(counts[e]);
    int start = block_sum(rows_before), tile = block_sum(tiles_before);
    int own = counts[expert], own_tiles = tiles_of(own);
    bool last = expert == experts - 1;
    if (threadIdx.x == 0) {
        starts[expert] = start;
        if (last) starts[experts] = start + own;
    }
    for (int i = threadIdx.x; i < own_tiles; i += blockDim.x) {
        int first = i * EXPERT_TILE;
        tiles[tile + i] = {expert, start + first, min(own - first, EXPERT_TILE)};
    }
    for (int i = tile + own_tiles + threadIdx.x; last && i < tile_count; i += blockDim.x) tiles[i] = {0, 0, 0};
    Entries entries(rows);
    int row = start + block_sum_before(entries.count(chosen, expert));
    float factor = factors ? factors[expert] : 1.0f;
    for (int i = entries.first; i < entries.last; ++i) {
        if (chosen[i] != expert) continue;
        places[i / used * each + i % used] = row;
        tokens[row] = i / used;
        weights[row] = worth[i] * factor;
        ++row;
    }
}

template <class T, class O>
__device__ void mix(const T* given, const int* places, const float* weights, O* out, int width, int used, float scale, int keep) {
    const int* rows = places + (long long)blockIdx.x * used;
    O* to = out + (long long)blockIdx.x * width;
    for_columns(0, width, width, [=](int c, auto few) {
        constexpr int N = sizeof few / 4;
        for (float& x : few.at) x = 0;
        for (int i = 0; i < used; ++i) {
            int row = rows[i];
            auto part = few.load(given + (long long)row * width + c);
            float weight = weights ? weights[row] * scale : scale;
            for (int j = 0; j < N; ++j) few.at[j] += weight * part.at[j];
        }
        if (keep) {
            auto old = few.load(to + c);
            for (int j = 0; j < N; ++j) few.at[j] += old.at[j];
        }
        few.store(to + c);
    });
}

template <class T>
__device__ void activation_backward(T* gate_up, T* dy, const float* weights, float* d_weights, int ffn, Curve curve) {
    long long row = blockIdx.x;
    T *gate = gate_up + row * 2 * ffn, *d_row = dy + row * ffn;
    float weight = weights[row], sum = 0;
    for_columns(0, ffn, ffn, [&](int c, auto few) {
        auto g = few.load(gate + c), u = few.load(gate + ffn + c), d = few.load(d_row + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) {
            Gated made(g.at[i], u.at[i], d.at[i] * weight, curve);
            sum += d.at[i] * made.out;
            few.at[i] = made.out * weight;
            g.at[i] = made.d_gate;
            u.at[i] = made.d_up;
        }
        g.store(gate + c);
        u.store(gate + ffn + c);
        few.store(d_row + c);
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) d_weights[row] = sum;
}

// A warp has a token.
template <class T>
__device__ void route_backward(const float* scores, const int* chosen, const int* places, const float* weights,
                               const float* d_weights, T* d_logits, int count, const Routing& how) {
    long long token = (long long)blockIdx.x * 8 + warp();
    if (token >= count) return;
    const int *own = chosen + token * how.used, *rows = places + token * how.each;
    const float* row = scores + token * how.outputs;
    float mean = 0, sum = 0;
    for (int i = 0; i < how.used; ++i) {
        mean += weights[rows[i]] * d_weights[rows[i]];
        sum += row[own[i]];
    }
    // What weights lose by their common divisor, and what a soft-max's scores lose by theirs: where those are normed, they are
    // a soft-max of the chosen alone.
    bool normed = how.normed && sum + how.plus > how.least;
    float norming = normed ? mean / (sum + how.plus) : 0.0f;
    float spread = normed || how.sigmoid ? 0.0f : mean;
    for (int expert = lane(); expert < how.outputs; expert += WARP) {
        float score = row[expert], d = -score * spread;
        if (expert == how.experts) d = d_weights[rows[how.used]] * score * (1.0f - score);  // the gate
        for (int i = 0; i < how.used; ++i)
            if (own[i] == expert)
                d += (weights[rows[i]] * d_weights[rows[i]] - score * norming) * (how.sigmoid ? 1.0f - score : 1.0f);
        if (expert < how.experts) d *= how.logits;
        d_logits[token * how.outputs + expert] = narrow<T>(d);
    }
}

// A block has an expert.
__device__ inline void factor_gradient(const int* chosen, const float* worth, const int* places, const float* d_weights,
                                       float* gradients, int rows, int used, int each) {
    int expert = blockIdx.x;
    float sum = 0;
    for (int i = threadIdx.x; i < rows; i += blockDim.x)
        if (chosen[i] == expert) sum += worth[i] * d_weights[places[i / used * each + i % used]];
    sum = block_sum(sum);
    if (threadIdx.x == 0) gradients[expert] += sum;
}

}  // namespace device

KERNEL(256, route, float* scores, const float* selection, int* chosen, float* worth, int* places, float* weights, int count,
       Routing how) {
    device::route(scores, selection, chosen, worth, places, weights, count, how);
}

KERNEL(256, count_rows, const int* chosen, int* counts, int rows) {
    int found = device::block_sum(device::Entries(rows).count(chosen, blockIdx.x));
    if (threadIdx.x == 0) counts[blockIdx.x] = found;
}

KERNEL(256, place_rows, const int* chosen, const float* worth, const float* factors, const int* counts, int* starts,
       int* places, int* tokens, float* weights, ExpertTile* tiles, int rows, int used, int each, int tile_count) {
    device::place_rows(chosen, worth, factors, counts, starts, places, tokens, weights, tiles, rows, used, each, tile_count);
}

KERNEL(256, factor_gradient, const int* chosen, const float* worth, const int* places, const float* d_weights,
       float* gradients, int rows, int used, int each) {
    device::factor_gradient(chosen, worth, places, d_weights, gradients, rows, used, each);
}

MIX(mix_f32_f32, float, float) { device::mix(given, places, weights, out, width, used, scale, keep); }
MIX(mix_bf16_f32, bf16, float) { device::mix(given, places, weights, out, width, used, scale, keep); }
MIX(mix_f16_f32, f16, float) { device::mix(given, places, weights, out, width, used, scale, keep); }
MIX(mix_bf16_bf16, bf16, bf16) { device::mix(given, places, weights, out, width, used, scale, keep); }

EXPERT_ACTIVATION_BACKWARD(expert_activation_backward_f32, float) {
    device::activation_backward(gate_up, dy, weights, d_weights, ffn, curve);
}
EXPERT_ACTIVATION_BACKWARD(expert_activation_backward_bf16, bf16) {
    device::activation_backward(gate_up, dy, weights, d_weights, ffn, curve);
}

ROUTE_BACKWARD(route_backward_f32, float) {
    device::route_backward(scores, chosen, places, weights, d_weights, d_logits, count, how);
}
ROUTE_BACKWARD(route_backward_bf16, bf16) {
    device::route_backward(scores, chosen, places, weights, d_weights, d_logits, count, how);
}
