// States each of which has codes of its own, in AVX-512 with byte permutations. They are gone through one after the other;
// which of them is a rate is known when this is compiled. Only for files that are compiled for that instruction set as a
// whole.
#pragma once

#include "codes512.h"

namespace vsgd {

// What rounds the codes of state k in a turn.
template <class Codes, int k>
struct Rounding {
  __m512i of[kVectors];
  VSGD_FN Rounding(int64_t turn, uint32_t start) {
    for (int i = 0; i < kVectors; ++i) of[i] = Codes::template rounding<k>(turn + i * Vec::width, start);
  }
};

// Of each state of a block.
template <class Rule>
struct Numbers512 {
  alignas(64) float of[Rule::states][kCodes];
};

template <class Rule, class Codes>
class SeparateCoder {
 public:
  // The last parameters are moved while words are found.
  static constexpr bool has_words = Codes::has_words, moves_late = has_words;
  // The numbers, which are written anew for each block: of a block's own gcc keeps some in registers, and then moves others
  // in and out of memory for them (8 % slower).
  struct Kept : Numbers512<Rule> {
    VSGD_FN void code() {}  // nothing is left for later
  };

  VSGD_FN SeparateCoder(void* const* states, uint32_t* words, uint32_t start, Kept& numbers)
      : numbers_(numbers), states_(states), words_(words), start_(start) {}

  template <int k = 0>
  VSGD_FN bool is_plain(const Unfloored& rates) const {
    if constexpr (k < Rule::states) {
      return Codes::template plain<Rule::is_rate(k)>(stored(k), words_ + k, rates) && is_plain<k + 1>(rates);
    } else {
      return true;
    }
  }

  template <int k = 0>
  VSGD_FN void open() {
    if constexpr (has_words && k < Rule::states) {
      codes_[k] = Codes(Q8::of<Rule::is_rate(k)>(words_[k]));
      open<k + 1>();
    }
  }

  // The numbers of Vec::size elements from i on.
  template <int k = 0>
  VSGD_FN void load(int64_t i, Vec* state) {
    if constexpr (k < Rule::states) {
      constexpr bool rate = Rule::is_rate(k);
      if (i % kTurn == 0) Codes::template open<rate>(stored(k) + i, units_);
      state[k] = codes_[k].template numbers<rate>(stored(k) + i, units_[i % kTurn != 0]);
      load<k + 1>(i, state);
    }
  }

  template <int k = 0>
  VSGD_FN void store(int64_t i, const Vec* state) {
    if constexpr (k < Rule::states) {
      state[k].store(numbers_.of[k] + i);
      if (has_words) ranges_[k].template include<Rule::is_rate(k)>(i == 0, state[k]);
      store<k + 1>(i, state);
    }
  }

  // Codes what is not coded yet. Words wait for all numbers, and meanwhile() gives the processor something else to do.
  template <class Meanwhile>
  VSGD_FN void finish(const Meanwhile& meanwhile) {
    Range ranges[Rule::states];
    find_ranges(ranges);
    meanwhile();
    find_words(ranges);
#pragma GCC unroll 2
    for (int64_t turn = has_words ? 0 : kCodes - kTurn; turn < kCodes; turn += kTurn) code(turn);
  }

  // Codes the states of a turn.
  template <int k = 0>
  VSGD_FN void code(int64_t turn) const {
    if constexpr (k < Rule::states) {
      const Rounding<Codes, k> rounding(turn, start_);
      codes_[k].template code<Rule::is_rate(k)>(numbers_.of[k] + turn, stored(k) + turn, rounding.of);
      code<k + 1>(turn);
    }
  }

  VSGD_FN void prefetch(int64_t turn) const {
    for (int k = 0; k < Rule::states; ++k) prefetch_turn(stored(k) + turn);
  }

 private:
  VSGD_FN typename Codes::S* stored(int k) const { return static_cast<typename Codes::S*>(states_[k]); }

  template <int k = 0>
  VSGD_FN void find_ranges(Range* ranges) const {
    if constexpr (has_words && k < Rule::states) {
      ranges[k] = ranges_[k].template range<Rule::is_rate(k)>();
      find_ranges<k + 1>(ranges);
    }
  }
  template <int k = 0>
  VSGD_FN void find_words(const Range* ranges) {
    if constexpr (has_words && k < Rule::states) {
      constexpr bool rate = Rule::is_rate(k);
      words_[k] = q8_word<rate>(ranges[k]);
      codes_[k] = Codes(Q8::of<rate>(words_[k]));
      find_words<k + 1>(ranges);
    }
  }

  Kept& numbers_;
  void* const* states_;
  uint32_t* words_;
  const uint32_t start_;  // the random bits of the first element
  Codes codes_[Rule::states];
  __m512i units_[2];  // of each half of the turn's means
  Range512 ranges_[Rule::states];
};

}  // namespace vsgd
