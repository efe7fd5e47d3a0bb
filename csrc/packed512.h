// packed16 of a mean and two rates in AVX-512, a block at a time, for blocks none of whose states is NaN; to the bit as
// packed.h. What is multiplied by a root's power of two, or its reciprocal, is scaled by 2^64, or 2^65, for the exponents of
// these powers are then made without an addition. Only for files that are compiled for that instruction set as a whole.
#pragma once

#include "packed.h"
#include "separate512.h"

namespace vsgd {

// What a mean's codes stand for, in units: up to 1 in steps of 1/8, up to 2.75 in steps of 1/4.
struct MeanUnits {
  alignas(64) float of[32];
  constexpr MeanUnits() : of() {
    for (int c = 1; c < 16; ++c) {
      of[c] = c < 8 ? c / 8.0f : (c - 4) / 4.0f;
      of[32 - c] = -of[c];
    }
  }
};
constexpr MeanUnits kMeanUnits;

// The order that takes the lower halves of two vectors' elements.
struct LowerHalves {
  alignas(64) uint16_t of[32];
  constexpr LowerHalves() : of() {
    for (uint16_t i = 0; i < 32; ++i) of[i] = 2 * i;
  }
};
constexpr LowerHalves kLowerHalves;

// What others have the address of is kept in memory throughout, and this is not.
template <class Rule>
VSGD_FN Numbers512<Rule> copy_of(const Numbers512<Rule>& numbers) {
  Numbers512<Rule> own;
  for (int k = 0; k < Rule::states; ++k)
    for (int64_t i = 0; i < kCodes; i += Vec::size) Vec::load(numbers.of[k] + i).store(own.of[k] + i);
  return own;
}

template <class Rule>
__attribute__((noinline)) void code_packed_by_loops(const Numbers512<Rule>& numbers, Packed16* codes, uint32_t* words,
                                                    uint32_t start) {
  find_packed_words<Rule::states>(numbers.of, kCodes, words, start);
  encode_packed<Rule::states>(numbers.of, 0, kCodes, codes, words, start);
}

// A block whose means are still to be coded, and joined with its rates' codes: that is done while the next one's words are
// found, which wait for one another.
template <class Rule>
class PendingMeans {
 public:
  using Coding = Packed<Rule::states>;
  static constexpr int kParts = kCodes / Vec::width;

  VSGD_FN void code() {
    if (!codes) return;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; i += 2) {
      const __m512i joined = _mm512_permutex2var_epi16(coded(i), _mm512_load_si512(kLowerHalves.of), coded(i + 1));
      _mm512_storeu_si512(codes + i * Vec::width, _mm512_sub_epi16(joined, bases));
    }
    codes = nullptr;
  }

  Packed16* codes = nullptr;
  uint32_t start;  // the random bits of the first element
  __m512 means[kParts], per_unit;  // means are in units of their rates' roots, scaled; per_unit is doubled
  __m512i rates[kParts], bases;    // of the rates, in their places in elements' words; the codes are beyond the bases

 private:
  // The words of Vec::width elements, beyond the bases.
  VSGD_FN __m512i coded(int i) const {
    const __m512i x = _mm512_castps_si512(means[i]);
    // 2 + 2 m has the fraction of 1 + m, and in what is left of its exponent there is nothing to be subtracted.
    const __m512 y = _mm512_fmadd_ps(_mm512_castsi512_ps(magnitude(x)), per_unit, _mm512_set1_ps(2.0f));
    const __m512i raise = random_at<16, 32 - Coding::shift>(i * Vec::width, start);  // other_bits'
    const __m512i c = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(y), raise), Coding::shift);
    const __m512i code = _mm512_mask_sub_epi32(c, _mm512_movepi32_mask(x), _mm512_setzero_si512(), c);
    // mask ? code : rates
    return _mm512_ternarylogic_epi32(rates[i], code, broadcast(Coding::mean_mask), 0xd8);
  }
};

template <class Rule>
class PackedCoder {
 public:
  using Kept = PendingMeans<Rule>;
  using Coding = Packed<Rule::states>;
  // Parameters are not moved while words are found: of what that keeps gcc moves more in and out of memory (5 % slower).
  static constexpr bool has_words = true, moves_late = false;
  static_assert(Coding::mean_bits == 5 && Coding::shift == 20, "a mean's codes are looked up in two vectors");

  VSGD_FN PackedCoder(void* const* states, uint32_t* words, uint32_t start, Kept& pending)
      : pending_(pending), words_(words), codes_(static_cast<Packed16*>(states[0])), start_(start) {}

  VSGD_FN bool is_plain(const Unfloored& rates) const {
    const Coding coding = Coding::of(words_);
    const uint32_t first = (1u << coding.length) - 1u, second = (1u << (Coding::rate_bits - coding.length)) - 1u;
    return words_[0] < kMostUnits &&  // nor is there a mark, which is the uppermost bit
           rates.has(coding.base[0], first, coding.k) && rates.has(coding.base[1], second, coding.k);
  }

