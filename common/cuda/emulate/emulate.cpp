// The emulated device: its fibers, its warp instructions, and the entries through which tests launch kernels.
#define EMULATE_REGISTER
#include "../kernels.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <map>
#include <string>
#include <vector>

namespace emulate {

thread_local Registers registers;
thread_local unsigned char* shared_memory;

namespace {

[[noreturn]] void stop(const char* what, const char* more = "") {
    fprintf(stderr, "emulated device: kernel block (%u,%u,%u) thread %u: %s%s\n", registers.block.x, registers.block.y,
            registers.block.z, registers.thread.x, what, more);
    abort();
}

std::map<std::string, const Entry*>& entries() {
    static std::map<std::string, const Entry*> all;
    return all;
}

// ---- Fibers ---------------------------------------------------------------------------------------------------------

enum class State { Ready, AtBarrier, InWarp, Done };

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Fiber {
    ucontext_t start;
    jmp_buf where;
    bool begun = false;
    State state = State::Done;
    unsigned thread = 0;
    unsigned warp_phase = 0;
    std::vector<std::vector<Copy>> batches;  // copies under way; the last batch is still open
};

struct Warp {
    Slot slots[2][32];  // the next instruction may begin while lanes still read the results of this one
    unsigned phase = 0;
    int arrived = 0;
    const char* name = nullptr;
};

struct Block {
    std::vector<Fiber*> fibers;
    std::vector<Warp> warps;
    unsigned size = 0;
    unsigned waiting = 0, done = 0;
    bool flag = false, flag_of_last = false;
    const Entry* entry = nullptr;
    void** arguments = nullptr;
    int order = 0;
    jmp_buf scheduler;
    ucontext_t scheduler_context;
};

thread_local Block block;
thread_local Fiber* current;

// Under AddressSanitizer the switch goes through swapcontext, which it knows; else through a jump, which is no system call.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK = 1 << 17;  // what it clears at each switch
void into(Fiber& fiber) { swapcontext(&block.scheduler_context, &fiber.start); }
void out_of(Fiber& fiber) { swapcontext(&fiber.start, &block.scheduler_context); }
#else
constexpr size_t STACK = 1 << 18;
[[gnu::noinline]] void into(Fiber& fiber) {
    if (_setjmp(block.scheduler)) return;
    if (fiber.begun) _longjmp(fiber.where, 1);
    fiber.begun = true;
    swapcontext(&block.scheduler_context, &fiber.start);
}
[[gnu::noinline]] void out_of(Fiber& fiber) {
    if (!_setjmp(fiber.where)) _longjmp(block.scheduler, 1);
}
#endif

// A fiber outlives its thread: it runs one thread of one block after another.
void live() {
    for (;;) {
        Fiber& fiber = *current;
        block.entry->call(block.arguments);
        if (!fiber.batches.empty() && !(fiber.batches.size() == 1 && fiber.batches[0].empty())) {
            stop("ends with copies that it did not wait for");
        }
        fiber.state = State::Done;
        ++block.done;
        out_of(fiber);
    }
}

Fiber* make_fiber() {
    auto* fiber = new Fiber;
    void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) stop("no memory for a stack");
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = stack;
    fiber->start.uc_stack.ss_size = STACK;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, live, 0);
    return fiber;
}

void release_barrier() {
    block.flag_of_last = block.flag;
    block.flag = false;
    block.waiting = 0;
    for (unsigned i = 0; i < block.size; ++i) {
        if (block.fibers[i]->state == State::AtBarrier) block.fibers[i]->state = State::Ready;
    }
}

