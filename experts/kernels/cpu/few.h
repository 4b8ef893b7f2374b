// A few tokens against rows of any pattern. A row is read once, from its start to its end, and what
// was expanded of it serves all tokens. Rows go side by side, so that what was loaded of a token
// serves them all and no multiply-add waits for the one before it.

// Rows side by side, whose sums with so many tokens stay in registers.
static constexpr int side_by_side(int tokens) {
  return tokens > FEW_SUMS ? 1 : FEW_SUMS / tokens < 4 ? FEW_SUMS / tokens : 4;
}

// What lies between the first value of a row and the end of another, in bytes.
template <Kind kind>
static inline int64_t bytes_of(const Row &first, const Row &last) {
  return place_of<kind>(last.values, last.end) - place_of<kind>(first.values, first.first);
}

// Adds PIECE columns of R rows, times M tokens, to their sums.
template <int R, int M>
static inline void add_products(const Vec *weight, const float *x, int64_t x_step,
                                Vec (&sum)[R][M]) {
#pragma GCC unroll 8
  for (int t = 0; t < M; t++) {
    Vec input = load(x + t * x_step);
    MOIETY_IN_REGISTER(input);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sum[r][t] += weight[r] * input;
  }
}

// The results of R rows and M tokens.
template <int R, int M>
static inline void put_sums(const Vec (&sum)[R][M], float *y, int64_t y_step) {
  for (int r = 0; r < R; r++)
    for (int t = 0; t < M; t++) y[t * y_step + r] = sum_piece(sum[r][t]);
}

// M tokens (rows of `x`, padded to whole chunks) with R rows. INSIDE: what is read behind their
// values is the matrix's too. What lies `ahead` is fetched for the rows to come.
template <Kind kind, int R, int M, bool INSIDE>
static void rows_few(const Row *rows, int64_t columns, const float *x, int64_t x_step,
                     int64_t ahead, float *y, int64_t y_step) {
  Vec sum[R][M] = {}, scale[R], weight[R];
  int64_t at[R];
  for (int r = 0; r < R; r++) at[r] = rows[r].first;
  const int64_t whole = columns / CHUNK * CHUNK;
  for (int64_t column = 0; column < columns;) {
    if constexpr (IS_INTEGER[kind])
      for (int r = 0; r < R; r++)
        scale[r] = spread(bf16_value(rows[r].scale[column / SCALE_COLUMNS]));
    const int64_t end = columns - column < SCALE_COLUMNS ? columns : column + SCALE_COLUMNS;
    for (; column < (end < whole ? end : whole); column += CHUNK) {
      uint32_t bits[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        bits[r] = load_u32(rows[r].mask + column / 8);
        if (INSIDE) __builtin_prefetch(place_of<kind>(rows[r].values, at[r]) + ahead);
      }
#pragma GCC unroll 4
      for (int64_t c = 0; c < CHUNK; c += PIECE) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const unsigned some = bits[r] >> c & ((1u << PIECE) - 1);
          weight[r] = INSIDE ? place(values_from<kind>(rows[r].values, at[r]), some)
                             : expand_piece<kind>(rows[r].values, at[r], rows[r].total, some);
          if (IS_INTEGER[kind]) weight[r] *= scale[r];
          at[r] += __builtin_popcount(some);
        }
        add_products<R, M>(weight, x + column + c, x_step, sum);
      }
    }
    for (; column < end; column += PIECE) {
      for (int r = 0; r < R; r++) {
        const unsigned some = piece_bits(rows[r], column, columns);
        weight[r] = expand_piece<kind>(rows[r].values, at[r], rows[r].total, some);
        if (IS_INTEGER[kind]) weight[r] *= scale[r];
        at[r] += __builtin_popcount(some);
      }
      add_products<R, M>(weight, x + column, x_step, sum);
    }
  }
  put_sums<R, M>(sum, y, y_step);
}

// M tokens with all rows.
template <Kind kind, int M>
static void rows_side_by_side(const Row *rows, int64_t count, int64_t columns, const float *x,
                              int64_t x_step, float *y, int64_t y_step) {
  constexpr int R = side_by_side(M);
  int64_t r = 0;
  for (; r + R <= count && rows[r + R - 1].end + REACH <= rows[r + R - 1].total; r += R) {
    const int64_t ahead = r + 2 * R <= count ? bytes_of<kind>(rows[r], rows[r + R - 1]) : 0;
    rows_few<kind, R, M, true>(rows + r, columns, x, x_step, ahead, y + r, y_step);
  }
  for (; r < count; r++)
    rows_few<kind, 1, M, false>(rows + r, columns, x, x_step, 0, y + r, y_step);
}

// Any number of tokens, in blocks of at most 8.
template <Kind kind>
static void rows_lanes(const Row *rows, int64_t some, int64_t columns, const float *x,
                       int64_t x_step, int64_t count, float *y, int64_t y_step) {
  for (int64_t t = 0; t < count; t += 8, x += 8 * x_step, y += 8 * y_step)
    FOR_NUMBER(count - t < 8 ? count - t : 8,
               rows_side_by_side<kind, N>(rows, some, columns, x, x_step, y, y_step));
}
