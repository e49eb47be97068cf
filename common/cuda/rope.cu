// From the fused projection to what attention reads: bias, norm of query, key and value heads, rotary positions, and the copy
// of keys and values into the cache, in one pass; and the gradient of it all. Some lanes of a warp take a head.
#include "kernels.h"

namespace device {

// The lanes of a head (a power of two), whose columns come in fours or one by one: c and c + dim/2 for c below dim/2.
struct HeadLanes {
    int half, count;

    __device__ explicit HeadLanes(int dim) : half(dim / 2), count(1) {
        while (count < WARP && count * (half % 4 == 0 ? 4 : 1) < half) count *= 2;
    }
    // Heads that a warp has at once, and which of them is this lane's.
    __device__ int heads() const { return WARP / count; }
    __device__ int number() const { return lane() / count; }
    __device__ float sum(float x) const {
        for (int step = count / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
        return x;
    }
    template <class F> __device__ void for_pairs(F visit) const {
        for_columns_of(lane() % count, count, 0, half, half, visit);
    }
};

struct HeadNorms {
    const float *q, *k;
    float eps;
    __device__ const float* of(int head, int query, int kv) const { return head < query ? q : head < query + kv ? k : nullptr; }
};

// Tables of cosines and sines.
struct Angles {
    const float *cos, *sin;
};

// The rotation as it comes before the norms, and after them; queries may have rows of their own, from `queries` on.
struct Turns {
    Angles before, after;
    int queries;
    __device__ Turns(const float* cos, const float* sin, int queries, int norms_last)
        : before{cos, sin}, after{cos, sin}, queries(queries) {
        (norms_last ? after : before) = {nullptr, nullptr};
    }
    // The row of a position in the tables.
    __device__ long long row(bool query, int position) const { return (query ? queries : 0) + (long long)position; }
};

// Turns pairs by the angles that begin at `at` in the tables, forth (WAY 1) or back (−1). Without tables they stay.
template <int WAY, class Few> __device__ void turn(Few& x, Few& y, Angles by, long long at) {
    if (!by.cos) return;
    Few cosine = Few::load(by.cos + at), sine = Few::load(by.sin + at);
    for (int i = 0; i < int(sizeof x / 4); ++i) {
        float lift = WAY * sine.at[i], turned = x.at[i] * cosine.at[i] - y.at[i] * lift;
        y.at[i] = y.at[i] * cosine.at[i] + x.at[i] * lift;
        x.at[i] = turned;
    }
}

// As many columns of a head, with its bias.
template <class Few, class T> __device__ Few with_bias(const T* x, const float* bias, int c) {
    Few v = Few::load(x + c);
    if (bias) {
        for (int i = 0; i < int(sizeof v / 4); ++i) v.at[i] += bias[c + i];
    }
    return v;
}

// 1/rms of a head with its bias, turned; every lane of the warp must call it.
template <class T>
__device__ float head_scale(const HeadLanes& lanes, bool there, const T* x, const float* bias, Angles by, long long angle,
                            int dim, float eps) {
    float squares = 0;
    if (there) {
        lanes.for_pairs([&](int c, auto few) {
            auto u = with_bias<decltype(few)>(x, bias, c), v = with_bias<decltype(few)>(x, bias, c + lanes.half);
            turn<1>(u, v, by, angle + c);
            for (int i = 0; i < int(sizeof few / 4); ++i) squares += u.at[i] * u.at[i] + v.at[i] * v.at[i];
        });
    }
    return 1.0f / sqrtf(lanes.sum(squares) / dim + eps);
}

// Rows of the fused projection.
struct Projection {
    int query, kv, dim, skipped;
    Values values;

