// SwiGLU on rows [gate | up], and its gradient in place. Four columns a thread.
#include "kernels.h"

namespace device {

constexpr int SWIGLU_COLUMNS = 1024;  // of a block

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Calls f(column) for this thread's columns of the block's part of a row.
template <class F> __device__ void for_columns(int width, F f) {
    int first = blockIdx.y * SWIGLU_COLUMNS, last = min(first + SWIGLU_COLUMNS, width);
    for (int c = first + int(threadIdx.x); c < last; c += blockDim.x) f(c);
}

template <class T> __device__ void swiglu(const T* gate_up, T* out, int ffn) {
    const T* gate = gate_up + (long long)blockIdx.x * 2 * ffn;
    T* to = out + (long long)blockIdx.x * ffn;
    for_columns(ffn, [=](int c) {
        float g = widen(gate[c]);
        to[c] = narrow<T>(g * sigmoid(g) * widen(gate[ffn + c]));
    });
}

template <class T> __device__ void swiglu_backward(T* gate_up, const T* dy, T* inner, int ffn) {
    T* gate = gate_up + (long long)blockIdx.x * 2 * ffn;
    long long row = (long long)blockIdx.x * ffn;
    for_columns(ffn, [=](int c) {
        float g = widen(gate[c]), u = widen(gate[ffn + c]), d = widen(dy[row + c]);
        float s = sigmoid(g);
        gate[c] = narrow<T>(d * u * s * (1.0f + g * (1.0f - s)));
        gate[ffn + c] = narrow<T>(d * g * s);
        if (inner) inner[row + c] = narrow<T>(g * s * u);
    });
}

}  // namespace device

SWIGLU(swiglu_f32, float) { device::swiglu(gate_up, out, ffn); }
SWIGLU(swiglu_bf16, bf16) { device::swiglu(gate_up, out, ffn); }

SWIGLU_BACKWARD(swiglu_backward_f32, float) { device::swiglu_backward(gate_up, dy, inner, ffn); }
SWIGLU_BACKWARD(swiglu_backward_bf16, bf16) { device::swiglu_backward(gate_up, dy, inner, ffn); }
