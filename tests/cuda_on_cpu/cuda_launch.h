// Runs CUDA kernels on the host, for machines without a GPU: a stand-in for csrc/common/cuda_launch.h. The 32 threads of a warp
// are coroutines of one thread of the host, so that the lanes of a shuffle can wait for each other.

#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#define CUDA CPU  // the operations' dispatch key
#define __global__
#define __device__
#define __launch_bounds__(threads)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct Dim3 {
  uint32_t x;
};

namespace fastgpt {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

Dim3 threadIdx, blockIdx;

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(size_t{1} << 17);
  bool ended;
  uint32_t exchanges;  // that it has begun
  float values[2];     // what it gave to the last two
};
Lane lanes[kWarp];
ucontext_t scheduler;
std::function<void()> thread_of_block;

inline float __shfl_xor_sync(uint32_t mask, float value, uint32_t offset) {
  const uint32_t lane = threadIdx.x % kWarp;
  if (!(mask >> lane & 1) || !(mask >> (lane ^ offset) & 1)) std::abort();  // undefined on a GPU
  const uint32_t exchange = ++lanes[lane].exchanges;
  lanes[lane].values[exchange % 2] = value;
  for (uint32_t other = 0; other < kWarp; ++other) {
    while ((mask >> other & 1) && lanes[other].exchanges < exchange) {
      if (lanes[other].ended) std::abort();  // undefined as well
      swapcontext(&lanes[lane].context, &scheduler);
    }
  }
  return lanes[lane ^ offset].values[exchange % 2];
}

inline void run_warp(uint32_t first_thread) {
  for (Lane& lane : lanes) {
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = &scheduler;
    lane.ended = false, lane.exchanges = 0;
    makecontext(&lane.context, +[] { thread_of_block(), lanes[threadIdx.x % kWarp].ended = true; }, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (uint32_t i = 0; i < kWarp; ++i) {
      if (lanes[i].ended) continue;
      threadIdx.x = first_thread + i;
      swapcontext(&scheduler, &lanes[i].context);
      running |= !lanes[i].ended;
    }
  }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t threads, const torch::stable::Tensor&, const Arguments&... arguments) {
  thread_of_block = [&] { kernel(arguments...); };
  for (int64_t block = 0; block * kThreads < threads; ++block) {
    blockIdx.x = static_cast<uint32_t>(block);
    for (uint32_t first = 0; first < kThreads; first += kWarp) run_warp(first);
  }
}

}  // namespace
}  // namespace fastgpt
