#include "shorten.h"

#include <string.h>

namespace {

#include "scalar.h"
#include "tiles.h"

constexpr int NUMBERS = 16;  // of exponents
constexpr int LAST = 255;    // of all exponents
constexpr int64_t KEPT = 2 * QUARTET, BLOCK = 128, QUARTETS = GROUPS / QUARTET;

int16_t exponent_of(uint16_t value) { return (int16_t)(value >> 7 & LAST); }

// The values of a tile, bf16 row by row.
struct Rows {
  const uint8_t *values;
  int64_t count, kept;

  uint16_t at(int64_t row, int64_t i) const { return load_u16(values + 2 * (row * kept + i)); }
  // How many of a row four groups have; where fewer than there is room for, zeros stand behind.
  int64_t in_quartet(int64_t quartet) const {
    const int64_t left = kept - quartet * KEPT;
    return left < 0 ? 0 : left < KEPT ? left : KEPT;
  }
  bool padded(int64_t quartet) const { return count < TILE_ROWS || in_quartet(quartet) < KEPT; }
};

// The exponents of four groups: 0 or not, and from which other one to which.
struct Range {
  int16_t smallest = LAST + 1, largest = 0;
  bool zero = false;

  void add(const Range &other) {
    if (other.smallest < smallest) smallest = other.smallest;
    if (other.largest > largest) largest = other.largest;
    zero |= other.zero;
  }
};

// Gives those of up to BLOCK quartets from `first` on.
void ranges_of(const Rows &rows, int64_t first, int64_t some, Range *ranges) {
  int16_t smallest[BLOCK * KEPT], largest[BLOCK * KEPT] = {}, zeros[BLOCK * KEPT] = {};
  const int64_t from = first * KEPT, left = rows.kept - from;
  const int64_t width = some * KEPT < left ? some * KEPT : left;
  for (int64_t i = 0; i < BLOCK * KEPT; i++) smallest[i] = INT16_MAX;
  for (int64_t r = 0; r < rows.count; r++) {
    for (int64_t i = 0; i < width; i++) {
      const int16_t exponent = exponent_of(rows.at(r, from + i));
      const int16_t unless_zero = (int16_t)((exponent - 1) & INT16_MAX);
      smallest[i] = unless_zero < smallest[i] ? unless_zero : smallest[i];
      largest[i] = exponent > largest[i] ? exponent : largest[i];
      zeros[i] = (int16_t)(zeros[i] | (exponent ? 0 : 1));
    }
  }
  for (int64_t q = 0; q < some; q++) {
    Range all;
    all.zero = rows.padded(first + q);
    for (int64_t i = q * KEPT; i < (q + 1) * KEPT; i++)
      all.add({(int16_t)(largest[i] ? smallest[i] + 1 : LAST + 1), largest[i], zeros[i] != 0});
    ranges[q] = all;
  }
}

// Runs what is to be done with every chunk and its quartets' ranges.
template <class Each>
void for_ranges(const Rows &rows, int64_t chunks, const Each &each) {
  Range ranges[BLOCK];
  for (int64_t first = 0; first < chunks; first += BLOCK / QUARTETS) {
    const int64_t left = chunks - first, some = left < BLOCK / QUARTETS ? left : BLOCK / QUARTETS;
    ranges_of(rows, first * QUARTETS, some * QUARTETS, ranges);
    for (int64_t c = 0; c < some; c++) each(first + c, ranges + c * QUARTETS);
  }
}

Range together(const Range *quartets) {
  Range all;
  for (int64_t q = 0; q < QUARTETS; q++) all.add(quartets[q]);
  return all;
}

// Which exponent a number stands for, in its place in bf16, and the number of an exponent, where they
// are not in a row. `enough` says whether the numbers were.
struct Numbers {
  uint16_t words[NUMBERS] = {};
  uint8_t of[LAST + 1] = {};
  int from = 0, base = 0;  // the first, and the one of number 0, if they are in a row
  bool in_a_row = false, zero = true, enough = true;

