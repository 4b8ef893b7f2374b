// Vectors of 16 floats, for both AVX-512 files.

static constexpr int64_t WIDTH = 16;
static constexpr int LIVE = 16, TWO_CHAINS = 4, FEW_SUMS = 24;
static constexpr int TOGETHER = 2;
static constexpr bool ONE_BY_ONE = false;
typedef float Vec __attribute__((vector_size(64)));
typedef int Int __attribute__((vector_size(64)));

static inline Vec load(const float *at) { return (Vec)_mm512_loadu_ps(at); }
static inline void store(float *at, Vec value) { _mm512_storeu_ps(at, (__m512)value); }
static inline Int load_int(const uint8_t *at) { return (Int)_mm512_loadu_si512(at); }
static inline Vec spread(float value) { return (Vec)_mm512_set1_ps(value); }
static inline Vec spread4(const float *at) {
  return (Vec)_mm512_broadcast_f32x4(_mm_loadu_ps(at));
}
static inline Vec select(Vec four, Int control) {
  return (Vec)_mm512_permutevar_ps((__m512)four, (__m512i)control);
}
static inline Vec load_bf16(const uint8_t *at) {
  const __m256i bits = _mm256_loadu_si256((const __m256i *)at);
  return (Vec)((Int)_mm512_cvtepu16_epi32(bits) << 16);
}
static inline Vec load_bytes(const uint8_t *at) {
  const __m128i bytes = _mm_loadu_si128((const __m128i *)at);
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
static inline Vec load_half(const uint8_t *at) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
}

// Lanes to choose from two vectors so that 1, 2, 4 or 8 lanes trade places with as many vectors.
struct Trades {
  int32_t first[4][16], second[4][16];
};

static constexpr Trades all_trades() {
  Trades trades = {};
  for (int stage = 0; stage < 4; stage++) {
    for (int lane = 0; lane < 16; lane++) {
      const bool high = lane >> stage & 1;
      const int other = lane ^ 1 << stage;
      trades.first[stage][lane] = high ? 16 + other : lane;
      trades.second[stage][lane] = high ? 16 + lane : other;
    }
  }
  return trades;
}

alignas(64) static constexpr Trades TRADES = all_trades();

// Rows become columns.
#define MOIETY_SQUARES
static inline void turn_square(Vec *square) {
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; stage++) {
    const __m512i first = _mm512_load_si512(TRADES.first[stage]);
    const __m512i second = _mm512_load_si512(TRADES.second[stage]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      if (i >> stage & 1) continue;
      const __m512 a = (__m512)square[i], b = (__m512)square[i + (1 << stage)];
      square[i] = (Vec)_mm512_permutex2var_ps(a, first, b);
      square[i + (1 << stage)] = (Vec)_mm512_permutex2var_ps(a, second, b);
    }
  }
}

// Four columns of 16 rows in memory, row r at row(r). Quarters of rows are put together as they are
// loaded, so that half of what turn_square moves is left.
template <class Rows>
static inline void turn_four(const Rows &row, Vec *to) {
  __m512i quarters[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const auto at = [&](int quarter) {
      return _mm_loadu_si128((const __m128i *)row(4 * quarter + i));
    };
    __m512i all = _mm512_castsi128_si512(at(0));
    all = _mm512_inserti32x4(all, at(1), 1);
    all = _mm512_inserti32x4(all, at(2), 2);
    quarters[i] = _mm512_inserti32x4(all, at(3), 3);
  }
  const __m512i low = _mm512_unpacklo_epi32(quarters[0], quarters[1]);
  const __m512i high = _mm512_unpackhi_epi32(quarters[0], quarters[1]);
  const __m512i next_low = _mm512_unpacklo_epi32(quarters[2], quarters[3]);
  const __m512i next_high = _mm512_unpackhi_epi32(quarters[2], quarters[3]);
  to[0] = (Vec)_mm512_unpacklo_epi64(low, next_low);
  to[1] = (Vec)_mm512_unpackhi_epi64(low, next_low);
  to[2] = (Vec)_mm512_unpacklo_epi64(high, next_high);
  to[3] = (Vec)_mm512_unpackhi_epi64(high, next_high);
}

