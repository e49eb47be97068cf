// RMSNorm of the residual stream and its gradient: y = x / √(mean(x²) + ε) · w, a block for a row. (A weight may lie
// anywhere in a flat buffer, so it is read one by one; rows are read in fours.)
#include "kernels.h"

namespace device {

template <class T>
__device__ void rms_norm(const float* x, const int* rows, const float* weight, float eps, T* out, int width) {
    const float* from = x + (long long)(rows ? rows[blockIdx.x] : blockIdx.x) * width;
    T* to = out + (long long)blockIdx.x * width;
    float squares = 0;
    for_columns(0, width, width, [&](int c, auto few) {
        auto v = few.load(from + c);
        for (float y : v.at) squares += y * y;
    });
    float scale = 1.0f / sqrtf(block_sum(squares) / width + eps);
    for_columns(0, width, width, [&](int c, auto few) {
        auto v = few.load(from + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) v.at[i] *= scale * weight[c + i];
        v.store(to + c);
    });
}

// With x̂ = x·s, s = 1/rms, g = dy·w: dx = s·(g − x̂·mean(g·x̂)); dw = Σ dy·x̂, summed here over the block's rows in
// shared memory, where each thread has its own columns.
template <class T>
__device__ void rms_norm_backward(const float* x, const int* rows, const float* weight, float eps, const T* dy, float* dx,
                                  T* dx_copy, float* partial, int count, int width, int add) {
    SHARED_MEMORY(float, d_weight);
    for_columns(0, width, width, [&](int c, auto few) {
        for (int i = 0; i < int(sizeof few / 4); ++i) d_weight[c + i] = 0;
    });
    int step = (count + gridDim.x - 1) / gridDim.x;
    int last = min(int(blockIdx.x + 1) * step, count);
    for (int r = blockIdx.x * step; r < last; ++r) {
        const float* from = x + (long long)(rows ? rows[r] : r) * width;
        const T* dy_row = dy + (long long)r * width;
        float* dx_row = dx + (long long)r * width;
        float squares = 0, product = 0;
        for_columns(0, width, width, [&](int c, auto few) {
            auto v = few.load(from + c), d = few.load(dy_row + c);
            for (int i = 0; i < int(sizeof few / 4); ++i) squares += v.at[i] * v.at[i], product += v.at[i] * weight[c + i] * d.at[i];
        });
        float scale = 1.0f / sqrtf(block_sum(squares) / width + eps);
        float mean = block_sum(product) * scale / width;
        for_columns(0, width, width, [&](int c, auto few) {
            auto v = few.load(from + c), d = few.load(dy_row + c);
            if (add) few = few.load(dx_row + c);
            for (int i = 0; i < int(sizeof few / 4); ++i) {
                float normed = v.at[i] * scale;
                few.at[i] = (add ? few.at[i] : 0.0f) + scale * (d.at[i] * weight[c + i] - normed * mean);
                d_weight[c + i] += d.at[i] * normed;
            }
            few.store(dx_row + c);
            if (dx_copy) few.store(dx_copy + (long long)r * width + c);
        });
    }
    if (partial) {
        for_columns(0, width, width, [&](int c, auto few) { few.load(d_weight + c).store(partial + (long long)blockIdx.x * width + c); });
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
