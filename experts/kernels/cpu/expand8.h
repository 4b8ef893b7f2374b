// AVX2: eight columns of a row from its kept values and the eight bits of its mask.

typedef float Eight __attribute__((vector_size(32)));

static inline Eight load8(const float *at) { return (Eight)_mm256_loadu_ps(at); }

static inline float sum8(Eight v) {
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

// For every byte of a mask its kept columns, one after the other.
static constexpr Ranks all_columns() {
  Ranks columns = {};
  for (int bits = 0; bits < 256; bits++) {
    int at = 0;
    for (int column = 0; column < 8; column++)
      if (bits >> column & 1) columns.of[bits][at++] = (uint8_t)column;
  }
  return columns;
}

alignas(64) static constexpr Ranks COLUMNS = all_columns();

// The columns whose bits are set in some words of 64, in order; writes up to 8 more than it counts.
static inline int64_t columns_of(const uint64_t *words, int64_t some, uint16_t *columns) {
  int64_t count = 0;
  for (int64_t byte = 0; byte < 8 * some; byte++) {
    const unsigned bits = words[byte / 8] >> 8 * (byte % 8) & 255;
    const __m128i places = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)COLUMNS.of[bits]));
    const __m128i first = _mm_set1_epi16((short)(8 * byte));
    _mm_storeu_si128((__m128i *)(columns + count), _mm_add_epi16(places, first));
    count += __builtin_popcount(bits);
  }
  return count;
}

template <Kind kind>
static inline Eight values8(const uint8_t *values, int64_t at) {
  if constexpr (kind == BF16) {
    const __m128i bits = _mm_loadu_si128((const __m128i *)(values + 2 * at));
    return (Eight)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
  } else if constexpr (kind == FP16) {
    return (Eight)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(values + 2 * at)));
  } else if constexpr (kind == FP32) {
    return (Eight)_mm256_loadu_ps((const float *)(values + 4 * at));
  } else if constexpr (kind == INT8) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)(values + at));
    return (Eight)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  } else {
    const uint8_t *from = values + at / 2;
    const uint64_t halves = load_u32(from) | (uint64_t)from[4] << 32;
    const __m256i spread = _mm256_set1_epi32((int)(halves >> 4 * (at % 2)));
    const __m256i places = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i codes = _mm256_and_si256(_mm256_srlv_epi32(spread, places), _mm256_set1_epi32(15));
    return (Eight)_mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8)));
  }
}

// A matrix's last values, where eight at once would read past its end.
template <Kind kind>
static inline Eight last8(const uint8_t *values, int64_t at, int64_t total) {
  constexpr int64_t HALVES = kind == FP32 ? 8 : kind == INT8 ? 2 : kind == INT4 ? 1 : 4;
  uint8_t copy[40] = {};
  const int64_t first = at * HALVES / 2, end = (total * HALVES + 1) / 2;
  for (int64_t i = first; i < end && i - first < 32; i++) copy[i - first] = values[i];
  return values8<kind>(copy, kind == INT4 ? at % 2 : 0);
}

template <Kind kind>
static inline Eight expand8(const uint8_t *values, int64_t at, int64_t total, unsigned bits) {
  // int4 reads a fifth byte where it starts in the middle of one.
  const int64_t reach = kind == INT4 ? 10 : 8;
  const Eight kept = at + reach <= total ? values8<kind>(values, at) : last8<kind>(values, at, total);
  const __m128i bytes = _mm_loadl_epi64((const __m128i *)RANKS.of[bits]);
  const __m256i ranks = _mm256_cvtepi8_epi32(bytes);
  const __m256 spread = _mm256_permutevar8x32_ps((__m256)kept, ranks);
  return (Eight)_mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(ranks));
}
