// A chain of block-diagonal products, run from one packed tensor that describes itself: header, steps, weights.
//
// A row of the program is x (n), y (m) and a scratch; a step reads one of them and writes another:
//   product   to[at + b p + j] = scale[b, j] sum_i from[first + b block + (i / run) jump + (i % run) step] w[b, i, j]; rows b q + i at and
//             beyond `valid` are zero; where there are `entries`, as many numbers of each column are stored, see sparse.hpp;
//             in 4 bits every `each` rows have a scale of their own
//   copy      for each of `width` runs (from, to, length): so many numbers from there to there, zeros where `from` is negative
//   finish    y[j] = activation(y[j] + bias[j]) + skip[j], then y = (y - mean) / sqrt(variance + epsilon) * norm[j] + norm[m + j],
//             each part where it is wanted; skip (rows, m) comes with the call
// Few rows: each step is cut by columns, so that threads share the weights. Many: each thread takes its own rows through all steps.
#pragma once
#include <algorithm>

#include "formats.hpp"

namespace structured {

constexpr int64_t MAGIC = 0x314e494148434b52;  // "RKCHAIN1"
enum Kind : int64_t { PRODUCT = 1, COPY, FINISH };
constexpr int64_t MOST = int64_t(1) << 31;  // of any size
constexpr int64_t ALIGNED = 16;             // floats to which pieces of the scratch are rounded up
constexpr int64_t MOST_INT8 = 65536;  // rows whose products of 8 bits fit in 32
constexpr int64_t MOST_WINDOW = 16, ENTRIES_A_WORD = 8;  // of sparse weights
enum Area : int64_t { X, Y, SCRATCH };

struct Step {  // 27 numbers of 8 bytes; offsets in bytes from the tensor's start, 0 where there is nothing
  int64_t kind, from, to, at, width;
  int64_t first, block, run, jump, step, valid;
  int64_t k, q, p, format;
  int64_t weights, scales, bias, activation, runs, skip, norm;
  double epsilon;
  int64_t entries, window, each, places;
};
struct Header {
  int64_t magic, bytes, lanes, panel, n, m, scratch, steps;
};

// Runs task(0) .. task(count - 1), each once, perhaps at the same time.
struct Threads {
  int count;
  void (*run)(void* with, void (*task)(void*, size_t), size_t count, void* data);
  void* with;
  template <class T> void each(size_t count_of, T& body) const {
    auto call = [](void* data, size_t i) { (*(T*)data)(i); };
    if (count <= 1 || count_of <= 1)
      for (size_t i = 0; i < count_of; ++i) body(i);
    else
      run(with, call, count_of, &body);
  }
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t rows_a_unit(int64_t format) { return format == INT8 || format == INT4 ? 4 : format == BFLOAT16 ? 2 : 1; }
inline int64_t bits_a_row(int64_t format) { return format == FLOAT32 ? 32 : format == BFLOAT16 ? 16 : format == INT4 ? 4 : 8; }

struct Chain {
  const char* data;
  const Header& head;
  const Step* steps;
  explicit Chain(const void* packed) : data((const char*)packed), head(*(const Header*)packed), steps((const Step*)(data + sizeof(Header))) {}

  template <class T> const T* at(int64_t offset) const { return (const T*)(data + offset); }
  static int64_t units(const Step& s) { return ((s.entries ? s.entries : s.q) + rows_a_unit(s.format) - 1) / rows_a_unit(s.format); }
  // Units that a block of a converted row takes, whole lines of the cache; and a row, whose lines are odd in number: its neighbours' are not
  // all kept in one place.
  static int64_t room(const Step& s) { return units(s) < 16 ? units(s) : round_up(units(s), 16); }
  static int64_t row_room(const Step& s) { return units(s) < 16 ? s.k * units(s) : (s.k * room(s) / 16 | 1) * 16; }
  static int64_t columns(const Step& s) { return round_up(s.p, LANES); }
  static int64_t block_bytes(const Step& s) { return units(s) * rows_a_unit(s.format) * columns(s) * bits_a_row(s.format) / 8; }
  static int64_t groups(const Step& s) { return s.format == INT4 ? s.q / s.each : 1; }  // of rows that share a scale
  // Numbers that say which inputs the entries are for, of the panels before a column.
  static int64_t places_before(const Step& s, int64_t column) {
    return s.window ? (s.entries + ENTRIES_A_WORD - 1) / ENTRIES_A_WORD * column : s.entries * ((column + PANEL - 1) / PANEL);
  }
  static int64_t places(const Step& s) { return places_before(s, columns(s)); }
  static int64_t panels(const Step& s) { return (columns(s) + PANEL - 1) / PANEL; }  // of a block
  static bool converts(const Step& s) { return s.format == BFLOAT16 || s.format == INT8 || s.format == INT4; }
  // Of the block's first `rows` inputs, from the block's own first: the place beyond the last.
  static int64_t reach(const Step& s, int64_t rows) {
    const int64_t runs = rows / s.run, rest = rows % s.run;
    return std::max(runs ? (runs - 1) * s.jump + (s.run - 1) * s.step + 1 : 0, rest ? runs * s.jump + (rest - 1) * s.step + 1 : 0);
  }
  static int64_t block_rows(const Step& s, int64_t b) { return std::clamp<int64_t>(s.valid - b * s.q, 0, s.q); }

