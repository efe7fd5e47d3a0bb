// packed16 in AVX-512 with byte permutations, a block at a time, for blocks none of whose states is NaN; to the bit as
// packed.h. What is multiplied by a root's power of two, or its reciprocal, is scaled by 2^64, or 2^65, for the exponents of
// these powers are then made without an addition. Only for files that are compiled for that instruction set as a whole.
#pragma once

#include "packed.h"
#include "separate512.h"

namespace vsgd {

// What a mean's codes stand for, in units. Of 5 bits: up to 1 in steps of 1/8, up to 2.75 in steps of 1/4.
struct FiveBitMeans {
  alignas(64) float of[32];
  constexpr FiveBitMeans() : of() {
    for (int c = 1; c < 16; ++c) {
      of[c] = c < 8 ? c / 8.0f : (c - 4) / 4.0f;
      of[32 - c] = -of[c];
    }
  }
};
constexpr FiveBitMeans kFiveBitMeans;
// Of 7 bits, magnitudes: up to 1 in steps of 1/32, up to 2.9375 in steps of 1/16; the upper halves of floats, for that has no
// more than 8 digits.
struct SevenBitMeans {
  alignas(64) uint16_t of[64];
  constexpr SevenBitMeans() : of() {
    for (uint32_t c = 1; c < 64; ++c) {
      const uint32_t in_32nds = c < 32 ? c : 2 * c - 32;
      uint32_t length = 0;
      while (in_32nds >> length > 1) ++length;
      of[c] = uint16_t((127 - 5 + length) << 7 | ((in_32nds << 7 >> length) & 127));
    }
  }
};
constexpr SevenBitMeans kSevenBitMeans;

// The numbers of means' codes beside two rates, and beside one.
template <bool two>
class MeanNumbers {
 public:
  VSGD_FN void open(float unit) {
    for (int i = 0; i < 2; ++i) of_[i] = _mm512_mul_ps(_mm512_load_ps(kFiveBitMeans.of + 16 * i), _mm512_set1_ps(unit));
  }
  // Begins Vec::size codes.
  VSGD_FN void read(const Packed16*) {}
  // The numbers of one part of them; words: with 32 bits an element.
  VSGD_FN __m512 numbers(__m512i words, int) const {
    return _mm512_permutex2var_ps(of_[0], words, of_[1]);  // by the lowest five bits
  }

 private:
  __m512 of_[2];  // of each code
};
template <>
class MeanNumbers<false> {
 public:
  VSGD_FN void open(float unit) { unit_ = _mm512_set1_ps(unit); }
  VSGD_FN void read(const Packed16* codes) {
    const __m512i with_sign = _mm512_slli_epi16(_mm512_loadu_si512(codes), 9);
    const __m512i code = _mm512_abs_epi16(_mm512_srai_epi16(with_sign, 9));
    const uint16_t* table = kSevenBitMeans.of;
    const __m512i half = _mm512_permutex2var_epi16(_mm512_load_si512(table), code, _mm512_load_si512(table + 32));
    halves_ = _mm512_ternarylogic_epi32(half, with_sign, broadcast(0x80008000u), 0xf8);  // half | sign
  }
  VSGD_FN __m512 numbers(__m512i, int part) const { return _mm512_mul_ps(upper_halves(halves_, part), unit_); }

 private:
  __m512 unit_;
  __m512i halves_;
};

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
  static constexpr int rates = Rule::states - 1;
  static_assert(Coding::mean_bits == (Coding::two ? 5 : 7), "MeanNumbers has tables of them");

  VSGD_FN PackedCoder(void* const* states, uint32_t* words, uint32_t start, Kept& pending)
      : pending_(pending), words_(words), codes_(static_cast<Packed16*>(states[0])), start_(start) {}

  VSGD_FN bool is_plain(const Unfloored& unfloored) const {
    const Coding coding = Coding::of(words_);
    const uint32_t first = (1u << coding.length) - 1u, second = (1u << (Coding::rate_bits - coding.length)) - 1u;
    return words_[0] < kMostUnits &&  // nor is there a mark, which is the uppermost bit
           unfloored.has(coding.base[0], first, coding.k) && (rates == 1 || unfloored.has(coding.base[1], second, coding.k));
  }

