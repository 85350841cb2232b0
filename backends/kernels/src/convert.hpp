// Rows of inputs as bfloat16 and int8 multiply them: gathered from where they lie, rounded, side by side.
#pragma once
#include <algorithm>
#include <cfloat>
#include <memory>

#include "chain.hpp"

namespace structured {

// Rows of inputs as a step's format multiplies them.
struct Converted {
  uint32_t* units;  // (rows, Chain::row_room)
  float* scale;     // (rows, k) of integers
  int32_t* zero;    // (rows, k)
};

// From the start of a line of the cache.
template <class T> inline T* at_least(std::unique_ptr<T[]>& buffer, size_t& held, size_t wanted) {
  if (held < wanted) buffer.reset(new T[(held = wanted) + 64 / sizeof(T)]);
  return (T*)round_up((int64_t)buffer.get(), 64);
}

// How 8 bits stand for a row of a block: steps of (most - least) / 255, zero among them; NaN where an input is not finite.
struct Range {
  float scale, inverse;
  int32_t zero;
  Range(float low, float high, float odd) {  // odd: zero, or NaN where something was not finite
    scale = (high - low) * (1.0f / 255.0f) + odd;
    if (scale < FLT_MIN) scale = FLT_MIN;  // nothing but zeros, or as good as that
    const bool finite = scale == scale;
    inverse = finite ? 1.0f / scale : 0.0f;
    zero = finite ? (int32_t)std::nearbyint(-low * inverse) : 0;
  }
};

#if defined(__AVX512F__)
inline __mmask16 first(int64_t count) { return (__mmask16)(count >= 16 ? 0xffff : (1u << count) - 1); }
inline Floats part(const float* from, int64_t count) { return (Floats)_mm512_maskz_loadu_ps(first(count), from); }

inline Range to_uint8(const float* x, int64_t count, uint8_t* to, int64_t padded) {
  Floats lows = all(0.0f), highs = all(0.0f), odds = all(0.0f);  // comparisons pass NaN over, so sums look for it
  Floats more_lows = lows, more_highs = highs, more_odds = odds;
  const auto seen = [](Floats v, Floats& low, Floats& high, Floats& odd) {
    low = (Floats)_mm512_min_ps((__m512)v, (__m512)low);
    high = (Floats)_mm512_max_ps((__m512)v, (__m512)high);
    odd += v * 0.0f;
  };
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    seen(load<Floats>(x + i), lows, highs, odds);
    seen(load<Floats>(x + i + 16), more_lows, more_highs, more_odds);
  }
  for (; i < count; i += 16) seen(part(x + i, count - i), lows, highs, odds);
  lows = (Floats)_mm512_min_ps((__m512)more_lows, (__m512)lows);
  highs = (Floats)_mm512_max_ps((__m512)more_highs, (__m512)highs);
  odds += more_odds;
  const bool finite = !_mm512_cmp_ps_mask((__m512)odds, (__m512)odds, _CMP_UNORD_Q);
  const __m512 halves = _mm512_min_ps(_mm512_shuffle_f32x4((__m512)lows, (__m512)-highs, 0x44), _mm512_shuffle_f32x4((__m512)lows, (__m512)-highs, 0xee));
  __m512 both = _mm512_min_ps(halves, _mm512_permute_ps(halves, 0x4e));  // lows in the lower half, highs turned round in the upper
  both = _mm512_min_ps(both, _mm512_permute_ps(both, 0xb1));
  both = _mm512_min_ps(both, _mm512_shuffle_f32x4(both, both, 0xb1));
  const Range range(both[0], -both[8], finite ? 0.0f : NAN);
  const __m512 inverse = _mm512_set1_ps(range.inverse);
  const __m512i zero = _mm512_set1_epi32(range.zero);
  const auto stepped = [&](Floats v) { return _mm512_max_epi32(_mm512_add_epi32(_mm512_cvtps_epi32((__m512)v * inverse), zero), _mm512_setzero_si512()); };
  for (i = 0; i + 16 <= count; i += 16) _mm_storeu_si128((__m128i*)(to + i), _mm512_cvtusepi32_epi8(stepped(load<Floats>(x + i))));
  for (; i < padded; i += 16) _mm512_mask_cvtusepi32_storeu_epi8(to + i, first(padded - i), stepped(part(x + i, std::max<int64_t>(count - i, 0))));
  return range;
}
#else
inline Range to_uint8(const float* x, int64_t count, uint8_t* to, int64_t padded) {
  float low = 0.0f, high = 0.0f, odd = 0.0f;
  for (int64_t i = 0; i < count; ++i) low = std::min(low, x[i]), high = std::max(high, x[i]), odd += x[i] * 0.0f;
  const Range range(low, high, odd);
  for (int64_t i = 0; i < padded; ++i) {
    const float steps = i < count && odd == 0.0f ? std::nearbyint(x[i] * range.inverse) : 0.0f;
    to[i] = (uint8_t)std::clamp((int32_t)steps + range.zero, 0, 255);
  }
  return range;
}
#endif

inline void all_to_bfloat16(const float* x, int64_t count, uint16_t* to, int64_t padded) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i < count; i += 16) {
    const __m256bh v = _mm512_cvtneps_pbh((__m512)part(x + i, count - i));
    _mm512_mask_cvtepi32_storeu_epi16(to + i, first(padded - i), _mm512_cvtepu16_epi32((__m256i)v));
  }
#endif
  for (; i < count; ++i) to[i] = to_bfloat16(x[i]);
  for (; i < padded; ++i) to[i] = 0;
}

// The block's inputs side by side: as they are, or copied to `room`, which is a vector longer than they are.
inline const float* gathered(const Step& s, const float* x, int64_t count, float* room) {
  if (s.step == 1 && s.run >= count) return x;
  float* to = room;
  for (int64_t left = count; left; x += s.jump) {
    const int64_t run = std::min(s.run, left);
#if defined(__AVX512F__)
    if (s.step == 1)
      for (int64_t i = 0; i < run; i += 16) store(to + i, part(x + i, run - i));
    else
#endif
      for (int64_t i = 0; i < run; ++i) to[i] = x[i * s.step];
    to += run;
    left -= run;
  }
  return room;
}

inline void convert(const Step& s, const float* from, size_t row_size, const Converted& to, size_t first, size_t count) {
  static thread_local std::unique_ptr<float[]> room;
  static thread_local size_t held = 0;
  const int64_t units = Chain::units(s);
  float* side_by_side = at_least(room, held, s.q + LANES);
  for (size_t task = first; task < first + count; ++task) {  // (row, block)
    const size_t row = task / s.k, b = task % s.k;
    const int64_t valid = Chain::block_rows(s, b);
    const float* x = gathered(s, from + row * row_size + s.first + b * s.block, valid, side_by_side);
    uint32_t* made = to.units + row * Chain::row_room(s) + b * Chain::room(s);
    if (s.format != BFLOAT16) {
      const Range range = to_uint8(x, valid, (uint8_t*)made, units * 4);
      to.scale[task] = range.scale;
      to.zero[task] = range.zero;
    } else
      all_to_bfloat16(x, valid, (uint16_t*)made, units * 2);
  }
}

}  // namespace structured
