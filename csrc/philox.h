// The random numbers of rules that draw: Philox 4x32-10 (Salmon et al. 2011), keyed by (seed, step) and counted by
// (parameter, element), the same on every backend. (philox.py is the same in torch.)
#pragma once

#include "numbers.h"

namespace vsgd {

// Word: a word, or the words of many counters side by side (draw_vectors.h).
template <class Word>
struct FourOf {
  Word word[4];

  // Word i modulo 4, where i is known only at run time: an index would put the words into memory.
  VSGD_FN Word at(int64_t i) const {
    const Word low = i & 1 ? word[1] : word[0], high = i & 1 ? word[3] : word[2];
    return i & 2 ? high : low;
  }
};
using Four = FourOf<uint32_t>;

VSGD_FN uint32_t high_half(uint32_t x, uint32_t y) { return uint32_t((uint64_t(x) * y) >> 32); }

template <class Word>
VSGD_FN FourOf<Word> philox(uint32_t key0, uint32_t key1, FourOf<Word> counter) {
  Word c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < 10; ++round) {
    const Word next0 = high_half(0xcd9e8d57u, c2) ^ c1 ^ key0, next2 = high_half(0xd2511f53u, c0) ^ c3 ^ key1;
    c1 = 0xcd9e8d57u * c2;
    c3 = 0xd2511f53u * c0;
    c0 = next0;
    c2 = next2;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

// What one step of one parameter draws.
struct Draw {
  uint32_t key0, key1, place, seed_high;
  uint64_t quad;  // that element 0 belongs to

  VSGD_FN static Draw of(int64_t seed, int64_t place, float t) {
    return {uint32_t(uint64_t(seed)), uint32_t(t), uint32_t(uint64_t(place)), uint32_t(uint64_t(seed) >> 32), 0};
  }

  // For elements from `first` on, a multiple of 4.
  VSGD_FN Draw from(int64_t first) const { return {key0, key1, place, seed_high, quad + uint64_t(first) / 4}; }

  // The words of elements 4 i to 4 i + 3; for i below 2^32 from a `first` that i does not carry over.
  VSGD_FN Four words(uint32_t i) const { return words_of(uint32_t(quad) + i, [](uint32_t word) { return word; }); }
  // Of as many counters as there are in their lower words; all(word): that word, for each of them.
  template <class Word, class All>
  VSGD_FN FourOf<Word> words_of(const Word& lower, const All& all) const {
    return philox<Word>(key0, key1, {{lower, all(uint32_t(quad >> 32)), all(place), all(seed_high)}});
  }
};

}  // namespace vsgd
