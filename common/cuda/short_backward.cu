// From the gradients of what the delta rule reads to those of the fused projection, of the convolution's weights and of the
// gates' parameters.
#include "short.h"

namespace device {

// Of y = x·σ(x).
__device__ inline float silu_slope(float x) {
    float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

template <class T>
__device__ void delta_inputs_backward(const T* raw, const int* segment_of, const DeltaSegment* segments, const float* conv,
                                      T* d_qkv, int count, DeltaHeads heads) {
    int unit = blockIdx.x * (blockDim.x / WARP) + warp(), units = 2 * heads.key_heads + heads.value_heads;
    int token = unit / units;
    if (token >= count) return;
    const Taps<T> taps{raw, heads.raw_width(), segments[segment_of[token]], token};
    const DeltaHead head(heads, unit % units);
    T* d = d_qkv + (long long)token * heads.qkv_width();
    if (!head.is_unit()) {
        head.for_columns([&](int c) { d[c] = narrow<T>(widen(d[c]) * silu_slope(convolve(heads, conv, c, taps))); });
        return;
    }
    // Of y = x·s: dx = s·(dy − x·(x·dy)/|x|²), which ε does not change.
    KeptHead convolved(head, [&](int c) { return convolve(heads, conv, c, taps); });
    KeptHead x = convolved;
    for (float& v : x.at) v = silu(v);
    float along = 0, length = x.inverse_length();
    x.for_columns(head, [&](int c, float v) { along += v * widen(d[c]); });
    along = warp_sum(along) * length * length;
    float scale = length * head.scale(heads);
    convolved.for_columns(head, [&](int c, float v) {
        d[c] = narrow<T>(scale * (widen(d[c]) - silu(v) * along) * silu_slope(v));
    });
}

template <class T>
__device__ void delta_conv_backward(const T* d_convolved, const int* segment_of, const DeltaSegment* segments, const float* conv,
                                    T* d_raw, DeltaHeads heads) {
    int token = blockIdx.x, width = heads.qkv_width();
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        const float* weight = conv + (long long)c * heads.kernel + heads.kernel - 1;
        float sum = 0;
        for_followers(segments + segment_of[token], token, heads.kernel, [&](int row, int by) {
            sum += weight[-by] * widen(d_convolved[(long long)row * width + c]);
        });
        d_raw[(long long)token * heads.raw_width() + c] = narrow<T>(sum);
    }
}

// A thread takes a channel of a part.
template <class T>
__device__ void delta_conv_gradient(const T* raw, const T* d_convolved, const int* segment_of, const DeltaSegment* segments,
                                    float* partial, int count, DeltaHeads heads) {
    int c = blockIdx.x * blockDim.x + threadIdx.x, width = heads.qkv_width();
    if (c >= width) return;
    int rows = (count + gridDim.y - 1) / gridDim.y, first = blockIdx.y * rows, last = min(first + rows, count);
    float* to = partial + ((long long)blockIdx.y * width + c) * heads.kernel;
    for (int by = heads.kernel - 1; by >= 0; --by) {
        float sum = 0;
        for (int token = first; token < last; ++token) {
            const Taps<T> taps{raw, heads.raw_width(), segments[segment_of[token]], token};
            if (const T* row = taps(by)) sum += widen(d_convolved[(long long)token * width + c]) * widen(row[c]);
        }
        to[heads.kernel - 1 - by] = sum;
    }
}

// A thread takes a head of a block's rows.
template <class T>
__device__ void delta_gates_backward(const T* raw, const float* dt_bias, const float* a_log, const float* d_gates, T* d_raw,
                                     float* partial, int count, DeltaHeads heads) {
    int rows = (count + gridDim.x - 1) / gridDim.x, first = blockIdx.x * rows, last = min(first + rows, count);
    for (int head = threadIdx.x; head < heads.value_heads; head += blockDim.x) {
        float d_dt_bias = 0, d_a_log = 0;
        for (int token = first; token < last; ++token) {
            const GateInputs in(raw, token, head, heads, dt_bias, a_log);
            const float* d = d_gates + (long long)token * 2 * heads.value_heads + head;
            T* to = d_raw + (long long)(token + 1) * heads.raw_width() + head;
            float d_x = -in.speed * d[0] * sigmoid(in.x);
            to[-2 * heads.value_heads] = narrow<T>(d[heads.value_heads] * in.rate * (1.0f - in.rate));
            to[-heads.value_heads] = narrow<T>(d_x);
            d_dt_bias += d_x;
            d_a_log -= in.speed * d[0] * in.softplus();
        }
        if (!partial) continue;
        float* to = partial + (long long)blockIdx.x * 2 * heads.value_heads + head;
        to[0] = d_dt_bias, to[heads.value_heads] = d_a_log;
    }
}

}  // namespace device

#define DEFINE(format, T)                                                                                           \
    DELTA_INPUTS_BACKWARD(delta_inputs_backward_##format, T) {                                                      \
        device::delta_inputs_backward(raw, segment_of, segments, conv, d_qkv, count, heads);                        \
    }                                                                                                               \
    DELTA_CONV_BACKWARD(delta_conv_backward_##format, T) {                                                          \
        device::delta_conv_backward(d_convolved, segment_of, segments, conv, d_raw, heads);                         \
    }                                                                                                               \
    DELTA_CONV_GRADIENT(delta_conv_gradient_##format, T) {                                                          \
        device::delta_conv_gradient(raw, d_convolved, segment_of, segments, partial, count, heads);                 \
    }                                                                                                               \
    DELTA_GATES_BACKWARD(delta_gates_backward_##format, T) {                                                        \
        device::delta_gates_backward(raw, dt_bias, a_log, d_gates, d_raw, partial, count, heads);                   \
    }
DEFINE(f32, float)
DEFINE(bf16, bf16)