  VSGD_FN void open() {
    const Coding coding = Coding::of(words_);
    means_.open(coding.unit * 0x1p64f);
    for (int j = 0; j < rates; ++j) base_[j] = broadcast(coding.base[j]);
    const uint32_t length = coding.length, k = coding.k;
    // Modulo 32, of rotations: only the first of two rates is never moved down, and so can be shifted first (2 % faster).
    shift_[0] = broadcast(k - Coding::mean_bits);
    mask_[0] = broadcast(((1u << length) - 1u) << (rates == 2 ? k : Coding::mean_bits));
    shift_[1] = broadcast(k - Coding::mean_bits - length);
    mask_[1] = broadcast(0xffffu & ~((1u << (Coding::mean_bits + length)) - 1u));
  }

  // The numbers of Vec::size elements from i on.
  VSGD_FN void load(int64_t i, Vec* state) {
    means_.read(codes_ + i);
    for (int part = 0; part < Vec::parts; ++part) {
      const auto* from = reinterpret_cast<const __m256i*>(codes_ + i + part * Vec::width);
      const __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
      const __m512i first = rate(0, word);
      state[0].part[part] = _mm512_mul_ps(means_.numbers(word, part), _mm512_castsi512_ps(half_exponent(first)));
      state[1].part[part] = _mm512_castsi512_ps(first);
      if (rates == 2) state[rates].part[part] = _mm512_castsi512_ps(rate(1, word));
    }
  }

  VSGD_FN void store(int64_t i, const Vec* state) {
    for (int k = 0; k < Rule::states; ++k) state[k].store(numbers_.of[k] + i);
    for (int j = 0; j < rates; ++j) ranges_[j].template include<true>(i == 0, state[j + 1]);
  }

  // Codes all but the means. Words wait for all numbers, and meanwhile() gives the processor something else to do.
  template <class Meanwhile>
  VSGD_FN void finish(const Meanwhile& meanwhile) {
    Range ranges[Rule::states];
    for (int j = 0; j < rates; ++j) ranges[j + 1] = ranges_[j].template range<true>();
    // Here, for gcc would find them where they are used: 4 % slower.
    if constexpr (rates == 2) {
      asm volatile("" : "+r"(ranges[1].high), "+r"(ranges[1].low), "+r"(ranges[2].high), "+r"(ranges[2].low));
    } else {
      asm volatile("" : "+r"(ranges[1].high), "+r"(ranges[1].low));
    }
    meanwhile();
    pending_.code();
    const bool kept = larger(ranges[1].high, ranges[rates].high) <= kMostRate;  // by which no state is NaN
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

  VSGD_FN __m512i rate(int j, __m512i word) const {
    const __m512i steps = rates == 2 && j == 0 ? _mm512_and_si512(_mm512_sllv_epi32(word, shift_[j]), mask_[j])
                                               : _mm512_rolv_epi32(_mm512_and_si512(word, mask_[j]), shift_[j]);
    return _mm512_add_epi32(base_[j], steps);
  }

  // Codes the rates, and finds the mean's word; false where what is scaled is too large, or steps are octaves.
  VSGD_FN bool code_rates() {
    const Coding coding = Coding::of(words_);
    if (coding.k > 24) return false;  // what is below a code would be part of its exponent
    const uint32_t k = coding.k, place = Coding::mean_bits + coding.length;
    const __m512i up = broadcast(32u - k), down = broadcast(k),
                  down_to_place = broadcast(k - Coding::mean_bits), to_place = broadcast(place);
    uint32_t bases = coding.base[0] >> k << Coding::mean_bits;
    if (rates == 2) bases += coding.base[1] >> k << place;
    pending_.bases = _mm512_set1_epi16(int16_t(bases));
    __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < Kept::kParts; ++i) {
      const __m512i raise = _mm512_srlv_epi32(random_at(i * Vec::width, start_), up);
      const __m512i first = _mm512_add_epi32(number(1, i), raise);  // what is below its code is where the mean's will be
      if (rates == 2) {
        const __m512i second = _mm512_srlv_epi32(_mm512_add_epi32(number(rates, i), raise), down);
        pending_.rates[i] = _mm512_add_epi32(_mm512_srlv_epi32(first, down_to_place), _mm512_sllv_epi32(second, to_place));
      } else {
        pending_.rates[i] = _mm512_rorv_epi32(first, down_to_place);  // by 15 at most: what comes round is not in the word
      }
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
  MeanNumbers<Coding::two> means_;
  __m512i base_[2], shift_[2], mask_[2];
  Range512 ranges_[2];
};

}  // namespace vsgd
