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
}
