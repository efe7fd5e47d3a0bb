// One parallel region over the blocks of all tensors, by one rule; run_cpu.h is compiled for each instruction set. Each rule
// has a file that compiles this for it alone, for all together take minutes.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "isa.h"
#include "run_avx512.h"
#include "run_cpu.h"
#include "step_cpu.h"

namespace vsgd {
namespace {

template <class Rule, class P, Format format, class A = typename Arithmetic<P>::type>
struct Run {
  using Scalars = typename Rule::template Scalars<A>;
  using Function = void (*)(Operands<P>, int64_t, const Scalars&);

  static void baseline(Operands<P> at, int64_t n, const Scalars& s) { run<Rule, P, format>(at, n, s); }
#if VSGD_X86
  VSGD_AVX2 static void avx2(Operands<P> at, int64_t n, const Scalars& s) {
    at.draw_block = draw_block_avx2;
    run<Rule, P, format>(at, n, s);
  }
  VSGD_AVX512 static void avx512(Operands<P> at, int64_t n, const Scalars& s) {
    at.draw_block = draw_block_avx512;
    run<Rule, P, format>(at, n, s);
  }
  static constexpr bool by_hand = VSGD_BY_HAND && kByHand<format>;
  static void avx512vbmi(Operands<P> at, int64_t n, const Scalars& s) {
    if constexpr (by_hand) {
      const int64_t whole = n / kCodes * kCodes;
      run_avx512<Rule, P, format>(at, whole, s);
      at.template advance<typename StoredState<format, A>::type>(whole, Rule::states);
      n -= whole;
    }
    avx512(at, n, s);
  }
#endif

  static Function of(Isa isa) {
#if VSGD_X86
    if (isa == Isa::avx512vbmi && by_hand) return avx512vbmi;
#endif
    return version_of<Run>(isa);
  }
};

// The words from the block of element i on.
template <class Rule>
uint32_t* words_of(const Row& row, int64_t i) {
  return reinterpret_cast<uint32_t*>(row.blocks) + (row.blocks ? i / kCodes * Rule::states : 0);
}

// `low` from element i on.
template <class P>
void* low_of(const Row& row, int64_t i) {
  return reinterpret_cast<char*>(row.low) + (is_16_bit<P> ? i * row.extra / 8 : 0);
}

void copy_low(char* to, const char* from, int64_t bytes) {
  if (bytes == 2) memcpy(to, from, 2);
  if (bytes == 1) *to = *from;
}

// A strided tensor's elements are gathered into a tile, stepped there by the same loop, and scattered.
template <class Rule, class P, Format format, class A = typename Arithmetic<P>::type>
void run_strided(const Row& row, int64_t gradient, const Layout& layout, int64_t begin, int64_t end,
                 const typename Rule::template Scalars<A>& scalars, Noise noise, Draw draw,
                 typename Run<Rule, P, format>::Function run) {
  using S = typename StoredState<format, A>::type;
  constexpr int64_t kTile = 256;
  static_assert(kTile % kCodes == 0, "a tile is whole blocks");
  P param[kTile], grad[kTile];
  int16_t low[kTile];
  constexpr int kStates = kStored<Rule, format>;
  S state[kStates][kTile];
  A variance[kTile];
  Operands<P> tile{param, low, int(row.extra), grad, {}, nullptr, noise, draw, variance, 0};
  const int64_t low_bytes = is_16_bit<P> ? row.extra / 8 : 0;
  char *low_tile = reinterpret_cast<char*>(low), *low_home = reinterpret_cast<char*>(row.low);
  S* home[kStates];
  for (int k = 0; k < kStates; ++k) {
    tile.state[k] = state[k];
    home[k] = reinterpret_cast<S*>(row.state[k]);
  }
  constexpr int kVariance = kFirstState + kStates;
  Walk in(layout, kVariance + Rule::samples, begin), out = in;
  for (int64_t i = begin; i < end; i += kTile) {
    int64_t n = std::min(kTile, end - i);
    for (int64_t j = 0; j < n; ++j, in.next()) {
      param[j] = reinterpret_cast<const P*>(row.param)[in.offset[0]];
      grad[j] = reinterpret_cast<const P*>(gradient)[in.offset[1]];
      copy_low(low_tile + j * low_bytes, low_home + in.offset[2] * low_bytes, low_bytes);
      for (int k = 0; k < kStates; ++k) state[k][j] = home[k][in.offset[kFirstState + k]];
      if (Rule::samples) variance[j] = reinterpret_cast<const A*>(row.variance)[in.offset[kVariance]];
    }
    tile.block = i / kCodes;
    tile.words = words_of<Rule>(row, i);
    run(tile, n, scalars);
    for (int64_t j = 0; j < n; ++j, out.next()) {
      reinterpret_cast<P*>(row.param)[out.offset[0]] = param[j];
      copy_low(low_home + out.offset[2] * low_bytes, low_tile + j * low_bytes, low_bytes);
      for (int k = 0; k < kStates; ++k) home[k][out.offset[kFirstState + k]] = state[k][j];
    }
  }
}

// The scalars of a step, kept while consecutive tensors share them: two pow cost as much as 64 elements.
template <class Rule>
class ScalarsOf {
 public:
  ScalarsOf(const double* hyper, double grad_scale) : hyper_(hyper), grad_scale_(grad_scale) {}