// Order 0 runs threads upwards, 1 downwards, others shuffled anew in each round by a generator that they seed.
void run_block(uint3 index) {
    registers.block = index;
    block.warps.assign(block.size / 32, Warp{});
    block.waiting = block.done = 0;
    block.flag = false;
    std::vector<unsigned> turn(block.size);
    for (unsigned i = 0; i < block.size; ++i) {
        turn[i] = block.order == 1 ? block.size - 1 - i : i;
        Fiber& fiber = *block.fibers[i];
        fiber.thread = i;
        fiber.warp_phase = 0;
        fiber.state = State::Ready;
        fiber.batches.clear();
    }
    uint32_t random = uint32_t(block.order) * 2654435761u + index.x + 1;
    while (block.done < block.size) {
        if (block.order > 1) {
            for (unsigned i = block.size - 1; i > 0; --i) {
                random = random * 1664525u + 1013904223u;
                std::swap(turn[i], turn[(random >> 8) % (i + 1)]);
            }
        }
        bool moved = false;
        for (unsigned i : turn) {
            Fiber& fiber = *block.fibers[i];
            bool released = fiber.state == State::InWarp && block.warps[i / 32].phase != fiber.warp_phase;
            if (fiber.state != State::Ready && !released) continue;
            fiber.state = State::Ready;
            moved = true;
            current = &fiber;
            registers.thread = {i, 0, 0};
            into(fiber);
        }
        if (block.waiting > 0 && block.waiting + block.done == block.size) {
            if (block.done > 0) stop("a barrier that threads which have ended do not reach");
            release_barrier();
        } else if (!moved) {
            stop("threads wait for each other at different places: ", block.entry->name);
        }
    }
}

}  // namespace

void add(const Entry& entry) { entries()[entry.name] = &entry; }

bool block_barrier(bool flag) {
    block.flag |= flag;
    ++block.waiting;
    current->state = State::AtBarrier;
    Fiber& fiber = *current;
    out_of(fiber);
    return block.flag_of_last;
}

Slot& warp_instruction(const char* name, const void* in, size_t bytes, void (*operation)(Slot*, int), int argument) {
    Fiber& fiber = *current;
    Warp& warp = block.warps[fiber.thread / 32];
    Slot* slots = warp.slots[warp.phase % 2];
    if (bytes > 0) memcpy(slots[fiber.thread % 32].in, in, bytes);
    if (warp.arrived == 0) warp.name = name;
    if (warp.name != name) stop("lanes of a warp execute different instructions: ", name);
    if (++warp.arrived == 32) {
        operation(slots, argument);
        warp.arrived = 0;
        ++warp.phase;
    } else {
        fiber.warp_phase = warp.phase;
        fiber.state = State::InWarp;
        out_of(fiber);
    }
    return slots[fiber.thread % 32];
}

void check_aligned(const void* at, size_t bytes) {
    if (uintptr_t(at) % bytes != 0) stop("an access that is not aligned in ", block.entry->name);
}

// ---- Asynchronous copies --------------------------------------------------------------------------------------------
// A GPU makes them at some time between their start and the wait: here at once in order 1, at the wait in all others.

void copy_async(void* to, const void* from, bool valid) {
    check_aligned(to, 16);
    if (valid) check_aligned(from, 16);
    auto& batches = current->batches;
    if (batches.empty()) batches.emplace_back();
    batches.back().push_back({to, from, valid});
    if (block.order == 1) valid ? (void)memcpy(to, from, 16) : (void)memset(to, 0, 16);
}

void copy_commit() {
    if (current->batches.empty()) current->batches.emplace_back();
    current->batches.emplace_back();
}

void copy_wait(int left) {
    auto& batches = current->batches;
    while (int(batches.size()) > left + 1) {
        if (block.order != 1) {
            for (const Copy& copy : batches.front()) {
                copy.valid ? (void)memcpy(copy.to, copy.from, 16) : (void)memset(copy.to, 0, 16);
            }
        }
        batches.erase(batches.begin());
    }
}

}  // namespace emulate

// ---- Matrix instructions --------------------------------------------------------------------------------------------

