// What a warp of the CUDA kernels steps at a time, for host and device.
#pragma once

#include "formats.h"
#include "lanes.h"
#include "packed.h"
#include "philox.h"
#include "rules.h"

namespace vsgd {

// One tile of one tensor, by one warp.
template <class Rule, class P, Format format, Path path, bool kWhole>
struct Tile {
  using A = typename Arithmetic<P>::type;
  using S = typename StoredState<format, A>::type;
  static constexpr bool blocks = kHasBlocks<format>, packed = format == Format::packed16;

  const Row& row;
  const int64_t gradient, first;
  const int64_t* layouts;
  const typename Rule::template Scalars<A>& s;
  const Noise noise;
  const Draw draw;
  uint32_t* words;  // the block's

  struct Lane {
    A state[Rule::states][kEach];

    VSGD_FN void states_of(int j, A* each) const {
      VSGD_UNROLL for (int k = 0; k < Rule::states; ++k) each[k] = state[k][j];
    }
  };

  VSGD_FN Place<path> place(int lane) const { return Place<path>(row, layouts, first, lane); }
  VSGD_FN bool is_there(const Place<path>& at, int j) const { return kWhole || at.element(j) < row.numel; }

  // States as they are in memory, and the block's words.
  struct Raw {
    Pack<S> stored[kStored<Rule, format>];
    uint32_t word[Rule::states];
  };

  // All that is asked for before any of it is waited for: a branch, such as on a word's mark, keeps later loads back.
  VSGD_FN Raw load_states(const Place<path>& at) const {
    Raw raw;
    VSGD_UNROLL for (int k = 0; k < kStored<Rule, format>; ++k)
      raw.stored[k] = at.template load<kWhole, S>(row.state[k], kFirstState + k);
    VSGD_UNROLL for (int k = 0; k < Rule::states; ++k) raw.word[k] = blocks ? words[k] : 0u;
    return raw;
  }

  // All states, one after the other; which of them is a rate is known when this is compiled.
  template <int k = 0>
  VSGD_FN void decode(const Raw& raw, Lane& own) const {
    if constexpr (packed) {
      const auto block = Packed<Rule::states>::of(raw.word);
      const auto each = [&](const auto& read) {
        VSGD_UNROLL for (int j = 0; j < kEach; ++j) {
          float state[Rule::states];
          read(raw.stored[0].at[j].bits, state);
          VSGD_UNROLL for (int i = 0; i < Rule::states; ++i) own.state[i][j] = state[i];
        }
      };
      if (block.marked) {
        each([&](uint16_t code, float* state) { block.numbers_or_nan(code, state); });
      } else {
        each([&](uint16_t code, float* state) { block.numbers(code, state); });
      }
    } else if constexpr (k < Rule::states) {
      decode_state<k>(raw.stored[k], raw.word[k], own.state[k]);
      decode<k + 1>(raw, own);
    }
  }
  template <int k>
  VSGD_FN void decode_state(const Pack<S>& stored, uint32_t word, A* state) const {
    if constexpr (format == Format::q8) {
      constexpr bool rate = Rule::is_rate(k);
      const Q8 block = Q8::of<rate>(word);
      if (block.has_nan) {
        VSGD_UNROLL for (int j = 0; j < kEach; ++j) state[j] = block.template number_or_nan<rate>(stored.at[j]);
      } else {
        VSGD_UNROLL for (int j = 0; j < kEach; ++j) state[j] = block.template number<rate>(stored.at[j]);
      }
    } else {
      VSGD_UNROLL for (int j = 0; j < kEach; ++j) {
        if constexpr (format == Format::fp32) state[j] = stored.at[j];
        if constexpr (format == Format::bf16) state[j] = bf16_decode(stored.at[j]);
      }
    }
  }

  // The bits that round an element's states.
  VSGD_FN uint32_t random_bits(const Place<path>& at, int j) const {
    return random_of(noise.start(first / kCodes, kStateNoise), at.element(j) - first);
  }

