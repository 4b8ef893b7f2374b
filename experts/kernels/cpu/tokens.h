// Many tokens: tokens in the lanes of the vectors, so that each kept weight is one multiply-add
// on a whole vector and the zeros cost nothing, in either layout and for any pattern.
//
// A block is up to BLOCK tokens, transposed: x[column][token]. STEP columns of it stay in the L1
// cache while all rows of a group pass over them.

static constexpr int64_t BLOCK = 8 * WIDTH < 64 ? 8 * WIDTH : 64;
static constexpr int64_t STEP = 2 * CHUNK;
static constexpr int64_t SPAN = 512;
static constexpr int64_t MOST_WORDS = 4;

// The kept values of lane `r` of one group of a tile.
template <Kind kind>
static inline void pair_of(const uint8_t *group, int r, float scale, Vec &v0, Vec &v1) {
  if constexpr (kind == BF16) {
    const Int both = spread_int(load_u32(group + 4 * r));
    v0 = (Vec)(both << 16);
    v1 = (Vec)(both & (int)0xffff0000);
  } else if constexpr (kind == FP32) {
    v0 = spread(load_f32(group + 4 * r));
    v1 = spread(load_f32(group + 64 + 4 * r));
  } else if constexpr (kind == FP16) {
    v0 = spread(half_value(load_u16(group + 2 * r)));
    v1 = spread(half_value(load_u16(group + 32 + 2 * r)));
  } else if constexpr (kind == INT8) {
    v0 = spread((float)(int8_t)group[r] * scale);
    v1 = spread((float)(int8_t)group[16 + r] * scale);
  } else {
    v0 = spread((float)((group[r] & 15) - 8) * scale);
    v1 = spread((float)((group[r] >> 4) - 8) * scale);
  }
}

// Adds one tile's product over up to two chunks to `sums` (16 x V vectors, `sums_step` apart).
template <Kind kind, int V>
static void tile_step(const uint8_t *chunk, int64_t some, const uint8_t *scales, const float *x,
                      float *sums) {
  constexpr int64_t GROUP = GROUP_BYTES[kind], BYTES = CONTROL_BYTES + GROUPS * GROUP;
  constexpr int64_t WIDE = V * WIDTH;
  for (int r = 0; r < TILE_ROWS; r++, sums += WIDE) {
    // Few vectors need a second sum, so that a multiply-add need not wait for the one before it.
    constexpr bool TWO = V <= 4;
    Vec sum[V], other[V] = {};
    for (int j = 0; j < V; j++) sum[j] = load(sums + j * WIDTH);
    const float scale = IS_INTEGER[kind] ? bf16_value(load_u16(scales + 2 * r)) : 1.0f;
    const float *input = x;
    for (int64_t c = 0; c < some; c++) {
      uint32_t control = load_u32(chunk + c * BYTES + 4 * r);
      const uint8_t *group = chunk + c * BYTES + CONTROL_BYTES;
#pragma GCC unroll 2
      for (int g = 0; g < GROUPS; g++, group += GROUP, input += 4 * WIDE, control >>= 4) {
        Vec v0, v1;
        pair_of<kind>(group, r, scale, v0, v1);
        const float *x0 = input + (control & 3) * WIDE, *x1 = input + (control >> 2 & 3) * WIDE;
        for (int j = 0; j < V; j++) sum[j] += v0 * load(x0 + j * WIDTH);
        for (int j = 0; j < V; j++) (TWO ? other : sum)[j] += v1 * load(x1 + j * WIDTH);
      }
    }
    for (int j = 0; j < V; j++) store(sums + j * WIDTH, TWO ? sum[j] + other[j] : sum[j]);
  }
}

// Adds one row's product over the columns whose bits are set in some words of 64 to `sums`.
template <Kind kind, int V>
static void row_step(const uint8_t *values, int64_t first, const uint64_t *words, int64_t some,
                     float scale, const float *x, float *sums) {
  Vec sum[V];
  for (int j = 0; j < V; j++) sum[j] = load(sums + j * WIDTH);
#if defined(MOIETY_EXPAND)
  if constexpr (V <= 4) {
    // With few vectors a mispredicted end of a loop costs as much as the products in it, so the
    // columns of all words are listed before. Two sums, so that no product waits for the other.
    uint16_t columns[MOST_WORDS * 64 + 8];
    const int64_t count = columns_of(words, some, columns);
    Vec other[V] = {};
    for (int64_t i = 0; i + 1 < count; i += 2) {
      const Vec v0 = spread(value_at<kind>(values, first + i) * scale);
      const Vec v1 = spread(value_at<kind>(values, first + i + 1) * scale);
      const float *x0 = x + columns[i] * (V * WIDTH), *x1 = x + columns[i + 1] * (V * WIDTH);
      for (int j = 0; j < V; j++) sum[j] += v0 * load(x0 + j * WIDTH);
      for (int j = 0; j < V; j++) other[j] += v1 * load(x1 + j * WIDTH);
    }
    if (count % 2) {
      const Vec value = spread(value_at<kind>(values, first + count - 1) * scale);
      const float *input = x + columns[count - 1] * (V * WIDTH);
      for (int j = 0; j < V; j++) sum[j] += value * load(input + j * WIDTH);
    }
    for (int j = 0; j < V; j++) store(sums + j * WIDTH, sum[j] + other[j]);
    return;
  }
#endif
  for (int64_t w = 0; w < some; w++, x += 64 * V * WIDTH) {
    for (uint64_t bits = words[w]; bits; bits &= bits - 1, first++) {
      const Vec value = spread(value_at<kind>(values, first) * scale);
      const float *input = x + __builtin_ctzll(bits) * (V * WIDTH);
      for (int j = 0; j < V; j++) sum[j] += value * load(input + j * WIDTH);
    }
  }
  for (int j = 0; j < V; j++) store(sums + j * WIDTH, sum[j]);
}
