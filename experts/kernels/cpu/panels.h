// bf16 tokens against a matrix with AMX, whose registers hold 16 x 32 bf16 or 16 x 16 fp32: one
// instruction multiplies 16 tokens with 32 columns of 16 rows. It knows no sparsity, so weights are
// expanded into the L1 cache, a stretch of columns at a time, and used by all tokens there. Tiles
// are expanded as they lie; rows of any pattern 16 columns at a time, and 16 rows are then turned.
//
// A panel is 16 tokens. For every PANEL_CHUNKS chunks of columns all panels lie one after the other,
// each 16 x 32 of a chunk: what a stretch needs is in one piece, not a power of two apart.

// Chunks of a stretch. Short ones leave room in the L1 cache, long ones spare many tokens' sums the
// way there and back. Integers have a scale for each short one.
static constexpr int64_t SHORT_STRETCH = SCALE_CHUNKS, LONG_STRETCH = PANEL_CHUNKS;
static constexpr int64_t SHORT_TOKENS = 64;
static constexpr int64_t SQUARE = PANEL * CHUNK, SUMS = PANEL * TILE_ROWS;
static constexpr int64_t MOST_TILES = GROUP_ROWS / TILE_ROWS;

// For every pair of kept columns, the bytes of (v0, v1) in two of four columns; 0x80 gives 0.
struct Spread {
  uint32_t of[16];
};

static constexpr Spread spread_of(int first_column) {
  Spread spread = {};
  for (int nibble = 0; nibble < 16; nibble++) {
    uint32_t bytes = 0x80808080;
    for (int half = 0; half < 2; half++) {
      const int column = first_column + half, shift = 16 * half;
      const uint32_t kept = (nibble & 3) == column ? 0x0100 : nibble >> 2 == column ? 0x0302 : 0;
      if (kept) bytes = (bytes & ~(0xffffu << shift)) | kept << shift;
    }
    spread.of[nibble] = bytes;
  }
  return spread;
}

alignas(64) static constexpr Spread SPREAD_LOW = spread_of(0), SPREAD_HIGH = spread_of(2);

