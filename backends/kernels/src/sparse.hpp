// A weight of which every column stores some numbers only: y[j] = sum over entries e of x[row(e, j)] w[e, j].
//
// Listed: the columns of a panel share their rows, a list of numbers. Picked: each column has its own, entry e of a column being one of the
// `window` inputs from e / each * window on, which one in 4 bits of a word: eight entries a word, the first in the lowest bits.
#pragma once
#include "chain.hpp"

namespace structured {

struct Pattern {
  const int32_t* places;  // of this panel: entries, or (words, columns)
  int64_t entries, inputs, window, each;
};

constexpr int PICKED_ROWS = 3;  // at a time, at most half of a tile's: indices need registers too

template <class F, int R, int V>
inline void listed(const float* x, size_t row_size, const Pattern& pattern, const typename F::Weight* w, Floats (&sums)[R][V]) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = Floats{};
  for (int64_t e = 0; e < pattern.entries; ++e, w += V * F::WEIGHTS) {
    Floats columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = F::weights(w + v * F::WEIGHTS);
    const float* from = x + pattern.places[e];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float value = from[r * row_size];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += value * columns[v];
    }
  }
}

// 16 inputs, of which every lane takes the one that the low bits of its index name.
struct Window {
  static constexpr int64_t ROOM = MOST_WINDOW;
#if defined(__AVX512F__)
  Floats held;
  explicit Window(const float* x) : held(load<Floats>(x)) {}
  Floats operator[](Ints index) const { return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)held); }
#else
  float held[ROOM];
  explicit Window(const float* x) { std::memcpy(held, x, sizeof held); }
  Floats operator[](Ints index) const {
#if defined(__AVX2__)
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(held), (__m256i)index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(held + ROOM / 2), (__m256i)index);
    return (Floats)_mm256_blendv_ps(low, high, (__m256)((Words)index << 28));  // by bit 3
#else
    Floats found;
    for (int lane = 0; lane < LANES; ++lane) found[lane] = held[index[lane] & (ROOM - 1)];
    return found;
#endif
  }
#endif
};

template <class F, int R, int V>
__attribute__((noinline)) void picked_rows(const float* x, size_t row_size, const Pattern& pattern, const typename F::Weight* w, Floats (*sums)[V]) {
  const int32_t* words = pattern.places;
  Ints index[V] = {};
  Floats own[R][V] = {};
  int left = 0;
  for (int64_t e = 0, from = 0; e < pattern.entries; from += pattern.window) {
    float copies[R][Window::ROOM];
    const bool whole = from + Window::ROOM <= pattern.inputs;  // else only what there is may be read
    if (!whole)
      for (int r = 0; r < R; ++r)
        for (int64_t i = 0; i < Window::ROOM; ++i) copies[r][i] = from + i < pattern.inputs ? x[r * row_size + from + i] : 0.0f;
    const float* inputs = whole ? x + from : copies[0];
    const size_t apart = whole ? row_size : Window::ROOM;
    for (const int64_t end = std::min(e + pattern.each, pattern.entries); e < end; ++e, w += V * F::WEIGHTS, --left) {
      if (!left) {
        for (int v = 0; v < V; ++v) index[v] = load<Ints>(words + v * LANES);
        words += V * LANES;
        left = ENTRIES_A_WORD;
      }
      Floats columns[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) columns[v] = F::weights(w + v * F::WEIGHTS);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Window window(inputs + r * apart);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) own[r][v] += window[index[v]] * columns[v];
      }
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) index[v] = (Ints)((Words)index[v] >> 4);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = own[r][v];
}

template <class F, int R, int V>
inline void picked(const float* x, size_t row_size, const Pattern& pattern, const typename F::Weight* w, Floats (&sums)[R][V]) {
  constexpr int MOST = R < PICKED_ROWS ? R : PICKED_ROWS;
  picked_rows<F, MOST, V>(x, row_size, pattern, w, sums);
  if constexpr (R > MOST) picked_rows<F, R - MOST, V>(x + MOST * row_size, row_size, pattern, w, sums + MOST);
}

template <class F, int R, int V>
inline void sparse_tile(const Step& s, const float* x, size_t row_size, const typename F::Weight* w, const int32_t* places, Floats (&sums)[R][V]) {
  const Pattern pattern{places, s.entries, s.q, s.window, s.each};
  s.window ? picked<F>(x, row_size, pattern, w, sums) : listed<F>(x, row_size, pattern, w, sums);
}

}  // namespace structured
