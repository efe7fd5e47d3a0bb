// Blocks of coded states by hand: run_avx512.cpp.
#pragma once

#include "operands.h"
#include "rules.h"
#include "states.h"

namespace vsgd {

// What run_avx512 does, as run_cpu.h does, to the bit.
template <Format format>
constexpr bool kByHand = format != Format::fp32;

// Steps n elements, whole blocks, whose states are coded.
template <class Rule, class P, Format format>
void run_avx512(const Operands<P>& at, int64_t n, const typename Rule::template Scalars<float>& s);

}  // namespace vsgd
