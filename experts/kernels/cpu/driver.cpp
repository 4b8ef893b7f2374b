#include "driver.h"

#include <omp.h>
#include <string.h>

#include "gather.h"
#include "jobs.h"
#include "scratch.h"
#include "shares.h"

namespace {

// Tokens of a job and of all that go on at a time, and of a job of one matrix in tiles and in rows
// with AMX: the longer a matrix takes to expand, the more tokens that serves.
constexpr int64_t JOB_TOKENS = 256, WAVE_TOKENS = 512, PANELS_TOKENS = 320, PAIRS_TOKENS = 512;
// From so many tokens a thread on, each takes its own.
constexpr int64_t OWN_TOKENS = 160, OWN_PAIRS = 256;
// Most sums of JOB_TOKENS tokens that are kept until all columns were added: 1 MB of them.
constexpr int64_t KEPT_SUMS = 1 << 18;

class Forward {
 public:
  explicit Forward(const Call &call)
      : call_(call),
        k_(*call.kernels),
        width_(up_to(call.x.width, 64)),
        inner_(call.gate_up ? call.down->columns : 0),
        inner_width_(up_to(inner_, 64)),
        active_(call.routes ? call.routes->active : 1),
        direct_(!call.routes && !call.base) {}

  Status run() {
    static thread_local Scratch lists, sums;
    const int64_t pairs = call_.x.count * active_, experts = call_.down->count;
    const bool there = lay_out(lists, [&](Pieces &pieces) {
      order_ = pieces.take<int64_t>(pairs);
      ends_ = pieces.take<int64_t>(experts + 1);
      jobs_ = pieces.take<Job>(WAVE_TOKENS);
    });
    if (!there) return NO_MEMORY;
    sort(pairs, experts);
    if (!direct_ && !start_sums(sums)) return NO_MEMORY;
    if (takes_own(pairs)) return by_tokens(pairs);
    Status status = waves(experts);
    if (status == OK && !direct_ && call_.x.bf16) finish_sums();
    return status;
  }

 private:
  // Pairs (token, slot) by expert, tokens ascending.
  void sort(int64_t pairs, int64_t experts) {
    memset(ends_, 0, (experts + 1) * sizeof(int64_t));
    for (int64_t p = 0; p < pairs; p++)
      if (known(p, experts)) ends_[expert_of(p) + 1]++;
    for (int64_t e = 0; e < experts; e++) ends_[e + 1] += ends_[e];
    for (int64_t p = 0; p < pairs; p++)
      if (known(p, experts)) order_[ends_[expert_of(p)]++] = p;
  }

  int64_t expert_of(int64_t pair) const { return call_.routes ? call_.routes->experts[pair] : 0; }
  bool known(int64_t pair, int64_t experts) const {
    return expert_of(pair) >= 0 && expert_of(pair) < experts;
  }

  bool start_sums(Scratch &scratch) {
    const int64_t size = call_.x.count * call_.down->rows;
    if (size == 0) return true;
    sums_ = call_.x.bf16 ? (float *)scratch.take(size * sizeof(float)) : (float *)call_.out;
    if (!sums_) return false;
    if (!call_.base)
      memset(sums_, 0, size * sizeof(float));
    else if (call_.x.bf16)
      k_.widen((const uint16_t *)call_.base, sums_, size);
    else
      memcpy(sums_, call_.base, size * sizeof(float));
    return true;
  }

  void finish_sums() {
    const int64_t rows = call_.down->rows;
#pragma omp parallel for num_threads(call_.threads) schedule(static)
    for (int64_t t = 0; t < call_.x.count; t++)
      k_.narrow(sums_ + t * rows, (uint16_t *)call_.out + t * rows, rows);
  }

