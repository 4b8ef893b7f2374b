// Between the layouts: rows to tiles and back, and either to a dense matrix.

#pragma once

#include "kernels.h"

// The first value of every row and the end of the last, (count, rows + 1), from the masks.
Status starts_of(const Matrix &from, int threads, int64_t *starts);

int64_t tile_bytes(int32_t kind, int64_t rows, int64_t columns);

// Tiles of 2:4 matrices in rows, each matrix `step` bytes behind the one before it. With `apart`,
// which is bf12_bytes's, bf16 values become BF12.
Status tile(const Matrix &from, int threads, const int64_t *apart, int64_t step, uint8_t *tiles);
Status untile(const Matrix &from, int threads, uint8_t *values, uint8_t *mask, uint16_t *scale);
Status expand(const Kernels &kernels, const Matrix &from, int64_t which, int threads, bool bf16,
              void *dense);
