// The delta rule's way back. With D = a·S the faded memory of a token, l = v − Dᵀk what it lacks and u = β·l what it learns, so
// that S = D + k·uᵀ and o = Sᵀq, gradients are (Yang, Kautz and Hatamizadeh, arXiv 2412.06464, by differentiation):
//
//     dS gains q·doᵀ;  du = dSᵀk;  dv = β·du;  dβ = du·l;  dq = S·do;  dk = dS·u − D·dv;  dD = dS − k·dvᵀ;  before: a·dD.
//
// No matrix need be kept from token to token. S is wanted for dq and for the second part of dk, dS for the rest: a pass
// forth has the first, a pass back the others but for the second part of dk, which takes dv, and so a pass forth again.
// What the decay gains, d(ln a) = Σ dD∘D, would take both at once; but it is Σ dS∘S − v·dv, and Σ dS∘S is q·dq and what the
// next token's decay gains: so it is the sum of q·dq − v·dv from there on.
#include "delta.h"

namespace device {

constexpr int BACK_WARPS = 256 / WARP;
static_assert(BACK_WARPS * DELTA_COLUMNS == DELTA_STRIP);

// What sums over columns: each warp's part, for the tokens of a run, and then their sum over the warps in order.
template <int D> struct RowSums {
    float* at;
    int warps;  // that have columns

    template <class Block> __device__ RowSums(float* at, const Block& block) : at(at) {
        warps = (block.valid() + DELTA_COLUMNS - 1) / DELTA_COLUMNS;
    }
    __device__ float* own(int t) const { return at + (t * BACK_WARPS + warp()) * D; }
    // Calls visit(t, row, sum) for all of `count` tokens, once all warps are done with them.
    template <class F> __device__ void for_all(int count, int rows, F visit) const {
        __syncthreads();
        for (int i = threadIdx.x; i < count * D; i += blockDim.x) {
            int t = i / D, row = i % D;
            if (row >= rows) continue;
            float sum = 0;
            for (int w = 0; w < warps; ++w) sum += at[(t * BACK_WARPS + w) * D + row];
            visit(t, row, sum);
        }
    }
};

// A walk's tokens, run by run: bring(stage, count, token) brings a run's rows, where token(t) is its number t; work(stage, t,
// sums) has a token, by warps that have columns; and take(token, row, sum) gets the sums over columns.
template <int D, bool BACK, class Block, class Bring, class Work, class Take>
__device__ void walk(const Block& block, const DeltaSpan& span, Bring bring, Work work, Take take) {
    SHARED_MEMORY(float, shared);
    using Stage = DeltaStage<D, DELTA_STRIP>;
    const RowSums<D> sums(shared + Stage::FLOATS, block);
    for (int first = 0, run = 0; first < span.rows; first += DELTA_RUN, ++run) {
        const Stage stage(shared, run);
        int count = min(DELTA_RUN, span.rows - first);
        auto token = [&](int t) { return span.first + (BACK ? span.rows - 1 - first - t : first + t); };
        bring(stage, count, token);
        __syncthreads();
        for (int t = 0; t < count && !block.idle(); ++t) work(stage, t, token(t), sums.own(t));
        sums.for_all(count, block.heads.key_dim, [&](int t, int row, float sum) { take(token(t), row, sum); });
    }
}

// A strip's part of a sum over columns: [T, value_heads, strips, key_dim].
template <class Block> __device__ long long row_part(const Block& block, int token) {
    const DeltaHeads& heads = block.heads;
    int strips = (heads.value_dim + DELTA_STRIP - 1) / DELTA_STRIP;
    return (((long long)token * heads.value_heads + block.head) * strips + block.first / DELTA_STRIP) * heads.key_dim;
}

template <class T, int D>
__device__ void trace(const T* qkv, const float* gates, const T* d_read, const DeltaSpan& span, float* memories, float* lack,
                      float* d_query, const DeltaHeads& heads) {
    const DeltaBlock<DELTA_STRIP> block(heads);
    Memory<D> memory;
    block.begin(memory, memories, span);
    walk<D, false>(
        block, span,
        [&](auto& stage, int count, auto token) {
            stage.bring_rows(0, count, heads.key_dim, [&](int t, int c) { return widen(block.key(qkv, token(t))[c]); });
            stage.bring_columns(0, count, block.valid(), [&](int t, int c) { return widen(block.value(qkv, token(t))[c]); });
            stage.bring_columns(1, count, block.valid(), [&](int t, int c) { return widen(block.columns_of(d_read, token(t))[c]); });
            stage.bring_gates(count, [&](int t) { return block.decay_and_rate(gates, token(t)); });
        },
        [&](auto& stage, int t, int token, float* sums) {
            auto k = RowVector<D>::load(stage.rows(t, 0));
            float own = stage.columns(t, 0)[block.own()] - stage.decay(t) * memory.times_rows(k);
            if (part() % 2 == 0 && block.has(block.own())) block.columns_of(lack, token)[block.own()] = own;
            memory.learn(stage.decay(t), k, to_all(stage.rate(t) * own));
            memory.times_columns(Few<4>::load(stage.columns(t, 1) + block.four()), sums);
        },
        [&](int token, int row, float sum) { d_query[row_part(block, token) + row] = sum; });
    block.end(memory, memories, span);
}

template <class T, int D>
__device__ void back(const T* qkv, const float* gates, const T* d_read, const float* lack, const DeltaSpan& span,
                     float* memories, float* d_learnt, float* d_key, const DeltaHeads& heads) {
    const DeltaBlock<DELTA_STRIP> block(heads);
    Memory<D> d_memory;
    block.begin(d_memory, memories, span);
    walk<D, true>(
        block, span,
        [&](auto& stage, int count, auto token) {
            stage.bring_rows(0, count, heads.key_dim, [&](int t, int c) { return widen(block.key(qkv, token(t))[c]); });
            stage.bring_rows(1, count, heads.key_dim, [&](int t, int c) { return widen(block.query(qkv, token(t))[c]); });
            stage.bring_columns(0, count, block.valid(), [&](int t, int c) { return block.columns_of(lack, token(t))[c]; });
            stage.bring_columns(1, count, block.valid(), [&](int t, int c) { return widen(block.columns_of(d_read, token(t))[c]); });
            stage.bring_gates(count, [&](int t) { return block.decay_and_rate(gates, token(t)); });
        },
        [&](auto& stage, int t, int token, float* sums) {
            float decay = stage.decay(t), rate = stage.rate(t);
            auto k = RowVector<D>::load(stage.rows(t, 0));
            d_memory.learn(1.0f, RowVector<D>::load(stage.rows(t, 1)), Few<4>::load(stage.columns(t, 1) + block.four()));
            float own = d_memory.times_rows(k);
            if (part() % 2 == 0 && block.has(block.own())) block.columns_of(d_learnt, token)[block.own()] = own;
            Few<4> learnt = Few<4>::load(stage.columns(t, 0) + block.four());
            for (float& x : learnt.at) x *= rate;
            d_memory.times_columns(learnt, sums);
            d_memory.learn(decay, k, to_all(-decay * rate * own));
        },
        [&](int token, int row, float sum) { d_key[row_part(block, token) + row] = sum; });
    block.end(d_memory, memories, span);
}

template <class T, int D>
__device__ void again(const T* qkv, const float* gates, const float* lack, const float* d_learnt, const DeltaSpan& span,
                      float* memories, float* d_key, const DeltaHeads& heads) {
    const DeltaBlock<DELTA_STRIP> block(heads);
    Memory<D> memory;
    block.begin(memory, memories, span);
    walk<D, false>(
        block, span,
        [&](auto& stage, int count, auto token) {
            stage.bring_rows(0, count, heads.key_dim, [&](int t, int c) { return widen(block.key(qkv, token(t))[c]); });
            stage.bring_columns(0, count, block.valid(), [&](int t, int c) { return block.columns_of(lack, token(t))[c]; });
            stage.bring_columns(1, count, block.valid(), [&](int t, int c) { return block.columns_of(d_learnt, token(t))[c]; });
            stage.bring_gates(count, [&](int t) { return block.decay_and_rate(gates, token(t)); });
        },
        [&](auto& stage, int t, int, float* sums) {
            Few<4> learnt = Few<4>::load(stage.columns(t, 0) + block.four());
            Few<4> d_value = Few<4>::load(stage.columns(t, 1) + block.four());
            for (float& x : learnt.at) x *= stage.rate(t);
            for (float& x : d_value.at) x *= stage.rate(t);
            memory.fade(stage.decay(t));
            memory.times_columns(d_value, sums);
            memory.learn(1.0f, RowVector<D>::load(stage.rows(t, 0)), learnt);
        },
        [&](int token, int row, float sum) { d_key[row_part(block, token) + row] -= sum; });
}

// A warp takes a key head of a token, and with it the value heads that it serves.
template <class T>
__device__ void gradients(const T* qkv, const float* gates, const float* lack, const float* d_learnt, const float* d_query,
                          const float* d_key, T* d_qkv, float* terms, float* d_gates, int count, const DeltaHeads& heads) {
    constexpr int COLUMNS = MOST_KEY_DIM / WARP;
    int unit = blockIdx.x * (blockDim.x / WARP) + warp(), token = unit / heads.key_heads, key_head = unit % heads.key_heads;
    if (token >= count) return;
    int served = heads.value_heads / heads.key_heads, strips = (heads.value_dim + DELTA_STRIP - 1) / DELTA_STRIP;
    long long row = (long long)token * heads.qkv_width();
    int q_at = key_head * heads.key_dim, k_at = q_at + heads.key_width();
    float dq[COLUMNS] = {}, dk[COLUMNS] = {};
    for (int head = key_head * served; head < (key_head + 1) * served; ++head) {
        float along = 0, rates = 0;
        long long at = ((long long)token * heads.value_heads + head) * strips * heads.key_dim;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
            int c = lane() + i * WARP;
            if (c >= heads.key_dim) continue;
            float own_q = 0, own_k = 0;
            for (int strip = 0; strip < strips; ++strip) {
                own_q += d_query[at + strip * heads.key_dim + c], own_k += d_key[at + strip * heads.key_dim + c];
            }
            along += widen(qkv[row + q_at + c]) * own_q;
            dq[i] += own_q, dk[i] += own_k;
        }
        const float* gate = gates + (long long)token * 2 * heads.value_heads + head;
        float rate = gate[heads.value_heads];
        long long values = ((long long)token * heads.value_heads + head) * heads.value_dim;
        for (int c = lane(); c < heads.value_dim; c += WARP) {
            float d = d_learnt[values + c];
            long long value = row + 2 * heads.key_width() + head * heads.value_dim + c;
            rates += d * lack[values + c];
            along -= rate * d * widen(qkv[value]);
            d_qkv[value] = narrow<T>(rate * d);
        }
        along = warp_sum(along), rates = warp_sum(rates);
        if (lane() == 0) {
            terms[(long long)token * heads.value_heads + head] = along;
            d_gates[((long long)token * 2 + 1) * heads.value_heads + head] = rates;
        }
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
        int c = lane() + i * WARP;
        if (c < heads.key_dim) d_qkv[row + q_at + c] = narrow<T>(dq[i]), d_qkv[row + k_at + c] = narrow<T>(dk[i]);
    }
}

}  // namespace device

