// The norm of a step's gradients: a sum of squares for each block, in one parallel region.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "isa.h"
#include "step_cpu.h"

namespace vsgd {
namespace {

constexpr int kLanes = 32;  // with 16 gcc unrolls the loop over them and leaves it scalar

// The sum of n squares: of each kLanes-th in a lane of its own, and then of the lanes.
template <class P>
VSGD_FN double squares(const P* x, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const double v = load(x + i + j);
      lanes[j] += v * v;
    }
  for (int j = 0; i + j < n; ++j) {
    const double v = load(x + i + j);
    lanes[j] += v * v;
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

template <class P>
struct Squares {
  static double baseline(const P* x, int64_t n) { return squares(x, n); }
#if VSGD_X86
  VSGD_AVX2 static double avx2(const P* x, int64_t n) { return squares(x, n); }
  VSGD_AVX512 static double avx512(const P* x, int64_t n) { return squares(x, n); }
#endif
};

// Of a block of a gradient, which is gathered where it is strided.
template <class P>
double squares_of(const Row& row, int64_t gradient, const int64_t* layouts, int64_t begin, int64_t end, Isa isa) {
  const P* grad = reinterpret_cast<const P*>(gradient);
  const auto squares = version_of<Squares<P>>(isa);
  if (row.layout < 0) return squares(grad + begin, end - begin);
  P gathered[Blocks::kBlock];
  gather(grad, Layout(layouts + row.layout), 1, begin, end - begin, gathered);
  return squares(gathered, end - begin);
}

// By dtype, as in batch.py's DTYPES.
constexpr decltype(&squares_of<float>) squares_by_dtype[] = {squares_of<float>, squares_of<double>, squares_of<bf16>,
                                                             squares_of<fp16>};

}  // namespace

double norm_cpu(const CpuBatch& batch) {
  constexpr int64_t kGrain = 32;  // blocks
  const Blocks blocks(batch.rows, batch.tensors);
  std::vector<double> sums(blocks.count());
  torch::stable::parallel_for(0, blocks.count(), kGrain, [&](int64_t first, int64_t last) {
    double* sum = sums.data() + first;
    blocks.visit_each(first, last, [&](int64_t i, int64_t begin, int64_t end) {
      *sum++ = squares_by_dtype[batch.rows[i].dtype](batch.rows[i], batch.grads[i], batch.layouts, begin, end, batch.isa);
    });
  });
  return std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0));
}

}  // namespace vsgd
