// Runs CUDA kernels on the host, for machines without a GPU: a stand-in for csrc/cuda_launch.h. A thread of a block is a thread of the host, so that the lanes of a shuffle can wait for each other.

#pragma once

#include <barrier>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#define CUDA CPU  // the operations' dispatch key
#define __global__
#define __device__
#define __launch_bounds__(threads)

struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct Dim3 { uint32_t x; };

namespace fastgpt {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

thread_local Dim3 threadIdx, blockIdx;

// The lanes of one mask of one warp.
struct Exchange {
  explicit Exchange(int lanes) : barrier(lanes) {}
  std::barrier<> barrier;
  float values[kWarp];
};
std::map<std::pair<uint32_t, uint32_t>, std::unique_ptr<Exchange>> exchanges;  // by warp and mask
std::mutex exchanges_mutex;

inline float __shfl_xor_sync(uint32_t mask, float value, uint32_t offset) {
  const uint32_t lane = threadIdx.x % kWarp;
  if (!(mask >> lane & 1) || !(mask >> (lane ^ offset) & 1)) std::abort();  // undefined on a GPU
  Exchange* exchange;
  {
    const std::lock_guard lock(exchanges_mutex);
    auto& entry = exchanges[{threadIdx.x / kWarp, mask}];
    if (!entry) entry = std::make_unique<Exchange>(__builtin_popcount(mask));
    exchange = entry.get();
  }
  exchange->values[lane] = value;
  exchange->barrier.arrive_and_wait();
  const float result = exchange->values[lane ^ offset];
  exchange->barrier.arrive_and_wait();
  return result;
}

template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...), int64_t threads, const torch::stable::Tensor&, const Arguments&... arguments) {
  for (int64_t block = 0; block * kThreads < threads; ++block) {
    exchanges.clear();
    std::vector<std::thread> running;
    for (int i = 0; i < kThreads; ++i) {
      running.emplace_back([=] {
        threadIdx.x = i, blockIdx.x = static_cast<uint32_t>(block);
        kernel(arguments...);
      });
    }
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace
}  // namespace fastgpt