  // After sort(), ends_[e] is where expert e ends.
  Status waves(int64_t experts) {
    int64_t count = 0, tokens = 0;
    for (int64_t e = 0, at = 0; e < experts; e++) {
      const int64_t all = ends_[e] - at;
      const Mode mode = mode_of(least(all, JOB_TOKENS));
      const bool alone = direct_ && with_amx(mode);
      const int64_t most = mode == PANELS ? PANELS_TOKENS : PAIRS_TOKENS;
      const int64_t each = part_of(all, alone ? most : JOB_TOKENS);
      while (at < ends_[e]) {
        const int64_t some = least(ends_[e] - at, each);
        if (tokens + some > WAVE_TOKENS) {
          const Status status = wave(count);
          if (status != OK) return status;
          count = tokens = 0;
        }
        const int64_t block = part_of(some, k_.block);
        jobs_[count++] = {e, at, some, mode, block, nullptr, nullptr, 0, 0};
        at += some;
        tokens += some;
      }
    }
    return count ? wave(count) : OK;
  }

  Mode mode_of(int64_t tokens) const {
    const bool tiles = call_.down->layout == TILES;
    const bool same = !call_.gate_up || call_.gate_up->layout == call_.down->layout;
    const int32_t kind = call_.down->kind;
    if (call_.down->layout == DENSE) return LANES;
    const bool bf16 = call_.x.bf16 && kind != FP16 && kind != FP32 && same;
    if (bf16 && tiles && k_.panels && tokens > k_.few_panels) return PANELS;
    const int64_t few = kind == INT4 ? 0 : k_.few_pairs;
    if (bf16 && !tiles && k_.pairs && tokens > few) return PAIRS;
    if (bf16 && tiles && k_.dots) return DOTS;
    return tokens <= (tiles ? k_.few_tiles : k_.few_rows) ? LANES : BLOCKS;
  }

  Status wave(int64_t count) {
    static thread_local Scratch scratch;
    int64_t most = 0;
    for (int64_t j = 0; j < count; j++) most = jobs_[j].count < most ? most : jobs_[j].count;
    const int64_t results = MOST_ROWS * (most + DOTS_PAD);
    float *gates = nullptr, *ups = nullptr;
    Share *shares = nullptr;
    const bool there = lay_out(scratch, [&](Pieces &pieces) {
      for (int64_t j = 0; j < count; j++) {
        jobs_[j].x = pieces.take<float>(room(jobs_[j], k_, width_));
        jobs_[j].inner = pieces.take<float>(room(jobs_[j], k_, inner_width_));
      }
      gates = pieces.take<float>(call_.threads * results);
      ups = pieces.take<float>(call_.threads * results);
      shares = pieces.take<Share>(2 * call_.threads);
    });
    if (!there) return NO_MEMORY;
    int64_t last = 0, gathered = 0, grouped = 0;
    for (int64_t j = 0; j < count; j++) {
      jobs_[j].gathered = gathered;
      jobs_[j].grouped = grouped;
      gathered += gather_items(jobs_[j], width_);
      const int64_t group = group_rows(jobs_[j], inner_, call_.threads);
      grouped += call_.gate_up ? up_to(inner_, group) / group : 0;
      const int64_t rows = group_rows(jobs_[j], call_.down->rows, call_.threads);
      last = last < rows ? rows : last;
    }
    const int64_t outputs = up_to(call_.down->rows, last) / last;
    share_out(shares, call_.threads, grouped);
    share_out(shares + call_.threads, call_.threads, outputs);
    const Gather gather(call_, order_, width_);
    status_ = OK;
#pragma omp parallel num_threads(call_.threads)
    {
      const int64_t thread = omp_get_thread_num();
      float *gate = gates + thread * results, *up = ups + thread * results;
#pragma omp for schedule(dynamic, 4)
      for (int64_t i = 0; i < gathered; i++) gather.copy(job_of(jobs_, i, count, &Job::gathered), i);
      if (call_.gate_up) {
        for (int64_t i; (i = take(shares, call_.threads, thread)) >= 0;)
          gate_and_up(job_of(jobs_, i, count, &Job::grouped), i, gate, up);
#pragma omp barrier
      }
      for (int64_t i; (i = take(shares + call_.threads, call_.threads, thread)) >= 0;)
        for (int64_t j = 0; j < count; j++) all_results_of(jobs_[j], i * last, last, gate);
    }
    return status_;
  }

