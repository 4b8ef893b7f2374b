// The kernels' C interface with random matrices of odd sizes, against plain loops in double.
//
// usage: test_kernels [--quick]; one line a group, exit status 1 where something failed.

#include "calls.h"

namespace {

struct Shape {
  int64_t rows, columns;
};

struct Sizes {
  std::vector<int64_t> tokens;
  std::vector<Shape> groups, any;  // for whole groups of 4 columns, and for any pattern
};

const Sizes FULL = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 33, 65, 100, 130, 300, 520, 700},
                    {{1, 4}, {17, 36}, {16, 128}, {50, 132}, {7, 260}, {70, 68}, {33, 300}, {53, 1100}},
                    {{2, 5}, {9, 13}, {17, 63}, {50, 65}, {70, 129}, {3, 257}, {20, 299}, {53, 1101}}};
const Sizes QUICK = {{0, 1, 3, 9, 17, 70, 115, 330},
                     {{17, 36}, {70, 132}, {20, 1060}},
                     {{9, 13}, {18, 129}, {20, 1061}}};

Tally tally;

std::string name_of(const Packed &p, const char *pattern) {
  return std::string(KIND_NAME[p.kind]) + " " + pattern + " " + std::to_string(p.rows) + " x " +
         std::to_string(p.columns);
}

void check_all(Problem &p, int32_t isa, const std::vector<int64_t> &tokens, const Matrix *gate_up,
               const Matrix &down) {
  for (int64_t count : tokens) check(tally, p, isa, count, gate_up, down);
}

std::vector<int32_t> supported() {
  std::vector<int32_t> isas;
  for (int32_t isa = PORTABLE; isa <= AMX; isa++)
    if (moiety_has(isa)) isas.push_back(isa);
  return isas;
}

// Problems --------------------------------------------------------------------------------------

Problem linear(const Packed &matrix, const char *pattern, bool bf16, int64_t tokens,
               Random &random) {
  Problem p = {};
  p.name = "linear " + name_of(matrix, pattern);
  p.down = &matrix;
  p.tokens = tokens;
  p.width = matrix.columns;
  p.bf16 = bf16;
  p.x = random_tokens(tokens * p.width, bf16, random);
  solve(p);
  return p;
}

// Expert 1 gets no token, and some places name an expert outside the stack.
void route(Problem &p, int64_t active, Random &random) {
  p.active = active;
  for (int64_t i = 0; i < p.tokens * active; i++) {
    const int64_t expert = random.below(p.down->count + 2) - 1;
    p.experts.push_back(expert == 1 ? 0 : expert);
    p.weights.push_back(random.signed_unit());
  }
}

Problem routed(const Packed &stack, const char *pattern, bool bf16, int64_t tokens, int64_t active,
               bool with_base, Random &random) {
  Problem p = {};
  p.name = "routed " + name_of(stack, pattern);
  p.down = &stack;
  p.tokens = tokens;
  p.width = stack.columns;
  p.bf16 = bf16;
  p.x = random_tokens(tokens * p.width, bf16, random);
  if (with_base) p.base = random_tokens(tokens * stack.rows, bf16, random);
  route(p, active, random);
  solve(p);
  return p;
}

Problem gated(const Packed &gate_up, const Packed &down, const char *pattern, int32_t activation,
              bool bf16, int64_t tokens, int64_t active, Random &random) {
  Problem p = {};
  p.name = "gated " + name_of(down, pattern) + " activation " + std::to_string(activation);
  p.gate_up = &gate_up;
  p.down = &down;
  p.activation = activation;
  p.tokens = tokens;
  p.width = gate_up.columns;
  p.bf16 = bf16;
  p.x = random_tokens(tokens * p.width, bf16, random);
  for (float &one : p.x) one *= 8;  // so that the activations bend
  route(p, active, random);
  solve(p);
  return p;
}

// Groups ----------------------------------------------------------------------------------------

