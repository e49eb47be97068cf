// Implicit rewards of a batch of groups, and the best and worst response of each prompt by r − α·length: a warp for a
// prompt. The choice is that of common/src/reward.rs, bit for bit: responses are compared without computing scores,
// by differences and products that are held exactly as sums of two float64s.
#include "kernels.h"

namespace device {

// A line value + α·key; the choice is the highest at α.
struct Line {
    double value;
    long long key;
    int index;
};

// Whether flat.value − steep.value ≤ α·(steep.key − flat.key), where steep.key > flat.key.
__device__ inline bool steeper_wins(const Line& flat, const Line& steep, double alpha) {
    // Knuth's TwoSum: lead + lead_rest is the difference without error.
    double a = flat.value, b = steep.value, lead = a - b, back = lead - a;
    double lead_rest = (a - (lead - back)) - (b + back);
    double by = double(steep.key - flat.key), gain = alpha * by, gain_rest = fma(alpha, by, -gain);
    return lead < gain || (lead == gain && lead_rest <= gain_rest);
}

// Whether `a` is the choice of the two: of equal lines the one that comes first.
__device__ inline bool above(const Line& a, const Line& b, double alpha) {
    if (a.index < 0) return false;
    if (b.index < 0) return true;
    if (a.key == b.key) return a.value > b.value || (a.value == b.value && a.index < b.index);
    return a.key > b.key ? steeper_wins(b, a, alpha) : !steeper_wins(a, b, alpha);
}

__device__ inline int top(Line line, double alpha) {
    for (int step = 16; step > 0; step /= 2) {
        Line other{__shfl_xor_sync(ALL, line.value, step), __shfl_xor_sync(ALL, line.key, step),
                   __shfl_xor_sync(ALL, line.index, step)};
        if (above(other, line, alpha)) line = other;
    }
    return line.index;
}

}  // namespace device

KERNEL(256, rewards, const double* policy, const double* reference, const long long* lengths, const int* offsets,
       double beta, double alpha, double* rewards, int* best, int* worst, int prompts) {
    using namespace device;
    int p = blockIdx.x * 8 + warp();
    if (p >= prompts) return;
    int first = offsets[p], last = offsets[p + 1];
    Line up{0, 0, -1}, down{0, 0, -1};
    for (int i = first + lane(); i < last; i += WARP) {
        double reward = beta * (policy[i] - reference[i]);
        rewards[i] = reward;
        Line rising{reward, -lengths[i], i - first}, falling{-reward, lengths[i], i - first};
        if (above(rising, up, alpha)) up = rising;
        if (above(falling, down, alpha)) down = falling;
    }
    int highest = top(up, alpha), lowest = top(down, alpha);
    if (lane() == 0) {
        best[p] = highest;
        worst[p] = lowest;
    }
}
