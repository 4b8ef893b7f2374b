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
