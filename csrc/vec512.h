// Sixteen floats as an arithmetic type, so that the rules of rules.h are written once and run here too. Only for files that
// are compiled for AVX-512 as a whole.
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace vsgd {

struct Vec {
  static constexpr int size = 16;
  __m512 v;

  VSGD_FN Vec() = default;
  VSGD_FN Vec(__m512 x) : v(x) {}
  VSGD_FN Vec(float x) : v(_mm512_set1_ps(x)) {}
  VSGD_FN explicit Vec(int x) : Vec(float(x)) {}
  VSGD_FN static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  VSGD_FN void store(float* p) const { _mm512_storeu_ps(p, v); }
  VSGD_FN static Vec of_bits(__m512i bits) { return _mm512_castsi512_ps(bits); }
  VSGD_FN __m512i bits() const { return _mm512_castps_si512(v); }
};

VSGD_FN Vec operator+(Vec x, Vec y) { return _mm512_add_ps(x.v, y.v); }
VSGD_FN Vec operator-(Vec x, Vec y) { return _mm512_sub_ps(x.v, y.v); }
VSGD_FN Vec operator*(Vec x, Vec y) { return _mm512_mul_ps(x.v, y.v); }
VSGD_FN Vec operator/(Vec x, Vec y) { return _mm512_div_ps(x.v, y.v); }
VSGD_FN Vec square_root(Vec x) { return _mm512_sqrt_ps(x.v); }

// numbers.h's, for which the processor has instructions: of NaN they return the second operand.
template <> struct Bounds<Vec> : Bounds<float> {};
VSGD_FN Vec at_least(Vec x, float floor) { return _mm512_max_ps(Vec(floor).v, x.v); }
VSGD_FN Vec at_most(Vec x, float ceiling) { return _mm512_min_ps(Vec(ceiling).v, x.v); }
VSGD_FN Vec bounded(Vec ghat) {
  constexpr float big = Bounds<float>::big;
  return at_least(at_most(ghat, big), -big) + (ghat - ghat);
}
VSGD_FN Vec bounded_variance(Vec variance) {
  return at_most(variance, Bounds<float>::big * Bounds<float>::big);
}

}  // namespace vsgd
