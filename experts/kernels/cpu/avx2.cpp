// AVX2 with FMA and F16C: 8 floats a vector.

#include "kernels.h"
#include "target.h"

#if defined(MOIETY_X86)

#include "intrinsics.h"

MOIETY_TARGET("avx2,fma,f16c,popcnt,bmi")
namespace avx2 {

#include "scalar.h"
#include "tiles.h"

static constexpr int64_t WIDTH = 8;
static constexpr int LIVE = 8, TWO_CHAINS = 4, FEW_SUMS = 8;
static constexpr int TOGETHER = 1;
static constexpr bool ONE_BY_ONE = true;
typedef float Vec __attribute__((vector_size(32)));
typedef int Int __attribute__((vector_size(32)));

static inline Vec load(const float *at) { return (Vec)_mm256_loadu_ps(at); }
static inline void store(float *at, Vec value) { _mm256_storeu_ps(at, (__m256)value); }
static inline Int load_int(const uint8_t *at) {
  return (Int)_mm256_loadu_si256((const __m256i *)at);
}
static inline Vec spread(float value) { return (Vec)_mm256_set1_ps(value); }
static inline Vec spread4(const float *at) { return (Vec)_mm256_broadcast_ps((const __m128 *)at); }
static inline Vec select(Vec four, Int control) {
  return (Vec)_mm256_permutevar_ps((__m256)four, (__m256i)control);
}
static inline Vec load_bf16(const uint8_t *at) {
  return (Vec)(Int)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16);
}
static inline Vec load_bytes(const uint8_t *at) {
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
}
static inline Vec load_half(const uint8_t *at) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
}

// 8 rows of a group of BF12 as pairs of bf16.
static inline Int bf12_pairs(const Chunk &chunk, int group, int half) {
  typedef uint16_t Words __attribute__((vector_size(32)));
  const __m256i exponents = _mm256_broadcastsi128_si256(
      _mm_loadu_si128((const __m128i *)exponent_bytes_of(chunk, group)));
  // Those of two groups, one in either half of a word.
  const Words all = (Words)load_int(quartet_of(chunk, group) + 32 * half);
  const __m256i numbers = (__m256i)(all >> 4 * (group % 2) & 0x0f0f);
  const Words found = (Words)_mm256_shuffle_epi8(exponents, numbers);
  const Words in_place = group % QUARTET < 2 ? found << 7 : found >> 1;
  __m256i rest = (__m256i)load_int(rest_of(chunk, group) + 32 * half);
  if (group % 2)
    rest = _mm256_shuffle_epi8(rest, _mm256_broadcastsi128_si256(_mm_setr_epi32(
                                         0x02030001, 0x06070405, 0x0a0b0809, 0x0e0f0c0d)));
  return (Int)(((Words)rest & SIGN_AND_MANTISSA) | (in_place & (uint16_t)~SIGN_AND_MANTISSA));
}

// The kept values of 8 rows of one group of a tile, the first or the second 8.
template <Kind kind>
static inline void pair(const Chunk &chunk, int g, int half, Vec &v0, Vec &v1) {
  const uint8_t *group = group_of<kind>(chunk, g);
  if constexpr (kind == BF16 || kind == BF12) {
    const Int both = kind == BF16 ? load_int(group + 32 * half) : bf12_pairs(chunk, g, half);
    v0 = (Vec)(both << 16);
    v1 = (Vec)(both & (int)0xffff0000);
  } else if constexpr (kind == FP32) {
    v0 = load((const float *)(group + 32 * half));
    v1 = load((const float *)(group + 64 + 32 * half));
  } else if constexpr (kind == FP16) {
    v0 = load_half(group + 16 * half);
    v1 = load_half(group + 32 + 16 * half);
  } else if constexpr (kind == INT8) {
    v0 = load_bytes(group + 8 * half);
    v1 = load_bytes(group + 16 + 8 * half);
  } else {
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)(group + 8 * half));
    const Int both = (Int)_mm256_cvtepu8_epi32(bytes);
    v0 = (Vec)_mm256_cvtepi32_ps((__m256i)((both & 15) - 8));
    v1 = (Vec)_mm256_cvtepi32_ps((__m256i)((both >> 4) - 8));
  }
}

#define MOIETY_EXPAND
#include "expand8.h"
#include "expand.h"
#include "body.h"

}  // namespace avx2
MOIETY_TARGET_END

constexpr Kernels avx2_kernels = avx2::kernels_with(16, 8, nullptr);

#endif
