// Blocks of coded states in AVX-512, by hand: of run_cpu.h's loops gcc makes two instructions where one shifts by a count,
// and twice as many to pack codes. The rules are rules.h's, on vectors. Blocks that are not plain, which are rare, are left to
// the loops: those with NaN, or with gradients that have to be bounded.
#include "isa.h"

#if VSGD_BY_HAND_AVX512
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

VSGD_AVX512_FROM_HERE  // and not before, for the headers above have functions that others share

#include "codes512.h"
#include "run_avx512.h"
#include "run_cpu.h"

// gcc 12 warns of variables in its own header (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace vsgd {
namespace {

template <Format> struct CodesOf;
template <> struct CodesOf<Format::bf16> { using type = Bf16Codes; };
template <> struct CodesOf<Format::q8> { using type = Q8Codes; };

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
  alignas(64) float ghat[kCodes], variance[Rule::samples ? kCodes : 1];
  bool plain;  // whether none need be bounded

  template <class P, class S>
  VSGD_FN void read(const Operands<P>& at, const S& s) {
    // Half the bound is 2 in this unit: from there on, and of Inf and NaN, the second bit is set.
    const Vec per_unit(4.0f / Bounds<float>::big), factor = s.sign * per_unit;
    __m512i seen = _mm512_setzero_si512();
    const auto look_at = [&](const Vec& x) {
      for (int i = 0; i < Vec::parts; ++i) seen = _mm512_or_si512(seen, x.bits(i));
    };
    for (int64_t i = 0; i < kCodes; i += Vec::size) {
      const Vec grad = load_vec(at.grad + i);
      look_at(grad * factor);
      (grad * s.sign).store(ghat + i);
      if constexpr (Rule::samples) {
        const Vec scaled = Vec::load(at.variance + i) * s.sign * s.sign;
        look_at(scaled * (per_unit * per_unit));
        scaled.store(variance + i);
      }
    }
    plain = !_mm512_test_epi32_mask(seen, broadcast(0x40000000u));
  }
};

// One plain block. Its states are gone through one after the other; which of them is a rate is known when this is compiled.
template <class Rule, class P, class Codes>
class Block512 {
 public:
  using Scalars = typename Rule::template Scalars<Vec>;

