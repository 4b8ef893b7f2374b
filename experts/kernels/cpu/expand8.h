// AVX2: eight columns of a row from its kept values and the eight bits of its mask.

static constexpr int64_t PIECE = 8;

static inline float sum_piece(Vec v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// For every byte of a mask and each of its columns: how many kept columns come before it, or 128
// where it is not kept itself.
struct Ranks {
  uint8_t of[256][8];
};

static constexpr Ranks all_ranks() {
  Ranks ranks = {};
  for (int bits = 0; bits < 256; bits++) {
    uint8_t before = 0;
    for (int column = 0; column < 8; column++)
      ranks.of[bits][column] = (bits >> column & 1) ? before++ : 128;
  }
  return ranks;
}

alignas(64) static constexpr Ranks RANKS = all_ranks();

// int4 values of a row from `at` on; it reads a fifth byte.
static inline Vec codes_from(const uint8_t *values, int64_t at) {
  const uint8_t *from = values + at / 2;
  const uint64_t halves = load_u32(from) | (uint64_t)from[4] << 32;
  const __m256i spread = _mm256_set1_epi32((int)(halves >> 4 * (at % 2)));
  const __m256i places = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256i codes = _mm256_and_si256(_mm256_srlv_epi32(spread, places), _mm256_set1_epi32(15));
  return (Vec)_mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8)));
}

// Puts the first values where bits are set, zeros elsewhere.
static inline Vec place(Vec values, unsigned bits) {
  const __m128i bytes = _mm_loadl_epi64((const __m128i *)RANKS.of[bits]);
  const __m256i ranks = _mm256_cvtepi8_epi32(bytes);
  const __m256 spread = _mm256_permutevar8x32_ps((__m256)values, ranks);
  return (Vec)_mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(ranks));
}
