// packed16 in loops, for run_cpu.h's blocks: the numbers of each state lie in an array of their own.
#pragma once

#include "packed.h"

namespace vsgd {

// The numbers of n codes, from the block's element `first` on.
template <int states>
VSGD_FN void decode_packed(const Packed16* codes, float (*__restrict numbers)[kCodes], int64_t first, int64_t n,
                           const uint32_t* words) {
  const auto coding = Packed<states>::of(words);
  const auto decode = [&](int64_t i, bool marked) {
    float state[states];
    if (marked) {
      coding.numbers_or_nan(codes[i].bits, state);
    } else {
      coding.numbers(codes[i].bits, state);
    }
    for (int k = 0; k < states; ++k) numbers[k][first + i] = state[k];
  };
  if (coding.marked) {
    for (int64_t i = 0; i < n; ++i) decode(i, true);
  } else {
    for (int64_t i = 0; i < n; ++i) decode(i, false);
  }
}

template <int states>
VSGD_FN void states_of(const float (*numbers)[kCodes], int64_t i, float* state) {
  for (int k = 0; k < states; ++k) state[k] = numbers[k][i];
}

// The range of what `number` says of the states of n elements; of those with NaN, that they are there.
template <bool rate, int states, class Number>
VSGD_FN Range range_of_each(const float (*numbers)[kCodes], int64_t n, bool nan, const Number& number) {
  float each[kCodes];
  for (int64_t i = 0; i < n; ++i) {
    float state[states];
    states_of<states>(numbers, i, state);
    each[i] = number(i, state);
  }
  for (int64_t i = 0; nan && i < n; ++i) {
    float state[states];
    states_of<states>(numbers, i, state);
    if (has_nan<states>(state)) each[i] = bit_cast<float>(kNan);
  }
  return range_of<rate>(each, n);
}

// Writes the words of a block of n elements; start: the random bits of the first.
template <int states>
VSGD_FN void find_packed_words(const float (*numbers)[kCodes], int64_t n, uint32_t* words, uint32_t start) {
  Range ranges[states];
  bool nan = false;
  for (int k = 0; k < states; ++k) {
    ranges[k] = k ? range_of<true>(numbers[k], n) : range_of<false>(numbers[k], n);
    nan |= ranges[k].nan != 0;
  }
  if (nan) {  // in whichever state, it counts for none
    for (int k = 1; k < states; ++k)
      ranges[k] = range_of_each<true, states>(numbers, n, true, [&](int64_t, const float* state) { return state[k]; });
  }
  Packed<states>::find_rate_words(ranges, words);
  const auto rates = Packed<states>::of(words);
  const Range means = range_of_each<false, states>(numbers, n, nan, [&](int64_t i, const float* state) {
    return rates.in_units(state, random_of(start, i));
  });
  words[0] = q8_word<false>(means);
}

// Codes n elements, from the block's element `first` on; start: the random bits of the block's first.
template <int states>
VSGD_FN void encode_packed(const float (*numbers)[kCodes], int64_t first, int64_t n, Packed16* __restrict codes,
                           const uint32_t* words, uint32_t start) {
  const auto coding = Packed<states>::of(words);
  const auto encode = [&](int64_t i, bool marked) {
    float state[states];
    states_of<states>(numbers, first + i, state);
    const uint32_t bits = random_of(start, first + i);
    codes[i].bits = marked ? coding.code_or_nan(state, bits) : coding.code(state, bits);
  };
  if (coding.marked) {
    for (int64_t i = 0; i < n; ++i) encode(i, true);
  } else {
    for (int64_t i = 0; i < n; ++i) encode(i, false);
  }
}

}  // namespace vsgd
