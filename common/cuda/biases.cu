// Numbers of heads and experts that are added, on the way back: what stands beside a head's scores in the soft-max, and
// biases of experts.
#include "kernels.h"

namespace device {

// A block has a head.
__device__ inline void sink_gradient(const float* sinks, const float* lse, const float* delta, float* gradients, int count, int query) {
    int head = blockIdx.x;
    float sum = 0;
    for (int t = threadIdx.x; t < count; t += blockDim.x) {
        long long at = (long long)t * query + head;
        sum += expf(sinks[head] - lse[at]) * delta[at];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) gradients[head] -= sum;
}

// A block has a tile of rows, a warp one of them at a time.
template <class T>
__device__ void expert_bias_weights(const T* dy, const int* tokens, const float* biases, const ExpertTile* tiles, float* d_weights,
                                    int width) {
    ExpertTile tile = tiles[blockIdx.x];
    const float* bias = biases + (long long)tile.expert * width;
    for (int r = warp(); r < tile.rows; r += blockDim.x / WARP) {
        const T* row = dy + (long long)tokens[tile.first + r] * width;
        float sum = 0;
        for_columns_of(lane(), WARP, 0, width, width, [&](int c, auto few) {
            auto d = few.load(row + c);
            for (int i = 0; i < int(sizeof few / 4); ++i) sum += d.at[i] * bias[c + i];
        });
        sum = warp_sum(sum);
        if (lane() == 0) d_weights[tile.first + r] += sum;
    }
}

// A thread has a column of an expert.
template <class T>
__device__ void expert_bias_gradient(const T* dy, const int* tokens, const float* weights, const int* starts, float* gradients,
                                     int width) {
    int c = blockIdx.x * blockDim.x + threadIdx.x, expert = blockIdx.y;
    if (c >= width) return;
    float sum = 0;
    for (int row = starts[expert]; row < starts[expert + 1]; ++row) {
        float d = widen(dy[(long long)(tokens ? tokens[row] : row) * width + c]);
        sum += weights ? weights[row] * d : d;
    }
    gradients[(long long)expert * width + c] += sum;
}

}  // namespace device

KERNEL(256, sink_gradient, const float* sinks, const float* lse, const float* delta, float* gradients, int count, int query) {
    device::sink_gradient(sinks, lse, delta, gradients, count, query);
}

EXPERT_BIAS_WEIGHTS(expert_bias_weights_f32, float) { device::expert_bias_weights(dy, tokens, biases, tiles, d_weights, width); }
EXPERT_BIAS_WEIGHTS(expert_bias_weights_bf16, bf16) { device::expert_bias_weights(dy, tokens, biases, tiles, d_weights, width); }

EXPERT_BIAS_GRADIENT(expert_bias_gradient_f32, float) {
    device::expert_bias_gradient(dy, tokens, weights, starts, gradients, width);
}
EXPERT_BIAS_GRADIENT(expert_bias_gradient_bf16, bf16) {
    device::expert_bias_gradient(dy, tokens, weights, starts, gradients, width);
}
