// Which rows of a packed, prefix-shared batch a token's short convolution sees, and which see the token.
#pragma once
#include "kernels.h"

namespace device {

// The rows that a token's convolution sees.
template <class T> struct Taps {
    const T* raw;
    int width;
    DeltaSegment segment;
    int token;

    // The token so far back; below 0 before the first of the sequence.
    __device__ int back(int by) const {
        int own = token - by, after = token - segment.first - by;
        if (after >= 0) return own;
        return segment.prefix_len + after >= 0 ? segment.prefix + segment.prefix_len + after : -1;
    }
    __device__ const T* operator()(int by) const {
        int at = back(by);
        return at < 0 ? nullptr : raw + (long long)at * width;
    }
};

// Visits every row whose convolution sees a token, which lies `by` back there: those after it in its segment, `own`, and of a
// root's last rows the first of its branches.
template <class F> __device__ void for_followers(const DeltaSegment* own, int token, int kernel, F visit) {
    int end = own->first + own->rows;
    for (int by = 0; by < kernel; ++by) {
        int after = token + by - end;
        if (after < 0) visit(token + by, by);
        for (const DeltaSegment* branch = own + 1; after >= 0 && end < own->end; ++branch) {
            if (after < branch->rows) visit(branch->first + after, by);
            if (branch->end == own->end) break;
        }
    }
}

}  // namespace device
