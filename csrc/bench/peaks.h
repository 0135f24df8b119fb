// Peak rates of this CPU: of arithmetic, by loops of one instruction on registers, without memory accesses; and of reading
// memory, with hardly any arithmetic.

#pragma once

#include <cstdint>
#include <vector>

namespace fastgpt {

// An instruction: run(n) executes n iterations of its loop on this thread, each of `operations` multiplications and additions.
struct Peak {
  const char* name;
  int64_t operations;
  float (*run)(int64_t iterations);  // returns the result, so that the loop is not optimized away
};
constexpr int kMaxPeaks = 5;

// The instructions of the CPU level in use that this CPU has, float32's first.
std::vector<Peak> peaks();

// Runs `iterations` in total on all of PyTorch's threads.
void run_on_all_threads(const Peak& peak, int64_t iterations);

// The sum of `count` floats, read sequentially in parts by all of PyTorch's threads.
float read_on_all_threads(const float* numbers, int64_t count);

}  // namespace fastgpt
