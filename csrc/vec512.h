// Thirty-two floats as an arithmetic type, so that the rules of rules.h are written once and run here too. They are two
// vectors side by side: a rule is one chain of operations, and the processor looks only so far ahead for a second one. Only
// for files that are compiled for AVX-512 as a whole.
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace vsgd {

struct Vec {
  static constexpr int parts = 2, width = 16, size = parts * width;
  __m512 part[parts];

  VSGD_FN Vec() = default;
  VSGD_FN Vec(float x) : Vec(all([&](int) { return _mm512_set1_ps(x); })) {}
  VSGD_FN explicit Vec(int x) : Vec(float(x)) {}
  VSGD_FN static Vec load(const float* p) {
    return all([&](int i) { return _mm512_loadu_ps(p + i * width); });
  }
  VSGD_FN void store(float* p) const {
    for (int i = 0; i < parts; ++i) _mm512_storeu_ps(p + i * width, part[i]);
  }
  VSGD_FN __m512i bits(int i) const { return _mm512_castps_si512(part[i]); }

  // Each part what `of` says.
  template <class Of>
  VSGD_FN static Vec all(const Of& of) {
    Vec x;
    for (int i = 0; i < parts; ++i) x.part[i] = of(i);
    return x;
  }
};

VSGD_FN Vec operator+(const Vec& x, const Vec& y) {
  return Vec::all([&](int i) { return _mm512_add_ps(x.part[i], y.part[i]); });
}
VSGD_FN Vec operator-(const Vec& x, const Vec& y) {
  return Vec::all([&](int i) { return _mm512_sub_ps(x.part[i], y.part[i]); });
}
VSGD_FN Vec operator*(const Vec& x, const Vec& y) {
  return Vec::all([&](int i) { return _mm512_mul_ps(x.part[i], y.part[i]); });
}
VSGD_FN Vec operator/(const Vec& x, const Vec& y) {
  return Vec::all([&](int i) { return _mm512_div_ps(x.part[i], y.part[i]); });
}
// A factor of a product: gcc would keep -x beside x, and move others in and out of memory for it (3 % slower).
struct Negated {
  const Vec& x;
};
VSGD_FN Negated operator-(const Vec& x) { return {x}; }
VSGD_FN Vec fma(const Vec& x, const Vec& y, const Vec& z) {
  return Vec::all([&](int i) { return _mm512_fmadd_ps(x.part[i], y.part[i], z.part[i]); });
}
VSGD_FN Vec fma(const Negated& x, const Vec& y, const Vec& z) {
  return Vec::all([&](int i) { return _mm512_fnmadd_ps(x.x.part[i], y.part[i], z.part[i]); });
}
VSGD_FN Vec square_root(const Vec& x) {
  return Vec::all([&](int i) { return _mm512_sqrt_ps(x.part[i]); });
}

// Vectors are of blocks in which no floor would take effect, but those that always do.
template <> struct Bounds<Vec> : Bounds<float> {};
VSGD_FN Vec at_least(const Vec& x, float) { return x; }
VSGD_FN Vec always_at_least(const Vec& x, float floor) {
  return Vec::all([&](int i) { return _mm512_max_ps(_mm512_set1_ps(floor), x.part[i]); });
}

// Where the words are.
template <> struct WordOf<Vec> { using type = const uint32_t*; };
VSGD_FN Vec one_below(const uint32_t* words, const Vec& kept) {
  return Vec::all([&](int i) {
    const __m512i upper = _mm512_srli_epi32(_mm512_loadu_si512(words + i * Vec::width), 8);
    const __mmask16 below = _mm512_cmp_ps_mask(_mm512_cvtepi32_ps(upper), kept.part[i], _CMP_LT_OQ);
    return _mm512_maskz_mov_ps(below, _mm512_set1_ps(1.0f));
  });
}

}  // namespace vsgd
