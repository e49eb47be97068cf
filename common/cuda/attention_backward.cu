// The gradient of attention. With P = exp(S − lse) and δ = Σ dO∘O: dV = Pᵀ·dO, dS = P∘(dO·Vᵀ − δ), dQ = dS·K·scale,
// dK = dSᵀ·Q·scale (FlashAttention-2, algorithm 2).
//
// Two kernels, each making the scores again: one for dQ with a block for a tile of queries, one for dK and dV with a
// block for a tile of keys and a query head. Seven products in place of five, but no sum is shared between blocks: no
// atomics, and the same bits every time. The keys of a root meet the queries of all branches in their own block. A third
// adds up what the query heads of a key head found: without them side by side, a short batch would leave a GPU idle.
//
// Under a soft cap c of the scores dS gains its slope, 1 − (S / c)², for which the second makes the scores once more.
#include "kernels.h"
#include "positions.h"
#include "tile.h"

namespace device {

template <class T, int D>
__device__ void backward_q(const T* qkv, const T* out, const float* lse, const T* d_out, float* delta, T* d_qkv,
                           AttentionTile tile, int query, int kv, int dim, int window, Scores scores) {
    constexpr int R = attention_rows<T>, S = backward_step<T, D>, N = S / 8, P = pitch<T, D>;
    constexpr int W = result_columns<D>;
    SHARED_MEMORY(T, q);
    T *d_o = q + R * P, *k = d_o + R * P, *v = k + S * P;
    float* scratch = reinterpret_cast<float*>(v + S * P) + warp() * 16 * scratch_pitch<S>;
    int head = blockIdx.x, first = warp() * 16, skipped = D > W ? blockIdx.z * W : 0;
    const Head<T> columns(qkv, query, kv, dim, head);
    const Visible visible{tile, window};
    int end = visible.end();
    auto at = [&](int i) { return (long long)(tile.first + i) * query + head; };

    load_rows<T, D, R>(q, dim, qkv, [&](int i) { return i < tile.rows ? columns.row(columns.q, tile.first + i) : nullptr; });
    load_rows<T, D, R>(d_o, dim, qkv, [&](int i) { return i < tile.rows ? d_out + at(i) * dim : nullptr; });
    copy_commit();

    // δ of the warp's rows, from memory while the tiles arrive: two lanes sum a row, and those of rows g and g + 8 ask them.
    int mine = first + lane() / 2;
    bool there = mine < tile.rows;
    float sum = 0, own_lse = there ? lse[at(mine)] * LOG2E : 0;
    if (there) {
        for_columns_of(lane() % 2, 2, 0, dim, dim, [&](int c, auto few) {
            auto o = few.load(out + at(mine) * dim + c), d = few.load(d_out + at(mine) * dim + c);
            for (int i = 0; i < int(sizeof few / 4); ++i) sum += o.at[i] * d.at[i];
        });
    }
    sum += __shfl_xor_sync(ALL, sum, 1);
    if (there && lane() % 2 == 0 && skipped == 0) delta[at(mine)] = sum;
    float row_delta[2], row_lse[2];
    for (int half = 0; half < 2; ++half) {
        row_delta[half] = __shfl_sync(ALL, sum, lane() / 4 * 2 + 16 * half);
        row_lse[half] = __shfl_sync(ALL, own_lse, lane() / 4 * 2 + 16 * half);
    }

    float d_q[W / 8][4];
    clear(d_q);
    for (int from = visible.begin(); from < end; from += S) {
        __syncthreads();  // nobody reads the last tiles any more
        load_rows<T, D, S>(k, dim, qkv, [&](int i) { return from + i < end ? columns.row(columns.k, visible.row(from + i)) : nullptr; });
        load_rows<T, D, S>(v, dim, qkv, [&](int i) { return from + i < end ? columns.row(columns.v, visible.row(from + i)) : nullptr; });
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        float s[N][4], d[N][4];
        clear(s);
        clear(d);
        multiply_rows<N, D>(s, q + first * P, k);
        multiply_rows<N, D>(d, d_o + first * P, v);
        cap_scores(s, scores);
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) d[j][i] -= row_delta[i / 2];
        if (scores.share > 0) through_cap(d, s);
        visible.mask(s, from, first);
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[j][i] = exp2_fast(fmaf(s[j][i], scores.unit, -row_lse[i / 2])) * d[j][i];
        multiply_columns<N, W / 8, D>(d_q, s, k + skipped, scratch);
    }
    for (int half = 0; half < 2; ++half) {
        int r = first + lane() / 4 + 8 * half;
        if (r >= tile.rows) continue;
        T* to = d_qkv + (long long)(tile.first + r) * columns.width + head * dim;
#pragma unroll
        for (int j = 0; j < W / 8; ++j) {
            int c = skipped + j * 8 + lane() % 4 * 2;
            if (c < dim) {
                *reinterpret_cast<Pair<T>*>(to + c) = {narrow<T>(d_q[j][2 * half] * scores.scale),
                                                       narrow<T>(d_q[j][2 * half + 1] * scores.scale)};
            }
        }
    }
}

