// Random numbers in AVX2.
#include "isa.h"

#if VSGD_BY_HAND
#include <immintrin.h>

VSGD_AVX2_FROM_HERE

#include "draw_vectors.h"

namespace vsgd {
namespace {

struct Vector256 {
  static constexpr int count = 4;
  __m256i x;

  VSGD_FN Vector256() = default;
  VSGD_FN Vector256(__m256i vector) : x(vector) {}
  VSGD_FN explicit Vector256(uint32_t word) : x(_mm256_set1_epi64x(int64_t(word))) {}

  VSGD_FN Vector256 operator*(Vector256 y) const { return _mm256_mul_epu32(x, y.x); }
  VSGD_FN Vector256 operator^(Vector256 y) const { return _mm256_xor_si256(x, y.x); }
  VSGD_FN Vector256 plus(Vector256 y) const { return _mm256_add_epi32(x, y.x); }
  VSGD_FN Vector256 upper_half() const { return _mm256_srli_epi64(x, 32); }

  // In which `store`, which works within every two elements, has the counters one after the other.
  VSGD_FN static Vector256 order() { return _mm256_setr_epi64x(0, 2, 1, 3); }
  VSGD_FN static void store(uint32_t* to, Vector256 a, Vector256 b, Vector256 c, Vector256 d) {
    const __m256i ab = pairs(a, b), cd = pairs(c, d);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_unpacklo_epi64(ab, cd));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), _mm256_unpackhi_epi64(ab, cd));
  }

 private:
  // The words of both, one after the other.
  VSGD_FN static __m256i pairs(Vector256 low, Vector256 high) {
    return _mm256_blend_epi32(low.x, _mm256_slli_epi64(high.x, 32), 0xaa);
  }
};

}  // namespace

void draw_block_avx2(const Draw& draw, uint32_t* words) { draw_block<Vector256>(draw, words); }

}  // namespace vsgd
#endif
