// The formats of states.h in AVX-512 with byte permutations, a block at a time, for states none of which is NaN; to the bit
// as states.h, for all that it writes itself. Only for files that are compiled for that instruction set as a whole.
#pragma once

#include "run_cpu.h"
#include "vec512.h"

namespace vsgd {

static_assert(kTurn * 8 == 512 && kTurn == 2 * Vec::size, "a turn's codes of 8 bits are a vector");
constexpr int kVectors = kTurn / Vec::width;

VSGD_FN __m512i broadcast(uint32_t x) { return _mm512_set1_epi32(int(x)); }
VSGD_FN __m512i bits_at(const float* numbers) { return _mm512_castps_si512(_mm512_loadu_ps(numbers)); }
VSGD_FN __m512i magnitude(__m512i bits) { return _mm512_and_si512(bits, broadcast(0x7fffffffu)); }
VSGD_FN __m512i larger_magnitude(__m512i x, __m512 y) {
  constexpr int kMaximumOfMagnitudes = 0b1011;
  return _mm512_castps_si512(_mm512_range_ps(_mm512_castsi512_ps(x), y, kMaximumOfMagnitudes));
}

// What a block's elements flip in the random bits of its first, without as many of the uppermost bits, and moved down.
template <int without, int down>
struct Flips {
  alignas(64) uint32_t of[kCodes];
  constexpr Flips() : of() {
    for (uint32_t i = 0; i < kCodes; ++i) of[i] = i * kSpread << without >> down;
  }
};
template <int without, int down>
constexpr Flips<without, down> kFlips;
// The random bits of a block's elements from i on, likewise; start: its first's.
template <int without = 0, int down = 0>
VSGD_FN __m512i random_at(int64_t i, uint32_t start) {
  return _mm512_xor_si512(broadcast(start << without >> down), _mm512_load_si512(kFlips<without, down>.of + i));
}

// What a block's means stay below where it is plain: with gradients that need not be bounded, no rate comes to be infinite.
constexpr uint32_t kLargeMean = 0x5d800000u;  // 2^60
// What the bits of rates have to be for a block to be plain.
struct Unfloored {
  uint32_t least, most;
  VSGD_FN explicit Unfloored(float from) : least(bit_cast<uint32_t>(from)), most(bit_cast<uint32_t>(kMostUnfloored)) {}
  // Whether codes from 0 to `last` in steps of 2^k are such bits.
  VSGD_FN bool has(uint32_t base, uint32_t last, uint32_t k) const {
    return base >= least && base <= most && last <= (most - base) >> k;
  }
};

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
// Those of one half of a vector.
VSGD_FN __m512 upper_halves(__m512i words, int half) {
  const __m512i order = _mm512_load_si512(kHalves.spread[half]);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, order, words));
}

class Bf16Codes {
 public:
  using S = uint16_t;
  static constexpr bool has_words = false;

  // Whether none of a block's means is large, or NaN, and none of its rates is to be floored.
  template <bool rate>
  VSGD_FN static bool plain(const S* codes, const uint32_t*, const Unfloored& rates) {
    __m512i least = _mm512_loadu_si512(codes), most = _mm512_setzero_si512();
    for (int64_t i = 0; i < kCodes; i += 32) {
      const __m512i words = _mm512_loadu_si512(codes + i);
      if (rate) least = _mm512_min_epu16(least, words);
      most = _mm512_max_epu16(most, rate ? words : _mm512_and_si512(words, broadcast(0x7fff7fffu)));
    }
    if (!rate) return !_mm512_cmpge_epu16_mask(most, halves(kLargeMean));
    return !(_mm512_cmple_epu16_mask(least, halves(rates.least)) | _mm512_cmpge_epu16_mask(most, halves(rates.most)));
  }

  template <bool rate>
  VSGD_FN static void open(const S*, __m512i*) {}
  // The numbers of Vec::size codes.
  template <bool rate>
  VSGD_FN Vec numbers(const S* codes, const __m512i&) const {
    const __m512i words = _mm512_loadu_si512(codes);
    return Vec::all([&](int i) { return upper_halves(words, i); });
  }

