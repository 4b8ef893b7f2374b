// bf16 tokens against rows of any pattern with AMX. The first factor of its products lies row by
// row, so 16 rows are expanded into it as they are. Tokens are the second, in pairs of columns:
// they are turned into them once a call. Sums are 16 rows x 16 tokens.

// For every place of 32 halves from a byte on, that byte and the next.
struct Windows {
  uint8_t of[64];
};

static constexpr Windows all_windows() {
  Windows windows = {};
  for (int i = 0; i < 16; i++) {
    windows.of[4 * i] = (uint8_t)i;
    windows.of[4 * i + 1] = (uint8_t)(i + 1);
  }
  return windows;
}

alignas(64) static constexpr Windows WINDOWS = all_windows();

// What turns a row's codes into bf16 for the SCALE_COLUMNS from `column` on: int4's 16 values, or
// int8's scale.
template <Kind kind>
static inline __m512i decoder(const Row &row, int64_t column) {
  if constexpr (!IS_INTEGER[kind]) return _mm512_setzero_si512();
  const Vec scale = spread(bf16_value(row.scale[column / SCALE_COLUMNS]));
  if constexpr (kind == INT8) return (__m512i)scale;
  const Vec codes = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_setzero_ps(), (__m512)(codes * scale));
}

// Values of 32 columns are read up to so many on.
static constexpr int64_t PAIRS_REACH = 2 * CHUNK;

// 32 columns of a row as 16 pairs of bf16, the first columns in the low halves; `at` moves on.
template <Kind kind>
static inline __m512i row_pairs(const Row &row, int64_t &at, int64_t column, __m512i decoder) {
  uint32_t bits;
  __builtin_memcpy(&bits, row.mask + column / 8, 4);
  const uint8_t *from = place_of<kind>(row.values, at);
  const bool odd = at % 2;
  at += __builtin_popcount(bits);
  if constexpr (kind == BF16) return _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(from));
  const __m256i bytes = _mm256_loadu_si256((const __m256i *)from);
  if constexpr (kind == INT8) {
    const __m256i codes = _mm256_maskz_expand_epi8(bits, bytes);
    const __m128i first = _mm256_castsi256_si128(codes);
    const __m128i second = _mm256_extracti128_si256(codes, 1);
    const Vec low = (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(first)) * (Vec)decoder;
    const Vec high = (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(second)) * (Vec)decoder;
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }
  const __m512i windows = _mm512_permutexvar_epi8(_mm512_load_si512(WINDOWS.of),
                                                  _mm512_castsi256_si512(bytes));
  const Int both = (Int)_mm512_srl_epi32(windows, _mm_cvtsi32_si128(4 * odd));
  const __m512i codes = (__m512i)((both & 0x0000000f) | (both << 12 & 0x000f0000));
  return _mm512_maskz_permutexvar_epi16(bits, _mm512_maskz_expand_epi16(bits, codes), decoder);
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
  const float scale = IS_INTEGER[kind] ? bf16_value(row.scale[column / SCALE_COLUMNS]) : 1.0f;
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)(high * scale), (__m512)(low * scale));
}

// Rows are expanded so many chunks at a time, one row after the other: where they are a power of
// two apart they share few sets of the L1 cache. A step expands a fourth of 16 rows.
static constexpr int64_t TOGETHER_CHUNKS = 4, STEP_ROWS = TILE_ROWS / TOGETHER_CHUNKS;

