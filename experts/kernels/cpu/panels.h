// bf16 tokens against weights with AMX, whose registers hold 16 x 32 bf16 or 16 x 16 fp32: one
// instruction multiplies 16 tokens with 32 columns of 16 rows. It knows no sparsity, so weights
// are expanded first, a chunk of columns at a time. Of its two factors the first lies row by row,
// the second in pairs of columns, which is how tiles expand.
//
// A panel is 16 tokens. Up to NARROW_PANELS panels, 16 rows are read from their start to their end
// and never written: all sums stay in registers, and what is expanded is multiplied at once. More
// panels take strips of up to 48 rows, PANEL_CHUNKS chunks of which are expanded while the first
// two panels are multiplied and serve all others from the L2 cache. Six sums and two factors are
// all the registers there are, and the sums' way to memory and back costs as much as several
// products.
//
// For every PANEL_CHUNKS chunks of columns all panels lie one after the other, each 16 x 32 of a
// chunk: they stay in the L2 cache for all strips, and are not a power of two apart.
//
// A source of weights has GROUP, chunks that are expanded together; LAG, by how many steps a chunk
// is expanded before it is multiplied, so that both go on at a time; expand<N>(step, dense,
// width), which does the step's part of N tiles of its group, which begins at `dense` and whose
// chunks are `width` apart; and fetch_some(), which is called at every step of a strip.

static constexpr int64_t SQUARE = PANEL * CHUNK, SUMS = PANEL * TILE_ROWS;
static constexpr int64_t NARROW_PANELS = 6;

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

// The places of two vectors' halves, taken in turns.
struct Interleaved {
  uint16_t of[32];
};

static constexpr Interleaved interleaved() {
  Interleaved places = {};
  for (int i = 0; i < 32; i++) places.of[i] = (uint16_t)(i % 2 * 16 + i / 2);
  return places;
}

alignas(64) static constexpr Interleaved INTERLEAVED = interleaved();

// A group of a tile as pairs of bf16, codes times their rows' scales.
template <Kind kind>
static inline __m512i weight_pair(const Chunk &chunk, int group, Vec scale) {
  if constexpr (kind == BF16) return (__m512i)load_int(group_of<kind>(chunk, group));
  if constexpr (kind == BF12) return bf12_pairs(chunk, group);
  Vec v0, v1;
  pair<kind>(chunk, group, 0, v0, v1);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)(v1 * scale), (__m512)(v0 * scale));
  return _mm512_permutexvar_epi16(_mm512_load_si512(INTERLEAVED.of), both);
}

