// Conversions of single values. Included once for every instruction set; everything is static, so
// that each gets its own copy.

static inline uint16_t load_u16(const uint8_t *at) {
  uint16_t value;
  __builtin_memcpy(&value, at, 2);
  return value;
}

static inline uint32_t load_u32(const uint8_t *at) {
  uint32_t value;
  __builtin_memcpy(&value, at, 4);
  return value;
}

static inline float load_f32(const uint8_t *at) {
  float value;
  __builtin_memcpy(&value, at, 4);
  return value;
}

static inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

static inline float bf16_value(uint16_t bits) { return float_of((uint32_t)bits << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
static inline uint16_t bf16_bits(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

static inline float half_value(uint16_t bits) {
  const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // 2^112 moves the exponent from fp16's bias to fp32's, and is exact for subnormal values too.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}
