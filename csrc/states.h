// How states are stored: the formats of state_formats.py, an element or a block of kCodes elements at a time. Rounding is
// stochastic and without bias: a rate moves by less than the distance of two codes a step, and would freeze otherwise.
#pragma once

#include "noise.h"

namespace vsgd {

// fp32 stands for the arithmetic type, which is double for double.
enum class Format { fp32, bf16, q8, packed16 };

// An element of a state in memory.
template <Format format, class A> struct StoredState { using type = A; };
template <class A> struct StoredState<Format::bf16, A> { using type = uint16_t; };
template <class A> struct StoredState<Format::q8, A> { using type = uint8_t; };
struct Packed16 { uint16_t bits; };  // packed.h
template <class A> struct StoredState<Format::packed16, A> { using type = Packed16; };

// In how many tensors a rule's states are stored, and whether words of blocks belong to them.
template <class Rule, Format format>
constexpr int kStored = format == Format::packed16 ? 1 : Rule::states;
constexpr bool has_blocks(Format format) { return format == Format::q8 || format == Format::packed16; }
template <Format format>
constexpr bool kHasBlocks = has_blocks(format);

constexpr uint32_t kNan = 0x7fc00000u, kInfinity = 0x7f800000u, kTinyBits = 0x0d800000u;  // the last: of Bounds' tiny
VSGD_FN uint32_t magnitude(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }

// bf16: the upper half of a float32.
VSGD_FN float bf16_decode(uint16_t code) { return bit_cast<float>(uint32_t(code) << 16); }
VSGD_FN uint16_t bf16_encode(float x, uint32_t random) {
  uint32_t raised = bit_cast<uint32_t>(x) + (random >> 16);
  return uint16_t((magnitude(x) > kInfinity ? kNan : raised) >> 16);
}

// q8: 8-bit codes, and for each block of kCodes elements a word for each state.
//
// A rate is its float32 bits, from a base of the block on, in steps of 2^k: linear between powers of two. The steps do
// not move when the base does. The word is base | k, with base a multiple of 2^k and k from 5 to 24; NaN is code 255.
//
// A mean's magnitude m is the float32 bits of 1 + m kSpan / (the block's largest), in steps of 2^19, of which 127 lead to
// that: evenly spaced near 0, and from there on in proportion to m. The word is the largest's bits; NaN is code -128.
//
// A word's sign bit says that there are NaN in the block; other blocks need not look for them.
constexpr uint32_t kHasNan = 0x80000000u;
constexpr uint32_t kOne = 0x3f800000u, kMeanShift = 19, kLastRate = 254;
constexpr float kSpan = 246.98f;

// Codes of magnitudes in steps of 2^shift, and back.
template <uint32_t shift>
VSGD_FN uint32_t magnitude_code(float x, float per_unit, uint32_t random) {
  return (bit_cast<uint32_t>(fma(x, per_unit, 1.0f)) - kOne + (random >> (32u - shift))) >> shift;
}
template <uint32_t shift>
VSGD_FN float magnitude_of(uint32_t code, float unit) {
  return (bit_cast<float>(kOne + (code << shift)) - 1.0f) * unit;
}

// The bits that round state k; the first rate has others than the rest (docs/formats.md, Rounding, has the reason).
constexpr int kFirstRate = 1;
template <int k>
VSGD_FN uint32_t q8_random(uint32_t random) {
  return k == kFirstRate ? other_bits(random) : random;
}

// What a block's word says of its codes, and how they are read and made. Of an unmarked block, `number` and `code` do.
struct Q8 {
  uint32_t base, k;      // of rates
  float unit, per_unit;  // of means
  bool has_nan;

  template <bool rate>
  VSGD_FN static Q8 of(uint32_t word) {
    const float largest = bit_cast<float>(word & ~kHasNan);
    if (rate) return {word & 0x7fffffe0u, word & 31u, 0.0f, 0.0f, (word & kHasNan) != 0};
    return {0, 0, largest / kSpan, kSpan / largest, (word & kHasNan) != 0};
  }

