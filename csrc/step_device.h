// The CUDA kernels' bodies, for host and device: no barrier is needed, so the host can run the same blocks one after the
// other, and the tests compare what they compute without a GPU.
//
// A launch steps all tensors of one dtype and path. A block steps one chunk of one tensor, a warp kTile elements at a time.
#pragma once

#include <cstdint>
#include <string>

#include "rules.h"
#include "tile.h"

namespace vsgd {

// Which instantiation a launch takes.
struct Kind {
  std::string rule;
  int64_t dtype;  // index in batch.py's DTYPES
  Path path;
  Format format;
};

struct Step {
  const Row* rows;              // [tensors]
  const int64_t* grads;         // [tensors] addresses
  const int64_t* layouts;       // records of strided tensors
  const int32_t* chunk_tensor;  // [chunks] the tensor that a chunk belongs to
  const int64_t* first_chunk;   // [tensors] the number of the tensor's first chunk
  const int64_t* scalar_row;    // [tensors] the tensor's entry of `scalars`
  const void* scalars;          // Rule::Scalars<A>
  Amp amp;
  int64_t chunks, chunk;  // how many, and elements of each
  int warps;              // that take one
};

// What precedes a step whose counts are on the device.
struct Count {
  const Row* rows;      // [tensors]
  const double* hyper;  // [groups, Rule::hypers]
  void* scalars;        // [tensors] Rule::Scalars<A>
  const float* found_inf;
  int64_t tensors;
};

// All are false where there is no such rule.
bool step_on_host(const Step& step, const Kind& kind);
bool count_on_host(const Count& count, const Kind& kind);
bool step_on_cuda(const Step& step, const Kind& kind, int32_t device);
bool count_on_cuda(const Count& count, const Kind& kind, int32_t device);

// A copy field by field: of addresses that it copies as a whole nvcc does not see that they are the device's memory's, and
// compiles generic accesses.
VSGD_FN Row fields_of(const Row& row) {
  Row copy{row.param, row.low,  row.step, row.numel,  row.dtype, row.group, row.layout, row.format, row.extra, row.blocks,
           row.key,   row.seed, row.place, row.variance, {}};
  VSGD_UNROLL for (int k = 0; k < kMaxStates; ++k) copy.state[k] = row.state[k];
  return copy;
}

// What one warp of the block of one chunk does.
template <class Rule, class P, Format format, Path path>
VSGD_FN void step_warp(const Step& step, int64_t chunk, int warp) {
  using A = typename Arithmetic<P>::type;
  if (step.amp.found_inf && *step.amp.found_inf != 0.0f) return;
  const int64_t tensor = step.chunk_tensor[chunk];
  const Row row = fields_of(step.rows[tensor]);
  const int64_t gradient = step.grads[tensor];
  auto s = static_cast<const typename Rule::template Scalars<A>*>(step.scalars)[step.scalar_row[tensor]];
  if (step.amp.grad_scale) s.sign = A(double(s.sign) / double(*step.amp.grad_scale));
  const Draw draw = Rule::draws ? Draw::of(row.seed, row.place, float(s.t)) : Draw();
  const Noise noise = format == Format::fp32 && !is_16_bit<P> ? Noise() : Noise::of(row.key, float(s.t));
  const int64_t begin = (chunk - step.first_chunk[tensor]) * step.chunk;
  const int64_t end = begin + step.chunk < row.numel ? begin + step.chunk : row.numel;
  for (int64_t first = begin + warp * kTile; first < end; first += step.warps * kTile) {
    uint32_t* words = reinterpret_cast<uint32_t*>(row.blocks) + (kHasBlocks<format> ? first / kCodes * Rule::states : 0);
    if (path == Path::aligned && first + kTile <= end) {
      Tile<Rule, P, format, Path::aligned, true>{
          row, gradient, first, step.layouts, s, noise, draw.from(first), words}.run();
    } else {
      Tile<Rule, P, format, path, false>{
          row, gradient, first, step.layouts, s, noise, draw.from(first), words}.run();
    }
  }
}

// Counts a step of one tensor, and computes the scalars of that step.
template <class Rule, class P>
VSGD_FN void count_tensor(const Count& count, int64_t tensor) {
  using A = typename Arithmetic<P>::type;
  const Row& row = count.rows[tensor];
  float* counter = reinterpret_cast<float*>(row.step);
  const float t = *counter + 1.0f;
  static_cast<typename Rule::template Scalars<A>*>(count.scalars)[tensor] =
      Rule::template scalars<A>(t, count.hyper + row.group * Rule::hypers);
  if (!(count.found_inf && *count.found_inf != 0.0f)) *counter = t;
}

template <Format format> using FormatOf = Value<Format, format>;

// Calls run(Type<Rule>, Type<P>, FormatOf<format>, PathOf<path>) for what `kind` names; false where there is no such rule.
template <class Run>
bool dispatch(const Kind& kind, const Run& run) {
  auto on_path = [&](auto rule, auto param, auto format) {
    return with_path(kind.path, [&](auto path) { return run(rule, param, format, path); });
  };
  auto with_format = [&](auto rule, auto param) {
    if (kind.format == Format::bf16) return on_path(rule, param, FormatOf<Format::bf16>());
    if (kind.format == Format::q8) return on_path(rule, param, FormatOf<Format::q8>());
    if (kind.format == Format::packed16) return on_path(rule, param, FormatOf<Format::packed16>());
    return on_path(rule, param, FormatOf<Format::fp32>());
  };
  auto with_dtype = [&](auto rule) {
    switch (kind.dtype) {
      case 0: return with_format(rule, Type<float>());
      case 1: return on_path(rule, Type<double>(), FormatOf<Format::fp32>());
      case 2: return with_format(rule, Type<bf16>());
      default: return with_format(rule, Type<fp16>());
    }
  };
  return Rules::with(kind.rule, with_dtype);
}

}  // namespace vsgd
