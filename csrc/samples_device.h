// The CUDA kernel that adds samples, for host and device, as step_device.h's: a block adds one chunk of one tensor's samples,
// a warp kTile elements at a time.
#pragma once

#include "lanes.h"
#include "samples.h"

namespace vsgd {

struct SampleStep {
  const SampleRow* rows;        // [tensors]
  const int64_t* samples;       // [tensors] addresses
  const int64_t* counts;        // [tensors] how many there were before
  const int64_t* layouts;       // records of strided samples
  const int32_t* chunk_tensor;  // [chunks] the tensor that a chunk belongs to
  const int64_t* first_chunk;   // [tensors] the number of the tensor's first chunk
  int64_t chunks, chunk;        // how many, and elements of each
  int warps;                    // that take one
};

void add_samples_on_host(const SampleStep& step, int64_t dtype, Path path);
void add_samples_on_cuda(const SampleStep& step, int64_t dtype, Path path, int32_t device);

// Adds all samples to the elements of one lane of a tile.
template <class P, Path path, bool kWhole>
VSGD_FN void add_lane(const SampleRow& row, const Place<path>& at, int64_t address, int64_t count) {
  using A = typename Arithmetic<P>::type;
  Pack<A> mean{}, variance{};
  if (count > 0) mean = at.template load<kWhole, A>(row.mean, 0);
  if (count > 1) variance = at.template load<kWhole, A>(row.variance, 0);
  VSGD_NO_UNROLL for (int64_t k = 0; k < row.added; ++k) {
    const Pack<P> sample = at.template load<kWhole, P>(address, kSampleOperand, k * row.stride);
    const Shares<A> shares(count + k + 1);
    VSGD_UNROLL for (int j = 0; j < kEach; ++j) {
      const A ghat = bounded(load(&sample.at[j]));
      if (count + k == 0) {
        mean.at[j] = ghat;
      } else {
        add_sample(ghat, mean.at[j], variance.at[j], shares);
      }
    }
  }
  at.template store<kWhole, A>(row.mean, 0, mean);
  if (count + row.added > 1) at.template store<kWhole, A>(row.variance, 0, variance);
}

// What one warp of the block of one chunk does.
template <class P, Path path>
VSGD_FN void add_warp(const SampleStep& step, int64_t chunk, int warp) {
  const int64_t tensor = step.chunk_tensor[chunk];
  const SampleRow& all = step.rows[tensor];
  // Field by field, as step_device.h's fields_of.
  const SampleRow row{all.mean, all.variance, all.numel, all.dtype, all.layout, all.added, all.stride};
  const int64_t address = step.samples[tensor], count = step.counts[tensor];
  const int64_t begin = (chunk - step.first_chunk[tensor]) * step.chunk;
  const int64_t end = begin + step.chunk < row.numel ? begin + step.chunk : row.numel;
  for (int64_t first = begin + warp * kTile; first < end; first += step.warps * kTile) {
    each_lane([&](int lane) {
      const Place<path> at(row, step.layouts, first, lane);
      if (path == Path::aligned && first + kTile <= end) {
        add_lane<P, path, path == Path::aligned>(row, at, address, count);
      } else {
        add_lane<P, path, false>(row, at, address, count);
      }
    });
  }
}

// Calls run(Type<P>, PathOf<path>) for what is named.
template <class Run>
void dispatch_samples(int64_t dtype, Path path, const Run& run) {
  auto on_path = [&](auto sample) {
    with_path(path, [&](auto path_of) { run(sample, path_of); });
  };
  switch (dtype) {
    case 0: return on_path(Type<float>());
    case 1: return on_path(Type<double>());
    case 2: return on_path(Type<bf16>());
    default: return on_path(Type<fp16>());
  }
}

}  // namespace vsgd