// A group of BF12 as pairs of bf16.
static inline __m512i bf12_pairs(const Chunk &chunk, int group, int = 0) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  const Words numbers = (Words)load_int(quartet_of(chunk, group)) >> 4 * (group % QUARTET);
  // Of the numbers, five bits are looked at, the fifth of which is the next number's.
  const __m512i exponents =
      _mm512_permutexvar_epi16((__m512i)numbers, (__m512i)load_int(exponents_of(chunk, group)));
  __m512i rest = (__m512i)load_int(rest_of(chunk, group));
  if (group % 2)
    rest = _mm512_shuffle_epi8(
        rest, _mm512_set4_epi32(0x0e0f0c0d, 0x0a0b0809, 0x06070405, 0x02030001));
  return _mm512_or_si512(_mm512_and_si512(rest, _mm512_set1_epi16(SIGN_AND_MANTISSA)), exponents);
}

// The kept values of the 16 rows of one group of a tile.
template <Kind kind>
static inline void pair(const Chunk &chunk, int g, int, Vec &v0, Vec &v1) {
  const uint8_t *group = group_of<kind>(chunk, g);
  if constexpr (kind == BF16 || kind == BF12) {
    const Int both = kind == BF16 ? load_int(group) : (Int)bf12_pairs(chunk, g);
    v0 = (Vec)(both << 16);
    v1 = (Vec)(both & (int)0xffff0000);
  } else if constexpr (kind == FP32) {
    v0 = load((const float *)group);
    v1 = load((const float *)(group + 64));
  } else if constexpr (kind == FP16) {
    v0 = load_half(group);
    v1 = load_half(group + 32);
  } else if constexpr (kind == INT8) {
    v0 = load_bytes(group);
    v1 = load_bytes(group + 16);
  } else {
    const Int both = (Int)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)group));
    v0 = (Vec)_mm512_cvtepi32_ps((__m512i)((both & 15) - 8));
    v1 = (Vec)_mm512_cvtepi32_ps((__m512i)((both >> 4) - 8));
  }
}

// int4 values of a row from `at` on. Every lane takes two bytes and moves its half of them down.
static constexpr int64_t PIECE = 16;

struct Moves {
  int32_t of[2][16];
};

static constexpr Moves all_moves() {
  Moves moves = {};
  for (int odd = 0; odd < 2; odd++)
    for (int lane = 0; lane < 16; lane++) moves.of[odd][lane] = 4 * (lane % 2 + odd);
  return moves;
}

alignas(64) static constexpr Moves MOVES = all_moves();

static inline Vec codes_from(const uint8_t *values, int64_t at) {
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(values + at / 2)));
  const __m512i pairs = _mm512_setr_epi32(
      0x80800100, 0x80800100, 0x80800201, 0x80800201, 0x80800302, 0x80800302, 0x80800403,
      0x80800403, 0x80800504, 0x80800504, 0x80800605, 0x80800605, 0x80800706, 0x80800706,
      0x80800807, 0x80800807);
  const Int both = (Int)_mm512_shuffle_epi8(bytes, pairs) >> load_int((const uint8_t *)MOVES.of[at % 2]);
  return (Vec)_mm512_cvtepi32_ps((__m512i)((both & 15) - 8));
}

// Puts the first values where bits are set, zeros elsewhere.
static inline Vec place(Vec values, unsigned bits) {
  return (Vec)_mm512_maskz_expand_ps((uint16_t)bits, (__m512)values);
}

static inline float sum_piece(Vec v) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half half[2];
  __builtin_memcpy(half, &v, 64);
  const Half eight = half[0] + half[1];
  Quarter quarter[2];
  __builtin_memcpy(quarter, &eight, 32);
  const Quarter four = quarter[0] + quarter[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}