  bool skips() const {
    for (int64_t i = 0; i < head.steps; ++i)
      if (steps[i].kind == FINISH && steps[i].skip) return true;
    return false;
  }

  // What is wrong with the tensor, or nothing. It is ours, but a kernel must not read beyond what it was given.
  const char* wrong(int64_t bytes) const {
    if (bytes < (int64_t)sizeof(Header) || head.magic != MAGIC) return "this is no packed chain";
    if (head.lanes != LANES || head.panel != PANEL) return "the chain was packed for another CPU";
    if (head.bytes != bytes || head.n < 1 || head.m < 1 || head.scratch < 0 || head.steps < 1 || head.steps > 4096) return "the header is damaged";
    if (bytes < (int64_t)(sizeof(Header) + head.steps * sizeof(Step))) return "the chain is cut short";
    int64_t used = 0;
    for (int64_t i = 0; i < head.steps; ++i) {
      if (!fits(steps[i])) return "a step reaches beyond its tensor";
      used += steps[i].kind == PRODUCT ? round_up(steps[i].k * steps[i].p, ALIGNED) + round_up(steps[i].k * steps[i].q, ALIGNED) : 0;
    }
    return head.scratch <= used && head.n <= MOST && head.m <= MOST ? nullptr : "the header is damaged";
  }

 private:
  int64_t size(int64_t area) const { return area == X ? head.n : area == Y ? head.m : head.scratch; }
  bool holds(int64_t offset, int64_t bytes) const { return offset >= 0 && offset % 64 == 0 && bytes >= 0 && bytes <= head.bytes && offset <= head.bytes - bytes; }

  bool fits(const Step& s) const {
    for (int64_t number : {s.at, s.width, s.first, s.block, s.run, s.jump, s.step, s.valid, s.k, s.q, s.p, s.entries, s.window, s.each})
      if (number < 0 || number > MOST) return false;
    if (s.from < X || s.from > SCRATCH || s.to < Y || s.to > SCRATCH) return false;
    if (s.kind == FINISH) {
      if (s.to != Y || s.at != 0 || s.width != head.m || (s.skip != 0 && s.skip != 1)) return false;
      return (!s.bias || holds(s.bias, s.width * 4)) && (!s.norm || (holds(s.norm, s.width * 8) && s.epsilon > 0));
    }
    if (s.kind == COPY) {
      if (!holds(s.runs, s.width * 12)) return false;
      const int32_t* run = at<int32_t>(s.runs);
      for (int64_t i = 0; i < s.width; ++i, run += 3)
        if (run[1] < 0 || run[2] < 0 || (run[0] >= 0 && int64_t(run[0]) + run[2] > size(s.from)) || int64_t(run[1]) + run[2] > size(s.to))
          return false;
      return true;
    }
    if (s.kind != PRODUCT || s.k < 1 || s.q < 1 || s.p < 1 || s.run < 1 || s.width > s.k * s.p || s.at + s.width > size(s.to)) return false;
    if (s.format < FLOAT32 || s.format > INT4 || (s.format >= INT8 && s.q > MOST_INT8)) return false;
    if (s.format == INT4 && (s.each < 8 || s.each % 8 || s.q % s.each)) return false;
    for (int64_t b = 0; b < s.k; ++b)
      if (int64_t rows = block_rows(s, b); rows && s.first + b * s.block + reach(s, rows) > size(s.from)) return false;
    if (s.k > MOST / s.q / s.p || (s.entries && !sparse(s)) || !holds(s.weights, s.k * block_bytes(s))) return false;
    const int64_t scaled = s.format >= INT8 ? groups(s) + 1 : s.format == WEIGHT8 ? 1 : 0;  // scales, then the columns' sums
    return holds(s.scales, scaled * s.k * columns(s) * 4) && (!s.bias || holds(s.bias, s.width * 4));
  }

  // One block, inputs side by side, entries within their windows and those within the inputs.
  bool sparse(const Step& s) const {
    if (s.k != 1 || s.step != 1 || s.run < s.q || s.valid != s.q || (s.format != FLOAT32 && s.format != WEIGHT8)) return false;
    if (s.entries > s.q || s.p > MOST / s.entries) return false;
    if (s.window) {
      if (s.window > MOST_WINDOW || s.each < 1) return false;
      return (s.entries - 1) / s.each * s.window < s.q && holds(s.places, places(s) * 4);
    }
    if (!holds(s.places, places(s) * 4)) return false;
    const int32_t *place = at<int32_t>(s.places), *end = place + places(s);
    return std::all_of(place, end, [&](int32_t row) { return row >= 0 && row < s.q; });
  }
};

// y (rows, m) of x (rows, n) and, where a step asks for it, of skip (rows, m), all without gaps.
void run(const Chain& chain, const float* x, const float* skip, float* y, size_t rows, const Threads& threads);

}  // namespace structured
