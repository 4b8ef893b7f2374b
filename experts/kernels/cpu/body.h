// What every instruction set has in common, given its vectors. Included inside its namespace.

#include "choose.h"

#include "activations.h"
#include "lanes.h"
#include "rows.h"
#if defined(MOIETY_EXPAND)
#include "few.h"
#include "dense.h"
#endif
#include "tokens.h"

static int64_t shorter(int64_t a, int64_t b) { return a < b ? a : b; }

// Tiles always give whole tiles of rows; y has room for them.
static bool few_tokens(const Matrix &m, int64_t which, int64_t row, int64_t rows, const float *x,
                       int64_t x_step, int64_t count, float *y, int64_t y_step) {
  if (m.layout == TILES) {
    const uint8_t *tile = tile_of(m, which, row);
    const int64_t size = tile_size(m.kind, m.columns), chunks = chunks_of(m.columns);
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    FOR_TILE_KIND(m.kind, tiles_few<K>(tile, size, tiles, chunks, x, x_step, count, y, y_step));
    return true;
  }
#if defined(MOIETY_EXPAND)
  if (m.layout == DENSE) {
    dense_tokens(m, row, rows, x, x_step, count, y, y_step);
    return true;
  }
  Row found[GROUP_ROWS];
  for (int64_t r = 0; r < rows; r++) {
    found[r] = row_of(m, which, row + r);
    if (!row_holds(found[r], m.columns)) return false;
  }
  FOR_KIND(m.kind, rows_lanes<K>(found, rows, m.columns, x, x_step, count, y, y_step));
  return true;
#else
  return false;
#endif
}

// A step of columns of one tile after the other; the next step of each is fetched meanwhile.
template <Kind kind>
static void tiles_step(const Matrix &m, const uint8_t *tile, int64_t size, int64_t count,
                       int64_t column, const float *x, int64_t vectors, float *y) {
  alignas(64) float values[LISTED][TILE_ROWS];
  alignas(64) int32_t places[LISTED][TILE_ROWS];
  const int64_t chunk = column / CHUNK, wide = vectors * WIDTH;
  const int64_t some = shorter(chunks_of(m.columns) - chunk, STEP / CHUNK);
  const int64_t bytes = some * chunk_bytes(kind);
  for (int64_t i = 0; i < count; i++, tile += size, y += TILE_ROWS * wide) {
    const uint8_t *next = tile + chunk_at(kind, chunk) + bytes;
    for (int64_t b = 0; b < bytes; b += 64) fetch(next + b);
    list_tile<kind>(tile, chunk, some, (int)(wide * sizeof(float)), values, places);
    FOR_NUMBER(vectors, add_tile<N>(values, places, 2 * GROUPS * some, x, y));
  }
}

// What rows keep of a span of columns. `at` is each one's first value there, and then the first one
// behind it.
template <Kind kind>
static void list_rows(const Matrix &m, const Row *rows, int64_t *at, int64_t count, int64_t column,
                      int64_t end, Listed *lists) {
  const int64_t some = (end - column + 63) / 64;
  for (int64_t r = 0; r < count; r++) {
    const Row &row = rows[r];
    uint64_t words[SPAN / 64];
    for (int64_t w = 0; w < some; w++) words[w] = bits_at(row, column + 64 * w, m.columns);
    list_row<kind>(row, at[r], words, some, column, lists[r]);
    const uint8_t *here = place_of<kind>(row.values, at[r]);
    at[r] += lists[r].count;
    const int64_t bytes = place_of<kind>(row.values, at[r]) - here;
    if (r + 2 < count) {
      const uint8_t *next = place_of<kind>(rows[r + 2].values, at[r + 2]);
      for (int64_t b = 0; b < bytes; b += 64) fetch(next + b);
    }
  }
}

// Listed values that are multiplied at once: those of about 64 columns, of more where a block of
// tokens is narrow, so that these columns stay in the L1 cache. As many of every row, whatever it
// keeps there, so that the CPU need not guess when they end.
static int64_t values_at_once(const Matrix &m, int64_t vectors) {
  const int64_t words = vectors <= 2 ? 4 : vectors <= 4 ? 2 : 1;
  const int64_t kept = 64 * m.total / (m.rows * m.columns);
  return words * (kept < 4 ? 4 : (kept + 1) / 2 * 2);
}

