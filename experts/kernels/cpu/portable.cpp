// Any CPU: vectors of 4 floats, which the compiler lowers to whatever there is.

#include "kernels.h"

namespace portable {

#include "scalar.h"
#include "tiles.h"

static constexpr int64_t WIDTH = 4;
static constexpr int LIVE = 4, TWO_CHAINS = 2;
static constexpr int TOGETHER = 1;
static constexpr bool ONE_BY_ONE = false;
#define MOIETY_IN_REGISTER(vector) (void)(vector)
typedef float Vec __attribute__((vector_size(16)));
typedef int Int __attribute__((vector_size(16)));

static inline Vec load(const float *at) {
  Vec value;
  __builtin_memcpy(&value, at, 16);
  return value;
}
static inline void store(float *at, Vec value) { __builtin_memcpy(at, &value, 16); }
static inline Int load_int(const uint8_t *at) {
  Int value;
  __builtin_memcpy(&value, at, 16);
  return value;
}
static inline Vec spread(float value) { return Vec{value, value, value, value}; }
static inline Vec spread4(const float *at) { return load(at); }
static inline Vec select(Vec four, Int control) {
  return Vec{four[control[0] & 3], four[control[1] & 3], four[control[2] & 3],
             four[control[3] & 3]};
}

static inline Vec load_bf16(const uint8_t *at) {
  return Vec{bf16_value(load_u16(at)), bf16_value(load_u16(at + 2)), bf16_value(load_u16(at + 4)),
             bf16_value(load_u16(at + 6))};
}

// 4 rows of a group of BF12 as pairs of bf16.
static inline Int bf12_pairs(const Chunk &chunk, int group, int quarter) {
  Int both;
  for (int i = 0; i < 4; i++) {
    const int word = 2 * (4 * quarter + i);
    both[i] = (int)(bf12_at(chunk, group, word) | (uint32_t)bf12_at(chunk, group, word + 1) << 16);
  }
  return both;
}

// The kept values of 4 rows of one group of a tile.
template <Kind kind>
static inline void pair(const Chunk &chunk, int g, int quarter, Vec &v0, Vec &v1) {
  if constexpr (kind == BF12) {
    const Int both = bf12_pairs(chunk, g, quarter);
    v0 = (Vec)(both << 16);
    v1 = (Vec)(both & (int)0xffff0000);
    return;
  }
  const uint8_t *group = group_of<kind>(chunk, g);
  float first[4], second[4];
  for (int i = 0; i < 4; i++) {
    const int r = 4 * quarter + i;
    if constexpr (kind == BF16) {
      first[i] = bf16_value(load_u16(group + 4 * r));
      second[i] = bf16_value(load_u16(group + 4 * r + 2));
    } else if constexpr (kind == FP32) {
      first[i] = load_f32(group + 4 * r);
      second[i] = load_f32(group + 64 + 4 * r);
    } else if constexpr (kind == FP16) {
      first[i] = half_value(load_u16(group + 2 * r));
      second[i] = half_value(load_u16(group + 32 + 2 * r));
    } else if constexpr (kind == INT8) {
      first[i] = (float)(int8_t)group[r];
      second[i] = (float)(int8_t)group[16 + r];
    } else {
      first[i] = (float)((group[r] & 15) - 8);
      second[i] = (float)((group[r] >> 4) - 8);
    }
  }
  v0 = load(first);
  v1 = load(second);
}

#include "body.h"

}  // namespace portable

constexpr Kernels portable_kernels = portable::kernels_with(8, 0, nullptr);
