// The steps of a chain, run: inputs converted where a format wants it, panels of columns by tiles of rows.
#include "chain.hpp"

#include <algorithm>
#include <cfloat>
#include <memory>
#include <type_traits>

namespace structured {
namespace {

// Rows of inputs as a step's format multiplies them.
struct Converted {
  uint32_t* units;  // (rows, k, units)
  float* scale;     // (rows, k) of INT8
  int32_t* zero;    // (rows, k)
};

template <class T> T* at_least(std::unique_ptr<T[]>& buffer, size_t& held, size_t wanted) {
  if (held < wanted) buffer.reset(new T[held = wanted]);
  return buffer.get();
}

// What a thread keeps between calls.
struct Workspace {
  std::unique_ptr<float[]> scratch, scale;
  std::unique_ptr<uint32_t[]> units;
  std::unique_ptr<int32_t[]> zero;
  size_t scratch_held = 0, units_held = 0, scale_held = 0, zero_held = 0;

  float* rows_of_scratch(size_t wanted) { return at_least(scratch, scratch_held, wanted); }
  Converted converted(const Step& s, size_t rows) {
    if (!Chain::converts(s)) return {};
    return {at_least(units, units_held, rows * s.k * Chain::units(s)), at_least(scale, scale_held, rows * s.k), at_least(zero, zero_held, rows * s.k)};
  }
};

// Steps of (most - least) / 255, zero among them; NaN where an input is not finite.
void to_uint8(const float* x, int64_t count, int64_t step, uint8_t* to, int64_t padded, float& scale, int32_t& zero) {
  float low = 0.0f, high = 0.0f, odd = 0.0f;  // odd: NaN once an input was not finite, for comparisons pass NaN over
  int64_t i = 0;
  if (step == 1) {
    Floats lows = all(0.0f), highs = all(0.0f), odds = all(0.0f);
    for (; i + LANES <= count; i += LANES) {
      const Floats v = load<Floats>(x + i);
      lows = smaller(v, lows);
      highs = larger(v, highs);
      odds += v * 0.0f;
    }
    for (int lane = 0; lane < LANES; ++lane) low = std::min(low, lows[lane]), high = std::max(high, highs[lane]), odd += odds[lane];
  }
  for (; i < count; ++i) low = std::min(low, x[i * step]), high = std::max(high, x[i * step]), odd += x[i * step] * 0.0f;
  scale = (high - low) / 255.0f + odd;
  if (scale < FLT_MIN) scale = FLT_MIN;  // nothing but zeros, or as good as that
  const bool finite = scale == scale;
  zero = finite ? (int32_t)std::nearbyint(-low / scale) : 0;
  const float inverse = finite ? 1.0f / scale : 0.0f;
  i = 0;
#if defined(__AVX512F__)
  if (step == 1)
    for (; i + 16 <= count; i += 16) {
      __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse)));
      v = _mm512_max_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(zero)), _mm512_setzero_si512());
      _mm_storeu_si128((__m128i*)(to + i), _mm512_cvtusepi32_epi8(v));
    }
#endif
  for (; i < count; ++i) to[i] = (uint8_t)(finite ? std::clamp((int32_t)std::nearbyint(x[i * step] * inverse) + zero, 0, 255) : 0);
  for (; i < padded; ++i) to[i] = (uint8_t)zero;
}

void convert(const Step& s, const float* from, size_t row_size, size_t rows, const Converted& to, size_t first, size_t count) {
  const int64_t units = Chain::units(s);
  for (size_t task = first; task < first + count; ++task) {  // (row, block)
    const size_t row = task / s.k, b = task % s.k;
    if (row >= rows) return;
    const float* x = from + row * row_size + s.first + b * s.block;
    const int64_t valid = Chain::block_rows(s, b);
    uint32_t* made = to.units + task * units;
    if (s.format == INT8) {
      to_uint8(x, valid, s.step, (uint8_t*)made, units * 4, to.scale[task], to.zero[task]);
    } else {
      uint16_t* halves = (uint16_t*)made;
      for (int64_t i = 0; i < valid; ++i) halves[i] = to_bfloat16(x[i * s.step]);
      for (int64_t i = valid; i < units * 2; ++i) halves[i] = 0;
    }
  }
}

