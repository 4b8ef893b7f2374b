// One gate at one new token of each sequence: brings what it remembers up to date and gives its
// logits, the experts it takes and their weights, through a plain C interface called with ctypes.
// The specification is the plain way of `Router.forward` (../router.py, ../step.py), down to where
// it rounds to bf16; shapes and dtypes were checked by the caller.
//
// A feature has parts: the token itself and one causal mean of it for each horizon. A gate's weight
// is (experts, parts, width), its means are (experts, horizons).

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__)
#define EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_CPU
#endif

enum Kind : int32_t { SOFTMAX, SIGMOID, SEQUENCE };

struct Gate {
  int64_t width, experts, active, horizons, start;
  int32_t kind, absolute;
  float mass;
};

// `past` and `now` are rows of all gates' means (`channels` of them), then the number of tokens that
// each horizon holds, then the next position. `now` is a copy of `past` before the first gate (which
// makes it: `fresh`) writes its own part. `position` and `kept`, of `kept_bytes` an element, may be
// null.
struct Memory {
  const float *past, *rates;
  float *now;
  const int64_t *position;
  const uint8_t *kept;
  int64_t step, position_step, kept_step, kept_bytes, channels, fresh;
};

struct Input {
  const void *hidden, *weight;
  const float *bias;
  int64_t batch;
  int32_t bf16, weight_bf16;
  float epsilon;
};

constexpr int64_t LANES = 16;
constexpr int32_t NO_MEMORY = 1;
typedef float Vec __attribute__((vector_size(64)));
typedef uint32_t Word __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(32)));

// To the nearest bf16 and back, ties to even; NaN stays NaN.
INLINE void round_to_bf16(Vec &value) {
  Word bits, nan;
  const auto unequal = value != value;
  memcpy(&bits, &value, sizeof bits);
  memcpy(&nan, &unequal, sizeof nan);
  const Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  bits = (rounded & ~nan) | (bits & nan);
  memcpy(&value, &bits, sizeof bits);
}

template <bool bf16>
INLINE void load(const void *row, int64_t at, int64_t width, Vec &value) {
  constexpr int64_t SIZE = bf16 ? 2 : 4;
  uint8_t some[LANES * SIZE] = {};
  const uint8_t *from = (const uint8_t *)row + at * SIZE;
  if (at + LANES > width) {
    memcpy(some, from, (width - at) * SIZE);
    from = some;
  }
  if constexpr (bf16) {
    Half halves;
    memcpy(&halves, from, sizeof halves);
    const Word bits = __builtin_convertvector(halves, Word) << 16;
    memcpy(&value, &bits, sizeof value);
  } else {
    memcpy(&value, from, sizeof value);
  }
}

INLINE float sum_of(const Vec &value) {
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += value[lane];
  return sum;
}

// A token's hidden states over their root mean square, in their dtype's precision.
template <bool bf16>
INLINE void scale(const void *hidden, int64_t width, float epsilon, Vec *x) {
  Vec squares = {};
  const int64_t vectors = (width + LANES - 1) / LANES;
  for (int64_t i = 0; i < vectors; i++) {
    load<bf16>(hidden, i * LANES, width, x[i]);
    squares += x[i] * x[i];
  }
  const float factor = 1 / std::sqrt(sum_of(squares) / (float)width + epsilon);
  for (int64_t i = 0; i < vectors; i++) {
    x[i] *= factor;
    if (bf16) round_to_bf16(x[i]);
  }
}

template <bool bf16, bool weight_bf16, int ROWS>
INLINE void multiply_rows(const uint8_t *weight, int64_t width, const Vec *x, float *out) {
  constexpr int64_t SIZE = weight_bf16 ? 2 : 4;
  Vec sums[ROWS] = {};
  for (int64_t at = 0; at < width; at += LANES) {
    for (int row = 0; row < ROWS; row++) {
      Vec value;
      load<weight_bf16>(weight + row * width * SIZE, at, width, value);
      if (bf16 && !weight_bf16) round_to_bf16(value);
      sums[row] += value * x[at / LANES];
    }
  }
  for (int row = 0; row < ROWS; row++) {
    Vec sum = {sum_of(sums[row])};
    if (bf16) round_to_bf16(sum);
    out[row] = sum[0];
  }
}

