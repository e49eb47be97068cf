// What the kernels are written in: CUDA with a handful of names of our own. Under nvcc these become instructions; under
// a C++ compiler they become the emulated device of `emulate/`, on which the same sources are tested without a GPU.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;
using f16 = __half;

// A kernel and the number of threads in its blocks.
#define KERNEL(threads, name, ...) extern "C" __global__ void __launch_bounds__(threads) name(__VA_ARGS__)
// The same, with registers so few that as many blocks fit a multiprocessor (0: as many as come).
#define DENSE_KERNEL(threads, blocks, name, ...) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
// The block's dynamic shared memory.
#define SHARED_MEMORY(type, name)              \
    extern __shared__ uint4 dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared)

namespace device {

// c += a·b for a 16×16 `a`, a 16×8 `b` and a 16×8 `c`, spread over a warp as PTX's mma.m16n8k16 lays them out.
template <class T> __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> __device__ inline void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ inline void mma<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8×8 matrices of 16-bit elements from shared memory, lane l giving the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// The same, each matrix transposed.
__device__ inline void load_transposed(uint32_t (&r)[4], const void* row) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// Starts copying 16 bytes to shared memory, or zeros where `valid` is false (`from` must be an address all the same).
__device__ inline void copy_async(void* to, const void* from, bool valid) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// Ends a batch of copies.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `left` of this thread's latest batches are under way.
template <int left>
__device__ inline void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory"); }

// A GPU faults where an access is not aligned; the emulated device stops with a message.
__device__ inline void check_aligned(const void*, size_t) {}

// 2ˣ to about two units in the last place; subnormal results are zero.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace device

#else
#include "emulate/emulate.h"
#endif

namespace device {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

__device__ inline int lane() { return threadIdx.x % WARP; }
__device__ inline int warp() { return threadIdx.x / WARP; }

// tanh x, off by some 1e-7.
__device__ inline float tanh_fast(float x) { return 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(x * (2 * LOG2E))); }

// Storage and arithmetic.
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }
__device__ inline float widen(f16 x) { return __half2float(x); }
template <class T> __device__ T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline f16 narrow<f16>(float x) { return __float2half_rn(x); }

// Two neighbours, read or written at once.
template <class T> struct alignas(2 * sizeof(T)) Pair { T x, y; };

// Sixteen bytes of neighbours.
template <class T> struct alignas(16) Vector {
    static constexpr int LENGTH = 16 / sizeof(T);
    T at[LENGTH];
};

// N neighbours as float32, read and written in one access: four at a time keep memory busy where a kernel only passes
// over it.
template <int N> struct Few {
    float at[N];

    template <class T> struct alignas(N * sizeof(T)) Stored { T at[N]; };
    template <class T> __device__ static Few load(const T* from) {
        check_aligned(from, sizeof(Stored<T>));
        Stored<T> stored = *reinterpret_cast<const Stored<T>*>(from);
        Few x;
#pragma unroll
        for (int i = 0; i < N; ++i) x.at[i] = widen(stored.at[i]);
        return x;
    }
    template <class T> __device__ void store(T* to) const {
        check_aligned(to, sizeof(Stored<T>));
        Stored<T> stored;
#pragma unroll
        for (int i = 0; i < N; ++i) stored.at[i] = narrow<T>(at[i]);
        *reinterpret_cast<Stored<T>*>(to) = stored;
    }
};

// Visits the columns first … last − 1 of rows that are `width` long, as thread `thread` of `threads`: visit(c, Few<4>{})
// for four at once where every row begins at a multiple of four, else visit(c, Few<1>{}).
template <class F> __device__ inline void for_columns_of(int thread, int threads, int first, int last, int width, F visit) {
    if (width % 4 == 0) {
        for (int c = first + 4 * thread; c < last; c += 4 * threads) visit(c, Few<4>{});
    } else {
        for (int c = first + thread; c < last; c += threads) visit(c, Few<1>{});
    }
}

// The same by the whole block.
template <class F> __device__ inline void for_columns(int first, int last, int width, F visit) {
    for_columns_of(threadIdx.x, blockDim.x, first, last, width, visit);
}

// Calls f(i) for this thread's share of n elements.
template <class F> __device__ inline void for_elements(long long n, F f) {
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) f(i);
}

// Sums over a warp: every lane receives the same bits.
template <class F> __device__ inline F warp_sum(F x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

// The same over a block: every thread receives the result. All threads of the block must call it.
template <class F> __device__ inline F block_sum(F x) {
    __shared__ F parts[WARP];
    x = warp_sum(x);
    __syncthreads();  // an earlier call's parts have been read
    if (lane() == 0) parts[warp()] = x;
    __syncthreads();
    return warp_sum(lane() < int(blockDim.x) / WARP ? parts[lane()] : F(0));
}

__device__ inline float block_max(float x) {
    __shared__ float parts[WARP];
    x = warp_max(x);
    __syncthreads();
    if (lane() == 0) parts[warp()] = x;
    __syncthreads();
    return warp_max(lane() < int(blockDim.x) / WARP ? parts[lane()] : -INFINITY);
}

// Bits that look random, from an element's number: the noise of `Mat::dithered` in common/src/kernels/gemm/pack.
__device__ inline uint32_t sixteen_bits(uint32_t number) {
    uint32_t x = (number ^ (number >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x >> 16;
}

// bfloat16 that is rounded up when the noise (16 bits) overflows what is cut off.
__device__ inline bf16 round_with(float x, uint32_t noise) {
    if (!isfinite(x)) return narrow<bf16>(x);
    return __ushort_as_bfloat16(static_cast<unsigned short>((__float_as_uint(x) + noise) >> 16));
}

}  // namespace device

// Rows of an attention tile and the threads that work on it: a warp for 16 rows.
template <class T> constexpr int attention_rows = sizeof(T) == 2 ? 64 : 32;
#define ATTENTION_THREADS(T) (2 * attention_rows<T>)

// Blocks that are to fit a multiprocessor, where that is worth a few registers: for heads up to 64 wide, up to 128 wide.
template <class T> constexpr int attention_blocks(int D, int narrow, int wide) {
    return sizeof(T) == 4 || D > 128 ? 0 : D <= 64 ? narrow : wide;
}

// Rows of a page of the key/value cache.
constexpr int PAGE = 64;