// A block takes a tile of keys for one query head, W of its D columns, and passes over the queries that see it: the rows
// of the batch from its own on to `tile.end`, across the branches of a root.
template <class T, int D>
__device__ void backward_kv(const T* qkv, const float* lse, const T* d_out, const float* delta, const int* positions,
                            float* d_heads, AttentionTile tile, int query, int kv, int dim, int window, Scores scores) {
    constexpr int R = attention_rows<T>, S = backward_step<T, D>, N = S / 8, P = pitch<T, D>;
    constexpr int W = D <= 128 ? D : 128;  // two times 16 × 128 float32 sums a warp is what registers hold
    SHARED_MEMORY(T, k);
    T *v = k + R * P, *q = v + R * P, *d_o = q + S * P;
    float *q_lse = reinterpret_cast<float*>(d_o + S * P), *q_delta = q_lse + S;
    int* q_at = reinterpret_cast<int*>(q_delta + S);
    float* scratch = reinterpret_cast<float*>(q_at + S) + warp() * 16 * scratch_pitch<S>;
    int head = blockIdx.x, first = warp() * 16, skipped = blockIdx.z * W;
    const Head<T> columns(qkv, query, kv, dim, head);
    int tile_at = tile.prefix_len + tile.first - tile.start;  // the position of the tile's first key

    load_rows<T, D, R>(k, dim, qkv, [&](int i) { return i < tile.rows ? columns.row(columns.k, tile.first + i) : nullptr; });
    load_rows<T, D, R>(v, dim, qkv, [&](int i) { return i < tile.rows ? columns.row(columns.v, tile.first + i) : nullptr; });
    copy_commit();

    float d_k[W / 8][4], d_v[W / 8][4];
    clear(d_k);
    clear(d_v);
    for (int from = tile.first; from < tile.end; from += S) {
        int mine = from + int(threadIdx.x);  // the query that this thread looks after, if it has one
        bool there = int(threadIdx.x) < S && mine < tile.end;
        int at = window > 0 && there ? positions[mine] : 0;
        // (A barrier as well: nobody reads the last queries any more.)
        if (!__syncthreads_or(there && (window <= 0 || at - (tile_at + tile.rows - 1) < window))) continue;
        load_rows<T, D, S>(q, dim, qkv, [&](int i) { return from + i < tile.end ? columns.row(columns.q, from + i) : nullptr; });
        load_rows<T, D, S>(d_o, dim, qkv,
                           [&](int i) { return from + i < tile.end ? d_out + (long long)(from + i) * (query * dim) + head * dim : nullptr; });
        copy_commit();
        if (int(threadIdx.x) < S) {
            long long row = (long long)mine * query + head;
            q_lse[threadIdx.x] = there ? lse[row] * LOG2E : INFINITY;  // weighs nothing
            q_delta[threadIdx.x] = there ? delta[row] : 0;
            q_at[threadIdx.x] = at;
        }
        copy_wait<0>();
        __syncthreads();
        // Transposed: rows are keys, columns queries.
        float p[N][4], d[N][4];
        clear(p);
        multiply_rows<N, D>(p, k + first * P, q);
        cap_scores(p, scores);
        bool whole = window <= 0 && from >= tile.first + R;
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int c = j * 8 + lane() % 4 * 2 + i % 2, r = first + lane() / 4 + i / 2 * 8;
                bool seen = whole || (from + c >= tile.first + r && (window <= 0 || q_at[c] - (tile_at + r) < window));
                p[j][i] = seen ? exp2_fast(p[j][i] * scores.unit - q_lse[c]) : 0.0f;
            }
        multiply_columns<N, W / 8, D>(d_v, p, d_o + skipped, scratch);
        clear(d);
        multiply_rows<N, D>(d, v + first * P, d_o);
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) p[j][i] *= d[j][i] - q_delta[j * 8 + lane() % 4 * 2 + i % 2];
        if (scores.share > 0) {  // the scores once more: registers do not hold them
            clear(d);
            multiply_rows<N, D>(d, k + first * P, q);
            cap_scores(d, scores);
            through_cap(p, d);
        }
        multiply_columns<N, W / 8, D>(d_k, p, q + skipped, scratch);
    }
    copy_wait<0>();
    for (int half = 0; half < 2; ++half) {
        int r = first + lane() / 4 + 8 * half;
        if (r >= tile.rows) continue;
        float* to = d_heads + ((long long)(tile.first + r) * query + head) * 2 * dim;
#pragma unroll
        for (int j = 0; j < W / 8; ++j) {
            int c = skipped + j * 8 + lane() % 4 * 2;
            if (c < dim) {
                *reinterpret_cast<Pair<float>*>(to + c) = {d_k[j][2 * half] * scores.scale,
                                                           d_k[j][2 * half + 1] * scores.scale};
                *reinterpret_cast<Pair<float>*>(to + dim + c) = {d_v[j][2 * half], d_v[j][2 * half + 1]};
            }
        }
    }
}

