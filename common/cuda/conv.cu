// A short convolution between two gates (LFM2): y = c ∘ conv(b ∘ x), of the fused projection [b | c | x]; forward, backward, and
// token by token. A thread takes a channel of a token.
#include "taps.h"

namespace device {

// b·x of a row's channel.
template <class T> __device__ float gated(const T* row, int c, int channels) {
    return widen(row[c]) * widen(row[2 * channels + c]);
}

// The convolution's channel c at a token.
template <class T> __device__ float convolved(const Taps<T>& taps, const float* weight, int c, int channels, int kernel) {
    float sum = 0;
    for (int by = kernel - 1; by >= 0; --by) {
        if (const T* row = taps(by)) sum += weight[kernel - 1 - by] * gated(row, c, channels);
    }
    return sum;
}

template <class T>
__device__ void gated_conv(const T* raw, const int* segment_of, const DeltaSegment* segments, const float* weight, T* out,
                           int channels, int kernel) {
    int token = blockIdx.x, c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= channels) return;
    const Taps<T> taps{raw, 3 * channels, segments[segment_of[token]], token};
    float gate = widen(taps(0)[channels + c]);
    float y = convolved(taps, weight + (long long)c * kernel, c, channels, kernel);
    out[(long long)token * channels + c] = narrow<T>(gate * y);
}

template <class T>
__device__ void gated_conv_backward(const T* raw, const int* segment_of, const DeltaSegment* segments, const float* weight,
                                    const T* d_out, T* d_raw, int channels, int kernel) {
    int token = blockIdx.x, c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= channels) return;
    const DeltaSegment* segment = segments + segment_of[token];
    const Taps<T> taps{raw, 3 * channels, *segment, token};
    weight += (long long)c * kernel;
    auto d_at = [&](int row) { return widen(d_out[(long long)row * channels + c]); };
    float d_gated = 0;
    for_followers(segment, token, kernel, [&](int row, int by) {
        float gate = widen(raw[(long long)row * 3 * channels + channels + c]);
        d_gated += weight[kernel - 1 - by] * d_at(row) * gate;
    });
    const T* own = taps(0);
    T* d_own = d_raw + (long long)token * 3 * channels;
    d_own[c] = narrow<T>(d_gated * widen(own[2 * channels + c]));
    d_own[channels + c] = narrow<T>(d_at(token) * convolved(taps, weight, c, channels, kernel));
    d_own[2 * channels + c] = narrow<T>(d_gated * widen(own[c]));
}

template <class T>
__device__ void gated_conv_gradient(const T* raw, const int* segment_of, const DeltaSegment* segments, const T* d_out,
                                    float* partial, int count, int channels, int kernel) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= channels) return;
    int rows = (count + gridDim.y - 1) / gridDim.y, first = blockIdx.y * rows, last = min(first + rows, count);
    float* to = partial + ((long long)blockIdx.y * channels + c) * kernel;
    for (int by = kernel - 1; by >= 0; --by) {
        float sum = 0;
        for (int token = first; token < last; ++token) {
            const Taps<T> taps{raw, 3 * channels, segments[segment_of[token]], token};
            float d = widen(d_out[(long long)token * channels + c]) * widen(taps(0)[channels + c]);
            if (const T* row = taps(by)) sum += d * gated(row, c, channels);
        }
        to[kernel - 1 - by] = sum;
    }
}

template <class T>
__device__ void gated_conv_step(const T* raw, float* past, const int* from, const int* finished, const float* weight, T* out,
                                int channels, int kernel) {
    int slot = blockIdx.x, c = blockIdx.y * blockDim.x + threadIdx.x, kept = kernel - 1;
    if (c >= channels || finished[slot]) return;
    const T* own = raw + (long long)slot * 3 * channels;
    const float* seen = past + (long long)from[slot] * kept * channels + c;
    float* next = past + (long long)slot * kept * channels + c;
    weight += (long long)c * kernel;
    float sum = 0;
    for (int i = 0; i < kernel; ++i) {
        float x = i < kept ? seen[(long long)i * channels] : gated(own, c, channels);
        sum += weight[i] * x;
        if (i > 0) next[(long long)(i - 1) * channels] = x;
    }
    out[(long long)slot * channels + c] = narrow<T>(widen(own[channels + c]) * sum);
}

template <class T> __device__ void gated_conv_keep(const T* raw, const DeltaSpan& span, float* past, int channels, int kernel) {
    int c = blockIdx.x * blockDim.x + threadIdx.x, kept = kernel - 1;
    if (span.to < 0 || c >= channels) return;
    float* to = past + (long long)span.to * kept * channels + c;
    for (int i = 0; i < kept; ++i) {
        int at = span.rows - kept + i;
        to[(long long)i * channels] = at < 0 ? 0.0f : gated(raw + (long long)(span.first + at) * 3 * channels, c, channels);
    }
}

}  // namespace device

GATED_CONV(gated_conv_f32, float) { device::gated_conv(raw, segment_of, segments, weight, out, channels, kernel); }
GATED_CONV(gated_conv_bf16, bf16) { device::gated_conv(raw, segment_of, segments, weight, out, channels, kernel); }
GATED_CONV(gated_conv_f16, f16) { device::gated_conv(raw, segment_of, segments, weight, out, channels, kernel); }

#define DEFINE(format, T)                                                                                       \
    GATED_CONV_BACKWARD(gated_conv_backward_##format, T) {                                                      \
        device::gated_conv_backward(raw, segment_of, segments, weight, d_out, d_raw, channels, kernel);         \
    }                                                                                                           \
    GATED_CONV_GRADIENT(gated_conv_gradient_##format, T) {                                                      \
        device::gated_conv_gradient(raw, segment_of, segments, d_out, partial, count, channels, kernel);        \
    }                                                                                                           \
    GATED_CONV_STEP(gated_conv_step_##format, T) {                                                              \
        device::gated_conv_step(raw, past, from, finished, weight, out, channels, kernel);                      \
    }                                                                                                           \
    GATED_CONV_KEEP(gated_conv_keep_##format, T) {                                                              \
        device::gated_conv_keep(raw, spans[blockIdx.y], past, channels, kernel);                                \
    }
DEFINE(f32, float)
DEFINE(bf16, bf16)