  VSGD_FN void open() {
    const Coding coding = Coding::of(words_);
    const __m512 unit = _mm512_set1_ps(coding.unit), scale = _mm512_set1_ps(0x1p64f);
    for (int i = 0; i < 2; ++i)
      means_[i] = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(kMeanUnits.of + 16 * i), unit), scale);
    for (int j = 0; j < 2; ++j) base_[j] = broadcast(coding.base[j]);
    const uint32_t length = coding.length, k = coding.k;
    shift_[0] = broadcast(k - Coding::mean_bits);
    mask_[0] = broadcast(((1u << length) - 1u) << k);
    shift_[1] = broadcast(k - Coding::mean_bits - length);  // modulo 32, of a rotation
    mask_[1] = broadcast(0xffffu & ~((1u << (Coding::mean_bits + length)) - 1u));
  }

  // The numbers of Vec::size elements from i on.
  VSGD_FN void load(int64_t i, Vec* state) const {
    for (int part = 0; part < Vec::parts; ++part) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes_ + i + part * Vec::width));
      const __m512i word = _mm512_cvtepu16_epi32(packed);
      const __m512i first = _mm512_add_epi32(base_[0], _mm512_and_si512(_mm512_sllv_epi32(word, shift_[0]), mask_[0]));
      const __m512i second = _mm512_add_epi32(base_[1], _mm512_rolv_epi32(_mm512_and_si512(word, mask_[1]), shift_[1]));
      const __m512 in_units = _mm512_permutex2var_ps(means_[0], word, means_[1]);  // by the lowest five bits
      state[0].part[part] = _mm512_mul_ps(in_units, _mm512_castsi512_ps(half_exponent(first)));
      state[1].part[part] = _mm512_castsi512_ps(first);
      state[2].part[part] = _mm512_castsi512_ps(second);
    }
  }

  VSGD_FN void store(int64_t i, const Vec* state) {
    for (int k = 0; k < Rule::states; ++k) state[k].store(numbers_.of[k] + i);
    for (int j = 0; j < 2; ++j) ranges_[j].template include<true>(i == 0, state[j + 1]);
  }

  // Codes all but the means. Words wait for all numbers, and meanwhile() gives the processor something else to do.
  template <class Meanwhile>
  VSGD_FN void finish(const Meanwhile& meanwhile) {
    Range ranges[Rule::states];
    for (int j = 0; j < 2; ++j) ranges[j + 1] = ranges_[j].template range<true>();
    // Here, for gcc would find them where they are used: 4 % slower.
    asm volatile("" : "+r"(ranges[1].high), "+r"(ranges[1].depth), "+r"(ranges[2].high), "+r"(ranges[2].depth));
    meanwhile();
    pending_.code();
    const bool kept = larger(ranges[1].high, ranges[2].high) <= kMostRate;  // by which no state is NaN
    if (kept) Coding::find_rate_words(ranges, words_);
    if (!kept || !code_rates()) code_packed_by_loops<Rule>(copy_of(numbers_), codes_, words_, start_);
  }

  VSGD_FN void prefetch(int64_t turn) const { prefetch_turn(codes_ + turn); }

 private:
  // 2^60: what is scaled stays finite where a block's largest mean is fewer of its units.
  static constexpr uint32_t kMostUnits = 0x5d800000u, kScale = 65u << 23;

  // root_scale over 2^64.
  VSGD_FN static __m512i half_exponent(__m512i rate) {
    return _mm512_and_si512(_mm512_srli_epi32(rate, 1), broadcast(kInfinity));
  }

  // Codes the rates, and finds the mean's word; false where what is scaled is too large, or steps are octaves.
  VSGD_FN bool code_rates() {
    const Coding coding = Coding::of(words_);
    if (coding.k > 24) return false;  // what is below a code would be part of its exponent
    const uint32_t k = coding.k, place = Coding::mean_bits + coding.length;
    const __m512i up = broadcast(32u - k), down = broadcast(k),
                  down_to_place = broadcast(k - Coding::mean_bits), to_place = broadcast(place);
    const uint32_t bases = (coding.base[0] >> (k - Coding::mean_bits)) + (coding.base[1] >> k << place);
    pending_.bases = _mm512_set1_epi16(int16_t(bases));
    __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < Kept::kParts; ++i) {
      const __m512i raise = _mm512_srlv_epi32(random_at(i * Vec::width, start_), up);
      const __m512i first = _mm512_add_epi32(number(1, i), raise);  // what is below its code is where the mean's will be
      const __m512i second = _mm512_srlv_epi32(_mm512_add_epi32(number(2, i), raise), down);
      pending_.rates[i] = _mm512_add_epi32(_mm512_srlv_epi32(first, down_to_place), _mm512_sllv_epi32(second, to_place));
      // Exponents of 255 - e in place of 190 - e.
      const __m512i per_root = _mm512_andnot_si512(_mm512_srli_epi32(first, 1), broadcast(kInfinity));
      const __m512 x = _mm512_mul_ps(_mm512_castsi512_ps(number(0, i)), _mm512_castsi512_ps(per_root));
      largest = larger_magnitude(largest, x);
      pending_.means[i] = x;
    }
    Range means;
    means.high = _mm512_reduce_max_epu32(largest);
    if (means.high >= kMostUnits + kScale) return false;
    means.high = means.high > kScale ? means.high - kScale : 0;
    words_[0] = q8_word<false>(means);
    pending_.per_unit = _mm512_set1_ps(2.0f * Coding::of(words_).per_unit * 0x1p-65f);
    pending_.codes = codes_;
    pending_.start = start_;
    return true;
  }

  VSGD_FN __m512i number(int k, int i) const { return bits_at(numbers_.of[k] + i * Vec::width); }

  Kept& pending_;
  uint32_t* words_;
  Packed16* codes_;
  const uint32_t start_;  // the random bits of the first element
  Numbers512<Rule> numbers_;
  __m512 means_[2];  // of each code
  __m512i base_[2], shift_[2], mask_[2];
  Range512 ranges_[2];
};

}  // namespace vsgd
