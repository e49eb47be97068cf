// The activation of a gated MLP and its slope, for the kernels that take it forward and back.
#pragma once
#include "device.h"

namespace device {

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + exp2_fast(-x * LOG2E)); }

// The gate g becomes g·σ(v), v = c·g·(1 + a·g²).
struct Curve {
    float c, a;
    __device__ float v(float g) const { return c * g * (1.0f + a * g * g); }
    __device__ float slope(float g) const { return c * (1.0f + 3.0f * a * g * g); }
};

// What a gated MLP makes of gate g and up u, and the gradients of both, given that of the output.
struct Gated {
    float out, d_gate, d_up;
    __device__ Gated(float g, float u, float d, Curve curve) {
        float s = sigmoid(curve.v(g));
        out = g * s * u;
        d_gate = d * u * s * (1.0f + g * curve.slope(g) * (1.0f - s));
        d_up = d * g * s;
    }
};

}  // namespace device
