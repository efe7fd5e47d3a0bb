// What SampleVSGD is fed between two steps: the mean and the variance of samples, updated by one sample after the other
// (Welford), in reference.py's names. For host and device.
#pragma once

#include "chunks.h"

namespace vsgd {

// One row a tensor; table.py writes it in this order, as int64. Where the samples are, and how many there were before, are
// lists beside it. A mean and its variance lie alike in memory and without gaps.
struct SampleRow {
  int64_t mean, variance;  // addresses
  int64_t numel;
  int64_t dtype;   // of the samples: index in batch.py's DTYPES
  int64_t layout;  // offset of the record, of mean and sample, in `layouts`, or -1: a sample lies as its mean does
  int64_t added, stride;  // how many are added, and how many elements they are apart
};
constexpr int kSampleColumns = sizeof(SampleRow) / sizeof(int64_t);
constexpr int kSampleOperand = 1;  // of a layout record

// How much the n-th sample counts, and what came before it.
template <class A>
struct Shares {
  A own, kept;
  VSGD_FN explicit Shares(int64_t n) : own(A(1.0 / double(n))), kept(A(1.0 - double(own))) {}
};

// Adds the n-th sample of an element, from the second on; the first is the mean, and leaves no variance to be read or written.
template <class A>
VSGD_FN void add_sample(A ghat, A& mean, A& variance, const Shares<A>& share) {
  A d = ghat - mean;
  mean = fma(share.own, d, mean);
  variance = share.kept * fma(share.own * d, d, variance);
}

}  // namespace vsgd