#define DEFINE_TRACE(name, T, D)                                                                              \
    DELTA_TRACE(name, T, D) {                                                                                 \
        device::trace<T, D>(qkv, gates, d_read, spans[blockIdx.y], memories, lack, d_query, heads);           \
    }
DELTA_VARIANTS(DEFINE_TRACE, delta_trace);

#define DEFINE_BACK(name, T, D)                                                                               \
    DELTA_BACK(name, T, D) {                                                                                  \
        device::back<T, D>(qkv, gates, d_read, lack, spans[blockIdx.y], memories, d_learnt, d_key, heads);    \
    }
DELTA_VARIANTS(DEFINE_BACK, delta_back);

#define DEFINE_AGAIN(name, T, D)                                                                              \
    DELTA_AGAIN(name, T, D) {                                                                                 \
        device::again<T, D>(qkv, gates, lack, d_learnt, spans[blockIdx.y], memories, d_key, heads);           \
    }
DELTA_VARIANTS(DEFINE_AGAIN, delta_again);

DELTA_GRADIENTS(delta_gradients_f32, float) {
    device::gradients(qkv, gates, lack, d_learnt, d_query, d_key, d_qkv, terms, d_gates, count, heads);
}
DELTA_GRADIENTS(delta_gradients_bf16, bf16) {
    device::gradients(qkv, gates, lack, d_learnt, d_query, d_key, d_qkv, terms, d_gates, count, heads);
}

// A thread has some rows that follow each other; then what comes after them is added up, twice as far at each step.
KERNEL(256, delta_decays, const float* terms, const DeltaSegment* segments, float* d_gates, int value_heads) {
    __shared__ float sums[256];
    DeltaSegment own = segments[blockIdx.y];
    int head = blockIdx.x, i = threadIdx.x;
    int each = (own.end - own.first + 255) / 256, first = own.first + i * each, last = min(first + each, own.end);
    float sum = 0;
    for (int row = first; row < last; ++row) sum += terms[(long long)row * value_heads + head];
    sums[i] = sum;
    for (int by = 1; by < 256; by *= 2) {
        __syncthreads();
        float after = i + by < 256 ? sums[i + by] : 0.0f;
        __syncthreads();
        sums[i] += after;
    }
    __syncthreads();
    sum = i < 255 ? sums[i + 1] : 0.0f;
    for (int row = last - 1; row >= first; --row) {
        sum += terms[(long long)row * value_heads + head];
        if (row < own.first + own.rows) d_gates[(long long)row * 2 * value_heads + head] = sum;
    }
}
