// How a call is cut into jobs, and where tokens and results of each kind of job lie.

#pragma once

#include "kernels.h"

enum Mode { LANES, BLOCKS, DOTS, PANELS, PAIRS };

// Tokens `first` to `first + count` of the sorted order, all of one expert.
struct Job {
  int64_t expert, first, count;
  Mode mode;
  int64_t block;  // tokens of one of its blocks
  float *x, *inner;
  int64_t gathered, grouped;  // items of earlier jobs in the two phases that go over jobs
};

// The job that an item of a phase belongs to.
static inline const Job &job_of(const Job *jobs, int64_t item, int64_t count, int64_t Job::*first) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (jobs[middle].*first <= item ? low : high) = middle;
  }
  return jobs[low];
}

static inline int64_t up_to(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Tokens of a block whose results are turned at once. Blocks are multiples of it, and it is one of
// every vector's width.
static constexpr int64_t TURNED = 16;

// Tokens of each part, so that all are about as large and no larger than `most`, and where their
// size allows it a multiple of `threads` in number.
static inline int64_t part_of(int64_t tokens, int64_t most, int64_t threads = 1) {
  const int64_t parts = up_to(tokens, most * threads) / most;
  return parts ? up_to((tokens + parts - 1) / parts, TURNED) : TURNED;
}

static inline int64_t parts_of(int64_t tokens, int64_t each) { return (tokens + each - 1) / each; }

static inline bool with_amx(Mode mode) { return mode == PANELS || mode == PAIRS; }

// Rows of one product. Tokens of LANES and DOTS lie so far apart in its results.
static inline int64_t most_rows(const Job &job) {
  if (job.mode == BLOCKS) return BLOCK_ROWS;
  return job.mode == LANES || job.mode == DOTS ? GROUP_ROWS : MOST_ROWS;
}

// Rows one thread takes at a time: whole tiles, and enough pieces of about one size for all
// threads. With AMX a piece reads all tokens anew, so there are fewer.
static inline int64_t group_rows(const Job &job, int64_t rows, int64_t threads) {
  const int64_t most = most_rows(job), pieces = (with_amx(job.mode) ? 2 : 4) * threads;
  const int64_t turns = up_to(rows, pieces * most) / (pieces * most);
  return rows ? up_to((rows + pieces * turns - 1) / (pieces * turns), TILE_ROWS) : TILE_ROWS;
}

static constexpr int64_t GATHER_COLUMNS = 256;

// Floats (or for bf16, halves of them) that tokens of some width take.
static inline int64_t room(const Job &job, const Kernels &k, int64_t width) {
  if (job.mode == LANES) return job.count * width;
  if (job.mode == BLOCKS) return up_to(job.count, k.width) * width;
  if (job.mode == DOTS) return (job.count + DOTS_PAD) * width / 2;
  return up_to(job.count, PANEL) * width / 2;
}

// Pieces in which tokens of some width are copied.
static inline int64_t gather_items(const Job &job, int64_t width) {
  if (job.mode == LANES) return job.count;
  if (job.mode == DOTS) return job.count + DOTS_PAD;
  if (job.mode == PANELS) return up_to(job.count, PANEL);
  const int64_t together = job.mode == PAIRS ? PANEL : job.block;
  return up_to(job.count, together) / together * (up_to(width, GATHER_COLUMNS) / GATHER_COLUMNS);
}

// Where a token's columns are among `count` panels, up to the next multiple of CHUNK.
static inline uint16_t *in_panel(float *panels, int64_t count, int64_t width, int64_t token,
                                 int64_t column) {
  const int64_t chunk = column / CHUNK, before = chunk / PANEL_CHUNKS * PANEL_CHUNKS;
  const int64_t together = least(width / CHUNK - before, PANEL_CHUNKS);
  const int64_t square = before * count + token / PANEL * together + chunk - before;
  return (uint16_t *)panels + (square * PANEL + token % PANEL) * CHUNK + column % CHUNK;
}

// The same for a chunk of 16 tokens, or half of one, in pairs.
static inline uint16_t *in_pairs(float *panels, int64_t count, int64_t width, int64_t panel,
                                 int64_t column) {
  return in_panel(panels, count, width, panel * PANEL, column / CHUNK * CHUNK) +
         column % CHUNK * PANEL;
}

// A token's first results among those of panels; the others follow in steps of a square.
static inline float *in_squares(float *y, int64_t padded_rows, int64_t token) {
  return y + token / PANEL * PANEL * padded_rows + token % PANEL * TILE_ROWS;
}
