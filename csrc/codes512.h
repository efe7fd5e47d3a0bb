// The formats of states.h in AVX-512, a block at a time, for states none of which is NaN; to the bit as states.h. Only for
// files that are compiled for AVX-512 as a whole.
#pragma once

#include "run_cpu.h"
#include "vec512.h"

namespace vsgd {

static_assert(kTurn * 8 == 512, "the codes of a turn are a vector");

VSGD_FN __m512i broadcast(uint32_t x) { return _mm512_set1_epi32(int(x)); }
VSGD_FN __m512i bits_at(const float* numbers) { return _mm512_castps_si512(_mm512_loadu_ps(numbers)); }
VSGD_FN __m512i magnitude(__m512i bits) { return _mm512_and_si512(bits, broadcast(0x7fffffffu)); }

// What the random bits of a block's elements are beyond those of its first.
struct Steps {
  alignas(64) uint32_t of[kCodes];
  constexpr Steps() : of() {
    for (uint32_t i = 0; i < kCodes; ++i) of[i] = i * kGolden;
  }
};
constexpr Steps kSteps;
// The random bits of a block's elements from i on; start: its first's.
VSGD_FN __m512i random_at(int64_t i, uint32_t start) {
  return _mm512_add_epi32(broadcast(start), _mm512_load_si512(kSteps.of + i));
}

// Orders of 16-bit words: those of each half of a vector as the upper halves of elements, and the other way round.
struct Halves {
  alignas(64) uint16_t spread[2][32], joined[32];
  constexpr Halves() : spread(), joined() {
    for (uint16_t i = 0; i < 32; ++i) {
      spread[0][i] = i / 2;
      spread[1][i] = 16 + i / 2;
      joined[i] = 2 * i + 1;
    }
  }
};
constexpr Halves kHalves;

class Bf16Codes {
 public:
  using S = uint16_t;
  static constexpr bool has_words = false;

  // Whether none of a block's states is Inf or NaN.
  template <bool rate>
  VSGD_FN static bool plain(const S* codes, const uint32_t*) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < kCodes; i += 32) {
      const __m512i words = _mm512_loadu_si512(codes + i);
      most = _mm512_max_epu16(most, rate ? words : _mm512_and_si512(words, broadcast(0x7fff7fffu)));
    }
    return !_mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(int16_t(kInfinity >> 16)));
  }

  template <bool rate>
  VSGD_FN Vec numbers(const S* codes) const {
    const __m512i words = _mm512_loadu_si512(codes);
    return Vec::all([&](int i) {
      const __m512i order = _mm512_load_si512(kHalves.spread[i]);
      return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, order, words));
    });
  }

  // Codes elements [first, first + kTurn) of a block.
  template <bool rate>
  VSGD_FN void code(const float* numbers, S* codes, int64_t first, uint32_t start) const {
    for (int64_t i = first; i < first + kTurn; i += 32) {
      const __m512i low = raised(numbers, i, start), high = raised(numbers, i + 16, start);
      _mm512_storeu_si512(codes + i, _mm512_permutex2var_epi16(low, _mm512_load_si512(kHalves.joined), high));
    }
  }

 private:
  VSGD_FN static __m512i raised(const float* numbers, int64_t i, uint32_t start) {
    return _mm512_add_epi32(bits_at(numbers + i), _mm512_srli_epi32(random_at(i, start), 16));
  }
};

class Q8Codes {
 public:
  using S = uint8_t;
  static constexpr bool has_words = true;

  // Whether none of a block's states is NaN.
  template <bool rate>
  VSGD_FN static bool plain(const S*, const uint32_t* word) { return !(*word & kHasNan); }

  VSGD_FN Q8Codes() = default;
  VSGD_FN explicit Q8Codes(const Q8& q8)
      : base_(broadcast(q8.base)), k_(broadcast(q8.k)), rest_(broadcast(32 - q8.k)), unit_(_mm512_set1_ps(q8.unit)),
        per_unit_(_mm512_set1_ps(q8.per_unit)) {}

