// Few tokens against a tiled matrix: 16 rows in the lanes of the vectors, one pass over the tile.
//
// Needs from the instruction set: Vec (WIDTH floats), Int (WIDTH dwords), load, load_int,
// spread4 (the four inputs of a group in every 128-bit lane), select (input by control), pair
// (the kept values of a group), TOGETHER (tiles side by side), LIVE (sums that
// stay in registers), TWO_CHAINS (so many have a second one) and ONE_BY_ONE (each input is added as
// it is picked: left alone, the compiler picks many first, for which 16 registers are too few).

// Memory comes faster when it is asked for this far ahead.
static constexpr int64_t AHEAD = 4608;

// Into the L2 cache, which can wait for more lines at a time than L1.
static inline void fetch(const uint8_t *at) { __builtin_prefetch(at, 0, 2); }

// From there into the L1 cache, some steps before it is needed.
static inline void fetch_near(const uint8_t *at) { __builtin_prefetch(at, 0, 3); }

// A group's line of a chunk, or lines, from the one that comes two chunks later and from `far`.
template <Kind kind>
static inline void fetch_group(const uint8_t *chunk, int group, const uint8_t *far) {
  constexpr int64_t BYTES = chunk_bytes(kind), NEAR = 2 * BYTES;
  const int64_t at = CONTROL_BYTES + group * (kind == BF12 ? 64 : GROUP_BYTES[kind]);
  if (at >= BYTES) return;
  fetch(far + at);
  fetch_near(chunk + at + NEAR);
}

// A chunk of BF12 as one of bf16.
static inline void lengthen(const uint8_t *tile, int64_t chunk, uint8_t *to) {
  const uint8_t *at = tile + chunk_at(BF12, chunk);
  const Chunk here = chunk_in<BF12>(tile, at);
  __builtin_memcpy(to, here.at, CONTROL_BYTES);
  to += CONTROL_BYTES;
#pragma GCC unroll 8
  for (int g = 0; g < GROUPS; g++, to += GROUP_BYTES[BF16]) {
    for (int v = 0; v < TILE_ROWS / WIDTH; v++) {
      const Int both = (Int)bf12_pairs(here, g, v);
      __builtin_memcpy(to + v * WIDTH * 4, &both, sizeof both);
    }
  }
}

// Where copies of a part of some tiles come from: what is to be fetched meanwhile, how far apart the
// tiles are there, and whether there are sums of the parts before this one.
struct Copied {
  const uint8_t *next;
  int64_t size;
  bool more;
};

