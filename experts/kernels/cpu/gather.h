// Copies a job's tokens to where the kernels want them, padded with zeros.

#pragma once

#include <string.h>

#include "driver.h"
#include "jobs.h"

class Gather {
 public:
  // Tokens in `order`, pairs of a token and a slot; `width` columns from `first` on, of which those
  // behind the last are zeros.
  Gather(const Call &call, const int64_t *order, int64_t width, int64_t first = 0)
      : call_(call),
        k_(*call.kernels),
        order_(order),
        first_(first),
        width_(width),
        real_(least(call.x.width - first, width)),
        active_(call.routes ? call.routes->active : 1) {}

  // One of a job's pieces.
  void copy(const Job &job, int64_t item) const {
    item -= job.gathered;
    const int64_t spare = width_ - real_;
    if (job.mode == BLOCKS) {
      copy_block(job, item);
    } else if (job.mode == DOTS) {
      uint16_t *to = (uint16_t *)job.x + item * width_;
      const bool real = item < job.count;
      if (real) memcpy(to, token(job.first + item), real_ * 2);
      memset(to + (real ? real_ : 0), 0, (real ? spare : width_) * 2);
    } else if (job.mode == PANELS) {
      copy_panel(job, item);
    } else if (job.mode == PAIRS) {
      copy_pairs(job, item);
    } else {
      float *to = job.x + item * width_;
      const void *from = token(job.first + item);
      if (call_.x.bf16)
        k_.widen((const uint16_t *)from, to, real_);
      else
        memcpy(to, from, real_ * 4);
      memset(to + real_, 0, spare * 4);
    }
  }

 private:
  const void *token(int64_t place) const {
    const int64_t row = order_[place] / active_ * call_.x.width + first_;
    return call_.x.bf16 ? (const void *)((const uint16_t *)call_.x.data + row)
                        : (const void *)((const float *)call_.x.data + row);
  }

  void copy_block(const Job &job, int64_t item) const {
    const int64_t pieces = up_to(width_, GATHER_COLUMNS) / GATHER_COLUMNS;
    const int64_t first = item / pieces * job.block, column = item % pieces * GATHER_COLUMNS;
    const int64_t count = least(job.count - first, job.block), wide = up_to(count, k_.width);
    const void *rows[MOST_BLOCK];
    for (int64_t t = 0; t < count; t++) rows[t] = token(job.first + first + t);
    const int64_t real = least(real_ - column, GATHER_COLUMNS);
    float *block = job.x + first * width_ + column * wide;
    if (real > 0) k_.transpose(rows, count, call_.x.bf16, wide, column, real, block);
    const int64_t here = least(width_ - column, GATHER_COLUMNS), done = real > 0 ? real : 0;
    memset(block + done * wide, 0, (here - done) * wide * 4);
  }

  void copy_panel(const Job &job, int64_t item) const {
    const uint16_t *from = item < job.count ? (const uint16_t *)token(job.first + item) : nullptr;
    for (int64_t column = 0; column < width_; column += CHUNK) {
      uint16_t *to = in_panel(job.x, up_to(job.count, PANEL) / PANEL, width_, item, column);
      if (from && column + CHUNK <= real_) {
        memcpy(to, from + column, CHUNK * 2);
        continue;
      }
      const int64_t left = from ? real_ - column : 0;
      const int64_t real = left < 0 ? 0 : least(left, CHUNK);
      if (real) memcpy(to, from + column, real * 2);
      memset(to + real, 0, (CHUNK - real) * 2);
    }
  }

  void copy_pairs(const Job &job, int64_t item) const {
    const int64_t pieces = up_to(width_, GATHER_COLUMNS) / GATHER_COLUMNS;
    const int64_t panel = item / pieces, first = item % pieces * GATHER_COLUMNS;
    const int64_t before = panel * PANEL, some = least(job.count - before, PANEL);
    const uint16_t *rows[PANEL] = {};
    for (int64_t t = 0; t < some; t++) rows[t] = (const uint16_t *)token(job.first + before + t);
    const int64_t end = least(width_, first + GATHER_COLUMNS);
    for (int64_t column = first; column < end; column += CHUNK) {
      const int64_t left = real_ - column, real = left < 0 ? 0 : least(left, CHUNK);
      k_.pair_up(rows, column, real,
                 in_pairs(job.x, up_to(job.count, PANEL) / PANEL, width_, panel, column));
    }
  }

  const Call &call_;
  const Kernels &k_;
  const int64_t *order_;
  const int64_t first_, width_, real_, active_;
};
