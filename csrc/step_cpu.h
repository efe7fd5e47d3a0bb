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

// Steps all tensors in one parallel region; false where there is no such rule. rows, grads: [n]; hyper: [groups,
// Rule::hypers].
bool step_cpu(const std::string& rule, const Row* rows, const int64_t* grads, int64_t n, const int64_t* layouts,
              const double* hyper, Amp amp, Isa isa);

}  // namespace vsgd