// One chunk of a tile as AMX wants the second factor: a row for two columns, 16 pairs in it.
template <Kind kind>
static inline void expand_chunk(const Chunk &chunk, Vec scale, uint16_t *dense) {
  const __m512i low = _mm512_load_si512(SPREAD_LOW.of), high = _mm512_load_si512(SPREAD_HIGH.of);
  const __m512i lanes = _mm512_broadcast_i32x4(
      _mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
  __m512i control = (__m512i)load_int(chunk.at);
#pragma GCC unroll 8
  for (int g = 0; g < GROUPS; g++, dense += 64) {
    const __m512i values = weight_pair<kind>(chunk, g, scale);
    const __m512i here = _mm512_or_si512(_mm512_permutexvar_epi32(control, low), lanes);
    const __m512i there = _mm512_or_si512(_mm512_permutexvar_epi32(control, high), lanes);
    control = _mm512_srli_epi32(control, 4);
    _mm512_store_si512(dense, _mm512_shuffle_epi8(values, here));
    _mm512_store_si512(dense + 32, _mm512_shuffle_epi8(values, there));
  }
}

// What the intrinsics of GCC do not say: registers are loaded from memory and stored there.
#define MEMORY_IS_USED __asm__ volatile("" ::: "memory")

// Sums in register `to` take the product of tokens in register 6 and rows in register 7, which
// come first where ROWS_FIRST.
#define ADD_PRODUCT(to)                                        \
  if constexpr (ROWS_FIRST) _tile_dpbf16ps(to, 7, 6);          \
  else _tile_dpbf16ps(to, 6, 7)

// Adds the products of a chunk of P panels, `step` apart, and N tiles: those of tile n and panel p
// to register 3 p + n. Each factor is loaded anew where it is needed again, which the L1 cache
// bears.
template <int N, int P, bool ROWS_FIRST>
static inline void add_strip(const uint16_t *x, int64_t step, const uint16_t *dense) {
  _tile_loadd(6, x, 64);
  _tile_loadd(7, dense, 64);
  ADD_PRODUCT(0);
  if constexpr (N > 1) {
    _tile_loadd(7, dense + SQUARE, 64);
    ADD_PRODUCT(1);
  }
  if constexpr (N > 2) {
    _tile_loadd(7, dense + 2 * SQUARE, 64);
    ADD_PRODUCT(2);
  }
  if constexpr (P == 1) return;
  _tile_loadd(6, x + step, 64);
  if constexpr (N > 2) {
    ADD_PRODUCT(5);
    _tile_loadd(7, dense + SQUARE, 64);
  }
  if constexpr (N > 1) {
    ADD_PRODUCT(4);
    _tile_loadd(7, dense, 64);
  }
  ADD_PRODUCT(3);
}

// Runs MOVE(register, where its sums are) for all sums of P panels and N tiles.
#define MOVE_SUMS(MOVE)                                                \
  MOVE(0, y);                                                          \
  if constexpr (N > 1) MOVE(1, y + SUMS);                              \
  if constexpr (N > 2) MOVE(2, y + 2 * SUMS);                          \
  if constexpr (P > 1) MOVE(3, y + y_step);                            \
  if constexpr (P > 1 && N > 1) MOVE(4, y + y_step + SUMS);            \
  if constexpr (P > 1 && N > 2) MOVE(5, y + y_step + 2 * SUMS)
#define CLEAR(to, from) _tile_zero(to)
#define TAKE(to, from) _tile_loadd(to, from, 64)
#define KEEP(from, to) _tile_stored(from, to, 64)

template <int N, int P>
static inline void start_sums(const float *y, int64_t y_step, bool first) {
  if (first) {
    MOVE_SUMS(CLEAR);
  } else {
    MOVE_SUMS(TAKE);
  }
}

template <int N, int P>
static inline void keep_sums(float *y, int64_t y_step) {
  MOVE_SUMS(KEEP);
  MEMORY_IS_USED;
}

#undef MOVE_SUMS

// Expands a step's part of N tiles, of which `room` chunks lie `width` apart at `dense`.
template <int N, class Source>
static inline void expand_step(const Source &source, int64_t step, uint16_t *dense, int64_t room,
                               int64_t width) {
  const int64_t group = step - step % Source::GROUP;
  source.template expand<N>(step, dense + group % room * width, width);
  MEMORY_IS_USED;
}

// P panels with so many chunks of N tiles, which are expanded if they are not yet. Sums of a panel
// are y_step apart.
template <int N, int P, bool ROWS_FIRST, bool EXPANDED, class Source>
static inline void panels_by_strip(Source &source, int64_t chunks, bool first, uint16_t *dense,
                                   const uint16_t *x, int64_t x_step, float *y, int64_t y_step) {
  constexpr int64_t lag = EXPANDED ? 0 : Source::LAG, width = STRIP_TILES * SQUARE;
  start_sums<N, P>(y, y_step, first);
  for (int64_t c = 0; c < chunks + lag; c++) {
    source.fetch_some();
    if (!EXPANDED) expand_step<N>(source, c, dense, PANEL_CHUNKS, width);
    if (c >= lag)
      add_strip<N, P, ROWS_FIRST>(x + (c - lag) * SQUARE, x_step, dense + (c - lag) * width);
  }
  keep_sums<N, P>(y, y_step);
}

// All panels with N tiles' chunks from a multiple of PANEL_CHUNKS on.
template <int N, bool ROWS_FIRST, class Source>
static void multiply_strip(Source &source, bool first, int64_t chunk, int64_t some,
                           const uint16_t *x, int64_t width, int64_t panels, float *y,
                           int64_t y_step) {
  alignas(64) uint16_t dense[PANEL_CHUNKS * STRIP_TILES * SQUARE];
  const int64_t x_step = shorter(width / CHUNK - chunk, PANEL_CHUNKS) * SQUARE;
  x += chunk * panels * SQUARE;
  panels_by_strip<N, 2, ROWS_FIRST, false>(source, some, first, dense, x, x_step, y, y_step);
  int64_t p = 2;
  for (; p + 1 < panels; p += 2)
    panels_by_strip<N, 2, ROWS_FIRST, true>(source, some, first, dense, x + p * x_step, x_step,
                                            y + p * y_step, y_step);
  if (p < panels)
    panels_by_strip<N, 1, ROWS_FIRST, true>(source, some, first, dense, x + p * x_step, x_step,
                                            y + p * y_step, y_step);
}

// Adds the products of a chunk of 16 rows and P panels, `step` apart, to registers 0 to P - 1.
template <int P, bool ROWS_FIRST>
static inline void add_narrow(const uint16_t *dense, const uint16_t *x, int64_t step) {
#define ADD_PANEL(p)                                           \
  if constexpr (P > p) {                                       \
    _tile_loadd(6, x + p * step, 64);                          \
    ADD_PRODUCT(p);                                            \
  }
  _tile_loadd(7, dense, 64);
  ADD_PANEL(0)
  ADD_PANEL(1)
  ADD_PANEL(2)
  ADD_PANEL(3)
  ADD_PANEL(4)
  ADD_PANEL(5)
#undef ADD_PANEL
}

// Runs MOVE(register, where its sums are) for P panels of 16 rows.
#define MOVE_NARROW(MOVE)                       \
  MOVE(0, y);                                   \
  if constexpr (P > 1) MOVE(1, y + y_step);     \
  if constexpr (P > 2) MOVE(2, y + 2 * y_step); \
  if constexpr (P > 3) MOVE(3, y + 3 * y_step); \
  if constexpr (P > 4) MOVE(4, y + 4 * y_step); \
  if constexpr (P > 5) MOVE(5, y + 5 * y_step)

template <int P>
static inline void start_narrow(const float *y, int64_t y_step, bool first) {
  if (first) {
    MOVE_NARROW(CLEAR);
  } else {
    MOVE_NARROW(TAKE);
  }
}

template <int P>
static inline void keep_narrow(float *y, int64_t y_step) {
  MOVE_NARROW(KEEP);
  MEMORY_IS_USED;
}

#undef MOVE_NARROW
#undef CLEAR
#undef TAKE
#undef KEEP

// MOST panels, or as many as may be, with all chunks of 16 rows.
template <int MOST, bool ROWS_FIRST, class Source>
static void multiply_narrow(Source &source, bool first, int64_t chunks, const uint16_t *x,
                            int64_t width, float *y, int64_t y_step) {
  constexpr int P = MOST < NARROW_PANELS ? MOST : NARROW_PANELS;
  constexpr int64_t RING = 2 * Source::LAG;
  alignas(64) uint16_t dense[RING * SQUARE];
  start_narrow<P>(y, y_step, first);
  for (int64_t c = 0; c < chunks + Source::LAG; c++) {
    expand_step<1>(source, c, dense, RING, SQUARE);
    const int64_t chunk = c - Source::LAG;
    if (chunk < 0) continue;
    const int64_t before = chunk / PANEL_CHUNKS * PANEL_CHUNKS;
    const int64_t step = shorter(width / CHUNK - before, PANEL_CHUNKS) * SQUARE;
    const uint16_t *panels = x + (before * P + chunk - before) * SQUARE;
    add_narrow<P, ROWS_FIRST>(dense + chunk % RING * SQUARE, panels, step);
  }
  keep_narrow<P>(y, y_step);
}

#undef ADD_PRODUCT

// Runs a statement with the number N of tiles of a strip that so many rows begin with.
#define FOR_STRIP(rows, ...)                                      \
  if ((rows) > 2 * TILE_ROWS) { constexpr int N = 3; __VA_ARGS__; } \
  else if ((rows) > TILE_ROWS) { constexpr int N = 2; __VA_ARGS__; } \
  else { constexpr int N = 1; __VA_ARGS__; }

// What the registers hold: all of them 16 rows of 64 bytes.
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Up to three tiles, one after the other, from some chunk on. What lies `ahead` is fetched where
// tiles are read from start to end; what strips read the CPU itself sees coming.
template <Kind kind>
struct Tiles {
  static constexpr int64_t GROUP = 1, LAG = 2;
  const uint8_t *tile;
  int64_t size, chunk, some, ahead;

  template <int N>
  inline void expand(int64_t c, uint16_t *dense, int64_t) const {
    if (c >= some) return;
    for (int i = 0; i < N; i++) {
      const uint8_t *here = tile + i * size, *at = here + chunk_at(kind, chunk + c);
      for (int64_t b = 0; ahead && b < chunk_bytes(kind); b += 64) fetch(at + ahead + b);
      Vec scale = {};
      if (IS_INTEGER[kind]) scale = load_bf16(here + scale_at(kind, (chunk + c) / SCALE_CHUNKS));
      expand_chunk<kind>(chunk_in<kind>(here, at), scale, dense + i * SQUARE);
    }
  }

  inline void fetch_some() const {}
};

template <Kind kind>
static void panel_tiles(const uint8_t *tile, const Matrix &m, int64_t rows, const uint16_t *x,
                        int64_t column, int64_t width, int64_t count, float *y) {
  const int64_t size = tile_size(kind, m.columns), before = column / CHUNK;
  const int64_t chunks = chunks_of(shorter(m.columns - column, width));
  const int64_t y_step = (rows + TILE_ROWS - 1) / TILE_ROWS * SUMS;
  const int64_t panels = (count + PANEL - 1) / PANEL;
  if (panels <= NARROW_PANELS) {
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      Tiles<kind> tiles = {tile + r / TILE_ROWS * size, size, before, chunks, AHEAD};
      FOR_NUMBER(panels, multiply_narrow<N, false>(tiles, before == 0, chunks, x, width,
                                                   y + r * PANEL, y_step));
    }
    return;
  }
  for (int64_t chunk = 0; !chunk || chunk < chunks; chunk += PANEL_CHUNKS) {
    const int64_t some = shorter(chunks - chunk, PANEL_CHUNKS);
    for (int64_t r = 0; r < rows; r += STRIP_ROWS) {
      Tiles<kind> tiles = {tile + r / TILE_ROWS * size, size, before + chunk, some, 0};
      FOR_STRIP(rows - r, multiply_strip<N, false>(tiles, before + chunk == 0, chunk, some, x, width,
                                                   panels, y + r * PANEL, y_step));
    }
  }
}

