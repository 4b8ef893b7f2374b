// The intrinsics that SIMDe 0.7 lacks.

#pragma once

#include <stdint.h>

typedef int32_t Emulated16 __attribute__((vector_size(64)));
typedef float EmulatedFloats16 __attribute__((vector_size(64)));
typedef float EmulatedFloats8 __attribute__((vector_size(32)));

static inline __m512i emulated_mm512_cvtepi8_epi32(__m128i from) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  return (__m512i)__builtin_convertvector((Bytes)from, Emulated16);
}

static inline __m512i emulated_mm512_cvtepu8_epi32(__m128i from) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  return (__m512i)__builtin_convertvector((Bytes)from, Emulated16);
}

static inline __m512i emulated_mm512_cvtepu16_epi32(__m256i from) {
  typedef uint16_t Words __attribute__((vector_size(32)));
  return (__m512i)__builtin_convertvector((Words)from, Emulated16);
}

static inline __m512 emulated_mm512_cvtepi32_ps(__m512i from) {
  return (__m512)__builtin_convertvector((Emulated16)from, EmulatedFloats16);
}

static inline __m512 emulated_mm512_cvtph_ps(__m256i from) {
  EmulatedFloats16 to;
  for (int half = 0; half < 2; half++) {
    const __m128i eight = half ? _mm256_extracti128_si256(from, 1) : _mm256_castsi256_si128(from);
    const EmulatedFloats8 wide = (EmulatedFloats8)_mm256_cvtph_ps(eight);
    for (int i = 0; i < 8; i++) to[8 * half + i] = wide[i];
  }
  return (__m512)to;
}

static inline __m512 emulated_mm512_permutevar_ps(__m512 from, __m512i control) {
  EmulatedFloats16 to;
  for (int i = 0; i < 16; i++)
    to[i] = ((EmulatedFloats16)from)[i / 4 * 4 + (((Emulated16)control)[i] & 3)];
  return (__m512)to;
}

static inline __m512 emulated_mm512_maskz_expand_ps(uint16_t mask, __m512 from) {
  EmulatedFloats16 to = {};
  for (int i = 0, at = 0; i < 16; i++)
    if (mask >> i & 1) to[i] = ((EmulatedFloats16)from)[at++];
  return (__m512)to;
}

static inline __m512i emulated_mm512_maskz_expand_epi16(uint32_t mask, __m512i from) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  Words to = {};
  for (int i = 0, at = 0; i < 32; i++)
    if (mask >> i & 1) to[i] = ((Words)from)[at++];
  return (__m512i)to;
}

static inline __m256i emulated_mm256_maskz_expand_epi8(uint32_t mask, __m256i from) {
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  Bytes to = {};
  for (int i = 0, at = 0; i < 32; i++)
    if (mask >> i & 1) to[i] = ((Bytes)from)[at++];
  return (__m256i)to;
}

// Floats as bf16, halves to even: the second vector's come first.
static inline __m512i emulated_mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  Words to;
  for (int i = 0; i < 32; i++) {
    uint32_t bits;
    const float value = i < 16 ? ((EmulatedFloats16)low)[i] : ((EmulatedFloats16)high)[i - 16];
    __builtin_memcpy(&bits, &value, 4);
    to[i] = (uint16_t)(value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  return (__m512i)to;
}

static inline __m256i emulated_mm512_cvtneps_pbh(__m512 from) {
  return _mm512_castsi512_si256(emulated_mm512_cvtne2ps_pbh(from, from));
}

#undef _mm512_maskz_expand_epi16
#define _mm512_maskz_expand_epi16 emulated_mm512_maskz_expand_epi16
#undef _mm256_maskz_expand_epi8
#define _mm256_maskz_expand_epi8 emulated_mm256_maskz_expand_epi8
#define _mm512_cvtne2ps_pbh emulated_mm512_cvtne2ps_pbh
#define _mm512_cvtneps_pbh emulated_mm512_cvtneps_pbh
#undef _mm512_maskz_expand_ps
#define _mm512_maskz_expand_ps emulated_mm512_maskz_expand_ps
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 emulated_mm512_cvtepi8_epi32
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated_mm512_cvtepu8_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated_mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated_mm512_cvtepi32_ps
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated_mm512_cvtph_ps
#undef _mm512_permutevar_ps
#define _mm512_permutevar_ps emulated_mm512_permutevar_ps

// AMX: eight registers of 16 rows of 64 bytes, which is all the shapes there are here.
struct EmulatedTiles {
  uint8_t rows[8][16][64];
};

static inline EmulatedTiles &emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

static inline void emulated_tile_move(int tile, uint8_t *at, int64_t step, bool store) {
  for (int row = 0; row < 16; row++) {
    uint8_t *held = emulated_tiles().rows[tile][row];
    __builtin_memcpy(store ? at + row * step : held, store ? held : at + row * step, 64);
  }
}

static inline void emulated_tile_dpbf16ps(int to, int a, int b) {
  const EmulatedTiles &tiles = emulated_tiles();
  for (int i = 0; i < 16; i++) {
    EmulatedFloats16 sum, first, second;
    __builtin_memcpy(&sum, tiles.rows[to][i], 64);
    for (int k = 0; k < 16; k++) {
      uint32_t one;
      Emulated16 pairs;
      __builtin_memcpy(&one, tiles.rows[a][i] + 4 * k, 4);
      __builtin_memcpy(&pairs, tiles.rows[b][k], 64);
      first = (EmulatedFloats16)(pairs << 16);
      second = (EmulatedFloats16)(pairs & (int32_t)0xffff0000);
      const uint32_t low = one << 16, high = one & 0xffff0000u;
      float x0, x1;
      __builtin_memcpy(&x0, &low, 4);
      __builtin_memcpy(&x1, &high, 4);
      sum += first * x0;
      sum += second * x1;
    }
    __builtin_memcpy(emulated_tiles().rows[to][i], &sum, 64);
  }
}

#define _tile_loadconfig(shapes) (void)(shapes)
#define _tile_release() (void)0
#define _tile_zero(tile) __builtin_memset(emulated_tiles().rows[tile], 0, 1024)
#define _tile_loadd(tile, at, step) emulated_tile_move(tile, (uint8_t *)(at), step, false)
#define _tile_stored(tile, at, step) emulated_tile_move(tile, (uint8_t *)(at), step, true)
#define _tile_dpbf16ps(to, a, b) emulated_tile_dpbf16ps(to, a, b)