  template <class A>
  const typename Rule::template Scalars<A>& at(const Row& row) {
    auto& kept = std::get<Kept<A>>(kept_);
    const float t = *reinterpret_cast<const float*>(row.step);
    if (kept.group != row.group || kept.t != t) {
      kept = {row.group, t, Rule::template scalars<A>(t, hyper_ + row.group * Rule::hypers)};
      kept.scalars.sign = A(kept.scalars.sign / grad_scale_);
    }
    return kept.scalars;
  }

 private:
  template <class A>
  struct Kept {
    int64_t group = -1;
    float t = 0;
    typename Rule::template Scalars<A> scalars;
  };
  const double* hyper_;
  const double grad_scale_;
  std::tuple<Kept<float>, Kept<double>> kept_;
};

template <class Rule, class P, Format format>
void run_row(const Row& row, int64_t gradient, const int64_t* layouts, int64_t begin, int64_t end,
             ScalarsOf<Rule>& scalars_of, Isa isa) {
  using A = typename Arithmetic<P>::type;
  using S = typename StoredState<format, A>::type;
  const auto& scalars = scalars_of.template at<A>(row);
  const auto run = Run<Rule, P, format>::of(isa);
  const Noise noise = Noise::of(row.key, float(scalars.t));
  const Draw draw = Draw::of(row.seed, row.place, float(scalars.t));
  if (row.layout >= 0)
    return run_strided<Rule, P, format>(row, gradient, Layout(layouts + row.layout), begin, end, scalars, noise, draw,
                                        run);
  Operands<P> at{reinterpret_cast<P*>(row.param) + begin,
                 low_of<P>(row, begin),
                 int(row.extra),
                 reinterpret_cast<const P*>(gradient) + begin,
                 {},
                 words_of<Rule>(row, begin),
                 noise,
                 draw,
                 reinterpret_cast<const A*>(row.variance) + begin,
                 begin / kCodes};
  for (int k = 0; k < Rule::states; ++k) at.state[k] = reinterpret_cast<S*>(row.state[k]) + begin;
  run(at, end - begin, scalars);
}

template <class Rule>
using RunRow = void (*)(const Row&, int64_t, const int64_t*, int64_t, int64_t, ScalarsOf<Rule>&, Isa);

// By format, and by dtype and format; double has no other format.
template <class Rule>
using RunRows = std::array<RunRow<Rule>, 4>;
template <class Rule, class P>
constexpr RunRows<Rule> run_rows_of = {run_row<Rule, P, Format::fp32>, run_row<Rule, P, Format::bf16>,
                                       run_row<Rule, P, Format::q8>, run_row<Rule, P, Format::packed16>};
template <class Rule>
constexpr RunRows<Rule> run_rows[] = {run_rows_of<Rule, float>, {run_row<Rule, double, Format::fp32>},
                                      run_rows_of<Rule, bf16>, run_rows_of<Rule, fp16>};

// Small tensors lie anywhere: what the one after next begins with is asked for early.
constexpr int64_t kAhead = 2;

template <class Rule>
void prefetch(const Row& row, int64_t gradient) {
#ifdef __GNUC__
  __builtin_prefetch(reinterpret_cast<const void*>(row.step));
  __builtin_prefetch(reinterpret_cast<const void*>(row.param), 1);
  __builtin_prefetch(reinterpret_cast<const void*>(gradient));
  for (int k = 0; k < Rule::states; ++k) __builtin_prefetch(reinterpret_cast<const void*>(row.state[k]), 1);
#endif
}

}  // namespace

template <class Rule>
void step_rule(const CpuStep& step) {
  const Row* rows = step.rows;
  const int64_t n = step.tensors;
  const double grad_scale = step.amp.grad_scale ? *step.amp.grad_scale : 1.0;
  for (int64_t i = 0; i < n; ++i) *reinterpret_cast<float*>(rows[i].step) += 1.0f;

  constexpr int64_t kGrain = 16;  // blocks; a thread costs more than it saves below some 16,000 elements
  Blocks blocks(rows, n);
  torch::stable::parallel_for(0, blocks.count(), kGrain, [&](int64_t first, int64_t last) {
    ScalarsOf<Rule> scalars_of(step.hyper, grad_scale);
    blocks.visit(first, last, [&](int64_t i, int64_t begin, int64_t end) {
      if (i + kAhead < n) prefetch<Rule>(rows[i + kAhead], step.grads[i + kAhead]);
      run_rows<Rule>[rows[i].dtype][rows[i].format](rows[i], step.grads[i], step.layouts, begin, end, scalars_of, step.isa);
    });
  });
}

}  // namespace vsgd
