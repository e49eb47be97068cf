// RMSNorm of the residual stream and its gradient: y = x / √(mean(x²) + ε) · w, a block for a row.
#include "kernels.h"

namespace device {

template <class T>
__device__ void rms_norm(const float* x, const int* rows, const float* weight, float eps, T* out, int width) {
    const float* from = x + (long long)(rows ? rows[blockIdx.x] : blockIdx.x) * width;
    T* to = out + (long long)blockIdx.x * width;
    float squares = 0;
    for (int c = threadIdx.x; c < width; c += blockDim.x) squares += from[c] * from[c];
    float scale = 1.0f / sqrtf(block_sum(squares) / width + eps);
    for (int c = threadIdx.x; c < width; c += blockDim.x) to[c] = narrow<T>(from[c] * scale * weight[c]);
}

// With x̂ = x·s, s = 1/rms, g = dy·w: dx = s·(g − x̂·mean(g·x̂)); dw = Σ dy·x̂, summed here over the block's rows in
// shared memory, where each thread has its own columns.
template <class T>
__device__ void rms_norm_backward(const float* x, const int* rows, const float* weight, float eps, const T* dy, float* dx,
                                  T* dx_copy, float* partial, int count, int width, int add) {
    SHARED_MEMORY(float, d_weight);
    for (int c = threadIdx.x; c < width; c += blockDim.x) d_weight[c] = 0;
    int step = (count + gridDim.x - 1) / gridDim.x;
    int last = min(int(blockIdx.x + 1) * step, count);
    for (int r = blockIdx.x * step; r < last; ++r) {
        const float* from = x + (long long)(rows ? rows[r] : r) * width;
        long long at = (long long)r * width;
        float squares = 0, product = 0;
        for (int c = threadIdx.x; c < width; c += blockDim.x) {
            squares += from[c] * from[c];
            product += from[c] * weight[c] * widen(dy[at + c]);
        }
        float scale = 1.0f / sqrtf(block_sum(squares) / width + eps);
        float mean = block_sum(product) * scale / width;
        for (int c = threadIdx.x; c < width; c += blockDim.x) {
            float normed = from[c] * scale, d = widen(dy[at + c]);
            float gradient = scale * (d * weight[c] - normed * mean);
            if (add) gradient += dx[at + c];
            dx[at + c] = gradient;
            if (dx_copy) dx_copy[at + c] = narrow<T>(gradient);
            d_weight[c] += d * normed;
        }
    }
    if (partial) {
        for (int c = threadIdx.x; c < width; c += blockDim.x) partial[(long long)blockIdx.x * width + c] = d_weight[c];
    }
}

}  // namespace device

RMS_NORM(rms_norm_f32, float) { device::rms_norm(x, rows, weight, eps, out, width); }
RMS_NORM(rms_norm_bf16, bf16) { device::rms_norm(x, rows, weight, eps, out, width); }

RMS_NORM_BACKWARD(rms_norm_backward_f32, float) {
    device::rms_norm_backward(x, rows, weight, eps, dy, dx, dx_copy, partial, count, width, add);
}
RMS_NORM_BACKWARD(rms_norm_backward_bf16, bf16) {
    device::rms_norm_backward(x, rows, weight, eps, dy, dx, dx_copy, partial, count, width, add);
}
