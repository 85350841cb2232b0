// The steps of a chain, run: panels of columns by tiles of rows, shared among threads.
#include <optional>

#include "convert.hpp"
#include "matrices.hpp"
#include "sparse.hpp"

namespace structured {
namespace {

constexpr size_t FEW = ROWS;  // rows that are faster without registers of matrices
constexpr int64_t PART = LANES == 16 ? 24 << 10 : 16 << 10;  // bytes of weights that stay in the first cache beside rows and sums
constexpr size_t WAITING = 16 * ROWS;                        // rows whose sums may wait

// What a thread keeps between calls.
struct Workspace {
  std::unique_ptr<float[]> scratch, scale;
  std::unique_ptr<uint32_t[]> units;
  std::unique_ptr<int32_t[]> zero;
  size_t scratch_held = 0, units_held = 0, scale_held = 0, zero_held = 0;

  float* rows_of_scratch(size_t wanted) { return at_least(scratch, scratch_held, wanted); }
  Converted converted(const Step& s, size_t rows) {
    if (!Chain::converts(s)) return {};
    const size_t whole = round_up(rows, TALLEST) * Chain::row_room(s) + SIDE;  // what registers read, though not use
    return {at_least(units, units_held, whole), at_least(scale, scale_held, rows * s.k), at_least(zero, zero_held, rows * s.k)};
  }
};

// One panel of one block for some rows: the inner loop, then scale, bias, activation and as many columns as are wanted.
struct Panel {
  const Chain& chain;
  const Step& s;
  const float* from;
  size_t from_size;
  Converted converted;
  float* to;
  size_t to_size;
  bool matrices;  // this thread's registers are shaped

  int64_t wanted(int64_t b, int64_t column) const { return std::min(s.width - (b * s.p + column), s.p - column); }

  const uint32_t* from_converted(int64_t b, size_t row) const { return converted.units + row * Chain::row_room(s) + b * Chain::room(s); }

  template <class F> const typename F::Weight* weights(int64_t b, int64_t column) const {
    return chain.at<typename F::Weight>(s.weights + b * Chain::block_bytes(s)) + column * Chain::units(s) * F::WEIGHTS / LANES;
  }

  // Lines that are written at the end come into the cache meanwhile.
  template <int R, int V> void awaited(int64_t b, int64_t column, size_t row, int count) const {
    const int64_t wanted = this->wanted(b, column);
    const float* first = to + row * to_size + s.at + b * s.p + column;
    for (int r = 0; r < (R > ROWS ? count : R); ++r)
      for (int v = 0; v < V && v * LANES < wanted; ++v) __builtin_prefetch(first + r * to_size + v * LANES, 1, 3);
  }

  template <class F> int64_t units(int64_t b) const { return F::ROWS_A_UNIT > 1 ? Chain::units(s) : Chain::block_rows(s, b); }

  // Of units begin <= u < end: sums go on from what waits unless these are the first, and wait unless these are the last.
  template <class F, int R, int V>
  void rows(int64_t b, int64_t column, size_t row, int64_t begin, int64_t end, bool ahead, typename F::Sum (*waiting)[V]) const {
    typename F::Sum sums[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] = begin ? waiting[r][v] : typename F::Sum{};
    const typename F::Weight* w = weights<F>(b, column) + begin * V * F::WEIGHTS;
    auto add = [&](const auto* x, const Places& at) {
      ahead ? tile<F, true>(x, at, w, begin, end, sums) : tile<F, false>(x, at, w, begin, end, sums);
    };
    const bool last = end == units<F>(b);
    if (last) awaited<R, V>(b, column, row, R);
    if constexpr (std::is_same_v<F, Int4>) {
      const int64_t groups = Chain::groups(s);
      const float* scales = chain.at<float>(s.scales) + (b * Chain::columns(s) + column) * groups;
      F::template tile<R, V>(from_converted(b, row), Chain::row_room(s), w, scales, groups, Chain::units(s) / groups, sums);
    } else if constexpr (F::ROWS_A_UNIT > 1) {
      const Places at{(size_t)Chain::row_room(s), (size_t)Chain::units(s), 0, 1};
      add(from_converted(b, row), at);
    } else if (s.entries) {
      const int32_t* places = chain.at<int32_t>(s.places) + Chain::places_before(s, column);
      sparse_tile<F>(s, from + row * from_size + s.first, from_size, w, places, sums);
    } else {
      const Places at{from_size, (size_t)s.run, (size_t)s.jump, (size_t)s.step};
      add(from + row * from_size + s.first + b * s.block, at);
    }
    if (last) return ended<F>(b, column, row, sums, R);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) waiting[r][v] = sums[r][v];
  }

