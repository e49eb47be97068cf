// Attention of one new token of each of many sequences, whose keys and values lie in pages.
//
// The time goes into reading keys and values, so each is read once where it can be. The prompt's are shared by its
// samples: their query heads are the rows of one tensor core tile, 64 at a time (16 samples × 4 heads of Llama-3-8B are
// just that), and a block's. A sequence's own keys serve its `group` heads alone: 16 rows, some empty, and a warp's,
// which goes over the keys 16 at a time without waiting for anybody: so the device holds a thousand sequences' heads at
// once, each with the next keys on their way while it works on the last. Both parts are split along the sequence, so that
// a few sequences fill the device too; the parts meet in decode_merge by their log-sum-exps (base 2 here). Two neighbouring
// blocks make the columns of heads wider than 256, so that the second finds the keys in L2.
#include "kernels.h"
#include "tile.h"

namespace device {

// What all blocks of a launch share.
template <class T> struct Decode {
    const T *qkv, *cache;
    float *partial, *partial_lse;
    const Sequence* sequences;
    const int *positions, *order, *pages;
    int max_pages, count, prefix_splits, own_splits, query, kv, dim, window;
    Scores scores;
    int skipped;  // columns of results before those of the block

    __device__ int group() const { return query / kv; }
    __device__ const T* q(int sequence, int head) const { return qkv + ((long long)sequence * (query + 2 * kv) + head) * dim; }
    // The keys of a head from row i of a table on, as far as its page goes; the values lie kv·dim further on.
    __device__ const T* keys(int table, int i, int kv_head) const {
        long long row = (long long)pages[(long long)table * max_pages + i / PAGE] * PAGE + i % PAGE;
        return cache + (row * 2 * kv + kv_head) * dim;
    }
    __device__ long long part(int split, int sequence, int head) const {
        return ((long long)split * count + sequence) * query + head;
    }
};

// The keys first … last − 1 of a split: whole tiles, shared out evenly.
struct Keys {
    int first, last;
    __device__ Keys(int len, int rows, int split, int splits) {
        int tiles = (len + rows - 1) / rows, each = (tiles + splits - 1) / splits * rows;
        first = split * each;
        last = min(first + each, len);
    }
};

// Loads the tiles of keys and values from row `from` of a table on, which begins a tile and so lies in one page with it.
template <class T, int D>
__device__ void load_tile(const Decode<T>& d, T* k, T* v, int table, int from, int last, int kv_head) {
    constexpr int S = forward_step<T, D>;
    static_assert(PAGE % S == 0, "a tile would lie in two pages");
    const T* keys = d.keys(table, from, kv_head);
    int rows = last - from, width = 2 * d.kv * d.dim, to_values = d.kv * d.dim + d.skipped;
    load_rows<T, D, S>(k, d.dim, keys, [&](int i) { return i < rows ? keys + i * width : nullptr; });
    load_rows<T, result_columns<D>, S>(v, d.dim - d.skipped, keys, [&](int i) { return i < rows ? keys + i * width + to_values : nullptr; });
    copy_commit();
}

// Writes what a warp found for its 16 rows: place(i) is where row i belongs in the partial results, or below 0.
template <class T, int N, class F> __device__ void store_part(const Decode<T>& d, Online<N>& state, F place) {
    state.finish();
    for (int half = 0; half < 2; ++half) {
        long long at = place(lane() / 4 + 8 * half);
        if (at < 0) continue;
        bool any = state.sum[half] > 0;
        float share = any ? 1.0f / state.sum[half] : 0.0f;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            int c = d.skipped + j * 8 + lane() % 4 * 2;
            if (c < d.dim) {
                *reinterpret_cast<Pair<float>*>(d.partial + at * d.dim + c) = {state.o[j][2 * half] * share,
                                                                               state.o[j][2 * half + 1] * share};
            }
        }
        if (lane() % 4 == 0 && d.skipped == 0) d.partial_lse[at] = any ? state.max[half] + log2f(state.sum[half]) : -INFINITY;
    }
}