// One chunk of a tile as AMX wants the second factor: a row for two columns, 16 pairs in it.
template <Kind kind>
static inline void expand_chunk(const uint8_t *chunk, uint16_t *dense) {
  const __m512i low = _mm512_load_si512(SPREAD_LOW.of), high = _mm512_load_si512(SPREAD_HIGH.of);
  const __m512i lanes = _mm512_broadcast_i32x4(
      _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
  __m512i control = (__m512i)load_int(chunk);
  const uint8_t *group = chunk + CONTROL_BYTES;
#pragma GCC unroll 4
  for (int g = 0; g < GROUPS; g++, group += GROUP_BYTES[kind], dense += 64) {
    const __m512i values = bf16_pair<kind>(group);
    const __m512i here = _mm512_or_si512(_mm512_permutexvar_epi32(control, low), lanes);
    const __m512i there = _mm512_or_si512(_mm512_permutexvar_epi32(control, high), lanes);
    control = _mm512_srli_epi32(control, 4);
    _mm512_store_si512(dense, _mm512_shuffle_epi8(values, here));
    _mm512_store_si512(dense + 32, _mm512_shuffle_epi8(values, there));
  }
}

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

static inline __m512i floats_of(__m128i codes) {
  return (__m512i)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
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
  const __m256i codes = _mm256_maskz_expand_epi8(bits, row_codes<kind>(row.values, from));
  return halves(floats_of(_mm256_castsi256_si128(codes)),
                floats_of(_mm256_extracti128_si256(codes, 1)));
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

// The same 32 columns of up to 16 rows as `expand_chunk` gives those of a tile.
template <Kind kind>
static inline void expand_rows(const Row *rows, int64_t *at, int64_t count, int64_t column,
                               int64_t columns, uint16_t *dense) {
  bool inside = count == TILE_ROWS && column + CHUNK <= columns;
  for (int64_t r = 0; inside && r < TILE_ROWS; r++) inside = at[r] + CHUNK + 2 <= rows[r].total;
  Vec square[TILE_ROWS];
  if (inside) {
#pragma GCC unroll 16
    for (int64_t r = 0; r < TILE_ROWS; r++) square[r] = (Vec)row_pairs<kind>(rows[r], at[r], column);
  } else {
    for (int64_t r = 0; r < TILE_ROWS; r++)
      square[r] = r < count ? (Vec)last_pairs<kind>(rows[r], at[r], column, columns) : Vec{};
  }
  turn_square(square);
#pragma GCC unroll 16
  for (int64_t p = 0; p < TILE_ROWS; p++) _mm512_store_si512(dense + 32 * p, (__m512i)square[p]);
}

// Where N tiles go on, to be fetched while this stretch of them is expanded and multiplied.
class Ahead {
 public:
  // In so many steps.
  Ahead(const uint8_t *at, int64_t bytes, int64_t step, int64_t tiles, int64_t steps)
      : at_(at), start_(at), lines_(bytes / 64 + 1), step_(step), tiles_(tiles),
        some_((lines_ * tiles + steps - 1) / steps) {}

  inline void fetch() {
    for (int64_t i = 0; i < some_ && tiles_ > 0; i++, at_ += 64) {
      __builtin_prefetch(at_, 0, 2);
      if (++line_ < lines_) continue;
      line_ = 0;
      tiles_--;
      at_ = start_ += step_;
      at_ -= 64;
    }
  }

 private:
  const uint8_t *at_, *start_;
  int64_t line_ = 0, lines_, step_, tiles_, some_;
};

// Adds a panel's product with a stretch of N tiles to registers 0 to N - 1.
template <int N>
static inline void panel_products(const uint16_t *x, const uint16_t *dense, int64_t chunks,
                                  Ahead &ahead) {
  for (int64_t c = 0; c < chunks; c++, x += SQUARE, dense += MOST_TILES * SQUARE) {
    ahead.fetch();
    _tile_loadd(4, x, 64);
    _tile_loadd(5, dense, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N > 1) {
      _tile_loadd(6, dense + SQUARE, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (N > 2) {
      _tile_loadd(7, dense + 2 * SQUARE, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (N > 3) {
      _tile_loadd(5, dense + 3 * SQUARE, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
}

template <int N>
static inline void start_sums(const float *y, bool first) {
  if (first) {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) _tile_zero(2);
    if constexpr (N > 3) _tile_zero(3);
    return;
  }
  _tile_loadd(0, y, 64);
  if constexpr (N > 1) _tile_loadd(1, y + SUMS, 64);
  if constexpr (N > 2) _tile_loadd(2, y + 2 * SUMS, 64);
  if constexpr (N > 3) _tile_loadd(3, y + 3 * SUMS, 64);
}

template <int N>
static inline void keep_sums(float *y) {
  _tile_stored(0, y, 64);
  if constexpr (N > 1) _tile_stored(1, y + SUMS, 64);
  if constexpr (N > 2) _tile_stored(2, y + 2 * SUMS, 64);
  if constexpr (N > 3) _tile_stored(3, y + 3 * SUMS, 64);
}

// Adds products of codes, times their rows' scales, to y; or puts them there.
template <int N>
static inline void add_scaled(const float *products, const uint8_t *const *scales, bool first,
                              float *y) {
  for (int i = 0; i < N; i++) {
    const __m512 scale = (__m512)load_bf16(scales[i]);
    for (int t = 0; t < PANEL; t++, products += TILE_ROWS, y += TILE_ROWS) {
      const __m512 product = _mm512_load_ps(products);
      const __m512 sum = first ? _mm512_setzero_ps() : _mm512_loadu_ps(y);
      _mm512_storeu_ps(y, _mm512_fmadd_ps(product, scale, sum));
    }
  }
}

// All panels with an expanded stretch of N times 16 rows, one below the other. Sums of a panel are
// y_step apart.
template <Kind kind, int N>
static void panels_stretch(const uint16_t *dense, const uint8_t *const *scales, int64_t chunk,
                           int64_t some, const uint16_t *x, int64_t width, int64_t count, float *y,
                           int64_t y_step, Ahead &ahead) {
  alignas(64) float products[MOST_TILES * SUMS];
  const bool first = chunk == 0;
  const int64_t inside = chunk % PANEL_CHUNKS, before = chunk - inside;
  const int64_t x_step = shorter(width / CHUNK - before, PANEL_CHUNKS) * SQUARE;
  const int64_t panels = (count + PANEL - 1) / PANEL;
  const uint16_t *panel = x + before * panels * SQUARE + inside * SQUARE;
  for (int64_t t = 0; t < panels; t++, panel += x_step, y += y_step) {
    start_sums<N>(y, first || IS_INTEGER[kind]);
    panel_products<N>(panel, dense, some, ahead);
    if constexpr (IS_INTEGER[kind]) {
      keep_sums<N>(products);
      add_scaled<N>(products, scales, first, y);
    } else {
      keep_sums<N>(y);
    }
  }
}

template <Kind kind, int N>
static void tiles_stretch(const uint8_t *tile, int64_t size, int64_t chunk, int64_t some,
                          const uint8_t *next, const uint16_t *x, int64_t width, int64_t count,
                          float *y, int64_t y_step) {
  alignas(64) uint16_t dense[LONG_STRETCH * MOST_TILES * SQUARE];
  const int64_t steps = (N + (count + PANEL - 1) / PANEL) * some;
  Ahead ahead(next, some * chunk_bytes(kind), size, N, steps);
  const uint8_t *scales[N];
  for (int i = 0; i < N; i++) {
    const uint8_t *at = tile + i * size + chunk_at(kind, chunk);
    scales[i] = tile + i * size + scale_at(kind, chunk / SCALE_CHUNKS);
    for (int64_t c = 0; c < some; c++) {
      ahead.fetch();
      expand_chunk<kind>(at + c * chunk_bytes(kind), dense + (c * MOST_TILES + i) * SQUARE);
    }
  }
  panels_stretch<kind, N>(dense, scales, chunk, some, x, width, count, y, y_step, ahead);
}

// A row's next stretch comes after those of many other rows, each in a page of its own, so no
// hardware sees it coming. About half of its columns are kept.
template <Kind kind>
static inline void fetch_row(const Row &row, int64_t at, int64_t some) {
  constexpr int64_t HALVES = kind == BF16 ? 4 : kind == INT8 ? 2 : 1;
  const uint8_t *from = row.values + at * HALVES / 2;
  for (int64_t b = 0; b <= some * CHUNK / 2 * HALVES / 2; b += 64) __builtin_prefetch(from + b, 0, 2);
}

// `at` is each row's first value in this stretch, and then the first one behind it.
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
    for (int64_t c = 0; c < some; c++)
      expand_rows<kind>(rows + first, at + first, here, (chunk + c) * CHUNK, columns,
                        dense + (c * MOST_TILES + i) * SQUARE);
    for (int64_t r = first; r < first + here; r++) fetch_row<kind>(rows[r], at[r], some);
  }
  panels_stretch<kind, N>(dense, scales, chunk, some, x, width, count, y, y_step, none);
}

// What the registers hold: all of them 16 rows of 64 bytes.
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static inline int64_t stretch_of(Kind kind, int64_t count) {
  return IS_INTEGER[kind] || count <= SHORT_TOKENS ? SHORT_STRETCH : LONG_STRETCH;
}

// All tiles take a stretch before any takes the next, so that the panels' columns of it stay in the L2
// cache.
template <Kind kind>
static void panel_tiles(const uint8_t *tile, const Matrix &m, int64_t rows, const uint16_t *x,
                        int64_t width, int64_t count, float *y) {
  const int64_t size = tile_size(kind, m.columns), chunks = chunks_of(m.columns);
  const int64_t y_step = (rows + TILE_ROWS - 1) / TILE_ROWS * SUMS;
  const int64_t stretch = stretch_of(kind, count);
  for (int64_t chunk = 0; chunk < chunks; chunk += stretch) {
    const int64_t some = shorter(chunks - chunk, stretch);
    for (int64_t r = 0; r < rows; r += GROUP_ROWS) {
      const uint8_t *here = tile + r / TILE_ROWS * size;
      const bool last = r + GROUP_ROWS >= rows;
      const uint8_t *next = last ? tile + chunk_at(kind, chunk + stretch)
                                 : here + MOST_TILES * size + chunk_at(kind, chunk);
      const int64_t tiles = (shorter(rows - r, GROUP_ROWS) + TILE_ROWS - 1) / TILE_ROWS;
      FOR_TILES(tiles, tiles_stretch<kind, N>(here, size, chunk, some, next, x, width, count,
                                              y + r * PANEL, y_step));
    }
  }
}

template <Kind kind>
static void panel_rows(const Row *found, int64_t *at, const Matrix &m, int64_t rows,
                       const uint16_t *x, int64_t width, int64_t count, float *y) {
  const int64_t chunks = chunks_of(m.columns), stretch = stretch_of(kind, count);
  const int64_t y_step = (rows + TILE_ROWS - 1) / TILE_ROWS * SUMS;
  for (int64_t chunk = 0; chunk < chunks; chunk += stretch) {
    const int64_t some = shorter(chunks - chunk, stretch);
    for (int64_t r = 0; r < rows; r += GROUP_ROWS) {
      const int64_t real = shorter(rows - r, GROUP_ROWS);
      FOR_TILES((real + TILE_ROWS - 1) / TILE_ROWS,
                rows_stretch<kind, N>(found + r, at + r, real, m.columns, chunk, some, x, width,
                                      count, y + r * PANEL, y_step));
    }
  }
}

static bool panels(const Matrix &m, int64_t which, int64_t row, int64_t rows, const uint16_t *x,
                   int64_t width, int64_t count, float *y) {
  Row found[MOST_ROWS];
  int64_t at[MOST_ROWS];
  const bool tiled = m.layout == TILES;
  for (int64_t r = 0; r < (tiled ? 0 : rows); r++) {
    found[r] = row_of(m, which, row + r);
    if (!row_holds(found[r], m.columns)) return false;
    at[r] = found[r].first;
  }
  const Shapes shapes;
  const uint8_t *tile = tiled ? tile_of(m, which, row) : nullptr;
  _tile_loadconfig(&shapes);
#define BOTH(K)                                              \
  if (tiled)                                                 \
    panel_tiles<K>(tile, m, rows, x, width, count, y);       \
  else                                                       \
    panel_rows<K>(found, at, m, rows, x, width, count, y);
  switch (m.kind) {
    case BF16: BOTH(BF16) break;
    case INT8: BOTH(INT8) break;
    default: BOTH(INT4)
  }
#undef BOTH
  _tile_release();
  return true;
}