  // What rounds the codes of a block's elements from i on.
  template <int>
  VSGD_FN static __m512i rounding(int64_t i, uint32_t start) {
    return random_at<0, 16>(i, start);
  }

  // Codes the numbers of a turn.
  template <bool rate>
  VSGD_FN void code(const float* numbers, S* codes, const __m512i* rounding) const {
    for (int i = 0; i < kVectors; i += 2) {
      const __m512i low = _mm512_add_epi32(bits_at(numbers + i * Vec::width), rounding[i]);
      const __m512i high = _mm512_add_epi32(bits_at(numbers + (i + 1) * Vec::width), rounding[i + 1]);
      const __m512i joined = _mm512_permutex2var_epi16(low, _mm512_load_si512(kHalves.joined), high);
      _mm512_storeu_si512(codes + i * Vec::width, joined);
    }
  }

 private:
  VSGD_FN static __m512i halves(uint32_t bits) { return _mm512_set1_epi16(int16_t(bits >> 16)); }
};

// Of a mean's codes, m as a float: the bytes of its upper half, for m has no more than 8 bits.
struct Units {
  alignas(64) uint8_t low[128], high[128];
  constexpr Units() : low(), high() {
    for (uint32_t code = 1; code < 128; ++code) {
      const uint32_t sixteenths = ((16 + code % 16) << code / 16) - 16;
      uint32_t length = 0;
      while (sixteenths >> length > 1) ++length;
      const uint32_t half = (127 - 4 + length) << 7 | ((sixteenths << 7 >> length) & 127);
      low[code] = uint8_t(half);
      high[code] = uint8_t(half >> 8);
    }
  }
};
constexpr Units kUnits;
static_assert(kMeanShift == 19, "sixteen codes an octave");

// The order that takes the uppermost bytes of two vectors' elements.
struct Uppermost {
  alignas(64) uint8_t of[64];
  constexpr Uppermost() : of() {
    for (uint8_t i = 0; i < 32; ++i) of[i] = uint8_t(4 * i + 3);
  }
};
constexpr Uppermost kUppermost;

class Q8Codes {
 public:
  using S = uint8_t;
  static constexpr bool has_words = true;

  // The same; of NaN there is a mark, which is the uppermost bit.
  template <bool rate>
  VSGD_FN static bool plain(const S*, const uint32_t* word, const Unfloored& rates) {
    if (!rate) return *word < kLargeMean;
    const Q8 q8 = Q8::of<true>(*word);
    return !q8.has_nan && rates.has(q8.base, kLastRate, q8.k);
  }

  VSGD_FN Q8Codes() = default;
  VSGD_FN explicit Q8Codes(const Q8& q8)
      : base_(broadcast(q8.base)), k_(broadcast(q8.k)), rest_(broadcast(24 - q8.k)),
        first_(_mm512_set1_epi8(char(q8.base >> q8.k))), unit_(_mm512_set1_ps(q8.unit)),
        per_unit_(_mm512_set1_ps(2.0f * q8.per_unit)) {}

