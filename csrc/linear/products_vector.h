// The products of `linear` in vectors of floats. Weights are not repacked: with few rows of x, products take no longer than
// reading the weights.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include <type_traits>

#include "common/stored_elements.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Weight rows that are read concurrently: Intel's hardware prefetcher works within a page of memory, so a single row is read
// 20% slower than several adjacent ones. AMD's follows a single stream across pages, up to 40% faster than several in one page;
// but with a single row of x, each multiply-add of a single stream would wait for the one before, so one row of each half of a
// block of features is read. With more rows of x arithmetic is the bottleneck. On Intel, rows that
// are multiplied with a single row of x are a quarter of a block apart, as short ones would share a page.
constexpr int kMostStreams = 4;
// Minimum prefetch distance in bytes. Prefetches go into the L2 cache: on AMD, the L1 cache has too few outstanding misses to
// hide the memory's latency, and reads at half of the speed.
constexpr int64_t kLead = 8192;
// Rows of x that are multiplied at a time: registers hold all accumulators. With 4 x 4 accumulators, lanes are reduced for
// several sums at once; up to six rows, if there are no more, take about as long as reading the weights.
constexpr int kRows = kWidth == 16 ? 4 : kWidth == 8 ? 3 : 2;
constexpr int kMostRows = kWidth == 16 ? 6 : kRows;
// Independent accumulators of each dot product. NEON's vectors have 4 lanes: with one accumulator per weight row, the latency
// of multiply-adds would be the bottleneck, not memory.
#if defined(__aarch64__)
constexpr int kSumsOfDot = 2;
#else
constexpr int kSumsOfDot = 1;
#endif

// dots[i][s · apart] = sum_c x[i][c] · weight[s · apart][c] for kCount rows of x and kStreams rows of weights. If `next` is not
// 0, the weights that many bytes on are prefetched.
template <int kCount, int kStreams, typename T>
void multiply_rows(
    const float* x, int64_t x_row, const T* weight, int64_t in, int64_t apart, int64_t next, float* dots, int64_t dots_row) {
  Vector total[kCount][kStreams][kSumsOfDot];
  for (auto& of_row : total) {  // not by = {}, which GCC turns into a loop over memory
    for (auto& of_stream : of_row) {
      for (auto& sum : of_stream) sum = Vector{};
    }
  }
  int64_t c = 0;
  const auto add_products = [&](auto prefetches) __attribute__((always_inline)) {
    for (; c + kSumsOfDot * kWidth <= in; c += kSumsOfDot * kWidth) {
      for (int s = 0; s < kStreams; ++s) {
        const T* source = weight + s * apart * in + c;
        if constexpr (prefetches) __builtin_prefetch(reinterpret_cast<const char*>(source) + next, 0, 2);
        for (int v = 0; v < kSumsOfDot; ++v) {
          const Vector w = in_register(load(source + v * kWidth));
          for (int i = 0; i < kCount; ++i) total[i][s][v] += load(x + i * x_row + c + v * kWidth) * w;
        }
      }
    }
  };
  next ? add_products(std::true_type()) : add_products(std::false_type());
  for (int i = 0; i < kCount; ++i) {
    for (int s = 0; s < kStreams; ++s) {
      for (int v = 1; v < kSumsOfDot; ++v) total[i][s][0] += total[i][s][v];
    }
  }
  alignas(64) float sums_of_lanes[kCount * kStreams];
  constexpr int kTogether = kCount * kStreams / kWidth * kWidth;  // sums whose lanes are reduced at once
  for (int first = 0; first < kTogether; first += kWidth) {
    Vector lanes[kWidth];
    for (int j = 0; j < kWidth; ++j) lanes[j] = total[(first + j) / kStreams][(first + j) % kStreams][0];
    store(sums_of_lanes + first, sums(lanes));
  }
  for (int j = kTogether; j < kCount * kStreams; ++j) sums_of_lanes[j] = sum(in_register(total[j / kStreams][j % kStreams][0]));
  for (int i = 0; i < kCount; ++i) {
    for (int s = 0; s < kStreams; ++s) {
      float dot = sums_of_lanes[i * kStreams + s];
      for (int64_t rest = c; rest < in; ++rest) dot += x[i * x_row + rest] * static_cast<float>(weight[s * apart * in + rest]);
      dots[i * dots_row + s * apart] = dot;
    }
  }
}

// The same for a number of rows that is known only now, from 1 to kCount.
template <int kCount, int kStreams, typename T>
void multiply_up_to(
    int64_t rows, const float* x, int64_t x_row, const T* weight, int64_t in, int64_t apart, int64_t next, float* dots,
    int64_t dots_row) {
  if constexpr (kCount > 1) {
    if (rows < kCount) return multiply_up_to<kCount - 1, kStreams>(rows, x, x_row, weight, in, apart, next, dots, dots_row);
  }
  multiply_rows<kCount, kStreams>(x, x_row, weight, in, apart, next, dots, dots_row);
}

// The same for any number of rows of x.
template <int kStreams, typename T>
void multiply_blocks(
    const float* x, int64_t x_row, int64_t rows, const T* weight, int64_t in, int64_t apart, int64_t next, float* dots,
    int64_t dots_row) {
  for (int64_t count; rows > 0; rows -= count, next = 0) {
    count = rows <= kMostRows ? rows : rows == kRows + 1 ? kRows - 1 : kRows;  // a single one takes longer than its share
    multiply_up_to<kMostRows, kStreams>(count, x, x_row, weight, in, apart, next, dots, dots_row);
    x += count * x_row, dots += count * dots_row;
  }
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
