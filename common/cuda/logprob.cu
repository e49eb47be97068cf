// log p(target) of rows of logits that come chunk after chunk of the vocabulary, and its gradient.
#include "kernels.h"

namespace device {

// A running log-sum-exp: Σ exp(l − max). Empty: max = −∞, sum = 0.
struct Running {
    float max, sum;
    template <int N> __device__ void add(const Few<N>& x) {
        float top = max;
        for (float l : x.at) top = fmaxf(top, l);
        if (top == -INFINITY) return;
        sum *= exp2_fast((max - top) * LOG2E);  // 0 where max was −∞
        for (float l : x.at) sum += exp2_fast((l - top) * LOG2E);
        max = top;
    }
};

}  // namespace device

KERNEL(256, soft_cap, float* x, long long n, float cap) {
    device::for_elements(n, [=](long long i) { x[i] = cap * device::tanh_fast(x[i] / cap); });
}

KERNEL(256, logprob_update, const float* logits, const int* targets, float* state, int words, int first, int begin) {
    using namespace device;
    const float* row = logits + (long long)blockIdx.x * words;
    float* kept = state + (long long)blockIdx.x * 3;
    Running own{-INFINITY, 0};
    for_columns(0, words, words, [&](int c, auto few) { own.add(few.load(row + c)); });
    float before = begin ? -INFINITY : kept[0];
    float max = fmaxf(block_max(own.max), before);
    float sum = block_sum(own.max == -INFINITY ? 0.0f : own.sum * expf(own.max - max));
    if (threadIdx.x == 0) {
        if (before > -INFINITY) sum += kept[1] * expf(before - max);
        int word = targets[blockIdx.x] - first;
        kept[0] = max;
        kept[1] = sum;
        if (word >= 0 && word < words) kept[2] = row[word];
    }
}

// The target's logit less the maximum first: that difference is exact near probability 1, where log p is near 0.
KERNEL(256, logprob_finish, const float* state, float* logps, float* lse, int rows) {
    int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r >= rows) return;
    const float* kept = state + (long long)r * 3;
    float log_sum = logf(kept[1]);
    logps[r] = (kept[2] - kept[0]) - log_sum;
    lse[r] = kept[0] + log_sum;
}

namespace device {

template <class T>
__device__ void logprob_backward(const float* logits, const int* targets, const float* lse, const float* d_logps,
                                 T* d_logits, int words, int first, float inverse_cap) {
    int r = blockIdx.y, word = targets[r] - first;
    long long at = (long long)r * words;
    float d = d_logps[r], shift = lse[r];
    for_columns(blockIdx.x * 1024, min(int(blockIdx.x + 1) * 1024, words), words, [=](int c, auto few) {
        auto l = few.load(logits + at + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) {
            float p = exp2_fast((l.at[i] - shift) * LOG2E);
            float share = l.at[i] * inverse_cap;
            l.at[i] = d * ((c + i == word ? 1.0f : 0.0f) - p) * (1.0f - share * share);
        }
        l.store(d_logits + at + c);
    });
}

}  // namespace device

LOGPROB_BACKWARD(logprob_backward_f32, float) {
    device::logprob_backward(logits, targets, lse, d_logps, d_logits, words, first, inverse_cap);
}
LOGPROB_BACKWARD(logprob_backward_bf16, bf16) {
    device::logprob_backward(logits, targets, lse, d_logps, d_logits, words, first, inverse_cap);
}

// A warp adds up a response: lanes in strides, then the lanes in a tree, so that the order is fixed.
KERNEL(256, segment_sums, const float* values, const int* offsets, double* sums, int count) {
    int i = blockIdx.x * 8 + device::warp();
    if (i >= count) return;
    double sum = 0;
    for (int at = offsets[i] + device::lane(); at < offsets[i + 1]; at += device::WARP) sum += values[at];
    sum = device::warp_sum(sum);
    if (device::lane() == 0) sums[i] = sum;
}

KERNEL(256, spread, const float* coefficients, const int* offsets, float* values, int count) {
    int i = blockIdx.x * 8 + device::warp();
    if (i >= count) return;
    for (int at = offsets[i] + device::lane(); at < offsets[i + 1]; at += device::WARP) values[at] = coefficients[i];
}
