// The CPU kernels' entries.
#pragma once

#include <cstdint>
#include <string>

#include "chunks.h"
#include "isa.h"
#include "samples.h"

namespace vsgd {

struct CpuBatch {
  const Row* rows;         // [tensors]
  const int64_t* grads;    // [tensors] addresses
  int64_t tensors;
  const int64_t* layouts;  // records of strided tensors
  Isa isa;                 // not automatic
};

struct CpuStep : CpuBatch {
  const double* hyper;  // [groups, Rule::hypers]
  Amp amp;
};

// Steps all tensors in one parallel region; false where there is no such rule.
bool step_cpu(const std::string& rule, const CpuStep& step);

// The same for one rule, where no infinity was found; in a file of each rule's own.
template <class Rule>
void step_rule(const CpuStep& step);

// The 2-norm of all gradients together. Squares are added up as doubles, in an order that neither threads nor the
// instruction set change.
double norm_cpu(const CpuBatch& batch);

struct CpuSamples {
  const SampleRow* rows;    // [tensors]
  const int64_t* samples;   // [tensors] addresses
  const int64_t* counts;    // [tensors] how many there were before
  int64_t tensors;
  const int64_t* layouts;   // records of strided samples
  Isa isa;                  // not automatic
};

// Adds samples to their means and variances.
void add_samples_cpu(const CpuSamples& fed);

}  // namespace vsgd