  // Blocks are cut as in waves, whatever the threads, since their sums' order depends on their size.
  bool takes_own(int64_t tokens) const {
    if (!direct_ || call_.gate_up || !call_.down->count) return false;
    const Mode mode = mode_of(JOB_TOKENS);
    const int64_t blocks = parts_of(tokens, part_of(tokens, JOB_TOKENS));
    const bool even = mode != BLOCKS || blocks % call_.threads == 0;
    return even && tokens >= (mode == PAIRS ? OWN_PAIRS : OWN_TOKENS) * call_.threads;
  }

  // Each thread takes some tokens and the whole matrix, so that what it copies stays in its own
  // caches. Rows, which take longest to expand, serve twice as many tokens.
  Status by_tokens(int64_t tokens) {
    static thread_local Scratch scratch;
    const Matrix &m = *call_.down;
    const Mode mode = mode_of(JOB_TOKENS);
    constexpr int64_t PIECE = PANEL_CHUNKS * CHUNK;
    // Where the L2 cache holds all of its sums, a thread copies a piece of its tokens' columns at a
    // time.
    const bool in_pieces = mode == PANELS && width_ > PIECE && m.rows * JOB_TOKENS <= KEPT_SUMS;
    const int64_t most = mode == PAIRS ? PAIRS_TOKENS : JOB_TOKENS;
    const int64_t each = part_of(tokens, most, mode == BLOCKS ? 1 : call_.threads);
    const Job whole = {0, 0, each, mode, 0, nullptr, nullptr, 0, 0};
    // Sums that are not taken up again had better leave the caches soon.
    const bool once = with_amx(mode) && width_ <= PIECE;
    const int64_t group = once ? most_rows(whole) / 2 : most_rows(whole);
    const int64_t width = in_pieces ? PIECE : width_;
    const int64_t kept = in_pieces ? up_to(m.rows, TILE_ROWS) : group;
    const int64_t input = up_to(room(whole, k_, width), 16), output = kept * (each + DOTS_PAD);
    float *inputs = nullptr, *outputs = nullptr;
    Share *shares = nullptr;
    const bool there = lay_out(scratch, [&](Pieces &pieces) {
      inputs = pieces.take<float>(call_.threads * input);
      outputs = pieces.take<float>(call_.threads * output);
      shares = pieces.take<Share>(call_.threads);
    });
    if (!there) return NO_MEMORY;
    share_out(shares, call_.threads, parts_of(tokens, each));
    status_ = OK;
#pragma omp parallel num_threads(call_.threads)
    {
      const int64_t thread = omp_get_thread_num();
      Job job = whole;
      job.x = inputs + thread * input;
      for (int64_t i; (i = take(shares, call_.threads, thread)) >= 0;) {
        job.first = i * each;
        job.count = least(tokens - job.first, each);
        job.block = part_of(job.count, k_.block);
        int64_t column = 0, some = 0;
        do {
          column += some;
          some = least(width_ - column, width);
          const Gather gather(call_, order_, some, column);
          for (int64_t g = 0; g < gather_items(job, some); g++) gather.copy(job, g);
          for (int64_t row = 0; row < m.rows; row += group) {
            const int64_t rows = least(m.rows - row, group);
            float *y = outputs + thread * output + (in_pieces ? row * up_to(job.count, PANEL) : 0);
            if (!multiply(m, 0, row, rows, job, job.x, some, y, column))
              bad_mask();
            else if (column + some == width_)
              put_results(job, row, rows, y);
          }
        } while (column + some < width_);
      }
    }
    return status_;
  }

  // Of the product of columns from `column` on, where tokens are PANELS, else of all.
  bool multiply(const Matrix &m, int64_t which, int64_t row, int64_t rows, const Job &job,
                const float *x, int64_t width, float *y, int64_t column = 0) const {
    const int64_t count = job.count;
    if (job.mode == BLOCKS)
      return k_.tokens(m, which, row, rows, x, width, count, job.block, y);
    if (job.mode == LANES)
      return k_.lanes(m, which, row, rows, x, width, count, y, most_rows(job));
    const uint16_t *halves = (const uint16_t *)x;
    if (job.mode == PANELS) return k_.panels(m, which, row, rows, halves, column, width, count, y);
    if (job.mode == PAIRS) return k_.pairs(m, which, row, rows, halves, width, count, y);
    k_.dots(m, which, row, rows, halves, width, count, y, most_rows(job));
    return true;
  }

