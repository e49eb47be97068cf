// Products of the rows of many experts at once: which rows are whose is known to the device alone.
//
// A block makes 128 × 128 results, a warp 64 × 32 of them in registers, while the next terms are on their way to shared
// memory. Operands lie there as they lie in memory, and are turned as tensor cores read them. Where an expert has few rows,
// which is how sequences are decoded, warps leave out what has none, and the weights' way is all that counts.
#include "kernels.h"

namespace device {

constexpr int STAGES = 4;                                      // of terms: one is multiplied, the others are on their way
template <class T> constexpr int TERMS = 64 / int(sizeof(T));  // of a stage

// One side of a product in shared memory: TERMS terms of each of 128 lines. ALONG: a line's terms follow each other in memory,
// and here; else the lines do.
template <class T, bool ALONG> struct Side {
    static constexpr int V = Vector<T>::LENGTH;
    static constexpr int ROWS = ALONG ? EXPERT_TILE : TERMS<T>, WIDTH = ALONG ? TERMS<T> : EXPERT_TILE;
    static constexpr int PITCH = WIDTH + V;  // neighbours in a column are in different banks
    static constexpr int CHUNKS = WIDTH / V, STEP = 256 / CHUNKS, EACH = ROWS / STEP;  // of 16 bytes; a thread copies EACH

    // Starts copying: row(r, i) is the address of row r of the tile, this thread's i-th, or null; columns below `width` are
    // there. `some` is any address.
    template <class F> static __device__ void load(T* tile, const T* some, int width, F row) {
        int c = threadIdx.x % CHUNKS * V;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            int r = threadIdx.x / CHUNKS + i * STEP;
            const T* from = row(r, i);
            bool valid = from && c < width;
            copy_async(tile + r * PITCH + c, valid ? from + c : some, valid);
        }
    }

    static __device__ float at(const T* tile, int line, int term) {
        return widen(ALONG ? tile[line * PITCH + term] : tile[term * PITCH + line]);
    }

    // 16 lines × 16 terms as the left side of `mma`.
    static __device__ void left(uint32_t (&r)[4], const T* tile, int line, int term) {
        int l = lane();
        if (ALONG)
            load_matrices(r, tile + (line + l % 16) * PITCH + term + l / 16 * 8);
        else
            load_transposed(r, tile + (term + l / 16 * 8 + l % 8) * PITCH + line + l / 8 % 2 * 8);
    }

    // 16 lines × 16 terms as the right sides of two.
    static __device__ void right(uint32_t (&r)[4], const T* tile, int line, int term) {
        int l = lane();
        if (ALONG)
            load_matrices(r, tile + (line + l / 16 * 8 + l % 8) * PITCH + term + l / 8 % 2 * 8);
        else
            load_transposed(r, tile + (term + l % 16) * PITCH + line + l / 16 * 8);
    }
};

// Results of a warp: 64 × 32, as `tile.h` has them; of 16 rows each the first `parts` alone are made.
struct Results {
    float c[4][4][4];
    int row, column, parts;

    // `rows` is how many the block's tile has.
    __device__ explicit Results(int rows) : row(warp() / 4 * 64), column(warp() % 4 * 32), parts((rows - row + 15) / 16) {
#pragma unroll
        for (int i = 0; i < 64; ++i) c[i / 16][i / 4 % 4][i % 4] = 0;
    }

    template <class A, class B, class T> __device__ void add(const T* a, const T* b) {
        if (parts <= 0) return;
#pragma unroll
        for (int term = 0; term < TERMS<T>; term += 16) {
            uint32_t right[2][4];
            for (int j = 0; j < 2; ++j) B::right(right[j], b, column + 16 * j, term);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (i >= parts) break;
                uint32_t left[4];
                A::left(left, a, row + 16 * i, term);
#pragma unroll
                for (int j = 0; j < 4; ++j) mma<T>(c[i][j], left, right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
            }
        }
    }

    template <class A, class B> __device__ void add(const float* a, const float* b) {
        if (parts <= 0) return;
        int g = row + lane() / 4, t = column + lane() % 4 * 2;
#pragma unroll 4
        for (int term = 0; term < TERMS<float>; ++term) {
            float right[4][2];
#pragma unroll
            for (int j = 0; j < 8; ++j) right[j / 2][j % 2] = B::at(b, t + j / 2 * 8 + j % 2, term);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (i >= parts) break;
                float upper = A::at(a, g + 16 * i, term), lower = A::at(a, g + 16 * i + 8, term);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    c[i][j][0] += upper * right[j][0];
                    c[i][j][1] += upper * right[j][1];
                    c[i][j][2] += lower * right[j][0];
                    c[i][j][3] += lower * right[j][1];
                }
            }
        }
    }

    // take(row of the tile, column of the tile, two neighbours), for all rows of these and columns of those there are.
    template <class F> __device__ void give(int rows, int columns, F take) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int r = row + i * 8 + lane() / 4;
            if (r >= rows) continue;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int at = column + j * 8 + lane() % 4 * 2;
                if (at < columns) take(r, at, c[i / 2][j][i % 2 * 2], c[i / 2][j][i % 2 * 2 + 1]);
            }
        }
    }
};

