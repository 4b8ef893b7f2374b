// Calls of moiety_forward, and the same computed with plain loops in double.

#pragma once

#include <math.h>
#include <stdio.h>

#include <string>

#include "packed.h"

static const char *const ISA_NAME[5] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
static const float ROUNDING = 1.0f / 250;  // half a unit in the last place of bf16, and a bit

struct Tally {
  std::string group;
  int64_t cases = 0, failed = 0, all_failed = 0;

  void start(const std::string &name) {
    group = name;
    cases = failed = 0;
  }
  void expect(bool good, const std::string &what) {
    cases++;
    if (good) return;
    if (failed++ < 5) printf("FAILED %s: %s\n", group.c_str(), what.c_str());
  }
  void finish() {
    all_failed += failed;
    printf("%-24s %6lld cases, %lld failed\n", group.c_str(), (long long)cases, (long long)failed);
    fflush(stdout);
  }
};

// One product of as many tokens as there are; a call takes some of the first.
struct Problem {
  std::string name;
  const Packed *gate_up, *down;
  int32_t activation;
  int64_t tokens, width, active;  // active 0: not routed
  bool bf16;
  std::vector<float> x, base, weights;
  std::vector<int64_t> experts;
  // The result, and the sum of the sizes of all it is made of, which rounding errors follow.
  std::vector<double> result, size;
};

static std::vector<float> random_tokens(int64_t count, bool bf16, Random &random) {
  std::vector<float> x(count);
  for (float &one : x) {
    one = random.signed_unit();
    if (bf16) one = of_bf16(to_bf16(one));
  }
  return x;
}

static double activate(int32_t activation, double gate) {
  switch (activation) {
    case SILU: return gate / (1 + exp(-gate));
    case GELU: return 0.5 * gate * (1 + erf(gate * sqrt(0.5)));
    case GELU_TANH:
      return 0.5 * gate * (1 + tanh(sqrt(2 / M_PI) * (gate + 0.044715 * pow(gate, 3))));
    default: return gate < 0 ? 0 : gate;
  }
}

struct Sum {
  double value = 0, size = 0;
};

// Most of the test's time goes here, so it is fast in every build.
__attribute__((optimize("O2"), no_sanitize("address", "undefined")))
static Sum dot(const double *row, const double *x, const double *sizes, int64_t columns) {
  Sum sum;
  for (int64_t c = 0; c < columns; c++) {
    sum.value += row[c] * x[c];
    sum.size += fabs(row[c]) * sizes[c];
  }
  return sum;
}

// Adds one token's product with one matrix (or one expert) to `result` and `size`.
static void add_product(const Problem &p, int64_t which, double weight, const double *x,
                        double *result, double *size) {
  const Packed &down = *p.down;
  std::vector<double> in(x, x + p.width), sizes(p.width);
  for (int64_t i = 0; i < p.width; i++) sizes[i] = fabs(x[i]);
  if (p.gate_up) {
    const int64_t inner = down.columns;
    const double *above = p.gate_up->dense.data() + which * 2 * inner * p.width;
    std::vector<double> gated(inner), gated_sizes(inner);
    for (int64_t f = 0; f < inner; f++) {
      const Sum gate = dot(above + f * p.width, in.data(), sizes.data(), p.width);
      const Sum up = dot(above + (inner + f) * p.width, in.data(), sizes.data(), p.width);
      const double active = activate(p.activation, gate.value);
      gated[f] = active * up.value;
      // No activation is steeper than 1.2.
      gated_sizes[f] = 1.2 * gate.size * fabs(up.value) + fabs(active) * up.size;
    }
    in = gated;
    sizes = gated_sizes;
  }
  const double *matrix = down.dense.data() + which * down.rows * down.columns;
  for (int64_t r = 0; r < down.rows; r++) {
    const Sum sum = dot(matrix + r * down.columns, in.data(), sizes.data(), down.columns);
    result[r] += weight * sum.value;
    size[r] += fabs(weight) * sum.size;
  }
}