// Adds the products of listed rows to their sums.
template <int V>
static void add_rows(const Listed *lists, int64_t count, int64_t at_once, const float *x, float *y) {
  for (int64_t from = 0, left = count; left; from += at_once) {
    left = 0;
    for (int64_t r = 0; r < count; r++) {
      const int64_t rest = lists[r].count - from;
      if (rest <= 0) continue;
      add_listed<V, 1, V * WIDTH * 4>(lists[r].values + from, lists[r].columns + from,
                                      shorter(rest, at_once), x, y + r * V * WIDTH);
      left += rest > at_once;
    }
  }
}

// A group of rows for a block of tokens over a span of columns: the sums stay in the L1 cache.
static void tiles_span(const Matrix &m, const uint8_t *tile, int64_t rows, int64_t column,
                       int64_t end, const float *x, int64_t vectors, float *y) {
  const int64_t size = tile_size(m.kind, m.columns), count = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (; column < end; column += STEP, x += STEP * vectors * WIDTH)
    FOR_TILE_KIND(m.kind, tiles_step<K>(m, tile, size, count, column, x, vectors, y));
}

// All tokens take a span of columns before any takes the next, so that it stays in the L2 cache
// while every group of rows passes over it.
static bool many_tokens(const Matrix &m, int64_t which, int64_t row, int64_t rows, const float *x,
                        int64_t padded_columns, int64_t count, int64_t block, float *y) {
  Row found[BLOCK_ROWS];
  int64_t at[BLOCK_ROWS];
  Listed lists[GROUP_ROWS];
  const bool tiled = m.layout == TILES;
  const int64_t room = tiled ? (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS : rows;
  for (int64_t r = 0; r < (tiled ? 0 : rows); r++) {
    found[r] = row_of(m, which, row + r);
    if (!row_holds(found[r], m.columns)) return false;
    at[r] = found[r].first;
  }
  const int64_t padded_count = (count + WIDTH - 1) / WIDTH * WIDTH;
  for (int64_t i = 0; i < room * padded_count; i++) y[i] = 0.0f;
  for (int64_t column = 0; column < m.columns; column += SPAN) {
    const int64_t end = shorter(column + SPAN, m.columns);
    for (int64_t r = 0; r < rows; r += GROUP_ROWS) {
      const int64_t some = shorter(rows - r, GROUP_ROWS);
      if (!tiled) FOR_KIND(m.kind, list_rows<K>(m, found + r, at + r, some, column, end, lists));
      for (int64_t first = 0; first < count; first += block) {
        const int64_t vectors = (shorter(count - first, block) + WIDTH - 1) / WIDTH;
        const float *input = x + first * padded_columns + column * vectors * WIDTH;
        float *to = y + first * room + r * vectors * WIDTH;
        if (tiled)
          tiles_span(m, tile_of(m, which, row + r), some, column, end, input, vectors, to);
        else
          FOR_NUMBER(vectors, add_rows<N>(lists, some, values_at_once(m, vectors), input, to));
      }
    }
  }
  return true;
}

static void widen(const uint16_t *from, float *to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = bf16_value(from[i]);
}

static void narrow(const float *from, uint16_t *to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = bf16_bits(from[i]);
}

// One row of the rows layout, dense. False where its mask and its values disagree.
static bool dense_row(const Matrix &m, int64_t which, int64_t row, float *y) {
  const Row one = row_of(m, which, row);
  if (!row_holds(one, m.columns)) return false;
#if defined(MOIETY_EXPAND)
  FOR_KIND(m.kind, row_dense<K>(one, m.columns, y));
#else
  __builtin_memset(y, 0, m.columns * 4);
  int64_t at = one.first;
  for (int64_t column = 0; column < m.columns; column += 64) {
    const float scale = one.scale ? bf16_value(one.scale[column / SCALE_COLUMNS]) : 1.0f;
    for (uint64_t bits = bits_at(one, column, m.columns); bits; bits &= bits - 1, at++) {
      const int64_t c = column + __builtin_ctzll(bits);
      FOR_KIND(m.kind, y[c] = value_at<K>(one.values, at) * scale);
    }
  }
#endif
  return true;
}

#if defined(MOIETY_SQUARES)
static inline Vec load_some(const float *at, int64_t count) {
  Vec some = {};
  if (count == WIDTH) return load(at);
  __builtin_memcpy(&some, at, count * 4);
  return some;
}

static inline void store_some(float *at, Vec value, int64_t count) {
  if (count == WIDTH)
    store(at, value);
  else
    __builtin_memcpy(at, &value, count * 4);
}

// Half a chunk of a tile: 16 columns of 16 rows.
template <Kind kind>
static inline void dense_square(const Chunk &chunk, int half, Vec scale, float *y,
                                int64_t y_step) {
  Vec square[16];
  Int control = load_int(chunk.at) >> 16 * half;
#pragma GCC unroll 4
  for (int g = 0; g < GROUPS / 2; g++, control >>= 4) {
    Vec v0, v1;
    pair<kind>(chunk, half * GROUPS / 2 + g, 0, v0, v1);
    if (IS_INTEGER[kind]) v0 *= scale, v1 *= scale;
    const Int first = control & 3, second = control >> 2 & 3;
    for (int c = 0; c < 4; c++)
      square[4 * g + c] = (Vec)(((Int)v0 & (first == c)) | ((Int)v1 & (second == c)));
  }
  turn_square(square);
  for (int r = 0; r < 16; r++) store(y + r * y_step, square[r]);
}

template <Kind kind>
static void dense_chunks(const Matrix &m, const uint8_t *tile, float *y, int64_t y_step) {
  for (int64_t chunk = 0; chunk < chunks_of(m.columns); chunk++, y += CHUNK) {
    const Chunk here = chunk_in<kind>(tile, tile + chunk_at(kind, chunk));
    const Vec scale = IS_INTEGER[kind] ? load_bf16(tile + scale_at(kind, chunk / SCALE_CHUNKS)) : Vec{};
    dense_square<kind>(here, 0, scale, y, y_step);
    dense_square<kind>(here, 1, scale, y + CHUNK / 2, y_step);
  }
}

static void dense_tile(const Matrix &m, int64_t which, int64_t row, float *y, int64_t y_step) {
  const uint8_t *tile = tile_of(m, which, row);
  FOR_TILE_KIND(m.kind, dense_chunks<K>(m, tile, y, y_step));
}

static void turn(const float *from, int64_t from_step, int64_t rows, int64_t count, float *to,
                 int64_t to_step) {
  for (int64_t r = 0; r < rows; r += WIDTH) {
    for (int64_t t = 0; t < count; t += WIDTH) {
      const int64_t some = shorter(rows - r, WIDTH), less = shorter(count - t, WIDTH);
      Vec square[WIDTH] = {};
      for (int64_t i = 0; i < some; i++)
        square[i] = load_some(from + (r + i) * from_step + t, less);
      turn_square(square);
      for (int64_t i = 0; i < less; i++) store_some(to + (t + i) * to_step + r, square[i], some);
    }
  }
}
#else
static constexpr decltype(Kernels::dense_tile) dense_tile = nullptr;

static void turn(const float *from, int64_t from_step, int64_t rows, int64_t count, float *to,
                 int64_t to_step) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t t = 0; t < count; t++) to[t * to_step + r] = from[r * from_step + t];
}
#endif

