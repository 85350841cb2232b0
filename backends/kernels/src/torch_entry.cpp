// The plain C entry: what the packed form looks like, and a run on raw pointers, its threads OpenMP's.
#include "matrices.hpp"
#include "attention.hpp"
#include "recurrence.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

using namespace structured;

static void openmp(void*, void (*task)(void*, size_t), size_t count, void* data) {
#pragma omp parallel for schedule(dynamic, 1)
  for (size_t i = 0; i < count; ++i) task(data, i);
}

static int threads_of(int64_t asked) {
#if defined(_OPENMP)
  return asked ? (int)asked : omp_get_max_threads();
#else
  (void)asked;
  return 1;
#endif
}

template <class F> static int64_t peak(int64_t repeats) {
  constexpr size_t UNITS = 64;
  alignas(64) static const typename F::Weight weights[UNITS * VECTORS * F::WEIGHTS] = {};
  static const typename F::Input inputs[UNITS * ROWS] = {};
  typename F::Sum total{};
  for (int64_t i = 0; i < repeats; ++i) {
    typename F::Sum sums[ROWS][VECTORS] = {};
    tile<F, false>(inputs, Places{UNITS, UNITS, 0, 1}, weights, 0, UNITS, sums);
    for (auto& row : sums)
      for (auto& sum : row) total += sum;
  }
  volatile auto seen = total[0];
  (void)seen;
  return repeats * UNITS * ROWS * PANEL * F::ROWS_A_UNIT;
}

#if defined(STRUCTURED_AMX)
static int64_t peak_on_matrices(int64_t repeats) {
  constexpr size_t UNITS = 8 * SIDE, NEXT = 2 * Int8::WEIGHTS;
  alignas(64) static const uint32_t inputs[TALLEST * UNITS] = {};
  alignas(64) static const int8_t weights[UNITS * NEXT] = {};
  Ints sums[TALLEST][2];
  const Columns<2> of(weights, NEXT, UNITS);
  const Matrices shaped;
  for (int64_t i = 0; i < repeats; ++i) product<2>(inputs, UNITS, of, sums);
  return repeats * UNITS * Int8::ROWS_A_UNIT * TALLEST * 2 * SIDE;
}
#endif

extern "C" {

// Whether products of 8 bits run on matrix registers from now on, where there are any.
int64_t structured_matrices(int64_t wanted) {
  matrices_wanted = wanted != 0;
  return Matrices::allowed();
}

void structured_layout(int64_t* lanes, int64_t* panel) {
  *lanes = LANES;
  *panel = PANEL;
}

int64_t structured_skips(const void* packed) { return Chain(packed).skips(); }

// nullptr, or what is wrong
const char* structured_check(const void* packed, int64_t bytes) { return Chain(packed).wrong(bytes); }

// x (rows, n), skip and y (rows, m) float32 without gaps; `packed` aligned to 64 bytes and checked. threads 0: as many as OpenMP has.
void structured_run(const void* packed, const float* x, const float* skip, float* y, int64_t rows, int64_t threads) {
  const Chain chain(packed);
  run(chain, x, skip, y, (size_t)rows, Threads{threads_of(threads), openmp, nullptr});
}

// 0 where the sizes do not fit together; else how many inputs a recurrence takes. `numbers`: those of each input, then of the two outputs.
int64_t structured_recurrence(const void* sizes, int64_t batch, int64_t time, int64_t* numbers) {
  const Recurrence& of = *(const Recurrence*)sizes;
  if (!of.sound()) return 0;
  Recurrence::Input wanted[MOST_INPUTS];
  const int count = of.inputs(wanted);
  for (int i = 0; i < count; ++i) numbers[i] = wanted[i].numbers * (wanted[i].once ? 1 : wanted[i].sequence ? batch * time : batch);
  numbers[count] = batch * time * of.outputs();
  numbers[count + 1] = batch * of.state();
  return count;
}

// Inputs as counted above, (batch, time, numbers), (batch, numbers) or (numbers); outputs (batch, time, outputs) and (batch, state).
void structured_recur(const void* sizes, const float* const* in, float* const* out, int64_t batch, int64_t time, int64_t threads) {
  run(*(const Recurrence*)sizes, in, out, batch, time, Threads{threads_of(threads), openmp, nullptr});
}

int64_t structured_attention(const void* sizes) { return ((const Attention*)sizes)->sound(); }

// Tensors of the shapes that the sizes and `given` say.
void structured_attend(const void* sizes, const void* given, int64_t threads) {
  run(*(const Attention*)sizes, *(const Attended*)given, Threads{threads_of(threads), openmp, nullptr});
}

// The multiply-adds of `repeats` tiles whose weights stay in the first cache: what the arithmetic allows at most.
int64_t structured_peak(int64_t format, int64_t repeats) {
  switch (format) {
    case BFLOAT16: return peak<Bfloat16>(repeats);
    case INT8:
#if defined(STRUCTURED_AMX)
      if (Matrices::allowed()) return peak_on_matrices(repeats);
#endif
      return peak<Int8>(repeats);
    default: return peak<Float32>(repeats);
  }
}
}