// Multiplies M tokens, rows of `x` (fp32, padded to whole chunks, `x_step` apart), with R tiles, one
// `size` bytes behind the other; `y` gets 16 results a tile and token, `y_step` apart. Where `copied`
// is given, these are copies of a part of the tiles.
template <Kind kind, int M, int R>
static void tile_lanes(const uint8_t *tile, int64_t size, int64_t chunks, const float *x,
                       int64_t x_step, float *y, int64_t y_step, const Copied *copied = nullptr) {
  constexpr int VECTORS = TILE_ROWS / WIDTH;
  constexpr int BOTH = M * VECTORS <= LIVE ? VECTORS : 1;
  // As many whatever R is: a tile gives the same sums beside another one as alone.
  constexpr int CHAINS = M * BOTH * TOGETHER <= TWO_CHAINS ? 2 : 1;
  constexpr int64_t BYTES = chunk_bytes(kind);
  // Groups whose code stands one after the other: as many as share bytes.
  constexpr int NEXT_TO = kind == BF12 ? QUARTET : 2;
  // Where a tile ends, what comes next lies behind those beside it.
  const uint8_t *const head = tile, *const last = tile + size - AHEAD;
  const int64_t next_size = copied ? copied->size : size;
  tile += head_bytes(kind);
  Vec total[R][M][VECTORS] = {};
  // Runs do(sum, where it is in y) for all of them.
  const auto each_total = [&](auto &&run) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int t = 0; t < M; t++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
          run(total[r][t][v], y + r * TILE_ROWS + t * y_step + v * WIDTH);
  };
  if (copied && copied->more)
    each_total([](Vec &sum, const float *at) __attribute__((always_inline)) { sum = load(at); });
  for (int64_t chunk = 0; chunk < chunks; chunk += SCALE_CHUNKS) {
    const uint8_t *scale = tile;
    if (IS_INTEGER[kind]) tile += 2 * TILE_ROWS;
    const int64_t some = chunks - chunk < SCALE_CHUNKS ? chunks - chunk : SCALE_CHUNKS;
    for (int first = 0; first < VECTORS; first += BOTH) {
      Vec sum[CHAINS][R][M][BOTH] = {};
      const uint8_t *at = tile;
      const float *input = x + chunk * CHUNK;
      for (int64_t one = 0; one < some; one++, at += BYTES, input += CHUNK) {
        const int64_t ahead = copied      ? copied->next - head
                              : at < last ? AHEAD
                                          : AHEAD + (R - 1) * size;
        Chunk here[R];
        Int control[R][BOTH];
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
          here[r] = chunk_in<kind>(head + r * size, at + r * size);
          fetch(at + r * next_size + ahead);
#pragma GCC unroll 4
          for (int v = 0; v < BOTH; v++)
            control[r][v] = load_int(here[r].at + (first + v) * WIDTH * 4);
        }
        for (int before = 0; before < GROUPS; before += NEXT_TO) {
#pragma GCC unroll 4
          for (int next = 0; next < NEXT_TO; next++) {
            const int g = before + next;
            Vec v0[R][BOTH], v1[R][BOTH];
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) {
              fetch_group<kind>(at + r * size, g, at + r * next_size + ahead);
#pragma GCC unroll 4
              for (int v = 0; v < BOTH; v++)
                pair<kind>(here[r], g, first + v, v0[r][v], v1[r][v]);
            }
#pragma GCC unroll 8
            for (int t = 0; t < M; t++) {
              const Vec four = spread4(input + t * x_step + 4 * g);
#pragma GCC unroll 2
              for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
                for (int v = 0; v < BOTH; v++) {
                  sum[0][r][t][v] += select(four, control[r][v]) * v0[r][v];
                  if constexpr (ONE_BY_ONE) MOIETY_IN_REGISTER(sum[0][r][t][v]);
                  sum[CHAINS - 1][r][t][v] += select(four, control[r][v] >> 2) * v1[r][v];
                  if constexpr (ONE_BY_ONE) MOIETY_IN_REGISTER(sum[CHAINS - 1][r][t][v]);
                }
              }
            }
#pragma GCC unroll 2
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
              for (int v = 0; v < BOTH; v++) {
                control[r][v] >>= 4;
                if constexpr (ONE_BY_ONE) MOIETY_IN_REGISTER(control[r][v]);
              }
          }
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
  each_total([](Vec sum, float *at) __attribute__((always_inline)) { store(at, sum); });
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

// R tiles of BF12 with more than 8 tokens, for all of which some chunks are copied as bf16.
template <int R>
static void lengthened_few(const uint8_t *tile, int64_t size, int64_t chunks, const float *x,
                           int64_t x_step, int64_t count, float *y, int64_t y_step) {
  constexpr int64_t RUN = 4 * SCALE_CHUNKS, LONG = RUN * chunk_bytes(BF16);
  alignas(64) uint8_t longer[R * LONG];
  for (int64_t chunk = 0; chunk < chunks; chunk += RUN) {
    const int64_t some = chunks - chunk < RUN ? chunks - chunk : RUN;
    for (int r = 0; r < R; r++)
      for (int64_t c = 0; c < some; c++)
        lengthen(tile + r * size, chunk + c, longer + r * LONG + c * chunk_bytes(BF16));
    for (int64_t t = 0; t < count; t += 8) {
      const float *input = x + t * x_step + chunk * CHUNK;
      const uint8_t *next = t ? longer : tile + chunk_at(BF12, chunk + RUN);
      const Copied copied = {next, t ? LONG : size, chunk > 0};
      FOR_NUMBER(count - t < 8 ? count - t : 8,
                 tile_lanes<BF16, N, R>(longer, LONG, some, input, x_step, y + t * y_step, y_step,
                                        &copied));
    }
  }
}

// Any number of tokens, in blocks of at most 8, all of which a tile serves before the next one.
template <Kind kind>
static void tiles_few(const uint8_t *tile, int64_t size, int64_t tiles, int64_t chunks,
                      const float *x, int64_t x_step, int64_t count, float *y, int64_t y_step) {
  if (kind == BF12 && count > 8) {
    constexpr int R = TOGETHER;
    int64_t i = 0;
    for (; i + R <= tiles; i += R, tile += R * size, y += R * TILE_ROWS)
      lengthened_few<R>(tile, size, chunks, x, x_step, count, y, y_step);
    for (; i < tiles; i++, tile += size, y += TILE_ROWS)
      lengthened_few<1>(tile, size, chunks, x, x_step, count, y, y_step);
    return;
  }
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
