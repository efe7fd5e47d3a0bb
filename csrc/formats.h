// How parameters are stored. A 16-bit parameter has a companion `low`, 16 bits of what its rounding to 16 bits left over,
// so that it trains as the float32 master that both make up: a small update is kept until it adds up to a visible one.
// Whoever overwrites the parameter overwrites the master with it, to half a unit in the parameter's last place.
// (formats.py is the same in torch.)
#pragma once

#include "numbers.h"

namespace vsgd {

using Low = int16_t;

template <class P>
constexpr bool has_low = sizeof(P) == 2;

VSGD_FN float load_param(const float* p, const Low*) { return *p; }
VSGD_FN double load_param(const double* p, const Low*) { return *p; }
VSGD_FN void store_param(float* p, Low*, float x) { *p = x; }
VSGD_FN void store_param(double* p, Low*, double x) { *p = x; }

// bf16 is the upper half of a float32, and low the signed distance of the bits; from a zero that somebody has written
// there is none to take.
VSGD_FN float load_param(const bf16* p, const Low* low) {
  uint32_t sign = uint32_t(p->bits & 0x8000u) << 16;
  int32_t high = int32_t(uint32_t(p->bits & 0x7fffu) << 16);
  int32_t magnitude = high + (high < 0x7f800000 ? *low : 0);
  return bit_cast<float>(uint32_t(magnitude < 0 ? 0 : magnitude) | sign);
}

VSGD_FN void store_param(bf16* p, Low* low, float x) {
  uint32_t bits = bit_cast<uint32_t>(x);
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  // Ties go up, for the distance then fits 16 bits: -32768 ... 32767.
  uint32_t high = nan ? (bits | 0x400000u) & 0xffff0000u : (bits + 0x8000u) & 0xffff0000u;
  *low = nan ? Low(0) : Low(uint16_t(bits - high));
  p->bits = uint16_t(high >> 16);
}

// 2^-16 of the unit in the last place of an fp16, and its reciprocal.
VSGD_FN uint32_t exponent_of(fp16 p) {
  uint32_t exponent = (p.bits >> 10) & 31u;
  return exponent == 0u ? 1u : exponent;
}
VSGD_FN float fraction_of_ulp(fp16 p) { return bit_cast<float>((exponent_of(p) + 86u) << 23); }
VSGD_FN float fractions_per_unit(fp16 p) { return bit_cast<float>((168u - exponent_of(p)) << 23); }

// fp16: low counts 65,536ths of the unit in the last place. From 2^-14 on that holds every float32 exactly; below, it
// is a fixed point of 2^-40.
VSGD_FN float load_param(const fp16* p, const Low* low) {
  bool finite = (p->bits & 0x7c00u) != 0x7c00u;
  return load(p) + (finite ? float(*low) * fraction_of_ulp(*p) : 0.0f);
}

VSGD_FN void store_param(fp16* p, Low* low, float x) {
  store(p, x);
  bool finite = (p->bits & 0x7c00u) != 0x7c00u;
  float rest = finite ? (x - load(p)) * fractions_per_unit(*p) : 0.0f;  // exact, -32768 ... 32768
  rest = 32767.0f < rest ? 32767.0f : rest;
  *low = Low(int32_t(bit_cast<uint32_t>(rest + 0x1.8p23f) - bit_cast<uint32_t>(0x1.8p23f)));  // to nearest
}

}  // namespace vsgd