  // The numbers of Vec::size codes.
  template <bool rate>
  VSGD_FN Vec numbers(const S* codes) const {
    return Vec::all([&](int i) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + i);
      return rate ? rate_of(_mm512_cvtepu8_epi32(bytes)) : mean_of(_mm512_cvtepi8_epi32(bytes));
    });
  }

  // Codes elements [first, first + kTurn) of a block.
  template <bool rate>
  VSGD_FN void code(const float* numbers, S* codes, int64_t first, uint32_t start) const {
    __m512i bits[4], code[4];
    for (int j = 0; j < 4; ++j) {
      const int64_t i = first + j * Vec::width;
      bits[j] = bits_at(numbers + i);
      code[j] = rate ? rate_code(bits[j], random_at(i, start)) : mean_code(bits[j], random_at(i, start));
    }
    __m512i bytes = packed<!rate>(code);
    if (!rate) {
      const __mmask64 negative = _mm512_movepi8_mask(packed<true>(bits));
      bytes = _mm512_mask_sub_epi8(bytes, negative, _mm512_setzero_si512(), bytes);
    }
    _mm512_storeu_si512(codes + first, in_order(bytes));
  }

 private:
  VSGD_FN __m512 rate_of(__m512i code) const {
    return _mm512_castsi512_ps(_mm512_add_epi32(base_, _mm512_sllv_epi32(code, k_)));
  }
  VSGD_FN __m512 mean_of(__m512i code) const {
    const __m512i y = _mm512_add_epi32(broadcast(kOne), _mm512_slli_epi32(_mm512_abs_epi32(code), kMeanShift));
    const __m512 m = _mm512_mul_ps(_mm512_sub_ps(_mm512_castsi512_ps(y), _mm512_set1_ps(1.0f)), unit_);
    const __m512i sign = broadcast(0x80000000u);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(m), code, sign, 0xf8));  // m | code & sign
  }
  VSGD_FN __m512i rate_code(__m512i bits, __m512i random) const {
    return _mm512_srlv_epi32(_mm512_add_epi32(_mm512_sub_epi32(bits, base_), _mm512_srlv_epi32(random, rest_)), k_);
  }
  VSGD_FN __m512i mean_code(__m512i bits, __m512i random) const {
    const __m512 units = _mm512_mul_ps(_mm512_castsi512_ps(magnitude(bits)), per_unit_);
    const __m512i y = _mm512_castps_si512(_mm512_add_ps(units, _mm512_set1_ps(1.0f)));
    const __m512i part = _mm512_srli_epi32(random, 32 - kMeanShift);
    return _mm512_srli_epi32(_mm512_add_epi32(_mm512_sub_epi32(y, broadcast(kOne)), part), kMeanShift);
  }

  // Packs four vectors of codes, of which `kSigned` says how the bytes are read; what a byte cannot hold becomes the
  // nearest that it can. The bytes come in groups of four that `in_order` brings into order.
  template <bool kSigned>
  VSGD_FN static __m512i packed(const __m512i* x) {
    const __m512i low = _mm512_packs_epi32(x[0], x[1]), high = _mm512_packs_epi32(x[2], x[3]);
    return kSigned ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
  }
  VSGD_FN static __m512i in_order(__m512i bytes) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
  }

  __m512i base_, k_, rest_;
  __m512 unit_, per_unit_;
};

// The range of a state's numbers.
class Range512 {
 public:
  template <bool rate>
  VSGD_FN void include(bool first, const Vec& x) {
    for (int i = 0; i < Vec::parts; ++i) {
      const __m512i bits = rate ? x.bits(i) : magnitude(x.bits(i));
      high_[i] = first ? bits : _mm512_max_epu32(high_[i], bits);
      if (rate) low_[i] = first ? bits : _mm512_min_epu32(low_[i], bits);
    }
  }
  template <bool rate>
  VSGD_FN Range range() const {
    const uint32_t high = _mm512_reduce_max_epu32(_mm512_max_epu32(high_[0], high_[1]));
    if (!rate) return {high, 0, 0};
    return {high, kDeepest - _mm512_reduce_min_epu32(_mm512_min_epu32(low_[0], low_[1])), 0};
  }

 private:
  __m512i high_[Vec::parts], low_[Vec::parts];  // of their bits
};

}  // namespace vsgd