// The step's share of `some` chunks of up to 16 rows, chunks `step` apart; zeros in place of rows
// there are not. `inside`: all 16 are there, and neither the chunks nor what is read behind their
// values go past the end.
template <Kind kind>
__attribute__((noinline)) static void expand_rows(const Row *rows, int64_t *at, int64_t count,
                                                  int64_t first, int64_t column, int64_t some,
                                                  int64_t columns, bool inside, int64_t ahead,
                                                  uint16_t *dense, int64_t step) {
  if (inside) {
    constexpr int64_t BYTES = TOGETHER_CHUNKS * CHUNK / 2 * HALF_BYTES[kind] / 2;
    __m512i pairs[STEP_ROWS][TOGETHER_CHUNKS];
#pragma GCC unroll 4
    for (int64_t i = 0; i < STEP_ROWS; i++) {
      const Row &row = rows[first + i];
      int64_t place = at[first + i];
      const __m512i decode = decoder<kind>(row, column);
      const uint8_t *next = place_of<kind>(row.values, place) + ahead;
      for (int64_t b = 0; ahead && b < BYTES; b += 64) fetch(next + b);
#pragma GCC unroll 4
      for (int64_t c = 0; c < TOGETHER_CHUNKS; c++)
        pairs[i][c] = row_pairs<kind>(row, place, column + c * CHUNK, decode);
      at[first + i] = place;
    }
#pragma GCC unroll 4
    for (int64_t c = 0; c < TOGETHER_CHUNKS; c++)
#pragma GCC unroll 4
      for (int64_t i = 0; i < STEP_ROWS; i++)
        _mm512_store_si512(dense + c * step + CHUNK * (first + i), pairs[i][c]);
    return;
  }
  for (int64_t r = first; r < first + STEP_ROWS; r++)
    for (int64_t c = 0; c < some; c++) {
      __m512i pairs = _mm512_setzero_si512();
      if (r < count) pairs = last_pairs<kind>(rows[r], at[r], column + c * CHUNK, columns);
      _mm512_store_si512(dense + c * step + CHUNK * r, pairs);
    }
}

// Whether 16 rows are there and what is read behind the last one's values too.
static inline bool all_inside(const Row *rows, int64_t count) {
  return count == TILE_ROWS && rows[count - 1].end + PAIRS_REACH <= rows[count - 1].total;
}

// A row's part of the next strip, about half of whose columns are kept. Every row lies in a page
// of its own, so no hardware sees it coming.
template <Kind kind>
static inline void fetch_row(const Row &row, int64_t at, int64_t column, int64_t some) {
  const uint8_t *from = place_of<kind>(row.values, at), *mask = row.mask + column / 8;
  const int64_t bytes = place_of<kind>(from, some * CHUNK / 2) - from;
  for (int64_t b = 0; b <= bytes; b += 64) fetch(from + b);
  for (int64_t b = 0; b <= some * CHUNK / 8; b += 64) fetch(mask + b);
}

// Up to 48 rows from some chunk on; `at` is each one's first value in a chunk, and then the first
// one behind it. Strips fetch the next one's rows at every step, narrow products what lies `ahead`.
template <Kind kind>
struct Strips {
  static constexpr int64_t GROUP = TOGETHER_CHUNKS, LAG = TOGETHER_CHUNKS;
  const Row *rows;
  int64_t *at;
  int64_t real, columns, chunk, some, ahead;
  bool inside[STRIP_TILES];
  const Row *next;
  const int64_t *next_at;
  int64_t next_real, next_chunk, next_some, steps, step, fetched;

  template <int N>
  inline void expand(int64_t c, uint16_t *dense, int64_t width) const {
    const int64_t part = c % GROUP, group = c - part, column = (chunk + group) * CHUNK;
    if (group >= some) return;
    for (int i = 0; i < N; i++) {
      const int64_t first = i * TILE_ROWS, here = shorter(real - first, TILE_ROWS);
      expand_rows<kind>(rows + first, at + first, here, part * STEP_ROWS, column,
                        shorter(some - group, GROUP), columns,
                        inside[i] && column + GROUP * CHUNK <= columns, ahead,
                        dense + i * SQUARE, width);
    }
  }

  inline void fetch_some() {
    for (step++; fetched < next_real && fetched * steps < step * next_real; fetched++)
      fetch_row<kind>(next[fetched], next_at[fetched], next_chunk * CHUNK, next_some);
  }
};

