// Small matrix products of a warp, out of shared memory and registers: what the attention kernels are made of.
//
// Results are 16 × 8n and live in registers as tensor cores lay them out: with g = lane / 4 and t = lane % 4, entry
// [j][0..3] of a lane is (row g, columns 8j + 2t and + 1), then the same of row g + 8. In 16 bits the products are tensor
// core instructions; in float32 plain multiply-adds on the same layout, so that everything around them is one code.
#pragma once
#include "device.h"

namespace device {

// Elements from row to row of a tile D wide in shared memory: 16 bytes more than a row, so that the eight rows that a
// warp reads at once lie in different banks.
template <class T, int D> constexpr int pitch = D + 16 / int(sizeof(T));

// Columns of a result that a block makes: 16 × 256 float32 sums a warp are what registers hold. Wider heads have two blocks,
// which make the same scores.
template <int D> constexpr int result_columns = D <= 256 ? D : 256;

// Rows that a block's tile meets at a time, forward and backward: as many as its own, and of wider heads as many as fit beside
// it in the 163 KiB of shared memory that an A100 has for a block.
template <class T, int D> constexpr int forward_step = D <= 256 ? attention_rows<T> : sizeof(T) == 2 ? 64 : 16;
template <class T, int D> constexpr int backward_step = D <= 256 ? attention_rows<T> : sizeof(T) == 2 ? 16 : 8;

// c += A·Bᵀ over D: `a` is row 0 of 16 rows, `b` row 0 of 8·N rows, in tiles of width D.
template <int N, int D, class T> __device__ inline void multiply_rows(float (&c)[N][4], const T* a, const T* b) {
    constexpr int P = pitch<T, D>;
    const T* a_row = a + lane() % 16 * P + lane() / 16 * 8;
    const T* b_row = b + (lane() / 16 * 8 + lane() % 8) * P + lane() / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        uint32_t left[4];
        load_matrices(left, a_row + k);
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            uint32_t right[4];
            load_matrices(right, b_row + j * 8 * P + k);
            mma<T>(c[j], left, right[0], right[1]);
            mma<T>(c[j + 1], left, right[2], right[3]);
        }
    }
}

template <int N, int D> __device__ inline void multiply_rows(float (&c)[N][4], const float* a, const float* b) {
    constexpr int P = pitch<float, D>;
    const float *upper = a + lane() / 4 * P, *lower = upper + 8 * P, *column = b + lane() % 4 * 2 * P;
#pragma unroll 1
    for (int k = 0; k < D; k += 4) {
        Vector<float> u = *reinterpret_cast<const Vector<float>*>(upper + k);
        Vector<float> l = *reinterpret_cast<const Vector<float>*>(lower + k);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            Vector<float> x = *reinterpret_cast<const Vector<float>*>(column + j * 8 * P + k);
            Vector<float> y = *reinterpret_cast<const Vector<float>*>(column + (j * 8 + 1) * P + k);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                c[j][0] += u.at[i] * x.at[i];
                c[j][1] += u.at[i] * y.at[i];
                c[j][2] += l.at[i] * x.at[i];
                c[j][3] += l.at[i] * y.at[i];
            }
        }
    }
}

template <class T> __device__ inline uint32_t pack(float low, float high) {
    T pair[2] = {narrow<T>(low), narrow<T>(high)};
    uint32_t bits;
    memcpy(&bits, pair, sizeof bits);
    return bits;
}

// c += P·B: `p` is 16 × 8·K in registers, rounded to the storage type; `b` row 0 of 8·K rows of a tile of width D, of
// which N·8 columns are taken from `b` on. `scratch` is the warp's own in float32 (see SCRATCH), else unused.
template <int K, int N, int D, class T>
__device__ inline void multiply_columns(float (&c)[N][4], const float (&p)[K][4], const T* b, float*) {
    constexpr int P = pitch<T, D>;
    const T* row = b + lane() % 16 * P + lane() / 16 * 8;
#pragma unroll
    for (int k = 0; k < K; k += 2) {
        uint32_t left[4] = {pack<T>(p[k][0], p[k][1]), pack<T>(p[k][2], p[k][3]), pack<T>(p[k + 1][0], p[k + 1][1]),
                            pack<T>(p[k + 1][2], p[k + 1][3])};
#pragma unroll
        for (int j = 0; j < N; j += 2) {
            uint32_t right[4];
            load_transposed(right, row + k * 8 * P + j * 8);
            mma<T>(c[j], left, right[0], right[1]);
            mma<T>(c[j + 1], left, right[2], right[3]);
        }
    }
}

// Floats from row to row of a warp's scratch, which holds 16 rows of weights of R others.
template <int R> constexpr int scratch_pitch = R + 4;

