// bf16 tokens against rows of any pattern with AMX. The first factor of its products lies row by
// row, so 16 rows are expanded into it as they are. Tokens are the second, in pairs of columns: they
// are turned into them once a call. Sums are 16 rows x 16 tokens.
//
// Up to STRIP_TOKENS tokens a strip of 16 rows is read from its start to its end, and its sums stay
// in registers. More tokens take stretches of columns of 64 rows from the L1 cache, as with tiles.

static constexpr int64_t STRIP_TOKENS = 4 * PANEL;
// A strip is expanded so many chunks before they are multiplied, so that both go on at a time.
static constexpr int64_t ROWS_LAG = 4, ROWS_RING = 8;

// 32 codes of a row from `at` on.
template <Kind kind>
static inline __m256i row_codes(const uint8_t *values, int64_t at) {
  if constexpr (kind == INT8) return _mm256_loadu_si256((const __m256i *)(values + at));
  const __m128i low_half = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
  const __m128i bytes = _mm_loadu_si128((const __m128i *)(values + at / 2));
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_half);
  const __m128i after = _mm_loadu_si128((const __m128i *)(values + (at + 1) / 2));
  const __m128i low = _mm_and_si128(after, low_half);
  const bool odd = at % 2;
  const __m128i first = _mm_sub_epi8(odd ? high : low, eight);
  const __m128i second = _mm_sub_epi8(odd ? low : high, eight);
  return _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
}

// 32 floats as bf16, which they are.
static inline __m512i halves(__m512i low, __m512i high) {
  const __m256i first = _mm512_cvtepi32_epi16(_mm512_srli_epi32(low, 16));
  const __m256i second = _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// 32 codes as bf16, in which they are exact.
static inline __m512i bf16_codes(__m256i codes) {
  typedef int8_t Bytes __attribute__((vector_size(32)));
  typedef int16_t Words __attribute__((vector_size(64)));
  const Int words = (Int)__builtin_convertvector((Bytes)codes, Words);
  const __m512i even = (__m512i)_mm512_cvtepi32_ps((__m512i)(words << 16 >> 16));
  const Int odd = (Int)_mm512_cvtepi32_ps((__m512i)(words >> 16));
  return _mm512_or_si512(_mm512_srli_epi32(even, 16), (__m512i)(odd & (int)0xffff0000));
}

// 32 columns of a row as 16 pairs of bf16, the first columns in the low halves; `at` moves on. Two
// more than 32 values may be read.
template <Kind kind>
static inline __m512i row_pairs(const Row &row, int64_t &at, int64_t column) {
  uint32_t bits;
  __builtin_memcpy(&bits, row.mask + column / 8, 4);
  const int64_t from = at;
  at += __builtin_popcount(bits);
  if constexpr (kind == BF16)
    return _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(row.values + 2 * from));
  return bf16_codes(_mm256_maskz_expand_epi8(bits, row_codes<kind>(row.values, from)));
}

// The same near the end of a row or of the values.
template <Kind kind>
static __m512i last_pairs(const Row &row, int64_t &at, int64_t column, int64_t columns) {
  const unsigned bits = piece_bits(row, column, columns);
  const unsigned more = piece_bits(row, column + PIECE, columns);
  const Vec low = expand_piece<kind>(row.values, at, row.total, bits);
  at += __builtin_popcount(bits);
  const Vec high = expand_piece<kind>(row.values, at, row.total, more);
  at += __builtin_popcount(more);
  return halves((__m512i)low, (__m512i)high);
}

// 32 columns of up to 16 rows; zeros in place of those there are not. `inside`: all 16 are there,
// and neither the chunk nor what is read behind its values goes past their end.
template <Kind kind>
static inline void expand_rows(const Row *rows, int64_t *at, int64_t count, int64_t column,
                               int64_t columns, bool inside, int64_t ahead, uint16_t *dense) {
  if (inside) {
#pragma GCC unroll 16
    for (int64_t r = 0; r < TILE_ROWS; r++) {
      fetch(place_of<kind>(rows[r].values, at[r]) + ahead);
      _mm512_store_si512(dense + CHUNK * r, row_pairs<kind>(rows[r], at[r], column));
    }
    return;
  }
  for (int64_t r = 0; r < TILE_ROWS; r++) {
    const __m512i pairs = r < count ? last_pairs<kind>(rows[r], at[r], column, columns)
                                    : _mm512_setzero_si512();
    _mm512_store_si512(dense + CHUNK * r, pairs);
  }
}

