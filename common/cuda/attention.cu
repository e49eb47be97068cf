// Causal attention over a packed, prefix-shared batch: a block for a tile of queries and a head, passing over the keys
// that any of its rows sees (FlashAttention-2, arXiv 2307.08691, on the batches of common/src/kernels/layout.rs).
//
// Keys are numbered by position: those of the root first, then the segment's own. A tile of keys may hold both, so the
// seam costs nothing, and tiles that nobody sees are never loaded.
//
// Shared memory holds one tile each of queries, keys and values. While scores are formed the values arrive, and while
// they are weighed the next keys; at D = 128 in bf16 that is 52 KiB, so that four blocks (their registers are held to that)
// share an SM and hide what remains. At D = 512 a block makes whole scores, but has values of its own columns alone.
#include "kernels.h"
#include "positions.h"
#include "tile.h"

namespace device {

template <class T, int D>
__device__ void attention(const T* qkv, T* out, float* lse, AttentionTile tile, const float* sinks, int query, int kv, int dim,
                          int window, Scores scores) {
    constexpr int R = attention_rows<T>, S = forward_step<T, D>, N = S / 8, P = pitch<T, D>;
    constexpr int W = result_columns<D>;
    SHARED_MEMORY(T, q);
    T *k = q + R * P, *v = k + S * P;
    float* scratch = reinterpret_cast<float*>(v + S * pitch<T, W>) + warp() * 16 * scratch_pitch<S>;
    int head = blockIdx.x, skipped = D > W ? blockIdx.z * W : 0;
    const Head<T> columns(qkv, query, kv, dim, head);
    const Visible visible{tile, window};
    int end = visible.end();

    auto load_keys = [&](int from) {
        load_rows<T, D, S>(k, dim, qkv, [&](int i) { return from + i < end ? columns.row(columns.k, visible.row(from + i)) : nullptr; });
        copy_commit();
    };
    auto load_values = [&](int from) {
        load_rows<T, W, S>(v, dim - skipped, qkv, [&](int i) {
            return from + i < end ? columns.row(columns.v, visible.row(from + i)) + skipped : nullptr;
        });
        copy_commit();
    };

    load_rows<T, D, R>(q, dim, qkv, [&](int i) { return i < tile.rows ? columns.row(columns.q, tile.first + i) : nullptr; });
    load_keys(visible.begin());
    Online<W / 8> state;
    state.begin(sinks ? sinks[head] * LOG2E : -INFINITY);
    for (int from = visible.begin(); from < end; from += S) {
        copy_wait<0>();
        __syncthreads();  // these keys are here, and nobody reads the last values any more
        load_values(from);
        float s[N][4];
        clear(s);
        multiply_rows<N, D>(s, q + warp() * 16 * P, k);
        cap_scores(s, scores);
        visible.mask(s, from, warp() * 16);
        copy_wait<0>();
        __syncthreads();  // the values are here, and nobody reads the keys any more
        if (from + S < end) load_keys(from + S);
        state.weigh(s, scores.unit);
        multiply_columns<N, W / 8, W>(state.o, s, v, scratch);
    }
    state.finish();
    for (int half = 0; half < 2; ++half) {
        int r = warp() * 16 + lane() / 4 + 8 * half;
        if (r >= tile.rows) continue;
        long long token = tile.first + r;
        float share = 1.0f / state.sum[half];
        T* to = out + (token * query + head) * dim;
#pragma unroll
        for (int j = 0; j < W / 8; ++j) {
            int c = skipped + j * 8 + lane() % 4 * 2;
            if (c < dim) {
                *reinterpret_cast<Pair<T>*>(to + c) = {narrow<T>(state.o[j][2 * half] * share),
                                                       narrow<T>(state.o[j][2 * half + 1] * share)};
            }
        }
        if (lane() % 4 == 0 && skipped == 0) lse[token * query + head] = state.lse(half);
    }
}

}  // namespace device

#define DEFINE(name, T, D) \
    ATTENTION(name, T, D) { device::attention<T, D>(qkv, out, lse, tiles[blockIdx.y], sinks, query, kv, dim, window, scores); }
ATTENTION_VARIANTS(DEFINE, attention);
ATTENTION_VARIANTS_F16(DEFINE, attention);