// Sums over `terms` terms, stage by stage: copy(stage's tiles, first term) starts the copies of one.
template <class A, class B, class T, class F> __device__ void sum_stages(Results& sums, T* shared, int terms, F copy) {
    constexpr int SIDE = EXPERT_SHARED / STAGES / 2 / int(sizeof(T));
    auto left = [=](int stage) { return shared + stage % STAGES * 2 * SIDE; };
    auto start = [=](int stage) {
        if (stage * TERMS<T> < terms) copy(left(stage), left(stage) + SIDE, stage * TERMS<T>);
        copy_commit();
    };
    for (int stage = 0; stage < STAGES - 1; ++stage) start(stage);
    for (int stage = 0; stage * TERMS<T> < terms; ++stage) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // this stage is there for all, and nobody reads any more what the next copies overwrite
        start(stage + STAGES - 1);
        sums.template add<A, B>(left(stage), left(stage) + SIDE);
    }
    copy_wait<0>();
}

// ALONG: of weights whose rows are results, as a linear map has them; else whose rows are terms.
template <class T, bool ALONG>
__device__ void expert_product(const T* x, const int* tokens, const T* weights, long long stride, const ExpertTile* tiles,
                               const float* biases, float share, T* y, int n, int k) {
    SHARED_MEMORY(T, shared);
    ExpertTile tile = tiles[blockIdx.y];
    int first = blockIdx.x * EXPERT_TILE;
    if (tile.rows == 0) return;
    using A = Side<T, true>;
    using B = Side<T, ALONG>;
    const T* rows[A::EACH];  // that this thread copies
#pragma unroll
    for (int i = 0; i < A::EACH; ++i) {
        int r = threadIdx.x / A::CHUNKS + i * A::STEP;
        bool valid = r < tile.rows;
        long long from = !valid ? 0 : tokens ? tokens[tile.first + r] : tile.first + r;
        rows[i] = valid ? x + from * k : nullptr;
    }
    const T* w = weights + tile.expert * stride;
    Results sums(tile.rows);
    sum_stages<A, B>(sums, shared, k, [&](T* a, T* b, int term) {
        A::load(a, x, k - term, [&](int, int i) { return rows[i] ? rows[i] + term : nullptr; });
        if (ALONG)
            B::load(b, x, k - term, [&](int r, int) { return first + r < n ? w + (long long)(first + r) * k + term : nullptr; });
        else
            B::load(b, x, n - first, [&](int r, int) { return term + r < k ? w + (long long)(term + r) * n + first : nullptr; });
    });
    const float* bias = biases ? biases + (long long)tile.expert * n + first : nullptr;
    sums.give(tile.rows, n - first, [=](int r, int c, float left, float right) {
        Pair<T>* to = reinterpret_cast<Pair<T>*>(y + (long long)(tile.first + r) * n + first + c);
        if (bias) left += bias[c] * share, right += bias[c + 1] * share;
        *to = {narrow<T>(left), narrow<T>(right)};
    });
}

template <class T>
__device__ void expert_gradient(const T* dy, const int* dy_tokens, const T* x, const int* x_tokens, const int* starts,
                                float* gradients, long long stride, int m, int n) {
    SHARED_MEMORY(T, shared);
    int begin = starts[blockIdx.z], rows = starts[blockIdx.z + 1] - begin;
    int first = blockIdx.y * EXPERT_TILE, column = blockIdx.x * EXPERT_TILE;
    if (rows == 0) return;
    using S = Side<T, false>;
    auto from = [=](const T* matrix, const int* tokens, int width, int r) -> const T* {
        if (r >= rows) return nullptr;
        return matrix + (long long)(tokens ? tokens[begin + r] : begin + r) * width;
    };
    Results sums(m - first);
    sum_stages<S, S>(sums, shared, rows, [&](T* a, T* b, int term) {
        S::load(a, dy, m - first, [&](int r, int) {
            const T* row = from(dy, dy_tokens, m, term + r);
            return row ? row + first : nullptr;
        });
        S::load(b, dy, n - column, [&](int r, int) {
            const T* row = from(x, x_tokens, n, term + r);
            return row ? row + column : nullptr;
        });
    });
    float* gradient = gradients + blockIdx.z * stride;
    sums.give(m - first, n - column, [=](int r, int c, float left, float right) {
        Pair<float>* to = reinterpret_cast<Pair<float>*>(gradient + (long long)(first + r) * n + column + c);
        *to = {to->x + left, to->y + right};
    });
}

}  // namespace device

EXPERT_PRODUCT(expert_rows_f32, float) { device::expert_product<float, true>(x, tokens, weights, stride, tiles, biases, share, y, n, k); }
EXPERT_PRODUCT(expert_rows_bf16, bf16) { device::expert_product<bf16, true>(x, tokens, weights, stride, tiles, biases, share, y, n, k); }
EXPERT_PRODUCT(expert_rows_f16, f16) { device::expert_product<f16, true>(x, tokens, weights, stride, tiles, biases, share, y, n, k); }
EXPERT_PRODUCT(expert_columns_f32, float) { device::expert_product<float, false>(x, tokens, weights, stride, tiles, biases, share, y, n, k); }
EXPERT_PRODUCT(expert_columns_bf16, bf16) { device::expert_product<bf16, false>(x, tokens, weights, stride, tiles, biases, share, y, n, k); }

EXPERT_GRADIENT(expert_gradient_f32, float) {
    device::expert_gradient(dy, dy_tokens, x, x_tokens, starts, gradients, stride, m, n);
}
EXPERT_GRADIENT(expert_gradient_bf16, bf16) {
    device::expert_gradient(dy, dy_tokens, x, x_tokens, starts, gradients, stride, m, n);
}
