// Random bits for stochastic rounding: a hash of (seed, parameter, step) and of the element's index, the same on every
// backend whatever block, thread or order an element is stepped in. (noise.py is the same in torch.)
#pragma once

#include "numbers.h"

namespace vsgd {

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

  // For elements from `first` on, whose index is `first` plus an offset of 32 bits.
  VSGD_FN Noise from(int64_t first) const {
    return {a + uint32_t(uint64_t(first)) + uint32_t(uint64_t(first) >> 32) * 0x9e3779b9u, b};
  }

  VSGD_FN uint32_t bits(uint32_t offset) const {
    uint32_t x = offset + a;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15) ^ b) * 0x846ca68bu;
    return x ^ (x >> 16);
  }
};

// 32 bits for each state of an element, of which the uppermost count most: the element's bits, rotated.
VSGD_FN uint32_t stream(uint32_t bits, int k) {
  const int turn = k == 0 ? 0 : k == 1 ? 16 : k == 2 ? 8 : 24;
  return turn == 0 ? bits : (bits << turn) | (bits >> (32 - turn));
}

}  // namespace vsgd
