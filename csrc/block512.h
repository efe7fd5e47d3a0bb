// One block of coded states in AVX-512 with byte permutations, by hand: of run_cpu.h's loops gcc makes two instructions
// where one shifts by a count, and twice as many to pack codes. The rules are rules.h's, on vectors, a few elements behind
// each other: gains are divided ahead of what infers with them, and parameters moved after that. Only for files that are
// compiled for that instruction set as a whole.
#pragma once

#include "codes512.h"

namespace vsgd {

VSGD_FN Vec load_vec(const float* p) { return Vec::load(p); }
template <class P>
VSGD_FN Vec load_vec(const P* p) {
  alignas(64) float numbers[Vec::size];
  for (int i = 0; i < Vec::size; ++i) numbers[i] = load(p + i);
  return Vec::load(numbers);
}

// What a block is given: its gradients, and of samples their variances, multiplied by `sign` and by its square, and the random
// words of rules that draw. kAsTheyAre: the gradients are floats, and `sign` is 1.
template <class Rule, bool kAsTheyAre>
struct Inputs512 {
  static constexpr int64_t variances = Rule::samples ? kCodes : 0;
  const float *ghat, *variance;
  alignas(64) uint32_t words[Rule::draws ? kCodes : 1];
  bool plain;  // whether no gradient need be bounded, and no variance is negative

  // Of the block that is `ahead` elements ahead.
  template <class P, class S>
  VSGD_FN void read(const Operands<P>& at, int64_t ahead, const S& s) {
    if constexpr (Rule::draws) draw_block_avx512(at.draw.from(at.block * kCodes + ahead), words);
    read_numbers(at.grad + ahead, at.variance + ahead, s.sign);
    // Most are small, which is soon seen.
    plain = all_below_two(1.0f, 1.0f) || all_below_two(kUnit, kUnit * kUnit);
  }

 private:
  template <class P>
  VSGD_FN void read_numbers(const P* grad, const float* variance_of_samples, const Vec& sign) {
    if constexpr (kAsTheyAre) {
      ghat = grad, variance = variance_of_samples;
    } else {
      for (int64_t i = 0; i < kCodes; i += Vec::size) (load_vec(grad + i) * sign).store(signed_ + i);
      for (int64_t i = 0; i < variances; i += Vec::size)
        (Vec::load(variance_of_samples + i) * sign * sign).store(signed_ + kCodes + i);
      ghat = signed_, variance = signed_ + kCodes;
    }
  }

  static constexpr float kUnit = 4.0f / Bounds<float>::big;  // in which half the bound is 2

  // The bits that are set in any of the numbers.
  VSGD_FN static __m512i seen(const float* numbers, int64_t n, float factor) {
    __m512i bits = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += Vec::size) {
      const Vec x = Vec::load(numbers + i) * factor;
      for (int part = 0; part < Vec::parts; ++part) bits = _mm512_or_si512(bits, x.bits(part));
    }
    return bits;
  }

  // Of numbers from 2 on, and of Inf and NaN, the second bit is set, and of what is negative the first.
  VSGD_FN bool all_below_two(float per_gradient, float per_variance) const {
    const __m512i in_gradients = seen(ghat, kCodes, per_gradient), in_variances = seen(variance, variances, per_variance);
    return !(_mm512_test_epi32_mask(in_gradients, broadcast(0x40000000u)) |
             _mm512_test_epi32_mask(in_variances, broadcast(0xc0000000u)));
  }

  alignas(64) float signed_[kAsTheyAre ? 1 : kCodes + variances];
};

// One plain block. Coder: how its states are stored.
template <class Rule, class P, class Coder, class Inputs>
class Block512 {
 public:
  using Scalars = typename Rule::template Scalars<Vec>;

  // kept: what the coder keeps from block to block.
  VSGD_FN Block512(const Operands<P>& at, const Inputs& inputs, typename Coder::Kept& kept)
      : at_(at), inputs_(inputs), coder_(at.state, at.words, at.noise.start(at.block, kStateNoise), kept) {}

  // Whether `run` may be called.
  VSGD_FN bool is_plain(const Unfloored& rates) const { return inputs_.plain && coder_.is_plain(rates); }

  // meanwhile() is called once.
  template <class Meanwhile>
  VSGD_FN void run(const Scalars& s, const Meanwhile& meanwhile) {
    coder_.open();
    infer(s);
    if (!Coder::moves_late) move_last(s);
    coder_.finish([&] {
      if (Coder::moves_late) move_last(s);
      meanwhile();
    });
  }

 private:
  // Elements that are not inferred yet, and such that are not moved yet.
  struct Loaded {
    Vec state[Rule::states], gain;
  };
  struct Inferred {
    Vec mean, aux;
  };
  // How many vectors of a block are not moved before all are inferred.
  static constexpr int kLast = Coder::moves_late ? 2 : 1;

  VSGD_FN void prefetch(int64_t turn) const {
    prefetch_turn(at_.param + turn);
    prefetch_turn(at_.grad + turn + kCodes);  // which are read a block ahead
    if (Rule::samples) prefetch_turn(at_.variance + turn + kCodes);
    coder_.prefetch(turn);
  }

  VSGD_FN Loaded load_ahead(const Scalars& s, int64_t i) {
    Loaded loaded;
    coder_.load(i, loaded.state);
    loaded.gain = Rule::gain(loaded.state, s);
    // Here, for gcc would divide where the gain is used.
    for (__m512& part : loaded.gain.part) asm volatile("" : "+v"(part));
    return loaded;
  }

  // Infers, moves all but the last, and codes all but the last turn, where there are no words to find.
  VSGD_FN void infer(const Scalars& s) {
    Loaded next = load_ahead(s, 0);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kCodes; i += Vec::size) {
      if (i % kTurn == 0) prefetch(i);
      Loaded own = next;
      if (i + Vec::size < kCodes) next = load_ahead(s, i + Vec::size);
      Given<Vec> given;
      if constexpr (Rule::draws) given.word = inputs_.words + i;
      if constexpr (Rule::samples) given.variance = Vec::load(inputs_.variance + i);
      const Vec aux = Rule::infer(Vec::load(inputs_.ghat + i), own.gain, own.state, s, given);
      coder_.store(i, own.state);
      inferred_[i / Vec::size] = {own.state[0], aux};
      if (i > 0 && i <= kCodes - kLast * Vec::size) move(i - Vec::size, s);
      if constexpr (!Coder::has_words) {
        if (i > 0 && i % kTurn == 0) coder_.code(i - kTurn);
      }
    }
  }

  VSGD_FN void move_last(const Scalars& s) const {
#pragma GCC unroll 2
    for (int64_t i = kCodes - kLast * Vec::size; i < kCodes; i += Vec::size) move(i, s);
  }
  VSGD_FN void move(int64_t i, const Scalars& s) const {
    const Inferred& inferred = inferred_[i / Vec::size];
    alignas(64) float masters[Vec::size];
    float* theta = masters;
    if constexpr (is_16_bit<P>) {
      load_masters(at_, i, Vec::size, masters);
    } else {
      theta = at_.param + i;
    }
    Rule::move(Vec::load(theta), inferred.mean, inferred.aux, s).store(theta);
    if constexpr (is_16_bit<P>) store_masters(at_, i, Vec::size, masters);
  }

  const Operands<P>& at_;
  const Inputs& inputs_;
  Coder coder_;
  Inferred inferred_[kCodes / Vec::size];
};

}  // namespace vsgd
