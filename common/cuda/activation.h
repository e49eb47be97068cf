// The activation of a gated MLP and its slope, for the kernels that take it forward and back.
#pragma once
#include "kernels.h"

namespace device {

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + exp2_fast(-x * LOG2E)); }

// The inner function of the sigmoid, and its slope.
__device__ inline float curve_at(float g, Curve curve) { return curve.c * g * (1.0f + curve.a * g * g); }
__device__ inline float curve_slope(float g, Curve curve) { return curve.c * (1.0f + 3.0f * curve.a * g * g); }

// Gate and up within the limit, which keeps what is no number.
struct Held {
    float g, u;
    __device__ Held(float gate, float up, Curve curve)
        : g(gate > curve.limit ? curve.limit : gate),
          u(up > curve.limit ? curve.limit : up < -curve.limit ? -curve.limit : up) {}
};

// What a gated MLP makes of a gate and an up, times `scale`.
__device__ inline float gated(float gate, float up, Curve curve, float scale) {
    Held held(gate, up, curve);
    return held.g * sigmoid(curve_at(held.g, curve)) * ((held.u + curve.plus) * scale);
}

// The same and the gradients of both, given that of the output. What is held does not move with what it was.
struct Gated {
    float out, d_gate, d_up;
    __device__ Gated(float gate, float up, float d, Curve curve) {
        Held held(gate, up, curve);
        float g = held.g, u = held.u + curve.plus, s = sigmoid(curve_at(g, curve));
        out = g * s * u;
        d_gate = gate > curve.limit ? 0.0f : d * u * s * (1.0f + g * curve_slope(g, curve) * (1.0f - s));
        d_up = fabsf(up) > curve.limit ? 0.0f : d * g * s;
    }
};

}  // namespace device
