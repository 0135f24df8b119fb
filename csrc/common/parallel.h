// Tasks on PyTorch's threads, and scratch memory for them.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "common/pytorch_threads.h"
#include "common/team.h"

namespace fastgpt {

// Minimum work per thread, in multiply-adds: waking one of PyTorch's threads takes some microseconds, a thread of the team,
// which spins, takes a part in a fraction of one.
inline int64_t grain() { return team_threads() ? 1 << 16 : 1 << 19; }
// Cost of a multiply-add of attention, relative to one of a matrix product: keys are read for few queries, and there are
// exponentials. Measured with 16 to 512 keys, 6 and 12 heads of 64.
constexpr int64_t kAttentionGrains = 4;

// Calls run(begin, end, next) for parts of [0, count) on all threads. Parts have at least `least` items, except the last one;
// `next` is where the thread's next part begins, or count.
template <typename Run>
void for_parts(int64_t count, int64_t least, const Run& run) {
  if (team_threads()) {
    const auto call = [](const void* work, int64_t begin, int64_t end, int64_t next) {
      (*static_cast<const Run*>(work))(begin, end, next);
    };
    return run_on_team(count, least, call, &run);
  }
  const int64_t threads = num_threads();
  std::atomic<int64_t> taken{0};
  const auto take = [&] {
    int64_t begin = taken.load(std::memory_order_relaxed), end;
    do {
      end = begin + part_of(count - begin, threads, least);
    } while (begin < count && !taken.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return std::pair(begin, end);
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (auto now = take(), next = now; now.first < count; now = next) {
      next = take();
      run(now.first, now.second, next.first);
    }
  });
}

// Calls run(begin, end) for ranges of all tasks, of about `work` multiply-adds each.
template <typename Run>
void for_tasks(int64_t tasks, int64_t work, const Run& run) {
  const int64_t least = std::max<int64_t>(grain() / work, 1);
  if (tasks * work <= grain()) {
    run(0, tasks);
  } else if (team_threads()) {
    for_parts(tasks, least, [&](int64_t begin, int64_t end, int64_t) { run(begin, end); });
  } else {
    torch::stable::parallel_for(0, tasks, least, run);
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

// This thread's scratch memory for one task: it grows to the largest size requested, and is kept.
inline float* thread_scratch(int64_t floats) {
  thread_local Scratch memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    memory = scratch(floats);
    size = floats;
  }
  return memory.get();
}

}  // namespace fastgpt
