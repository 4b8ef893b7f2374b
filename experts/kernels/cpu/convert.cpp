#include "convert.h"
#include "scratch.h"
#include "shorten.h"

#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

#include "scalar.h"
#include "rows.h"
#include "tiles.h"

int64_t up_to(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// Copies one kept value of a row into place `which` (0 or 1) of lane r, or back.
struct Places {
  int32_t kind;
  uint8_t *group;
  int r, which;

  uint8_t *at() const {
    if (kind == BF16) return group + 4 * r + 2 * which;
    if (kind == FP16) return group + 32 * which + 2 * r;
    if (kind == FP32) return group + 64 * which + 4 * r;
    return kind == INT8 ? group + 16 * which + r : group + r;
  }
};

int width_of(int32_t kind) { return kind == FP32 ? 4 : kind == INT8 ? 1 : 2; }

void put(const Places &to, const uint8_t *values, int64_t at) {
  if (to.kind != INT4) {
    const int width = width_of(to.kind);
    memcpy(to.at(), values + at * width, width);
    return;
  }
  const int code = values[at / 2] >> 4 * (at % 2) & 15;
  *to.at() = (uint8_t)((*to.at() & 15 << 4 * (1 - to.which)) | code << 4 * to.which);
}

void get(const Places &from, uint8_t *values, int64_t at) {
  if (from.kind != INT4) {
    const int width = width_of(from.kind);
    memcpy(values + at * width, from.at(), width);
    return;
  }
  const int code = *from.at() >> 4 * from.which & 15, half = at % 2;
  values[at / 2] = (uint8_t)((half ? values[at / 2] & 15 : 0) | code << 4 * half);
}

// What a lane without a row, or a group past the last column, holds: columns 0 and 1, zeros.
void clear(int32_t kind, int64_t columns, uint8_t *tile) {
  memset(tile, 0, tile_size(kind, columns));
  for (int64_t chunk = 0; chunk < chunks_of(columns); chunk++) {
    uint8_t *at = tile + chunk_at(kind, chunk);
    memset(at, 0x44, CONTROL_BYTES);
    if (kind == INT4) memset(at + CONTROL_BYTES, 0x88, GROUPS * GROUP_BYTES[kind]);
  }
}

bool tile_row(const Matrix &m, const Row &row, int r, uint8_t *tile) {
  if (!row_holds(row, m.columns)) return false;
  int64_t at = row.first;
  for (int64_t group = 0; group < m.columns / 4; group++) {
    const int nibble = row.mask[group / 2] >> 4 * (group % 2) & 15;
    if (__builtin_popcount(nibble) != 2) return false;
    const int first = __builtin_ctz(nibble), second = 31 - __builtin_clz(nibble);
    uint8_t *chunk = tile + chunk_at(m.kind, group / GROUPS);
    uint32_t control = load_u32(chunk + 4 * r);
    const int shift = 4 * (group % GROUPS);
    control = (control & ~(15u << shift)) | (uint32_t)(first | second << 2) << shift;
    memcpy(chunk + 4 * r, &control, 4);
    uint8_t *values = chunk + CONTROL_BYTES + group % GROUPS * GROUP_BYTES[m.kind];
    put({m.kind, values, r, 0}, row.values, at++);
    put({m.kind, values, r, 1}, row.values, at++);
  }
  if (IS_INTEGER[m.kind])
    for (int64_t block = 0; block < up_to(m.columns, SCALE_COLUMNS); block++)
      memcpy(tile + scale_at(m.kind, block) + 2 * r, row.scale + block, 2);
  return true;
}

Chunk chunk_of(int32_t kind, const uint8_t *tile, int64_t chunk) {
  const uint8_t *at = tile + chunk_at(kind, chunk);
  return kind == BF12 ? chunk_in<BF12>(tile, at) : chunk_in<BF16>(tile, at);
}

// What lane r keeps of a group: the first column, and above it the second.
int nibble_of(const Chunk &chunk, int64_t group, int r) {
  return load_u32(chunk.at + 4 * r) >> 4 * group & 15;
}

}  // namespace