namespace device {
namespace {

template <class T> float element(uint32_t pair, int which);
template <> float element<bf16>(uint32_t pair, int which) { return __bfloat162float({uint16_t(pair >> 16 * which)}); }
template <> float element<f16>(uint32_t pair, int which) { return __half2float({uint16_t(pair >> 16 * which)}); }

struct Operands {
    uint32_t a[4], b[2];
};

template <class T> void multiply(emulate::Slot* slots, int) {
    float a[16][16], b[8][16];
    for (int lane = 0; lane < 32; ++lane) {
        Operands in;
        memcpy(&in, slots[lane].in, sizeof in);
        int group = lane / 4, pair = lane % 4 * 2;
        for (int e = 0; e < 2; ++e) {
            for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][pair + r / 2 * 8 + e] = element<T>(in.a[r], e);
            for (int r = 0; r < 2; ++r) b[group][pair + r * 8 + e] = element<T>(in.b[r], e);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        float sum[4] = {};
        for (int i = 0; i < 4; ++i) {
            const float *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
            for (int k = 0; k < 16; ++k) sum[i] += row[k] * column[k];
        }
        memcpy(slots[lane].out, sum, sizeof sum);
    }
}

template <bool transposed> void load(emulate::Slot* slots, int) {
    for (int lane = 0; lane < 32; ++lane) {
        uint32_t out[4];
        for (int m = 0; m < 4; ++m) {
            auto at = [&](int row, int column) {
                const uint16_t* from;
                memcpy(&from, slots[m * 8 + row].in, sizeof from);
                return uint32_t(from[column]);
            };
            int group = lane / 4, pair = lane % 4 * 2;
            out[m] = transposed ? at(pair, group) | at(pair + 1, group) << 16 : at(group, pair) | at(group, pair + 1) << 16;
        }
        memcpy(slots[lane].out, out, sizeof out);
    }
}

template <class T> void add_product(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Operands in{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    float sum[4];
    memcpy(sum, emulate::warp_instruction("mma", &in, sizeof in, multiply<T>, 0).out, sizeof sum);
    for (int i = 0; i < 4; ++i) c[i] += sum[i];
}

}  // namespace

template <> void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { add_product<bf16>(c, a, b0, b1); }
template <> void mma<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { add_product<f16>(c, a, b0, b1); }

void load_matrices(uint32_t (&r)[4], const void* row) {
    emulate::check_aligned(row, 16);
    memcpy(r, emulate::warp_instruction("ldmatrix", &row, sizeof row, load<false>, 0).out, sizeof r);
}

void load_transposed(uint32_t (&r)[4], const void* row) {
    emulate::check_aligned(row, 16);
    memcpy(r, emulate::warp_instruction("ldmatrix.trans", &row, sizeof row, load<true>, 0).out, sizeof r);
}

}  // namespace device

// ---- What a host calls ----------------------------------------------------------------------------------------------

namespace {

thread_local int order_of_launches = 0;

const emulate::Entry* entry_of(const char* name) {
    auto found = emulate::entries().find(name);
    return found == emulate::entries().end() ? nullptr : found->second;
}

}  // namespace

// The kernel of this name, to be called as cuLaunchKernel would launch it, or null. It returns when all is done.
extern "C" emulate::Host emulate_find(const char* name) {
    const emulate::Entry* entry = entry_of(name);
    return entry ? entry->host : nullptr;
}

// The size in bytes of a parameter of the kernel of this name; 0 after the last.
extern "C" size_t emulate_parameter_size(const char* name, int index) {
    const emulate::Entry* entry = entry_of(name);
    return entry ? entry->parameter_size(index) : 0;
}

// The order of threads in later launches of this thread: 0 upwards, 1 downwards (and copies made at once), above that
// shuffled, by the number given.
extern "C" void emulate_order(int order) { order_of_launches = order; }

// Bytes beside a buffer: AddressSanitizer lets no kernel read them. (Whoever gives them back may.)
extern "C" void emulate_fence([[maybe_unused]] void* at, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(at, bytes);
#endif
}

namespace emulate {

void launch(const Entry& entry, uint3 grid, uint3 threads, unsigned shared_bytes, void** arguments) {
    if (threads.x != entry.threads || threads.y != 1 || threads.z != 1 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || shared_bytes > 227 * 1024) {
        fprintf(stderr, "emulated device: %s has %u threads and cannot be launched with %ux%ux%u, grid %ux%ux%u, %u bytes\n",
                entry.name, entry.threads, threads.x, threads.y, threads.z, grid.x, grid.y, grid.z, shared_bytes);
        abort();
    }
    while (block.fibers.size() < entry.threads) block.fibers.push_back(make_fiber());
    block.size = entry.threads;
    block.entry = &entry;
    block.arguments = arguments;
    block.order = order_of_launches;
    registers.block_dim = threads;
    registers.grid_dim = grid;
    // Exactly as much as was asked for, so that AddressSanitizer sees the end.
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, shared_bytes + (shared_bytes == 0)) != 0) stop("no memory for shared memory");
    shared_memory = static_cast<unsigned char*>(memory);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                memset(shared_memory, 0xff, shared_bytes);
                run_block({x, y, z});
            }
    free(memory);
}

}  // namespace emulate
