// One block of coded states in AVX-512 with byte permutations, by hand: of run_cpu.h's loops gcc makes two instructions
// where one shifts by a count, and twice as many to pack codes. The rules are rules.h's, on vectors, a few elements behind
// each other: gains are divided ahead of what infers with them, and parameters moved after that. Only for files that are
// compiled for that instruction set as a whole.
#pragma once

#include "codes512.h"

namespace vsgd {

VSGD_FN Vec load_vec(const float* p) { return Vec::load(p); }
template <class P>
VSGD_FN Vec load_vec(const P* p) {
  alignas(64) float numbers[Vec::size];
  for (int i = 0; i < Vec::size; ++i) numbers[i] = load(p + i);
  return Vec::load(numbers);
}

// The gradients of a block, and of samples their variances, multiplied by `sign` and by its square.
template <class Rule>
struct Gradients512 {
  static constexpr int64_t variances = Rule::samples ? kCodes : 0;
  alignas(64) float ghat[kCodes], variance[variances + 1];
  bool plain;  // whether none need be bounded

  template <class P, class S>
  VSGD_FN void read(const Operands<P>& at, const S& s) {
    for (int64_t i = 0; i < kCodes; i += Vec::size) (load_vec(at.grad + i) * s.sign).store(ghat + i);
    for (int64_t i = 0; i < variances; i += Vec::size)
      (Vec::load(at.variance + i) * s.sign * s.sign).store(variance + i);
    // Most are small, which is soon seen.
    plain = all_below_two(1.0f, 1.0f) || all_below_two(kUnit, kUnit * kUnit);
  }

 private:
  static constexpr float kUnit = 4.0f / Bounds<float>::big;  // in which half the bound is 2

  // Of numbers from 2 on, and of Inf and NaN, the second bit is set.
  VSGD_FN bool all_below_two(float per_gradient, float per_variance) const {
    __m512i seen = _mm512_setzero_si512();
    const auto look_at = [&](const Vec& x) {
      for (int i = 0; i < Vec::parts; ++i) seen = _mm512_or_si512(seen, x.bits(i));
    };
    for (int64_t i = 0; i < kCodes; i += Vec::size) look_at(Vec::load(ghat + i) * per_gradient);
    for (int64_t i = 0; i < variances; i += Vec::size) look_at(Vec::load(variance + i) * per_variance);
    return !_mm512_test_epi32_mask(seen, broadcast(0x40000000u));
  }
};

// What rounds the codes of a turn.
template <class Codes>
struct Rounding {
  __m512i of[kVectors];
  VSGD_FN Rounding(int64_t turn, uint32_t start) {
    for (int i = 0; i < kVectors; ++i) of[i] = Codes::rounding(turn + i * Vec::width, start);
  }
};

template <class Rule>
struct Numbers512 {
  alignas(64) float of[Rule::states][kCodes];  // of each state of a block
};

// q8's codes and words of a block's states in which, of what was plain, NaN has come to be.
template <class Rule, int k = 0>
VSGD_FN void code_with_nan(const Numbers512<Rule>& numbers, void* const* states, uint32_t* words, uint32_t start) {
  if constexpr (k < Rule::states) {
    constexpr bool rate = Rule::is_rate(k);
    auto* codes = static_cast<uint8_t*>(states[k]);
    encode<rate>(numbers.of[k], codes, kCodes, find_word<rate>(numbers.of[k], kCodes, codes, words + k), start);
    code_with_nan<Rule, k + 1>(numbers, states, words, start);
  }
}
template <class Rule>
__attribute__((noinline)) void code_by_loops(const Numbers512<Rule>& numbers, void* const* states, uint32_t* words,
                                             uint32_t start) {
  code_with_nan<Rule>(numbers, states, words, start);
}

// One plain block. Its states are gone through one after the other; which of them is a rate is known when this is compiled.
template <class Rule, class P, class Codes>
class Block512 {
 public:
  using Scalars = typename Rule::template Scalars<Vec>;

  VSGD_FN Block512(const Operands<P>& at, const Gradients512<Rule>& gradients)
      : at_(at), gradients_(gradients), start_(at.noise.start(at.block, kStateNoise)) {}

  // Whether `run` may be called.
  template <int k = 0>
  VSGD_FN bool is_plain() const {
    if constexpr (k < Rule::states) {
      return Codes::template plain<Rule::is_rate(k)>(stored(k), at_.words + k) && is_plain<k + 1>();
    } else {
      return gradients_.plain;
    }
  }

  // Words wait for all of a block's numbers, and meanwhile() gives the processor something else to do.
  template <class Meanwhile>
  VSGD_FN void run(const Scalars& s, const Meanwhile& meanwhile) {
    Codes codes[Rule::states];
    Range512 ranges[Rule::states];
    read_words(codes);
    infer(s, codes, ranges);
    meanwhile();
    if constexpr (Codes::has_words) {
      if (!find_words(ranges, codes)) return code_copy();
    }
#pragma GCC unroll 2
    for (int64_t turn = Codes::has_words ? 0 : kCodes - kTurn; turn < kCodes; turn += kTurn) code(turn, codes);
  }

 private:
  // Elements that are not inferred yet, and such that are not moved yet.
  struct Loaded {
    Vec state[Rule::states], gain;
  };
  struct Inferred {
    Vec mean, aux;
  };

  VSGD_FN typename Codes::S* stored(int k) const { return static_cast<typename Codes::S*>(at_.state[k]); }

