// What a layer takes in beside the residual stream: an embedding of its own, through gates (Gemma 4), and keys and values of an
// earlier layer, whose gradients are gathered for that.
#include "activation.h"

namespace device {

// Visits the columns of a row, as the block; in fours where all rows allow it.
template <class F> __device__ inline void for_row(int width, int strides, F visit) { for_columns(0, width, width | strides, visit); }

template <class T>
__device__ void layer_input(const T* gates, const float* inputs, T* out, int width, int stride, Curve curve, float scale) {
    long long row = (long long)blockIdx.x * width;
    inputs += (long long)blockIdx.x * stride;
    for_row(width, stride, [=](int c, auto few) {
        auto g = few.load(gates + row + c), x = few.load(inputs + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) few.at[i] = gated(g.at[i], x.at[i], curve, scale);
        few.store(out + row + c);
    });
}

template <class T>
__device__ void layer_input_backward(T* gates, const float* inputs, T* inner, float* d_inputs, int width, int stride, Curve curve) {
    long long row = (long long)blockIdx.x * width, input_row = (long long)blockIdx.x * stride;
    for_row(width, stride, [=](int c, auto few) {
        auto g = few.load(gates + row + c), x = few.load(inputs + input_row + c), d = few.load(inner + row + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) {
            Gated made(g.at[i], x.at[i], d.at[i], curve);
            few.at[i] = made.out;
            g.at[i] = made.d_gate;
            x.at[i] = made.d_up;
        }
        few.store(inner + row + c);
        g.store(gates + row + c);
        x.store(d_inputs + input_row + c);
    });
}

template <class T> __device__ void copy_columns(const T* from, T* to, int width, int from_stride, int to_stride) {
    from += (long long)blockIdx.x * from_stride;
    to += (long long)blockIdx.x * to_stride;
    for_row(width, from_stride | to_stride, [=](int c, auto few) { few.load(from + c).store(to + c); });
}

template <class T> __device__ void lent_gradient(T* d, float* sum, int width, int stride, int gather) {
    d += (long long)blockIdx.x * stride;
    sum += (long long)blockIdx.x * width;
    for_row(width, stride, [=](int c, auto few) {
        auto x = few.load(d + c), s = few.load(sum + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) x.at[i] += s.at[i];
        if (gather) {
            x.store(sum + c);
        } else {
            x.store(d + c);
        }
    });
}

}  // namespace device

#define DEFINE_FORWARD(name, T) LAYER_INPUT(name, T) { device::layer_input(gates, inputs, out, width, stride, curve, scale); }
DEFINE_FORWARD(layer_input_f32, float)
DEFINE_FORWARD(layer_input_bf16, bf16)
DEFINE_FORWARD(layer_input_f16, f16)

#define DEFINE_BACKWARD(name, T) \
    LAYER_INPUT_BACKWARD(name, T) { device::layer_input_backward(gates, inputs, inner, d_inputs, width, stride, curve); }
DEFINE_BACKWARD(layer_input_backward_f32, float)
DEFINE_BACKWARD(layer_input_backward_bf16, bf16)

COPY_COLUMNS(copy_columns_f32, float) { device::copy_columns(from, to, width, from_stride, to_stride); }
COPY_COLUMNS(copy_columns_bf16, bf16) { device::copy_columns(from, to, width, from_stride, to_stride); }
COPY_COLUMNS(copy_columns_f16, f16) { device::copy_columns(from, to, width, from_stride, to_stride); }

LENT_GRADIENT(lent_gradient_f32, float) { device::lent_gradient(d, sum, width, stride, gather); }
LENT_GRADIENT(lent_gradient_bf16, bf16) { device::lent_gradient(d, sum, width, stride, gather); }
