// A head's memory as a block walks with it from token to token: it stays in registers, while the rows of the next tokens come
// into shared memory a few at a time.
//
// A warp has DELTA_COLUMNS columns: eight lanes share four of them, each with an eighth of the rows. So a product with a vector
// of rows is done by three steps of shuffles in the warp, and warps do not wait for each other.
#pragma once
#include "kernels.h"

namespace device {

constexpr int DELTA_RUN = 8;  // tokens whose rows come at a time

// Where a thread's part of a memory lies: rows 32·m + 4·part + (0 … 3), columns 4·group + (0 … 3) of the warp's.
__device__ inline int part() { return lane() % 8; }
__device__ inline int group() { return lane() / 8; }

// Which row of the memory a thread's row r is.
__device__ inline int row_of(int r) { return r / 4 * 32 + 4 * part() + r % 4; }

// Σ over the lanes of four columns: a lane gets that of column part / 2.
__device__ inline float over_rows(const Few<4>& x) {
    bool upper = part() & 4, odd = part() & 2;
    float a = (upper ? x.at[2] : x.at[0]) + __shfl_xor_sync(ALL, upper ? x.at[0] : x.at[2], 4);
    float b = (upper ? x.at[3] : x.at[1]) + __shfl_xor_sync(ALL, upper ? x.at[1] : x.at[3], 4);
    float c = (odd ? b : a) + __shfl_xor_sync(ALL, odd ? a : b, 2);
    return c + __shfl_xor_sync(ALL, c, 1);
}

// What the lanes have, each for its column, for all of them.
__device__ inline Few<4> to_all(float x) {
    Few<4> all;
#pragma unroll
    for (int c = 0; c < 4; ++c) all.at[c] = __shfl_sync(ALL, x, group() * 8 + 2 * c);
    return all;
}

// A thread's rows of a vector.
template <int D> struct RowVector {
    float at[D / 8];

    __device__ static RowVector load(const float* from) {
        RowVector x;
#pragma unroll
        for (int m = 0; m < D / 32; ++m) {
            Few<4> four = Few<4>::load(from + 32 * m + 4 * part());
#pragma unroll
            for (int e = 0; e < 4; ++e) x.at[4 * m + e] = four.at[e];
        }
        return x;
    }
};

// A thread's part of a memory.
template <int D> struct Memory {
    float at[D / 8][4];

    __device__ void clear() {
        for (auto& row : at)
            for (float& x : row) x = 0;
    }
    // Sᵀx for this lane's column (see `over_rows`).
    __device__ float times_rows(const RowVector<D>& x) const {
        Few<4> sum = {};
#pragma unroll
        for (int r = 0; r < D / 8; ++r)
#pragma unroll
            for (int c = 0; c < 4; ++c) sum.at[c] += at[r][c] * x.at[r];
        return over_rows(sum);
    }
    // S·x over this thread's columns, added up over the warp's, into to[row].
    __device__ void times_columns(const Few<4>& x, float* to) const {
        constexpr int HALF = D / 16, QUARTER = D / 32;
        float y[D / 8], half[HALF], quarter[QUARTER];
#pragma unroll
        for (int r = 0; r < D / 8; ++r) {
            y[r] = 0;
#pragma unroll
            for (int c = 0; c < 4; ++c) y[r] += at[r][c] * x.at[c];
        }
        bool upper = lane() & 16, odd = lane() & 8;
#pragma unroll
        for (int i = 0; i < HALF; ++i) half[i] = (upper ? y[i + HALF] : y[i]) + __shfl_xor_sync(ALL, upper ? y[i] : y[i + HALF], 16);
#pragma unroll
        for (int i = 0; i < QUARTER; ++i) {
            quarter[i] = (odd ? half[i + QUARTER] : half[i]) + __shfl_xor_sync(ALL, odd ? half[i] : half[i + QUARTER], 8);
        }
#pragma unroll
        for (int i = 0; i < QUARTER; ++i) to[row_of(group() * QUARTER + i)] = quarter[i];
    }
    // S = decay·S
    __device__ void fade(float decay) {
        for (auto& row : at)
            for (float& x : row) x *= decay;
    }
    // S = decay·S + k·uᵀ
    __device__ void learn(float decay, const RowVector<D>& k, const Few<4>& u) {
#pragma unroll
        for (int r = 0; r < D / 8; ++r)
#pragma unroll
            for (int c = 0; c < 4; ++c) at[r][c] = decay * at[r][c] + k.at[r] * u.at[c];
    }
};

// What a block has: COLUMNS of a value head, fewer at its end.
template <int COLUMNS> struct DeltaBlock {
    DeltaHeads heads;
    int head, key_head, first;  // `first`: of the head's columns

    __device__ explicit DeltaBlock(const DeltaHeads& heads) : heads(heads) {
        int strips = (heads.value_dim + COLUMNS - 1) / COLUMNS;
        head = blockIdx.x / strips;
        key_head = head / (heads.value_heads / heads.key_heads);
        first = blockIdx.x % strips * COLUMNS;
    }
    // This thread's first column in the block, and the one that is this lane's (see `over_rows`).
    __device__ int four() const { return warp() * DELTA_COLUMNS + 4 * group(); }
    __device__ int own() const { return four() + part() / 2; }
    __device__ bool has(int column) const { return first + column < heads.value_dim; }
    // Columns of the block that there are.
    __device__ int valid() const { return min(COLUMNS, heads.value_dim - first); }
    // Whether this warp has any of them.
    __device__ bool idle() const { return !has(warp() * DELTA_COLUMNS); }

    template <class T> __device__ T* query(T* qkv, int token) const {
        return qkv + (long long)token * heads.qkv_width() + key_head * heads.key_dim;
    }
    template <class T> __device__ T* key(T* qkv, int token) const { return query(qkv, token) + heads.key_width(); }
    template <class T> __device__ T* value(T* qkv, int token) const {
        return qkv + (long long)token * heads.qkv_width() + 2 * heads.key_width() + head * heads.value_dim + first;
    }
    // Of rows [value_width].
    template <class T> __device__ T* columns_of(T* x, int token) const {
        return x + (long long)token * heads.value_width() + head * heads.value_dim + first;
    }
    __device__ Few<2> decay_and_rate(const float* gates, int token) const {
        const float* row = gates + (long long)token * 2 * heads.value_heads + head;
        return {{row[0], row[heads.value_heads]}};
    }

    // Calls visit(r, its first column) for a thread's rows of memory `number`.
    template <int ROWS, class F> __device__ void for_rows(float* memories, int number, F visit) const {
        float* base = memories + ((long long)number * heads.value_heads + head) * heads.key_dim * heads.value_dim + first + four();
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (row_of(r) < heads.key_dim) visit(r, base + (long long)row_of(r) * heads.value_dim);
        }
    }
    // Whether a thread's columns are there and can be read at once; else they come one by one.
    __device__ bool whole() const { return heads.value_dim % 4 == 0 && has(four()); }
    // The sum of the memories that a span begins with.
    template <int D> __device__ void begin(Memory<D>& memory, float* memories, const DeltaSpan& span) const {
        memory.clear();
        for (int i = 0; i < span.froms; ++i) {
            for_rows<D / 8>(memories, span.from + i, [&](int r, const float* from) {
                Few<4> x = {};
                if (whole()) x = Few<4>::load(from);
                for (int c = 0; c < 4; ++c) {
                    if (!whole() && has(four() + c)) x.at[c] = from[c];
                    memory.at[r][c] += x.at[c];
                }
            });
        }
    }
    // Where it leaves its own.
    template <int D> __device__ void end(const Memory<D>& memory, float* memories, const DeltaSpan& span) const {
        if (span.to < 0) return;
        for_rows<D / 8>(memories, span.to, [&](int r, float* to) {
            const float(&x)[4] = memory.at[r];
            if (whole()) return Few<4>{{x[0], x[1], x[2], x[3]}}.store(to);
            for (int c = 0; c < 4; ++c) {
                if (has(four() + c)) to[c] = x[c];
            }
        });
    }
};

