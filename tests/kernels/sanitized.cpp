// Runs chains from a file under the sanitizers, each in memory of just its size, and writes what they gave.
// In: for each case int64 bytes, rows, inputs, outputs; the packed tensor; x; skip. Out: for each case int64 ran (0: refused), then y.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "at_once.hpp"
#include "chain.hpp"

using namespace structured;

int main(int, char** arguments) {
  FILE* in = std::fopen(arguments[1], "rb");
  FILE* out = std::fopen(arguments[2], "wb");
  const int threads = std::atoi(arguments[3]);
  int64_t sizes[4];
  while (std::fread(sizes, 8, 4, in) == 4) {
    void* packed = std::aligned_alloc(64, round_up(sizes[0], 64));
    if (std::fread(packed, 1, sizes[0], in) != (size_t)sizes[0]) return 2;
    std::vector<float> x(sizes[1] * sizes[2]), skip(sizes[1] * sizes[3]);
    if (std::fread(x.data(), 4, x.size(), in) != x.size() || std::fread(skip.data(), 4, skip.size(), in) != skip.size()) return 2;
    const Chain chain(packed);
    const int64_t ran = !chain.wrong(sizes[0]) && chain.head.n == sizes[2] && chain.head.m == sizes[3];
    std::fwrite(&ran, 8, 1, out);
    if (ran) {
      std::vector<float> y(sizes[1] * chain.head.m);
      run(chain, x.data(), skip.data(), y.data(), sizes[1], Threads{threads, at_once, nullptr});
      std::fwrite(y.data(), 4, y.size(), out);
    }
    std::free(packed);
  }
  std::fclose(in);
  std::fclose(out);
}