template <Kind kind>
static void pairs_by_rows(const Row *found, int64_t *at, int64_t columns, int64_t rows,
                          const uint16_t *x, int64_t width, int64_t count, float *y) {
  const int64_t y_step = (rows + TILE_ROWS - 1) / TILE_ROWS * SUMS, chunks = chunks_of(columns);
  const int64_t panels = (count + PANEL - 1) / PANEL, passes = (panels + 1) / 2;
  if (panels <= NARROW_PANELS) {
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const int64_t real = shorter(rows - r, TILE_ROWS);
      const bool more = r + 2 * TILE_ROWS <= rows;
      const int64_t ahead = more ? bytes_of<kind>(found[r], found[r + real - 1]) : 0;
      Strips<kind> strips = {found + r, at + r, real, columns, 0, chunks, ahead,
                             {all_inside(found + r, real)}, nullptr, nullptr, 0, 0, 0, 0, 0, 0};
      FOR_NUMBER(panels, multiply_narrow<N, true>(strips, true, chunks, x, width, y + r * PANEL,
                                                  y_step));
    }
    return;
  }
  for (int64_t chunk = 0; !chunk || chunk < chunks; chunk += PANEL_CHUNKS) {
    const int64_t some = shorter(chunks - chunk, PANEL_CHUNKS);
    for (int64_t r = 0; r < rows; r += STRIP_ROWS) {
      const int64_t real = shorter(rows - r, STRIP_ROWS);
      const bool last = r + STRIP_ROWS >= rows;
      const int64_t next = last ? 0 : r + STRIP_ROWS, then = last ? chunk + some : chunk;
      Strips<kind> strips = {found + r, at + r, real, columns, chunk, some, 0, {}, found + next,
                             at + next, shorter(rows - next, STRIP_ROWS), then,
                             shorter(chunks - then, PANEL_CHUNKS), passes * some, 0, 0};
      for (int64_t first = 0; first < real; first += TILE_ROWS)
        strips.inside[first / TILE_ROWS] = all_inside(found + r + first,
                                                      shorter(real - first, TILE_ROWS));
      FOR_STRIP(real, multiply_strip<N, true>(strips, chunk == 0, chunk, some, x, width, panels,
                                              y + r * PANEL, y_step));
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
  MEMORY_IS_USED;
  _tile_loadconfig(&shapes);
  FOR_BF16_KIND(m.kind, pairs_by_rows<K>(found, at, m.columns, rows, x, width, count, y));
  _tile_release();
  return true;
}

// CHUNK columns of PANEL tokens, `real` of the columns there are; null tokens are 0.
static void pair_up(const uint16_t *const *tokens, int64_t column, int64_t real, uint16_t *to) {
  alignas(64) uint16_t copy[PANEL][CHUNK];
  const uint16_t *from[PANEL];
  for (int64_t t = 0; t < PANEL; t++) {
    if (tokens[t] && real == CHUNK) {
      from[t] = tokens[t] + column;
      continue;
    }
    const int64_t some = tokens[t] ? real : 0;
    for (int64_t c = 0; c < CHUNK; c++) copy[t][c] = c < some ? tokens[t][column + c] : 0;
    from[t] = copy[t];
  }
  for (int64_t p = 0; p < PANEL; p += 4) {
    Vec pairs[4];
    turn_four([&](int t) { return from[t] + 2 * p; }, pairs);
    for (int i = 0; i < 4; i++) store((float *)to + PANEL * (p + i), pairs[i]);
  }
}

// Four tokens of a panel at a time, so that what is written are few streams.
static void put_pairs(const float *y, int64_t rows, int64_t count, uint16_t *to, int64_t step) {
  constexpr int64_t TOGETHER_TOKENS = 4, FETCHED = 4 * TILE_ROWS;
  const int64_t padded = (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
  for (int64_t t = 0; t < count; t += TOGETHER_TOKENS, to += TOGETHER_TOKENS * step) {
    const float *from = y + t / PANEL * PANEL * padded + t % PANEL;
    const int64_t some = shorter(count - t, TOGETHER_TOKENS);
    for (int64_t r = 0; r < rows; r += TILE_ROWS, from += SUMS) {
      Vec sums[TOGETHER_TOKENS];
      turn_four([&](int row) { return from + row * PANEL; }, sums);
      for (int64_t i = 0; i < some; i++) {
        uint16_t *here = to + i * step + r;
        if (r % (2 * TILE_ROWS) == 0 && r + FETCHED < rows) fetch_to_write(here + FETCHED);
        put_rows(sums[i], rows - r, here);
      }
    }
  }
}

// Sums of 16 rows x 16 tokens as the columns of another matrix's tokens.
static void pair_sums(const float *from, uint16_t *to) {
  for (int64_t p = 0; p < TILE_ROWS / 2; p++, from += 2 * PANEL, to += 2 * PANEL)
    for (int64_t t = 0; t < PANEL; t++) {
      to[2 * t] = bf16_bits(from[t]);
      to[2 * t + 1] = bf16_bits(from[PANEL + t]);
    }
}
