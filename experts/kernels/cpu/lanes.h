// Few tokens against a tiled matrix: 16 rows in the lanes of the vectors, one pass over the tile.
//
// Needs from the instruction set: Vec (WIDTH floats), Int (WIDTH dwords), load, load_int,
// spread4 (the four inputs of a group in every 128-bit lane), select (input by control), pair
// (the kept values of a group), TOGETHER (tiles side by side), LIVE (sums that
// stay in registers) and TWO_CHAINS (so many have a second one).

// Memory comes faster when it is asked for this far ahead.
static constexpr int64_t AHEAD = 4608;

// Into the L2 cache, which can wait for more lines at a time than L1.
static inline void fetch(const uint8_t *at) { __builtin_prefetch(at, 0, 2); }

// From there into the L1 cache, some steps before it is needed.
static inline void fetch_near(const uint8_t *at) { __builtin_prefetch(at, 0, 3); }

// Multiplies M tokens, rows of `x` (fp32, padded to whole chunks, `x_step` apart), with R tiles, one
// `size` bytes behind the other; `y` gets 16 results a tile and token, `y_step` apart.
template <Kind kind, int M, int R>
static void tile_lanes(const uint8_t *tile, int64_t size, int64_t chunks, const float *x,
                       int64_t x_step, float *y, int64_t y_step) {
  constexpr int VECTORS = TILE_ROWS / WIDTH;
  constexpr int BOTH = M * VECTORS <= LIVE ? VECTORS : 1;
  // As many whatever R is: a tile gives the same sums beside another one as alone.
  constexpr int CHAINS = M * BOTH * TOGETHER <= TWO_CHAINS ? 2 : 1;
  constexpr int64_t GROUP = GROUP_BYTES[kind], BYTES = CONTROL_BYTES + GROUPS * GROUP;
  constexpr int64_t NEAR = 2 * BYTES;
  // Where a tile ends, what comes next lies behind those beside it.
  const uint8_t *const last = tile + size - AHEAD;
  Vec total[R][M][VECTORS] = {};
  for (int64_t chunk = 0; chunk < chunks; chunk += SCALE_CHUNKS) {
    const uint8_t *scale = tile;
    if (IS_INTEGER[kind]) tile += 2 * TILE_ROWS;
    const int64_t some = chunks - chunk < SCALE_CHUNKS ? chunks - chunk : SCALE_CHUNKS;
    for (int first = 0; first < VECTORS; first += BOTH) {
      Vec sum[CHAINS][R][M][BOTH] = {};
      const uint8_t *at = tile;
      const float *input = x + chunk * CHUNK;
      for (int64_t one = 0; one < some; one++, at += BYTES, input += CHUNK) {
        const int64_t ahead = at < last ? AHEAD : AHEAD + (R - 1) * size;
        Int control[R][BOTH];
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
          fetch(at + r * size + ahead);
#pragma GCC unroll 4
          for (int v = 0; v < BOTH; v++)
            control[r][v] = load_int(at + r * size + (first + v) * WIDTH * 4);
        }
        const uint8_t *group = at + CONTROL_BYTES;
#pragma GCC unroll 2
        for (int g = 0; g < GROUPS; g++, group += GROUP) {
          Vec v0[R][BOTH], v1[R][BOTH];
#pragma GCC unroll 2
          for (int r = 0; r < R; r++) {
            fetch(group + r * size + ahead);
            fetch_near(group + r * size + NEAR);
#pragma GCC unroll 4
            for (int v = 0; v < BOTH; v++)
              pair<kind>(group + r * size, first + v, v0[r][v], v1[r][v]);
          }
#pragma GCC unroll 8
          for (int t = 0; t < M; t++) {
            const Vec four = spread4(input + t * x_step + 4 * g);
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
              for (int v = 0; v < BOTH; v++) {
                sum[0][r][t][v] += select(four, control[r][v]) * v0[r][v];
                sum[CHAINS - 1][r][t][v] += select(four, control[r][v] >> 2) * v1[r][v];
              }
            }
          }
#pragma GCC unroll 2
          for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < BOTH; v++) control[r][v] >>= 4;
        }
      }
#pragma GCC unroll 2
      for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int t = 0; t < M; t++) {
#pragma GCC unroll 4
          for (int v = 0; v < BOTH; v++) {
            Vec all = sum[0][r][t][v];
            if (CHAINS == 2) all += sum[1][r][t][v];
            if (IS_INTEGER[kind]) all *= load_bf16(scale + r * size + 2 * (first + v) * WIDTH);
            total[r][t][first + v] += all;
          }
        }
      }
    }
    tile += some * BYTES;
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int t = 0; t < M; t++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++)
        store(y + r * TILE_ROWS + t * y_step + v * WIDTH, total[r][t][v]);
}

// M tokens with all tiles.
template <Kind kind, int M>
static void tiles_side_by_side(const uint8_t *tile, int64_t size, int64_t tiles, int64_t chunks,
                               const float *x, int64_t x_step, float *y, int64_t y_step) {
  constexpr int R = TOGETHER;
  int64_t i = 0;
  for (; i + R <= tiles; i += R, tile += R * size, y += R * TILE_ROWS)
    tile_lanes<kind, M, R>(tile, size, chunks, x, x_step, y, y_step);
  for (; i < tiles; i++, tile += size, y += TILE_ROWS)
    tile_lanes<kind, M, 1>(tile, size, chunks, x, x_step, y, y_step);
}

// Any number of tokens, in blocks of at most 8, all of which a tile serves before the next one.
template <Kind kind>
static void tiles_few(const uint8_t *tile, int64_t size, int64_t tiles, int64_t chunks,
                      const float *x, int64_t x_step, int64_t count, float *y, int64_t y_step) {
  const int64_t most = count > 8 ? TOGETHER : tiles;
  for (int64_t i = 0; i < tiles; i += most, tile += most * size, y += most * TILE_ROWS) {
    const int64_t some = tiles - i < most ? tiles - i : most;
    for (int64_t t = 0; t < count; t += 8) {
      const float *input = x + t * x_step;
      float *to = y + t * y_step;
      FOR_NUMBER(count - t < 8 ? count - t : 8,
                 tiles_side_by_side<kind, N>(tile, size, some, chunks, input, x_step, to, y_step));
    }
  }
}
