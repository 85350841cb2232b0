// Vectors of the widest kind that the compiler was told of, in the compilers' own vector types: the same text is AVX-512, AVX2, SSE or NEON.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace structured {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4, ROWS = 6;  // 24 accumulators, 4 weights and 1 input in 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, VECTORS = 2, ROWS = 6;  // 12, 2 and 1 in 16
#elif defined(__aarch64__)
constexpr int LANES = 4, VECTORS = 4, ROWS = 6;
#else
constexpr int LANES = 4, VECTORS = 2, ROWS = 4;
#endif
constexpr int PANEL = LANES * VECTORS;  // columns that a tile makes at once

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));

template <class V, class T> inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V, class T> inline void store(T* to, V v) { std::memcpy(to, &v, sizeof v); }
inline Floats all(float x) { return Floats{} + x; }
inline Ints all(int32_t x) { return Ints{} + x; }
inline Floats floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Ints truncated(Floats x) { return __builtin_convertvector(x, Ints); }
inline Floats pick(Ints mask, Floats a, Floats b) { return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask)); }
inline Floats smaller(Floats a, Floats b) { return pick(a < b, a, b); }
inline Floats larger(Floats a, Floats b) { return pick(a > b, a, b); }
inline float total(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = x[0];
  for (int lane = 1; lane < LANES; ++lane) sum += x[lane];
  return sum;
#endif
}
inline float dot(const float* a, const float* b, int64_t count) {
  Floats sums = all(0.0f);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) sums += load<Floats>(a + i) * load<Floats>(b + i);
  float sum = total(sums);
  for (; i < count; ++i) sum += a[i] * b[i];
  return sum;
}
inline float largest(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int lane = 1; lane < LANES; ++lane) most = x[lane] > most ? x[lane] : most;
  return most;
#endif
}
inline bool any(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
  int32_t bits = 0;
  for (int lane = 0; lane < LANES; ++lane) bits |= mask[lane];
  return bits;
#endif
}
inline Floats rounded(Floats x) {  // to the nearest, ties to even, for |x| < 2^22
  const Floats big = all(12582912.0f);
#if defined(__FAST_MATH__)
#error "the sum below must not be simplified"
#endif
  return (x + big) - big;
}

// e^x: 2^n e^r with |r| <= ln 2 / 2 and a polynomial of degree 6; 2 units in the last place, 0 below -87.3, finite above 88.3.
inline Floats exponential(Floats x) {
  x = larger(smaller(x, all(88.3f)), all(-87.3f));
  const Floats n = rounded(x * 1.44269504f);
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = all(1.3981999e-3f);
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666666e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  return p * (Floats)((truncated(n) + 127) << 23);
}

// erf(x), Abramowitz and Stegun 7.1.26: within 1.5e-7.
inline Floats error_function(Floats x) {
  const Ints sign = (Ints)x & (int32_t)0x80000000;
  const Floats a = (Floats)((Ints)x & 0x7fffffff);
  const Floats t = 1.0f / (1.0f + 0.3275911f * a);
  Floats p = all(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Floats y = 1.0f - p * t * exponential(-a * a);
  return (Floats)((Ints)y | sign);
}

enum Activation : int64_t { NONE, RELU, GELU, GELU_TANH, SILU };

inline Floats activated(Floats x, int64_t kind) {
  switch (kind) {
    case RELU: return pick(x < 0.0f, all(0.0f), x);  // a NaN stays one
    case GELU: return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
    case GELU_TANH: return x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));
    case SILU: return x / (1.0f + exponential(-x));
    default: return x;
  }
}

}  // namespace structured
