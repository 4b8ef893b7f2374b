// A row's columns from its kept values and the bits of its mask, PIECE columns at a time: all the
// AVX instruction sets, which bring `codes_from` (int4) and `place`.

// For every byte of a mask its kept columns, one after the other.
struct Columns {
  uint8_t of[256][8];
};

static constexpr Columns all_columns() {
  Columns columns = {};
  for (int bits = 0; bits < 256; bits++) {
    int at = 0;
    for (int column = 0; column < 8; column++)
      if (bits >> column & 1) columns.of[bits][at++] = (uint8_t)column;
  }
  return columns;
}

alignas(64) static constexpr Columns COLUMNS = all_columns();

// The columns whose bits are set in a word, in order, from `column` on; writes up to 8 more than it
// counts.
static inline int64_t columns_of(uint64_t word, int64_t column, uint16_t *columns) {
  int64_t count = 0;
#pragma GCC unroll 8
  for (int64_t byte = 0; byte < 8; byte++) {
    const unsigned bits = word >> 8 * byte & 255;
    const __m128i places = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)COLUMNS.of[bits]));
    const __m128i first = _mm_set1_epi16((short)(column + 8 * byte));
    _mm_storeu_si128((__m128i *)(columns + count), _mm_add_epi16(places, first));
    count += __builtin_popcount(bits);
  }
  return count;
}

static constexpr int64_t REACH = 34;

// PIECE values of a row from `at` on; up to REACH are read.
template <Kind kind>
static inline Vec values_from(const uint8_t *values, int64_t at) {
  if constexpr (kind == BF16) return load_bf16(values + 2 * at);
  if constexpr (kind == FP16) return load_half(values + 2 * at);
  if constexpr (kind == FP32) return load((const float *)(values + 4 * at));
  if constexpr (kind == INT8) return load_bytes(values + at);
  return codes_from(values, at);
}

// A matrix's last values, where a piece at once would read past its end.
template <Kind kind>
static inline Vec last_values(const uint8_t *values, int64_t at, int64_t total) {
  constexpr int64_t HALVES = HALF_BYTES[kind];
  uint8_t copy[4 * PIECE + 8] = {};
  const int64_t first = at * HALVES / 2, end = (total * HALVES + 1) / 2;
  for (int64_t i = first; i < end && i - first < 4 * PIECE; i++) copy[i - first] = values[i];
  return values_from<kind>(copy, kind == INT4 ? at % 2 : 0);
}

template <Kind kind>
static inline Vec piece_from(const uint8_t *values, int64_t at, int64_t total) {
  return at + REACH <= total ? values_from<kind>(values, at) : last_values<kind>(values, at, total);
}

template <Kind kind>
static inline Vec expand_piece(const uint8_t *values, int64_t at, int64_t total, unsigned bits) {
  return place(piece_from<kind>(values, at, total), bits);
}
