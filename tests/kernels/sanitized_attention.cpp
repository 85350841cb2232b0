// Runs attention from a file under the sanitizers, each tensor in memory of just its size, and writes what it gave.
// In: for each case the sizes, int64 batch, time, keys and the four axes of the mask (0: none), the tensors. Out: the output of each.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "at_once.hpp"
#include "attention.hpp"

using namespace structured;

int main(int, char** arguments) {
  FILE* in = std::fopen(arguments[1], "rb");
  FILE* out = std::fopen(arguments[2], "wb");
  Attention of;
  int64_t sizes[7];
  while (std::fread(&of, sizeof of, 1, in) == 1) {
    if (!of.sound() || std::fread(sizes, 8, 7, in) != 7) return 2;
    Attended given{sizes[0], sizes[1], sizes[2], nullptr, nullptr, nullptr, nullptr, {}, nullptr};
    const int64_t* mask = sizes + 3;
    const int64_t counts[] = {given.batch * of.heads * given.time * of.key, given.batch * of.shared * given.keys * of.key,
                              given.batch * of.shared * given.keys * of.width, mask[0] * mask[1] * mask[2] * mask[3]};
    std::vector<std::vector<float>> held;
    for (int64_t count : counts) {
      held.emplace_back(count);
      if (std::fread(held.back().data(), 4, count, in) != (size_t)count) return 2;
    }
    given.query = held[0].data(), given.key = held[1].data(), given.value = held[2].data();
    if (counts[3]) {
      given.mask = held[3].data();
      int64_t stride = 1;
      for (int axis = 3; axis >= 0; --axis) given.mask_strides[axis] = mask[axis] == 1 ? 0 : stride, stride *= mask[axis];
    }
    std::vector<float> y(given.batch * of.heads * given.time * of.width, std::numeric_limits<float>::quiet_NaN());
    given.output = y.data();
    run(of, given, Threads{2, at_once, nullptr});
    std::fwrite(y.data(), 4, y.size(), out);
  }
  std::fclose(in);
  std::fclose(out);
}
