// The norm of a step's gradients, on the CPU.
#pragma once

#include <cstdint>

#include "chunks.h"
#include "step_cpu.h"

namespace vsgd {

struct NormOf {
  const Row* rows;         // [tensors]
  const int64_t* grads;    // [tensors] addresses
  int64_t tensors;
  const int64_t* layouts;  // records of strided tensors
  Isa isa;
};

// The 2-norm of all gradients together. Squares are added up as doubles, in an order that neither threads nor the
// instruction set change.
double norm_cpu(NormOf of);

}  // namespace vsgd