  template <int k = 0>
  VSGD_FN void read_words(Codes* codes) const {
    if constexpr (Codes::has_words && k < Rule::states) {
      codes[k] = Codes(Q8::of<Rule::is_rate(k)>(at_.words[k]));
      read_words<k + 1>(codes);
    }
  }

  // False where there are NaN.
  template <int k = 0>
  VSGD_FN bool find_words(const Range512* ranges, Codes* codes) const {
    if constexpr (k < Rule::states) {
      constexpr bool rate = Rule::is_rate(k);
      const Range range = ranges[k].template range<rate>();
      if (range.high > kInfinity || !find_words<k + 1>(ranges, codes)) return false;
      at_.words[k] = q8_word<rate>(range);
      codes[k] = Codes(Q8::of<rate>(at_.words[k]));
    }
    return true;
  }

  // The numbers of Vec::size elements from i on.
  template <int k = 0>
  VSGD_FN void load_states(const Codes* codes, int64_t i, Turn* turns, Vec* state) const {
    if constexpr (k < Rule::states) {
      constexpr bool rate = Rule::is_rate(k);
      if (i % kTurn == 0) turns[k] = Codes::template open<rate>(stored(k) + i);
      state[k] = codes[k].template numbers<rate>(turns[k], i % kTurn != 0);
      load_states<k + 1>(codes, i, turns, state);
    }
  }

  template <int k = 0>
  VSGD_FN void store_states(int64_t i, const Vec* state, Range512* ranges) {
    if constexpr (k < Rule::states) {
      state[k].store(numbers_.of[k] + i);
      if (Codes::has_words) ranges[k].template include<Rule::is_rate(k)>(i == 0, state[k]);
      store_states<k + 1>(i, state, ranges);
    }
  }

  VSGD_FN void prefetch(int64_t turn) const {
    prefetch_turn(at_.param + turn);
    prefetch_turn(at_.grad + turn);
    for (int k = 0; k < Rule::states; ++k) prefetch_turn(stored(k) + turn);
  }

  VSGD_FN Loaded load_ahead(const Scalars& s, const Codes* codes, int64_t i, Turn* turns) const {
    Loaded loaded;
    load_states(codes, i, turns, loaded.state);
    loaded.gain = Rule::gain(loaded.state, s);
    // Here, for gcc would divide where the gain is used.
    for (__m512& part : loaded.gain.part) asm volatile("" : "+v"(part));
    return loaded;
  }

  // Infers, moves, and codes all but the last turn, where there are no words to find.
  VSGD_FN void infer(const Scalars& s, const Codes* codes, Range512* ranges) {
    Turn turns[Rule::states];
    Loaded next = load_ahead(s, codes, 0, turns);
    Inferred last;
#pragma GCC unroll 4
    for (int64_t i = 0; i < kCodes; i += Vec::size) {
      if (i % kTurn == 0) prefetch(i);
      Loaded own = next;
      if (i + Vec::size < kCodes) next = load_ahead(s, codes, i + Vec::size, turns);
      Given<Vec> given;
      if constexpr (Rule::samples) given.variance = Vec::load(gradients_.variance + i);
      const Vec aux = Rule::infer(Vec::load(gradients_.ghat + i), own.gain, own.state, s, given);
      store_states(i, own.state, ranges);
      if (i > 0) move(i - Vec::size, last, s);
      last = {own.state[0], aux};
      if (!Codes::has_words && i > 0 && i % kTurn == 0) code(i - kTurn, codes);
    }
    move(kCodes - Vec::size, last, s);
  }

  VSGD_FN void move(int64_t i, const Inferred& inferred, const Scalars& s) const {
    alignas(64) float masters[Vec::size];
    float* theta = masters;
    if constexpr (is_16_bit<P>) {
      load_masters(at_, i, Vec::size, masters);
    } else {
      theta = at_.param + i;
    }
    Rule::move(Vec::load(theta), inferred.mean, inferred.aux, s).store(theta);
    if constexpr (is_16_bit<P>) store_masters(at_, i, Vec::size, masters);
  }

  // Codes the states of a turn.
  VSGD_FN void code(int64_t turn, const Codes* codes) const {
    const Rounding<Codes> rounding(turn, start_);
    code_states(turn, codes, rounding.of);
  }

  template <int k = 0>
  VSGD_FN void code_states(int64_t turn, const Codes* codes, const __m512i* rounding) const {
    if constexpr (k < Rule::states) {
      codes[k].template code<Rule::is_rate(k)>(numbers_.of[k] + turn, stored(k) + turn, rounding);
      code_states<k + 1>(turn, codes, rounding);
    }
  }

  // What others have the address of is kept in memory throughout, and numbers_ is not.
  VSGD_FN void code_copy() const {
    void* states[Rule::states];
    for (int k = 0; k < Rule::states; ++k) states[k] = at_.state[k];
    Numbers512<Rule> numbers;
    for (int k = 0; k < Rule::states; ++k)
      for (int64_t i = 0; i < kCodes; i += Vec::size) Vec::load(numbers_.of[k] + i).store(numbers.of[k] + i);
    code_by_loops(numbers, states, at_.words, start_);
  }

  const Operands<P>& at_;
  const Gradients512<Rule>& gradients_;
  const uint32_t start_;  // the random bits of the first element
  Numbers512<Rule> numbers_;
};

}  // namespace vsgd
