// How states are stored: the formats of state_formats.py, an element or a block of kCodes elements at a time. Rounding is
// stochastic and without bias: a rate moves by less than the distance of two codes a step, and would freeze otherwise.
#pragma once

#include <cmath>

#include "noise.h"

namespace vsgd {

// fp32 stands for the arithmetic type, which is double for double.
enum class Format { fp32, bf16, q8 };

// An element of a state in memory.
template <Format format, class A> struct StoredState { using type = A; };
template <class A> struct StoredState<Format::bf16, A> { using type = uint16_t; };
template <class A> struct StoredState<Format::q8, A> { using type = uint8_t; };

// bf16: the upper half of a float32.
VSGD_FN float bf16_decode(uint16_t code) { return bit_cast<float>(uint32_t(code) << 16); }
VSGD_FN uint16_t bf16_encode(float x, uint32_t random) {
  uint32_t bits = bit_cast<uint32_t>(x);
  uint32_t raised = bits + (random >> 16);
  return uint16_t(((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : raised) >> 16);
}

// q8: 8-bit codes, and for each block of elements a word for each state.
constexpr int kCodes = 128;  // elements of a block

// Bits of a state, as far as they count for its block's word: those of no NaN. Magnitudes are ordered as integers.
VSGD_FN uint32_t magnitude(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }
VSGD_FN bool is_number(float x) { return magnitude(x) <= 0x7f800000u; }

// A rate is its float32 bits, from a base of the block on, in steps of 2^k: linear between powers of two. The steps do
// not move when the base does. The word is base | k, with base a multiple of 2^k and k from 5 to 24; code 255 is NaN.
constexpr uint32_t kLastRate = 254;

VSGD_FN bool rate_fits(uint32_t low, uint32_t high, uint32_t k) {
  return ((high - ((low >> k) << k) + ((1u << k) - 1u)) >> k) <= kLastRate;
}
// For bits between `low` and `high`: the finest steps in which they fit, even rounded up.
VSGD_FN uint32_t rate_word(uint32_t low, uint32_t high) {
  if (low > high) low = high;  // nothing but NaN
  uint32_t k = 5;
  for (uint32_t range = (high - low) >> 13; range != 0; range >>= 1) ++k;
  if (!rate_fits(low, high, k)) ++k;
  return ((low >> k) << k) | k;
}
VSGD_FN float rate_decode(uint8_t code, uint32_t word) {
  uint32_t k = word & 31u, bits = (word & ~31u) + (uint32_t(code) << k);
  return bit_cast<float>(code == 255 ? 0x7fc00000u : bits);
}
VSGD_FN uint8_t rate_encode(float x, uint32_t word, uint32_t random) {
  uint32_t k = word & 31u;
  uint32_t code = (bit_cast<uint32_t>(x) - (word & ~31u) + (random >> (32u - k))) >> k;
  return uint8_t(is_number(x) ? code : 255u);
}

// A mean is sign(c) (c / 127)^2 of the block's largest magnitude, whose bits are the word; code -128 is NaN.
constexpr float kLargest = 127.0f * 127.0f;

VSGD_FN uint32_t mean_word(uint32_t high) {
  const uint32_t tiny = bit_cast<uint32_t>(Bounds<float>::tiny);
  return high < tiny ? tiny : high;
}
VSGD_FN float mean_unit(uint32_t word) { return bit_cast<float>(word) / kLargest; }      // value of c = 1
VSGD_FN float mean_per_unit(uint32_t word) { return kLargest / bit_cast<float>(word); }
VSGD_FN float mean_decode(uint8_t code, float unit) {
  int32_t c = int8_t(code), square = c * (c < 0 ? -c : c);
  return c == -128 ? bit_cast<float>(0x7fc00000u) : float(square) * unit;
}
VSGD_FN uint8_t mean_encode(float x, float per_unit, uint32_t random) {
  float y = bit_cast<float>(magnitude(x)) * per_unit;  // in squares of codes
  int32_t c = int32_t(sqrtf(is_number(x) ? y : 0.0f));
  c = c > 126 ? 126 : c;
  // Up with the probability that keeps the mean: (y - c^2) / ((c + 1)^2 - c^2).
  float up = float(int32_t(random >> 8)) * 0x1p-24f * float(2 * c + 1);
  c += up < y - float(c * c) ? 1 : 0;
  c = bit_cast<int32_t>(x) < 0 ? -c : c;
  return uint8_t(is_number(x) ? c : 128);
}

// What a block's numbers are for its word: their largest bits, and how far the smallest ones are below the largest there
// can be. Both are maxima, from 0 on, which NaN does not raise.
struct Range {
  uint32_t high = 0, depth = 0;
};
constexpr uint32_t kDeepest = 0x7fffffffu;

// All bits set for a number, none for NaN; by arithmetic, for a conditional maximum does not vectorise.
VSGD_FN uint32_t number_mask(float x) { return ~uint32_t(int32_t(0x7f800000u - magnitude(x)) >> 31); }
VSGD_FN uint32_t height_of(float x) { return magnitude(x) & number_mask(x); }
VSGD_FN uint32_t depth_of(float x) { return (kDeepest - magnitude(x)) & number_mask(x); }
VSGD_FN uint32_t larger(uint32_t x, uint32_t y) { return x > y ? x : y; }

VSGD_FN uint32_t q8_word(bool rate, const Range& range) {
  return rate ? rate_word(kDeepest - range.depth, range.high) : mean_word(range.high);
}
// unit, per_unit: mean_unit and mean_per_unit of the word; rates need neither.
VSGD_FN float q8_decode(bool rate, uint8_t code, uint32_t word, float unit) {
  return rate ? rate_decode(code, word) : mean_decode(code, unit);
}
VSGD_FN uint8_t q8_encode(bool rate, float x, uint32_t word, float per_unit, uint32_t random) {
  return rate ? rate_encode(x, word, random) : mean_encode(x, per_unit, random);
}

}  // namespace vsgd
