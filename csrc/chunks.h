// A list of tensors as the kernels see it: rows of addresses, cut into blocks that threads share evenly.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "numbers.h"

namespace vsgd {

constexpr int kMaxStates = 4;

// One row a tensor; table.py writes it in this order, as int64. The gradients, which move from step to step, are a list
// of addresses beside it.
struct Row {
  int64_t param, low, step;  // addresses; low is 0 where the parameter has none
  int64_t numel;
  int64_t dtype;   // index in batch.py's DTYPES
  int64_t group;   // row of the hyper table
  int64_t layout;  // offset of its record in `layouts`, or -1: every operand runs over the same dense memory
  int64_t format;  // of its states: states.h's Format
  int64_t extra;   // bits of `low`, 0 where there is none: formats.h's `extra`
  int64_t blocks;  // address of the words of blocks, [blocks, states], or 0
  int64_t key;     // noise.py's tensor_key
  int64_t seed, place;  // of philox.py
  int64_t variance;  // address of the samples' variances, or 0
  int64_t state[kMaxStates];  // addresses; where one tensor holds all states, that of each
};
constexpr int kFirstState = 3;  // operand of the first state in a layout record
constexpr int kColumns = sizeof(Row) / sizeof(int64_t);

// Scales of a mixed-precision step; null where there is none.
struct Amp {
  const float* grad_scale;
  const float* found_inf;
};

// A layout record: number of dimensions, sizes, then the strides of param, grad, low, each state, and the
// variance where the rule takes one.
struct Layout {
  int64_t dims;
  const int64_t *sizes, *strides;
  VSGD_FN explicit Layout(const int64_t* record) : dims(record[0]), sizes(record + 1), strides(record + 1 + dims) {}
  VSGD_FN const int64_t* of(int operand) const { return strides + operand * dims; }
};

// Walks the elements of a strided tensor in order; `offset[o]` is where operand o has the current one.
class Walk {
 public:
  Walk(const Layout& layout, int operands, int64_t element) : layout_(layout), operands_(operands), index_(layout.dims) {
    for (int64_t d = layout.dims - 1; d >= 0; --d) {
      index_[d] = element % layout.sizes[d];
      element /= layout.sizes[d];
      for (int o = 0; o < operands; ++o) offset[o] += index_[d] * layout.of(o)[d];
    }
  }

  void next() {
    for (int64_t d = layout_.dims - 1; d >= 0; --d) {
      bool wraps = ++index_[d] == layout_.sizes[d];
      int64_t move = wraps ? 1 - layout_.sizes[d] : 1;
      for (int o = 0; o < operands_; ++o) offset[o] += move * layout_.of(o)[d];
      if (!wraps) return;
      index_[d] = 0;
    }
  }

  int64_t offset[kFirstState + kMaxStates + 1] = {};

 private:
  const Layout layout_;
  const int operands_;
  std::vector<int64_t> index_;
};

// The n elements of one operand of a strided tensor from `begin` on.
template <class P>
void gather(const P* from, const Layout& layout, int operand, int64_t begin, int64_t n, P* to) {
  Walk walk(layout, operand + 1, begin);
  for (int64_t i = 0; i < n; ++i, walk.next()) to[i] = from[walk.offset[operand]];
}

// Calls visit(i, begin, end) over elements [begin, end) of tensor i, in order, for the blocks [first, last) of all.
class Blocks {
 public:
  static constexpr int64_t kBlock = 1024;  // elements

  // AnyRow: one with `numel`.
  template <class AnyRow>
  Blocks(const AnyRow* rows, int64_t n) : numel_(n), start_(n + 1, 0) {
    for (int64_t i = 0; i < n; ++i) {
      numel_[i] = rows[i].numel;
      start_[i + 1] = start_[i] + (numel_[i] + kBlock - 1) / kBlock;
    }
  }

  int64_t count() const { return start_.back(); }

  template <class Visit>
  void visit(int64_t first, int64_t last, const Visit& visit) const {
    int64_t i = std::upper_bound(start_.begin(), start_.end(), first) - start_.begin() - 1;
    for (; first < last; first = start_[++i]) {
      int64_t begin = (first - start_[i]) * kBlock;
      int64_t end = std::min((std::min(last, start_[i + 1]) - start_[i]) * kBlock, numel_[i]);
      if (begin < end) visit(i, begin, end);
    }
  }

  // The same, of one block at a time.
  template <class Visit>
  void visit_each(int64_t first, int64_t last, const Visit& visit_block) const {
    visit(first, last, [&](int64_t i, int64_t begin, int64_t end) {
      for (; begin < end; begin += kBlock) visit_block(i, begin, std::min(begin + kBlock, end));
    });
  }

 private:
  std::vector<int64_t> numel_, start_;
};

}  // namespace vsgd