void test_linear(int32_t isa, int32_t kind, const Sizes &sizes) {
  const int64_t most = sizes.tokens.back();
  for (bool bf16 : {false, true}) {
    for (const Shape &shape : sizes.groups) {
      Random random(shape.rows + 7);
      const Packed two = pack_groups(kind, 1, shape.rows, shape.columns, 2, 4, random);
      Problem p = linear(two, "2:4", bf16, most, random);
      const Tiled tiles = tiled(two);
      tally.expect(tiles.status == OK, p.name + ": not tiled");
      check_all(p, isa, sizes.tokens, nullptr, tiles.matrix);
      check_all(p, isa, sizes.tokens, nullptr, two.matrix());
    }
    for (int64_t n : {1, 3, 4}) {
      Random random(n);
      const Packed some = pack_groups(kind, 1, 19, 108, n, 4, random);
      Problem p = linear(some, "n:4", bf16, most, random);
      check_all(p, isa, sizes.tokens, nullptr, some.matrix());
    }
    for (const Shape &shape : sizes.any) {
      Random random(shape.rows + 9);
      const int64_t size = shape.rows * shape.columns;
      for (int64_t all : {size / 2 | 1, size * 29 / 30}) {
        const Packed any = pack_any(kind, 1, shape.rows, shape.columns, all, random);
        Problem p = linear(any, "any", bf16, most, random);
        check_all(p, isa, sizes.tokens, nullptr, any.matrix());
      }
    }
  }
}

Matrix dense_of(const Packed &all) {
  Matrix m = all.matrix();
  m.layout = DENSE;
  m.mask = nullptr;
  m.starts = nullptr;
  return m;
}

void test_dense(int32_t isa, int32_t kind, const Sizes &sizes) {
  for (bool bf16 : {false, true}) {
    for (const Shape &shape : sizes.any) {
      Random random(shape.rows + 11);
      const int64_t size = shape.rows * shape.columns;
      const Packed all = pack_any(kind, 1, shape.rows, shape.columns, size, random);
      Problem p = linear(all, "dense", bf16, sizes.tokens.back(), random);
      check_all(p, isa, sizes.tokens, nullptr, dense_of(all));
    }
  }
}

void test_routed(int32_t isa, int32_t kind, const Sizes &sizes) {
  const int64_t most = sizes.tokens.back();
  for (bool bf16 : {false, true}) {
    for (int64_t active : {1, 2}) {
      Random random(active);
      const Packed two = pack_groups(kind, 4, 21, 44, 2, 4, random);
      const Packed any = pack_any(kind, 4, 21, 45, 400, random);
      const Tiled tiles = tiled(two);
      Problem with = routed(two, "2:4", bf16, most, active, true, random);
      check_all(with, isa, sizes.tokens, nullptr, tiles.matrix);
      check_all(with, isa, sizes.tokens, nullptr, two.matrix());
      Problem without = routed(any, "any", bf16, most, active, false, random);
      check_all(without, isa, sizes.tokens, nullptr, any.matrix());
    }
  }
}

void test_gated(int32_t isa, int32_t kind, const Sizes &sizes) {
  const int64_t most = sizes.tokens.back();
  for (int32_t activation = SILU; activation <= RELU; activation++) {
    const bool bf16 = activation % 2, wide = activation < 2;
    for (bool narrow : {bf16, !bf16}) {
      Random random(activation);
      const int64_t inner = wide ? 36 : 84, width = wide ? 20 : 132, active = 1 + activation % 2;
      const Packed above = pack_groups(kind, 3, 2 * inner, width, 2, 4, random);
      const Packed below = pack_groups(kind, 3, width, inner, 2, 4, random);
      const Tiled above_tiles = tiled(above, 2), below_tiles = tiled(below);
      Problem p = gated(above, below, "2:4", activation, narrow, most, active, random);
      check_all(p, isa, sizes.tokens, &above_tiles.matrix, below_tiles.matrix);
      const Matrix rows = above.matrix();
      check_all(p, isa, sizes.tokens, &rows, below.matrix());
    }
    Random random(activation);
    const Packed above = pack_any(kind, 3, 2 * 37, 21, 700, random);
    const Packed below = pack_any(kind, 3, 21, 37, 301, random);
    Problem p = gated(above, below, "any", activation, bf16, most, 2, random);
    const Matrix rows = above.matrix();
    check_all(p, isa, sizes.tokens, &rows, below.matrix());
  }
}

