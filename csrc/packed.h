// packed16: all states of an element in one word of 16 bits, and as in q8 a word for each state of a block.
//
// The lowest bits of an element's word are its mean's code, the next its first rate's, the uppermost its second's. Two rates
// have 11 bits together, and one has 9.
//
// Rates are coded as q8's, but in steps of 2^k that all rates of a block share: the finest in which the codes have no more
// bits than there are, k from 5 to 26. (From 24 on, where both rates of a block span some 32 octaves or more, steps are
// longer than an octave; bits are not linear in a rate across octaves, and it is rounded upwards on average.) The first
// rate's word is base | k, the second's base | the bits of the first's codes. Rates beyond kMostRate count as that, for no
// step may lead to infinity.
//
// A mean is coded as q8's, in units of its own: of the power of two nearest to the root of its first rate, as that rate is
// decoded. So a block can have elements of any scales. The word is q8's, for the means in these units.
//
// An element one of whose states is NaN is NaN in all of them. Its mean's code is the lowest, that is no other mean's.
#pragma once

#include "states.h"

namespace vsgd {

constexpr uint32_t kMostRate = 0x7c000000u;  // 2^121

// The power of two nearest to a rate's root, by half the rate's exponent, and its reciprocal.
VSGD_FN float root_scale(uint32_t rate) { return bit_cast<float>(((rate >> 24) + 64u) << 23); }
VSGD_FN float per_root_scale(uint32_t rate) { return bit_cast<float>((190u - (rate >> 24)) << 23); }

// Of an element's states.
template <int states>
VSGD_FN bool has_nan(const float* state) {
  bool nan = false;
  for (int k = 0; k < states; ++k) nan |= magnitude(state[k]) > kInfinity;
  return nan;
}

// What a block's words say of its codes, and how they are read and made. Of an unmarked block, `numbers` and `code` do.
template <int states>
struct Packed {
  static_assert(states == 2 || states == 3, "a mean, and one rate or two");
  static constexpr bool two = states == 3;
  static constexpr uint32_t mean_bits = two ? 5 : 7, rate_bits = 16 - mean_bits, shift = 25 - mean_bits;
  static constexpr uint32_t mean_mask = (1u << mean_bits) - 1u, nan_code = 1u << (mean_bits - 1);
  // The last code leads to 2.75, or 2.9375, and must not be passed.
  static constexpr float span = two ? 2.7498f : 2.9373f;

  uint32_t base[2], k, length;  // of rates; length: of the first's codes, in bits
  float unit, per_unit;         // of means
  bool marked;

  VSGD_FN static Packed of(const uint32_t* word) {
    const float largest = bit_cast<float>(word[0] & ~kHasNan);
    Packed packed;
    packed.base[0] = word[1] & 0x7fffffe0u;
    packed.base[1] = two ? word[states - 1] & 0x7fffffe0u : 0u;
    packed.k = word[1] & 31u;
    packed.length = two ? word[states - 1] & 31u : rate_bits;
    packed.unit = largest / span;
    packed.per_unit = span / largest;
    packed.marked = (word[0] & kHasNan) != 0;
    return packed;
  }

  VSGD_FN void numbers(uint16_t code, float* state) const {
    const uint32_t word = code, first = base[0] + ((word >> mean_bits & ((1u << length) - 1u)) << k);
    state[1] = bit_cast<float>(first);
    if (two) state[states - 1] = bit_cast<float>(base[1] + (word >> (mean_bits + length) << k));
    const int32_t c = int32_t(word << (32 - mean_bits)) >> (32 - mean_bits);
    const float m = magnitude_of<shift>(uint32_t(c < 0 ? -c : c), unit) * root_scale(first);
    state[0] = c < 0 ? -m : m;
  }

  VSGD_FN uint16_t code(const float* state, uint32_t random) const {
    uint32_t word = rate_code(0, state, random) << mean_bits;
    if (two) word |= rate_code(1, state, random) << (mean_bits + length);
    // By other bits than its rate, which decides on the mean's units.
    const uint32_t c = magnitude_code<shift>(in_units(state, random), per_unit, other_bits(random));
    return uint16_t(word | ((bit_cast<int32_t>(state[0]) < 0 ? 0u - c : c) & mean_mask));
  }

  VSGD_FN void numbers_or_nan(uint16_t code, float* state) const {
    numbers(code, state);
    if (marked && (code & mean_mask) == nan_code)
      for (int j = 0; j < states; ++j) state[j] = bit_cast<float>(kNan);
  }
  VSGD_FN uint16_t code_or_nan(const float* state, uint32_t random) const {
    return has_nan<states>(state) ? uint16_t(nan_code) : code(state, random);
  }

  // A mean's magnitude in units of its rate's root, for which the rates' words are enough.
  VSGD_FN float in_units(const float* state, uint32_t random) const {
    return bit_cast<float>(magnitude(state[0])) * per_root_scale(base[0] + (rate_code(0, state, random) << k));
  }

  // Writes the rates' words of a block in which these are the ranges of all states.
  VSGD_FN static void find_rate_words(const Range* range, uint32_t* word) {
    uint32_t low[2] = {}, high[2] = {};
    for (int j = 0; j < states - 1; ++j) {
      const RateRange rates(range[j + 1]);
      high[j] = smaller(rates.high, kMostRate);
      low[j] = smaller(rates.low, high[j]);
    }
    // At most three steps too fine: a code that is rounded up, from a base below the lowest, may have a bit or two more.
    const int32_t a = int32_t(bit_length(high[0] - low[0])), b = int32_t(bit_length(high[1] - low[1]));
    const int32_t bits = int32_t(rate_bits);
    uint32_t k = uint32_t(greatest(5, a - bits, b - bits, two ? (a + b - bits + 1) >> 1 : 5));
#ifdef __CUDA_ARCH__  // one block of 15 to 30 takes another step; bound by instructions, the device asks for it only then
    VSGD_NO_UNROLL for (int i = 0; i < 3 && !fits(low, high, k); ++i) ++k;
#else  // none of these waits for another
    const bool fits_at[] = {fits(low, high, k), fits(low, high, k + 1), fits(low, high, k + 2)};
    k += fits_at[0] ? 0 : fits_at[1] ? 1 : fits_at[2] ? 2 : 3;
#endif
    word[1] = low[0] >> k << k | k;
    if (two) word[states - 1] = low[1] >> k << k | bit_length(highest_code(low[0], high[0], k));
  }

 private:
  VSGD_FN static int32_t greatest(int32_t x, int32_t y, int32_t z, int32_t w) {
    x = x > y ? x : y;
    z = z > w ? z : w;
    return x > z ? x : z;
  }
  VSGD_FN uint32_t rate_code(int j, const float* state, uint32_t random) const {
    return (smaller(bit_cast<uint32_t>(state[j + 1]), kMostRate) - base[j] + (random >> (32u - k))) >> k;
  }
  VSGD_FN static bool fits(const uint32_t* low, const uint32_t* high, uint32_t k) {
    const uint32_t bits = bit_length(highest_code(low[0], high[0], k));
    return bits + (two ? bit_length(highest_code(low[1], high[1], k)) : 0u) <= rate_bits;
  }
};

}  // namespace vsgd
