// bf16 tokens against a tiled matrix with bf16 products: 16 rows in the lanes, both kept values of
// a row and group in one dword.

// The kept values of 16 rows of one group as pairs of bf16; codes up to 127 are exact in bf16.
template <Kind kind>
static inline __m512i bf16_pair(const Chunk &chunk, int group) {
  if constexpr (kind == BF16) return (__m512i)load_int(group_of<kind>(chunk, group));
  if constexpr (kind == BF12) return bf12_pairs(chunk, group);
  Vec v0, v1;
  pair<kind>(chunk, group, 0, v0, v1);
  return _mm512_or_si512(_mm512_srli_epi32((__m512i)v0, 16), (__m512i)v1);
}

// M tokens with one tile; 16 results a token.
template <Kind kind, int M>
static void tile_dots(const uint8_t *tile, int64_t chunks, const uint16_t *x, int64_t x_step,
                      float *y, int64_t y_step) {
  constexpr int64_t BYTES = chunk_bytes(kind);
  constexpr int NEXT_TO = kind == BF12 ? QUARTET : 2;
  const uint8_t *const head = tile;
  tile += head_bytes(kind);
  // Nibble i0 | i1 << 2 -> the bytes of columns i0 and i1 among four bf16 inputs.
  const __m512i table = _mm512_setr_epi32(
      0x01000100, 0x01000302, 0x01000504, 0x01000706, 0x03020100, 0x03020302, 0x03020504,
      0x03020706, 0x05040100, 0x05040302, 0x05040504, 0x05040706, 0x07060100, 0x07060302,
      0x07060504, 0x07060706);
  __m512 total[M];
  for (int t = 0; t < M; t++) total[t] = _mm512_setzero_ps();
  for (int64_t chunk = 0; chunk < chunks; chunk += SCALE_CHUNKS) {
    const uint8_t *scale = tile;
    if (IS_INTEGER[kind]) tile += 2 * TILE_ROWS;
    const int64_t some = chunks - chunk < SCALE_CHUNKS ? chunks - chunk : SCALE_CHUNKS;
    __m512 sum[M];
    for (int t = 0; t < M; t++) sum[t] = IS_INTEGER[kind] ? _mm512_setzero_ps() : total[t];
    for (int64_t one = 0; one < some; one++, tile += BYTES) {
      fetch(tile + AHEAD);
      const Chunk here = chunk_in<kind>(head, tile);
      __m512i control = (__m512i)load_int(here.at);
      const uint16_t *input = x + (chunk + one) * CHUNK;
      for (int before = 0; before < GROUPS; before += NEXT_TO) {
#pragma GCC unroll 4
        for (int next = 0; next < NEXT_TO; next++) {
          const int g = before + next;
          fetch(group_of<kind>({tile, head}, g) + AHEAD);
          const __m512i values = bf16_pair<kind>(here, g);
          const __m512i places = _mm512_permutexvar_epi32(control, table);
          control = _mm512_srli_epi32(control, 4);
          for (int t = 0; t < M; t++) {
            long long four;
            __builtin_memcpy(&four, input + t * x_step + 4 * g, 8);
            const __m512i chosen = _mm512_shuffle_epi8(_mm512_set1_epi64(four), places);
            sum[t] = _mm512_dpbf16_ps(sum[t], (__m512bh)chosen, (__m512bh)values);
          }
        }
      }
    }
    for (int t = 0; t < M; t++)
      total[t] = IS_INTEGER[kind]
                     ? _mm512_fmadd_ps(sum[t], (__m512)load_bf16(scale), total[t])
                     : sum[t];
  }
  for (int t = 0; t < M; t++) _mm512_storeu_ps(y + t * y_step, total[t]);
}

// Blocks of 24 tokens, the rest in the next larger block there is: the tokens behind are zeros.
template <Kind kind>
static void tile_all(const uint8_t *tile, int64_t chunks, const uint16_t *x, int64_t x_step,
                     int64_t count, float *y, int64_t y_step) {
  for (; count > 0; count -= 24, x += 24 * x_step, y += 24 * y_step) {
    if (count > 20) tile_dots<kind, 24>(tile, chunks, x, x_step, y, y_step);
    else if (count > 16) tile_dots<kind, 20>(tile, chunks, x, x_step, y, y_step);
    else if (count > 12) tile_dots<kind, 16>(tile, chunks, x, x_step, y, y_step);
    else if (count > 8) tile_dots<kind, 12>(tile, chunks, x, x_step, y, y_step);
    else if (count > 6) tile_dots<kind, 8>(tile, chunks, x, x_step, y, y_step);
    else if (count > 4) tile_dots<kind, 6>(tile, chunks, x, x_step, y, y_step);
    else if (count > 3) tile_dots<kind, 4>(tile, chunks, x, x_step, y, y_step);
    else if (count > 2) tile_dots<kind, 3>(tile, chunks, x, x_step, y, y_step);
    else if (count > 1) tile_dots<kind, 2>(tile, chunks, x, x_step, y, y_step);
    else tile_dots<kind, 1>(tile, chunks, x, x_step, y, y_step);
  }
}

static void dots(const Matrix &m, int64_t which, int64_t row, int64_t rows, const uint16_t *x,
                 int64_t x_step, int64_t count, float *y, int64_t y_step) {
  for (int64_t r = 0; r < rows; r += TILE_ROWS) {
    const uint8_t *tile = tile_of(m, which, row + r);
    FOR_BF16_TILE_KIND(m.kind, tile_all<K>(tile, chunks_of(m.columns), x, x_step, count, y + r, y_step));
  }
}
