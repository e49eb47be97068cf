// RMSNorm of the residual stream and its gradient: y = x / √(mean(x²) + ε) · w. (A weight may lie anywhere in a flat
// buffer, so it is read one by one; rows are read in fours.)
#include "kernels.h"

namespace device {

// Who works on a row: a warp, where rows are short, so that nobody waits for others; else the block.
struct Team {
    bool warps;

    __device__ explicit Team(int width) : warps(width <= NORM_NARROW) {}
    // How many there are in a block, and which this one is.
    __device__ int count() const { return warps ? blockDim.x / WARP : 1; }
    __device__ int number() const { return warps ? warp() : 0; }
    __device__ int thread() const { return warps ? lane() : threadIdx.x; }
    __device__ int threads() const { return warps ? WARP : blockDim.x; }
    __device__ float sum(float x) const { return warps ? warp_sum(x) : block_sum(x); }
    template <class F> __device__ void for_row(int width, F visit) const {
        for_columns_of(thread(), threads(), 0, width, width, visit);
    }
};

// Fours of a thread that are kept in registers: 640 columns of a warp, 5120 of a block. All is asked for at once: when a
// few rows are normed, waiting for memory is all there is.
constexpr int KEPT = 5;

__device__ inline bool keeps(const Team& team, int width) { return width % 4 == 0 && width <= 4 * KEPT * team.threads(); }

// Visits a thread's columns of a row that is kept: visit(k, c).
template <class F> __device__ inline void for_kept(const Team& team, int width, F visit) {
#pragma unroll
    for (int k = 0; k < KEPT; ++k) {
        int c = 4 * (team.thread() + k * team.threads());
        if (c < width) visit(k, c);
    }
}

// (Weights may begin anywhere.)
__device__ inline Few<4> four(const float* weight) { return {{weight[0], weight[1], weight[2], weight[3]}}; }

template <class T>
__device__ void rms_norm(const float* x, const int* rows, const float* weight, float eps, T* out, int count, int width) {
    const Team team(width);
    int r = blockIdx.x * team.count() + team.number();
    if (r >= count) return;
    const float* from = x + (long long)(rows ? rows[r] : r) * width;
    T* to = out + (long long)r * width;
    float squares = 0;
    if (keeps(team, width)) {
        Few<4> v[KEPT], w[KEPT];
        for_kept(team, width, [&](int k, int c) { v[k] = Few<4>::load(from + c), w[k] = four(weight + c); });
        for_kept(team, width, [&](int k, int) {
            for (float y : v[k].at) squares += y * y;
        });
        float scale = 1.0f / sqrtf(team.sum(squares) / width + eps);
        for_kept(team, width, [&](int k, int c) {
            for (int i = 0; i < 4; ++i) v[k].at[i] *= scale * w[k].at[i];
            v[k].store(to + c);
        });
        return;
    }
    team.for_row(width, [&](int c, auto few) {
        auto v = few.load(from + c);
        for (float y : v.at) squares += y * y;
    });
    float scale = 1.0f / sqrtf(team.sum(squares) / width + eps);
    team.for_row(width, [&](int c, auto few) {
        auto v = few.load(from + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) v.at[i] *= scale * weight[c + i];
        v.store(to + c);
    });
}

// With x̂ = x·s, s = 1/rms, g = dy·w: dx = s·(g − x̂·mean(g·x̂)); dw = Σ dy·x̂, summed here over each team's rows in
// shared memory, where each thread has its own columns, and then over the teams in order.
template <class T>
__device__ void rms_norm_backward(const float* x, const int* rows, const float* weight, float eps, const T* dy, float* dx,
                                  T* dx_copy, float* partial, int count, int width, int add) {
    SHARED_MEMORY(float, sums);
    const Team team(width);
    float* d_weight = sums + team.number() * width;
    int step = (count + gridDim.x - 1) / gridDim.x;
    int first = blockIdx.x * step + team.number(), last = min(int(blockIdx.x + 1) * step, count);
    if (keeps(team, width)) {
        Few<4> w[KEPT], d_w[KEPT];
        for_kept(team, width, [&](int k, int c) { w[k] = four(weight + c), d_w[k] = {}; });
        for (int r = first; r < last; r += team.count()) {
            const float* from = x + (long long)(rows ? rows[r] : r) * width;
            long long row = (long long)r * width;
            Few<4> v[KEPT], d[KEPT];
            for_kept(team, width, [&](int k, int c) { v[k] = Few<4>::load(from + c), d[k] = Few<4>::load(dy + row + c); });
            float squares = 0, product = 0;
            for_kept(team, width, [&](int k, int) {
                for (int i = 0; i < 4; ++i) {
                    squares += v[k].at[i] * v[k].at[i];
                    product += v[k].at[i] * w[k].at[i] * d[k].at[i];
                }
            });
            float scale = 1.0f / sqrtf(team.sum(squares) / width + eps);
            float mean = team.sum(product) * scale / width;
            for_kept(team, width, [&](int k, int c) {
                Few<4> dx_row = {};
                if (add) dx_row = Few<4>::load(dx + row + c);
                for (int i = 0; i < 4; ++i) {
                    float normed = v[k].at[i] * scale;
                    dx_row.at[i] += scale * (d[k].at[i] * w[k].at[i] - normed * mean);
                    d_w[k].at[i] += d[k].at[i] * normed;
                }
                dx_row.store(dx + row + c);
                if (dx_copy) dx_row.store(dx_copy + row + c);
            });
        }
        for_kept(team, width, [&](int k, int c) { d_w[k].store(d_weight + c); });
    } else {
        team.for_row(width, [&](int c, auto few) {
            for (int i = 0; i < int(sizeof few / 4); ++i) d_weight[c + i] = 0;
        });
        for (int r = first; r < last; r += team.count()) {
            const float* from = x + (long long)(rows ? rows[r] : r) * width;
            const T* dy_row = dy + (long long)r * width;
            float* dx_row = dx + (long long)r * width;
            float squares = 0, product = 0;
            team.for_row(width, [&](int c, auto few) {
                auto v = few.load(from + c), d = few.load(dy_row + c);
                for (int i = 0; i < int(sizeof few / 4); ++i) squares += v.at[i] * v.at[i], product += v.at[i] * weight[c + i] * d.at[i];
            });
            float scale = 1.0f / sqrtf(team.sum(squares) / width + eps);
            float mean = team.sum(product) * scale / width;
            team.for_row(width, [&](int c, auto few) {
                auto v = few.load(from + c), d = few.load(dy_row + c);
                if (add) few = few.load(dx_row + c);
                for (int i = 0; i < int(sizeof few / 4); ++i) {
                    float normed = v.at[i] * scale;
                    few.at[i] = (add ? few.at[i] : 0.0f) + scale * (d.at[i] * weight[c + i] - normed * mean);
                    d_weight[c + i] += d.at[i] * normed;
                }
                few.store(dx_row + c);
                if (dx_copy) few.store(dx_copy + (long long)r * width + c);
            });
        }
    }
    if (!partial) return;
    __syncthreads();
    for_columns(0, width, width, [&](int c, auto few) {
        for (int t = 0; t < team.count(); ++t) {
            auto own = few.load(sums + t * width + c);
            for (int i = 0; i < int(sizeof few / 4); ++i) few.at[i] = (t ? few.at[i] : 0.0f) + own.at[i];
        }
        few.store(partial + (long long)blockIdx.x * width + c);
    });
}

}  // namespace device

RMS_NORM(rms_norm_f32, float) { device::rms_norm(x, rows, weight, eps, out, count, width); }
RMS_NORM(rms_norm_bf16, bf16) { device::rms_norm(x, rows, weight, eps, out, count, width); }

RMS_NORM_BACKWARD(rms_norm_backward_f32, float) {
    device::rms_norm_backward(x, rows, weight, eps, dy, dx, dx_copy, partial, count, width, add);
}
RMS_NORM_BACKWARD(rms_norm_backward_bf16, bf16) {
    device::rms_norm_backward(x, rows, weight, eps, dy, dx, dx_copy, partial, count, width, add);
}
