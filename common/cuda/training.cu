// The optimiser: AdamW, clipping and the working copy, each in one pass over memory.
#include "kernels.h"

namespace device {

// Moments are read and written in their own format. bfloat16 keeps 8 bits, and a step moves v by a thousandth: rounded to
// the nearest it would stand still, so it is rounded stochastically, anew in every step.
template <int N> __device__ inline void store_moments(float* to, const Few<N>& x, uint32_t, int) { x.store(to); }
template <int N> __device__ inline void store_moments(bf16* to, const Few<N>& x, uint32_t number, int step) {
    typename Few<N>::template Stored<bf16> stored;
#pragma unroll
    for (int i = 0; i < N; ++i) stored.at[i] = round_with(x.at[i], sixteen_bits(number + 2 * i + uint32_t(step) * 0x9e3779b9u));
    *reinterpret_cast<decltype(stored)*>(to) = stored;
}

// The working copy is rounded by a noise that stays with the element: see `Mat::dithered`.
template <int N> __device__ inline void store_dithered(bf16* to, const Few<N>& x, uint32_t number) {
    typename Few<N>::template Stored<bf16> stored;
#pragma unroll
    for (int i = 0; i < N; ++i) stored.at[i] = round_with(x.at[i], sixteen_bits(number + i));
    *reinterpret_cast<decltype(stored)*>(to) = stored;
}

// What a step is made with.
struct Rates {
    float factor, rate, root, keep;
    int step;
};

// One step of one parameter; the moments are changed in place.
__device__ inline float adamw(float p, float g, float& m, float& v, const Rates& rates) {
    constexpr float BETA1 = 0.9f, BETA2 = 0.999f, EPSILON = 1e-8f;
    m += (g - m) * (1.0f - BETA1);
    v = v * BETA2 + g * g * (1.0f - BETA2);
    return p - rates.rate * m / (sqrtf(v) / rates.root + EPSILON);
}

template <class M> __device__ void adamw(const Run& run, float* p, float* g, M* m, M* v, bf16* copy, Rates rates) {
    auto visit = [&](int c, auto few) {
        long long i = run.first + c;
        auto value = few.load(p + i), gradient = few.load(g + i), first = few.load(m + i), second = few.load(v + i);
#pragma unroll
        for (int e = 0; e < int(sizeof few / 4); ++e) {
            if (run.decayed) value.at[e] *= rates.keep;
            value.at[e] = adamw(value.at[e], gradient.at[e] * rates.factor, first.at[e], second.at[e], rates);
            gradient.at[e] = 0;
        }
        value.store(p + i);
        gradient.store(g + i);
        store_moments(m + i, first, uint32_t(i) * 2, rates.step);
        store_moments(v + i, second, uint32_t(i) * 2 + 1, rates.step);
        if (copy) store_dithered(copy + i, value, uint32_t(i));
    };
    // In fours where the run begins at a multiple of four; what is left at its end one by one.
    int fours = run.first % 4 == 0 ? run.len / 4 * 4 : 0;
    for (int c = 4 * int(threadIdx.x); c < fours; c += 4 * blockDim.x) visit(c, Few<4>{});
    for (int c = fours + int(threadIdx.x); c < run.len; c += blockDim.x) visit(c, Few<1>{});
}

}  // namespace device

ADAMW(adamw_f32, float) { device::adamw(runs[blockIdx.x], p, g, m, v, copy, {factor[0], rate, root, keep, step}); }
ADAMW(adamw_bf16, bf16) { device::adamw(runs[blockIdx.x], p, g, m, v, copy, {factor[0], rate, root, keep, step}); }

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

KERNEL(256, round_f16, const float* x, f16* y, long long n) {
    device::for_elements(n, [=](long long i) { y[i] = device::narrow<f16>(x[i]); });
}

KERNEL(256, widen_bf16, const bf16* x, float* y, long long n) {
    device::for_elements(n, [=](long long i) { y[i] = device::widen(x[i]); });
}

KERNEL(256, scale_f32, float* x, long long n, float factor) {
    device::for_elements(n, [=](long long i) { x[i] *= factor; });
}
