// Random bits for stochastic rounding, the same on every backend whatever block, thread or order an element is stepped
// in: each kCodes elements of a tensor share a hash of (seed, parameter, step, their number), in which each flips bits of its
// own. Each element's bits are uniform, and new at every step; those of neighbours are evenly spread, so that their roundings
// cancel rather than add up. An element's states are rounded by the same bits, but for packed16's means and q8's first rates,
// which take `other_bits`. (noise.py is the same in torch.)
#pragma once

#include "numbers.h"

namespace vsgd {

constexpr int kCodes = 128;  // elements that share a hash, and in q8 and packed16 the words of their codes
// Element i of a block flips the bits of i kSpread: the seven uppermost of either half are another number for each. Flipped
// rather than added, for of what is shifted the flips are too, and need not be shifted anew.
constexpr uint32_t kSpread = 0x9e00ce00u;
// What is rounded by bits of its own.
constexpr int kStateNoise = 0, kMasterNoise = 1;

// A bijection of 32 bits in which each bit of the input moves every bit of the result (two multiplications; the
// constants are those of Wellons' "lowbias32").
VSGD_FN uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// What is random in one step of one parameter.
struct Noise {
  uint32_t a, b;

  // key: what table.py derives of the seed and the parameter's number; t: the step.
  VSGD_FN static Noise of(int64_t key, float t) {
    Noise noise;
    noise.a = mix(uint32_t(uint64_t(key)) ^ uint32_t(t));
    noise.b = mix(uint32_t(uint64_t(key) >> 32) + noise.a);
    return noise;
  }

  // The bits of the first element of a block of kCodes. The uppermost count most.
  VSGD_FN uint32_t start(int64_t block, int stream) const {
    const uint64_t number = uint64_t(block) * 2u + uint64_t(stream);
    uint32_t x = uint32_t(number) + uint32_t(number >> 32) * kSpread + a;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15) ^ b) * 0x846ca68bu;
    return x ^ (x >> 16);
  }
};

// The random bits of element i of a block, of the first one's.
VSGD_FN uint32_t random_of(uint32_t start, int64_t i) { return start ^ uint32_t(i) * kSpread; }
// Other ones of them: the lower half, for what must not be rounded as something else is. Of 16 bits, so that the average is
// off by 2^-17 of a code at most.
VSGD_FN uint32_t other_bits(uint32_t random) { return random << 16; }

}  // namespace vsgd
