// Number formats: bf16 and fp16 to fp32; products and sums that are rounded once; and the bounds that keep the arithmetic
// finite. Otherwise integer operations and selects only, so that every loop vectorises and every instruction set rounds alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define VSGD_FN __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define VSGD_FN inline __attribute__((always_inline))
#else
#define VSGD_FN inline
#endif

// Arrays stay in registers only where their indices are constants; a loop of unknown length is better left one.
#ifdef __CUDACC__
#define VSGD_UNROLL _Pragma("unroll")
#define VSGD_NO_UNROLL _Pragma("unroll 1")
#else
#define VSGD_UNROLL
#define VSGD_NO_UNROLL
#endif

namespace vsgd {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

template <class To, class From>
VSGD_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// A type, and a value, as arguments.
template <class T> struct Type { using type = T; };
template <class T, T v> struct Value { static constexpr T value = v; };

// How many bits x has, from its highest set one on.
VSGD_FN uint32_t bit_length(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return uint32_t(32 - __clz(int(x)));
#elif defined(__GNUC__)
  return x == 0 ? 0u : uint32_t(32 - __builtin_clz(x));
#else
  uint32_t length = 0;
  for (; x != 0; x >>= 1) ++length;
  return length;
#endif
}

// The type in which a parameter type is computed, and in which its state is kept.
template <class P> struct Arithmetic { using type = float; };
template <> struct Arithmetic<double> { using type = double; };

// big: gradients beyond it count as it, since the rates hold squares, which must stay finite.
// tiny: rates and variances below it count as it, since they are divided by. (rules.py has the same table.)
template <class A> struct Bounds;
template <> struct Bounds<float> {
  static constexpr float tiny = 0x1p-100f, big = 0x1p60f;
};
template <> struct Bounds<double> {
  static constexpr double tiny = 0x1p-1000, big = 0x1p508;
};

// x * y + z: of floats rounded once; of doubles after each operation, for plain torch has no wider type to do it in.
VSGD_FN float fma(float x, float y, float z) { return fmaf(x, y, z); }
VSGD_FN double fma(double x, double y, double z) { return x * y + z; }

// at_least(NaN, floor) is NaN.
template <class A>
VSGD_FN A at_least(A x, A floor) { return floor > x ? floor : x; }
// The same, also on vectors (vec512.h), of which `at_least` is left out.
template <class A>
VSGD_FN A always_at_least(A x, A floor) { return at_least(x, floor); }

// Random bits for a number, and 1 where the upper 24 of them are below `kept`, which is one of 24 bits; else 0.
template <class A> struct WordOf { using type = uint32_t; };
template <class A>
VSGD_FN A one_below(uint32_t word, A kept) { return A(int32_t(word >> 8)) < kept ? A(1) : A(0); }

// Finite gradients are clamped to ±big; NaN and ±Inf give NaN, which stays in its own element.
template <class A>
VSGD_FN A bounded(A ghat) {
  A poison = ghat - ghat;
  ghat = Bounds<A>::big < ghat ? Bounds<A>::big : ghat;
  ghat = -Bounds<A>::big > ghat ? -Bounds<A>::big : ghat;
  return ghat + poison;
}

// Variances are clamped to what bounded gradients can have; NaN stays.
template <class A>
VSGD_FN A bounded_variance(A variance) {
  constexpr A most = Bounds<A>::big * Bounds<A>::big;
  return most < variance ? most : variance;
}

VSGD_FN float load(const float* p) { return *p; }
VSGD_FN double load(const double* p) { return *p; }

VSGD_FN float load(const bf16* p) { return bit_cast<float>(uint32_t(p->bits) << 16); }

VSGD_FN float load(const fp16* p) {
  uint32_t magnitude = p->bits & 0x7fffu, sign = uint32_t(p->bits & 0x8000u) << 16;
  uint32_t rebased = (magnitude << 13) + (112u << 23);
  uint32_t special = (magnitude << 13) | 0x7f800000u;  // Inf, NaN
  // A subnormal m means m 2^-24, which is m last places of 0.5: exact, and without subnormal arithmetic, which a process
  // may have switched off.
  uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>((126u << 23) + magnitude) - 0.5f);
  uint32_t bits = magnitude >= 0x7c00u ? special : rebased;
  bits = magnitude < 0x0400u ? subnormal : bits;
  return bit_cast<float>(bits | sign);
}

}  // namespace vsgd
