// The plain C entry: what the packed form looks like, and a run on raw pointers, its threads OpenMP's.
#include "chain.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

using namespace structured;

static void openmp(void*, void (*task)(void*, size_t), size_t count, void* data) {
#pragma omp parallel for schedule(dynamic, 1)
  for (size_t i = 0; i < count; ++i) task(data, i);
}

extern "C" {

void structured_layout(int64_t* lanes, int64_t* panel) {
  *lanes = LANES;
  *panel = PANEL;
}

// nullptr, or what is wrong
const char* structured_check(const void* packed, int64_t bytes) { return Chain(packed).wrong(bytes); }

// x (rows, n) and y (rows, m) float32 without gaps; `packed` aligned to 64 bytes and checked. threads 0: as many as OpenMP has.
void structured_run(const void* packed, const float* x, float* y, int64_t rows, int64_t threads) {
  const Chain chain(packed);
#if defined(_OPENMP)
  const int count = threads ? (int)threads : omp_get_max_threads();
#else
  const int count = 1;
#endif
  run(chain, x, y, (size_t)rows, Threads{count, openmp, nullptr});
}

// The multiply-adds of `repeats` tiles whose weights stay in the first cache: what the arithmetic allows at most.
int64_t structured_peak(int64_t format, int64_t repeats) {
  alignas(64) static const float weights[64 * PANEL] = {};
  static const float inputs[64 * ROWS] = {};
  volatile float seen = 0.0f;
  for (int64_t i = 0; i < repeats; ++i) {
    if (format == INT8) {
      Ints sums[ROWS][VECTORS];
      tile<Int8, ROWS, VECTORS>((const uint32_t*)inputs, 64, 1, (const int8_t*)weights, 64, sums);
      seen = seen + (float)sums[i % ROWS][0][0];
    } else {
      Floats sums[ROWS][VECTORS];
      if (format == BFLOAT16)
        tile<Bfloat16, ROWS, VECTORS>((const uint32_t*)inputs, 64, 1, (const uint16_t*)weights, 64, sums);
      else
        tile<Float32, ROWS, VECTORS>(inputs, 64, 1, weights, 64, sums);
      seen = seen + sums[i % ROWS][0][0];
    }
  }
  return repeats * 64 * ROWS * PANEL * rows_a_unit(format);
}
}