  VSGD_FN Block512(const Operands<P>& at, const Gradients512<Rule>& gradients) : at_(at), gradients_(gradients) {}

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
#pragma GCC unroll 2
    for (int64_t turn = 0; turn < kCodes; turn += kTurn) {
      infer(turn, s, codes, ranges);
      if (!Codes::has_words) finish(turn, s, codes);
    }
    meanwhile();
    if (Codes::has_words) {
      find_words(ranges, codes);
#pragma GCC unroll 2
      for (int64_t turn = 0; turn < kCodes; turn += kTurn) finish(turn, s, codes);
      code_marked();
    }
  }

 private:
  VSGD_FN typename Codes::S* stored(int k) const { return static_cast<typename Codes::S*>(at_.state[k]); }

  template <int k = 0>
  VSGD_FN void read_words(Codes* codes) const {
    if constexpr (Codes::has_words && k < Rule::states) {
      codes[k] = Codes(Q8::of<Rule::is_rate(k)>(at_.words[k]));
      read_words<k + 1>(codes);
    }
  }

  template <int k = 0>
  VSGD_FN void find_words(const Range512* ranges, Codes* codes) {
    if constexpr (Codes::has_words && k < Rule::states) {
      constexpr bool rate = Rule::is_rate(k);
      Range range = ranges[k].template range<rate>();
      if (range.high > kInfinity) range = range_of(numbers_[k], kCodes);
      at_.words[k] = q8_word<rate>(range);
      codes[k] = Codes(Q8::of<rate>(at_.words[k]));
      find_words<k + 1>(ranges, codes);
    }
  }

  template <int k = 0>
  VSGD_FN void load_states(const Codes* codes, int64_t i, Vec* state) const {
    if constexpr (k < Rule::states) {
      state[k] = codes[k].template numbers<Rule::is_rate(k)>(stored(k) + i);
      load_states<k + 1>(codes, i, state);
    }
  }

  template <int k = 0>
  VSGD_FN void store_states(int64_t i, const Vec* state, Range512* ranges) {
    if constexpr (k < Rule::states) {
      state[k].store(numbers_[k] + i);
      if (Codes::has_words) ranges[k].template include<Rule::is_rate(k)>(i == 0, state[k]);
      store_states<k + 1>(i, state, ranges);
    }
  }

  VSGD_FN void infer(int64_t turn, const Scalars& s, const Codes* codes, Range512* ranges) {
    prefetch_turn(at_.param + turn);
    prefetch_turn(at_.grad + turn);
    for (int k = 0; k < Rule::states; ++k) prefetch_turn(stored(k) + turn);
#pragma GCC unroll 2
    for (int64_t i = turn; i < turn + kTurn; i += Vec::size) {
      Vec state[Rule::states];
      load_states(codes, i, state);
      Given<Vec> given;
      if constexpr (Rule::samples) given.variance = Vec::load(gradients_.variance + i);
      Rule::infer(Vec::load(gradients_.ghat + i), state, s, given).store(aux_ + i);
      store_states(i, state, ranges);
    }
  }

  // Codes the states of a turn, and moves its parameters.
  VSGD_FN void finish(int64_t turn, const Scalars& s, const Codes* codes) const {
    alignas(64) float masters[kTurn];
    float* theta = masters;
    if constexpr (is_16_bit<P>) {
      load_masters(at_, turn, kTurn, masters);
    } else {
      theta = at_.param + turn;
    }
#pragma GCC unroll 2
    for (int64_t i = 0; i < kTurn; i += Vec::size)
      Rule::move(Vec::load(theta + i), Vec::load(numbers_[0] + turn + i), Vec::load(aux_ + turn + i), s).store(theta + i);
    if constexpr (is_16_bit<P>) store_masters(at_, turn, kTurn, masters);
    code_states(turn, codes);
  }

  template <int k = 0>
  VSGD_FN void code_states(int64_t turn, const Codes* codes) const {
    if constexpr (k < Rule::states) {
      codes[k].template code<Rule::is_rate(k)>(numbers_[k], stored(k), turn, at_.noise.start(at_.block, k));
      code_states<k + 1>(turn, codes);
    }
  }

  // Codes states once more in which, of what was plain, NaN has come to be.
  template <int k = 0>
  VSGD_FN void code_marked() const {
    if constexpr (Codes::has_words && k < Rule::states) {
      constexpr bool rate = Rule::is_rate(k);
      const uint32_t word = at_.words[k];
      if (word & kHasNan)
        encode<rate>(numbers_[k], stored(k), kCodes, Q8::of<rate>(word), at_.noise.start(at_.block, k));
      code_marked<k + 1>();
    }
  }

  const Operands<P>& at_;
  const Gradients512<Rule>& gradients_;
  alignas(64) float numbers_[Rule::states][kCodes];
  alignas(64) float aux_[kCodes];  // what Rule::infer returned
};

// Scalars for vectors: all their members are of the arithmetic type.
template <class Rule>
typename Rule::template Scalars<Vec> splat(const typename Rule::template Scalars<float>& s) {
  constexpr int count = sizeof(s) / sizeof(float);
  typename Rule::template Scalars<Vec> vectors;
  static_assert(sizeof(vectors) == count * sizeof(Vec), "scalars are of the arithmetic type");
  float one[count];
  Vec each[count];
  memcpy(one, &s, sizeof(one));
  for (int i = 0; i < count; ++i) each[i] = Vec(one[i]);
  memcpy(&vectors, each, sizeof(vectors));
  return vectors;
}

}  // namespace

template <class Rule, class P, Format format>
void run_avx512(const Operands<P>& at, int64_t n, const typename Rule::template Scalars<float>& scalars) {
  using Codes = typename CodesOf<format>::type;
  if (n == 0) return;
  const auto s = splat<Rule>(scalars);
  const auto from = [&](int64_t first) { return at.template from<typename Codes::S>(first, Rule::states); };
  Gradients512<Rule> gradients;
  gradients.read(at, s);
  for (int64_t first = 0; first < n; first += kCodes) {
    const Operands<P> here = from(first);
    const auto read_next = [&] { gradients.read(from(std::min(first + kCodes, n - kCodes)), s); };
    Block512<Rule, P, Codes> block(here, gradients);
    if (block.is_plain()) {
      block.run(s, read_next);
    } else {
      run_block<Rule, P, format, true>(here, kCodes, scalars);
      read_next();
    }
  }
}

// Has it compiled for every rule that does not draw, by naming it.
template <class Rule, class P>
void name_for() {
  if constexpr (!Rule::draws) {
    const volatile auto bf16_states = &run_avx512<Rule, P, Format::bf16>, q8_states = &run_avx512<Rule, P, Format::q8>;
    (void)bf16_states, (void)q8_states;
  }
}
template <class... Each>
void name_for_all(RuleList<Each...>) {
  ((name_for<Each, float>(), name_for<Each, bf16>(), name_for<Each, fp16>()), ...);
}
template void name_for_all(Rules);

}  // namespace vsgd
#endif