bool holds(const Packed &p, const Matrix &m, int64_t parts, bool bf16) {
  const int64_t size = m.rows * m.columns;
  bool same = true;
  for (int32_t isa : supported()) {
    for (int64_t which = 0; which < p.count * parts; which++) {
      Values dense(bf16, size, nullptr);
      if (moiety_dense(isa, &m, which, 2, bf16, dense.data()) != OK) return false;
      for (int64_t i = 0; i < size; i++) {
        const float expected = (float)p.dense[which * size + i];
        same = same && dense[i] == (bf16 ? of_bf16(to_bf16(expected)) : expected);
      }
    }
  }
  return same;
}

void test_layouts(int32_t kind, const Sizes &sizes) {
  for (const Shape &shape : sizes.groups) {
    Random random(shape.columns);
    const Packed p = pack_groups(kind, 3, 2 * shape.rows, shape.columns, 2, 4, random);
    for (int way = 0; way < 4; way++) {
      const int64_t parts = 1 + way % 2;
      const Tiled tiles = tiled(p, parts, way > 1);
      const std::string name = name_of(p, "2:4");
      tally.expect(tiles.status == OK, name + ": not tiled");
      for (bool bf16 : {false, true}) {
        tally.expect(holds(p, tiles.matrix, parts, bf16), name + ": tiles expand to another");
        tally.expect(holds(p, p.matrix(parts), parts, bf16), name + ": rows expand to another");
      }
      Bytes values(p.values.size()), mask(p.mask.size());
      std::vector<uint16_t> scale(p.scale.size());
      memset(values.at(), 0xff, values.size());
      memset(mask.at(), 0xff, mask.size());
      const int32_t status = moiety_untile(&tiles.matrix, 2, values.at(), mask.at(),
                                           scale.empty() ? nullptr : scale.data());
      const bool same = !memcmp(values.at(), p.values.at(), values.size()) &&
                        !memcmp(mask.at(), p.mask.at(), mask.size()) && scale == p.scale;
      tally.expect(status == OK && same, name + ": untiled to another");
    }
  }
  for (const Shape &shape : sizes.any) {
    Random random(shape.columns);
    const int64_t all = shape.rows * shape.columns / 3 | 1;
    const Packed p = pack_any(kind, 2, shape.rows, shape.columns, all, random);
    for (bool bf16 : {false, true})
      tally.expect(holds(p, p.matrix(), 1, bf16), name_of(p, "any") + ": expands to another");
  }
}

void refuses(const Packed &p, const std::string &what, bool tiles_only) {
  const int32_t expected = tiles_only ? OK : BAD_MASK;
  const Matrix m = p.matrix();
  Values dense(false, p.rows * p.columns, nullptr);
  for (int32_t isa : supported()) {
    const int32_t status = moiety_dense(isa, &m, 0, 2, 0, dense.data());
    tally.expect(status == expected, what + ": expanded");
    for (int64_t tokens : {1, 9, 40}) {
      Problem q = {};
      q.down = &p;
      q.width = p.columns;
      q.x.assign(tokens * p.columns, 1.0f);
      Values out(false, tokens * p.rows, nullptr);
      tally.expect(call(q, isa, 2, tokens, nullptr, m, out) == expected, what + ": multiplied");
    }
  }
}

void test_damage(int32_t kind) {
  const std::string name = KIND_NAME[kind];
  const auto damaged = [&](int64_t row, const char *what, int first, int last, bool tiles_only) {
    Random random(row);
    Packed p = pack_groups(kind, 1, 19, 36, 2, 4, random);
    uint8_t *mask = p.mask.at(row * 5);
    mask[0] = (uint8_t)first;
    mask[4] |= (uint8_t)last;
    refuses(p, name + " " + what, tiles_only);
    tally.expect(tiled(p).status == BAD_MASK, name + " " + what + ": tiled");
  };
  for (int64_t row : {0, 10, 18}) {
    damaged(row, "extra bit", 0xb5, 0, false);
    damaged(row, "missing bit", 0x34, 0, false);
    damaged(row, "bit past the last column", 0x35, 0x20, false);
    damaged(row, "bit moved past the last column", 0x34, 0x80, false);
    damaged(row, "three and one of four", 0x17, 0, true);
  }
  for (int change : {1, -1, 2, -2}) {
    Random random(5);
    Packed p = pack_any(kind, 1, 7, 45, 151, random);
    uint8_t *mask = p.mask.at(3 * 6);
    for (int left = change; left;) {
      const int column = (int)random.below(45), bit = 1 << column % 8;
      if (!(mask[column / 8] & bit) != (change > 0)) continue;
      mask[column / 8] ^= (uint8_t)bit;
      left -= change > 0 ? 1 : -1;
    }
    std::vector<int64_t> starts(8);
    const Matrix m = p.matrix();
    // An odd last int4 leaves half a byte, which no count tells from a value.
    const int32_t expected = kind == INT4 && change == 1 ? OK : BAD_MASK;
    tally.expect(moiety_starts(&m, 2, starts.data()) == expected,
                 name + " any: starts of another mask");
    refuses(p, name + " any: mask changed after its starts", false);
  }
}

