// Where the rows of the fused projection lie, and which keys a tile of queries sees.
#pragma once
#include "kernels.h"
#include "tile.h"

namespace device {

// Rows [q | k | v] of a batch.
template <class T> struct Heads {
    const T* qkv;
    int query, kv, dim;

    __device__ long long row(int token) const { return (long long)token * (query + 2 * kv) * dim; }
    __device__ const T* q(int token, int head) const { return qkv + row(token) + head * dim; }
    __device__ const T* k(int token, int head) const { return qkv + row(token) + (query + head / (query / kv)) * dim; }
    __device__ const T* v(int token, int head) const { return k(token, head) + kv * dim; }
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

    // Scales the scores of a warp's rows (from row `first` of the tile) against keys from position `from` on, and hides
    // what a row does not see. Most tiles lie wholly in sight of all rows.
    template <int N> __device__ void mask(float (&s)[N][4], int from, int first, float scale) const {
        bool whole = from + 8 * N - 1 <= position(0) && (window <= 0 || from > position(tile.rows - 1) - window);
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int key = from + j * 8 + lane() % 4 * 2 + i % 2, at = position(first + lane() / 4 + i / 2 * 8);
                bool seen = whole || (key <= at && (window <= 0 || key > at - window));
                s[j][i] = seen ? s[j][i] * scale : -INFINITY;
            }
    }
};

}  // namespace device
