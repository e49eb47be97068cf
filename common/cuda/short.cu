// What the delta rule reads: queries, keys and values by a short causal convolution of each channel and SiLU, queries and keys
// made of length 1, and its two gates. A warp takes a head of a token.
#include "short.h"

namespace device {

// Fills a head of a token: `row(by)` is the projection's row that lies so far back, null before the first of all.
template <class T, class F> __device__ void head_inputs(const DeltaHead& head, const DeltaHeads& heads, const float* conv, T* qkv, F row) {
    if (!head.is_unit()) {
        head.for_columns([&](int c) { qkv[c] = narrow<T>(silu(convolve(heads, conv, c, row))); });
        return;
    }
    KeptHead x(head, [&](int c) { return silu(convolve(heads, conv, c, row)); });
    float scale = x.inverse_length() * head.scale(heads);
    x.for_columns(head, [&](int c, float v) { qkv[c] = narrow<T>(v * scale); });
}

template <class T>
__device__ void delta_inputs(const T* raw, const int* segment_of, const DeltaSegment* segments, const float* conv, T* qkv,
                             int count, DeltaHeads heads) {
    int unit = blockIdx.x * (blockDim.x / WARP) + warp(), units = 2 * heads.key_heads + heads.value_heads;
    int token = unit / units;
    if (token >= count) return;
    const Taps<T> taps{raw, heads.raw_width(), segments[segment_of[token]], token};
    head_inputs(DeltaHead(heads, unit % units), heads, conv, qkv + (long long)token * heads.qkv_width(), taps);
}

// The same of a slot's token, whose past lies beside: each lane takes its columns on as it goes.
template <class T>
__device__ void delta_step_inputs(const T* raw, T* past, const int* from, const int* finished, const float* conv, T* qkv,
                                  int count, DeltaHeads heads) {
    int unit = blockIdx.x * (blockDim.x / WARP) + warp(), units = 2 * heads.key_heads + heads.value_heads;
    int slot = unit / units, width = heads.qkv_width(), kept = heads.kernel - 1;
    if (slot >= count || finished[slot]) return;
    const DeltaHead head(heads, unit % units);
    const T *own = raw + (long long)slot * heads.raw_width(), *seen = past + (long long)from[slot] * kept * width;
    T* next = past + (long long)slot * kept * width;
    auto row = [&](int by) { return by == 0 ? own : seen + (long long)(kept - by) * width; };
    head_inputs(head, heads, conv, qkv + (long long)slot * width, row);
    head.for_columns([&](int c) {
        for (int i = 0; i < kept; ++i) next[(long long)i * width + c] = row(kept - 1 - i)[c];
    });
}

// A thread takes a column of a span.
template <class T> __device__ void delta_keep(const T* raw, const DeltaSpan& span, T* past, const DeltaHeads& heads) {
    int c = blockIdx.x * blockDim.x + threadIdx.x, width = heads.qkv_width(), kept = heads.kernel - 1;
    if (span.to < 0 || c >= width) return;
    T* to = past + (long long)span.to * kept * width + c;
    for (int i = 0; i < kept; ++i) {
        int at = span.rows - kept + i;
        to[(long long)i * width] = at < 0 ? narrow<T>(0.0f) : raw[(long long)(span.first + at) * heads.raw_width() + c];
    }
}

// Decays exp(−exp(A)·softplus(x + b)), and rates σ(y).
template <class T>
__device__ void delta_gates(const T* raw, const float* dt_bias, const float* a_log, float* gates, int count, DeltaHeads heads) {
    int unit = blockIdx.x * blockDim.x + threadIdx.x, token = unit / heads.value_heads, head = unit % heads.value_heads;
    if (token >= count) return;
    const GateInputs in(raw, token, head, heads, dt_bias, a_log);
    float* own = gates + (long long)token * 2 * heads.value_heads + head;
    own[0] = expf(-in.speed * in.softplus());
    own[heads.value_heads] = in.rate;
}

}  // namespace device

DELTA_INPUTS(delta_inputs_f32, float) { device::delta_inputs(raw, segment_of, segments, conv, qkv, count, heads); }
DELTA_INPUTS(delta_inputs_bf16, bf16) { device::delta_inputs(raw, segment_of, segments, conv, qkv, count, heads); }
DELTA_INPUTS(delta_inputs_f16, f16) { device::delta_inputs(raw, segment_of, segments, conv, qkv, count, heads); }

DELTA_GATES(delta_gates_f32, float) { device::delta_gates(raw, dt_bias, a_log, gates, count, heads); }
DELTA_GATES(delta_gates_bf16, bf16) { device::delta_gates(raw, dt_bias, a_log, gates, count, heads); }
DELTA_GATES(delta_gates_f16, f16) { device::delta_gates(raw, dt_bias, a_log, gates, count, heads); }

DELTA_STEP_INPUTS(delta_step_inputs_f32, float) {
    device::delta_step_inputs(raw, past, from, finished, conv, qkv, count, heads);
}
DELTA_STEP_INPUTS(delta_step_inputs_bf16, bf16) {
    device::delta_step_inputs(raw, past, from, finished, conv, qkv, count, heads);
}

DELTA_KEEP(delta_keep_f32, float) { device::delta_keep(raw, spans[blockIdx.y], past, heads); }
DELTA_KEEP(delta_keep_bf16, bf16) { device::delta_keep(raw, spans[blockIdx.y], past, heads); }