  // Finds the words of the block's new codes, and stores both. Few blocks have NaN: without `nan` they are not looked for,
  // and false is returned, and nothing stored, where one comes up.
  template <bool nan>
  VSGD_FN bool store_block(PerLane<Lane>& lanes) const {
    uint32_t word[Rule::states], high = 0;
    Range range[Rule::states];
    VSGD_UNROLL for (int k = packed; k < Rule::states; ++k) {
      const auto number = [&](const Lane& own, const Place<path>&, int j) { return own.state[k][j]; };
      range[k] = range_of<nan>(lanes, Rule::is_rate(k), number);
      high = larger(high, range[k].high);
    }
    if constexpr (packed) {
      Packed<Rule::states>::find_rate_words(range, word);
      const auto rates = Packed<Rule::states>::of(word);
      range[0] = range_of<nan>(lanes, false, [&](const Lane& own, const Place<path>& at, int j) {
        float state[Rule::states];
        own.states_of(j, state);
        return rates.in_units(state, random_bits(at, j));
      });
      high = larger(high, range[0].high);
    }
    if (!nan && high > kInfinity) return false;
    find_words(range, word);
    // Every lane has read the old words: the exchange of ranges came after that.
    each_lane([&](int lane) {
      VSGD_UNROLL for (int k = 0; k < Rule::states; ++k)
        if (lane == k) words[k] = word[k];
    });
    each_lane([&](int lane) { store_states<nan>(place(lane), lanes[lane], word); });
    return true;
  }
  template <int k = 0>
  VSGD_FN void find_words(const Range* range, uint32_t* word) const {
    if constexpr (packed) {
      word[0] = q8_word<false>(range[0]);
    } else if constexpr (k < Rule::states) {
      word[k] = q8_word<Rule::is_rate(k)>(range[k]);
      find_words<k + 1>(range, word);
    }
  }
  // The range of a number of each of the block's elements.
  template <bool nan, class Number>
  VSGD_FN Range range_of(PerLane<Lane>& lanes, bool rate, const Number& number) const {
    PerLane<Range> ranges;
    each_lane([&](int lane) {
      const Place<path> at = place(lane);
      ranges[lane] = Range();
      VSGD_UNROLL for (int j = 0; j < kEach; ++j)
        if (is_there(at, j)) include<nan>(ranges[lane], number(lanes[lane], at, j), rate);
    });
    return range_of_lanes<nan>(ranges, rate);
  }
  // packed16 has NaN for all states of an element.
  VSGD_FN void spread_nan(Lane& own) const {
    VSGD_UNROLL for (int j = 0; j < kEach; ++j) {
      float state[Rule::states];
      own.states_of(j, state);
      if (has_nan<Rule::states>(state))
        VSGD_UNROLL for (int k = 0; k < Rule::states; ++k) own.state[k][j] = bit_cast<float>(kNan);
    }
  }

  // nan: whether any can be NaN.
  template <bool nan, int k = 0>
  VSGD_FN void store_states(const Place<path>& at, const Lane& own, const uint32_t* word) const {
    if constexpr (packed) {
      Pack<S> stored;
      const auto block = Packed<Rule::states>::of(word);
      VSGD_UNROLL for (int j = 0; j < kEach; ++j) {
        float state[Rule::states];
        own.states_of(j, state);
        const uint32_t random = random_bits(at, j);
        stored.at[j].bits = nan ? block.code_or_nan(state, random) : block.code(state, random);
      }
      at.template store<kWhole>(row.state[0], kFirstState, stored);
    } else if constexpr (k < Rule::states) {
      Pack<S> stored;
      VSGD_UNROLL for (int j = 0; j < kEach; ++j)
        stored.at[j] = encode<nan, k>(own.state[k][j], blocks ? word[k] : 0u, [&] { return random_bits(at, j); });
      at.template store<kWhole>(row.state[k], kFirstState + k, stored);
      store_states<nan, k + 1>(at, own, word);
    }
  }
  template <bool nan, int k, class Random>
  VSGD_FN S encode(A state, uint32_t word, const Random& random) const {
    if constexpr (format == Format::fp32) {
      return state;
    } else if constexpr (format == Format::bf16) {
      return bf16_encode(state, random());
    } else {
      constexpr bool rate = Rule::is_rate(k);
      const Q8 block = Q8::of<rate>(word);
      const uint32_t bits = q8_random<k>(random());
      return nan ? block.template code_or_nan<rate>(state, bits) : block.template code<rate>(state, bits);
    }
  }

