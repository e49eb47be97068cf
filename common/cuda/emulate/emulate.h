// A CUDA device on the CPU, for tests: the kernels' sources compile against these names as plain C++. The threads of a
// block are fibers that run one after another from barrier to barrier, in an order that a test can choose; blocks run
// one after another. What a GPU would leave undefined stops the program with a line that says where: a barrier that
// some threads do not reach, a warp instruction that lanes do not execute together. Shared memory starts as NaN.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <utility>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static thread_local

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

struct uint3 {
    unsigned x, y, z;
};

namespace emulate {

// The index registers of the thread that runs.
struct Registers {
    uint3 thread, block, block_dim, grid_dim;
};
extern thread_local Registers registers;
extern thread_local unsigned char* shared_memory;

// Waits for the other threads of the block; gives whether `flag` is set in any of them.
bool block_barrier(bool flag);

// What a lane brings to a warp instruction and takes from it.
struct Slot {
    alignas(8) unsigned char in[32];
    alignas(8) unsigned char out[16];
};
// Waits for the other lanes; the last one there runs `operation` on the slots of all. Gives this lane's slot.
Slot& warp_instruction(const char* name, const void* in, size_t bytes, void (*operation)(Slot* slots, int argument), int argument);

void check_aligned(const void* at, size_t bytes);
void copy_async(void* to, const void* from, bool valid);
void copy_commit();
void copy_wait(int left);

// How a host launches a kernel: grid, block, bytes of dynamic shared memory, and arguments as cuLaunchKernel takes them.
using Host = void (*)(unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void**);

// A kernel by its name, with what a launch must agree with.
struct Entry {
    const char* name;
    unsigned threads;
    void (*call)(void** arguments);
    size_t (*parameter_size)(int index);
    Host host;
};

void launch(const Entry& entry, uint3 grid, uint3 threads, unsigned shared_bytes, void** arguments);

template <auto kernel> struct Kernel;
template <class... P, void (*kernel)(P...)> struct Kernel<kernel> {
    static inline const Entry* entry;
    template <size_t... I> static void apply(void** arguments, std::index_sequence<I...>) {
        kernel(*static_cast<P*>(arguments[I])...);
    }
    static void call(void** arguments) { apply(arguments, std::index_sequence_for<P...>{}); }
    static size_t parameter_size(int index) {
        constexpr size_t sizes[] = {sizeof(P)..., 0};
        return index >= 0 && index < int(sizeof...(P)) ? sizes[index] : 0;
    }
    static void host(unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared_bytes,
                     void** arguments) {
        launch(*entry, {gx, gy, gz}, {bx, by, bz}, shared_bytes, arguments);
    }
};

void add(const Entry& entry);

// Makes a kernel known when the program starts.
template <auto kernel> struct Known {
    Entry entry;
    Known(const char* name, unsigned threads)
        : entry{name, threads, Kernel<kernel>::call, Kernel<kernel>::parameter_size, Kernel<kernel>::host} {
        Kernel<kernel>::entry = &entry;
        add(entry);
    }
};

}  // namespace emulate

// (Called kernel_…, so that a short name cannot meet another of the program.)
#ifdef EMULATE_REGISTER
#define KERNEL(threads, name, ...)   \
    void kernel_##name(__VA_ARGS__); \
    static const emulate::Known<kernel_##name> known_##name(#name, threads)
#else
#define KERNEL(threads, name, ...) void kernel_##name(__VA_ARGS__)
#endif
#define DENSE_KERNEL(threads, blocks, ...) KERNEL(threads, __VA_ARGS__)
#define SHARED_MEMORY(type, name) type* name = reinterpret_cast<type*>(emulate::shared_memory)

#define threadIdx (emulate::registers.thread)
#define blockIdx (emulate::registers.block)
#define blockDim (emulate::registers.block_dim)
#define gridDim (emulate::registers.grid_dim)

inline void __syncthreads() { emulate::block_barrier(false); }
inline int __syncthreads_or(int flag) { return emulate::block_barrier(flag != 0); }
inline void __syncwarp() {
    emulate::warp_instruction("syncwarp", nullptr, 0, [](emulate::Slot*, int) {}, 0);
}

