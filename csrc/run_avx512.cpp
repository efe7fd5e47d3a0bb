// q8's blocks in AVX-512, by hand: of run_cpu.h's loops gcc makes two instructions where one shifts by a count, and twice
// as many to pack bytes. The rules are rules.h's, on vectors.
#include "isa.h"

#if VSGD_Q8_AVX512
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

VSGD_AVX512_FROM_HERE  // and not before, for the headers above have functions that others share

#include "run_avx512.h"
#include "run_cpu.h"
#include "vec512.h"

namespace vsgd {
namespace {

VSGD_FN __m512i all(uint32_t x) { return _mm512_set1_epi32(int(x)); }

// What the bits of a block's elements are beyond those of its first.
struct Steps {
  alignas(64) uint32_t of[kCodes];
  constexpr Steps() : of() {
    for (uint32_t i = 0; i < kCodes; ++i) of[i] = i * kGolden;
  }
};
constexpr Steps kSteps;

// Packs four vectors of codes, of which `kSigned` says how the bytes are read; what a byte cannot hold becomes the nearest
// that it can. The bytes come in groups of four that `in_order` brings into order.
template <bool kSigned>
VSGD_FN __m512i packed(const __m512i* x) {
  const __m512i low = _mm512_packs_epi32(x[0], x[1]), high = _mm512_packs_epi32(x[2], x[3]);
  return kSigned ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
}
VSGD_FN __m512i in_order(__m512i bytes) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}

// Q8's `number` and `code`, of unmarked blocks.
class Q8Vec {
 public:
  VSGD_FN Q8Vec() = default;
  VSGD_FN explicit Q8Vec(const Q8& q8)
      : base_(all(q8.base)), k_(all(q8.k)), rest_(all(32 - q8.k)), unit_(q8.unit), per_unit_(q8.per_unit) {}

  // The numbers of 16 codes.
  template <bool rate>
  VSGD_FN Vec numbers(const uint8_t* codes) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    if (rate) return Vec::of_bits(_mm512_add_epi32(base_, _mm512_sllv_epi32(_mm512_cvtepu8_epi32(bytes), k_)));
    const __m512i c = _mm512_cvtepi8_epi32(bytes);
    const __m512i y = _mm512_add_epi32(all(kOne), _mm512_slli_epi32(_mm512_abs_epi32(c), kMeanShift));
    const Vec m = (Vec::of_bits(y) - Vec(1.0f)) * unit_;
    return Vec::of_bits(_mm512_ternarylogic_epi32(m.bits(), c, all(0x80000000u), 0xf8));  // m | c & sign
  }

  // Codes the turn of numbers that begins with a block's element `first`; random: of the block's first element.
  template <bool rate>
  VSGD_FN __m512i codes(const float* numbers, int64_t first, uint32_t random) const {
    __m512i code[kTurn / Vec::size], bits[kTurn / Vec::size];
    for (int64_t j = 0; j < kTurn / Vec::size; ++j) {
      const int64_t i = first + j * Vec::size;
      bits[j] = Vec::load(numbers + i).bits();
      const __m512i r = _mm512_add_epi32(all(random), _mm512_load_si512(kSteps.of + i));
      code[j] = rate ? rate_code(bits[j], r) : mean_code(bits[j], r);
    }
    if (rate) return in_order(packed<false>(code));
    const __mmask64 negative = _mm512_movepi8_mask(packed<true>(bits));
    const __m512i bytes = packed<true>(code);
    return in_order(_mm512_mask_sub_epi8(bytes, negative, _mm512_setzero_si512(), bytes));
  }

 private:
  VSGD_FN __m512i rate_code(__m512i bits, __m512i random) const {
    return _mm512_srlv_epi32(_mm512_add_epi32(_mm512_sub_epi32(bits, base_), _mm512_srlv_epi32(random, rest_)), k_);
  }
  VSGD_FN __m512i mean_code(__m512i bits, __m512i random) const {
    const Vec y = Vec::of_bits(_mm512_and_si512(bits, all(0x7fffffffu))) * per_unit_ + Vec(1.0f);
    const __m512i part = _mm512_srli_epi32(random, 32 - kMeanShift);
    return _mm512_srli_epi32(_mm512_add_epi32(_mm512_sub_epi32(y.bits(), all(kOne)), part), kMeanShift);
  }

  __m512i base_, k_, rest_;
  Vec unit_, per_unit_;
};

VSGD_FN Vec load_vec(const float* p) { return Vec::load(p); }
template <class P>
VSGD_FN Vec load_vec(const P* p) {
  alignas(64) float numbers[Vec::size];
  for (int i = 0; i < Vec::size; ++i) numbers[i] = load(p + i);
  return Vec::load(numbers);
}

// The range of the numbers of one state.
struct VecRange {
  __m512i high, low;  // of their bits

  VSGD_FN void include(bool first, __m512i bits) {
    high = first ? bits : _mm512_max_epu32(high, bits);
    low = first ? bits : _mm512_min_epu32(low, bits);
  }
  VSGD_FN Range range() const {
    return {_mm512_reduce_max_epu32(high), kDeepest - _mm512_reduce_min_epu32(low), 0};
  }
};

// One block: `infer`, then `finish`.
template <class Rule, class P>
class Q8Block {
 public:
  using Scalars = typename Rule::template Scalars<Vec>;

  VSGD_FN explicit Q8Block(const Operands<P>& at) : at_(at) {}

  VSGD_FN void infer(const Scalars& s) {
    uint32_t marks = 0;
    for (int k = 0; k < Rule::states; ++k) marks |= at_.words[k];
    if (marks & kHasNan) {
      decode_marked();
      infer_from<false>(s);
    } else {
      infer_from<true>(s);
    }
  }

