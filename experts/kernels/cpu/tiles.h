// Where things are in a tile. Included once for every instruction set; everything is static.

static constexpr int64_t chunk_bytes(int32_t kind) {
  return CONTROL_BYTES + GROUPS * GROUP_BYTES[kind];
}

// The 16 scales that stand before every block of SCALE_CHUNKS chunks.
static inline int64_t scale_bytes(int32_t kind) { return IS_INTEGER[kind] ? 2 * TILE_ROWS : 0; }

static inline int64_t scale_at(int32_t kind, int64_t block) {
  return block * (SCALE_CHUNKS * chunk_bytes(kind) + scale_bytes(kind));
}

// The exponents that a tile of BF12 begins with.
static constexpr int64_t head_bytes(int32_t kind) { return kind == BF12 ? HEAD_BYTES : 0; }

static inline int64_t chunk_at(int32_t kind, int64_t chunk) {
  return head_bytes(kind) + chunk * chunk_bytes(kind) +
         (chunk / SCALE_CHUNKS + 1) * scale_bytes(kind);
}

static inline int64_t chunks_of(int64_t columns) { return (columns + CHUNK - 1) / CHUNK; }

static inline int64_t tile_size(int32_t kind, int64_t columns) {
  const int64_t chunks = chunks_of(columns), blocks = (chunks + SCALE_CHUNKS - 1) / SCALE_CHUNKS;
  return head_bytes(kind) + chunks * chunk_bytes(kind) + blocks * scale_bytes(kind);
}

// The tile that holds a row.
static inline const uint8_t *tile_of(const Matrix &m, int64_t which, int64_t row) {
  return m.values + which * m.values_step + row / TILE_ROWS * tile_size(m.kind, m.columns);
}

// A chunk of a tile, and for BF12 what its codes stand for.
struct Chunk {
  const uint8_t *at, *exponents;
};

#include "bf12.h"

// The chunk at some place of a tile, or where it is kept if not there.
template <Kind kind>
static inline Chunk chunk_in(const uint8_t *tile, const uint8_t *at) {
  if constexpr (kind == BF12) {
    if (__builtin_expect(load_u32(at) == APART, 0)) {
      int64_t way;
      __builtin_memcpy(&way, at + 8, 8);
      return {at + way, at + way - HEAD_BYTES};
    }
  }
  return {at, tile};
}

template <Kind kind>
static inline const uint8_t *group_of(const Chunk &chunk, int group) {
  return chunk.at + CONTROL_BYTES + group * GROUP_BYTES[kind];
}
