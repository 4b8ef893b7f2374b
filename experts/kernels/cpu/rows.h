// One row of the rows layout: how its values are found, and its product with a few tokens.

struct Row {
  const uint8_t *values;
  const uint8_t *mask;
  const uint16_t *scale;
  int64_t first, end, total;
};

static Row row_of(const Matrix &m, int64_t which, int64_t row) {
  const int64_t *starts = m.starts ? m.starts + which * m.starts_step : nullptr;
  const int64_t bytes = (m.columns + 7) / 8, scales = (m.columns + 127) / SCALE_COLUMNS;
  Row found;
  found.values = m.values + which * m.values_step;
  found.mask = m.mask + which * m.mask_step + row * bytes;
  found.scale = m.scale ? m.scale + which * m.scale_step + row * scales : nullptr;
  found.first = starts ? starts[row] : row * m.kept;
  found.end = starts ? starts[row + 1] : (row + 1) * m.kept;
  found.total = m.total;
  if (m.kind == INT4 && !starts) {
    found.values += row * ((m.kept + 1) / 2);
    found.total -= 2 * row * ((m.kept + 1) / 2);
    found.end -= found.first;
    found.first = 0;
  }
  return found;
}

// The mask's bits of columns `column` to `column + 63`, fewer at the row's end.
static inline uint64_t bits_at(const Row &row, int64_t column, int64_t columns) {
  const int64_t bytes = (columns + 7) / 8 - column / 8;
  const uint8_t *at = row.mask + column / 8;
  uint64_t bits = 0;
  if (bytes >= 8)
    __builtin_memcpy(&bits, at, 8);
  else
    for (int64_t i = 0; i < bytes; i++) bits |= (uint64_t)at[i] << 8 * i;
  return bits;
}

// Whether the mask keeps as many values as the row has and none past its last column.
static bool row_holds(const Row &row, int64_t columns) {
  int64_t kept = 0;
  for (int64_t column = 0; column < columns; column += 64)
    kept += __builtin_popcountll(bits_at(row, column, columns));
  const int64_t spare = columns % 8;
  if (spare && row.mask[columns / 8] >> spare) return false;
  return kept == row.end - row.first && row.first >= 0 && row.end <= row.total;
}

template <Kind kind>
static inline float value_at(const uint8_t *values, int64_t at) {
  if constexpr (kind == BF16) return bf16_value(load_u16(values + 2 * at));
  if constexpr (kind == FP16) return half_value(load_u16(values + 2 * at));
  if constexpr (kind == FP32) return load_f32(values + 4 * at);
  if constexpr (kind == INT8) return (float)(int8_t)values[at];
  return (float)((values[at / 2] >> 4 * (at % 2) & 15) - 8);
}

#if defined(MOIETY_EXPAND)
// The mask's bits of PIECE columns, those from `end` on left out.
static inline unsigned piece_bits(const Row &row, int64_t column, int64_t end) {
  const unsigned bits = column < end ? row.mask[column / 8] : 0;
  return PIECE > 8 && column + 8 < end ? bits | row.mask[column / 8 + 1] << 8 : bits;
}

// M tokens (rows of `x`, padded to whole pieces of the mask) with one row; M results `y_step` apart.
template <Kind kind, int M>
static void row_few(const Row &row, int64_t columns, const float *x, int64_t x_step, float *y,
                    int64_t y_step) {
  Vec total[M] = {};
  int64_t at = row.first;
  for (int64_t column = 0; column < columns; column += SCALE_COLUMNS) {
    const int64_t end = columns - column < SCALE_COLUMNS ? columns : column + SCALE_COLUMNS;
    // Two sums, so that a multiply-add need not wait for the one before it.
    Vec even[M] = {}, odd[M] = {};
    for (int64_t c = column; c < end; c += 2 * PIECE) {
      const unsigned bits = piece_bits(row, c, end), more = piece_bits(row, c + PIECE, end);
      const int64_t second = at + __builtin_popcount(bits);
      const Vec w0 = expand_piece<kind>(row.values, at, row.total, bits);
      const Vec w1 = expand_piece<kind>(row.values, second, row.total, more);
      at = second + __builtin_popcount(more);
      for (int t = 0; t < M; t++) even[t] += w0 * load(x + t * x_step + c);
      for (int t = 0; t < M; t++) odd[t] += w1 * load(x + t * x_step + c + PIECE);
    }
    const float scale = IS_INTEGER[kind] ? bf16_value(row.scale[column / SCALE_COLUMNS]) : 1.0f;
    for (int t = 0; t < M; t++) total[t] += (even[t] + odd[t]) * scale;
  }
  for (int t = 0; t < M; t++) y[t * y_step] = sum_piece(total[t]);
}

template <Kind kind>
static void row_lanes(const Row &row, int64_t columns, const float *x, int64_t x_step,
                      int64_t count, float *y, int64_t y_step) {
  for (int64_t t = 0; t < count; t += 8, x += 8 * x_step, y += 8 * y_step) {
    const int64_t some = count - t < 8 ? count - t : 8;
    FOR_NUMBER(some, row_few<kind, N>(row, columns, x, x_step, y, y_step));
  }
}

template <Kind kind>
static void row_dense(const Row &row, int64_t columns, float *y) {
  int64_t at = row.first;
  for (int64_t c = 0; c < columns; c += PIECE) {
    const unsigned bits = piece_bits(row, c, columns);
    const float scale = IS_INTEGER[kind] ? bf16_value(row.scale[c / SCALE_COLUMNS]) : 1.0f;
    const Vec piece = expand_piece<kind>(row.values, at, row.total, bits) * scale;
    at += __builtin_popcount(bits);
    if (columns - c >= PIECE)
      store(y + c, piece);
    else
      __builtin_memcpy(y + c, &piece, 4 * (columns - c));
  }
}
#endif