  VSGD_FN void finish(const Scalars& s) const {
    Q8Vec coding[Rule::states];
    uint32_t random[Rule::states];
    for (int k = 0; k < Rule::states; ++k) {
      coding[k] = Q8Vec(coding_[k]);
      random[k] = at_.noise.start(at_.block, k);
    }
#pragma GCC unroll 2
    for (int64_t turn = 0; turn < kCodes; turn += kTurn) {
      move(turn, s);
      encode(turn, coding, random);
    }
  }

 private:
  VSGD_FN uint8_t* codes(int k) const { return static_cast<uint8_t*>(at_.state[k]); }

  template <int k = 0>
  VSGD_FN void decode_marked() {
    if constexpr (k < Rule::states) {
      decode<Rule::is_rate(k)>(codes(k), numbers_[k], kCodes, at_.words + k);
      decode_marked<k + 1>();
    }
  }

  template <int k = 0>
  VSGD_FN void read_words(Q8Vec* coding) const {
    if constexpr (k < Rule::states) {
      coding[k] = Q8Vec(Q8::of<Rule::is_rate(k)>(at_.words[k]));
      read_words<k + 1>(coding);
    }
  }

  template <bool kCoded, int k = 0>
  VSGD_FN void load_states(const Q8Vec* coding, int64_t i, Vec* state) const {
    if constexpr (k < Rule::states) {
      if (kCoded) state[k] = coding[k].template numbers<Rule::is_rate(k)>(codes(k) + i);
      if (!kCoded) state[k] = Vec::load(numbers_[k] + i);
      load_states<kCoded, k + 1>(coding, i, state);
    }
  }

  template <int k = 0>
  VSGD_FN void store_states(int64_t i, const Vec* state, VecRange* ranges) {
    if constexpr (k < Rule::states) {
      state[k].store(numbers_[k] + i);
      const __m512i bits = state[k].bits();
      ranges[k].include(i == 0, Rule::is_rate(k) ? bits : _mm512_and_si512(bits, all(0x7fffffffu)));
      store_states<k + 1>(i, state, ranges);
    }
  }

  template <int k = 0>
  VSGD_FN void find_words(const VecRange* ranges) {
    if constexpr (k < Rule::states) {
      constexpr bool rate = Rule::is_rate(k);
      Range range = ranges[k].range();
      if (range.high > kInfinity) range = range_of(numbers_[k], kCodes);
      at_.words[k] = q8_word<rate>(range);
      coding_[k] = Q8::of<rate>(at_.words[k]);
      find_words<k + 1>(ranges);
    }
  }

  template <bool kCoded>
  VSGD_FN void infer_from(const Scalars& s) {
    Q8Vec coding[Rule::states];
    VecRange ranges[Rule::states];
    read_words(coding);
#pragma GCC unroll 8  // so that nothing of a block is a loop, which takes 4 % less time
    for (int64_t i = 0; i < kCodes; i += Vec::size) {
      if (i % kTurn == 0) {
        prefetch_turn(at_.param + i);
        prefetch_turn(at_.grad + i);
        for (int k = 0; k < Rule::states; ++k) prefetch_turn(codes(k) + i);
      }
      Vec state[Rule::states];
      load_states<kCoded>(coding, i, state);
      Given<Vec> given;
      if constexpr (Rule::samples) given.variance = bounded_variance(Vec::load(at_.variance + i) * s.sign * s.sign);
      Rule::infer(bounded(load_vec(at_.grad + i) * s.sign), state, s, given).store(aux_ + i);
      store_states(i, state, ranges);
    }
    find_words(ranges);
  }

  VSGD_FN void move(int64_t turn, const Scalars& s) const {
    alignas(64) float masters[kTurn];
    float* theta = masters;
    if constexpr (is_16_bit<P>) {
      load_masters(at_, turn, kTurn, masters);
    } else {
      theta = at_.param + turn;
    }
    for (int64_t i = 0; i < kTurn; i += Vec::size)
      Rule::move(Vec::load(theta + i), Vec::load(numbers_[0] + turn + i), Vec::load(aux_ + turn + i), s).store(theta + i);
    if constexpr (is_16_bit<P>) store_masters(at_, turn, kTurn, masters);
  }

  template <int k = 0>
  VSGD_FN void encode(int64_t turn, const Q8Vec* coding, const uint32_t* random) const {
    if constexpr (k < Rule::states) {
      constexpr bool rate = Rule::is_rate(k);
      if (coding_[k].has_nan) {
        vsgd::encode<rate>(numbers_[k] + turn, codes(k) + turn, kTurn, coding_[k], random[k] + uint32_t(turn) * kGolden);
      } else {
        _mm512_storeu_si512(codes(k) + turn, coding[k].template codes<rate>(numbers_[k], turn, random[k]));
      }
      encode<k + 1>(turn, coding, random);
    }
  }

  const Operands<P> at_;
  Q8 coding_[Rule::states];
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

template <class Rule, class P>
void run_q8_avx512(const Operands<P>& at, int64_t n, const typename Rule::template Scalars<float>& scalars) {
  const auto s = splat<Rule>(scalars);
  for (int64_t first = 0; first < n; first += kCodes) {
    Q8Block<Rule, P> block(at.template from<uint8_t>(first, Rule::states));
    block.infer(s);
    block.finish(s);
  }
}

// Has it compiled for every rule that does not draw, by naming it.
template <class Rule, class P>
void name_for() {
  if constexpr (!Rule::draws) {
    const volatile auto name = &run_q8_avx512<Rule, P>;
    (void)name;
  }
}
template <class... Each>
void name_for_all(RuleList<Each...>) {
  ((name_for<Each, float>(), name_for<Each, bf16>(), name_for<Each, fp16>()), ...);
}
template void name_for_all(Rules);

}  // namespace vsgd
#endif
