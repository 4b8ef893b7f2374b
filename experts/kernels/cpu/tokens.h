// Many tokens: tokens in the lanes of the vectors, so that each kept weight is one multiply-add
// on a whole vector and the zeros cost nothing, in either layout and for any pattern.
//
// Tokens come in blocks, transposed: x[column][token]. STEP columns of one stay in the L1 cache
// while all rows of a group pass over them. Kept values and where their columns are in the block
// are listed first, many at once, so that all kinds of values are multiplied by the same loop: of
// tiles a step for one block, of rows, whose lists take longer to make, a span for all blocks.

static constexpr int64_t STEP = 2 * CHUNK;
static constexpr int64_t SPAN = 512;
static constexpr int64_t LISTED = 2 * GROUPS * STEP / CHUNK;  // of each row of a tile

static inline const float *at_place(const float *x, int64_t bytes) {
  const float *at = (const float *)((const char *)x + bytes);
  // Added up once, not by every instruction that loads from there.
  __asm__("" : "+r"(at));
  return at;
}

// Adds listed values of one row, BETWEEN apart, times the tokens at their places (in units of `wide`
// bytes behind `x`) to its V sums.
template <int V, int BETWEEN, int64_t wide, class Place>
static inline void add_listed(const float *values, const Place *places, int64_t count,
                              const float *x, float *sums) {
  // A second sum where there are registers for it: a multiply-add need not wait for the one before.
  constexpr bool TWO = 2 * V <= LIVE;
  Vec sum[V], other[V] = {};
  const auto add = [&](int64_t i, Vec *to) {
    const Vec value = spread(values[i * BETWEEN]);
    const float *input = at_place(x, places[i * BETWEEN] * wide);
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) to[j] += value * load(input + j * WIDTH);
  };
#pragma GCC unroll 8
  for (int j = 0; j < V; j++) sum[j] = load(sums + j * WIDTH);
  if constexpr (BETWEEN > 1) {
#pragma GCC unroll 2
    for (int64_t i = 0; i + 1 < count; i += 2) {
      const Vec v0 = spread(values[i * BETWEEN]), v1 = spread(values[(i + 1) * BETWEEN]);
      const float *x0 = at_place(x, places[i * BETWEEN] * wide);
      const float *x1 = at_place(x, places[(i + 1) * BETWEEN] * wide);
#pragma GCC unroll 8
      for (int j = 0; j < V; j++) sum[j] += v0 * load(x0 + j * WIDTH);
#pragma GCC unroll 8
      for (int j = 0; j < V; j++) (TWO ? other : sum)[j] += v1 * load(x1 + j * WIDTH);
    }
    if (count % 2) add(count - 1, sum);
  } else {
    // Rows keep now more and now fewer values: in pairs the CPU would have to guess when they end,
    // and whether one is left.
#pragma GCC unroll 1
    for (int64_t i = 0; i < count; i++) {
      add(i, sum);
      if (++i == count) break;
      add(i, TWO ? other : sum);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < V; j++) store(sums + j * WIDTH, TWO ? sum[j] + other[j] : sum[j]);
}

// Lists what 16 rows keep of up to two chunks of a tile, for blocks with `wide` bytes a column.
template <Kind kind>
static void list_tile(const uint8_t *tile, int64_t chunk, int64_t some, int wide,
                      float (*values)[TILE_ROWS], int32_t (*places)[TILE_ROWS]) {
  const uint8_t *scales = tile + scale_at(kind, chunk / SCALE_CHUNKS);
  for (int part = 0; part < TILE_ROWS / WIDTH; part++) {
    const int64_t lane = part * WIDTH;
    Vec scale = {};
    if (IS_INTEGER[kind]) scale = load_bf16(scales + 2 * lane);
    for (int64_t c = 0; c < some; c++) {
      const Chunk here = chunk_in<kind>(tile, tile + chunk_at(kind, chunk + c));
      Int control = load_int(here.at + 4 * lane);
#pragma GCC unroll 8
      for (int g = 0; g < GROUPS; g++, control >>= 4) {
        const int64_t at = 2 * (c * GROUPS + g);
        Vec v0, v1;
        pair<kind>(here, g, part, v0, v1);
        if (IS_INTEGER[kind]) v0 *= scale, v1 *= scale;
        store(values[at] + lane, v0);
        store(values[at + 1] + lane, v1);
        const int first = 2 * at * wide;
        const Int p0 = (control & 3) * wide + first, p1 = (control >> 2 & 3) * wide + first;
        __builtin_memcpy(places[at] + lane, &p0, sizeof(Int));
        __builtin_memcpy(places[at + 1] + lane, &p1, sizeof(Int));
      }
    }
  }
}

// Adds one tile's product over up to two chunks to `sums` (16 x V vectors).
template <int V>
static void add_tile(const float (*values)[TILE_ROWS], const int32_t (*places)[TILE_ROWS],
                     int64_t count, const float *x, float *sums) {
  for (int r = 0; r < TILE_ROWS; r++, sums += V * WIDTH)
    add_listed<V, TILE_ROWS, 1>(values[0] + r, places[0] + r, count, x, sums);
}

// So many values are listed of 64 columns whatever a row keeps of them, which is hardly ever more: the
// CPU need not guess.
static constexpr int64_t SURE = 48;

// What a row keeps of a span of columns: values and where in the span they are.
struct Listed {
  int64_t count;
  float values[SPAN + SURE];
  uint16_t columns[SPAN + 8];
};

// Lists a row's columns whose bits are set in some words of 64 from `column` on. The first of their
// values is the row's `first`.
template <Kind kind>
static void list_row(const Row &row, int64_t first, const uint64_t *words, int64_t some,
                     int64_t column, Listed &to) {
  to.count = 0;
  for (int64_t w = 0; w < some; w++) {
    const float scale =
        IS_INTEGER[kind] ? bf16_value(row.scale[(column + 64 * w) / SCALE_COLUMNS]) : 1.0f;
#if defined(MOIETY_EXPAND)
    const int64_t before = to.count;
    to.count += columns_of(words[w], 64 * w, to.columns + before);
    int64_t at = before;
    if (first + at + SURE + REACH <= row.total) {
#pragma GCC unroll 8
      for (; at < before + SURE; at += PIECE)
        store(to.values + at, values_from<kind>(row.values, first + at) * scale);
    }
    for (; at < to.count; at += PIECE)
      store(to.values + at, piece_from<kind>(row.values, first + at, row.total) * scale);
#else
    for (uint64_t bits = words[w]; bits; bits &= bits - 1, to.count++) {
      to.values[to.count] = value_at<kind>(row.values, first + to.count) * scale;
      to.columns[to.count] = (uint16_t)(64 * w + __builtin_ctzll(bits));
    }
#endif
  }
}
