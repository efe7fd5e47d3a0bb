// Steps a run of elements on the CPU, in loops that gcc vectorises for whatever instruction set they are inlined into.
#pragma once

#include <type_traits>

#include "operands.h"
#include "rules.h"
#include "run_packed.h"

namespace vsgd {

// What `infer` is given for the elements of a run, which of a rule that draws is no more than a block.
template <class Rule, class A>
struct GivenRun {
  uint32_t words[Rule::draws ? kCodes : 1];
  const A* variance;

  template <class P>
  VSGD_FN explicit GivenRun(const Operands<P>& at) : variance(at.variance) {
    if constexpr (Rule::draws) {
      const Draw draw = at.draw.from(at.block * kCodes);
      if (at.draw_block) {
        at.draw_block(draw, words);
      } else {
        draw_words(draw);
      }
    }
  }

  VSGD_FN Given<A> of(int64_t i, A sign) const {
    Given<A> given{};
    if constexpr (Rule::draws) given.word = words[i];
    if constexpr (Rule::samples) given.variance = bounded_variance(variance[i] * sign * sign);
    return given;
  }

 private:
  VSGD_FN void draw_words(const Draw& draw) {
    for (uint32_t i = 0; i < kCodes / 4; ++i) {
      const Four four = draw.words(i);
      for (int j = 0; j < 4; ++j) words[4 * i + j] = four.word[j];
    }
  }
};

// Steps n elements whose masters and states are numbers, side by side.
template <class Rule, class P, class A>
VSGD_FN void update_all(A* masters, const P* grad, A* const* states, const GivenRun<Rule, A>& given, int64_t n,
                        const typename Rule::template Scalars<A>& s) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    A ghat = bounded(load(grad + i) * s.sign);
    A state[Rule::states];
    for (int k = 0; k < Rule::states; ++k) state[k] = states[k][i];
    const A aux = Rule::infer(ghat, Rule::gain(state, s), state, s, given.of(i, s.sign));
    for (int k = 0; k < Rule::states; ++k) states[k][i] = state[k];
    masters[i] = Rule::move(masters[i], state[0], aux, s);
  }
}

// Whether a rule steps parameters of this type a block at a time even where states are numbers.
template <class Rule, class P>
constexpr bool by_blocks = is_16_bit<P> || Rule::draws;

// Steps n elements, at most a block where `by_blocks`, whose states are numbers.
template <class Rule, class P, class A = typename Arithmetic<P>::type>
VSGD_FN void run_uncoded(const Operands<P>& at, int64_t n, const typename Rule::template Scalars<A>& s) {
  A* states[Rule::states];
  for (int k = 0; k < Rule::states; ++k) states[k] = static_cast<A*>(at.state[k]);
  const GivenRun<Rule, A> given(at);
  if constexpr (is_16_bit<P>) {
    float masters[kCodes];
    load_masters(at, 0, n, masters);
    update_all<Rule>(masters, at.grad, states, given, n, s);
    store_masters(at, 0, n, masters);
  } else {
    update_all<Rule>(at.param, at.grad, states, given, n, s);
  }
}

// Coded states are stepped a block of kCodes elements at a time, by way of numbers in the first-level cache and in several
// loops, for q8 needs all numbers of a block before it can code one. The loops go by turns of few elements, so that what
// waits for memory or for the divider and what does not are never far from each other.
constexpr int64_t kTurn = 64;
static_assert(kCodes % kTurn == 0, "a block is whole turns");

// Asks for the operands of a turn that comes later. The processor's own prefetching stops at each page.
template <class T>
VSGD_FN void prefetch_turn(const T* from) {
#ifdef __GNUC__
  constexpr int64_t kAhead = 384;  // elements
  for (int64_t i = 0; i < kTurn; i += 64 / sizeof(T)) __builtin_prefetch(from + kAhead + i);
#endif
}

