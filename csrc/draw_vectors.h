// Philox on vectors. Its factors have 32 bits, and for the upper half of a product gcc multiplies numbers of 64: three times as
// slow. Here each word has 64 bits of a vector for itself, of which the upper half is nothing. Only for files that are compiled
// for the vectors' instruction set as a whole.
#pragma once

#include "draw.h"

namespace vsgd {

// A word of each of Vector::count counters. Several vectors side by side: a round waits for the last one, and its key serves
// all of them.
template <class Vector>
struct Words {
  static constexpr int parts = 4, count = parts * Vector::count;
  Vector part[parts];

  // Each part what `of` says.
  template <class Of>
  VSGD_FN static Words all(const Of& of) {
    Words words;
    for (int i = 0; i < parts; ++i) words.part[i] = of(i);
    return words;
  }
};

template <class Vector>
VSGD_FN Words<Vector> operator*(uint32_t x, const Words<Vector>& y) {
  return Words<Vector>::all([&](int i) { return Vector(x) * y.part[i]; });
}
template <class Vector>
VSGD_FN Words<Vector> high_half(uint32_t x, const Words<Vector>& y) {
  return Words<Vector>::all([&](int i) { return (Vector(x) * y.part[i]).upper_half(); });
}
template <class Vector>
VSGD_FN Words<Vector> operator^(const Words<Vector>& x, const Words<Vector>& y) {
  return Words<Vector>::all([&](int i) { return x.part[i] ^ y.part[i]; });
}
template <class Vector>
VSGD_FN Words<Vector> operator^(const Words<Vector>& x, uint32_t y) {
  return Words<Vector>::all([&](int i) { return x.part[i] ^ Vector(y); });
}

// Vector: words, their products and so on, in which order their counters are, and how four of them are stored.
template <class Vector>
VSGD_FN void draw_block(const Draw& draw, uint32_t* words) {
  const auto all = [](uint32_t word) { return Words<Vector>::all([&](int) { return Vector(word); }); };
  for (int first = 0; first < kCodes / 4; first += Words<Vector>::count) {
    const auto lower = Words<Vector>::all(
        [&](int i) { return Vector(uint32_t(draw.quad) + first + i * Vector::count).plus(Vector::order()); });
    const auto four = draw.words_of(lower, all);
    for (int i = 0; i < Words<Vector>::parts; ++i)
      Vector::store(words + 4 * (first + i * Vector::count), four.word[0].part[i], four.word[1].part[i],
                    four.word[2].part[i], four.word[3].part[i]);
  }
}

}  // namespace vsgd
