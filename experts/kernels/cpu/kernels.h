// The table of functions that every instruction set fills; the driver calls nothing else.

#pragma once

#include "format.h"
#include "target.h"

struct Kernels {
  int64_t width;  // floats of a vector; a block of tokens is padded to whole vectors
  int64_t block;  // most tokens of a block
  int64_t few_tiles, few_rows;  // up to so many tokens of one matrix, `lanes` is the faster one

  // y (count x rows, y_step apart) of rows `row` to `row + rows` for tokens x (x_step apart, fp32,
  // zeros up to whole chunks). False where a mask and its values disagree.
  bool (*lanes)(const Matrix &, int64_t which, int64_t row, int64_t rows, const float *x,
                int64_t x_step, int64_t count, float *y, int64_t y_step);

  // The same for blocks of transposed tokens: x and y hold one block after the other, each
  // (columns padded to 64, or rows) x (its tokens padded to whole vectors).
  bool (*tokens)(const Matrix &, int64_t which, int64_t row, int64_t rows, const float *x,
                 int64_t padded_columns, int64_t count, int64_t block, float *y);

  // As `lanes` for bf16 tokens, with DOTS_PAD more of zeros behind them and as much room in y;
  // null where the CPU has no bf16 products. For tiles of bf16, int8 and int4.
  void (*dots)(const Matrix &, int64_t which, int64_t row, int64_t rows, const uint16_t *x,
               int64_t x_step, int64_t count, float *y, int64_t y_step);

  // Tiles for bf16 tokens in panels of PANEL, zeros behind them, as panels.h has them (`width` in
  // columns, padded to whole chunks). y holds for each panel PANEL x TILE_ROWS sums for every
  // TILE_ROWS rows. Tokens may be columns from `column` on, a multiple of PANEL_CHUNKS chunks, whose
  // products are added to y. Up to `few_panels` tokens, `lanes` is the faster one. Null without AMX.
  int64_t few_panels;
  bool (*panels)(const Matrix &, int64_t which, int64_t row, int64_t rows, const uint16_t *x,
                 int64_t column, int64_t width, int64_t count, float *y);

  // The same for rows, but what panels hold of a chunk is turned, two columns at a time, and so
  // are the sums. False as `lanes`, which is the faster one up to `few_pairs` tokens, but not for
  // int4.
  int64_t few_pairs;
  bool (*pairs)(const Matrix &, int64_t which, int64_t row, int64_t rows, const uint16_t *x,
                int64_t width, int64_t count, float *y);

  // The sums of all tokens as bf16, each token's `step` behind the one before.
  void (*put_panels)(const float *y, int64_t rows, int64_t count, uint16_t *to, int64_t step);
  void (*put_pairs)(const float *y, int64_t rows, int64_t count, uint16_t *to, int64_t step);

  // Such a chunk of PANEL tokens (null: 0) from `column` on, `real` columns of it; and half of one
  // from the sums of TILE_ROWS rows.
  void (*pair_up)(const uint16_t *const *tokens, int64_t column, int64_t real, uint16_t *to);
  void (*pair_sums)(const float *from, uint16_t *to);

  void (*gated)(int activation, const float *gate, const float *up, float *out, int64_t count);

  // One block (columns x wide) of transposed tokens from rows of bf16 or fp32, null rows are 0.
  void (*transpose)(const void *const *rows, int64_t count, bool bf16, int64_t wide,
                    int64_t first_column, int64_t columns, float *block);

  // to[i * to_step + j] = from[j * from_step + i] for i < count, j < rows.
  void (*turn)(const float *from, int64_t from_step, int64_t rows, int64_t count, float *to,
               int64_t to_step);

  // One dense row of a matrix in the rows layout; false as `lanes`.
  bool (*dense_row)(const Matrix &, int64_t which, int64_t row, float *y);

  // All rows of the tile that begins with `row`, dense and y_step apart, up to whole chunks. Null
  // where there is no fast way.
  void (*dense_tile)(const Matrix &, int64_t which, int64_t row, float *y, int64_t y_step);

  // fp32 from bf16 and the other way round.
  void (*widen)(const uint16_t *from, float *to, int64_t count);
  void (*narrow)(const float *from, uint16_t *to, int64_t count);
};

static constexpr int64_t DOTS_PAD = 24;
static constexpr int64_t PANEL = 16, PANEL_CHUNKS = 32;
static constexpr int64_t GROUP_ROWS = 64, MOST_BLOCK = 128;
static constexpr int64_t STRIP_TILES = 3, STRIP_ROWS = STRIP_TILES * TILE_ROWS;
// Rows of one call for many tokens: of blocks, and of all.
static constexpr int64_t BLOCK_ROWS = 256, MOST_ROWS = 16 * STRIP_ROWS;

extern const Kernels portable_kernels;
#if defined(MOIETY_X86)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;
#endif
#if defined(MOIETY_AMX)
extern const Kernels amx_kernels;
#endif
