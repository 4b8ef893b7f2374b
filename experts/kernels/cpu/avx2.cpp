// AVX2 with FMA and F16C: 8 floats a vector.

#include "kernels.h"
#include "target.h"

#if defined(MOIETY_X86)

#include "intrinsics.h"

MOIETY_TARGET("avx2,fma,f16c,popcnt,bmi")
namespace avx2 {

static constexpr int64_t WIDTH = 8;
static constexpr int LIVE = 8, TWO_CHAINS = 4, FEW_SUMS = 8;
static constexpr int TOGETHER = 1;
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

// The kept values of 8 rows of one group of a tile, the first or the second 8.
template <Kind kind>
static inline void pair(const uint8_t *group, int half, Vec &v0, Vec &v1) {
  if constexpr (kind == BF16) {
    const Int both = load_int(group + 32 * half);
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
#include "scalar.h"
#include "expand8.h"
#include "expand.h"
#include "body.h"

}  // namespace avx2
MOIETY_TARGET_END

constexpr Kernels avx2_kernels = avx2::kernels_with(16, 8, nullptr);

#endif
