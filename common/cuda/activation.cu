// The activation of a gated MLP on rows [gate | up], and its gradient in place.
#include "activation.h"

namespace device {

constexpr int ACTIVATION_COLUMNS = 1024;  // of a block

// Visits the block's part of a row.
template <class F> __device__ inline void for_part(int ffn, F visit) {
    int first = blockIdx.y * ACTIVATION_COLUMNS;
    for_columns(first, min(first + ACTIVATION_COLUMNS, ffn), ffn, visit);
}

template <class T> __device__ void activation(const T* gate_up, T* out, int ffn, Curve curve, float scale) {
    const T* gate = gate_up + (long long)blockIdx.x * 2 * ffn;
    T* to = out + (long long)blockIdx.x * ffn;
    for_part(ffn, [=](int c, auto few) {
        auto g = few.load(gate + c), u = few.load(gate + ffn + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) few.at[i] = gated(g.at[i], u.at[i], curve, scale);
        few.store(to + c);
    });
}

template <class T> __device__ void activation_backward(T* gate_up, const T* dy, T* inner, int ffn, Curve curve) {
    T* gate = gate_up + (long long)blockIdx.x * 2 * ffn;
    long long row = (long long)blockIdx.x * ffn;
    for_part(ffn, [=](int c, auto few) {
        auto g = few.load(gate + c), u = few.load(gate + ffn + c), d = few.load(dy + row + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) {
            Gated made(g.at[i], u.at[i], d.at[i], curve);
            few.at[i] = made.out;
            g.at[i] = made.d_gate;
            u.at[i] = made.d_up;
        }
        g.store(gate + c);
        u.store(gate + ffn + c);
        if (inner) few.store(inner + row + c);
    });
}

}  // namespace device

ACTIVATION(activation_f32, float) { device::activation(gate_up, out, ffn, curve, scale); }
ACTIVATION(activation_bf16, bf16) { device::activation(gate_up, out, ffn, curve, scale); }
ACTIVATION(activation_f16, f16) { device::activation(gate_up, out, ffn, curve, scale); }

ACTIVATION_BACKWARD(activation_backward_f32, float) { device::activation_backward(gate_up, dy, inner, ffn, curve); }
ACTIVATION_BACKWARD(activation_backward_bf16, bf16) { device::activation_backward(gate_up, dy, inner, ffn, curve); }