template <bool bf16, bool weight_bf16>
INLINE void multiply(const Input &input, int64_t token, int64_t width, int64_t rows, Vec *x,
                     float *out) {
  constexpr int64_t SIZE = bf16 ? 2 : 4, ROW = weight_bf16 ? 2 : 4;
  scale<bf16>((const uint8_t *)input.hidden + token * width * SIZE, width, input.epsilon, x);
  const uint8_t *weight = (const uint8_t *)input.weight;
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4)
    multiply_rows<bf16, weight_bf16, 4>(weight + row * width * ROW, width, x, out + row);
  for (; row < rows; row++)
    multiply_rows<bf16, weight_bf16, 1>(weight + row * width * ROW, width, x, out + row);
}

// A token's products with all rows of a weight, in the precision of its dtype.
EVERY_CPU void moiety_products(const Input &input, int64_t token, int64_t width, int64_t rows,
                               Vec *x, float *out) {
  if (input.bf16 && input.weight_bf16)
    multiply<true, true>(input, token, width, rows, x, out);
  else if (input.bf16)
    multiply<true, false>(input, token, width, rows, x, out);
  else if (input.weight_bf16)
    multiply<false, true>(input, token, width, rows, x, out);
  else
    multiply<false, false>(input, token, width, rows, x, out);
}

static bool is_kept(const Memory &memory, int64_t token) {
  if (!memory.kept) return true;
  const uint8_t *at = memory.kept + token * memory.kept_step * memory.kept_bytes;
  for (int64_t i = 0; i < memory.kept_bytes; i++)
    if (at[i]) return true;
  return false;
}

// How many tokens each horizon holds now, and the next position; `share` of a new mean is its last
// token.
static void count(const Memory &memory, int64_t token, int64_t horizons, float *share) {
  const float *past = memory.past + token * memory.step + memory.channels;
  float *now = memory.now + token * memory.step + memory.channels;
  const bool kept = is_kept(memory, token);
  bool goes_on = true;
  float next = past[horizons];
  if (memory.position) {
    const float position = (float)memory.position[token * memory.position_step];
    goes_on = position == next;
    if (kept) next = position + 1;
  }
  for (int64_t h = 0; h < horizons; h++) {
    const float held = (goes_on ? past[h] : 0.0f) * memory.rates[h] + 1;
    share[h] = kept ? 1 / held : 0.0f;
    now[h] = kept ? held : past[h];
  }
  now[horizons] = next;
}

static void log_softmax(float *value, int64_t size) {
  float most = value[0], sum = 0;
  for (int64_t e = 1; e < size; e++) most = value[e] > most ? value[e] : most;
  for (int64_t e = 0; e < size; e++) sum += std::exp(value[e] - most);
  const float total = most + std::log(sum);
  for (int64_t e = 0; e < size; e++) value[e] -= total;
}

static float sigmoid(float value) { return 1 / (1 + std::exp(-value)); }

static float between(float from, float to, float share) {
  return share < 0.5f ? from + share * (to - from) : to - (to - from) * (1 - share);
}

// From the products of a token to its logits; `share` is scratch.
static void decide(const Gate &gate, const Memory *memory, int64_t token, const float *products,
                   float *share, float *logits) {
  const bool gathers = gate.kind == SEQUENCE;
  const int64_t horizons = gate.horizons, parts = gathers ? 1 : 1 + horizons;
  const float *past = nullptr;
  float *now = nullptr;
  if (memory) {
    count(*memory, token, horizons, share);
    past = memory->past + token * memory->step + gate.start;
    now = memory->now + token * memory->step + gate.start;
  }
  for (int64_t e = 0; e < gate.experts; e++) {
    float sum = 0;
    for (int64_t h = 0; h + 1 < parts; h++) {
      const int64_t at = e * horizons + h;
      now[at] = between(past[at], products[e * parts + 1 + h], share[h]);
      sum += now[at];
    }
    sum += products[e * parts];
    logits[e] = gate.absolute ? std::fabs(sum) : sum;
  }
  if (!gathers) return;
  const float held = memory->now[token * memory->step + memory->channels];
  log_softmax(logits, gate.experts);
  for (int64_t e = 0; e < gate.experts; e++) {
    now[e] = between(past[e], logits[e], share[0]);
    logits[e] = now[e] * held;
  }
  log_softmax(logits, gate.experts);
}