  void bad_mask() {
#pragma omp atomic write
    status_ = BAD_MASK;
  }

  // Rows of one block of results: tiles are computed whole.
  int64_t room_of(int64_t rows) const {
    return call_.down->layout == TILES ? up_to(rows, TILE_ROWS) : rows;
  }

  void gate_and_up(const Job &job, int64_t item, float *gate, float *up) {
    const Matrix &m = *call_.gate_up;
    const int64_t group = group_rows(job, inner_, call_.threads);
    const int64_t row = (item - job.grouped) * group, rows = least(inner_ - row, group);
    const bool tiles = m.layout == TILES;
    const int64_t expert = job.expert, above = tiles ? 2 * expert : expert;
    const bool good =
        multiply(m, above, row, rows, job, job.x, width_, gate) &&
        multiply(m, tiles ? above + 1 : above, tiles ? row : inner_ + row, rows, job, job.x,
                 width_, up);
    if (!good) return bad_mask();
    const bool last = row + rows == inner_;
    const int64_t spare = last ? inner_width_ - inner_ : 0;
    if (job.mode == BLOCKS) {
      for (int64_t first = 0; first < job.count; first += job.block) {
        const int64_t wide = up_to(least(job.count - first, job.block), k_.width);
        const int64_t from = first * room_of(rows);
        float *to = job.inner + first * inner_width_ + row * wide;
        k_.gated(call_.activation, gate + from, up + from, to, rows * wide);
        memset(to + rows * wide, 0, spare * wide * 4);
      }
      return;
    }
    if (job.mode == PANELS) return gated_panels(job, row, rows, spare, gate, up);
    if (job.mode == PAIRS) return gated_pairs(job, row, rows, spare, gate, up);
    for (int64_t t = 0; t < job.count; t++) {
      float *g = gate + t * most_rows(job), *u = up + t * most_rows(job);
      if (job.mode == LANES) {
        float *to = job.inner + t * inner_width_ + row;
        k_.gated(call_.activation, g, u, to, rows);
        memset(to + rows, 0, spare * 4);
      } else {
        uint16_t *to = (uint16_t *)job.inner + t * inner_width_ + row;
        k_.gated(call_.activation, g, u, g, rows);
        k_.narrow(g, to, rows);
        memset(to + rows, 0, spare * 2);
      }
    }
    if (job.mode == DOTS)
      for (int64_t t = job.count; t < job.count + DOTS_PAD; t++)
        memset((uint16_t *)job.inner + t * inner_width_ + row, 0, (rows + spare) * 2);
  }

  // Tokens past the last are zeros in all panels, and so are their results.
  void gated_panels(const Job &job, int64_t row, int64_t rows, int64_t spare, float *gate,
                    const float *up) {
    const int64_t padded = up_to(rows, TILE_ROWS), count = up_to(job.count, PANEL);
    k_.gated(call_.activation, gate, up, gate, padded * count);
    for (int64_t t = 0; t < count; t++) {
      const float *values = in_squares(gate, padded, t);
      for (int64_t r = 0; r < rows + spare; r += TILE_ROWS, values += PANEL * TILE_ROWS) {
        uint16_t *to = in_panel(job.inner, count / PANEL, inner_width_, t, row + r);
        const int64_t real = r < rows ? least(rows - r, TILE_ROWS) : 0;
        if (real) k_.narrow(values, to, real);
        memset(to + real, 0, (least(rows + spare - r, TILE_ROWS) - real) * 2);
      }
    }
  }