    __device__ bool norms_values() const { return values == Values::Normed || values == Values::Keys; }
    // Heads of a row: all, and those that turn.
    __device__ int heads() const { return turned() + (values == Values::Given || values == Values::Normed ? kv : 0); }
    __device__ int turned() const { return query + (values == Values::None ? 0 : kv); }
    // The head that one of `qkv` is made of.
    __device__ int source(int head) const { return values == Values::Keys && head >= query + kv ? head - kv : head; }
    // The first element of a head.
    __device__ long long at(int r, int head) const {
        return ((long long)r * heads() + head) * dim + (long long)(head < query ? r : r + 1) * skipped;
    }
};

template <class T>
__device__ void qkv_rope(const T* in, T* qkv, const float* bias, HeadNorms norms, Turns by, const int* positions, T* cache,
                         const int* cache_rows, int count, Projection row) {
    const HeadLanes lanes(row.dim);
    int query = row.query, kv = row.kv, dim = row.dim, turned = row.turned(), half = lanes.half;
    // Values that are where they should be are left alone.
    bool leaves = row.values == Values::None || (row.values == Values::Given && in == qkv && !bias && !cache);
    int heads = turned + (leaves ? 0 : kv);
    int unit = (blockIdx.x * (blockDim.x / WARP) + warp()) * lanes.heads() + lanes.number();
    int r = unit / heads, head = unit % heads;
    bool there = r < count, turns = head < turned, bare = !turns && row.norms_values();
    long long at = ((long long)r * (query + 2 * kv) + head) * dim;
    int source = row.source(head);
    const T* from = in + row.at(r, source);
    const float* shift = bias ? bias + source * dim : nullptr;
    const float* weight = norms.of(head, query, kv);
    long long angle = there && turns ? by.row(head < query, positions[r]) * half : 0;
    float scale = 1;
    if (norms.q || row.norms_values()) {
        Angles before = turns ? by.before : Angles{};
        scale = head_scale(lanes, there && (weight || bare), from, shift, before, angle, dim, norms.eps);
    }
    if (!there) return;
    int cache_row = cache && head >= query ? cache_rows[r] : -1;
    T* copy = cache_row >= 0 ? cache + ((long long)cache_row * 2 * kv + head - query) * dim : nullptr;
    lanes.for_pairs([&](int c, auto few) {
        auto x = with_bias<decltype(few)>(from, shift, c), y = with_bias<decltype(few)>(from, shift, c + half);
        if (bare) {
            for (int i = 0; i < int(sizeof few / 4); ++i) x.at[i] *= scale, y.at[i] *= scale;
        }
        if (turns) turn<1>(x, y, by.before, angle + c);
        if (weight) {
            for (int i = 0; i < int(sizeof few / 4); ++i) x.at[i] *= scale * weight[c + i], y.at[i] *= scale * weight[c + i + half];
        }
        if (turns) turn<1>(x, y, by.after, angle + c);
        x.store(qkv + at + c), y.store(qkv + at + c + half);
        if (copy) x.store(copy + c), y.store(copy + c + half);
    });
}

// Back through the norms of the values of some rows, in place.
template <class T>
__device__ void values_backward(const HeadLanes& lanes, const T* in, T* d_qkv, const float* bias, float eps, int first_row,
                                int rows, Projection row) {
    int query = row.query, kv = row.kv, dim = row.dim, half = lanes.half, at_once = blockDim.x / WARP * lanes.heads();
    for (int first = 0; first < rows * kv; first += at_once) {
        int unit = first + warp() * lanes.heads() + lanes.number(), r = first_row + unit / kv, head = query + kv + unit % kv;
        bool there = unit < rows * kv;
        T* d = d_qkv + ((long long)r * (query + 2 * kv) + head) * dim;
        int source = row.source(head);
        const T* from = in + row.at(r, source);
        const float* shift = bias ? bias + source * dim : nullptr;
        float scale = head_scale(lanes, there, from, shift, Angles{}, 0, dim, eps), mean = 0;
        if (there) {
            lanes.for_pairs([&](int c, auto few) {
                auto x = with_bias<decltype(few)>(from, shift, c), y = with_bias<decltype(few)>(from, shift, c + half);
                auto u = few.load(d + c), v = few.load(d + c + half);
                for (int i = 0; i < int(sizeof few / 4); ++i) mean += x.at[i] * u.at[i] + y.at[i] * v.at[i];
            });
        }
        mean = lanes.sum(mean) * scale / dim;
        if (!there) continue;
        lanes.for_pairs([&](int c, auto few) {
            auto x = with_bias<decltype(few)>(from, shift, c), y = with_bias<decltype(few)>(from, shift, c + half);
            auto u = few.load(d + c), v = few.load(d + c + half);
            for (int i = 0; i < int(sizeof few / 4); ++i) {
                u.at[i] = scale * (u.at[i] - x.at[i] * scale * mean);
                v.at[i] = scale * (v.at[i] - y.at[i] * scale * mean);
            }
            u.store(d + c), v.store(d + c + half);
        });
    }
}

// Rotation turns back; then the norm's gradient (see norm.cu) from the head as it was before; or the other way round. Before
// that values are taken back to what they were made of, since keys may gain it. The gradients of the norms' weights are summed
// by whoever has a head at a time in shared memory, [heads of the block][q | k][dim], and then over those in order.
template <class T>
__device__ void qkv_rope_backward(const T* in, T* d_qkv, const float* bias, HeadNorms norms, Turns by,
                                  const int* positions, float* partial, int count, Projection row) {
    SHARED_MEMORY(float, sums);
    const HeadLanes lanes(row.dim);
    int query = row.query, kv = row.kv, dim = row.dim;
    int turned = row.turned(), half = lanes.half, at_once = blockDim.x / WARP * lanes.heads();
    int own = warp() * lanes.heads() + lanes.number();
    float* own_sums = sums + own * 2 * dim;
    if (norms.q) {
        for (int c = lane() % lanes.count; c < 2 * dim; c += lanes.count) own_sums[c] = 0;
        __syncwarp();
    }
    // Heads of the block's rows, those of a row after each other.
    int step = (count + gridDim.x - 1) / gridDim.x, first_row = blockIdx.x * step;
    int rows = max(min(first_row + step, count) - first_row, 0), units = rows * turned;
    if (row.norms_values()) {
        values_backward(lanes, in, d_qkv, bias, norms.eps, first_row, rows, row);
        __syncthreads();
    }
    for (int first = 0; first < units; first += at_once) {
        int unit = first + own, r = first_row + unit / turned, head = unit % turned;
        bool there = unit < units;
        long long at = ((long long)r * (query + 2 * kv) + head) * dim;
        const T* from = in + row.at(r, head);
        const float* shift = bias ? bias + head * dim : nullptr;
        const float* weight = norms.of(head, query, kv);
        long long angle = there ? by.row(head < query, positions[r]) * half : 0;
        float scale = 1, mean = 0;
        if (norms.q) {
            scale = head_scale(lanes, there, from, shift, by.before, angle, dim, norms.eps);
            if (there) {
                lanes.for_pairs([&](int c, auto few) {
                    auto x = with_bias<decltype(few)>(from, shift, c), y = with_bias<decltype(few)>(from, shift, c + half);
                    auto u = few.load(d_qkv + at + c), v = few.load(d_qkv + at + c + half);
                    turn<1>(x, y, by.before, angle + c);
                    turn<-1>(u, v, by.after, angle + c);
                    for (int i = 0; i < int(sizeof few / 4); ++i) {
                        mean += x.at[i] * weight[c + i] * u.at[i] + y.at[i] * weight[c + i + half] * v.at[i];
                    }
                });
            }
            mean = lanes.sum(mean) * scale / dim;
        }
        if (!there) continue;
        float* d_weight = own_sums + (head < query ? 0 : dim);
        lanes.for_pairs([&](int c, auto few) {
            auto u = few.load(d_qkv + at + c), v = few.load(d_qkv + at + c + half);
            turn<-1>(u, v, by.after, angle + c);
            if (weight) {
                auto x = with_bias<decltype(few)>(from, shift, c), y = with_bias<decltype(few)>(from, shift, c + half);
                turn<1>(x, y, by.before, angle + c);
                for (int i = 0; i < int(sizeof few / 4); ++i) {
                    x.at[i] *= scale, y.at[i] *= scale;
                    d_weight[c + i] += u.at[i] * x.at[i], d_weight[c + i + half] += v.at[i] * y.at[i];
                    u.at[i] = scale * (u.at[i] * weight[c + i] - x.at[i] * mean);
                    v.at[i] = scale * (v.at[i] * weight[c + i + half] - y.at[i] * mean);
                }
            }
            turn<-1>(u, v, by.before, angle + c);
            if (row.values == Values::Keys && head >= query) {
                const T* given = d_qkv + at + kv * dim + c;
                auto x = few.load(given), y = few.load(given + half);
                for (int i = 0; i < int(sizeof few / 4); ++i) u.at[i] += x.at[i], v.at[i] += y.at[i];
            }
            u.store(d_qkv + at + c), v.store(d_qkv + at + c + half);
        });
    }
    if (!norms.q || !partial) return;
    __syncthreads();
    int width = norms.k ? 2 * dim : dim;
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        float sum = 0;
        for (int i = 0; i < at_once; ++i) sum += sums[i * 2 * dim + c];
        partial[(long long)blockIdx.x * width + c] = sum;
    }
}

}  // namespace device

