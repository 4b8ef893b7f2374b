// What every instruction set has in common, given its vectors. Included inside its namespace.

#include "choose.h"

#include "activations.h"
#include "lanes.h"
#include "rows.h"
#include "tiles.h"
#include "tokens.h"

static int64_t shorter(int64_t a, int64_t b) { return a < b ? a : b; }

// Tiles always give whole tiles of rows; y has room for them.
static bool few_tokens(const Matrix &m, int64_t which, int64_t row, int64_t rows, const float *x,
                       int64_t x_step, int64_t count, float *y, int64_t y_step) {
  if (m.layout == TILES) {
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const uint8_t *tile = tile_of(m, which, row + r);
      FOR_KIND(m.kind, tile_few<K>(tile, chunks_of(m.columns), x, x_step, count, y + r, y_step));
    }
    return true;
  }
#if defined(MOIETY_EXPAND8)
  for (int64_t r = 0; r < rows; r++) {
    const Row one = row_of(m, which, row + r);
    if (!row_holds(one, m.columns)) return false;
    FOR_KIND(m.kind, row_lanes<K>(one, m.columns, x, x_step, count, y + r, y_step));
  }
  return true;
#else
  return false;
#endif
}

template <Kind kind, int V>
static void tiles_by_tokens(const Matrix &m, const uint8_t *const *tiles, int64_t count,
                            int64_t column, const float *x, float *y) {
  const int64_t chunk = column / CHUNK;
  const int64_t some = shorter(chunks_of(m.columns) - chunk, STEP / CHUNK);
  for (int64_t i = 0; i < count; i++) {
    const uint8_t *scale = tiles[i] + scale_at(kind, chunk / SCALE_CHUNKS);
    const uint8_t *at = tiles[i] + chunk_at(kind, chunk);
    tile_step<kind, V>(at, some, scale, x, y + i * TILE_ROWS * V * WIDTH);
  }
}

template <Kind kind, int V>
static void rows_by_tokens(const Matrix &m, const Row *rows, const int64_t *at, int64_t count,
                           int64_t column, int64_t some, const float *x, float *y) {
  for (int64_t r = 0; r < count; r++) {
    const Row &row = rows[r];
    uint64_t words[MOST_WORDS];
    for (int64_t w = 0; w < some; w++) words[w] = bits_at(row, column + 64 * w, m.columns);
    const float scale = IS_INTEGER[kind] ? bf16_value(row.scale[column / SCALE_COLUMNS]) : 1.0f;
    row_step<kind, V>(row.values, at[r], words, some, scale, x, y + r * V * WIDTH);
  }
}

// Words of a row that are multiplied at once: more where a block of tokens is narrow, so that it
// fits the L1 cache all the same. A scale covers two.
static int64_t words_of(const Matrix &m, int64_t count) {
  const int64_t vectors = (count + WIDTH - 1) / WIDTH;
  const int64_t most = vectors <= 2 ? MOST_WORDS : vectors <= 4 ? 2 : 1;
  return IS_INTEGER[m.kind] ? shorter(most, 2) : most;
}

static bool many_tokens(const Matrix &m, int64_t which, int64_t row, int64_t rows, const float *x,
                        int64_t padded_columns, int64_t count, float *y) {
  const uint8_t *tiles[GROUP_ROWS / TILE_ROWS];
  Row found[GROUP_ROWS];
  int64_t at[GROUP_ROWS];
  const bool tiled = m.layout == TILES;
  const int64_t parts = tiled ? (rows + TILE_ROWS - 1) / TILE_ROWS : rows;
  const int64_t room = tiled ? parts * TILE_ROWS : rows;
  for (int64_t i = 0; i < parts; i++) {
    if (tiled) {
      tiles[i] = tile_of(m, which, row + i * TILE_ROWS);
    } else {
      found[i] = row_of(m, which, row + i);
      if (!row_holds(found[i], m.columns)) return false;
      at[i] = found[i].first;
    }
  }
  const int64_t padded_count = (count + WIDTH - 1) / WIDTH * WIDTH;
  for (int64_t i = 0; i < room * padded_count; i++) y[i] = 0.0f;
  const int64_t words = tiled ? STEP / 64 : words_of(m, count);
  for (int64_t column = 0; column < m.columns; column += 64 * words) {
    const int64_t left = (m.columns - column + 63) / 64, some = shorter(words, left);
    for (int64_t first = 0; first < count; first += BLOCK) {
      const int64_t vectors = (shorter(count - first, BLOCK) + WIDTH - 1) / WIDTH;
      const float *input = x + first * padded_columns + column * vectors * WIDTH;
      float *output = y + first * room;
      FOR_NUMBER(vectors, FOR_KIND(m.kind, if (tiled)
          tiles_by_tokens<K, N>(m, tiles, parts, column, input, output);
          else rows_by_tokens<K, N>(m, found, at, parts, column, some, input, output)));
    }
    for (int64_t i = 0; i < (tiled ? 0 : parts); i++)
      for (int64_t w = 0; w < some; w++)
        at[i] += __builtin_popcountll(bits_at(found[i], column + 64 * w, m.columns));
  }
  return true;
}

static void widen(const uint16_t *from, float *to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = bf16_value(from[i]);
}

static void narrow(const float *from, uint16_t *to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = bf16_bits(from[i]);
}

static void transpose(const void *const *rows, int64_t count, bool bf16, int64_t wide,
                      int64_t first_column, int64_t columns, float *block) {
  for (int64_t t = 0; t < wide; t++) {
    float *to = block + t;
    if (t >= count) {
      for (int64_t c = 0; c < columns; c++) to[c * wide] = 0.0f;
    } else if (bf16) {
      const uint16_t *from = (const uint16_t *)rows[t] + first_column;
      for (int64_t c = 0; c < columns; c++) to[c * wide] = bf16_value(from[c]);
    } else {
      const float *from = (const float *)rows[t] + first_column;
      for (int64_t c = 0; c < columns; c++) to[c * wide] = from[c];
    }
  }
}

// This instruction set's table; the crossovers are measured for each.
static constexpr Kernels kernels_with(int64_t few_tiles, int64_t few_rows,
                                      decltype(Kernels::dots) dots, int64_t few_panels = 0,
                                      decltype(Kernels::panels) panels = nullptr) {
  return {WIDTH, BLOCK,    few_tiles, few_rows, few_tokens, many_tokens, dots,
          few_panels, panels, gated,     transpose, widen,   narrow};
}
