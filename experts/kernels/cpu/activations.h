// The experts' activation functions, written so that the compiler can vectorise them.

// e^x by splitting off a power of two; the polynomial is that of the Cephes library's expf.
static inline float exp_of(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shift = 12582912.0f;
  const float power = (x * 1.44269504f + shift) - shift;
  const float r = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * float_of((uint32_t)((int32_t)power + 127) << 23);
}

// out = activation(gate) * up
static void gated(int activation, const float *gate, const float *up, float *out, int64_t count) {
  switch (activation) {
    case SILU:
      for (int64_t i = 0; i < count; i++) out[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i];
      break;
    case GELU:
      for (int64_t i = 0; i < count; i++)
        out[i] = 0.5f * gate[i] * (1.0f + __builtin_erff(gate[i] * 0.70710678f)) * up[i];
      break;
    case GELU_TANH:
      for (int64_t i = 0; i < count; i++) {
        const float g = gate[i], inner = 0.79788456f * (g + 0.044715f * g * g * g);
        out[i] = g * (1.0f - 1.0f / (exp_of(2.0f * inner) + 1.0f)) * up[i];
      }
      break;
    default:
      for (int64_t i = 0; i < count; i++) out[i] = (gate[i] < 0.0f ? 0.0f : gate[i]) * up[i];
  }
}
