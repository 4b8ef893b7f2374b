// One row of the rows layout: how its values are found and expanded.

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

template <Kind kind>
static inline const uint8_t *place_of(const uint8_t *values, int64_t at) {
  return values + at * HALF_BYTES[kind] / 2;
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
  const int64_t whole = columns / 64 * 64;
  int64_t kept = __builtin_popcountll(whole < columns ? bits_at(row, whole, columns) : 0);
  for (int64_t column = 0; column < whole; column += 64) {
    uint64_t bits;
    __builtin_memcpy(&bits, row.mask + column / 8, 8);
    kept += __builtin_popcountll(bits);
  }
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