  void gated_pairs(const Job &job, int64_t row, int64_t rows, int64_t spare, float *gate,
                   const float *up) {
    const int64_t padded = up_to(rows, TILE_ROWS), panels = up_to(job.count, PANEL) / PANEL;
    k_.gated(call_.activation, gate, up, gate, padded * panels * PANEL);
    for (int64_t p = 0; p < panels; p++) {
      for (int64_t r = 0; r < rows + spare; r += TILE_ROWS) {
        uint16_t *to = in_pairs(job.inner, panels, inner_width_, p, row + r);
        if (r < rows)
          k_.pair_sums(gate + (p * padded + r) * PANEL, to);
        else
          memset(to, 0, TILE_ROWS * PANEL * 2);
      }
    }
  }

  void all_results_of(const Job &job, int64_t row, int64_t group, float *y) {
    const int64_t end = least(call_.down->rows, row + group), most = most_rows(job);
    for (; row < end; row += most) results_of(job, row, least(end - row, most), y);
  }

  void results_of(const Job &job, int64_t row, int64_t rows, float *y) {
    const Matrix &m = *call_.down;
    const float *x = call_.gate_up ? job.inner : job.x;
    const int64_t width = call_.gate_up ? inner_width_ : width_;
    if (!multiply(m, job.expert, row, rows, job, x, width, y)) return bad_mask();
    put_results(job, row, rows, y);
  }

  void put_results(const Job &job, int64_t row, int64_t rows, float *y) {
    if (direct_ && with_amx(job.mode)) {
      const int64_t step = call_.down->rows;
      uint16_t *to = (uint16_t *)call_.out + job.first * step + row;
      return (job.mode == PANELS ? k_.put_panels : k_.put_pairs)(y, rows, job.count, to, step);
    }
    if (job.mode == BLOCKS || job.mode == PAIRS) return put_turned(job, row, rows, y);
    float apart[MOST_ROWS];
    for (int64_t t = 0; t < job.count; t++) {
      const int64_t pair = order_[job.first + t];
      if (job.mode != PANELS) {
        put(y + t * most_rows(job), pair, row, rows);
        continue;
      }
      const float *squares = in_squares(y, up_to(rows, TILE_ROWS), t);
      for (int64_t r = 0; r < rows; r += TILE_ROWS)
        memcpy(apart + r, squares + r * PANEL, TILE_ROWS * 4);
      put(apart, pair, row, rows);
    }
  }

  void put_turned(const Job &job, int64_t row, int64_t rows, const float *y) {
    const bool pairs = job.mode == PAIRS;
    const int64_t block = pairs ? PANEL : job.block, width = pairs ? PANEL : k_.width;
    const int64_t room = pairs ? up_to(rows, TILE_ROWS) : room_of(rows);
    float turned[TURNED * MOST_ROWS];
    for (int64_t t = 0; t < job.count; t += TURNED) {
      const int64_t first = t / block * block, some = least(job.count - t, TURNED);
      const int64_t wide = up_to(least(job.count - first, block), width);
      k_.turn(y + first * room + (t - first), wide, rows, some, turned, MOST_ROWS);
      for (int64_t i = 0; i < some; i++)
        put(turned + i * MOST_ROWS, order_[job.first + t + i], row, rows);
    }
  }

  void put(const float *values, int64_t pair, int64_t row, int64_t rows) {
    const int64_t at = pair / active_ * call_.down->rows + row;
    if (!direct_) {
      const float weight = call_.routes ? call_.routes->weights[pair] : 1.0f;
      for (int64_t r = 0; r < rows; r++) sums_[at + r] += weight * values[r];
    } else if (call_.x.bf16) {
      k_.narrow(values, (uint16_t *)call_.out + at, rows);
    } else {
      memcpy((float *)call_.out + at, values, rows * 4);
    }
  }

  const Call &call_;
  const Kernels &k_;
  const int64_t width_, inner_, inner_width_, active_;
  const bool direct_;
  int64_t *order_ = nullptr, *ends_ = nullptr;
  Job *jobs_ = nullptr;
  float *sums_ = nullptr;
  Status status_ = OK;
};

}  // namespace

Status forward(const Call &call) { return Forward(call).run(); }
