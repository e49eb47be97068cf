// From the fused projection to what attention reads: bias, norm of query and key heads, rotary positions, and the copy
// of keys and values into the cache, in one pass over each row. A warp takes a head; and the gradient of it all.
#include "kernels.h"

namespace device {

// The columns of one head that a lane has: c and c + dim/2 for c = lane, lane + 32, … below dim/2.
template <class F> __device__ void for_pairs(int half, F f) {
    for (int c = lane(); c < half; c += WARP) f(c, c + half);
}

struct HeadNorms {
    const float *q, *k;
    float eps;
    __device__ const float* of(int head, int query, int kv) const { return head < query ? q : head < query + kv ? k : nullptr; }
};

// 1/rms of a head with its bias.
template <class T> __device__ float head_scale(const T* x, const float* bias, int dim, float eps) {
    float squares = 0;
    for_pairs(dim / 2, [&](int a, int b) {
        float u = widen(x[a]) + (bias ? bias[a] : 0), v = widen(x[b]) + (bias ? bias[b] : 0);
        squares += u * u + v * v;
    });
    return 1.0f / sqrtf(warp_sum(squares) / dim + eps);
}

template <class T>
__device__ void qkv_rope(const T* in, T* qkv, const float* bias, HeadNorms norms, const float* cos, const float* sin,
                         const int* positions, T* cache, const int* cache_rows, int query, int kv, int dim) {
    int r = blockIdx.x, heads = query + 2 * kv, half = dim / 2;
    const float *turn = cos + (long long)positions[r] * half, *lift = sin + (long long)positions[r] * half;
    int cache_row = cache ? cache_rows[r] : -1;
    for (int head = warp(); head < heads; head += blockDim.x / WARP) {
        long long at = ((long long)r * heads + head) * dim;
        const float* shift = bias ? bias + head * dim : nullptr;
        const float* weight = norms.of(head, query, kv);
        float scale = weight ? head_scale(in + at, shift, dim, norms.eps) : 1.0f;
        T* copy = cache_row >= 0 && head >= query ? cache + ((long long)cache_row * 2 * kv + head - query) * dim : nullptr;
        for_pairs(half, [&](int a, int b) {
            float x = widen(in[at + a]), y = widen(in[at + b]);
            if (shift) x += shift[a], y += shift[b];
            if (weight) x *= scale * weight[a], y *= scale * weight[b];
            if (head < query + kv) {
                float c = turn[a], s = lift[a], turned = x * c - y * s;
                y = y * c + x * s;
                x = turned;
            }
            T u = narrow<T>(x), v = narrow<T>(y);
            qkv[at + a] = u, qkv[at + b] = v;
            if (copy) copy[a] = u, copy[b] = v;
        });
    }
}

// Rotation turns back; then the norm's gradient (see norm.cu) from the head as it was before. The gradients of the
// norms' weights are summed per warp in shared memory, [warp][q | k][dim], and over the block's warps in order.
template <class T>
__device__ void qkv_rope_backward(const T* in, T* d_qkv, const float* bias, HeadNorms norms, const float* cos,
                                  const float* sin, const int* positions, float* partial, int count, int query, int kv,
                                  int dim) {
    SHARED_MEMORY(float, sums);
    int heads = query + 2 * kv, half = dim / 2, warps = blockDim.x / WARP;
    float* own = sums + warp() * 2 * dim;
    if (norms.q) {
        for (int c = lane(); c < 2 * dim; c += WARP) own[c] = 0;
        __syncwarp();
    }
    int step = (count + gridDim.x - 1) / gridDim.x;
    int last = min(int(blockIdx.x + 1) * step, count);
    for (int r = blockIdx.x * step; r < last; ++r) {
        const float *turn = cos + (long long)positions[r] * half, *lift = sin + (long long)positions[r] * half;
        for (int head = warp(); head < query + kv; head += warps) {
            long long at = ((long long)r * heads + head) * dim;
            const float* shift = bias ? bias + head * dim : nullptr;
            const float* weight = norms.of(head, query, kv);
            float scale = 1, mean = 0;
            if (weight) {
                scale = head_scale(in + at, shift, dim, norms.eps);
                for_pairs(half, [&](int a, int b) {
                    float x = widen(in[at + a]), y = widen(in[at + b]);
                    if (shift) x += shift[a], y += shift[b];
                    float c = turn[a], s = lift[a], u = widen(d_qkv[at + a]), v = widen(d_qkv[at + b]);
                    mean += x * weight[a] * (u * c + v * s) + y * weight[b] * (v * c - u * s);
                });
                mean = warp_sum(mean) * scale / dim;
            }
            float* d_weight = own + (head < query ? 0 : dim);
            for_pairs(half, [&](int a, int b) {
                float c = turn[a], s = lift[a], u = widen(d_qkv[at + a]), v = widen(d_qkv[at + b]);
                float d = u * c + v * s, e = v * c - u * s;
                if (weight) {
                    float x = widen(in[at + a]), y = widen(in[at + b]);
                    if (shift) x += shift[a], y += shift[b];
                    x *= scale, y *= scale;
                    d_weight[a] += d * x, d_weight[b] += e * y;
                    d = scale * (d * weight[a] - x * mean), e = scale * (e * weight[b] - y * mean);
                }
                d_qkv[at + a] = narrow<T>(d), d_qkv[at + b] = narrow<T>(e);
            });
        }
    }
    if (!norms.q || !partial) return;
    __syncthreads();
    for (int c = threadIdx.x; c < 2 * dim; c += blockDim.x) {
        float sum = 0;
        for (int w = 0; w < warps; ++w) sum += sums[w * 2 * dim + c];
        partial[(long long)blockIdx.x * 2 * dim + c] = sum;
    }
}

}  // namespace device

QKV_ROPE(qkv_rope_f32, float) {
    device::qkv_rope(in, qkv, bias, {q_norm, k_norm, eps}, cos, sin, positions, cache, cache_rows, query, kv, dim);
}
QKV_ROPE(qkv_rope_bf16, bf16) {
    device::qkv_rope(in, qkv, bias, {q_norm, k_norm, eps}, cos, sin, positions, cache, cache_rows, query, kv, dim);
}

QKV_ROPE_BACKWARD(qkv_rope_backward_f32, float) {
    device::qkv_rope_backward(in, d_qkv, bias, {q_norm, k_norm, eps}, cos, sin, positions, partial, count, query, kv, dim);
}
QKV_ROPE_BACKWARD(qkv_rope_backward_bf16, bf16) {
    device::qkv_rope_backward(in, d_qkv, bias, {q_norm, k_norm, eps}, cos, sin, positions, partial, count, query, kv, dim);
}