  // Of a turn of means, finds the numbers of each half in units, as the upper halves of floats.
  template <bool rate>
  VSGD_FN static void open(const S* codes, __m512i* units) {
    if (!rate) {
      // In an order that unpacking by bytes, and then by words, within lanes, undoes.
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      const __m512i code = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
      const __m512i low = looked_up(code, kUnits.low), high = looked_up(code, kUnits.high);
      const __m512i with_signs = _mm512_ternarylogic_epi32(high, code, broadcast(0x80808080u), 0xf8);  // high | code & sign
      units[0] = _mm512_unpacklo_epi8(low, with_signs);
      units[1] = _mm512_unpackhi_epi8(low, with_signs);
    }
  }
  // The numbers of Vec::size codes; units: of means, what `open` found.
  template <bool rate>
  VSGD_FN Vec numbers(const S* codes, const __m512i& units) const {
    if (rate) {
      return Vec::all([&](int i) { return rate_of(codes + i * Vec::width); });
    }
    const __m512i none = _mm512_setzero_si512();
    Vec m;
    m.part[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, units));
    m.part[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, units));
    return Vec::all([&](int i) { return _mm512_mul_ps(m.part[i], unit_); });
  }

  // What rounds the codes of state k of a block's elements from i on: 24 bits, for codes are made as the uppermost bytes of
  // elements.
  template <int k>
  VSGD_FN static __m512i rounding(int64_t i, uint32_t start) {
    return random_at<k == kFirstRate ? 16 : 0, 8>(i, start);  // q8_random's
  }

  // Codes the numbers of a turn.
  template <bool rate>
  VSGD_FN void code(const float* numbers, S* codes, const __m512i* rounding) const {
    __m512i bits[kVectors], raised[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      bits[i] = bits_at(numbers + i * Vec::width);
      raised[i] = _mm512_add_epi32(rate ? rate_at_top(bits[i]) : mean_at_top(bits[i]), rounding[i]);
    }
    __m512i bytes = uppermost(raised);
    if (rate) {
      bytes = _mm512_sub_epi8(bytes, first_);
    } else {
      const __mmask64 negative = _mm512_movepi8_mask(uppermost(bits));
      bytes = _mm512_mask_sub_epi8(bytes, negative, _mm512_setzero_si512(), bytes);
    }
    _mm512_storeu_si512(codes, bytes);
  }

 private:
  VSGD_FN __m512 rate_of(const S* codes) const {
    const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_castsi512_ps(_mm512_add_epi32(base_, _mm512_sllv_epi32(code, k_)));
  }
  // A table's bytes for codes without their signs.
  VSGD_FN static __m512i looked_up(__m512i code, const uint8_t* table) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), _mm512_abs_epi8(code), _mm512_load_si512(table + 64));
  }
  // Codes with 24 bits of what is to be rounded, the rates' beyond that of the base.
  VSGD_FN __m512i rate_at_top(__m512i bits) const { return _mm512_sllv_epi32(bits, rest_); }
  VSGD_FN __m512i mean_at_top(__m512i bits) const {
    // 2 + 2 m has the fraction of 1 + m, and of its exponent nothing is left to be subtracted.
    const __m512 y = _mm512_fmadd_ps(_mm512_castsi512_ps(magnitude(bits)), per_unit_, _mm512_set1_ps(2.0f));
    return _mm512_slli_epi32(_mm512_castps_si512(y), 24 - kMeanShift);
  }
  VSGD_FN static __m512i uppermost(const __m512i* x) {
    const __m512i order = _mm512_load_si512(kUppermost.of);
    const __m512i low = _mm512_permutex2var_epi8(x[0], order, x[1]), high = _mm512_permutex2var_epi8(x[2], order, x[3]);
    return _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
  }

  __m512i base_, k_, rest_, first_;  // rest_: how far the codes are from the top; first_: what is there of the base
  __m512 unit_, per_unit_;           // per_unit_ is doubled
};

// The range of a state's numbers. One maximum for all parts of a vector, for there are few registers.
class Range512 {
 public:
  template <bool rate>
  VSGD_FN void include(bool first, const Vec& x) {
    for (int i = 0; i < Vec::parts; ++i) {
      const __m512i bits = x.bits(i);
      const bool begins = first && i == 0;
      if (rate) {
        high_ = begins ? bits : _mm512_max_epu32(high_, bits);
        low_ = begins ? bits : _mm512_min_epu32(low_, bits);
      } else {
        high_ = begins ? magnitude(bits) : larger_magnitude(high_, x.part[i]);
      }
    }
  }
  template <bool rate>
  VSGD_FN Range range() const {
    return {_mm512_reduce_max_epu32(high_), rate ? _mm512_reduce_min_epu32(low_) : kMostBits, 0};
  }

 private:
  __m512i high_, low_;  // of their bits
};

}  // namespace vsgd
