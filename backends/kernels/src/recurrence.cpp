#include "recurrence.hpp"

#include "convert.hpp"

namespace structured {
namespace {

struct Entries {
  const Recurrence& of;
  const float *decay, *drive, *query, *before;
  float *y, *after;
  int64_t time, panels;

  static constexpr int64_t WIDE = 2048;  // entries of a task, about: what lies side by side is read together

  int64_t rows() const { return std::max<int64_t>(1, WIDE / of.width); }
  int64_t tasks() const { return (of.heads + rows() - 1) / rows(); }

  void operator()(size_t task) const {
    const int64_t b = task / panels, row = task % panels * rows(), many = std::min(rows(), of.heads - row);
    const int64_t n = of.state(), first = row * of.width, count = many * of.width;
    float* h = after + b * n + first;  // the state is kept where it is wanted in the end
    if (before)
      std::memcpy(h, before + b * n + first, count * 4);
    else
      std::fill(h, h + count, 0.0f);
    for (int64_t t = 0; t < time; ++t) {
      const int64_t at = (b * time + t) * n + first;
      step(h, decay + at, drive + at, count);
      if (!of.read) {
        std::memcpy(y + at, h, count * 4);
        continue;
      }
      for (int64_t r = 0; r < many; ++r) y[(b * time + t) * of.heads + row + r] = dot(h + r * of.width, query + (b * time + t) * of.width, of.width);
    }
  }

  static void step(float* h, const float* a, const float* b, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(h + i, load<Floats>(h + i) * load<Floats>(a + i) + load<Floats>(b + i));
    for (; i < count; ++i) h[i] = h[i] * a[i] + b[i];
  }
};

// A panel of S: rows of PANEL numbers.
struct State {
  float* first;
  int64_t stride;
  float* row(int64_t i) const { return first + i * stride; }
};

constexpr int64_t LINE = 16;   // floats of a line of the cache, which is more than a narrow panel
constexpr int64_t COPIED = 8;  // tokens from which a copy of the state pays

struct Matrices {
  const Recurrence& of;
  const float *query, *key, *value, *decay, *beta, *before;
  float *y, *after;
  int64_t time, panels;

  int64_t tasks() const { return of.heads * ((of.width + PANEL - 1) / PANEL); }

  void operator()(size_t task) const {
    const int64_t wide = (of.width + PANEL - 1) / PANEL, head = task % panels / wide, column = task % wide * PANEL;
    const int64_t b = task / panels, count = std::min<int64_t>(PANEL, of.width - column);
    thread_local std::unique_ptr<float[]> kept;
    thread_local size_t held = 0;
    float* room = at_least(kept, held, of.key * (PANEL + 1) + LINE);
    room += (-(uintptr_t)room % (LINE * 4)) / 4;
    const int64_t matrix = (b * of.heads + head) * of.key * of.width + column;
    const bool whole = count == PANEL && time < COPIED;  // then kept where it is wanted in the end, else apart: aligned and padded
    const State s = whole ? State{after + matrix, of.width} : State{room + of.key, PANEL};
    for (int64_t i = 0; i < of.key; ++i) {
      if (!whole || !before) std::fill(s.row(i), s.row(i) + PANEL, 0.0f);
      if (before) std::memcpy(s.row(i), before + matrix + i * of.width, count * 4);
    }
    for (int64_t t = 0; t < time; ++t) token(s, room, b, t, head, column, count);
    for (int64_t i = 0; i < of.key && !whole; ++i) std::memcpy(after + matrix + i * of.width, s.row(i), count * 4);
  }

  // `room`: for this token's decays.
  void token(State s, float* room, int64_t b, int64_t t, int64_t head, int64_t column, int64_t count) const {
    const int64_t row = b * time + t;
    const float* decays = decayed(room, row, head);
    Floats read_first[VECTORS];  // S^T q of the first query, by the last factor
    for (int64_t j = 0; j < of.factors; ++j) {
      const float* k = key + (row * of.factors + j) * of.keys * of.key + head / (of.heads / of.keys) * of.key;
      float v[PANEL] = {};
      std::memcpy(v, value + ((row * of.factors + j) * of.heads + head) * of.width + column, count * 4);
      Floats w[VECTORS];
      for (int c = 0; c < VECTORS; ++c) w[c] = load<Floats>(v + c * LANES);
      if (of.delta) {
        Floats seen[VECTORS];
        if (decays)
          read(s, [=](int64_t i) { return k[i] * decays[i]; }, seen);
        else
          read(s, [=](int64_t i) { return k[i]; }, seen);
        const float beta_j = beta[(row * of.factors + j) * of.heads + head];
        for (int c = 0; c < VECTORS; ++c) w[c] = beta_j * (w[c] - seen[c]);
      }
      if (j + 1 < of.factors)
        write<false>(s, k, w, decays, nullptr, nullptr);
      else
        write<true>(s, k, w, decays, queried(row, head, 0), read_first);
      decays = nullptr;  // once a token
    }
    float* to = y + (row * of.heads + head) * of.group() * of.width + column;
    put(to, read_first, count);
    for (int64_t g = 1; g < of.group(); ++g) {
      const float* q = queried(row, head, g);
      Floats seen[VECTORS];
      read(s, [=](int64_t i) { return q[i]; }, seen);
      put(to + g * of.width, seen, count);
    }
  }

