// Tasks on PyTorch's threads, and scratch memory for them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

namespace fastgpt {

// Multiply-adds that a thread should have to do: waking it up costs some microseconds.
constexpr int64_t kGrain = 1 << 19;
// How many of a product's take as long as one of attention's, where there are few: keys are read for a query or a few, and
// there are exponentials. Measured from 16 to 512 keys, 6 and 12 heads of 64.
constexpr int64_t kAttentionGrains = 4;

// run(begin, end) over all tasks, of about `work` multiply-adds each.
template <typename Run>
void for_tasks(int64_t tasks, int64_t work, const Run& run) {
  if (tasks * work <= kGrain) {
    run(0, tasks);
  } else {
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(kGrain / work, 1), run);
  }
}

struct FreeScratch {
  void operator()(float* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<float, FreeScratch>;

// 64-byte aligned, uninitialized.
inline Scratch scratch(int64_t floats) {
  const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
  Scratch memory(static_cast<float*>(std::aligned_alloc(64, bytes)));
  STD_TORCH_CHECK(memory != nullptr, "out of memory for ", bytes, " bytes of scratch");
  return memory;
}

}  // namespace fastgpt
