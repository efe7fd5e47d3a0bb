// Samples of gradients, added to their means and variances on the CPU, in one parallel region.
#include <torch/csrc/stable/ops.h>

#include "isa.h"
#include "step_cpu.h"

namespace vsgd {
namespace {

// Adds n elements of the number-th sample.
template <class P, class A>
VSGD_FN void add(const P* sample, A* mean, A* variance, int64_t n, int64_t number) {
  if (number == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) mean[i] = bounded(load(sample + i));
    return;
  }
  const Shares<A> shares(number);
  if (number == 2) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      A none = A(0);
      add_sample(bounded(load(sample + i)), mean[i], none, shares);
      variance[i] = none;
    }
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) add_sample(bounded(load(sample + i)), mean[i], variance[i], shares);
  }
}

template <class P, class A = typename Arithmetic<P>::type>
struct Add {
  static void baseline(const P* sample, A* mean, A* variance, int64_t n, int64_t number) {
    add(sample, mean, variance, n, number);
  }
#if VSGD_X86
  VSGD_AVX2 static void avx2(const P* sample, A* mean, A* variance, int64_t n, int64_t number) {
    add(sample, mean, variance, n, number);
  }
  VSGD_AVX512 static void avx512(const P* sample, A* mean, A* variance, int64_t n, int64_t number) {
    add(sample, mean, variance, n, number);
  }
#endif
};

// Adds a block of all of a tensor's samples, which are gathered where they are strided.
template <class P, class A = typename Arithmetic<P>::type>
void add_block(const SampleRow& row, int64_t address, int64_t count, const int64_t* layouts, int64_t begin, int64_t end,
               Isa isa) {
  const auto add = version_of<Add<P>>(isa);
  A* mean = reinterpret_cast<A*>(row.mean) + begin;
  A* variance = reinterpret_cast<A*>(row.variance) + begin;
  for (int64_t k = 0; k < row.added; ++k) {
    const P* sample = reinterpret_cast<const P*>(address) + k * row.stride;
    if (row.layout < 0) {
      add(sample + begin, mean, variance, end - begin, count + k + 1);
      continue;
    }
    P gathered[Blocks::kBlock];
    gather(sample, Layout(layouts + row.layout), kSampleOperand, begin, end - begin, gathered);
    add(gathered, mean, variance, end - begin, count + k + 1);
  }
}

// By dtype, as in batch.py's DTYPES.
constexpr decltype(&add_block<float>) add_by_dtype[] = {add_block<float>, add_block<double>, add_block<bf16>,
                                                        add_block<fp16>};

}  // namespace

void add_samples_cpu(const CpuSamples& fed) {
  constexpr int64_t kGrain = 16;  // blocks
  const Blocks blocks(fed.rows, fed.tensors);
  torch::stable::parallel_for(0, blocks.count(), kGrain, [&](int64_t first, int64_t last) {
    // A block stays in the cache while all samples are added.
    blocks.visit_each(first, last, [&](int64_t i, int64_t begin, int64_t end) {
      add_by_dtype[fed.rows[i].dtype](fed.rows[i], fed.samples[i], fed.counts[i], fed.layouts, begin, end, fed.isa);
    });
  });
}

}  // namespace vsgd
