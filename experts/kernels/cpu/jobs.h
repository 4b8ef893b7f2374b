// How a call is cut into jobs, and where tokens and results of each kind of job lie.

#pragma once

#include "kernels.h"

enum Mode { LANES, BLOCKS, DOTS, PANELS };

// Tokens `first` to `first + count` of the sorted order, all of one expert.
struct Job {
  int64_t expert, first, count;
  Mode mode;
  float *x, *inner;
  int64_t gathered, grouped;  // items of earlier jobs in the two phases that go over jobs
};

static inline int64_t up_to(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of one product. Tokens of LANES and DOTS lie so far apart in its results.
static inline int64_t most_rows(const Job &job) {
  return job.mode == PANELS || job.mode == BLOCKS ? MOST_ROWS : GROUP_ROWS;
}

// Where a token's columns are among `count` panels, up to the next multiple of CHUNK.
static inline uint16_t *in_panel(float *panels, int64_t count, int64_t width, int64_t token,
                                 int64_t column) {
  const int64_t chunk = column / CHUNK, before = chunk / PANEL_CHUNKS * PANEL_CHUNKS;
  const int64_t together = least(width / CHUNK - before, PANEL_CHUNKS);
  const int64_t square = before * count + token / PANEL * together + chunk - before;
  return (uint16_t *)panels + (square * PANEL + token % PANEL) * CHUNK + column % CHUNK;
}

// A token's first results among those of panels; the others follow in steps of a square.
static inline float *in_squares(float *y, int64_t padded_rows, int64_t token) {
  return y + token / PANEL * PANEL * padded_rows + token % PANEL * TILE_ROWS;
}
