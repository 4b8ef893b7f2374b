// Memory that a call needs besides its inputs and outputs, kept for the thread's next call.

#pragma once

#include <stddef.h>
#include <stdlib.h>

class Scratch {
 public:
  ~Scratch() { free(data_); }

  // At least `bytes`, aligned to 64; null when there is no memory. Gives up what it gave before.
  char *take(size_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = (bytes + 63) / 64 * 64;
      data_ = (char *)aligned_alloc(64, size_);
      if (!data_) size_ = 0;
    }
    return data_;
  }

 private:
  char *data_ = nullptr;
  size_t size_ = 0;
};

// Hands out pieces of one block, or only adds them up while the block is null.
class Pieces {
 public:
  explicit Pieces(char *block) : block_(block) {}

  template <class T>
  T *take(int64_t count) {
    char *at = block_ ? block_ + used_ : nullptr;
    used_ += ((size_t)count * sizeof(T) + 63) / 64 * 64;
    return (T *)at;
  }

  size_t used() const { return used_; }

 private:
  char *block_;
  size_t used_ = 0;
};

// Has `place` take its pieces from the scratch memory, after once adding them up. False where there
// is no memory.
template <class Place>
static bool lay_out(Scratch &scratch, const Place &place) {
  Pieces sizes(nullptr);
  place(sizes);
  char *block = scratch.take(sizes.used());
  if (!block) return false;
  Pieces pieces(block);
  place(pieces);
  return true;
}