Status starts_of(const Matrix &from, int threads, int64_t *starts) {
  const int64_t step = from.rows + 1, bytes = up_to(from.columns, 8);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < from.count * from.rows; i++) {
    const int64_t which = i / from.rows, row = i % from.rows;
    const Row one = {nullptr, from.mask + which * from.mask_step + row * bytes, nullptr, 0, 0, 0};
    int64_t kept = 0;
    for (int64_t column = 0; column < from.columns; column += 64)
      kept += __builtin_popcountll(bits_at(one, column, from.columns));
    starts[which * step + row + 1] = kept;
  }
  Status status = OK;
  for (int64_t which = 0; which < from.count; which++) {
    int64_t *all = starts + which * step;
    all[0] = 0;
    for (int64_t row = 0; row < from.rows; row++) all[row + 1] += all[row];
    const int64_t spare = from.total - all[from.rows];
    if (spare < 0 || spare > (from.kind == INT4)) status = BAD_MASK;
  }
  return status;
}

int64_t tile_bytes(int32_t kind, int64_t rows, int64_t columns) {
  return up_to(rows, TILE_ROWS) * tile_size(kind, columns);
}

// One pass over a matrix reads all of it, so that few large pages find their way to the CPU sooner.
static void prefer_large_pages(uint8_t *tiles, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t LARGE = 2 << 20;
  const uintptr_t start = ((uintptr_t)tiles + LARGE - 1) / LARGE * LARGE;
  const uintptr_t end = ((uintptr_t)tiles + bytes) / LARGE * LARGE;
  if (end > start) madvise((void *)start, end - start, MADV_HUGEPAGE);
#endif
}

// Up to 16 rows as a tile of their own kind. False where a mask is not 2:4.
static bool tile_rows(const Matrix &from, int64_t which, int64_t first, uint8_t *to) {
  clear(from.kind, from.columns, to);
  bool good = true;
  for (int r = 0; r < TILE_ROWS && first + r < from.rows; r++)
    good = good && tile_row(from, row_of(from, which, first + r), r, to);
  return good;
}

Status tile(const Matrix &from, int threads, const int64_t *apart, int64_t step, uint8_t *tiles) {
  if (from.columns % 4 || from.starts || 2 * from.kept != from.columns) return BAD_ARGUMENT;
  if (apart && from.kind != BF16) return BAD_ARGUMENT;
  const int64_t each = up_to(from.rows, TILE_ROWS), plain = tile_size(from.kind, from.columns);
  const int64_t size = tile_size(apart ? BF12 : from.kind, from.columns);
  Status status = OK;
  prefer_large_pages(tiles, from.count * step);
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch scratch;
    uint8_t *wide = apart ? (uint8_t *)scratch.take(plain + 64) : nullptr;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < from.count * each; i++) {
      const int64_t which = i / each, first = i % each * TILE_ROWS;
      uint8_t *to = tiles + which * step + i % each * size;
      if (apart && !wide) {
#pragma omp atomic write
        status = NO_MEMORY;
        continue;
      }
      if (!tile_rows(from, which, first, apart ? wide : to)) {
#pragma omp atomic write
        status = BAD_MASK;
      } else if (apart) {
        const Row row = row_of(from, which, first);
        const uint8_t *values = row.values + 2 * row.first;
        uint8_t *behind = tiles + which * step + each * size + apart[i] * APART_BYTES;
        const int64_t count = from.rows - first < TILE_ROWS ? from.rows - first : TILE_ROWS;
        shorten(values, count, from.columns, wide, behind, to);
      }
    }
  }
  return status;
}

