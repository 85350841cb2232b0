#include "attention.hpp"

#include <limits>

#include "convert.hpp"

namespace structured {
namespace {

constexpr int64_t QUERIES = 16 * ROWS;  // of a task, for which keys and values are laid out once
constexpr int64_t FEW = 4;              // for which they are read where they lie

struct Room {
  std::unique_ptr<float[]> keys, values, scores;
  size_t keys_held = 0, values_held = 0, scores_held = 0;
};

struct Task {
  const Attention& of;
  const Attended& given;
  int64_t blocks;

  // Where a head's first token stands, and how far it is to the next.
  struct Place {
    int64_t first, next;
  };
  Place place(int tensor, int64_t b, int64_t head) const {
    const int64_t heads = of.heads_of(tensor), wide = of.width_of(tensor);
    const int64_t time = tensor == KEY || tensor == VALUE ? given.keys : given.time;
    if (of.is_turned(tensor)) return {(b * time * heads + head) * wide, heads * wide};
    return {(b * heads + head) * time * wide, wide};
  }

  // Queries of one head, and how many keys they see at most.
  struct Head {
    int64_t b, head, first, last, seen;
    Place query, key, value, output;
    int64_t padded() const { return round_up(seen, LANES); }
  };

  void operator()(size_t i) const {
    const int64_t block = i % blocks, head = i / blocks % of.heads, b = i / blocks / of.heads, shared = head / (of.heads / of.shared);
    const int64_t first = block * QUERIES, last = std::min(given.time, first + QUERIES);
    const Head h{b, head, first, last, of.causal ? std::min(given.keys, last) : given.keys,
                 place(QUERY, b, head), place(KEY, b, shared), place(VALUE, b, shared), place(OUTPUT, b, head)};
    static thread_local Room room;
    last - first <= FEW ? few(h, room) : many(h, room);
  }

  void few(const Head& h, Room& room) const {
    float* scores = at_least(room.scores, room.scores_held, h.padded());
    for (int64_t row = h.first; row < h.last; ++row) {
      const int64_t sees = of.causal ? std::min(h.seen, row + 1) : h.seen;
      const float *query = given.query + h.query.first + row * h.query.next, *key = given.key + h.key.first;
      for (int64_t j = 0; j < sees; ++j, key += h.key.next) scores[j] = dot(query, key, of.key) * (float)of.scale;
      const float over = softmax(scores, sees, h, row);
      weigh(scores, over, sees, given.value + h.value.first, h.value.next, given.output + h.output.first + row * h.output.next);
    }
  }

  void many(const Head& h, Room& room) const {
    const int64_t padded = h.padded();
    float* keys = at_least(room.keys, room.keys_held, padded * of.key);
    float* values = at_least(room.values, room.values_held, h.seen * round_up(of.width, LANES));
    float* scores = at_least(room.scores, room.scores_held, padded * ROWS);
    lay_keys(given.key + h.key.first, h.key.next, h.seen, keys);
    lay_values(given.value + h.value.first, h.value.next, h.seen, values);
    tiles(h.first, h.last, [&](auto size, size_t row) {
      constexpr int R = decltype(size)::value;
      const int64_t sees = of.causal ? std::min<int64_t>(h.seen, row + R) : h.seen;
      const float* query = given.query + h.query.first + row * h.query.next;
      products<R>(query, h.query.next, Laid{keys, of.key, h.seen}, of.key, sees, [&](int r, int64_t column, Floats sum) {
        store(scores + r * padded + column, sum);
      });
      float over[R];
      for (int r = 0; r < R; ++r) over[r] = softmax(scores + r * padded, sees, h, row + r);
      float* to = given.output + h.output.first + row * h.output.next;
      products<R>(scores, padded, Laid{values, h.seen, of.width}, sees, of.width, [&](int r, int64_t column, Floats sum) {
        put(to + r * h.output.next + column, sum * over[r], of.width - column);
      });
    });
  }

  // over * sum_j scores[j] value_j
  void weigh(const float* scores, float over, int64_t sees, const float* value, int64_t next, float* to) const {
    int64_t column = 0;
    for (; column + LANES <= of.width; column += LANES) {
      Floats even = all(0.0f), odd = all(0.0f);
      int64_t j = 0;
      for (const float* x = value + column; j + 1 < sees; j += 2, x += 2 * next) {
        even += scores[j] * load<Floats>(x);
        odd += scores[j + 1] * load<Floats>(x + next);
      }
      if (j < sees) even += scores[j] * load<Floats>(value + j * next + column);
      store(to + column, (even + odd) * over);
    }
    for (; column < of.width; ++column) {
      float sum = 0;
      for (int64_t j = 0; j < sees; ++j) sum += scores[j] * value[j * next + column];
      to[column] = sum * over;
    }
  }