  const float* queried(int64_t row, int64_t head, int64_t g) const {
    const int64_t reads = of.queries < of.heads ? head / (of.heads / of.queries) : head * of.group() + g;
    return query + (row * of.queries + reads) * of.key;
  }

  void put(float* to, const Floats* seen, int64_t count) const {
    float out[PANEL];
    for (int c = 0; c < VECTORS; ++c) store(out + c * LANES, (float)of.scale * seen[c]);
    std::memcpy(to, out, count * 4);
  }

  // e^g for each row of the state; nullptr where nothing decays.
  const float* decayed(float* room, int64_t row, int64_t head) const {
    if (!of.decay) return nullptr;
    const float* g = decay + (of.stored ? 0 : row * of.decays()) + head * (of.decay == BY_KEY ? of.key : 1);
    if (of.decay == BY_HEAD)
      std::fill(room, room + of.key, std::exp(g[0]));
    else
      for (int64_t i = 0; i < of.key; ++i) room[i] = std::exp(g[i]);
    return room;
  }

  // sum_i by(i) S[i]: two rows at a time, whose sums do not wait for each other.
  template <class F> void read(State s, F by, Floats* to) const {
    Floats even[VECTORS] = {}, odd[VECTORS] = {};
    int64_t i = 0;
    for (; i + 1 < of.key; i += 2) {
      const float one = by(i), two = by(i + 1);
      for (int c = 0; c < VECTORS; ++c) {
        even[c] += one * load<Floats>(s.row(i) + c * LANES);
        odd[c] += two * load<Floats>(s.row(i + 1) + c * LANES);
      }
    }
    if (i < of.key)
      for (int c = 0; c < VECTORS; ++c) even[c] += by(i) * load<Floats>(s.row(i) + c * LANES);
    for (int c = 0; c < VECTORS; ++c) to[c] = even[c] + odd[c];
  }

  // S <- e^g S + k w^T, and of that S^T q where it is asked for.
  template <bool READ> void write(State s, const float* k, const Floats* w, const float* decays, const float* q, Floats* to) const {
    Floats held[VECTORS], seen[VECTORS] = {};
    for (int c = 0; c < VECTORS; ++c) held[c] = w[c];
    for (int64_t i = 0; i < of.key; ++i) {
      const Floats by = all(k[i]), stays = all(decays ? decays[i] : 1.0f), wanted = all(READ ? q[i] : 0.0f);  // before anything is written
      for (int c = 0; c < VECTORS; ++c) {
        const Floats made = stays * load<Floats>(s.row(i) + c * LANES) + by * held[c];
        store(s.row(i) + c * LANES, made);
        if (READ) seen[c] += wanted * made;
      }
    }
    if (READ)
      for (int c = 0; c < VECTORS; ++c) to[c] = seen[c];
  }
};

template <class T> void all_tasks(T work, int64_t batch, const Threads& threads) {
  work.panels = work.tasks();
  threads.each((size_t)(batch * work.panels), work);
}

}  // namespace

void run(const Recurrence& of, const float* const* in, float* const* out, int64_t batch, int64_t time, const Threads& threads) {
  auto next = [&in](bool there) { return there ? *in++ : nullptr; };
  if (of.kind == ENTRIES) {
    const float *a = next(true), *b = next(true), *query = next(of.read), *state = next(of.carried);
    all_tasks(Entries{of, a, b, query, state, out[0], out[1], time, 0}, batch, threads);
  } else {
    const float *q = next(true), *k = next(true), *v = next(true), *g = next(of.decay && !of.stored), *beta = next(of.delta);
    const float *state = next(of.carried), *rates = next(of.stored);
    all_tasks(Matrices{of, q, k, v, rates ? rates : g, beta, state, out[0], out[1], time, 0}, batch, threads);
  }
}

}  // namespace structured
