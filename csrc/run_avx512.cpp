// Runs of blocks of coded states in AVX-512 with byte permutations. Blocks that are not plain, which are rare, are left to
// run_cpu.h's loops: those with NaN, with gradients that have to be bounded, or with rates that may have to be floored, as
// all may in the first step.
#include "isa.h"

#if VSGD_BY_HAND
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

VSGD_AVX512VBMI_FROM_HERE  // and not before, for the headers above have functions that others share

#include "block512.h"
#include "packed512.h"
#include "run_avx512.h"

// gcc 12 warns of variables in its own header (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace vsgd {
namespace {

template <class Rule, Format> struct CoderOf;
template <class Rule> struct CoderOf<Rule, Format::bf16> { using type = SeparateCoder<Rule, Bf16Codes>; };
template <class Rule> struct CoderOf<Rule, Format::q8> { using type = SeparateCoder<Rule, Q8Codes>; };
template <class Rule> struct CoderOf<Rule, Format::packed16> { using type = PackedCoder<Rule>; };

// Scalars for vectors: all their members are of the arithmetic type.
template <class Rule>
typename Rule::template Scalars<Vec> splat(const typename Rule::template Scalars<float>& s) {
  constexpr int count = sizeof(s) / sizeof(float);
  typename Rule::template Scalars<Vec> vectors;
  static_assert(sizeof(vectors) == count * sizeof(Vec), "scalars are of the arithmetic type");
  float one[count];
  Vec each[count];
  memcpy(one, &s, sizeof(one));
  for (int i = 0; i < count; ++i) each[i] = Vec(one[i]);
  memcpy(&vectors, each, sizeof(vectors));
  return vectors;
}

template <class Rule, class P, Format format, bool kAsTheyAre>
void run_blocks(const Operands<P>& at, int64_t n, const typename Rule::template Scalars<float>& scalars) {
  using Coder = typename CoderOf<Rule, format>::type;
  using S = typename StoredState<format, float>::type;
  using Inputs = Inputs512<Rule, kAsTheyAre>;
  const auto s = splat<Rule>(scalars);
  const Unfloored unfloored(Rule::unfloored(scalars));
  Inputs inputs;
  inputs.read(at, 0, s);
  typename Coder::Kept kept;
  Operands<P> here = at;
  for (int64_t left = n; left > 0; left -= kCodes, here.template advance<S>(kCodes, Rule::states)) {
    const int64_t next = left > kCodes ? kCodes : 0;
    const auto read_next = [&] { inputs.read(here, next, s); };
    Block512<Rule, P, Coder, Inputs> block(here, inputs, kept);
    if (block.is_plain(unfloored)) {
      block.run(s, read_next);
    } else {
      run_block<Rule, P, format, true>(here, kCodes, scalars);
      read_next();
    }
  }
  kept.code();
}

}  // namespace

template <class Rule, class P, Format format>
void run_avx512(const Operands<P>& at, int64_t n, const typename Rule::template Scalars<float>& scalars) {
  if (n == 0) return;
  if constexpr (std::is_same_v<P, float>) {
    if (scalars.sign == 1.0f) return run_blocks<Rule, P, format, true>(at, n, scalars);
  }
  run_blocks<Rule, P, format, false>(at, n, scalars);
}

// Has it compiled for all that is run by hand, by naming it.
template <class Rule, class P, Format format>
void name_for() {
  if constexpr (kByHand<format>) {
    const volatile auto named = &run_avx512<Rule, P, format>;
    (void)named;
  }
}
template <class Rule, class P>
void name_for_each_format() {
  name_for<Rule, P, Format::bf16>(), name_for<Rule, P, Format::q8>(), name_for<Rule, P, Format::packed16>();
}
template <class... Each>
void name_for_all(RuleList<Each...>) {
  ((name_for_each_format<Each, float>(), name_for_each_format<Each, bf16>(), name_for_each_format<Each, fp16>()), ...);
}
template void name_for_all(Rules);

}  // namespace vsgd
#endif