void test_arguments() {
  Random random(1);
  const Packed p = pack_groups(BF16, 1, 5, 8, 2, 4, random);
  const Packed odd = pack_groups(BF16, 1, 5, 8, 1, 4, random);
  const Packed any = pack_any(BF16, 1, 5, 8, 20, random);
  tally.expect(tiled(odd).status == BAD_ARGUMENT, "1:4 was tiled");
  tally.expect(tiled(any).status == BAD_ARGUMENT, "a matrix of any pattern was tiled");
  Matrix narrow = p.matrix();
  narrow.columns = 6;
  narrow.kept = 3;
  uint8_t byte;
  tally.expect(moiety_tile(&narrow, 1, nullptr, 1, &byte) == BAD_ARGUMENT, "6 columns were tiled");
  Problem q = linear(p, "2:4", false, 2, random);
  Values out(false, 2 * p.rows, nullptr), dense(false, p.rows * p.columns, nullptr);
  for (int32_t isa = -1; isa <= 5; isa++) {
    const int32_t expected = moiety_has(isa) ? OK : BAD_ARGUMENT;
    tally.expect(call(q, isa, 1, 2, nullptr, p.matrix(), out) == expected, "isa");
    const Matrix m = p.matrix();
    tally.expect(moiety_dense(isa, &m, 0, 1, 0, dense.data()) == expected, "isa of expand");
  }
  const Packed all = pack_any(BF16, 1, 5, 8, 40, random), codes = pack_any(INT8, 1, 5, 8, 40, random);
  for (int32_t isa : supported()) {
    const int32_t expected = isa == PORTABLE ? BAD_ARGUMENT : OK;
    tally.expect(call(q, isa, 1, 2, nullptr, dense_of(all), out) == expected, "dense");
    tally.expect(call(q, isa, 1, 2, nullptr, dense_of(codes), out) == BAD_ARGUMENT, "dense int8");
    Matrix two = dense_of(all);
    two.count = 2;
    tally.expect(call(q, isa, 1, 2, nullptr, two, out) == BAD_ARGUMENT, "two dense ones");
    const Matrix above = dense_of(all);
    tally.expect(call(q, isa, 1, 2, &above, p.matrix(), out) == BAD_ARGUMENT, "dense gate");
  }
  tally.expect(!moiety_has(-1) && moiety_has(PORTABLE) && !moiety_has(5), "moiety_has");
  tally.expect(call(q, PORTABLE, 0, 2, nullptr, p.matrix(), out) == BAD_ARGUMENT, "0 threads");
}

}  // namespace

int main(int count, char **arguments) {
  const bool quick = count > 1 && !strcmp(arguments[1], "--quick");
  const Sizes &sizes = quick ? QUICK : FULL;
  tally.start("arguments");
  test_arguments();
  tally.finish();
  for (int32_t kind = BF16; kind <= INT4; kind++) {
    tally.start(std::string("layouts ") + KIND_NAME[kind]);
    test_layouts(kind, sizes);
    tally.finish();
    tally.start(std::string("damage ") + KIND_NAME[kind]);
    test_damage(kind);
    tally.finish();
    for (int32_t isa : supported()) {
      const std::string name = std::string(ISA_NAME[isa]) + " " + KIND_NAME[kind];
      tally.start(name + " linear");
      test_linear(isa, kind, sizes);
      tally.finish();
      if (isa != PORTABLE && (kind == BF16 || kind == FP32)) {
        tally.start(name + " dense");
        test_dense(isa, kind, sizes);
        tally.finish();
      }
      tally.start(name + " routed");
      test_routed(isa, kind, sizes);
      tally.finish();
      tally.start(name + " gated");
      test_gated(isa, kind, sizes);
      tally.finish();
    }
  }
  return tally.all_failed ? 1 : 0;
}