// The numbers of n codes of one state of a block.
template <bool rate>
VSGD_FN void decode(const uint16_t* codes, float* __restrict numbers, int64_t n, const uint32_t*) {
  for (int64_t i = 0; i < n; ++i) numbers[i] = bf16_decode(codes[i]);
}
template <bool rate>
VSGD_FN void decode(const uint8_t* codes, float* __restrict numbers, int64_t n, const uint32_t* word) {
  const Q8 coding = Q8::of<rate>(*word);
  if (coding.has_nan) {
    for (int64_t i = 0; i < n; ++i) numbers[i] = coding.number_or_nan<rate>(codes[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) numbers[i] = coding.number<rate>(codes[i]);
  }
}

// How n numbers of one state of a block are to be coded.
template <bool rate>
VSGD_FN Q8 find_word(const float*, int64_t, const uint16_t*, uint32_t*) {
  return {};
}
template <bool rate>
VSGD_FN Q8 find_word(const float* numbers, int64_t n, const uint8_t*, uint32_t* word) {
  *word = q8_word<rate>(range_of<rate>(numbers, n));
  return Q8::of<rate>(*word);
}

// Codes n numbers of state k of a block, from element `first` on; start: the random bits of the block's first.
template <int k, bool rate>
VSGD_FN void encode(const float* numbers, uint16_t* __restrict codes, int64_t first, int64_t n, const Q8&, uint32_t start) {
  for (int64_t i = 0; i < n; ++i) codes[i] = bf16_encode(numbers[i], random_of(start, first + i));
}
template <int k, bool rate>
VSGD_FN void encode(const float* numbers, uint8_t* __restrict codes, int64_t first, int64_t n, const Q8& coding,
                    uint32_t start) {
  const auto random = [&](int64_t i) { return q8_random<k>(random_of(start, first + i)); };
  if (coding.has_nan) {
    for (int64_t i = 0; i < n; ++i) codes[i] = coding.code_or_nan<rate>(numbers[i], random(i));
  } else {
    for (int64_t i = 0; i < n; ++i) codes[i] = coding.code<rate>(numbers[i], random(i));
  }
}

// One block: `infer`, and then `finish`. Its states are gone through one after the other; which of them is a rate is known
// when this is compiled, and with kWhole how long the loops are.
template <class Rule, class P, class S, bool kWhole>
class Block {
 public:
  using Scalars = typename Rule::template Scalars<float>;
  static constexpr bool is_packed = std::is_same_v<S, Packed16>;

  VSGD_FN Block(const Operands<P>& at, int64_t n)
      : at_(at), n_(n), start_(at.noise.start(at.block, kStateNoise)) {}

  VSGD_FN void infer(const Scalars& s) {
    const GivenRun<Rule, float> given(at_);
    for (int64_t turn = 0; turn < size(); turn += kTurn) {
      prefetch_turn(at_.param + turn);
      prefetch_turn(at_.grad + turn);
      decode_states(turn, count(turn));
      for (int64_t i = turn; i < turn + count(turn); ++i) {
        float state[Rule::states];
        for (int k = 0; k < Rule::states; ++k) state[k] = numbers_[k][i];
        const float ghat = bounded(load(at_.grad + i) * s.sign);
        aux_[i] = Rule::infer(ghat, Rule::gain(state, s), state, s, given.of(i, s.sign));
        for (int k = 0; k < Rule::states; ++k) numbers_[k][i] = state[k];
      }
    }
  }

  VSGD_FN void finish(const Scalars& s) {
    prepare();
    for (int64_t turn = 0; turn < size(); turn += kTurn) {
      move(turn, count(turn), s);
      encode_states(turn, count(turn));
    }
  }

 private:
  VSGD_FN int64_t size() const { return kWhole ? kCodes : n_; }
  VSGD_FN int64_t count(int64_t turn) const { return kWhole || n_ - turn > kTurn ? kTurn : n_ - turn; }
  VSGD_FN S* codes(int k) const { return static_cast<S*>(at_.state[k]); }

  template <int k = 0>
  VSGD_FN void decode_states(int64_t turn, int64_t n) {
    if constexpr (is_packed) {
      prefetch_turn(codes(0) + turn);
      decode_packed<Rule::states>(codes(0) + turn, numbers_, turn, n, at_.words);
    } else if constexpr (k < Rule::states) {
      prefetch_turn(codes(k) + turn);
      decode<Rule::is_rate(k)>(codes(k) + turn, numbers_[k] + turn, n, at_.words + k);
      decode_states<k + 1>(turn, n);
    }
  }

  VSGD_FN void move(int64_t turn, int64_t n, const Scalars& s) {
    if constexpr (is_16_bit<P>) {
      float masters[kTurn];
      load_masters(at_, turn, n, masters);
      for (int64_t i = 0; i < n; ++i) masters[i] = Rule::move(masters[i], numbers_[0][turn + i], aux_[turn + i], s);
      store_masters(at_, turn, n, masters);
    } else {
      float* __restrict param = at_.param + turn;
      for (int64_t i = 0; i < n; ++i) param[i] = Rule::move(param[i], numbers_[0][turn + i], aux_[turn + i], s);
    }
  }

  template <int k = 0>
  VSGD_FN void prepare() {
    if constexpr (is_packed) {
      find_packed_words<Rule::states>(numbers_, size(), at_.words, start_);
    } else if constexpr (k < Rule::states) {
      coding_[k] = find_word<Rule::is_rate(k)>(numbers_[k], size(), codes(k), at_.words + k);
      prepare<k + 1>();
    }
  }

  template <int k = 0>
  VSGD_FN void encode_states(int64_t turn, int64_t n) {
    if constexpr (is_packed) {
      encode_packed<Rule::states>(numbers_, turn, n, codes(0) + turn, at_.words, start_);
    } else if constexpr (k < Rule::states) {
      encode<k, Rule::is_rate(k)>(numbers_[k] + turn, codes(k) + turn, turn, n, coding_[k], start_);
      encode_states<k + 1>(turn, n);
    }
  }

  const Operands<P> at_;
  const int64_t n_;
  Q8 coding_[Rule::states];
  const uint32_t start_;  // the random bits of the first element
  alignas(64) float numbers_[Rule::states][kCodes];
  alignas(64) float aux_[kCodes];  // what Rule::infer returned
};

// Steps a block of n elements.
template <class Rule, class P, Format format, bool kWhole, class A = typename Arithmetic<P>::type>
VSGD_FN void run_block(const Operands<P>& at, int64_t n, const typename Rule::template Scalars<A>& s) {
  if constexpr (format == Format::fp32) {
    run_uncoded<Rule>(at, kWhole ? kCodes : n, s);
  } else {
    Block<Rule, P, typename StoredState<format, A>::type, kWhole> block(at, n);
    block.infer(s);
    block.finish(s);
  }
}

template <class Rule, class P, Format format, class A = typename Arithmetic<P>::type>
VSGD_FN void run(const Operands<P>& at, int64_t n, const typename Rule::template Scalars<A>& scalars) {
  const auto s = scalars;
  if constexpr (format == Format::fp32 && !by_blocks<Rule, P>) {
    run_uncoded<Rule>(at, n, s);
  } else {
    using S = typename StoredState<format, A>::type;
    Operands<P> here = at;
    for (; n >= kCodes; n -= kCodes, here.template advance<S>(kCodes, Rule::states))
      run_block<Rule, P, format, true>(here, kCodes, s);
    if (n > 0) run_block<Rule, P, format, false>(here, n, s);
  }
}

}  // namespace vsgd
