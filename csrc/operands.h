// Operands of a run of elements on the CPU, and the masters of 16-bit parameters among them.
#pragma once

#include "chunks.h"
#include "draw.h"
#include "formats.h"

namespace vsgd {

// Where the operands of a run of elements begin, and what is random in it. The run begins with a block of kCodes elements.
template <class P>
struct Operands {
  P* param;
  void* low;
  int extra;  // bits of `low`
  const P* grad;
  void* state[kMaxStates];
  uint32_t* words;  // of the blocks, where the format has them
  Noise noise;
  Draw draw;  // of rules that draw
  const typename Arithmetic<P>::type* variance;  // of rules that take samples
  int64_t block;  // number in its tensor
  DrawBlock draw_block = nullptr;  // by hand, where there is such for the instruction set

  // On by n elements, which are whole blocks; S: an element of a state in memory. In place: of a copy made anew for each
  // block, gcc keeps more in registers than there are.
  template <class S>
  VSGD_FN void advance(int64_t n, int states) {
    param += n;
    if (is_16_bit<P>) low = static_cast<char*>(low) + n * extra / 8;
    grad += n;
    for (int k = 0; k < states; ++k) state[k] = static_cast<S*>(state[k]) + n;
    words += n / kCodes * states;
    variance += n;
    block += n / kCodes;
  }
};

// The masters of 16-bit parameters [first, first + n) of a block.
template <class P>
VSGD_FN void load_masters(const Operands<P>& at, int64_t first, int64_t n, float* __restrict masters) {
  const P* param = at.param + first;
  if (at.extra == 16) {
    const int16_t* low = static_cast<const int16_t*>(at.low) + first;
    for (int64_t i = 0; i < n; ++i) masters[i] = load_param(param + i, low[i]);
  } else if (at.extra == 8) {
    const int8_t* low = static_cast<const int8_t*>(at.low) + first;
    for (int64_t i = 0; i < n; ++i) masters[i] = load_param(param + i, low[i] * 256);
  } else {
    for (int64_t i = 0; i < n; ++i) masters[i] = load_param(param + i, 0);
  }
}
template <class P>
VSGD_FN void store_masters(const Operands<P>& at, int64_t first, int64_t n, const float* masters) {
  P* __restrict param = at.param + first;
  const uint32_t start = at.extra == 16 ? 0u : at.noise.start(at.block, kMasterNoise);
  if (at.extra == 16) {
    int16_t* __restrict low = static_cast<int16_t*>(at.low) + first;
    for (int64_t i = 0; i < n; ++i) low[i] = int16_t(store_param(param + i, masters[i], 16, 0u));
  } else if (at.extra == 8) {
    int8_t* __restrict low = static_cast<int8_t*>(at.low) + first;
    for (int64_t i = 0; i < n; ++i)
      low[i] = int8_t(store_param(param + i, masters[i], 8, random_of(start, first + i)) >> 8);
  } else {
    for (int64_t i = 0; i < n; ++i) store_param(param + i, masters[i], 0, random_of(start, first + i));
  }
}

}  // namespace vsgd
