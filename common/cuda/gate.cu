// What attention, or linear attention, gives is gated before its output projection: attention by x·σ(g), each head of linear
// attention by norm(x)·SiLU(g). The gates are columns of the fused projection.
#include "activation.h"

namespace device {

constexpr int GATE_COLUMNS = 1024;  // of a block

// Visits the block's part of a row; in fours where rows of both lengths allow it.
template <class F> __device__ inline void for_gated(int width, int stride, F visit) {
    int first = blockIdx.y * GATE_COLUMNS;
    for_columns(first, min(first + GATE_COLUMNS, width), width | stride, visit);
}

template <class T> __device__ void gate(const T* x, const T* gates, T* out, int width, int stride) {
    long long row = (long long)blockIdx.x * width;
    gates += (long long)blockIdx.x * stride;
    for_gated(width, stride, [=](int c, auto few) {
        auto v = few.load(x + row + c), g = few.load(gates + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) v.at[i] *= sigmoid(g.at[i]);
        v.store(out + row + c);
    });
}

template <class T> __device__ void gate_backward(const T* x, const T* gates, T* d, T* d_gates, int width, int stride) {
    long long row = (long long)blockIdx.x * width, gate_row = (long long)blockIdx.x * stride;
    for_gated(width, stride, [=](int c, auto few) {
        auto v = few.load(x + row + c), g = few.load(gates + gate_row + c), dy = few.load(d + row + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) {
            float s = sigmoid(g.at[i]);
            g.at[i] = dy.at[i] * v.at[i] * s * (1.0f - s);
            dy.at[i] *= s;
        }
        g.store(d_gates + gate_row + c);
        dy.store(d + row + c);
    });
}

template <class T> __device__ void spread_qkv(const T* d_qkv, T* d_raw, int query_width, int width, int skipped) {
    const T* from = d_qkv + (long long)blockIdx.x * width;
    T* to = d_raw + (long long)blockIdx.x * (width + skipped);
    for_gated(width, query_width | skipped, [=](int c, auto few) {
        few.load(from + c).store(to + c + (c < query_width ? 0 : skipped));
    });
}

// A head of a row, whose columns a warp has.
template <class T> struct GatedHead {
    const T *x, *gates;
    const float* weight;
    int dim, stride;

    template <class F> __device__ void for_columns(F visit) const { for_columns_of(lane(), WARP, 0, dim, dim | stride, visit); }
    // 1/rms
    __device__ float scale(float eps) const {
        float squares = 0;
        for_columns([&](int c, auto few) {
            for (float v : few.load(x + c).at) squares += v * v;
        });
        return 1.0f / sqrtf(warp_sum(squares) / dim + eps);
    }
};

template <class T>
__device__ void gated_norm(const T* read, const T* gates, const float* weight, float eps, T* out, int count, int heads, int dim,
                           int stride) {
    int unit = blockIdx.x * (blockDim.x / WARP) + warp(), r = unit / heads, head = unit % heads;
    if (r >= count) return;
    const GatedHead<T> own{read + (long long)unit * dim, gates + (long long)r * stride + head * dim, weight, dim, stride};
    float scale = own.scale(eps);
    own.for_columns([&](int c, auto few) {
        auto v = few.load(own.x + c), g = few.load(own.gates + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) v.at[i] *= scale * weight[c + i] * g.at[i] * sigmoid(g.at[i]);
        v.store(out + (long long)unit * dim + c);
    });
}

// With n = x̂·w, x̂ = x·s: dg = dy·n·slope of SiLU; and with e = dy·SiLU(g): dx = s·(e·w − x̂·mean(e·w·x̂)), dw = Σ e·x̂, summed by
// each warp and then over them in order.
template <class T>
__device__ void gated_norm_backward(const T* read, const T* gates, const float* weight, float eps, T* d, T* d_gates,
                                    float* partial, int count, int heads, int dim, int stride) {
    SHARED_MEMORY(float, sums);
    float* own_sums = sums + warp() * dim;
    for (int c = lane(); c < dim; c += WARP) own_sums[c] = 0;
    __syncwarp();
    int rows = (count + gridDim.x - 1) / gridDim.x, first = blockIdx.x * rows, last = min(first + rows, count);
    for (int unit = first * heads + warp(); unit < last * heads; unit += blockDim.x / WARP) {
        long long at = (long long)unit * dim, gate_at = (long long)(unit / heads) * stride + unit % heads * dim;
        const GatedHead<T> own{read + at, gates + gate_at, weight, dim, stride};
        float scale = own.scale(eps), mean = 0;
        own.for_columns([&](int c, auto few) {
            auto v = few.load(own.x + c), g = few.load(own.gates + c), dy = few.load(d + at + c);
            for (int i = 0; i < int(sizeof few / 4); ++i) {
                mean += dy.at[i] * g.at[i] * sigmoid(g.at[i]) * weight[c + i] * v.at[i];
            }
        });
        mean = warp_sum(mean) * scale / dim;
        own.for_columns([&](int c, auto few) {
            auto v = few.load(own.x + c), g = few.load(own.gates + c), dy = few.load(d + at + c);
            for (int i = 0; i < int(sizeof few / 4); ++i) {
                float s = sigmoid(g.at[i]), normed = v.at[i] * scale, e = dy.at[i] * g.at[i] * s;
                own_sums[c + i] += e * normed;
                g.at[i] = dy.at[i] * normed * weight[c + i] * s * (1.0f + g.at[i] * (1.0f - s));
                dy.at[i] = scale * (e * weight[c + i] - normed * mean);
            }
            g.store(d_gates + gate_at + c);
            dy.store(d + at + c);
        });
    }
    if (!partial) return;
    __syncthreads();
    for (int c = threadIdx.x; c < dim; c += blockDim.x) {
        float sum = 0;
        for (int w = 0; w < int(blockDim.x) / WARP; ++w) sum += sums[w * dim + c];
        partial[(long long)blockIdx.x * dim + c] = sum;
    }
}

}  // namespace device

GATE(gate_f32, float) { device::gate(x, gates, out, width, stride); }
GATE(gate_bf16, bf16) { device::gate(x, gates, out, width, stride); }
GATE(gate_f16, f16) { device::gate(x, gates, out, width, stride); }

GATED_NORM(gated_norm_f32, float) { device::gated_norm(read, gates, weight, eps, out, count, heads, dim, stride); }
GATED_NORM(gated_norm_bf16, bf16) { device::gated_norm(read, gates, weight, eps, out, count, heads, dim, stride); }
GATED_NORM(gated_norm_f16, f16) { device::gated_norm(read, gates, weight, eps, out, count, heads, dim, stride); }

GATE_BACKWARD(gate_backward_f32, float) { device::gate_backward(x, gates, d, d_gates, width, stride); }
GATE_BACKWARD(gate_backward_bf16, bf16) { device::gate_backward(x, gates, d, d_gates, width, stride); }

SPREAD_QKV(spread_qkv_f32, float) { device::spread_qkv(d_qkv, d_raw, query_width, width, skipped); }
SPREAD_QKV(spread_qkv_bf16, bf16) { device::spread_qkv(d_qkv, d_raw, query_width, width, skipped); }

GATED_NORM_BACKWARD(gated_norm_backward_f32, float) {
    device::gated_norm_backward(read, gates, weight, eps, d, d_gates, partial, count, heads, dim, stride);
}
GATED_NORM_BACKWARD(gated_norm_backward_bf16, bf16) {
    device::gated_norm_backward(read, gates, weight, eps, d, d_gates, partial, count, heads, dim, stride);
}
