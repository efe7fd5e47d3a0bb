// Which instruction sets code is compiled for, beside the compiler's own, and which of them this processor has.
#pragma once

#ifdef __clang__  // which ignores the whole attribute where it names what clang does not know
#define VSGD_AVX512_FEATURES "fma,avx512f,avx512bw,avx512dq,avx512vl"
#else
#define VSGD_AVX512_FEATURES "fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif

#if defined(__GNUC__) && defined(__x86_64__)
#define VSGD_X86 1
#define VSGD_AVX2 __attribute__((target("avx2,fma")))
#define VSGD_AVX512 __attribute__((target(VSGD_AVX512_FEATURES)))
#else
#define VSGD_X86 0
#endif

// Compiles all functions from there on for AVX2, for AVX-512, and for that with byte permutations.
#define VSGD_PRAGMA_OF(text) _Pragma(#text)
#define VSGD_PRAGMA(text) VSGD_PRAGMA_OF(text)
#define VSGD_AVX2_FROM_HERE VSGD_PRAGMA(GCC target("avx2,fma"))
#define VSGD_AVX512_FROM_HERE VSGD_PRAGMA(GCC target(VSGD_AVX512_FEATURES))
#define VSGD_AVX512VBMI_FROM_HERE VSGD_PRAGMA(GCC target(VSGD_AVX512_FEATURES ",avx512vbmi"))

// Whether what is written by hand is compiled, which needs GCC's way to name the instruction set of a file.
#if VSGD_X86 && !defined(__clang__)
#define VSGD_BY_HAND 1
#else
#define VSGD_BY_HAND 0
#endif

namespace vsgd {

// avx512vbmi: AVX-512 with byte permutations, for which coded states are stepped by hand.
enum class Isa { automatic, baseline, avx2, avx512, avx512vbmi };

// The best instruction set of this processor.
Isa detect_isa();

// Of a function's versions for each instruction set that for one of them.
template <class Versions>
auto version_of(Isa isa) -> decltype(&Versions::baseline) {
#if VSGD_X86
  if (isa >= Isa::avx512) return Versions::avx512;
  if (isa == Isa::avx2) return Versions::avx2;
#endif
  return Versions::baseline;
}

}  // namespace vsgd
