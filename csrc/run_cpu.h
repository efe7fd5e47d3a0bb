// Steps a run of elements on the CPU, in loops that gcc vectorises for whatever instruction set they are inlined into.
#pragma once

#include <type_traits>

#include "chunks.h"
#include "formats.h"
#include "philox.h"
#include "rules.h"
#include "states.h"

namespace vsgd {

// Where the operands of a run of elements begin, and what is random in it.
template <class P>
struct Operands {
  P* param;
  Low* low;
  const P* grad;
  void* state[kMaxStates];
  uint32_t* words;  // q8's, of the run's first block
  Noise noise;
  Draw draw;  // of rules that draw
  const void* variance;  // of rules that take samples
};

// Steps n elements whose states are numbers, side by side. words, variance: of each element, where the rule takes them.
template <class Rule, class P, class A = typename Arithmetic<P>::type>
VSGD_FN void update_all(P* param, Low* low, const P* grad, A* const* states, int64_t n,
                        const typename Rule::template Scalars<A>& s, const uint32_t* words, const A* variance) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    A theta = load_param(param + i, low + i);
    A ghat = bounded(load(grad + i) * s.sign);
    A state[Rule::states];
    for (int k = 0; k < Rule::states; ++k) state[k] = states[k][i];
    Extra<A> extra;
    if constexpr (Rule::draws) extra.word = words[i];
    if constexpr (Rule::samples) extra.variance = bounded_variance(variance[i] * s.sign * s.sign);
    Rule::update(theta, ghat, state, s, extra);
    for (int k = 0; k < Rule::states; ++k) states[k][i] = state[k];
    store_param(param + i, low + i, theta);
  }
}

// Steps n elements, at most a block of codes, whose states are numbers.
template <class Rule, class P, class A>
VSGD_FN void run_numbers(const Operands<P>& at, A* const* numbers, int64_t first, int64_t n,
                         const typename Rule::template Scalars<A>& s) {
  uint32_t words[kCodes];
  if constexpr (Rule::draws) {
    const Draw draw = at.draw.from(first);
    for (uint32_t i = 0; i < kCodes / 4; ++i) {
      const Four four = draw.words(i);
      for (int j = 0; j < 4; ++j) words[4 * i + j] = four.word[j];
    }
  }
  const A* variance = Rule::samples ? static_cast<const A*>(at.variance) + first : nullptr;
  update_all<Rule>(at.param + first, at.low + first, at.grad + first, numbers, n, s, words, variance);
}

template <bool rate>
VSGD_FN void decode_all(const uint16_t* codes, float* numbers, int64_t n, const uint32_t*) {
  for (int64_t i = 0; i < n; ++i) numbers[i] = bf16_decode(codes[i]);
}
template <bool rate>
VSGD_FN void decode_all(const uint8_t* codes, float* numbers, int64_t n, const uint32_t* word) {
  const uint32_t old = *word;
  const float unit = mean_unit(old);
  for (int64_t i = 0; i < n; ++i) numbers[i] = q8_decode(rate, codes[i], old, unit);
}

VSGD_FN uint32_t largest(const uint32_t* of) {
  uint32_t result = 0;
  for (int64_t i = 0; i < kCodes; ++i) result = of[i] > result ? of[i] : result;
  return result;
}

template <bool rate, int k>
VSGD_FN void encode_all(const float* numbers, const uint32_t* random, uint16_t* codes, int64_t n, uint32_t*) {
  for (int64_t i = 0; i < n; ++i) codes[i] = bf16_encode(numbers[i], stream(random[i], k));
}
template <bool rate, int k>
VSGD_FN void encode_all(const float* numbers, const uint32_t* random, uint8_t* codes, int64_t n, uint32_t* word) {
  // By way of an array, for gcc vectorises the maximum of one, but not of what it sees to be conditional.
  uint32_t counts[kCodes];
  for (int64_t i = 0; i < kCodes; ++i) counts[i] = height_of(numbers[i]);
  const uint32_t high = largest(counts);
  for (int64_t i = 0; rate && i < kCodes; ++i) counts[i] = depth_of(numbers[i]);
  const uint32_t now = q8_word(rate, {high, rate ? largest(counts) : 0u});
  const float per_unit = mean_per_unit(now);
  *word = now;
  for (int64_t i = 0; i < n; ++i) codes[i] = q8_encode(rate, numbers[i], now, per_unit, stream(random[i], k));
}

// All states, one after the other; which of them is a rate is known when this is compiled.
template <class Rule, class S, int k = 0>
VSGD_FN void decode_states(S* const* stored, int64_t first, int64_t n, float (*tile)[kCodes], const uint32_t* words) {
  if constexpr (k < Rule::states) {
    for (int64_t i = n; i < kCodes; ++i) tile[k][i] = bit_cast<float>(0x7fc00000u);  // NaN does not count for a word
    decode_all<Rule::is_rate(k)>(stored[k] + first, tile[k], n, words + k);
    decode_states<Rule, S, k + 1>(stored, first, n, tile, words);
  }
}
template <class Rule, class S, int k = 0>
VSGD_FN void encode_states(S* const* stored, int64_t first, int64_t n, float (*tile)[kCodes], uint32_t* words,
                           const uint32_t* random) {
  if constexpr (k < Rule::states) {
    encode_all<Rule::is_rate(k), k>(tile[k], random, stored[k] + first, n, words + k);
    encode_states<Rule, S, k + 1>(stored, first, n, tile, words, random);
  }
}

// Steps n elements, at most a block of codes. Coded states, by way of a tile of numbers in the first-level cache: several
// short loops, each of which vectorises, and q8 needs all numbers of a block before it can store one.
template <class Rule, class P, class S, class A = typename Arithmetic<P>::type>
VSGD_FN void run_tile(const Operands<P>& at, S* const* stored, int64_t first, int64_t n,
                      const typename Rule::template Scalars<A>& s) {
  A* numbers[Rule::states];
  if constexpr (std::is_same_v<S, A>) {
    for (int k = 0; k < Rule::states; ++k) numbers[k] = stored[k] + first;
    run_numbers<Rule>(at, numbers, first, n, s);
  } else {
    float tile[Rule::states][kCodes];
    for (int k = 0; k < Rule::states; ++k) numbers[k] = tile[k];
    uint32_t random[kCodes];
    uint32_t* words = at.words + first / kCodes * Rule::states;  // used by q8 only
    decode_states<Rule>(stored, first, n, tile, words);
    run_numbers<Rule>(at, numbers, first, n, s);
    for (int i = 0; i < kCodes; ++i) random[i] = at.noise.bits(uint32_t(first) + uint32_t(i));
    encode_states<Rule>(stored, first, n, tile, words, random);
  }
}

template <class Rule, class P, Format format, class A = typename Arithmetic<P>::type>
VSGD_FN void run(Operands<P> at, int64_t n, const typename Rule::template Scalars<A>& scalars) {
  using S = typename StoredState<format, A>::type;
  const auto s = scalars;
  S* stored[Rule::states];
  for (int k = 0; k < Rule::states; ++k) stored[k] = static_cast<S*>(at.state[k]);
  if constexpr (format == Format::fp32 && !Rule::draws) {
    update_all<Rule>(at.param, at.low, at.grad, stored, n, s, nullptr, static_cast<const A*>(at.variance));
  } else {
    int64_t first = 0;
    for (; first + kCodes <= n; first += kCodes) run_tile<Rule>(at, stored, first, kCodes, s);
    if (first < n) run_tile<Rule>(at, stored, first, n - first, s);
  }
}

}  // namespace vsgd
