// Few tokens against a tiled matrix: 16 rows in the lanes of the vectors, one pass over the tile.
//
// Needs from the instruction set: Vec (WIDTH floats), Int (WIDTH dwords), load, load_int,
// spread4 (the four inputs of a group in every 128-bit lane), select (input by control), pair
// (the kept values of a group), spread.

// Multiplies M tokens, rows of `x` (fp32, padded to whole chunks, `x_step` apart), with one tile;
// `y` gets 16 results a token, `y_step` apart.
template <Kind kind, int M>
static void tile_lanes(const uint8_t *tile, int64_t chunks, const float *x, int64_t x_step,
                       float *y, int64_t y_step) {
  constexpr int VECTORS = TILE_ROWS / WIDTH;
  constexpr int BOTH = M * VECTORS <= LIVE ? VECTORS : 1;
  constexpr int CHAINS = M * BOTH <= LIVE / 2 ? 2 : 1;
  constexpr int64_t GROUP = GROUP_BYTES[kind], BYTES = CONTROL_BYTES + GROUPS * GROUP;
  Vec total[M][VECTORS] = {};
  for (int64_t chunk = 0; chunk < chunks; chunk += SCALE_CHUNKS) {
    const uint8_t *scale = tile;
    if (IS_INTEGER[kind]) tile += 2 * TILE_ROWS;
    const int64_t some = chunks - chunk < SCALE_CHUNKS ? chunks - chunk : SCALE_CHUNKS;
    for (int first = 0; first < VECTORS; first += BOTH) {
      Vec sum[CHAINS][M][BOTH] = {};
      const uint8_t *at = tile;
      const float *input = x + chunk * CHUNK;
      for (int64_t one = 0; one < some; one++, at += BYTES, input += CHUNK) {
        Int control[BOTH];
        for (int v = 0; v < BOTH; v++) control[v] = load_int(at + (first + v) * WIDTH * 4);
        const uint8_t *group = at + CONTROL_BYTES;
#pragma GCC unroll 2
        for (int g = 0; g < GROUPS; g++, group += GROUP) {
          if (M >= FIRST_PREFETCH) __builtin_prefetch(group + 4608);
          Vec v0[BOTH], v1[BOTH];
          for (int v = 0; v < BOTH; v++) pair<kind>(group, first + v, v0[v], v1[v]);
          for (int t = 0; t < M; t++) {
            const Vec four = spread4(input + t * x_step + 4 * g);
            for (int v = 0; v < BOTH; v++) {
              sum[0][t][v] += select(four, control[v]) * v0[v];
              sum[CHAINS - 1][t][v] += select(four, control[v] >> 2) * v1[v];
            }
          }
          for (int v = 0; v < BOTH; v++) control[v] >>= 4;
        }
      }
      for (int t = 0; t < M; t++) {
        for (int v = 0; v < BOTH; v++) {
          Vec all = sum[0][t][v];
          if (CHAINS == 2) all += sum[1][t][v];
          if (IS_INTEGER[kind]) all *= load_bf16(scale + 2 * (first + v) * WIDTH);
          total[t][first + v] += all;
        }
      }
    }
    tile += some * BYTES;
  }
  for (int t = 0; t < M; t++)
    for (int v = 0; v < VECTORS; v++) store(y + t * y_step + v * WIDTH, total[t][v]);
}

// Any number of tokens, in blocks of at most 8.
template <Kind kind>
static void tile_few(const uint8_t *tile, int64_t chunks, const float *x, int64_t x_step,
                     int64_t count, float *y, int64_t y_step) {
  for (int64_t t = 0; t < count; t += 8, x += 8 * x_step, y += 8 * y_step) {
    const int64_t some = count - t < 8 ? count - t : 8;
    FOR_NUMBER(some, tile_lanes<kind, N>(tile, chunks, x, x_step, y, y_step));
  }
}
