// How fast this CPU is at most: its arithmetic, in loops of one instruction on registers, which read no memory; and reading,
// with hardly any arithmetic.

#pragma once

#include <cstdint>
#include <vector>

namespace fastgpt {

// An instruction: run(n) executes n iterations of its loop on this thread, of `operations` multiplications and additions each.
struct Peak {
  const char* name;
  int64_t operations;
  float (*run)(int64_t iterations);  // returns what was computed, so that no compiler leaves it out
};
constexpr int kMostPeaks = 5;

// Those of the CPU level in use that this CPU has; the first is that of float32.
std::vector<Peak> peaks();

// So many iterations on all of PyTorch's threads together.
void run_on_all_threads(const Peak& peak, int64_t iterations);

// The sum of `count` floats, read one after the other in a part for each of PyTorch's threads.
float read_on_all_threads(const float* numbers, int64_t count);

}  // namespace fastgpt