template <class V> V __shfl_xor_sync(unsigned, V value, int mask) {
    emulate::Slot& slot = emulate::warp_instruction("shfl.xor", &value, sizeof value, [](emulate::Slot* slots, int mask) {
        for (int lane = 0; lane < 32; ++lane) memcpy(slots[lane].out, slots[lane ^ mask].in, 8);
    }, mask);
    memcpy(&value, slot.out, sizeof value);
    return value;
}

template <class V> V __shfl_sync(unsigned, V value, int from) {
    struct Asked {
        char value[8];
        int from;  // each lane has its own
    } asked{{}, from};
    memcpy(asked.value, &value, sizeof value);
    emulate::Slot& slot = emulate::warp_instruction("shfl.idx", &asked, sizeof asked, [](emulate::Slot* slots, int) {
        for (int lane = 0; lane < 32; ++lane) {
            Asked own;
            memcpy(&own, slots[lane].in, sizeof own);
            memcpy(slots[lane].out, slots[own.from % 32].in, 8);
        }
    }, 0);
    memcpy(&value, slot.out, sizeof value);
    return value;
}

template <class V> V __shfl_up_sync(unsigned, V value, unsigned by) {
    emulate::Slot& slot = emulate::warp_instruction("shfl.up", &value, sizeof value, [](emulate::Slot* slots, int by) {
        for (int lane = 0; lane < 32; ++lane) memcpy(slots[lane].out, slots[lane < by ? lane : lane - by].in, 8);
    }, int(by));
    memcpy(&value, slot.out, sizeof value);
    return value;
}

inline unsigned __ballot_sync(unsigned, int predicate) {
    emulate::Slot& slot = emulate::warp_instruction("ballot", &predicate, sizeof predicate, [](emulate::Slot* slots, int) {
        unsigned all = 0;
        for (int lane = 0; lane < 32; ++lane) {
            int bit;
            memcpy(&bit, slots[lane].in, sizeof bit);
            all |= unsigned(bit != 0) << lane;
        }
        for (int lane = 0; lane < 32; ++lane) memcpy(slots[lane].out, &all, sizeof all);
    }, 0);
    unsigned all;
    memcpy(&all, slot.out, sizeof all);
    return all;
}

inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __bfloat162float(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline bf16 __float2bfloat16_rn(float x) {
    unsigned bits = __float_as_uint(x);
    if (isnan(x)) return bf16{0x7fff};
    return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(f16 x) {
    unsigned sign = unsigned(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // As if it were a float32 with an exponent 112 too small; that works for subnormal numbers, too.
    float value = __uint_as_float(magnitude << 13) * 0x1p112f;
    return sign ? -value : value;
}
inline f16 __float2half_rn(float x) {
    unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
    float magnitude = fabsf(x);
    if (isnan(x)) return f16{0x7fff};
    if (magnitude >= 65520.0f) return f16{uint16_t(sign | 0x7c00)};
    // To whole steps: of 2⁻²⁴ below the smallest normal number, of 2⁻¹⁰ of the leading bit above.
    int exponent;
    frexpf(magnitude, &exponent);
    float step = ldexpf(1.0f, (exponent < -13 ? -13 : exponent) - 11);
    float rounded = nearbyintf(magnitude / step) * step;
    unsigned bits = __float_as_uint(rounded * 0x1p-112f) >> 13;
    return f16{uint16_t(sign | bits)};
}
inline bf16 __ushort_as_bfloat16(unsigned short bits) { return bf16{bits}; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class V> inline V min(V a, V b) { return b < a ? b : a; }
template <class V> inline V max(V a, V b) { return a < b ? b : a; }

namespace device {

template <class T> void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> void mma<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void load_matrices(uint32_t (&r)[4], const void* row);
void load_transposed(uint32_t (&r)[4], const void* row);
inline void check_aligned(const void* at, size_t bytes) { emulate::check_aligned(at, bytes); }
inline void copy_async(void* to, const void* from, bool valid) { emulate::copy_async(to, from, valid); }
inline void copy_commit() { emulate::copy_commit(); }
template <int left> void copy_wait() { emulate::copy_wait(left); }
inline float exp2_fast(float x) { return exp2f(x); }
inline float __fdividef(float x, float y) { return x / y; }

}  // namespace device
