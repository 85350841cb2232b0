// What weights are stored in and how a tile multiplies them. A unit is what 4 bytes of input hold: 1 float, 2 bfloat16 or 4 uint8.
//
// Packed weights of a block (q, p): for each panel of columns, for each unit of rows, LANES columns a vector, the rows of a unit side by side.
#pragma once
#include "vectors.hpp"

namespace structured {

enum Format : int64_t { FLOAT32, BFLOAT16, WEIGHT8, INT8, INT4 };

struct Float32 {  // y = x w
  static constexpr bool SCALED = false, SHIFTED = false;
  static constexpr int ROWS_A_UNIT = 1;
  using Input = float;
  using Weight = float;
  using Sum = Floats;
  static constexpr int WEIGHTS = LANES;  // stored numbers a vector of columns takes
  static inline void add(Sum& sum, float x, Floats w) { sum += x * w; }
  static inline Floats weights(const float* at) { return load<Floats>(at); }
};

struct Weight8 {  // int8 weights, float arithmetic
  static constexpr bool SCALED = true, SHIFTED = false;
  static constexpr int ROWS_A_UNIT = 1;
  using Input = float;
  using Weight = int8_t;
  using Sum = Floats;
  static constexpr int WEIGHTS = LANES;
  typedef int8_t Bytes __attribute__((vector_size(LANES)));
  static inline void add(Sum& sum, float x, Floats w) { sum += x * w; }
  static inline Floats weights(const int8_t* at) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at)));
#else
    return __builtin_convertvector(load<Bytes>(at), Floats);
#endif
  }
};

struct Bfloat16 {  // two rows a unit, sums in float
  static constexpr bool SCALED = false, SHIFTED = false;
  static constexpr int ROWS_A_UNIT = 2;
  using Input = uint32_t;
  using Weight = uint16_t;
  using Sum = Floats;
  static constexpr int WEIGHTS = 2 * LANES;
  static inline Ints weights(const uint16_t* at) { return load<Ints>(at); }
  static inline void add(Sum& sum, uint32_t x, Ints w) {
#if defined(__AVX512BF16__)
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)w);
#else
    const Floats even = (Floats)(w << 16), odd = (Floats)(w & (int32_t)0xffff0000);
    uint32_t low = x << 16, high = x & 0xffff0000u;
    float a, b;
    std::memcpy(&a, &low, 4);
    std::memcpy(&b, &high, 4);
    sum += a * even;
    sum += b * odd;
#endif
  }
};

struct Int8 {  // four rows a unit: uint8 inputs times int8 weights, sums in int32, exact
  static constexpr bool SCALED = true, SHIFTED = true;  // sums times a scale; inputs count from their row's zero
  static constexpr int ROWS_A_UNIT = 4;
  using Input = uint32_t;
  using Weight = int8_t;
  using Sum = Ints;
  static constexpr int WEIGHTS = 4 * LANES;
  static inline Ints weights(const int8_t* at) { return load<Ints>(at); }
  static inline void add(Sum& sum, uint32_t x, Ints w) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32((int)x), (__m512i)w);
#elif defined(__AVXVNNI__)
    sum = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32((int)x), (__m256i)w);
#else
    for (int i = 0; i < 4; ++i) {  // byte i of every lane, its sign kept
      sum += ((w << (24 - 8 * i)) >> 24) * (int32_t)((x >> (8 * i)) & 0xff);
    }
#endif
  }
};

// As Int8, with weights of 4 bits, 8 added to each: the lower halves of a vector's bytes are a unit, the upper ones the next. A scale for every
// few units, so sums become floats in between.
struct Int4 {
  static constexpr bool SCALED = true, SHIFTED = true;
  static constexpr int ROWS_A_UNIT = 4;
  using Input = uint32_t;
  using Weight = int8_t;
  using Sum = Floats;
  static constexpr int WEIGHTS = 2 * LANES;  // bytes of a unit
  typedef int8_t Bytes __attribute__((vector_size(LANES * 4)));
  static inline Ints low(Ints pair) { return (Ints)((Bytes)(pair & 0x0f0f0f0f) - (int8_t)8); }
  static inline Ints high(Ints pair) { return low((Ints)((Words)pair >> 4)); }

  // sums[r][v] = sum over groups g of scales[g][v] * sum over the group's units u of x[r * rows + u] w[u].
  template <int R, int V>
  static inline void tile(const uint32_t* x, size_t rows, const int8_t* w, const float* scales, size_t groups, size_t units, Floats (&sums)[R][V]) {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] = Floats{};
    for (size_t g = 0; g < groups; ++g, scales += V * LANES) {
      Ints whole[R][V] = {};
      for (size_t u = 0; u < units; u += 2, x += 2, w += V * LANES * 4) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const Ints pair = load<Ints>(w + v * LANES * 4), first = low(pair), second = high(pair);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            Int8::add(whole[r][v], x[r * rows], first);
            Int8::add(whole[r][v], x[r * rows + 1], second);
          }
        }
      }
      for (int v = 0; v < V; ++v) {
        const Floats scale = load<Floats>(scales + v * LANES);
        for (int r = 0; r < R; ++r) sums[r][v] += floats(whole[r][v]) * scale;
      }
    }
  }
};

inline uint16_t to_bfloat16(float x) {  // to the nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Where a row of a tile finds unit u: at (u / run) * jump + (u % run) * step.
struct Places {
  size_t rows;  // from one row to the next
  size_t run, jump, step;
};

// sums[r][v] += sum over units begin <= u < end of x[r * rows + place(u)] w[u], for R rows and V vectors of columns; w is of unit `begin`.
// AHEAD: as many weights behind these are fetched meanwhile.
template <class F, bool AHEAD, int R, int V>
inline void tile(const typename F::Input* x, const Places& at, const typename F::Weight* w, size_t begin, size_t end, typename F::Sum (&sums)[R][V]) {
  const typename F::Weight* next = w + (end - begin) * V * F::WEIGHTS;
  size_t inside = 0;
  if (begin) x += begin / at.run * at.jump, inside = begin % at.run;
  for (size_t left = end - begin; left; inside = 0) {
    const size_t count = at.run - inside < left ? at.run - inside : left;
    const typename F::Input* from = x + inside * at.step;
    for (size_t u = 0; u < count; ++u) {
      decltype(F::weights(w)) columns[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        columns[v] = F::weights(w + v * F::WEIGHTS);
        if (AHEAD) __builtin_prefetch(next + v * F::WEIGHTS, 0, 2);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto value = from[r * at.rows];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) F::add(sums[r][v], value, columns[v]);
      }
      from += at.step;
      w += V * F::WEIGHTS;
      next += V * F::WEIGHTS;
    }
    x += at.jump;
    left -= count;
  }
}

// body(how many, the first of them) for all rows; the same products in the same order whatever the rows beside.
template <class Body> inline void tiles(size_t row, size_t last, Body body) {
  for (; row + ROWS <= last; row += ROWS) body(std::integral_constant<int, ROWS>{}, row);
  switch (last - row) {
    case 1: return body(std::integral_constant<int, 1>{}, row);
    case 2: return body(std::integral_constant<int, 2>{}, row);
    case 3: return body(std::integral_constant<int, 3>{}, row);
    case 4: if constexpr (ROWS > 4) return body(std::integral_constant<int, 4>{}, row); break;
    case 5: if constexpr (ROWS > 5) return body(std::integral_constant<int, 5>{}, row); break;
  }
}

}  // namespace structured
