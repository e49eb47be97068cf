// Where the rows of the fused projection lie, and which keys a tile of queries sees.
#pragma once
#include "kernels.h"
#include "tile.h"

namespace device {

// The columns of a query head and of its key head in rows [q | k | v] of a batch.
template <class T> struct Head {
    const T *q, *k, *v;  // of row 0
    int width;           // from row to row

    __device__ Head(const T* qkv, int query, int kv, int dim, int head)
        : q(qkv + head * dim), k(qkv + (query + head / (query / kv)) * dim), v(k + kv * dim), width((query + 2 * kv) * dim) {}
    __device__ const T* row(const T* column, int token) const { return column + (long long)token * width; }
};

// The keys that a tile of queries sees, by position: a branch's root first, then the segment itself.
struct Visible {
    AttentionTile tile;
    int window;

    // The position of row i of the tile.
    __device__ int position(int i) const { return tile.prefix_len + tile.first - tile.start + i; }
    __device__ int begin() const { return window > 0 ? max(position(0) - window + 1, 0) : 0; }
    __device__ int end() const { return position(tile.rows); }
    // The row of the batch that holds a position.
    __device__ int row(int at) const { return at < tile.prefix_len ? tile.prefix + at : tile.start + at - tile.prefix_len; }

    // Hides what a warp's rows (from row `first` of the tile) do not see of the keys from position `from` on: their scores
    // become −∞. Most tiles lie wholly in sight of all rows.
    template <int N> __device__ void mask(float (&s)[N][4], int from, int first) const {
        if (from + 8 * N - 1 <= position(0) && (window <= 0 || from > position(tile.rows - 1) - window)) return;
        // Key numbers count from this lane's first; those of a row from `low` to `high` are seen.
        int high[2], low[2];
        for (int half = 0; half < 2; ++half) {
            high[half] = position(first + lane() / 4 + half * 8) - from - lane() % 4 * 2;
            low[half] = window > 0 ? high[half] - window + 1 : -0x40000000;
        }
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int key = j * 8 + i % 2;
                if (key > high[i / 2] || key < low[i / 2]) s[j][i] = -INFINITY;
            }
    }
};

}  // namespace device