  // What the lane's masters have beyond their parameters, in 65,536ths of a unit in the last place. All elements of a
  // tensor take the same branch.
  VSGD_FN void load_low(const Place<path>& at, int32_t* low) const {
    if (is_16_bit<P> && row.extra == 16) {
      const auto pack = at.template load<kWhole, int16_t>(row.low, 2);
      VSGD_UNROLL for (int j = 0; j < kEach; ++j) low[j] = pack.at[j];
    } else if (is_16_bit<P> && row.extra == 8) {
      const auto pack = at.template load<kWhole, int8_t>(row.low, 2);
      VSGD_UNROLL for (int j = 0; j < kEach; ++j) low[j] = pack.at[j] * 256;
    }
  }

  VSGD_FN void store_low(const Place<path>& at, const int32_t* low) const {
    if (is_16_bit<P> && row.extra == 16) {
      Pack<int16_t> pack;
      VSGD_UNROLL for (int j = 0; j < kEach; ++j) pack.at[j] = int16_t(low[j]);
      at.template store<kWhole>(row.low, 2, pack);
    } else if (is_16_bit<P> && row.extra == 8) {
      Pack<int8_t> pack;
      VSGD_UNROLL for (int j = 0; j < kEach; ++j) pack.at[j] = int8_t(low[j] >> 8);
      at.template store<kWhole>(row.low, 2, pack);
    }
  }

  // Steps the lane's elements, all but the storing of their states.
  VSGD_FN void update(int lane, Lane& own) const {
    const Place<path> at = place(lane);
    Pack<P> param = at.template load<kWhole, P>(row.param, 0);
    const Pack<P> grad = at.template load<kWhole, P>(gradient, 1);
    [[maybe_unused]] Pack<A> variance{};
    if constexpr (Rule::samples) variance = at.template load<kWhole, A>(row.variance, kFirstState + kStored<Rule, format>);
    [[maybe_unused]] Four four;  // words of the lane's four elements, or of one among others
    const Raw raw = load_states(at);
    int32_t low[kEach] = {};
    load_low(at, low);
    decode(raw, own);
    const uint32_t master_start = is_16_bit<P> ? noise.start(first / kCodes, kMasterNoise) : 0u;
    VSGD_UNROLL for (int j = 0; j < kEach; ++j) {
      A theta = load_param(&param.at[j], low[j]);
      A ghat = bounded(load(&grad.at[j]) * s.sign);
      A state[Rule::states];
      VSGD_UNROLL for (int k = 0; k < Rule::states; ++k) state[k] = own.state[k][j];
      Given<A> given;
      if constexpr (Rule::draws) {
        if (path != Path::aligned || j == 0) four = draw.words(uint32_t((at.element(j) - first) / 4));
        given.word = path == Path::aligned ? four.word[j] : four.at(at.element(j));
      }
      if constexpr (Rule::samples) given.variance = bounded_variance(variance.at[j] * s.sign * s.sign);
      const A aux = Rule::infer(ghat, Rule::gain(state, s), state, s, given);
      VSGD_UNROLL for (int k = 0; k < Rule::states; ++k) own.state[k][j] = state[k];
      const bool rounds = is_16_bit<P> && row.extra < 16;
      const uint32_t random = rounds ? random_of(master_start, at.element(j) - first) : 0u;
      low[j] = store_param(&param.at[j], Rule::move(theta, state[0], aux, s), int(row.extra), random);
    }
    at.template store<kWhole>(row.param, 0, param);
    store_low(at, low);
  }

  VSGD_FN void run() const {
    PerLane<Lane> lanes;
    each_lane([&](int lane) {
      lanes[lane] = Lane();
      update(lane, lanes[lane]);
    });
    if constexpr (!blocks) {
      each_lane([&](int lane) { store_states<true>(place(lane), lanes[lane], nullptr); });
    } else if (!store_block<false>(lanes)) {
      if constexpr (packed) each_lane([&](int lane) { spread_nan(lanes[lane]); });
      store_block<true>(lanes);
    }
  }
};

}  // namespace vsgd