template <int K, int N, int D>
__device__ inline void multiply_columns(float (&c)[N][4], const float (&p)[K][4], const float* b, float* scratch) {
    constexpr int P = pitch<float, D>, S = scratch_pitch<8 * K>;
    int g = lane() / 4, t = lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < K; ++j) {
        *reinterpret_cast<Pair<float>*>(scratch + g * S + j * 8 + t) = {p[j][0], p[j][1]};
        *reinterpret_cast<Pair<float>*>(scratch + (g + 8) * S + j * 8 + t) = {p[j][2], p[j][3]};
    }
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < 8 * K; ++k) {
        float upper = scratch[g * S + k], lower = scratch[(g + 8) * S + k];
#pragma unroll
        for (int j = 0; j < N; ++j) {
            Pair<float> v = *reinterpret_cast<const Pair<float>*>(b + k * P + j * 8 + t);
            c[j][0] += upper * v.x;
            c[j][1] += upper * v.y;
            c[j][2] += lower * v.x;
            c[j][3] += lower * v.y;
        }
    }
    __syncwarp();  // the scratch may be written again
}

template <int N> __device__ inline void clear(float (&c)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; ++j)
        for (int i = 0; i < 4; ++i) c[j][i] = 0;
}

// Starts loading R rows of up to D elements into a tile, by the whole block (or by each warp, with THREADS = WARP): row(i)
// gives the address of row i, or null for a row of zeros; columns from `dim` on are zeros too. `some` is any valid
// address. What `row` computes is computed for every 16 bytes, and a tile is soon multiplied: it must be little.
template <class T, int D, int R, int THREADS = ATTENTION_THREADS(T), class F>
__device__ inline void load_rows(T* tile, int dim, const T* some, F row) {
    constexpr int V = Vector<T>::LENGTH, CHUNKS = D / V;
    int thread = threadIdx.x % THREADS;
    if (dim % V == 0) {
#pragma unroll
        for (int first = 0; first < R * CHUNKS; first += THREADS) {
            int i = first + thread, r = i / CHUNKS, c = i % CHUNKS * V;
            if (R * CHUNKS % THREADS != 0 && i >= R * CHUNKS) break;
            const T* from = row(r);
            bool valid = from && c < dim;
            copy_async(tile + r * pitch<T, D> + c, valid ? from + c : some, valid);
        }
    } else {
#pragma unroll 1
        for (int i = thread; i < R * D; i += THREADS) {
            int r = i / D, c = i % D;
            const T* from = row(r);
            tile[r * pitch<T, D> + c] = from && c < dim ? from[c] : narrow<T>(0.0f);
        }
    }
}

// Where scores have a soft cap, their products become hyperbolic tangents. (What is hidden is to be hidden after this.)
template <int N> __device__ inline void cap_scores(float (&s)[N][4], Scores scores) {
    if (scores.share <= 0) return;
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] = tanh_fast(s[j][i] * scores.share);
}

// Takes gradients of capped scores back through the cap, given those hyperbolic tangents.
template <int N> __device__ inline void through_cap(float (&d)[N][4], const float (&t)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[j][i] *= 1.0f - t[j][i] * t[j][i];
}

// Attention of 16 rows of queries, key by key, as far as it has come: o / sum is the result, with exponents in base 2.
template <int N> struct Online {
    float o[N][4];
    float max[2], sum[2];  // of rows g and g + 8; `sum` of this lane's columns alone until `finish`

    // `sink` stands beside the scores of all rows, base 2; −∞: nothing does.
    __device__ void begin(float sink = -INFINITY) {
        clear(o);
        bool counts = sink > -INFINITY && lane() % 4 == 0;
        for (int i = 0; i < 2; ++i) max[i] = sink, sum[i] = counts ? 1.0f : 0.0f;
    }

    // Takes in 8·K more keys: `s` are their scores (−∞ where hidden), which `scale` turns to base 2, and becomes their
    // weights, with which the values are then to be multiplied into `o`.
    template <int K> __device__ void weigh(float (&s)[K][4], float scale) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = -INFINITY;
#pragma unroll
            for (int j = 0; j < K; ++j) top = fmaxf(top, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(ALL, top, 1));  // the four lanes of a row
            top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
            top = fmaxf(top * scale, max[half]);
            float shift = top == -INFINITY ? 0.0f : top;  // a row that sees nothing yet keeps zeros
            float keep = exp2_fast(max[half] - shift);
            max[half] = top;
            sum[half] *= keep;
#pragma unroll
            for (int j = 0; j < K; ++j) {
                s[j][2 * half] = exp2_fast(fmaf(s[j][2 * half], scale, -shift));
                s[j][2 * half + 1] = exp2_fast(fmaf(s[j][2 * half + 1], scale, -shift));
                sum[half] += s[j][2 * half] + s[j][2 * half + 1];
            }
#pragma unroll
            for (int j = 0; j < N; ++j) o[j][2 * half] *= keep, o[j][2 * half + 1] *= keep;
        }
    }

    // Brings the sums of a row's lanes together.
    __device__ void finish() {
        for (int half = 0; half < 2; ++half) {
            sum[half] += __shfl_xor_sync(ALL, sum[half], 1);
            sum[half] += __shfl_xor_sync(ALL, sum[half], 2);
        }
    }

    // Natural log-sum-exp of a row.
    __device__ float lse(int half) const { return sum[half] > 0 ? (max[half] + log2f(sum[half])) * LN2 : -INFINITY; }
};

}  // namespace device
