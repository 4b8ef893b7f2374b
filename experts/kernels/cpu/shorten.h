// From bf16 tiles to BF12, see bf12.h.

#pragma once

#include "format.h"

// Bytes that BF12 takes for each matrix of a stack of bf16 in rows, or 0 where it takes no fewer than
// bf16 or a chunk has more exponents than can be numbered. `apart` (tiles of all matrices) gets how
// many of a matrix's chunks are kept apart before those of each tile.
int64_t bf12_bytes(const Matrix &from, int threads, int64_t *apart);

// One tile of bf16 to BF12. `values` are those of its up to 16 rows; its chunks apart go to `apart`.
void shorten(const uint8_t *values, int64_t count, int64_t columns, const uint8_t *tile,
             uint8_t *apart, uint8_t *to);