// Numbers of the `active` largest scores, largest first.
static void take(const float *scores, int64_t experts, int64_t active, int64_t *chosen) {
  for (int64_t a = 0; a < active; a++) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; e++) {
      bool taken = false;
      for (int64_t before = 0; before < a; before++) taken |= chosen[before] == e;
      if (!taken && (best < 0 || scores[e] > scores[best])) best = e;
    }
    chosen[a] = best;
  }
}

static void divide(float *weights, int64_t active, float smallest) {
  float sum = 0;
  for (int64_t a = 0; a < active; a++) sum += weights[a];
  sum = sum < smallest ? smallest : sum;
  for (int64_t a = 0; a < active; a++) weights[a] /= sum;
}

// Experts and weights of a token; `scores` is scratch.
static void choose(const Gate &gate, const float *bias, const float *logits, float *scores,
                   float *weights, int64_t *chosen) {
  const int64_t experts = gate.experts, active = gate.active;
  const bool alone = gate.kind == SIGMOID;
  memcpy(scores, logits, experts * sizeof(float));
  if (alone) {
    for (int64_t e = 0; e < experts; e++) scores[e] = sigmoid(logits[e]) + bias[e];
  } else if (active > 1) {
    log_softmax(scores, experts);
  }
  take(scores, experts, active, chosen);
  weights[0] = 1;
  if (active == 1 && !alone) return;
  for (int64_t a = 0; a < active; a++)
    weights[a] = alone ? sigmoid(logits[chosen[a]]) : std::exp(scores[chosen[a]]);
  if (alone) divide(weights, active, 1e-20f);
  float total = 0;
  for (int64_t a = 0; a < active; a++) {
    total += weights[a];
    if (total - weights[a] >= gate.mass) weights[a] = 0;
  }
  divide(weights, active, 0);
}

// `memory` is null for gates that remember nothing. Outputs are (batch, experts), (batch, active)
// and (batch, active).
extern "C" __attribute__((visibility("default"))) int32_t moiety_gate(
    const Gate *gate, Memory *memory, const Input *input, float *logits, float *weights,
    int64_t *chosen) {
  const int64_t width = gate->width, experts = gate->experts;
  const int64_t rows = experts * (gate->kind == SEQUENCE ? 1 : 1 + gate->horizons);
  const int64_t vectors = (width + LANES - 1) / LANES;
  const int64_t scratch = (rows + gate->horizons + experts) * sizeof(float);
  const int64_t bytes = (vectors * sizeof(Vec) + scratch + 63) / 64 * 64;
  void *room = std::aligned_alloc(64, bytes);
  if (!room) return NO_MEMORY;
  Vec *x = (Vec *)room;
  float *products = (float *)(x + vectors), *share = products + rows;
  float *scores = share + gate->horizons;
  if (memory && memory->fresh) {
    const int64_t size = (memory->channels + gate->horizons + 1) * sizeof(float);
    for (int64_t token = 0; token < input->batch; token++)
      memcpy(memory->now + token * memory->step, memory->past + token * memory->step, size);
    memory->fresh = 0;
  }
  for (int64_t token = 0; token < input->batch; token++) {
    moiety_products(*input, token, width, rows, x, products);
    float *logits_E = logits + token * experts;
    decide(*gate, memory, token, products, share, logits_E);
    choose(*gate, input->bias, logits_E, scores, weights + token * gate->active,
           chosen + token * gate->active);
  }
  std::free(room);
  return 0;
}
