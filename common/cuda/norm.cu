// RMSNorm and its gradient: y = x / √(mean(x²) + ε) · w, of the residual stream, of what is added to it, of queries and of
// keys; of rows as they are, or less their means. (A weight may lie anywhere in a flat buffer, so it is read one by one; rows
// are read in fours.)
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

// Rows `stride` elements apart.
template <class T> struct Rows {
    T* first;
    int stride;
    __device__ T* operator[](int r) const { return first + (long long)r * stride; }
};

template <class T> __device__ inline float mean_of(const Team& team, const T* row, int width) {
    float sum = 0;
    team.for_row(width, [&](int c, auto few) {
        auto v = few.load(row + c);
        for (float x : v.at) sum += x;
    });
    return team.sum(sum) / width;
}

// A row that is kept, less its mean.
__device__ inline void centre(const Team& team, int width, Few<4> (&v)[KEPT]) {
    float sum = 0;
    for_kept(team, width, [&](int k, int) {
        for (float x : v[k].at) sum += x;
    });
    float mean = team.sum(sum) / width;
    for_kept(team, width, [&](int k, int) {
        for (float& x : v[k].at) x -= mean;
    });
}

// y[r] = norm of x[rows[r]], or of x[r], or y[r] gains it. It may be x itself.
template <class X, class Y>
__device__ void rms_norm(Rows<const X> x, const int* rows, const float* weight, NormKind kind, Rows<Y> y, int count,
                         int width, bool add) {
    const Team team(width);
    int r = blockIdx.x * team.count() + team.number();
    if (r >= count) return;
    const X* from = x[rows ? rows[r] : r];
    Y* to = y[r];
    float squares = 0;
    if (keeps(team, width)) {
        Few<4> v[KEPT], w[KEPT];
        for_kept(team, width, [&](int k, int c) { v[k] = Few<4>::load(from + c), w[k] = four(weight + c); });
        if (kind.centred) centre(team, width, v);
        for_kept(team, width, [&](int k, int) {
            for (float y : v[k].at) squares += y * y;
        });
        float scale = 1.0f / sqrtf(team.sum(squares) / width + kind.eps);
        for_kept(team, width, [&](int k, int c) {
            Few<4> sum = {};
            if (add) sum = Few<4>::load(to + c);
            for (int i = 0; i < 4; ++i) sum.at[i] += v[k].at[i] * (scale * w[k].at[i]);
            sum.store(to + c);
        });
        return;
    }
    float mean = kind.centred ? mean_of(team, from, width) : 0.0f;
    team.for_row(width, [&](int c, auto few) {
        auto v = few.load(from + c);
        for (float y : v.at) squares += (y - mean) * (y - mean);
    });
    float scale = 1.0f / sqrtf(team.sum(squares) / width + kind.eps);
    team.for_row(width, [&](int c, auto few) {
        auto v = few.load(from + c);
        if (add) few = few.load(to + c);
        for (int i = 0; i < int(sizeof few / 4); ++i)
            few.at[i] = (add ? few.at[i] : 0.0f) + (v.at[i] - mean) * (scale * weight[c + i]);
        few.store(to + c);
    });
}