// Whether 16 rows are there and what is read behind the last one's values too.
static inline bool all_inside(const Row *rows, int64_t count) {
  return count == TILE_ROWS && rows[count - 1].end + CHUNK + 2 <= rows[count - 1].total;
}

// The sums of N panels in registers 0 to N - 1 go to y, `y_step` apart. Those of codes are multiplied
// by their rows' scales and added to those of the blocks of columns before.
template <Kind kind, int N>
static inline void keep_strip(const Row *rows, int64_t real, int64_t block, float *y,
                              int64_t y_step) {
  alignas(64) float products[N * SUMS];
  keep_sums<N>(products);
  uint16_t scale[TILE_ROWS] = {};
  for (int64_t r = 0; IS_INTEGER[kind] && r < real; r++) scale[r] = rows[r].scale[block];
  const uint8_t *scales = (const uint8_t *)scale;
  for (int n = 0; n < N; n++) {
    if constexpr (IS_INTEGER[kind])
      add_scaled<1, true>(products + n * SUMS, &scales, block == 0, y + n * y_step);
    else
      __builtin_memcpy(y + n * y_step, products + n * SUMS, SUMS * 4);
  }
}

// N panels, all there are, with a strip of up to 16 rows.
template <Kind kind, int N>
static void rows_strip(const Row *rows, int64_t *at, int64_t real, int64_t columns, int64_t ahead,
                       const uint16_t *x, int64_t width, float *y, int64_t y_step) {
  alignas(64) uint16_t dense[ROWS_RING * SQUARE];
  const int64_t chunks = chunks_of(columns), whole = columns / CHUNK;
  const bool inside = all_inside(rows, real);
  start_sums<N>(y, true);
  for (int64_t c = 0; c < chunks + ROWS_LAG; c++) {
    if (c < chunks)
      expand_rows<kind>(rows, at, real, c * CHUNK, columns, inside && c < whole, ahead,
                        dense + c % ROWS_RING * SQUARE);
    const int64_t chunk = c - ROWS_LAG;
    if (chunk < 0) continue;
    const int64_t in_stretch = chunk % PANEL_CHUNKS, before = chunk - in_stretch;
    const int64_t step = shorter(width / CHUNK - before, PANEL_CHUNKS) * SQUARE;
    one_by_many<N, true>(dense + chunk % ROWS_RING * SQUARE, x + (before * N + in_stretch) * SQUARE,
                      step);
    const bool last = chunk + 1 == chunks;
    if (!last && !(IS_INTEGER[kind] && (chunk + 1) % SCALE_CHUNKS == 0)) continue;
    keep_strip<kind, N>(rows, real, chunk / SCALE_CHUNKS, y, y_step);
    start_sums<N>(y, true);
  }
}

// A row's next stretch comes after those of many other rows, each in a page of its own, so no
// hardware sees it coming. About half of its columns are kept.
template <Kind kind>
static inline void fetch_row(const Row &row, int64_t at, int64_t some) {
  const uint8_t *from = place_of<kind>(row.values, at);
  const int64_t bytes = place_of<kind>(from, some * CHUNK / 2) - from;
  for (int64_t b = 0; b <= bytes; b += 64) fetch(from + b);
}

