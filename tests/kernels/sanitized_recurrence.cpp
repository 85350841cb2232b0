// Runs recurrences from a file under the sanitizers, each tensor in memory of just its size, and writes what they gave.
// In: for each case the sizes, int64 batch and time, the inputs. Out: the two outputs of each.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "at_once.hpp"
#include "recurrence.hpp"

using namespace structured;

int main(int, char** arguments) {
  FILE* in = std::fopen(arguments[1], "rb");
  FILE* out = std::fopen(arguments[2], "wb");
  Recurrence of;
  int64_t sizes[2];
  while (std::fread(&of, sizeof of, 1, in) == 1) {
    if (!of.sound() || std::fread(sizes, 8, 2, in) != 2) return 2;
    Recurrence::Input wanted[MOST_INPUTS];
    const int count = of.inputs(wanted);
    std::vector<std::vector<float>> held;
    const float* given[MOST_INPUTS] = {};
    for (int i = 0; i < count; ++i) {
      held.emplace_back(wanted[i].numbers * (wanted[i].once ? 1 : wanted[i].sequence ? sizes[0] * sizes[1] : sizes[0]));
      if (std::fread(held[i].data(), 4, held[i].size(), in) != held[i].size()) return 2;
      given[i] = held[i].data();
    }
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> y(sizes[0] * sizes[1] * of.outputs(), nan), state(sizes[0] * of.state(), nan);
    float* const made[2] = {y.data(), state.data()};
    run(of, given, made, sizes[0], sizes[1], Threads{2, at_once, nullptr});
    std::fwrite(y.data(), 4, y.size(), out);
    std::fwrite(state.data(), 4, state.size(), out);
  }
  std::fclose(in);
  std::fclose(out);
}
