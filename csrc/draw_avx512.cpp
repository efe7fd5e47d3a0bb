// Random numbers in AVX-512.
#include "isa.h"

#if VSGD_BY_HAND
#include <immintrin.h>

VSGD_AVX512_FROM_HERE

#include "draw_vectors.h"

// gcc 12 warns of variables in its own header (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace vsgd {
namespace {

struct Vector512 {
  static constexpr int count = 8;
  __m512i x;

  VSGD_FN Vector512() = default;
  VSGD_FN Vector512(__m512i vector) : x(vector) {}
  VSGD_FN explicit Vector512(uint32_t word) : x(_mm512_set1_epi64(int64_t(word))) {}

  VSGD_FN Vector512 operator*(Vector512 y) const { return _mm512_mul_epu32(x, y.x); }
  VSGD_FN Vector512 operator^(Vector512 y) const { return _mm512_xor_si512(x, y.x); }
  VSGD_FN Vector512 plus(Vector512 y) const { return _mm512_add_epi32(x, y.x); }
  VSGD_FN Vector512 upper_half() const { return _mm512_srli_epi64(x, 32); }

  // In which `store`, which works within every two elements, has the counters one after the other.
  VSGD_FN static Vector512 order() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
  VSGD_FN static void store(uint32_t* to, Vector512 a, Vector512 b, Vector512 c, Vector512 d) {
    const __m512i ab = pairs(a, b), cd = pairs(c, d);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi64(ab, cd));
    _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi64(ab, cd));
  }

 private:
  // The words of both, one after the other.
  VSGD_FN static __m512i pairs(Vector512 low, Vector512 high) {
    return _mm512_mask_shuffle_epi32(low.x, 0xaaaa, high.x, _MM_PERM_CCAA);
  }
};

}  // namespace

void draw_block_avx512(const Draw& draw, uint32_t* words) { draw_block<Vector512>(draw, words); }

}  // namespace vsgd
#endif
