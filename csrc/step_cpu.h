// The CPU kernel's entry.
#pragma once

#include <cstdint>
#include <string>

#include "chunks.h"

namespace vsgd {

// avx512vbmi: AVX-512 with byte permutations, for which coded states are stepped by hand.
enum class Isa { automatic, baseline, avx2, avx512, avx512vbmi };

// The best instruction set of this processor.
Isa detect_isa();

struct CpuStep {
  const Row* rows;         // [tensors]
  const int64_t* grads;    // [tensors] addresses
  int64_t tensors;
  const int64_t* layouts;  // records of strided tensors
  const double* hyper;     // [groups, Rule::hypers]
  Amp amp;
  Isa isa;
};

// Steps all tensors in one parallel region; false where there is no such rule.
bool step_cpu(const std::string& rule, CpuStep step);

// The same for one rule, once the instruction set is known and no infinity was found; in a file of each rule's own.
template <class Rule>
void step_rule(const CpuStep& step);

}  // namespace vsgd
