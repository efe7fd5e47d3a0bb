// How parameters are stored. A 16-bit parameter trains as the float32 master of which it is the visible part, so that a
// small update is kept until it adds up to a visible one. A master is a sign and a code of 31 bits, of which the parameter
// is the nearest upper 16 bits and its companion `low` the signed rest, in as many bits as are kept: 16, 8 or none. The
// bits below those are rounded stochastically, without bias. Whoever overwrites the parameter overwrites the master with
// it, to half a unit in the parameter's last place. (formats.py is the same in torch.)
#pragma once

#include "noise.h"

namespace vsgd {

template <class P>
constexpr bool is_16_bit = sizeof(P) == 2;

// Codes of a float32's magnitude, and back. Infinity and NaN are those of the parameter's bits; in codes, NaN and all
// beyond the largest number is infinity.
template <class P> struct Master;

// bf16: the code is float32's own bits.
template <> struct Master<bf16> {
  static constexpr int32_t infinity = 0x7f80, nan = 0x7fc0;
  VSGD_FN static int32_t code(int32_t magnitude) { return magnitude < 0x7f800000 ? magnitude : 0x7f800000; }
  VSGD_FN static int32_t magnitude(int32_t code) { return code; }
};

// fp16: the code is its own bits with 16 more of fraction. From 2^-14 on that holds every float32 exactly; below, it is a
// fixed point of 2^-40.
template <> struct Master<fp16> {
  static constexpr int32_t infinity = 0x7c00, nan = 0x7e00;
  VSGD_FN static int32_t code(int32_t magnitude) {
    bool small = magnitude < 0x38800000;  // 2^-14
    uint32_t normal = (uint32_t(magnitude < 0x47800000 ? magnitude : 0x47800000) - 0x38000000u) << 3;
    float fixed = bit_cast<float>(small ? magnitude : 0) * 0x1p40f;
    fixed += fixed < 0x1p23f ? 0.5f : 0.0f;  // to nearest; what is larger is whole
    return small ? int32_t(fixed) : int32_t(normal);
  }
  VSGD_FN static int32_t magnitude(int32_t code) {
    int32_t fixed = bit_cast<int32_t>(float(code) * 0x1p-40f);
    int32_t number = code < 0x04000000 ? fixed : (code >> 3) + 0x38000000;
    return code < 0x7c000000 ? number : (code >> 3) | 0x7f800000;
  }
};

// The master of a parameter, in arithmetic type. low: the rest, in 65,536ths of a unit in the last place.
VSGD_FN float load_param(const float* p, int32_t) { return *p; }
VSGD_FN double load_param(const double* p, int32_t) { return *p; }

template <class P>
VSGD_FN float load_param(const P* p, int32_t low) {
  int32_t high = int32_t(uint32_t(p->bits & 0x7fffu) << 16), sign = int32_t(uint32_t(p->bits & 0x8000u) << 16);
  int32_t code = high + (high < (Master<P>::infinity << 16) ? low : 0);
  code = code < 0 ? 0 : code;  // of a zero that somebody has written, low takes nothing away
  return bit_cast<float>(Master<P>::magnitude(code) | sign);
}

// Writes a master to its parameter, and returns the rest, a multiple of what `extra` bits of `low` count. Inf is where the
// nearest 16-bit value is: random bits make none.
VSGD_FN int32_t store_param(float* p, float x, int, uint32_t) { return *p = x, 0; }
VSGD_FN int32_t store_param(double* p, double x, int, uint32_t) { return *p = x, 0; }

template <class P>
VSGD_FN int32_t store_param(P* p, float x, int extra, uint32_t random) {
  constexpr int32_t overflow = (Master<P>::infinity << 16) - 0x8000;  // half a unit beyond the largest number
  int32_t bits = bit_cast<int32_t>(x), magnitude = bits & 0x7fffffff;
  int32_t code = Master<P>::code(magnitude);
  int32_t raised = code + int32_t((random >> 16) >> extra);
  int32_t rounded = (raised < overflow ? raised : overflow - 1) & -(1 << (16 - extra));
  // Ties go up, for the rest then fits its bits: -32768 ... 32767.
  int32_t high = (rounded + 0x8000) & -0x10000, rest = rounded - high;
  int32_t beyond = (magnitude > 0x7f800000 ? Master<P>::nan : Master<P>::infinity) << 16;
  bool finite = code < overflow;
  // Shifted last, for gcc vectorises no select that it narrows.
  p->bits = uint16_t(uint32_t((finite ? high : beyond) | (bits & ~0x7fffffff)) >> 16);
  return finite ? rest : 0;
}

}  // namespace vsgd
