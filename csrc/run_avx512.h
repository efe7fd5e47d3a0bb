// Blocks of coded states by hand: run_avx512.cpp.
#pragma once

#include "operands.h"
#include "rules.h"
#include "states.h"

namespace vsgd {

// Steps n elements, whole blocks, whose states are coded, as run_cpu.h does, to the bit. Of rules that do not draw.
template <class Rule, class P, Format format>
void run_avx512(const Operands<P>& at, int64_t n, const typename Rule::template Scalars<float>& s);

}  // namespace vsgd