// All panels with a stretch of N strips; `at` is each row's first value in it, and then the first
// one behind it.
template <Kind kind, int N>
static void rows_stretch(const Row *rows, int64_t *at, int64_t real, int64_t columns, int64_t chunk,
                         int64_t some, const uint16_t *x, int64_t width, int64_t count, float *y,
                         int64_t y_step) {
  alignas(64) uint16_t dense[LONG_STRETCH * MOST_TILES * SQUARE];
  uint16_t scale[N][TILE_ROWS] = {};
  const uint8_t *scales[N];
  Ahead none(nullptr, 0, 0, 0, 1);
  for (int i = 0; i < N; i++) {
    const int64_t first = i * TILE_ROWS, here = shorter(real - first, TILE_ROWS);
    for (int64_t r = 0; IS_INTEGER[kind] && r < here; r++)
      scale[i][r] = rows[first + r].scale[chunk / SCALE_CHUNKS];
    scales[i] = (const uint8_t *)scale[i];
    const bool inside = all_inside(rows + first, here);
    for (int64_t c = 0; c < some; c++) {
      const int64_t column = (chunk + c) * CHUNK;
      expand_rows<kind>(rows + first, at + first, here, column, columns,
                        inside && column + CHUNK <= columns, 0,
                        dense + (c * MOST_TILES + i) * SQUARE);
    }
    for (int64_t r = first; r < first + here; r++) fetch_row<kind>(rows[r], at[r], some);
  }
  panels_stretch<kind, N, true>(dense, scales, chunk, some, x, width, count, y, y_step, none);
}

template <Kind kind>
static void pairs_by_rows(const Row *found, int64_t *at, int64_t columns, int64_t rows,
                          const uint16_t *x, int64_t width, int64_t count, float *y) {
  const int64_t y_step = (rows + TILE_ROWS - 1) / TILE_ROWS * SUMS;
  if (count <= STRIP_TOKENS) {
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const int64_t real = shorter(rows - r, TILE_ROWS);
      const bool more = r + 2 * TILE_ROWS <= rows;
      const int64_t ahead = more ? bytes_of<kind>(found[r], found[r + real - 1]) : 0;
      FOR_TILES((count + PANEL - 1) / PANEL,
                rows_strip<kind, N>(found + r, at + r, real, columns, ahead, x, width,
                                    y + r * PANEL, y_step));
    }
    return;
  }
  const int64_t chunks = chunks_of(columns), stretch = stretch_of(kind, count);
  for (int64_t chunk = 0; chunk < chunks; chunk += stretch) {
    const int64_t some = shorter(chunks - chunk, stretch);
    for (int64_t r = 0; r < rows; r += GROUP_ROWS) {
      const int64_t real = shorter(rows - r, GROUP_ROWS);
      FOR_TILES((real + TILE_ROWS - 1) / TILE_ROWS,
                rows_stretch<kind, N>(found + r, at + r, real, columns, chunk, some, x, width,
                                      count, y + r * PANEL, y_step));
    }
  }
}

static bool pairs(const Matrix &m, int64_t which, int64_t row, int64_t rows, const uint16_t *x,
                  int64_t width, int64_t count, float *y) {
  Row found[MOST_ROWS];
  int64_t at[MOST_ROWS];
  for (int64_t r = 0; r < rows; r++) {
    found[r] = row_of(m, which, row + r);
    if (!row_holds(found[r], m.columns)) return false;
    at[r] = found[r].first;
  }
  const Shapes shapes;
  _tile_loadconfig(&shapes);
  switch (m.kind) {
    case BF16: pairs_by_rows<BF16>(found, at, m.columns, rows, x, width, count, y); break;
    case INT8: pairs_by_rows<INT8>(found, at, m.columns, rows, x, width, count, y); break;
    default: pairs_by_rows<INT4>(found, at, m.columns, rows, x, width, count, y);
  }
  _tile_release();
  return true;
}

// CHUNK columns of PANEL tokens, `real` of the columns there are; null tokens are 0.
static void pair_up(const uint16_t *const *tokens, int64_t column, int64_t real, uint16_t *to) {
  Vec square[PANEL] = {};
  for (int64_t t = 0; t < PANEL; t++)
    if (tokens[t]) __builtin_memcpy(&square[t], tokens[t] + column, 2 * real);
  turn_square(square);
  for (int64_t p = 0; p < PANEL; p++) store((float *)to + PANEL * p, square[p]);
}

// Sums of 16 rows x 16 tokens as the columns of another matrix's tokens.
static void pair_sums(const float *from, uint16_t *to) {
  for (int64_t p = 0; p < TILE_ROWS / 2; p++, from += 2 * PANEL, to += 2 * PANEL)
    for (int64_t t = 0; t < PANEL; t++) {
      to[2 * t] = bf16_bits(from[t]);
      to[2 * t + 1] = bf16_bits(from[PANEL + t]);
    }
}