  // Weights of which the first cache holds only a part: that part for all rows, whose sums wait, then the next.
  template <class F, int V> void by_parts(int64_t b, int64_t column, size_t first, size_t last, int64_t part) const {
    typename F::Sum waiting[WAITING][V];
    for (int64_t begin = 0, units = this->units<F>(b); begin < units; begin += part)
      tiles(first, last, [&](auto size, size_t row) {
        rows<F, size, V>(b, column, row, begin, std::min(begin + part, units), row == first, waiting + (row - first));
      });
  }

  // The sums of `count` rows, written as they are wanted.
  template <class F, int R, int V> void ended(int64_t b, int64_t column, size_t row, const typename F::Sum (&sums)[R][V], int count) const {
    const int64_t all_columns = Chain::columns(s), groups = Chain::groups(s), wanted = this->wanted(b, column);
    const size_t k = s.k, to_size = this->to_size;  // stores below might change what is not the loop's own
    const float* scales = chain.at<float>(s.scales) + b * all_columns + column;
    const int32_t* totals = chain.at<int32_t>(s.scales) + (k * groups + b) * all_columns + column;  // of 4 bits floats
    const float* bias = s.bias ? chain.at<float>(s.bias) + b * s.p + column : nullptr;
    const float* row_scales = converted.scale;
    const int32_t* row_zeros = converted.zero;
    const size_t task = row * k + b;
    float* first = to + row * to_size + s.at + b * s.p + column;
    const bool simple = !bias && s.activation == NONE;
    for (int v = 0; v < V && v * LANES < wanted; ++v) {
      const int64_t lanes = std::min<int64_t>(LANES, wanted - v * LANES);
      const Floats scale = F::SCALED ? load<Floats>(scales + v * LANES) : all(1.0f);
      const Words total = F::SHIFTED ? load<Words>(totals + v * LANES) : Words{};
      for (int r = 0; r < (R > ROWS ? count : R); ++r) {  // a number that compilers know keeps sums in registers
        Floats value;
        if constexpr (std::is_same_v<F, Int4>) {
          value = (sums[r][v] - (Floats)total * (float)row_zeros[task + r * k]) * row_scales[task + r * k];
        } else if constexpr (F::SHIFTED) {  // zero times the column's sum comes off, in numbers that may wrap
          value = floats((Ints)((Words)sums[r][v] - total * (uint32_t)row_zeros[task + r * k])) * (scale * row_scales[task + r * k]);
        } else if constexpr (F::SCALED) {
          value = sums[r][v] * scale;
        } else {
          value = sums[r][v];
        }
        float* y = first + r * to_size + v * LANES;
        if (simple && lanes == LANES)
          store(y, value);
        else
          put(y, bias ? bias + v * LANES : nullptr, value, lanes);
      }
    }
  }

  void put(float* y, const float* bias, Floats value, int64_t count) const {
    if (count == LANES) {
      if (bias) value += load<Floats>(bias);
      store(y, activated(value, s.activation));
      return;
    }
    float part[LANES] = {};
    if (bias) std::memcpy(part, bias, count * 4);
    store(part, activated(value + load<Floats>(part), s.activation));
    std::memcpy(y, part, count * 4);
  }

#if defined(STRUCTURED_AMX)
  template <int TALL, int WIDE> void block(int64_t b, int64_t column, const Columns<WIDE>& of, size_t row, size_t last) const {
    const int count = (int)std::min(TALL * SIDE, last - row);
    Ints sums[TALL * SIDE][WIDE];
    awaited<TALL * (int)SIDE, WIDE>(b, column, row, count);
    product<TALL>(from_converted(b, row), Chain::row_room(s), of, sums);
    ended<Int8>(b, column, row, sums, count);
  }

