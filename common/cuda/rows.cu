// Rows of tables: gathered, scattered with a fixed order of sums, added up by columns.
#include "kernels.h"

namespace device {

template <class T> __device__ void embed(const T* table, const int* tokens, float scale, float* out, int width) {
    const T* from = table + (long long)tokens[blockIdx.x] * width;
    float* to = out + (long long)blockIdx.x * width;
    for_columns(0, width, width, [=](int c, auto few) {
        auto v = few.load(from + c);
        for (float& x : v.at) x *= scale;
        v.store(to + c);
    });
}

template <class T> __device__ void add_bias(T* x, const float* bias, int width) {
    T* row = x + (long long)blockIdx.x * width;
    for_columns(0, width, width, [=](int c, auto few) {
        auto v = few.load(row + c);
        for (int i = 0; i < int(sizeof few / 4); ++i) v.at[i] += bias[c + i];
        v.store(row + c);
    });
}

// A warp has 32 neighbouring columns and every eighth row; then the warps' sums are added up in order.
template <class T> __device__ void sum_columns(const T* x, float* out, int count, int width, int add) {
    __shared__ float sums[256 / WARP][WARP];
    int c = blockIdx.x * WARP + lane();
    int rows = (count + gridDim.y - 1) / gridDim.y;
    int first = blockIdx.y * rows, last = min(first + rows, count);
    float sum = 0;
    for (int r = first + warp(); r < last && c < width; r += 256 / WARP) sum += widen(x[(long long)r * width + c]);
    sums[warp()][lane()] = sum;
    __syncthreads();
    if (warp() > 0 || c >= width) return;
    for (int w = 1; w < 256 / WARP; ++w) sum += sums[w][lane()];
    float* to = out + (long long)blockIdx.y * width + c;
    *to = add ? *to + sum : sum;
}

}  // namespace device

EMBED(embed_f32, float) { device::embed(table, tokens, scale, out, width); }
EMBED(embed_bf16, bf16) { device::embed(table, tokens, scale, out, width); }
EMBED(embed_f16, f16) { device::embed(table, tokens, scale, out, width); }

KERNEL(256, add_rows, const float* x, const int* rows, const int* starts, const int* order, float* target, int width) {
    float* to = target + (long long)rows[blockIdx.x] * width;
    int first = starts[blockIdx.x], last = starts[blockIdx.x + 1];
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        float sum = 0;
        for (int i = first; i < last; ++i) sum += x[(long long)order[i] * width + c];
        to[c] += sum;
    }
}

ADD_BIAS(add_bias_f32, float) { device::add_bias(x, bias, width); }
ADD_BIAS(add_bias_bf16, bf16) { device::add_bias(x, bias, width); }
ADD_BIAS(add_bias_f16, f16) { device::add_bias(x, bias, width); }

SUM_COLUMNS(sum_columns_f32, float) { device::sum_columns(x, out, count, width, add); }
SUM_COLUMNS(sum_columns_bf16, bf16) { device::sum_columns(x, out, count, width, add); }
