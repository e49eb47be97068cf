// SwiGLU on rows [gate | up], and its gradient in place.
#include "kernels.h"

namespace device {

constexpr int SWIGLU_COLUMNS = 1024;  // of a block

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + exp2_fast(-x * LOG2E)); }

// Visits the block's part of a row.
template <class F> __device__ inline void for_part(int ffn, F visit) {
    int first = blockIdx.y * SWIGLU_COLUMNS;
    for_columns(first, min(first + SWIGLU_COLUMNS, ffn), ffn, visit);
}

template <class T> __device__ void swiglu(const T* gate_up, T* out, int ffn) {
    const T* gate = gate_up + (long long)blockIdx.x * 2 * ffn;
    T* to = out + (long long)blockIdx.x * ffn;
    for_part(ffn, [=](int c, auto few) {
        auto g = few.load(gate + c), u = few.load(gate + ffn + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) few.at[i] = g.at[i] * sigmoid(g.at[i]) * u.at[i];
        few.store(to + c);
    });
}

template <class T> __device__ void swiglu_backward(T* gate_up, const T* dy, T* inner, int ffn) {
    T* gate = gate_up + (long long)blockIdx.x * 2 * ffn;
    long long row = (long long)blockIdx.x * ffn;
    for_part(ffn, [=](int c, auto few) {
        auto g = few.load(gate + c), u = few.load(gate + ffn + c), d = few.load(dy + row + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) {
            float x = g.at[i], s = sigmoid(x), up = u.at[i];
            few.at[i] = x * s * up;
            g.at[i] = d.at[i] * up * s * (1.0f + x * (1.0f - s));
            u.at[i] = d.at[i] * x * s;
        }
        g.store(gate + c);
        u.store(gate + ffn + c);
        if (inner) few.store(inner + row + c);
    });
}

}  // namespace device

SWIGLU(swiglu_f32, float) { device::swiglu(gate_up, out, ffn); }
SWIGLU(swiglu_bf16, bf16) { device::swiglu(gate_up, out, ffn); }

SWIGLU_BACKWARD(swiglu_backward_f32, float) { device::swiglu_backward(gate_up, dy, inner, ffn); }
SWIGLU_BACKWARD(swiglu_backward_bf16, bf16) { device::swiglu_backward(gate_up, dy, inner, ffn); }
