// Vectors of 16 floats, for both AVX-512 files.

static constexpr int64_t WIDTH = 16;
static constexpr int LIVE = 16;
static constexpr int FIRST_PREFETCH = 1;
typedef float Vec __attribute__((vector_size(64)));
typedef int Int __attribute__((vector_size(64)));

static inline Vec load(const float *at) { return (Vec)_mm512_loadu_ps(at); }
static inline void store(float *at, Vec value) { _mm512_storeu_ps(at, (__m512)value); }
static inline Int load_int(const uint8_t *at) { return (Int)_mm512_loadu_si512(at); }
static inline Vec spread(float value) { return (Vec)_mm512_set1_ps(value); }
static inline Int spread_int(uint32_t value) { return (Int)_mm512_set1_epi32((int)value); }
static inline Vec spread4(const float *at) {
  return (Vec)_mm512_broadcast_f32x4(_mm_loadu_ps(at));
}
static inline Vec select(Vec four, Int control) {
  return (Vec)_mm512_permutevar_ps((__m512)four, (__m512i)control);
}
static inline Vec load_bf16(const uint8_t *at) {
  const __m256i bits = _mm256_loadu_si256((const __m256i *)at);
  return (Vec)((Int)_mm512_cvtepu16_epi32(bits) << 16);
}
static inline Vec load_bytes(const uint8_t *at) {
  const __m128i bytes = _mm_loadu_si128((const __m128i *)at);
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
static inline Vec load_half(const uint8_t *at) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
}

// The kept values of the 16 rows of one group of a tile.
template <Kind kind>
static inline void pair(const uint8_t *group, int, Vec &v0, Vec &v1) {
  if constexpr (kind == BF16) {
    const Int both = load_int(group);
    v0 = (Vec)(both << 16);
    v1 = (Vec)(both & (int)0xffff0000);
  } else if constexpr (kind == FP32) {
    v0 = load((const float *)group);
    v1 = load((const float *)(group + 64));
  } else if constexpr (kind == FP16) {
    v0 = load_half(group);
    v1 = load_half(group + 32);
  } else if constexpr (kind == INT8) {
    v0 = load_bytes(group);
    v1 = load_bytes(group + 16);
  } else {
    const Int both = (Int)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)group));
    v0 = (Vec)_mm512_cvtepi32_ps((__m512i)((both & 15) - 8));
    v1 = (Vec)_mm512_cvtepi32_ps((__m512i)((both >> 4) - 8));
  }
}

#if defined(MOIETY_BF16_PAIRS)
// The kept values of 16 rows of one group as pairs of bf16; codes up to 127 are exact in bf16.
template <Kind kind>
static inline __m512i bf16_pair(const uint8_t *group) {
  if constexpr (kind == BF16) return (__m512i)load_int(group);
  Vec v0, v1;
  pair<kind>(group, 0, v0, v1);
  return _mm512_or_si512(_mm512_srli_epi32((__m512i)v0, 16), (__m512i)v1);
}
#endif