Status untile(const Matrix &from, int threads, uint8_t *values, uint8_t *mask, uint16_t *scale) {
  const int64_t kept = from.columns / 2, blocks = up_to(from.columns, SCALE_COLUMNS);
  const int64_t bytes = up_to(from.columns, 8), kind = from.kind;
  const int64_t row_bytes = kind == INT4 ? up_to(kept, 2) : kept * width_of(from.kind);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < from.count * from.rows; i++) {
    const int64_t which = i / from.rows, row = i % from.rows;
    const int r = row % TILE_ROWS;
    const uint8_t *tile = tile_of(from, which, row);
    memset(mask + i * bytes, 0, bytes);
    for (int64_t group = 0; group < from.columns / 4; group++) {
      const Chunk chunk = chunk_of(from.kind, tile, group / GROUPS);
      const int nibble = nibble_of(chunk, group % GROUPS, r);
      const int bits = 1 << (nibble & 3) | 1 << (nibble >> 2);
      mask[i * bytes + group / 2] |= (uint8_t)(bits << 4 * (group % 2));
      for (int place = 0; place < 2; place++) {
        if (kind == BF12) {
          const uint16_t value = bf12_at(chunk, group % GROUPS, 2 * r + place);
          memcpy(values + i * row_bytes + 2 * (2 * group + place), &value, 2);
        } else {
          uint8_t *at = (uint8_t *)chunk.at + CONTROL_BYTES + group % GROUPS * GROUP_BYTES[kind];
          get({from.kind, at, r, place}, values + i * row_bytes, 2 * group + place);
        }
      }
    }
    for (int64_t block = 0; block < (scale ? blocks : 0); block++)
      memcpy(scale + i * blocks + block, tile + scale_at(from.kind, block) + 2 * r, 2);
  }
  return OK;
}

namespace {

float value_of(int32_t kind, const uint8_t *values, int64_t at) {
  switch (kind) {
    case BF16: return value_at<BF16>(values, at);
    case FP16: return value_at<FP16>(values, at);
    case FP32: return value_at<FP32>(values, at);
    case INT8: return value_at<INT8>(values, at);
    default: return value_at<INT4>(values, at);
  }
}

void dense_tile_row(const Matrix &m, int64_t which, int64_t row, float *y) {
  memset(y, 0, m.columns * 4);
  const uint8_t *tile = tile_of(m, which, row);
  const int r = row % TILE_ROWS;
  for (int64_t group = 0; group < m.columns / 4; group++) {
    const Chunk chunk = chunk_of(m.kind, tile, group / GROUPS);
    const int nibble = nibble_of(chunk, group % GROUPS, r);
    const uint8_t *scales = tile + scale_at(m.kind, group / GROUPS / SCALE_CHUNKS) + 2 * r;
    const float scale = IS_INTEGER[m.kind] ? bf16_value(load_u16(scales)) : 1.0f;
    uint8_t *values = (uint8_t *)chunk.at + CONTROL_BYTES + group % GROUPS * GROUP_BYTES[m.kind];
    for (int place = 0; place < 2; place++) {
      const Places from = {m.kind, values, r, place};
      const float value = m.kind == BF12
                              ? bf16_value(bf12_at(chunk, group % GROUPS, 2 * r + place))
                              : value_of(m.kind, from.at(), m.kind == INT4 ? place : 0);
      y[4 * group + (nibble >> 2 * place & 3)] = value * scale;
    }
  }
}

}  // namespace

Status expand(const Kernels &kernels, const Matrix &from, int64_t which, int threads, bool bf16,
              void *dense) {
  const bool whole = from.layout == TILES && kernels.dense_tile;
  const int64_t together = whole ? TILE_ROWS : 1, step = up_to(from.columns, CHUNK) * CHUNK;
  const size_t width = from.columns;
  if (!width) return OK;
  Status status = OK;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch scratch;
    float *wide = (float *)scratch.take(together * step * 4 + 64);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < from.rows; first += together) {
      bool good = wide;
      if (good && whole)
        kernels.dense_tile(from, which, first, wide, step);
      else if (good && from.layout == TILES)
        dense_tile_row(from, which, first, wide);
      else if (good)
        good = kernels.dense_row(from, which, first, wide);
      for (int64_t row = first; good && row < from.rows && row < first + together; row++) {
        const float *values = wide + (row - first) * step;
        if (bf16)
          kernels.narrow(values, (uint16_t *)dense + row * width, width);
        else
          memcpy((float *)dense + row * width, values, width * 4);
      }
      if (!good) {
#pragma omp atomic write
        status = wide ? BAD_MASK : NO_MEMORY;
      }
    }
  }
  return status;
}