  template <bool rate>
  VSGD_FN float number(uint8_t code) const {
    if (rate) return bit_cast<float>(base + (uint32_t(code) << k));
    const int32_t c = int8_t(code);
    const float m = magnitude_of<kMeanShift>(uint32_t(c < 0 ? -c : c), unit);
    return c < 0 ? -m : m;
  }

  template <bool rate>
  VSGD_FN uint8_t code(float x, uint32_t random) const {
    if (rate) return uint8_t((bit_cast<uint32_t>(x) - base + (random >> (32u - k))) >> k);
    const uint32_t c = magnitude_code<kMeanShift>(bit_cast<float>(magnitude(x)), per_unit, random);
    return uint8_t(bit_cast<int32_t>(x) < 0 ? 0u - c : c);
  }

  template <bool rate>
  VSGD_FN float number_or_nan(uint8_t stored) const {
    return stored == (rate ? 255 : 128) ? bit_cast<float>(kNan) : number<rate>(stored);
  }
  template <bool rate>
  VSGD_FN uint8_t code_or_nan(float x, uint32_t random) const {
    return magnitude(x) > kInfinity ? uint8_t(rate ? 255 : 128) : code<rate>(x, random);
  }
};

// What a block's numbers are for its word: the largest of their bits, and of rates the least. NaN count for neither, and are
// noted.
constexpr uint32_t kMostBits = 0x7fffffffu;
struct Range {
  uint32_t high = 0, low = kMostBits, nan = 0;
};

// All bits set for a number, none for NaN; by arithmetic, for a conditional maximum does not vectorise.
VSGD_FN uint32_t number_mask(float x) { return ~uint32_t(int32_t(kInfinity - magnitude(x)) >> 31); }
VSGD_FN uint32_t larger(uint32_t x, uint32_t y) { return x > y ? x : y; }
VSGD_FN uint32_t smaller(uint32_t x, uint32_t y) { return x < y ? x : y; }
// rate: whether x is one, which have no sign. nan: whether x may be one; where it is and may not, the range's highest bits
// are beyond infinity's.
template <bool nan>
VSGD_FN void include(Range& range, float x, bool rate) {
  const uint32_t number = nan ? number_mask(x) : ~0u, bits = rate ? bit_cast<uint32_t>(x) : magnitude(x);
  range.high = larger(range.high, bits & number);
  if (rate) range.low = smaller(range.low, bits);  // than NaN's every number's are
  range.nan = larger(range.nan, ~number);
}

// The highest code of a block's rates, rounded up, in steps of 2^k.
VSGD_FN uint32_t highest_code(uint32_t low, uint32_t high, uint32_t k) { return ((high - 1u) >> k) - (low >> k) + 1u; }

// The range of n numbers.
template <bool rate>
VSGD_FN Range range_of(const float* numbers, int64_t n) {
  Range range;
  for (int64_t i = 0; i < n; ++i) include<false>(range, numbers[i], rate);
  if (range.high <= kInfinity) return range;
  range = Range();
  for (int64_t i = 0; i < n; ++i) include<true>(range, numbers[i], rate);
  return range;
}

// The lowest and highest bits of a block's rates; where all are NaN, those of the least rate there is.
struct RateRange {
  uint32_t low, high;
  VSGD_FN explicit RateRange(const Range& range) : high(larger(range.high, kTinyBits)) { low = smaller(range.low, high); }
};
// The finest steps in which the block's bits fit, even rounded up.
VSGD_FN uint32_t rate_word(const Range& range) {
  const RateRange rates(range);
  uint32_t k = 5 + bit_length((rates.high - rates.low) >> 13);
  if (highest_code(rates.low, rates.high, k) > kLastRate) ++k;
  return ((rates.low >> k) << k) | k;
}
VSGD_FN uint32_t mean_word(const Range& range) { return larger(range.high, kTinyBits); }
template <bool rate>
VSGD_FN uint32_t q8_word(const Range& range) {
  return (rate ? rate_word(range) : mean_word(range)) | (range.nan & kHasNan);
}

}  // namespace vsgd