QKV_ROPE(qkv_rope_f32, float) {
    device::qkv_rope(in, qkv, bias, {q_norm, k_norm, eps}, {cos, sin, queries, norms_last}, positions, cache, cache_rows, count,
                     {query, kv, dim, skipped, values});
}
QKV_ROPE(qkv_rope_bf16, bf16) {
    device::qkv_rope(in, qkv, bias, {q_norm, k_norm, eps}, {cos, sin, queries, norms_last}, positions, cache, cache_rows, count,
                     {query, kv, dim, skipped, values});
}

QKV_ROPE(qkv_rope_f16, f16) {
    device::qkv_rope(in, qkv, bias, {q_norm, k_norm, eps}, {cos, sin, queries, norms_last}, positions, cache, cache_rows, count,
                     {query, kv, dim, skipped, values});
}

QKV_ROPE_BACKWARD(qkv_rope_backward_f32, float) {
    device::qkv_rope_backward(in, d_qkv, bias, {q_norm, k_norm, eps}, {cos, sin, queries, norms_last}, positions, partial, count,
                              {query, kv, dim, skipped, values});
}
QKV_ROPE_BACKWARD(qkv_rope_backward_bf16, bf16) {
    device::qkv_rope_backward(in, d_qkv, bias, {q_norm, k_norm, eps}, {cos, sin, queries, norms_last}, positions, partial, count,
                              {query, kv, dim, skipped, values});
}