// With x̂ = x·s, s = 1/rms, g = dy·w: dx = s·(g − x̂·mean(g·x̂)); dw = Σ dy·x̂, summed here over each team's rows in
// shared memory, where each thread has its own columns, and then over the teams in order. Of a centred row x̂ has no mean, and
// so has dx none: it is less s·mean(g).
// `dx` may be `dy`.
template <bool CENTRED, class X, class DY, class DX>
__device__ void rms_norm_backward(Rows<const X> x, const int* rows, const float* weight, float eps, Rows<const DY> dy,
                                  Rows<DX> dx, DY* dx_copy, Rows<float> partial, int count, int width, bool add) {
    SHARED_MEMORY(float, sums);
    const Team team(width);
    float* d_weight = sums + team.number() * width;
    int step = (count + gridDim.x - 1) / gridDim.x;
    int first = blockIdx.x * step + team.number(), last = min(int(blockIdx.x + 1) * step, count);
    if (keeps(team, width)) {
        Few<4> w[KEPT], d_w[KEPT];
        for_kept(team, width, [&](int k, int c) { w[k] = four(weight + c), d_w[k] = {}; });
        for (int r = first; r < last; r += team.count()) {
            const X* from = x[rows ? rows[r] : r];
            const DY* dy_row = dy[r];
            DX* to = dx[r];
            Few<4> v[KEPT], d[KEPT];
            for_kept(team, width, [&](int k, int c) { v[k] = Few<4>::load(from + c), d[k] = Few<4>::load(dy_row + c); });
            float squares = 0, product = 0, shift = 0;
            if (CENTRED) {
                centre(team, width, v);
                for_kept(team, width, [&](int k, int) {
                    for (int i = 0; i < 4; ++i) shift += w[k].at[i] * d[k].at[i];
                });
                shift = team.sum(shift) / width;
            }
            for_kept(team, width, [&](int k, int) {
                for (int i = 0; i < 4; ++i) {
                    squares += v[k].at[i] * v[k].at[i];
                    product += v[k].at[i] * w[k].at[i] * d[k].at[i];
                }
            });
            float scale = 1.0f / sqrtf(team.sum(squares) / width + eps);
            float mean = team.sum(product) * scale / width;
            shift *= scale;
            for_kept(team, width, [&](int k, int c) {
                Few<4> dx_row = {};
                if (add) dx_row = Few<4>::load(to + c);
                for (int i = 0; i < 4; ++i) {
                    float normed = v[k].at[i] * scale;
                    dx_row.at[i] -= shift;
                    dx_row.at[i] += scale * (d[k].at[i] * w[k].at[i] - normed * mean);
                    d_w[k].at[i] += d[k].at[i] * normed;
                }
                dx_row.store(to + c);
                if (dx_copy) dx_row.store(dx_copy + (long long)r * width + c);
            });
        }
        for_kept(team, width, [&](int k, int c) { d_w[k].store(d_weight + c); });
    } else {
        team.for_row(width, [&](int c, auto few) {
            for (int i = 0; i < int(sizeof few / 4); ++i) d_weight[c + i] = 0;
        });
        for (int r = first; r < last; r += team.count()) {
            const X* from = x[rows ? rows[r] : r];
            const DY* dy_row = dy[r];
            DX* dx_row = dx[r];
            float middle = CENTRED ? mean_of(team, from, width) : 0.0f;
            float squares = 0, product = 0, shift = 0;
            team.for_row(width, [&](int c, auto few) {
                auto v = few.load(from + c), d = few.load(dy_row + c);
                for (int i = 0; i < int(sizeof few / 4); ++i) {
                    float x = v.at[i] - middle;
                    squares += x * x;
                    product += x * weight[c + i] * d.at[i];
                    shift += weight[c + i] * d.at[i];
                }
            });
            float scale = 1.0f / sqrtf(team.sum(squares) / width + eps);
            float mean = team.sum(product) * scale / width;
            shift = CENTRED ? team.sum(shift) * scale / width : 0.0f;
            team.for_row(width, [&](int c, auto few) {
                auto v = few.load(from + c), d = few.load(dy_row + c);
                if (add) few = few.load(dx_row + c);
                for (int i = 0; i < int(sizeof few / 4); ++i) {
                    float normed = (v.at[i] - middle) * scale;
                    few.at[i] = (add ? few.at[i] : 0.0f) - shift + scale * (d.at[i] * weight[c + i] - normed * mean);
                    d_weight[c + i] += d.at[i] * normed;
                }
                few.store(dx_row + c);
                if (dx_copy) few.store(dx_copy + (long long)r * width + c);
            });
        }
    }
    if (!partial.first) return;
    __syncthreads();
    for_columns(0, width, width, [&](int c, auto few) {
        for (int t = 0; t < team.count(); ++t) {
            auto own = few.load(sums + t * width + c);
            for (int i = 0; i < int(sizeof few / 4); ++i) few.at[i] = (t ? few.at[i] : 0.0f) + own.at[i];
        }
        few.store(partial[blockIdx.x] + c);
    });
}

// Two loops, so that rows that are not centred do not pay for those that are: with a flag in one, registers spill.
template <class X, class DY, class DX>
__device__ void rms_norm_backward(Rows<const X> x, const int* rows, const float* weight, NormKind kind, Rows<const DY> dy,
                                  Rows<DX> dx, DY* dx_copy, Rows<float> partial, int count, int width, bool add) {
    if (kind.centred)
        rms_norm_backward<true>(x, rows, weight, kind.eps, dy, dx, dx_copy, partial, count, width, add);
    else
        rms_norm_backward<false>(x, rows, weight, kind.eps, dy, dx, dx_copy, partial, count, width, add);
}

}  // namespace device

