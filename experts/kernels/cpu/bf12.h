// bf16 in twelve bits, without loss: sign and mantissa as they are, and in place of the exponent the
// number of one of 16. Weights of a model have few exponents, those that pruning keeps fewer still.
//
// A tile begins with its exponents, once for the first four groups of every chunk and once for the
// others: 16 words each, shifted to where bf16 has them and stored twice, because AVX-512 looks at
// five bits of a number; then as 16 bytes each; then 32 bytes of nothing. Four groups are 192 bytes.
// Of every value, which is word 2 x lane + place of its group, the first 64 bytes hold in the same
// word the four exponents' numbers; the next 64 the rest of the first two groups and the last 64
// that of the others, the second of them with its bytes in the other order:
//
//   bit      15     14 ... 8      7      6 ... 0
//          sign 0   mantissa 1   sign 1   mantissa 0
//
// A chunk that has other exponents is kept behind the matrix's tiles, after its own exponents. In
// its place are APART, which no control begins with, and at byte 8 the way there in bytes.

static constexpr int64_t QUARTET = 4, QUARTET_BYTES = 192;
static constexpr uint32_t APART = 0;
static constexpr int64_t APART_BYTES = HEAD_BYTES + CONTROL_BYTES + 2 * QUARTET_BYTES;
static constexpr int64_t BYTES_AT = 128;  // of the exponents, behind their words
static constexpr uint16_t SIGN_AND_MANTISSA = 0x807f;

static inline const uint8_t *quartet_of(const Chunk &chunk, int group) {
  return chunk.at + CONTROL_BYTES + group / QUARTET * QUARTET_BYTES;
}

static inline const uint8_t *exponents_of(const Chunk &chunk, int group) {
  return chunk.exponents + group / QUARTET * 64;
}

static inline const uint8_t *exponent_bytes_of(const Chunk &chunk, int group) {
  return chunk.exponents + BYTES_AT + group / QUARTET * 16;
}

static inline const uint8_t *rest_of(const Chunk &chunk, int group) {
  return quartet_of(chunk, group) + 64 + group % QUARTET / 2 * 64;
}

static inline uint16_t swapped(uint16_t word) { return (uint16_t)(word << 8 | word >> 8); }

// One value as bf16.
static inline uint16_t bf12_at(const Chunk &chunk, int group, int word) {
  const uint16_t both = load_u16(rest_of(chunk, group) + 2 * word);
  const uint16_t rest = group % 2 ? swapped(both) : both;
  const int number = load_u16(quartet_of(chunk, group) + 2 * word) >> 4 * (group % QUARTET) & 15;
  return (uint16_t)((rest & SIGN_AND_MANTISSA) | load_u16(exponents_of(chunk, group) + 2 * number));
}