// The vectors of some tokens in shared memory, twice: of the tokens at work, and of the next. For each token two vectors of
// D rows, two of the block's columns, decay and rate.
template <int D, int COLUMNS> struct DeltaStage {
    static constexpr int PITCH = 2 * D + 2 * COLUMNS + 4, FLOATS = 2 * DELTA_RUN * PITCH;
    float* at;  // of the run's first token

    __device__ DeltaStage(float* shared, int run) : at(shared + run % 2 * DELTA_RUN * PITCH) {}
    __device__ float* rows(int t, int which) const { return at + t * PITCH + which * D; }
    __device__ float* columns(int t, int which) const { return at + t * PITCH + 2 * D + which * COLUMNS; }
    __device__ float& decay(int t) const { return at[t * PITCH + 2 * D + 2 * COLUMNS]; }
    __device__ float& rate(int t) const { return (&decay(t))[1]; }

    // Brings vectors of `count` tokens, of which there are `valid` elements; value(t, c) is such an element.
    template <class F> __device__ void bring_rows(int which, int count, int valid, F value) const {
        bring<D>(rows(0, which), count, valid, value);
    }
    template <class F> __device__ void bring_columns(int which, int count, int valid, F value) const {
        bring<COLUMNS>(columns(0, which), count, valid, value);
    }
    template <class F> __device__ void bring_gates(int count, F decay_and_rate) const {
        if (int(threadIdx.x) < count) {
            Few<2> both = decay_and_rate(threadIdx.x);
            decay(threadIdx.x) = both.at[0], rate(threadIdx.x) = both.at[1];
        }
    }

private:
    template <int LENGTH, class F> __device__ void bring(float* to, int count, int valid, F value) const {
        for (int i = threadIdx.x; i < count * LENGTH; i += blockDim.x) {
            int t = i / LENGTH, c = i % LENGTH;
            to[t * PITCH + c] = c < valid ? value(t, c) : 0.0f;
        }
    }
};

}  // namespace device
