// The random numbers of a block in vectors, by hand: draw_vectors.h.
#pragma once

#include "isa.h"
#include "noise.h"
#include "philox.h"

namespace vsgd {

// Writes the words of kCodes elements, from the first of `draw` on.
using DrawBlock = void (*)(const Draw& draw, uint32_t* words);

#if VSGD_BY_HAND
void draw_block_avx2(const Draw& draw, uint32_t* words);
void draw_block_avx512(const Draw& draw, uint32_t* words);
#else
constexpr DrawBlock draw_block_avx2 = nullptr, draw_block_avx512 = nullptr;
#endif

}  // namespace vsgd
