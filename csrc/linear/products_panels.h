// The products of `linear` with quantized weights and many rows of x: weights are dequantized a panel at a time, into the
// caches.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "common/integers.h"
#include "linear/linear.h"
#include "linear/products_vector.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

constexpr int64_t kPanel = 512;  // columns; a multiple of those of all blocks

// dots[i][s] = x[i] · weight[s] for kCount rows of x and `count` rows of the weights, up to kWidth, whose lanes are reduced
// together. `multiply(rows, total)` adds lanes of the products with kStreams of these to `total`: const uint8_t*[kStreams],
// Vector[kStreams][kCount]. They are neighbors, or if `apart`, where `count` is a multiple of their number, as far from each
// other as can be.
template <int kCount, int kStreams, typename Multiply>
__attribute__((always_inline)) inline void multiply_in_streams(
    const uint8_t* weight, int64_t row_bytes, int64_t count, bool apart, float* dots, const Multiply& multiply) {
  const int64_t distance = apart ? count / kStreams : 1;
  Vector lanes[kCount][kWidth] = {};
  for (int64_t s = 0; s < (apart ? distance : count); s += apart ? 1 : kStreams) {
    const auto row = [&](int j) { return smaller(s + j * distance, count - 1); };  // the last one perhaps several times
    const uint8_t* rows[kStreams];
    for (int j = 0; j < kStreams; ++j) rows[j] = weight + row(j) * row_bytes;
    Vector total[kStreams][kCount] = {};
    multiply(rows, total);
    for (int j = 0; j < kStreams; ++j) {
      for (int i = 0; i < kCount; ++i) lanes[i][row(j)] = total[j][i];
    }
  }
  for (int i = 0; i < kCount; ++i) {
    const Vector added = sums(lanes[i]);
    std::memcpy(dots + i * kFeatures, &added, count * sizeof(float));
  }
}

// dots[r][s] = x[r] · weight[s] for all rows of x and `count` rows of the weights.
// `rows.dequantize(row, c, columns, target)` gives columns c to c + columns of a row as floats.
template <typename Rows>
void multiply_panels(
    const Linear& l, const float* x, const uint8_t* weight, int64_t row_bytes, int64_t count, float* dots, const Rows& rows) {
  const int64_t x_row = padded(l.in);
  for (int64_t first = 0; first < count; first += kMostStreams, dots += kMostStreams) {
    const int64_t streams = smaller(count - first, kMostStreams);
    alignas(64) float panel[kMostStreams * kPanel], parts[kMaxRows][kMostStreams];
    for (int64_t r = 0; r < l.rows; ++r) {
      for (int64_t s = 0; s < streams; ++s) dots[r * kFeatures + s] = 0.0f;
    }
    for (int64_t c = 0; c < l.in; c += kPanel) {
      const int64_t columns = smaller(kPanel, l.in - c);
      for (int64_t s = 0; s < kMostStreams; ++s) {  // where fewer are left, the last several times
        rows.dequantize(weight + smaller(first + s, count - 1) * row_bytes, c, columns, panel + s * columns);
      }
      multiply_blocks<kMostStreams>(x + c, x_row, l.rows, panel, columns, 1, 0, parts[0], kMostStreams);
      for (int64_t r = 0; r < l.rows; ++r) {
        for (int64_t s = 0; s < streams; ++s) dots[r * kFeatures + s] += parts[r][s];
      }
    }
  }
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
