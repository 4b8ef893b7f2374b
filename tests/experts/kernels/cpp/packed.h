// Random matrices in the packed format, each in buffers of exactly its size (so that
// AddressSanitizer sees every read past an end), with the numbers they hold.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "format.h"

extern "C" {
int32_t moiety_has(int32_t isa);
int32_t moiety_starts(const Matrix *from, int32_t threads, int64_t *starts);
int64_t moiety_tile_bytes(int32_t kind, int64_t rows, int64_t columns);
int64_t moiety_bf12_bytes(const Matrix *from, int32_t threads, int64_t *apart);
int32_t moiety_tile(const Matrix *from, int32_t threads, const int64_t *apart, int64_t step,
                    uint8_t *tiles);
int32_t moiety_untile(const Matrix *from, int32_t threads, uint8_t *values, uint8_t *mask,
                      uint16_t *scale);
int32_t moiety_dense(int32_t isa, const Matrix *from, int64_t which, int32_t threads,
                      int32_t bf16, void *dense);
int32_t moiety_forward(int32_t isa, int32_t threads, const Matrix *gate_up, const Matrix *down,
                       int32_t activation, const Tokens *x, const Routes *routes,
                       const void *base, void *out);
}

static const char *const KIND_NAME[5] = {"bf16", "fp16", "fp32", "int8", "int4"};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}

  uint64_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    return state_ ^= state_ << 17;
  }
  int64_t below(int64_t end) { return (int64_t)((bits() >> 16) % (uint64_t)end); }
  float signed_unit() { return (float)(below(1 << 24) - (1 << 23)) / (float)(1 << 23); }

 private:
  uint64_t state_;
};

static float of_bf16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// To nearest, ties to even.
static uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t below = bits & 0xffff, up = below > 0x8000 || (below == 0x8000 && bits >> 16 & 1);
  return (uint16_t)((bits >> 16) + up);
}

static double of_fp16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
  return bits >> 15 ? -size : size;
}

