// The items of a loop, shared out among threads: each takes its own share from the front, so that it
// reads memory in one stream, and then what is left of the others' from the back.

#pragma once

#include <stdint.h>

struct alignas(64) Share {
  uint64_t range;  // the next item, and in the upper half the end
};

static inline void share_out(Share *shares, int64_t threads, int64_t items) {
  for (int64_t t = 0; t < threads; t++)
    shares[t].range = (uint64_t)(items * (t + 1) / threads) << 32 | (uint64_t)(items * t / threads);
}

// The next item of one share, or -1.
static inline int64_t take_of(Share &share, bool front) {
  uint64_t range = __atomic_load_n(&share.range, __ATOMIC_RELAXED);
  for (;;) {
    const uint64_t next = range & 0xffffffff, end = range >> 32;
    if (next >= end) return -1;
    const uint64_t rest = front ? end << 32 | (next + 1) : (end - 1) << 32 | next;
    if (__atomic_compare_exchange_n(&share.range, &range, rest, true, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED))
      return (int64_t)(front ? next : end - 1);
  }
}

// An item for a thread, or -1 when there are none left.
static inline int64_t take(Share *shares, int64_t threads, int64_t thread) {
  for (int64_t t = 0; t < threads; t++) {
    const int64_t item = take_of(shares[(thread + t) % threads], t == 0);
    if (item >= 0) return item;
  }
  return -1;
}