  // Of one or two vectors of columns, whose weights stay in the first cache, all rows; returned is the row from where there are too few.
  template <int WIDE> size_t on_matrices(int64_t b, int64_t column, const int8_t* w, size_t next, size_t row, size_t last) const {
    const Columns<WIDE> of(w, next, Chain::units(s));
    for (; row + FEW < last; row += TALLEST) last - row > SIDE ? block<2>(b, column, of, row, last) : block<1>(b, column, of, row, last);
    return row;
  }
#endif

  template <class F, int V> void all_rows(int64_t b, int64_t column, size_t first, size_t last) const {
    size_t row = first;
#if defined(STRUCTURED_AMX)
    if constexpr (std::is_same_v<F, Int8>) {
      const int8_t* w = weights<Int8>(b, column);
      for (int v = 0; matrices && v < V; v += 2, w += 2 * Int8::WEIGHTS) {
        const int64_t at = column + v * LANES;
        row = V - v > 1 ? on_matrices<2>(b, at, w, V * Int8::WEIGHTS, first, last) : on_matrices<1>(b, at, w, V * Int8::WEIGHTS, first, last);
      }
    }
    if (row >= last) return;
#endif
    const int64_t units = this->units<F>(b);
    const int64_t bytes = units * V * F::WEIGHTS * sizeof(typename F::Weight);
    const int64_t parts = std::is_same_v<F, Int4> || s.entries ? 1 : (bytes + PART / 2) / PART;
    for (; parts > 1 && last - row >= 2 * ROWS; row = std::min(last, row + WAITING))
      by_parts<F, V>(b, column, row, std::min(last, row + WAITING), (units + parts - 1) / parts);
    tiles(row, last, [&](auto size, size_t at) { rows<F, size, V>(b, column, at, 0, units, size == ROWS, nullptr); });
  }

  template <class F> void panel(int64_t task, size_t first, size_t last) const {
    const int64_t panels = Chain::panels(s), b = task / panels, column = task % panels * PANEL;
    if (b * s.p + column >= s.width) return;
    switch (std::min<int64_t>(PANEL, Chain::columns(s) - column) / LANES) {
      case 1: return all_rows<F, 1>(b, column, first, last);
      case 2: return all_rows<F, 2>(b, column, first, last);
      case 3: if constexpr (VECTORS > 2) return all_rows<F, 3>(b, column, first, last); break;
      case 4: if constexpr (VECTORS > 2) return all_rows<F, 4>(b, column, first, last); break;
    }
  }

  void operator()(int64_t task, size_t first, size_t last) const {
    switch (s.format) {
      case FLOAT32: return panel<Float32>(task, first, last);
      case BFLOAT16: return panel<Bfloat16>(task, first, last);
      case WEIGHT8: return panel<Weight8>(task, first, last);
      case INT8: return panel<Int8>(task, first, last);
      case INT4: return panel<Int4>(task, first, last);
    }
  }
};

class Run {
 public:
  Run(const Chain& chain, const float* x, const float* skip, float* y, size_t rows) : chain_(chain), x_(x), skip_(skip), y_(y), rows_(rows) {
    for (int64_t i = 0; i < chain.head.steps; ++i) matrices_ |= rows > FEW && chain.steps[i].kind == PRODUCT && chain.steps[i].format == INT8;
    matrices_ = matrices_ && Matrices::allowed();
  }

