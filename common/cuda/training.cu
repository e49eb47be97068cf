// The optimiser: AdamW, clipping and the working copy, each in one pass over memory.
#include "kernels.h"

namespace device {

// Calls f(i) for this thread's share of n elements.
template <class F> __device__ void for_elements(long long n, F f) {
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) f(i);
}

// Moments are read and written in their own format. bfloat16 keeps 8 bits, and a step moves v by a thousandth: rounded to
// the nearest it would stand still, so it is rounded stochastically, anew in every step.
__device__ inline void store_moment(float& to, float x, uint32_t) { to = x; }
__device__ inline void store_moment(bf16& to, float x, uint32_t noise) { to = round_with(x, noise); }

template <class M>
__device__ void adamw(const Run& run, float* p, float* g, M* m, M* v, bf16* copy, float factor, float rate, float root,
                      float keep, int step) {
    constexpr float BETA1 = 0.9f, BETA2 = 0.999f, EPSILON = 1e-8f;
    for (int c = threadIdx.x; c < run.len; c += blockDim.x) {
        long long i = run.first + c;
        float gradient = g[i] * factor, first = widen(m[i]), second = widen(v[i]), value = p[i];
        if (run.decayed) value *= keep;
        first += (gradient - first) * (1.0f - BETA1);
        second = second * BETA2 + gradient * gradient * (1.0f - BETA2);
        value -= rate * first / (sqrtf(second) / root + EPSILON);
        g[i] = 0;
        uint32_t noise = uint32_t(i) * 2 + uint32_t(step) * 0x9e3779b9u;
        store_moment(m[i], first, sixteen_bits(noise));
        store_moment(v[i], second, sixteen_bits(noise + 1));
        p[i] = value;
        if (copy) copy[i] = round_with(value, sixteen_bits(uint32_t(i)));
    }
}

}  // namespace device

ADAMW(adamw_f32, float) { device::adamw(runs[blockIdx.x], p, g, m, v, copy, factor[0], rate, root, keep, step); }
ADAMW(adamw_bf16, bf16) { device::adamw(runs[blockIdx.x], p, g, m, v, copy, factor[0], rate, root, keep, step); }

KERNEL(256, square_sum, const float* x, long long n, double* partial) {
    long long length = (n + gridDim.x - 1) / gridDim.x, first = blockIdx.x * length;
    long long last = min(first + length, n);
    double sum = 0;
    for (long long i = first + threadIdx.x; i < last; i += blockDim.x) sum += double(x[i]) * x[i];
    sum = device::block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

KERNEL(256, clip, const double* partial, int blocks, double limit, double* norm, float* factor) {
    double sum = 0;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) sum += partial[i];
    sum = device::block_sum(sum);
    if (threadIdx.x == 0) {
        norm[0] = sqrt(sum);
        factor[0] = limit > 0 ? float(fmin(limit / (norm[0] + 1e-6), 1.0)) : 1.0f;
    }
}

KERNEL(256, round_bf16, const float* x, bf16* y, long long n, long long first, int dithered) {
    using namespace device;
    for_elements(n, [=](long long i) {
        y[i] = dithered ? round_with(x[i], sixteen_bits(uint32_t(first + i))) : narrow<bf16>(x[i]);
    });
}

KERNEL(256, widen_bf16, const bf16* x, float* y, long long n) {
    device::for_elements(n, [=](long long i) { y[i] = device::widen(x[i]); });
}

KERNEL(256, scale_f32, float* x, long long n, float factor) {
    device::for_elements(n, [=](long long i) { x[i] *= factor; });
}