// The prompt's part of a tile of rows.
template <class T, int D> __device__ void prompt_part(const Decode<T>& d, DecodeTile tile, int split, int kv_head) {
    constexpr int R = attention_rows<T>, S = forward_step<T, D>, N = S / 8, P = pitch<T, D>;
    constexpr int W = result_columns<D>;
    SHARED_MEMORY(T, q);
    T *k = q + R * P, *v = k + S * P;
    float* scratch = reinterpret_cast<float*>(v + S * pitch<T, W>) + warp() * 16 * scratch_pitch<S>;
    if (tile.rows == 0) return;
    int group = d.group();
    // Its own length decides, not that of others, into how many parts its sums are cut.
    Keys keys(tile.prefix_len, S, split, min(max(tile.prefix_len / PREFIX_SPLIT, 1), d.prefix_splits));
    load_rows<T, D, R>(q, d.dim, d.qkv, [&](int i) {
        int row = tile.first + i;
        return i < tile.rows ? d.q(d.order[row / group], kv_head * group + row % group) : nullptr;
    });
    copy_commit();
    int start[2];  // the first position that rows g and g + 8 see
    for (int half = 0; half < 2; ++half) {
        int i = warp() * 16 + lane() / 4 + 8 * half;
        start[half] = d.window > 0 && i < tile.rows ? d.positions[d.order[(tile.first + i) / group]] - d.window + 1 : 0;
    }
    Online<W / 8> state;
    state.begin();
    for (int from = keys.first; from < keys.last; from += S) {
        __syncthreads();
        load_tile<T, D>(d, k, v, tile.prefix_table, from, keys.last, kv_head);
        copy_wait<0>();
        __syncthreads();
        float s[N][4];
        clear(s);
        multiply_rows<N, D>(s, q + warp() * 16 * P, k);
        cap_scores(s, d.scores);
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int key = from + j * 8 + lane() % 4 * 2 + i % 2;
                if (key >= keys.last || key < start[i / 2]) s[j][i] = -INFINITY;
            }
        state.weigh(s, d.scores.unit);
        multiply_columns<N, W / 8, W>(state.o, s, v, scratch);
    }
    copy_wait<0>();
    store_part(d, state, [&](int i) -> long long {
        int row = tile.first + warp() * 16 + i;
        return warp() * 16 + i < tile.rows ? d.part(split, d.order[row / group], kv_head * group + row % group) : -1;
    });
}

// A sequence's own part, for up to 16 heads from `first_head` on: a warp's work.
template <class T, int D> __device__ void own_part(const Decode<T>& d, int sequence, int split, int kv_head, int first_head, int heads) {
    constexpr int P = pitch<T, D>, W = result_columns<D>, WARPS = attention_rows<T> / 16, STEP = forward_step<T, D> / WARPS;
    constexpr int OWN = 16 * P + STEP * (P + pitch<T, W>);
    SHARED_MEMORY(T, tiles);
    T *q = tiles + warp() * OWN, *k = q + 16 * P, *v = k + STEP * P;
    float* scratch = reinterpret_cast<float*>(tiles + WARPS * OWN) + warp() * 16 * scratch_pitch<STEP>;
    Sequence own = d.sequences[sequence];
    if (own.limit == 0) return;  // nobody's
    int len = d.positions[sequence] + 1 - own.prefix_len;
    int start = d.window > 0 ? max(len - d.window, 0) : 0;
    Keys keys(len, STEP, split, d.own_splits);
    int width = 2 * d.kv * d.dim, to_values = d.kv * d.dim + d.skipped, first = max(keys.first, start / STEP * STEP);
    // Rows of a step are loaded by the lanes of the warp; a step lies in one page, since it begins at a multiple of its rows.
    auto load_keys = [&](const T* at, int rows) {
        load_rows<T, D, STEP, WARP>(k, d.dim, at, [&](int i) { return i < rows ? at + i * width : nullptr; });
        copy_commit();
    };
    const T* at = first < keys.last ? d.keys(own.own_table, first, kv_head) : d.cache;
    const T* queries = d.q(sequence, first_head);
    load_rows<T, D, 16, WARP>(q, d.dim, queries, [&](int i) { return i < heads ? queries + i * d.dim : nullptr; });
    copy_commit();
    load_keys(at, keys.last - first);
    Online<W / 8> state;
    state.begin();
    for (int from = first; from < keys.last; from += STEP) {
        const T* next = from + STEP < keys.last ? d.keys(own.own_table, from + STEP, kv_head) : at;
        load_rows<T, W, STEP, WARP>(v, d.dim - d.skipped, at,
                                    [&](int i) { return i < keys.last - from ? at + to_values + i * width : nullptr; });
        copy_commit();
        copy_wait<1>();
        __syncwarp();  // the keys are here
        float s[STEP / 8][4];
        clear(s);
        multiply_rows<STEP / 8, D>(s, q, k);
        cap_scores(s, d.scores);
        __syncwarp();  // and may be overwritten
        load_keys(next, keys.last - from - STEP);
#pragma unroll
        for (int j = 0; j < STEP / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int key = from + j * 8 + lane() % 4 * 2 + i % 2;
                if (key >= keys.last || key < start) s[j][i] = -INFINITY;
            }
        state.weigh(s, d.scores.unit);
        copy_wait<1>();
        __syncwarp();  // the values are here
        multiply_columns<STEP / 8, W / 8, W>(state.o, s, v, scratch);
        __syncwarp();
        at = next;
    }
    copy_wait<0>();
    store_part(d, state, [&](int i) -> long long {
        return i < heads ? d.part(d.prefix_splits + split, sequence, first_head + i) : -1;
    });
}