  void operator()(const Threads& threads) {
    static thread_local Workspace own;
    int64_t weights = 0;
    for (int64_t i = 0; i < chain_.head.steps; ++i)
      if (chain_.steps[i].kind == PRODUCT) weights += chain_.steps[i].k * Chain::block_bytes(chain_.steps[i]);
    const size_t most = 96, least = 2 * ROWS;  // rows of which a scratch stays in the cache
    size_t tile = std::clamp<size_t>((size_t(1) << 17) / std::max<int64_t>(chain_.head.scratch, 1) / ROWS * ROWS, least, most);
    const size_t grain = matrices_ ? TALLEST : ROWS;
    const bool small = weights * (int64_t)rows_ < (1 << 16);  // waking a thread takes longer
    const bool by_columns = threads.count > 1 && (rows_ < least * threads.count || (weights > SHARED && rows_ <= 4 * most));
    if (!small && by_columns) return columns(threads, own);
    size_t tiles = round_up((rows_ + tile - 1) / tile, small ? 1 : threads.count);  // of like size, as many for each thread
    tile = round_up((rows_ + tiles - 1) / tiles, grain);
    tiles = (rows_ + tile - 1) / tile;
    auto body = [&](size_t i) {
      static thread_local Workspace mine;
      const size_t first = i * tile, count = std::min(tile, rows_ - first);
      through(first, count, mine);
    };
    if (small)
      for (size_t i = 0; i < tiles; ++i) body(i);
    else
      threads.each(tiles, body);
  }

 private:
  static constexpr int64_t SHARED = 1 << 22;  // bytes of weights beyond which each thread had better read its own
  const Chain& chain_;
  const float *x_, *skip_;
  float* y_;
  size_t rows_;
  bool matrices_ = false;

  struct Place {
    float* data;
    size_t size;
  };
  Place place(int64_t area, size_t row, float* scratch) const {
    if (area == X) return {const_cast<float*>(x_) + row * chain_.head.n, (size_t)chain_.head.n};
    if (area == Y) return {y_ + row * chain_.head.m, (size_t)chain_.head.m};
    return {scratch, (size_t)chain_.head.scratch};
  }

  Panel panel(const Step& s, size_t row, float* scratch, const Converted& converted) const {
    const Place from = place(s.from, row, scratch), to = place(s.to, row, scratch);
    return {chain_, s, from.data, from.size, converted, to.data, to.size, matrices_};
  }
  static int64_t panels(const Step& s) { return s.k * Chain::panels(s); }
  std::optional<Matrices> shape() const { return matrices_ ? std::optional<Matrices>(std::in_place) : std::nullopt; }

  void through(size_t first, size_t count, Workspace& mine) {
    float* scratch = mine.rows_of_scratch(count * chain_.head.scratch);
    const std::optional<Matrices> shaped = shape();
    for (int64_t i = 0; i < chain_.head.steps; ++i) {
      const Step& s = chain_.steps[i];
      if (s.kind != PRODUCT) {
        simple(s, first, count, scratch);
        continue;
      }
      const Converted converted = mine.converted(s, count);
      const Panel made = panel(s, first, scratch, converted);
      if (Chain::converts(s)) convert(s, made.from, made.from_size, converted, 0, count * s.k);
      for (int64_t task = 0; task < panels(s); ++task) made(task, 0, count);
    }
  }

  void columns(const Threads& threads, Workspace& own) {
    float* scratch = own.rows_of_scratch(rows_ * chain_.head.scratch);
    for (int64_t i = 0; i < chain_.head.steps; ++i) {
      const Step& s = chain_.steps[i];
      if (s.kind != PRODUCT) {
        const size_t share = (rows_ + threads.count - 1) / threads.count;
        auto part = [&](size_t t) {
          const size_t begin = std::min(rows_, t * share);
          simple(s, begin, std::min(share, rows_ - begin), scratch + begin * chain_.head.scratch);
        };
        threads.each(threads.count, part);
        continue;
      }
      const Converted converted = own.converted(s, rows_);
      const Panel made = panel(s, 0, scratch, converted);
      if (Chain::converts(s)) {
        const size_t tasks = rows_ * s.k, share = (tasks + threads.count - 1) / threads.count;
        auto part = [&](size_t t) {
          const size_t begin = std::min(tasks, t * share);
          convert(s, made.from, made.from_size, converted, begin, std::min(share, tasks - begin));
        };
        threads.each(threads.count, part);
      }
      const int64_t tasks = panels(s), parts = std::min<int64_t>(tasks, threads.count * 4), share = (tasks + parts - 1) / parts;
      auto part = [&](size_t t) {
        const std::optional<Matrices> shaped = shape();
        for (int64_t task = t * share; task < std::min<int64_t>(tasks, (t + 1) * share); ++task) made(task, 0, rows_);
      };
      threads.each(parts, part);
    }
  }