// Bytes at an odd address, the last of them the last of its allocation.
class Bytes {
 public:
  explicit Bytes(int64_t size = 0) : size_(size), data_(new uint8_t[size + 1]()) {}
  uint8_t *at(int64_t place = 0) const { return data_.get() + 1 + place; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  std::unique_ptr<uint8_t[]> data_;
};

static int64_t pieces(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

static int64_t value_bytes(int32_t kind, int64_t count) {
  if (kind == INT4) return pieces(count, 2);
  return count * (kind == FP32 ? 4 : kind == INT8 ? 1 : 2);
}

// Stores a random value at a place and gives what it is, before its scale. Those that are `rare` have
// exponents that no others have, or none.
static double put_value(int32_t kind, uint8_t *values, int64_t at, bool rare, Random &random) {
  if (kind == INT4) {
    const int code = (int)random.below(15) - 7;
    values[at / 2] |= (uint8_t)((code + 8) << 4 * (at % 2));
    return code;
  }
  if (kind == INT8) {
    const int code = (int)random.below(255) - 127;
    values[at] = (uint8_t)code;
    return code;
  }
  float value = random.signed_unit();
  if (kind == BF16 && rare) value = random.below(4) ? ldexpf(value, -(int)random.below(2) - 60) : 0;
  if (kind == FP32) {
    memcpy(values + 4 * at, &value, 4);
    return value;
  }
  // Every fp16 up to 1, subnormal ones among them.
  uint16_t bits = to_bf16(value);
  if (kind == FP16) bits = (uint16_t)((random.bits() >> 20 & 0x8000) | random.below(0x3c00));
  memcpy(values + 2 * at, &bits, 2);
  return kind == FP16 ? of_fp16(bits) : of_bf16(bits);
}

struct Packed {
  int32_t kind;
  int64_t count, rows, columns, kept;  // kept values a row, or -1 for any pattern
  int64_t total;
  Bytes values, mask;
  std::vector<uint16_t> scale;
  std::vector<int64_t> starts;
  std::vector<double> dense;

  // The same rows may be seen as `parts` times as many matrices, each of fewer rows.
  Matrix matrix(int64_t parts = 1) const {
    Matrix m = {};
    m.values = values.at();
    m.mask = mask.at();
    m.scale = scale.empty() ? nullptr : scale.data();
    m.starts = starts.empty() ? nullptr : starts.data();
    m.count = count * parts;
    m.rows = rows / parts;
    m.columns = columns;
    m.kept = kept < 0 ? 0 : kept;
    m.values_step = values.size() / m.count;
    m.total = total / parts;
    m.mask_step = mask.size() / m.count;
    m.scale_step = (int64_t)scale.size() / m.count;
    m.starts_step = rows + 1;
    m.kind = kind;
    m.layout = ROWS;
    return m;
  }
};

// `keep` holds a byte for every element of the stack: whether it is stored.
static Packed pack(int32_t kind, int64_t count, int64_t rows, int64_t columns, int64_t kept,
                   const std::vector<char> &keep, Random &random) {
  const int64_t size = rows * columns, bytes = pieces(columns, 8), groups = pieces(columns, 128);
  const bool integer = kind == INT8 || kind == INT4;
  int64_t all = 0;
  for (int64_t i = 0; i < size; i++) all += keep[i];
  const int64_t row_bytes = value_bytes(kind, kept);
  const int64_t each = kept < 0 ? value_bytes(kind, all) : rows * row_bytes;
  Packed p = {kind, count, rows, columns, kept, 0, Bytes(count * each),
              Bytes(count * rows * bytes), {}, {}, {}};
  if (kind == INT4) p.total = 2 * each;
  else if (all) p.total = each * all / value_bytes(kind, all);
  p.dense.assign(count * size, 0.0);
  if (integer) p.scale.resize(count * rows * groups);
  for (uint16_t &one : p.scale) one = to_bf16(0.01f + 0.05f * fabsf(random.signed_unit()));
  for (int64_t which = 0; which < count; which++) {
    int64_t at = 0;
    for (int64_t row = 0; row < rows; row++) {
      uint8_t *values = p.values.at(which * each + (kept < 0 ? 0 : row * row_bytes));
      uint8_t *mask = p.mask.at((which * rows + row) * bytes);
      if (kept >= 0) at = 0;
      for (int64_t c = 0; c < columns; c++) {
        if (!keep[which * size + row * columns + c]) continue;
        mask[c / 8] |= (uint8_t)(1 << c % 8);
        const bool rare = which % 2 == 0 && row == 0 && c < 32;
        const double value = put_value(kind, values, at++, rare, random);
        const float scale =
            integer ? of_bf16(p.scale[(which * rows + row) * groups + c / 128]) : 1.0f;
        p.dense[which * size + row * columns + c] = value * scale;
      }
    }
  }
  return p;
}

// `n` of each group of `m` columns.
static Packed pack_groups(int32_t kind, int64_t count, int64_t rows, int64_t columns, int64_t n,
                          int64_t m, Random &random) {
  std::vector<char> keep(count * rows * columns, 0);
  for (int64_t group = 0; group < (int64_t)keep.size() / m; group++)
    for (int64_t left = n; left > 0;) {
      char &one = keep[group * m + random.below(m)];
      left -= !one;
      one = 1;
    }
  return pack(kind, count, rows, columns, columns / m * n, keep, random);
}

// `all` of each matrix, anywhere; its first row stays empty and its second full where they can.
static Packed pack_any(int32_t kind, int64_t count, int64_t rows, int64_t columns, int64_t all,
                       Random &random) {
  const int64_t size = rows * columns;
  std::vector<char> keep(count * size, 0);
  for (int64_t which = 0; which < count; which++) {
    char *one = keep.data() + which * size;
    const int64_t first = all <= size - columns ? columns : 0;
    const int64_t full = first && all >= columns ? columns : 0;
    std::fill(one + first, one + first + full, 1);
    for (int64_t left = all - full; left > 0;) {
      char &place = one[first + full + random.below(size - first - full)];
      left -= !place;
      place = 1;
    }
  }
  Packed p = pack(kind, count, rows, columns, -1, keep, random);
  p.starts.resize(count * (rows + 1));
  const Matrix m = p.matrix();
  if (moiety_starts(&m, 2, p.starts.data()) != OK) p.starts.assign(p.starts.size(), -1);
  return p;
}

struct Tiled {
  Bytes bytes;
  Matrix matrix;
  int32_t status;
};

// bf16 in twelve bits where it can be and is not to stay plain.
static Tiled tiled(const Packed &packed, int64_t parts = 1, bool plain = false) {
  const Matrix from = packed.matrix(parts);
  std::vector<int64_t> apart(from.count * pieces(from.rows, 16), -1);
  int64_t size = 0;
  if (from.kind == BF16 && !plain) size = moiety_bf12_bytes(&from, 2, apart.data());
  const bool shorter = size > 0;
  if (!shorter) size = moiety_tile_bytes(from.kind, from.rows, from.columns);
  Tiled t = {Bytes(from.count * size), from, OK};
  memset(t.bytes.at(), 0xff, from.count * size);
  t.status = moiety_tile(&from, 2, shorter ? apart.data() : nullptr, size, t.bytes.at());
  if (shorter) t.matrix.kind = BF12;
  t.matrix.values = t.bytes.at();
  t.matrix.mask = nullptr;
  t.matrix.scale = nullptr;
  t.matrix.values_step = size;
  t.matrix.layout = TILES;
  return t;
}
