// bf16 tokens against tiles with AMX, whose registers hold 16 x 32 bf16 or 16 x 16 fp32: one
// instruction multiplies 16 tokens with 32 columns of 16 rows. It knows no sparsity, so weights are
// expanded into the L1 cache, a stretch of columns at a time, and used by all tokens there. Of its
// two factors the first lies row by row, the second in pairs of columns, which is how tiles expand.
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

// Where N tiles go on, to be fetched while this stretch of them is expanded and multiplied.
class Ahead {
 public:
  // In so many steps.
  Ahead(const uint8_t *at, int64_t bytes, int64_t step, int64_t tiles, int64_t steps)
      : at_(at), start_(at), lines_(bytes / 64 + 1), step_(step), tiles_(tiles),
        some_((lines_ * tiles + steps - 1) / steps) {}

  inline void go_on() {
    for (int64_t i = 0; i < some_ && tiles_ > 0; i++, at_ += 64) {
      fetch(at_);
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

// Sums in register `to` take a product of one with another, the other way round unless ONE_FIRST.
#define ADD_PRODUCT(to, one, other)                             \
  if constexpr (ONE_FIRST) _tile_dpbf16ps(to, one, other);      \
  else _tile_dpbf16ps(to, other, one)

// Adds the products of one with N others, `step` apart, to registers 0 to N - 1.
template <int N, bool ONE_FIRST>
static inline void one_by_many(const uint16_t *one, const uint16_t *others, int64_t step) {
  _tile_loadd(4, one, 64);
  _tile_loadd(5, others, 64);
  ADD_PRODUCT(0, 4, 5);
  if constexpr (N > 1) {
    _tile_loadd(6, others + step, 64);
    ADD_PRODUCT(1, 4, 6);
  }
  if constexpr (N > 2) {
    _tile_loadd(7, others + 2 * step, 64);
    ADD_PRODUCT(2, 4, 7);
  }
  if constexpr (N > 3) {
    _tile_loadd(5, others + 3 * step, 64);
    ADD_PRODUCT(3, 4, 5);
  }
}

#undef ADD_PRODUCT

// Adds a panel's product with a stretch of N tiles, which come first where ROWS_FIRST, to registers 0
// to N - 1.
template <int N, bool ROWS_FIRST>
static inline void panel_products(const uint16_t *x, const uint16_t *dense, int64_t chunks,
                                  Ahead &ahead) {
  for (int64_t c = 0; c < chunks; c++, x += SQUARE, dense += MOST_TILES * SQUARE) {
    ahead.go_on();
    one_by_many<N, !ROWS_FIRST>(x, dense, SQUARE);
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
template <int N, bool ROWS_FIRST>
static inline void add_scaled(const float *products, const uint8_t *const *scales, bool first,
                              float *y) {
  for (int i = 0; i < N; i++) {
    __m512 scale = (__m512)load_bf16(scales[i]);
    for (int line = 0; line < PANEL; line++, products += TILE_ROWS, y += TILE_ROWS) {
      if (ROWS_FIRST) scale = _mm512_set1_ps(bf16_value(load_u16(scales[i] + 2 * line)));
      const __m512 product = _mm512_load_ps(products);
      const __m512 sum = first ? _mm512_setzero_ps() : _mm512_loadu_ps(y);
      _mm512_storeu_ps(y, _mm512_fmadd_ps(product, scale, sum));
    }
  }
}

// All panels with an expanded stretch of N times 16 rows, one below the other. Sums of a panel are
// y_step apart.
template <Kind kind, int N, bool ROWS_FIRST>
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
    panel_products<N, ROWS_FIRST>(panel, dense, some, ahead);
    if constexpr (IS_INTEGER[kind]) {
      keep_sums<N>(products);
      add_scaled<N, ROWS_FIRST>(products, scales, first, y);
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
      ahead.go_on();
      expand_chunk<kind>(at + c * chunk_bytes(kind), dense + (c * MOST_TILES + i) * SQUARE);
    }
  }
  panels_stretch<kind, N, false>(dense, scales, chunk, some, x, width, count, y, y_step, ahead);
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

static bool panels(const Matrix &m, int64_t which, int64_t row, int64_t rows, const uint16_t *x,
                   int64_t width, int64_t count, float *y) {
  const Shapes shapes;
  const uint8_t *tile = tile_of(m, which, row);
  _tile_loadconfig(&shapes);
  switch (m.kind) {
    case BF16: panel_tiles<BF16>(tile, m, rows, x, width, count, y); break;
    case INT8: panel_tiles<INT8>(tile, m, rows, x, width, count, y); break;
    default: panel_tiles<INT4>(tile, m, rows, x, width, count, y);
  }
  _tile_release();
  return true;
}