// Blocks for the prompts' tiles, splits and heads come first; then each warp takes heads of a sequence and a split.
template <class T, int D> __device__ void decode_attention(const Decode<T>& d, const DecodeTile* tiles, int tile_count) {
    int prompts = tile_count * d.prefix_splits * d.kv, b = blockIdx.x / (D / result_columns<D>);
    if (b < prompts) {
        int tile = b / d.kv / d.prefix_splits, split = b / d.kv % d.prefix_splits;
        return prompt_part<T, D>(d, tiles[tile], split, b % d.kv);
    }
    int parts = (d.group() + 15) / 16, heads = d.kv * parts, unit = (b - prompts) * (attention_rows<T> / 16) + warp();
    int head = unit % heads, split = unit / heads % d.own_splits, sequence = unit / heads / d.own_splits;
    if (sequence >= d.count) return;
    int kv_head = head / parts, skipped = head % parts * 16;
    own_part<T, D>(d, sequence, split, kv_head, kv_head * d.group() + skipped, min(d.group() - skipped, 16));
}

// A warp for a row; its lanes weigh a part each (there are at most 32) and then take columns.
template <class T>
__device__ void decode_merge(const float* partial, const float* partial_lse, const float* sinks, T* out, int parts, int rows,
                             int query, int dim) {
    int row = blockIdx.x * 8 + warp();
    if (row >= rows) return;
    float lse = lane() < parts ? partial_lse[(long long)lane() * rows + row] : -INFINITY;
    float sink = sinks ? sinks[row % query] * LOG2E : -INFINITY, highest = fmaxf(warp_max(lse), sink);
    float weight = lse > -INFINITY ? exp2_fast(lse - highest) : 0.0f;
    // In the parts' order: how many lanes there are before a sequence's own parts is up to its neighbours.
    float total = sinks ? exp2_fast(sink - highest) : 0.0f;
    for (int p = 0; p < parts; ++p) total += __shfl_sync(ALL, weight, p);
    weight /= total;
    for (int first = 0; first < dim; first += 2 * WARP) {
        int c = first + 2 * lane();
        Few<2> sum{};
        for (int p = 0; p < parts; ++p) {
            float share = __shfl_sync(ALL, weight, p);
            if (share == 0 || c >= dim) continue;  // what a part without keys wrote is nothing
            auto x = Few<2>::load(partial + ((long long)p * rows + row) * dim + c);
            sum.at[0] += share * x.at[0], sum.at[1] += share * x.at[1];
        }
        if (c < dim) sum.store(out + (long long)row * dim + c);
    }
}

}  // namespace device

#define DEFINE(name, T, D)                                                                                                      \
    DECODE_ATTENTION(name, T, D) {                                                                                              \
        device::Decode<T> all{qkv, cache, partial, partial_lse, sequences, positions, order, pages, max_pages, count,          \
                              prefix_splits, own_splits, query, kv, dim, window, scores,                                      \
                              int(blockIdx.x % (D / device::result_columns<D>)) * device::result_columns<D>};                 \
        device::decode_attention<T, D>(all, tiles, tile_count);                                                                 \
    }
ATTENTION_VARIANTS(DEFINE, decode_attention);

DECODE_MERGE(decode_merge_f32, float) { device::decode_merge(partial, partial_lse, sinks, out, parts, rows, query, dim); }
DECODE_MERGE(decode_merge_bf16, bf16) { device::decode_merge(partial, partial_lse, sinks, out, parts, rows, query, dim); }
