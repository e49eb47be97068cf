// ChaCha8 as rand_chacha's `ChaCha8Rng` runs it (D. J. Bernstein's stream cipher, 8 rounds, 64-bit block counter,
// stream 0): any draw of a sample's stream can be made without those before it.
#pragma once
#include "device.h"

namespace device {

__device__ inline uint32_t rotate(uint32_t x, int by) { return x << by | x >> (32 - by); }

__device__ inline void quarter(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    a += b, d = rotate(d ^ a, 16);
    c += d, b = rotate(b ^ c, 12);
    a += b, d = rotate(d ^ a, 8);
    c += d, b = rotate(b ^ c, 7);
}

// Draw number n of the stream with this key (8 words), uniform in [0, 1), of 53 bits.
__device__ inline double uniform(const uint32_t* key, int n) {
    uint32_t start[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574, key[0], key[1], key[2], key[3],
                          key[4], key[5], key[6], key[7], uint32_t(n / 8), 0, 0, 0};
    uint32_t x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = start[i];
#pragma unroll 1
    for (int round = 0; round < 8; round += 2) {
        quarter(x[0], x[4], x[8], x[12]);
        quarter(x[1], x[5], x[9], x[13]);
        quarter(x[2], x[6], x[10], x[14]);
        quarter(x[3], x[7], x[11], x[15]);
        quarter(x[0], x[5], x[10], x[15]);
        quarter(x[1], x[6], x[11], x[12]);
        quarter(x[2], x[7], x[8], x[13]);
        quarter(x[3], x[4], x[9], x[14]);
    }
    uint64_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i == n % 8) bits = uint64_t(x[2 * i + 1] + start[2 * i + 1]) << 32 | (x[2 * i] + start[2 * i]);
    }
    return double(bits >> 11) / 9007199254740992.0;
}

}  // namespace device