  // Panels of `all` columns: for each number of a key, times the scale, those of the keys side by side.
  void lay_keys(const float* from, int64_t next, int64_t all, float* to) const {
    const float scale = (float)of.scale;
    for (int64_t column = 0; column < all; column += PANEL) {
      const int64_t columns = std::min<int64_t>(PANEL, all - column), room = round_up(columns, LANES);
      const float* x = from + column * next;
      for (int64_t u = 0; u < of.key; ++u, to += room) {
        if (columns == PANEL) {  // a number that compilers know
          for (int64_t j = 0; j < PANEL; ++j) to[j] = x[j * next + u] * scale;
        } else {
          for (int64_t j = 0; j < columns; ++j) to[j] = x[j * next + u] * scale;
          std::fill(to + columns, to + room, 0.0f);
        }
      }
    }
  }

  void lay_values(const float* from, int64_t next, int64_t all, float* to) const {
    for (int64_t column = 0; column < of.width; column += PANEL) {
      const int64_t columns = std::min<int64_t>(PANEL, of.width - column), room = round_up(columns, LANES);
      const float* x = from + column;
      for (int64_t u = 0; u < all; ++u, to += room, x += next) {
        int64_t j = 0;
        for (; j + LANES <= columns; j += LANES) store(to + j, load<Floats>(x + j));
        for (; j < room; ++j) to[j] = j < columns ? x[j] : 0.0f;
      }
    }
  }

  struct Laid {
    const float* w;
    int64_t units, columns;
  };

  // body(r, column, sums) of R rows of x by laid-out weights: the first `units` of them, columns at least up to `until`.
  template <int R, class Body> static void products(const float* x, int64_t next, Laid by, int64_t units, int64_t until, Body body) {
    for (int64_t column = 0; column < until; column += PANEL, by.w += by.units * PANEL) {
      switch ((std::min<int64_t>(PANEL, by.columns - column) + LANES - 1) / LANES) {
        case 1: product<R, 1>(x, next, by.w, units, column, body); break;
        case 2: product<R, 2>(x, next, by.w, units, column, body); break;
        case 3: if constexpr (VECTORS > 2) product<R, 3>(x, next, by.w, units, column, body); break;
        case 4: if constexpr (VECTORS > 2) product<R, 4>(x, next, by.w, units, column, body); break;
      }
    }
  }

  template <int R, int V, class Body>
  static void product(const float* x, int64_t next, const float* w, int64_t units, int64_t column, Body body) {
    Floats sums[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] = Floats{};
    tile<Float32, false>(x, Places{(size_t)next, (size_t)units, 0, 1}, w, 0, units, sums);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) body(r, column + v * LANES, sums[r][v]);
  }

  // e^(score - the largest) in place of the scores, and one over their sum.
  float softmax(float* scores, int64_t sees, const Head& h, int64_t query) const {
    constexpr float LEAST = -std::numeric_limits<float>::infinity();
    if (!sees) return 0.0f;  // a sum of nothing
    if (given.mask) {
      const float* mask = given.mask + h.b * given.mask_strides[0] + h.head * given.mask_strides[1] + query * given.mask_strides[2];
      if (given.mask_strides[3])
        for (int64_t j = 0; j < sees; ++j) scores[j] += mask[j];
      else
        for (int64_t j = 0; j < sees; ++j) scores[j] += mask[0];
    }
    for (int64_t j = of.causal ? std::min(sees, query + 1) : sees; j < round_up(sees, LANES); ++j) scores[j] = LEAST;
    Floats most = all(LEAST);
    for (int64_t j = 0; j < sees; j += LANES) most = larger(load<Floats>(scores + j), most);
    const float largest = structured::largest(most);
    Floats sum = all(0.0f);
    Ints wrong = all(0);  // what is no number, which the exponential does not let through
    for (int64_t j = 0; j < sees; j += LANES) {
      const Floats x = load<Floats>(scores + j), below = x - largest, e = pick(x == LEAST, all(0.0f), exponential(below));
      wrong |= below != below;
      store(scores + j, e);
      sum += e;
    }
    if (!any(wrong)) return 1.0f / total(sum);
    return largest == LEAST && of.zero ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }

  static void put(float* to, Floats value, int64_t count) {
    if (count >= LANES) return store(to, value);
    float part[LANES];
    store(part, value);
    std::memcpy(to, part, count * 4);
  }
};

}  // namespace

void run(const Attention& of, const Attended& given, const Threads& threads) {
  const int64_t blocks = (given.time + QUERIES - 1) / QUERIES;
  Task task{of, given, blocks};
  if (given.batch > 0 && blocks > 0) threads.each((size_t)(given.batch * of.heads * blocks), task);
}

}  // namespace structured