static void transpose(const void *const *rows, int64_t count, bool bf16, int64_t wide,
                      int64_t first_column, int64_t columns, float *block) {
  constexpr int64_t SOME = 256;
  float wider[WIDTH * SOME];
  for (int64_t t = 0; t < wide; t += WIDTH) {
    for (int64_t c = 0; c < columns; c += SOME) {
      const int64_t some = shorter(columns - c, SOME);
      for (int64_t i = 0; i < WIDTH; i++) {
        float *to = wider + i * SOME;
        const int64_t from = first_column + c;
        if (t + i >= count)
          for (int64_t j = 0; j < some; j++) to[j] = 0.0f;
        else if (bf16)
          widen((const uint16_t *)rows[t + i] + from, to, some);
        else
          __builtin_memcpy(to, (const float *)rows[t + i] + from, some * 4);
      }
      turn(wider, SOME, WIDTH, some, block + c * wide + t, wide);
    }
  }
}

// This instruction set's table; the crossovers are measured for each.
static constexpr Kernels kernels_with(int64_t few_tiles, int64_t few_rows,
                                      decltype(Kernels::dots) dots) {
  Kernels kernels = {};
  kernels.width = WIDTH;
  static_assert(8 * WIDTH <= MOST_BLOCK);
  kernels.block = 8 * WIDTH;
  kernels.few_tiles = few_tiles;
  kernels.few_rows = few_rows;
  kernels.lanes = few_tokens;
  kernels.tokens = many_tokens;
  kernels.dots = dots;
  kernels.gated = gated;
  kernels.transpose = transpose;
  kernels.turn = turn;
  kernels.dense_row = dense_row;
  kernels.dense_tile = dense_tile;
  kernels.widen = widen;
  kernels.narrow = narrow;
  return kernels;
}