static void solve(Problem &p) {
  const int64_t rows = p.down->rows;
  p.result.assign(p.tokens * rows, 0.0);
  p.size.assign(p.tokens * rows, 0.0);
  for (int64_t t = 0; t < p.tokens; t++) {
    double *result = p.result.data() + t * rows, *size = p.size.data() + t * rows;
    for (int64_t r = 0; r < (p.base.empty() ? 0 : rows); r++) {
      result[r] = p.base[t * rows + r];
      size[r] = fabs(result[r]);
    }
    const std::vector<double> x(p.x.begin() + t * p.width, p.x.begin() + (t + 1) * p.width);
    if (!p.active) add_product(p, 0, 1.0, x.data(), result, size);
    for (int64_t a = t * p.active; a < (t + 1) * p.active; a++)
      if (p.experts[a] >= 0 && p.experts[a] < p.down->count)
        add_product(p, p.experts[a], p.weights[a], x.data(), result, size);
  }
}

// Tokens or results of a call, in memory of exactly their size.
struct Values {
  bool bf16;
  std::vector<uint16_t> narrow;
  std::vector<float> wide;

  Values(bool bf16, int64_t count, const float *from) : bf16(bf16) {
    if (bf16) narrow.assign(count, 0x7fc0);
    else wide.assign(count, NAN);
    for (int64_t i = 0; i < (from ? count : 0); i++) {
      if (bf16) narrow[i] = to_bf16(from[i]);
      else wide[i] = from[i];
    }
  }
  void *data() { return bf16 ? (void *)narrow.data() : (void *)wide.data(); }
  double operator[](int64_t i) const { return bf16 ? of_bf16(narrow[i]) : wide[i]; }
};

static int32_t call(const Problem &p, int32_t isa, int32_t threads, int64_t tokens,
                    const Matrix *gate_up, const Matrix &down, Values &out) {
  Values x(p.bf16, tokens * p.width, p.x.data());
  Values base(p.bf16, p.base.empty() ? 0 : tokens * down.rows, p.base.data());
  const std::vector<int64_t> experts(p.experts.begin(), p.experts.begin() + tokens * p.active);
  const std::vector<float> weights(p.weights.begin(), p.weights.begin() + tokens * p.active);
  const Tokens given = {x.data(), tokens, p.width, p.bf16};
  const Routes routes = {experts.data(), weights.data(), p.active};
  return moiety_forward(isa, threads, gate_up, &down, p.activation, &given,
                        p.active ? &routes : nullptr, p.base.empty() ? nullptr : base.data(),
                        out.data());
}

// Whether the kernels round to bf16 on the way: the gated inner values, or codes times their scales.
static bool rounds(const Problem &p, int32_t isa, const Matrix &down) {
  const bool whole = down.kind == FP16 || down.kind == FP32;
  const bool may = down.layout == TILES ? isa >= AVX512_BF16 : isa == AMX;
  const bool codes = isa == AMX && IS_INTEGER[down.kind];
  return may && (p.gate_up || codes) && p.bf16 && !whole;
}

static void check(Tally &tally, const Problem &p, int32_t isa, int64_t tokens,
                  const Matrix *gate_up, const Matrix &down) {
  const int64_t size = tokens * down.rows;
  const int32_t threads = tokens % 4 ? 3 : 2;
  Values one(p.bf16, size, nullptr), more(p.bf16, size, nullptr);
  const int32_t status = call(p, isa, 1, tokens, gate_up, down, one);
  const int32_t again = call(p, isa, threads, tokens, gate_up, down, more);
  const std::string what = p.name + (down.layout == TILES ? " tiles " : " rows ") +
                           std::to_string(tokens) + (p.bf16 ? " bf16" : " fp32") + " tokens";
  tally.expect(status == OK && again == OK, what + ": status " + std::to_string(status));
  const bool same = one.narrow == more.narrow &&
                    (size == 0 || p.bf16 ||
                     !memcmp(one.wide.data(), more.wide.data(), size * sizeof(float)));
  tally.expect(same, what + ": " + std::to_string(threads) + " threads differ from 1");
  const double tolerance = rounds(p, isa, down) ? ROUNDING + 1e-5 : 1e-5;
  double worst = 0;
  int64_t where = -1;
  for (int64_t i = 0; i < size; i++) {
    const double bound = tolerance * p.size[i] + (p.bf16 ? ROUNDING * fabs(p.result[i]) : 0);
    const double error = fabs(one[i] - p.result[i]);
    if (error <= bound || (where >= 0 && error - bound <= worst)) continue;
    worst = error - bound;
    where = i;
  }
  tally.expect(where < 0, what + ": result " + std::to_string(where) + " of " +
                              std::to_string(down.rows) + " a token is " +
                              std::to_string(where < 0 ? 0 : one[where]) + ", not " +
                              std::to_string(where < 0 ? 0 : p.result[where]));
}
