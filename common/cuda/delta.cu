// The delta rule: each head's memory fades, S ← a·S, learns what it lacks of a token, S ← S + k·(β·(v − Sᵀk))ᵀ, and is read,
// o = Sᵀq. Columns of a memory do not depend on each other, so a block has some of a head's; tokens do.
#include "delta.h"

namespace device {

constexpr int SCAN_COLUMNS = 128 / WARP * DELTA_COLUMNS;

template <class T, int D>
__device__ void scan(const T* qkv, const float* gates, const DeltaSpan& span, float* memories, T* read, const DeltaHeads& heads) {
    SHARED_MEMORY(float, shared);
    const DeltaBlock<SCAN_COLUMNS> block(heads);
    Memory<D> memory;
    block.begin(memory, memories, span);
    for (int first = 0, run = 0; first < span.rows; first += DELTA_RUN, ++run) {
        const DeltaStage<D, SCAN_COLUMNS> stage(shared, run);
        int count = min(DELTA_RUN, span.rows - first), token = span.first + first;
        stage.bring_rows(0, count, heads.key_dim, [&](int t, int c) { return widen(block.key(qkv, token + t)[c]); });
        stage.bring_rows(1, count, heads.key_dim, [&](int t, int c) { return widen(block.query(qkv, token + t)[c]); });
        stage.bring_columns(0, count, block.valid(), [&](int t, int c) { return widen(block.value(qkv, token + t)[c]); });
        stage.bring_gates(count, [&](int t) { return block.decay_and_rate(gates, token + t); });
        __syncthreads();
        if (block.idle()) continue;
        for (int t = 0; t < count; ++t) {
            auto k = RowVector<D>::load(stage.rows(t, 0));
            float lack = stage.columns(t, 0)[block.own()] - stage.decay(t) * memory.times_rows(k);
            memory.learn(stage.decay(t), k, to_all(stage.rate(t) * lack));
            float found = memory.times_rows(RowVector<D>::load(stage.rows(t, 1)));
            if (part() % 2 == 0 && block.has(block.own())) block.columns_of(read, token + t)[block.own()] = narrow<T>(found);
        }
    }
    block.end(memory, memories, span);
}

}  // namespace device

#define DEFINE_SCAN(name, T, D) \
    DELTA_SCAN(name, T, D) { device::scan<T, D>(qkv, gates, spans[blockIdx.y], memories, read, heads); }
DELTA_VARIANTS(DEFINE_SCAN, delta_scan);
DELTA_VARIANTS_F16(DEFINE_SCAN, delta_scan);

#define DEFINE_STEP(name, T, D)                                                  \
    DELTA_STEP(name, T, D) {                                                     \
        int slot = blockIdx.y;                                                   \
        if (finished[slot]) return;                                              \
        DeltaSpan token{slot, 1, from[slot], 1, slot};                           \
        device::scan<T, D>(qkv, gates, token, memories, read, heads);            \
    }
DELTA_VARIANTS(DEFINE_STEP, delta_step);