// Two columns of a key head's gradients for each thread.
template <class T> __device__ void sum_heads(const float* d_heads, T* d_qkv, int count, int query, int kv, int dim) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, half = dim / 2, group = query / kv;
    int column = i % half * 2, head = i / half % kv, which = i / half / kv % 2, token = i / half / kv / 2;
    if (token >= count) return;
    const float* from = d_heads + (((long long)token * query + head * group) * 2 + which) * dim + column;
    Few<2> sum = Few<2>::load(from);
    for (int g = 1; g < group; ++g) {
        auto next = Few<2>::load(from + g * 2 * dim);
        sum.at[0] += next.at[0], sum.at[1] += next.at[1];
    }
    sum.store(d_qkv + ((long long)token * (query + 2 * kv) + query + which * kv + head) * dim + column);
}

}  // namespace device

#define DEFINE_Q(name, T, D)                                                                                               \
    ATTENTION_BACKWARD_Q(name, T, D) {                                                                                     \
        device::backward_q<T, D>(qkv, out, lse, d_out, delta, d_qkv, tiles[blockIdx.y], query, kv, dim, window, scores);   \
    }
#define DEFINE_KV(name, T, D)                                                                                              \
    ATTENTION_BACKWARD_KV(name, T, D) {                                                                                    \
        device::backward_kv<T, D>(qkv, lse, d_out, delta, positions, d_heads, tiles[blockIdx.y], query, kv, dim, window,   \
                                  scores);                                                                                 \
    }
ATTENTION_VARIANTS(DEFINE_Q, attention_backward_q);
ATTENTION_VARIANTS(DEFINE_KV, attention_backward_kv);

SUM_HEADS(sum_heads_f32, float) { device::sum_heads(d_heads, d_qkv, count, query, kv, dim); }
SUM_HEADS(sum_heads_bf16, bf16) { device::sum_heads(d_heads, d_qkv, count, query, kv, dim); }