namespace device {

template <class T> __device__ Rows<T> rows_of(T* x, int stride) { return {x, stride}; }

template <class T>
__device__ void norm_stream(const float* x, const int* rows, const float* weight, NormKind kind, T* out, int count,
                            int width) {
    rms_norm(rows_of(x, width), rows, weight, kind, rows_of(out, width), count, width, false);
}

template <class T>
__device__ void norm_stream_backward(const float* x, const int* rows, const float* weight, NormKind kind, const T* dy,
                                     float* dx, T* dx_copy, float* partial, int count, int width, int add) {
    rms_norm_backward(rows_of(x, width), rows, weight, kind, rows_of(dy, width), rows_of(dx, width), dx_copy,
                      rows_of(partial, width), count, width, add);
}

template <class T>
__device__ void norm_given_backward(const float* given, const float* weight, NormKind kind, const float* dy, T* d_given,
                                    float* partial, int count, int width) {
    rms_norm_backward(rows_of(given, width), nullptr, weight, kind, rows_of(dy, width), rows_of(d_given, width),
                      (float*)nullptr, rows_of(partial, width), count, width, false);
}

template <class T>
__device__ void norm_part(T* x, const float* weight, NormKind kind, int count, int width, int stride) {
    int first = blockIdx.y * width;
    Rows<T> part = rows_of(x + first, stride);
    rms_norm(rows_of((const T*)part.first, stride), nullptr, weight + first, kind, part, count, width, false);
}

template <class T>
__device__ void norm_part_backward(const T* x, const float* weight, NormKind kind, T* d, float* partial, int count, int width,
                                   int stride) {
    int first = blockIdx.y * width;
    Rows<T> part = rows_of(d + first, stride);
    Rows<float> sums = rows_of(partial ? partial + first : nullptr, gridDim.y * width);
    rms_norm_backward(rows_of(x + first, stride), nullptr, weight + first, kind, rows_of((const T*)part.first, stride), part,
                      (T*)nullptr, sums, count, width, false);
}

}  // namespace device

RMS_NORM(rms_norm_f32, float) { device::norm_stream(x, rows, weight, kind, out, count, width); }
RMS_NORM(rms_norm_bf16, bf16) { device::norm_stream(x, rows, weight, kind, out, count, width); }
RMS_NORM(rms_norm_f16, f16) { device::norm_stream(x, rows, weight, kind, out, count, width); }

RMS_NORM_BACKWARD(rms_norm_backward_f32, float) {
    device::norm_stream_backward(x, rows, weight, kind, dy, dx, dx_copy, partial, count, width, add);
}
RMS_NORM_BACKWARD(rms_norm_backward_bf16, bf16) {
    device::norm_stream_backward(x, rows, weight, kind, dy, dx, dx_copy, partial, count, width, add);
}

KERNEL(256, rms_norm_add, const float* given, const float* weight, NormKind kind, float* sum, int count, int width) {
    device::rms_norm(device::rows_of(given, width), nullptr, weight, kind, device::rows_of(sum, width), count, width, true);
}
RMS_NORM_ADD_BACKWARD(rms_norm_add_backward_f32, float) {
    device::norm_given_backward(given, weight, kind, dy, d_given, partial, count, width);
}
RMS_NORM_ADD_BACKWARD(rms_norm_add_backward_bf16, bf16) {
    device::norm_given_backward(given, weight, kind, dy, d_given, partial, count, width);
}

RMS_NORM_PART(rms_norm_part_f32, float) { device::norm_part(x, weight, kind, count, width, stride); }
RMS_NORM_PART(rms_norm_part_bf16, bf16) { device::norm_part(x, weight, kind, count, width, stride); }
RMS_NORM_PART(rms_norm_part_f16, f16) { device::norm_part(x, weight, kind, count, width, stride); }

RMS_NORM_PART_BACKWARD(rms_norm_part_backward_f32, float) {
    device::norm_part_backward(x, weight, kind, d, partial, count, width, stride);
}
RMS_NORM_PART_BACKWARD(rms_norm_part_backward_bf16, bf16) {
    device::norm_part_backward(x, weight, kind, d, partial, count, width, stride);
}
