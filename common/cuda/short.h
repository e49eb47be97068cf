// A token's short convolution, the heads that are made of length 1, and the gates' inputs: what the way forward and the way
// back have in common.
#pragma once
#include "activation.h"
#include "taps.h"

namespace device {

__device__ inline float silu(float x) { return x * sigmoid(x); }

// A head of a row [q | k | v]: key heads' queries, their keys, value heads' values.
struct DeltaHead {
    int number, first, dim;
    int units;  // heads that are made of length 1

    __device__ DeltaHead(const DeltaHeads& heads, int number) : number(number), units(2 * heads.key_heads) {
        dim = is_unit() ? heads.key_dim : heads.value_dim;
        first = is_unit() ? number * dim : 2 * heads.key_width() + (number - units) * dim;
    }
    __device__ bool is_unit() const { return number < units; }
    // What a head of length 1 is multiplied by.
    __device__ float scale(const DeltaHeads& heads) const {
        return number < heads.key_heads ? 1.0f / sqrtf(float(heads.key_dim)) : 1.0f;
    }
    // Visits this lane's columns, counted in the row.
    template <class F> __device__ void for_columns(F visit) const {
        for (int c = lane(); c < dim; c += WARP) visit(first + c);
    }
};

// A lane's columns of a head that is made of length 1.
struct KeptHead {
    static constexpr int COLUMNS = MOST_KEY_DIM / WARP;
    float at[COLUMNS];

    template <class F> __device__ KeptHead(const DeltaHead& head, F value) {
#pragma unroll
        for (int k = 0; k < COLUMNS; ++k) {
            int c = lane() + k * WARP;
            at[k] = c < head.dim ? value(head.first + c) : 0.0f;
        }
    }
    // 1/√(Σ x² + ε)
    __device__ float inverse_length() const {
        float squares = 0;
        for (float x : at) squares += x * x;
        return 1.0f / sqrtf(warp_sum(squares) + 1e-6f);
    }
    template <class F> __device__ void for_columns(const DeltaHead& head, F visit) const {
#pragma unroll
        for (int k = 0; k < COLUMNS; ++k) {
            int c = lane() + k * WARP;
            if (c < head.dim) visit(head.first + c, at[k]);
        }
    }
};

// The convolution's column c; `row(by)` is the row so far back, or null.
template <class F> __device__ float convolve(const DeltaHeads& heads, const float* conv, int c, F row) {
    const float* weight = conv + (long long)c * heads.kernel;
    float sum = 0;
    for (int by = heads.kernel - 1; by >= 0; --by) {
        if (auto from = row(by)) sum += weight[heads.kernel - 1 - by] * widen(from[c]);
    }
    return sum;
}

// What a token's decay and rate of a head are made of.
struct GateInputs {
    float speed, x, rate;

    template <class T>
    __device__ GateInputs(const T* raw, int token, int head, const DeltaHeads& heads, const float* dt_bias, const float* a_log) {
        const T* end = raw + (long long)(token + 1) * heads.raw_width();
        speed = expf(a_log[head]);
        x = widen(end[head - heads.value_heads]) + dt_bias[head];
        rate = sigmoid(widen(end[head - 2 * heads.value_heads]));
    }
    // ln(1 + eˣ)
    __device__ float softplus() const { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
};

}  // namespace device