static bool panels(const Matrix &m, int64_t which, int64_t row, int64_t rows, const uint16_t *x,
                   int64_t column, int64_t width, int64_t count, float *y) {
  const Shapes shapes;
  const uint8_t *tile = tile_of(m, which, row);
  MEMORY_IS_USED;
  _tile_loadconfig(&shapes);
  FOR_BF16_TILE_KIND(m.kind, panel_tiles<K>(tile, m, rows, x, column, width, count, y));
  _tile_release();
  return true;
}

// Results are fetched before they are written, or every line would be waited for.
static inline void fetch_to_write(const uint16_t *at) { __builtin_prefetch(at, 1); }

// Up to 16 rows' sums of one token.
static inline void put_rows(Vec sums, int64_t rows, uint16_t *to) {
  const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)sums);
  if (rows >= TILE_ROWS)
    _mm256_storeu_si256((__m256i *)to, halves);
  else
    __builtin_memcpy(to, &halves, 2 * rows);
}

static void put_panels(const float *y, int64_t rows, int64_t count, uint16_t *to, int64_t step) {
  const int64_t padded = (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
  for (int64_t t = 0; t < count; t++, to += step) {
    const float *from = y + t / PANEL * PANEL * padded + t % PANEL * TILE_ROWS;
    const int64_t next = t + 1 < count ? step : 0;
    for (int64_t r = 0; r < rows; r += TILE_ROWS, from += SUMS) {
      if (r % (2 * TILE_ROWS) == 0) fetch_to_write(to + next + r);
      put_rows(load(from), rows - r, to + r);
    }
  }
}