  int end() const { return from + NUMBERS - (zero ? 1 : 0); }
  bool have(const Range &range) const {
    if (range.zero && !zero) return false;
    return !range.largest || (range.smallest >= from && range.largest < end());
  }
};

int16_t number_in_a_row(int16_t exponent, int16_t base) {
  return exponent ? (int16_t)((exponent - base) & (NUMBERS - 1)) : (int16_t)0;
}

Numbers row_from(int from, bool zero) {
  Numbers numbers;
  numbers.from = from;
  numbers.base = zero ? from - 1 : from;
  numbers.in_a_row = true;
  numbers.zero = zero;
  for (int e = from; e < numbers.end() && e <= LAST; e++)
    numbers.words[number_in_a_row((int16_t)e, (int16_t)numbers.base)] = (uint16_t)(e << 7);
  return numbers;
}

// Those in a row with which the most chunks get along.
Numbers for_most(const Rows &rows, int64_t chunks) {
  // Summed up to an exponent: for how many chunks the row may begin there, where 0 has a number and
  // where it has not.
  int64_t with[LAST + 2] = {}, without[LAST + 2] = {};
  for_ranges(rows, chunks, [&](int64_t, const Range *quartets) {
    const Range all = together(quartets);
    if (!all.largest) return;
    const int from = all.largest < NUMBERS ? 1 : all.largest - NUMBERS + 1;
    const int later = all.largest < NUMBERS ? 1 : from + 1;
    if (later <= all.smallest) with[later]++, with[all.smallest + 1]--;
    if (!all.zero && from <= all.smallest) without[from]++, without[all.smallest + 1]--;
  });
  int64_t some = 0, others = 0, most = 0;
  int best = 1;
  bool zero = true;
  for (int from = 1; from <= LAST; from++) {
    some += with[from];
    others += without[from];
    if (some > most) most = some, best = from, zero = true;
    if (others > most) most = others, best = from, zero = false;
  }
  return row_from(best, zero);
}

// Those of a quartet alone, which may be too many.
Numbers for_quartet(const Rows &rows, int64_t quartet, const Range &range) {
  const Numbers simple = row_from(range.largest ? range.smallest : 1, true);
  if (simple.have(range)) return simple;
  bool found[LAST + 1] = {};
  found[0] = range.zero;
  for (int64_t r = 0; r < rows.count; r++)
    for (int64_t i = 0; i < rows.in_quartet(quartet); i++)
      found[exponent_of(rows.at(r, quartet * KEPT + i))] = true;
  Numbers numbers;
  int count = 0;
  for (int e = 0; e <= LAST; e++) {
    if (!found[e]) continue;
    if (count < NUMBERS) numbers.words[count] = (uint16_t)(e << 7), numbers.of[e] = (uint8_t)count;
    count++;
  }
  numbers.enough = count <= NUMBERS;
  return numbers;
}

void put_exponents(const Numbers &numbers, int64_t quartet, uint8_t *head) {
  const Chunk chunk = {nullptr, head};
  uint8_t *words = (uint8_t *)exponents_of(chunk, (int)(quartet * QUARTET));
  uint8_t *bytes = (uint8_t *)exponent_bytes_of(chunk, (int)(quartet * QUARTET));
  for (int half = 0; half < 2; half++)
    memcpy(words + half * sizeof numbers.words, numbers.words, sizeof numbers.words);
  for (int i = 0; i < NUMBERS; i++) bytes[i] = (uint8_t)exponent_of(numbers.words[i]);
}

// `number` gives that of an exponent.
template <class Number>
void shorten_groups(const uint8_t *groups, const Number &number, uint8_t *to) {
  constexpr int WORDS = 32;
  uint16_t values[QUARTET][WORDS], codes[WORDS] = {}, rest[QUARTET / 2][WORDS];
  memcpy(values, groups, sizeof values);
  for (int j = 0; j < QUARTET; j++)
    for (int w = 0; w < WORDS; w++)
      codes[w] |= (uint16_t)(number(exponent_of(values[j][w])) << 4 * j);
  for (int j = 0; j < QUARTET; j += 2)
    for (int w = 0; w < WORDS; w++)
      rest[j / 2][w] = (uint16_t)((values[j][w] & SIGN_AND_MANTISSA) |
                                  swapped(values[j + 1][w] & SIGN_AND_MANTISSA));
  memcpy(to, codes, sizeof codes);
  memcpy(to + sizeof codes, rest, sizeof rest);
}

// Four groups of a chunk.
void shorten_quartet(const uint8_t *from, int64_t quartet, const Numbers &numbers, uint8_t *to) {
  const uint8_t *groups = from + CONTROL_BYTES + quartet * QUARTET * GROUP_BYTES[BF16];
  const int16_t base = (int16_t)numbers.base;
  to += CONTROL_BYTES + quartet * QUARTET_BYTES;
  if (numbers.in_a_row)
    shorten_groups(
        groups, [base](int16_t e) { return number_in_a_row(e, base); }, to);
  else
    shorten_groups(groups, [&numbers](int16_t e) { return numbers.of[e]; }, to);
}

}  // namespace