// One panel of one block for some rows: the inner loop, then scale, bias, activation and as many columns as are wanted.
struct Panel {
  const Chain& chain;
  const Step& s;
  const float* from;
  size_t from_size;
  Converted converted;
  float* to;
  size_t to_size;

  template <class F, int R, int V> void rows(int64_t b, int64_t column, size_t row) const {
    const int64_t units = Chain::units(s), all_columns = Chain::columns(s);
    typename F::Sum sums[R][V];
    const auto* w = chain.at<typename F::Weight>(s.weights + b * Chain::block_bytes(s)) + column * units * F::ROWS_A_UNIT;
    if constexpr (F::ROWS_A_UNIT == 1) {
      tile<F, R, V>(from + row * from_size + s.first + b * s.block, from_size, s.step, w, Chain::block_rows(s, b), sums);
    } else {
      tile<F, R, V>(converted.units + (row * s.k + b) * units, s.k * units, 1, w, units, sums);
    }
    const float* scales = chain.at<float>(s.scales) + b * all_columns + column;
    const int32_t* totals = chain.at<int32_t>(s.scales) + (s.k + b) * all_columns + column;
    const float* bias = s.bias ? chain.at<float>(s.bias) + b * s.p + column : nullptr;
    const int64_t wanted = std::min(s.width - (b * s.p + column), s.p - column);
    for (int r = 0; r < R; ++r) {
      float* y = to + (row + r) * to_size + s.at + b * s.p + column;
      for (int v = 0; v < V && v * LANES < wanted; ++v) {
        Floats value;
        if constexpr (std::is_same_v<F, Int8>) {
          const size_t task = (row + r) * s.k + b;
          const Words shift = load<Words>(totals + v * LANES) * (uint32_t)converted.zero[task];  // wraps, as int32 may not
          value = floats((Ints)((Words)sums[r][v] - shift)) * load<Floats>(scales + v * LANES) * converted.scale[task];
        } else if constexpr (std::is_same_v<F, Weight8>) {
          value = sums[r][v] * load<Floats>(scales + v * LANES);
        } else {
          value = sums[r][v];
        }
        put(y + v * LANES, bias ? bias + v * LANES : nullptr, value, std::min<int64_t>(LANES, wanted - v * LANES));
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

  template <class F, int V> void all_rows(int64_t b, int64_t column, size_t first, size_t last) const {
    size_t row = first;
    for (; row + ROWS <= last; row += ROWS) rows<F, ROWS, V>(b, column, row);
    switch (last - row) {  // the same products in the same order whatever the rows beside
      case 1: return rows<F, 1, V>(b, column, row);
      case 2: return rows<F, 2, V>(b, column, row);
      case 3: return rows<F, 3, V>(b, column, row);
      case 4: if constexpr (ROWS > 4) return rows<F, 4, V>(b, column, row); break;
      case 5: if constexpr (ROWS > 5) return rows<F, 5, V>(b, column, row); break;
    }
  }

  template <class F> void panel(int64_t task, size_t first, size_t last) const {
    const int64_t panels = (Chain::columns(s) + PANEL - 1) / PANEL, b = task / panels, column = task % panels * PANEL;
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
    }
  }
};

class Run {
 public:
  Run(const Chain& chain, const float* x, float* y, size_t rows) : chain_(chain), x_(x), y_(y), rows_(rows) {}

  void operator()(const Threads& threads) {
    static thread_local Workspace own;
    int64_t weights = 0;
    for (int64_t i = 0; i < chain_.head.steps; ++i)
      if (chain_.steps[i].kind == PRODUCT) weights += chain_.steps[i].k * Chain::block_bytes(chain_.steps[i]);
    const size_t most = 96, least = 2 * ROWS;  // rows of which a scratch stays in the cache
    size_t tile = std::clamp<size_t>((size_t(1) << 16) / std::max<int64_t>(chain_.head.scratch, 1) / ROWS * ROWS, least, most);
    const bool small = weights * (int64_t)rows_ < (1 << 16);  // waking a thread takes longer
    const bool by_columns = threads.count > 1 && (rows_ < least * threads.count || (weights > SHARED && rows_ <= 4 * most));
    if (!small && by_columns) return columns(threads, own);
    const size_t share = (rows_ + threads.count - 1) / threads.count;
    if (!small) tile = std::clamp<size_t>(round_up(share, ROWS), ROWS, tile);
    auto body = [&](size_t i) {
      static thread_local Workspace mine;
      const size_t first = i * tile, count = std::min(tile, rows_ - first);
      through(first, count, mine);
    };
    const size_t tiles = (rows_ + tile - 1) / tile;
    if (small)
      for (size_t i = 0; i < tiles; ++i) body(i);
    else
      threads.each(tiles, body);
  }

 private:
  static constexpr int64_t SHARED = 1 << 20;  // bytes of weights beyond which each thread had better read its own
  const Chain& chain_;
  const float* x_;
  float* y_;
  size_t rows_;

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
    return {chain_, s, from.data, from.size, converted, to.data, to.size};
  }
  static int64_t panels(const Step& s) { return s.k * ((Chain::columns(s) + PANEL - 1) / PANEL); }

  void through(size_t first, size_t count, Workspace& mine) {
    float* scratch = mine.rows_of_scratch(count * chain_.head.scratch);
    for (int64_t i = 0; i < chain_.head.steps; ++i) {
      const Step& s = chain_.steps[i];
      if (s.kind != PRODUCT) {
        simple(s, first, count, scratch);
        continue;
      }
      const Converted converted = mine.converted(s, count);
      const Panel made = panel(s, first, scratch, converted);
      if (Chain::converts(s)) convert(s, made.from, made.from_size, count, converted, 0, count * s.k);
      for (int64_t task = 0; task < panels(s); ++task) made(task, 0, count);
    }
  }

  void columns(const Threads& threads, Workspace& own) {
    float* scratch = own.rows_of_scratch(rows_ * chain_.head.scratch);
    for (int64_t i = 0; i < chain_.head.steps; ++i) {
      const Step& s = chain_.steps[i];
      if (s.kind != PRODUCT) {
        simple(s, 0, rows_, scratch);
        continue;
      }
      const Converted converted = own.converted(s, rows_);
      const Panel made = panel(s, 0, scratch, converted);
      if (Chain::converts(s)) {
        const size_t tasks = rows_ * s.k, share = (tasks + threads.count - 1) / threads.count;
        auto part = [&](size_t t) { convert(s, made.from, made.from_size, rows_, converted, t * share, std::min(share, tasks - std::min(tasks, t * share))); };
        threads.each(threads.count, part);
      }
      const int64_t tasks = panels(s), parts = std::min<int64_t>(tasks, threads.count * 4), share = (tasks + parts - 1) / parts;
      auto part = [&](size_t t) {
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
        const int32_t* pairs = chain_.at<int32_t>(s.pairs);
        for (int64_t i = 0; i < s.width; ++i) target[pairs[2 * i + 1]] = pairs[2 * i] < 0 ? 0.0f : source[pairs[2 * i]];
      } else {
        for (int64_t i = 0; i < s.width; i += LANES) finish(s, target + s.at + i, i, std::min<int64_t>(LANES, s.width - i));
      }
    }
  }

  void finish(const Step& s, float* y, int64_t column, int64_t count) const {
    float part[LANES] = {}, added[LANES] = {};
    std::memcpy(part, y, count * 4);
    if (s.bias) std::memcpy(added, chain_.at<float>(s.bias) + column, count * 4);
    store(part, activated(load<Floats>(part) + load<Floats>(added), s.activation));
    std::memcpy(y, part, count * 4);
  }
};

}  // namespace

void run(const Chain& chain, const float* x, float* y, size_t rows, const Threads& threads) { Run(chain, x, y, rows)(threads); }

}  // namespace structured
