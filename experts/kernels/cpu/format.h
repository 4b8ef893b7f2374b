// What Python hands over and how a tiled matrix is laid out. Plain data and constants only: this
// file is compiled once for every instruction set, so it must not emit any code of its own.
//
// A matrix (rows x columns) comes in one of three layouts:
//
//   rows   the packed format as it is stored: kept values row by row, a bit mask, for integers a
//          bf16 scale a row for each 128 columns.
//   tiles  2:4 only, made at load time: 16 rows in the lanes of a vector, so that one pass reads
//          one sequential stream. A tile is a run of chunks of 32 columns; a chunk is
//            16 x uint32   control: nibble g of lane r holds the two kept columns of group g
//            8 x group     the kept values of the 16 rows, see GROUP_BYTES
//          and for integers 16 bf16 scales stand before every fourth chunk. BF12 is bf16 without
//          loss in twelve bits, for 2:4 matrices only; bf12.h says how.
//   dense  every value, bf16 or fp32, row by row: for few tokens.

#pragma once

#include <stddef.h>
#include <stdint.h>

enum Kind : int32_t { BF16 = 0, FP16 = 1, FP32 = 2, INT8 = 3, INT4 = 4, BF12 = 5 };
enum Layout : int32_t { ROWS = 0, TILES = 1, DENSE = 2 };
enum Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };
enum Isa : int32_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4 };
enum Status : int32_t { OK = 0, BAD_MASK = 1, NO_MEMORY = 2, BAD_ARGUMENT = 3 };

static constexpr int64_t TILE_ROWS = 16;
static constexpr int64_t CHUNK = 32;
static constexpr int64_t GROUPS = 8;
static constexpr int64_t SCALE_COLUMNS = 128;
static constexpr int64_t SCALE_CHUNKS = SCALE_COLUMNS / CHUNK;
static constexpr int64_t CONTROL_BYTES = 64;
static constexpr int64_t HEAD_BYTES = 192;

// Bytes of one group of a tile. bf16: 16 pairs (v0, v1). fp16, fp32, int8: 16 v0, then 16 v1.
// int4: 16 bytes, v0 in the low half and v1 in the high one, each stored 8 higher. BF12: four groups
// are 192 bytes.
static constexpr int64_t GROUP_BYTES[6] = {64, 64, 128, 32, 16, 48};
static constexpr int64_t HALF_BYTES[5] = {4, 4, 8, 2, 1};  // of one value in rows
static constexpr bool IS_INTEGER[6] = {false, false, false, true, true, false};

struct Matrix {
  const uint8_t *values;
  const uint8_t *mask;       // rows layout only
  const uint16_t *scale;     // bf16 bits; rows layout of integers only
  const int64_t *starts;     // first value of every row and the end, or null where all keep the same
  int64_t count;             // matrices in the stack
  int64_t rows, columns;
  int64_t kept;              // values a row, where starts is null
  int64_t total;             // values of one matrix, padding halves of int4 included
  int64_t values_step;       // bytes from one matrix of the stack to the next
  int64_t mask_step, scale_step, starts_step;
  int32_t kind, layout;
};

struct Tokens {
  const void *data;          // (tokens, width) bf16 or fp32, rows one after the other
  int64_t count, width;
  int32_t bf16;
};

struct Routes {
  const int64_t *experts;    // (tokens, active); an index outside the stack is skipped
  const float *weights;      // (tokens, active)
  int64_t active;
};