int64_t bf12_bytes(const Matrix &from, int threads, int64_t *apart) {
  const int64_t tiles = (from.rows + TILE_ROWS - 1) / TILE_ROWS, kept = from.columns / 2;
  const int64_t chunks = chunks_of(from.columns);
  bool enough = true;
  if (from.kind != BF16 || from.starts || 2 * from.kept != from.columns) return 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < from.count * tiles; i++) {
    const int64_t row = i % tiles * TILE_ROWS;
    const int64_t count = from.rows - row < TILE_ROWS ? from.rows - row : TILE_ROWS;
    const Rows rows = {from.values + i / tiles * from.values_step + 2 * row * kept, count, kept};
    const Numbers numbers = for_most(rows, chunks);
    int64_t others = 0;
    for_ranges(rows, chunks, [&](int64_t chunk, const Range *quartets) {
      if (numbers.have(together(quartets))) return;
      others++;
      for (int64_t q = 0; q < QUARTETS; q++) {
        if (for_quartet(rows, chunk * QUARTETS + q, quartets[q]).enough) continue;
#pragma omp atomic write
        enough = false;
      }
    });
    apart[i] = others;
  }
  int64_t most = 0;
  for (int64_t which = 0; which < from.count; which++) {
    int64_t before = 0;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t here = apart[which * tiles + t];
      apart[which * tiles + t] = before;
      before += here;
    }
    most = before > most ? before : most;
  }
  const int64_t bytes = tiles * tile_size(BF12, from.columns) + most * APART_BYTES;
  return enough && bytes < tiles * tile_size(BF16, from.columns) ? bytes : 0;
}

void shorten(const uint8_t *values, int64_t count, int64_t columns, const uint8_t *tile,
             uint8_t *apart, uint8_t *to) {
  const Rows rows = {values, count, columns / 2};
  const Numbers numbers = for_most(rows, chunks_of(columns));
  memset(to, 0, HEAD_BYTES);
  for (int64_t q = 0; q < QUARTETS; q++) put_exponents(numbers, q, to);
  for_ranges(rows, chunks_of(columns), [&](int64_t c, const Range *quartets) {
    const uint8_t *chunk = tile + chunk_at(BF16, c);
    uint8_t *place = to + chunk_at(BF12, c);
    if (numbers.have(together(quartets))) {
      memcpy(place, chunk, CONTROL_BYTES);
      for (int64_t q = 0; q < QUARTETS; q++) shorten_quartet(chunk, q, numbers, place);
      return;
    }
    uint8_t *here = apart + HEAD_BYTES;
    memset(apart, 0, HEAD_BYTES);
    memcpy(here, chunk, CONTROL_BYTES);
    for (int64_t q = 0; q < QUARTETS; q++) {
      const Numbers own = for_quartet(rows, c * QUARTETS + q, quartets[q]);
      put_exponents(own, q, apart);
      shorten_quartet(chunk, q, own, here);
    }
    const int64_t way = here - place;
    memset(place, 0, chunk_bytes(BF12));
    memcpy(place, &APART, sizeof APART);
    memcpy(place + 8, &way, sizeof way);
    apart += APART_BYTES;
  });
}