  void simple(const Step& s, size_t first, size_t count, float* scratch) {
    const Place from = place(s.from, first, scratch), to = place(s.to, first, scratch);
    for (size_t row = 0; row < count; ++row) {
      const float* source = from.data + row * from.size;
      float* target = to.data + row * to.size;
      if (s.kind == COPY) {
        const int32_t* run = chain_.at<int32_t>(s.runs);
        for (int64_t i = 0; i < s.width; ++i, run += 3) moved(run[0] < 0 ? nullptr : source + run[0], target + run[1], run[2]);
      } else {
        finish(s, target, s.skip ? skip_ + (first + row) * chain_.head.m : nullptr);
      }
    }
  }

  static void moved(const float* source, float* target, int64_t count) {
    if (!source) {
      std::fill(target, target + count, 0.0f);
      return;
    }
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(target + i, load<Floats>(source + i));
    for (; i < count; ++i) target[i] = source[i];
  }

  // One row, in whole vectors and what is left.
  void finish(const Step& s, float* y, const float* skip) const {
    const float* bias = s.bias ? chain_.at<float>(s.bias) : nullptr;
    float sum = 0.0f;
    Floats sums = all(0.0f);
    int64_t i = 0;
    for (; i + LANES <= s.width; i += LANES) {
      Floats value = load<Floats>(y + i);
      if (bias) value += load<Floats>(bias + i);
      value = activated(value, s.activation);
      if (skip) value += load<Floats>(skip + i);
      sums += value;
      store(y + i, value);
    }
    if (i < s.width) {
      const size_t left = (s.width - i) * 4;
      float part[LANES] = {}, added[LANES] = {};
      std::memcpy(part, y + i, left);
      if (bias) std::memcpy(added, bias + i, left);
      store(part, activated(load<Floats>(part) + load<Floats>(added), s.activation));
      for (int64_t lane = 0; lane < s.width - i; ++lane) sum += part[lane] += skip ? skip[i + lane] : 0.0f;
      std::memcpy(y + i, part, left);
    }
    if (s.norm) normalise(s, y, (sum + total(sums)) / s.width);
  }

  // `mean` may be off by rounding, which the deviations from it show.
  void normalise(const Step& s, float* y, float mean) const {
    float rest = 0.0f, sum = 0.0f;
    Floats rests = all(0.0f), sums = all(0.0f);
    int64_t i = 0;
    for (; i + LANES <= s.width; i += LANES) {
      const Floats off = load<Floats>(y + i) - mean;
      rests += off;
      sums += off * off;
    }
    for (; i < s.width; ++i) rest += y[i] - mean, sum += (y[i] - mean) * (y[i] - mean);
    rest = (rest + total(rests)) / s.width;
    const float inverse = 1.0f / std::sqrt(std::max((sum + total(sums)) / s.width - rest * rest, 0.0f) + (float)s.epsilon);
    const float *gamma = chain_.at<float>(s.norm), *beta = gamma + s.width;
    for (i = 0; i + LANES <= s.width; i += LANES)
      store(y + i, (load<Floats>(y + i) - mean - rest) * inverse * load<Floats>(gamma + i) + load<Floats>(beta + i));
    for (; i < s.width; ++i) y[i] = (y[i] - mean - rest) * inverse * gamma[i] + beta[i];
  }
};

}  // namespace

void run(const Chain& chain, const float* x, const float* skip, float* y, size_t rows, const Threads& threads) {
  if (rows) Run(chain, x, skip, y, rows)(threads);
}

}  // namespace structured
