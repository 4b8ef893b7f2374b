// Few tokens against a dense matrix: what is left dense of a model is read as fast as its experts.

// WIDTH columns of a row; fewer at its end, where 0 stands for the rest.
template <Kind kind>
static inline Vec dense_piece(const uint8_t *row, int64_t column, int64_t columns) {
  constexpr int64_t BYTES = HALF_BYTES[kind] / 2;
  uint8_t copy[4 * WIDTH] = {};
  const uint8_t *at = row + column * BYTES;
  if (columns - column < WIDTH) {
    __builtin_memcpy(copy, at, (columns - column) * BYTES);
    at = copy;
  }
  if constexpr (kind == BF16) return load_bf16(at);
  return load((const float *)at);
}

// M tokens (rows of `x`, padded to whole chunks) with R rows; the rows behind them are fetched.
template <Kind kind, int R, int M>
static void dense_few(const uint8_t *rows, int64_t columns, const float *x, int64_t x_step,
                      float *y, int64_t y_step) {
  constexpr int64_t BYTES = HALF_BYTES[kind] / 2, LINE = 64 / BYTES / WIDTH;
  const int64_t row_bytes = columns * BYTES;
  Vec sum[R][M] = {}, weight[R];
  for (int64_t column = 0; column < columns; column += WIDTH) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const uint8_t *row = rows + r * row_bytes;
      if (column / WIDTH % LINE == 0) fetch(row + R * row_bytes + column * BYTES);
      weight[r] = columns - column < WIDTH ? dense_piece<kind>(row, column, columns)
                                           : dense_piece<kind>(row, column, column + WIDTH);
    }
    add_products<R, M>(weight, x + column, x_step, sum);
  }
  put_sums<R, M>(sum, y, y_step);
}

// M tokens with all rows.
template <Kind kind, int M>
static void dense_side_by_side(const uint8_t *rows, int64_t count, int64_t columns, const float *x,
                               int64_t x_step, float *y, int64_t y_step) {
  constexpr int R = side_by_side(M);
  const int64_t row_bytes = columns * HALF_BYTES[kind] / 2;
  int64_t r = 0;
  for (; r + R <= count; r += R)
    dense_few<kind, R, M>(rows + r * row_bytes, columns, x, x_step, y + r, y_step);
  for (; r < count; r++)
    dense_few<kind, 1, M>(rows + r * row_bytes, columns, x, x_step, y + r, y_step);
}

// Any number of tokens, in blocks of at most 8.
template <Kind kind>
static void dense_lanes(const uint8_t *rows, int64_t some, int64_t columns, const float *x,
                        int64_t x_step, int64_t count, float *y, int64_t y_step) {
  for (int64_t t = 0; t < count; t += 8, x += 8 * x_step, y += 8 * y_step)
    FOR_NUMBER(count - t < 8 ? count - t : 8,
               dense_side_by_side<kind, N>(rows, some, columns, x, x_step, y, y_step));
}

static void dense_tokens(const Matrix &m, int64_t row, int64_t rows, const float *x,
                         int64_t x_step, int64_t count, float *y, int64_t y_step) {
  const uint8_t *at = m.values + row * m.columns * HALF_BYTES[m.kind] / 2;
  if (m.kind == BF16) return dense_lanes<BF16>(at, rows, m.columns, x, x_step, count, y, y_step);
  dense_lanes<FP32>(at, rows, m.columns, x, x_step, count, y, y_step);
}
