// Matrices of floats: products and transposes.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include <type_traits>

#include "common/vectors.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

struct Nothing {
  void operator()() const {}
};

constexpr int64_t kAtATime = 16;  // terms of a sum, after which `meanwhile` is called

// c[i][j] (+)= sum_k a[i][k] · b[k][j] for i < kRows and j < kVectors vectors, and c[i][j] · factors[j] in place of c[i][j]
// if there are factors. Strides in elements. The old value of c is added last, so that the rounding error of a long sum grows
// with the number of blocks, not of terms.
template <int kRows, int kVectors, typename Meanwhile>
inline void multiply_tile(
    const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, float* c, int64_t c_row, int64_t K,
    bool accumulate, const float* factors, const Meanwhile& meanwhile) {
  Vector total[kRows][kVectors] = {};
  const auto add = [&](int64_t k, int64_t end) __attribute__((always_inline)) {
    for (; k < end; ++k) {
      Vector row[kVectors];
      for (int j = 0; j < kVectors; ++j) row[j] = load(b + k * b_k + j * kWidth);
      for (int i = 0; i < kRows; ++i) {
        const Vector factor = broadcast(a[i * a_row + k * a_k]);
        for (int j = 0; j < kVectors; ++j) total[i][j] += factor * row[j];
      }
    }
  };
  if constexpr (std::is_same_v<Meanwhile, Nothing>) {
    add(0, K);
  } else {
    for (int64_t k = 0; k < K; k += kAtATime) {
      meanwhile();
      add(k, k + kAtATime < K ? k + kAtATime : K);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* target = c + i * c_row + j * kWidth;
      if (factors) {
        total[i][j] += load(target) * load(factors + j * kWidth);
      } else if (accumulate) {
        total[i][j] += load(target);
      }
      store(target, total[i][j]);
    }
  }
}

// The same for any number of rows and vectors, tile by tile.
template <int kRows, int kVectors, typename Meanwhile = Nothing>
inline void multiply(
    int64_t rows, int64_t vectors, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, float* c,
    int64_t c_row, int64_t K, bool accumulate, const float* factors = nullptr, const Meanwhile& meanwhile = {}) {
  for (; rows >= kRows; rows -= kRows, a += kRows * a_row, c += kRows * c_row) {
    const auto tile = [&](auto count, int64_t j) {
      multiply_tile<kRows, decltype(count)::value>(
          a, a_row, a_k, b + j, b_k, c + j, c_row, K, accumulate, factors ? factors + j : nullptr, meanwhile);
    };
    int64_t j = 0;
    for (; j + kVectors <= vectors; j += kVectors) tile(std::integral_constant<int, kVectors>(), j * kWidth);
    for (; j < vectors; ++j) tile(std::integral_constant<int, 1>(), j * kWidth);
  }
  if constexpr (kRows > 1) {
    if (rows) {
      multiply<kRows - 1, kVectors>(rows, vectors, a, a_row, a_k, b, b_k, c, c_row, K, accumulate, factors, meanwhile);
    }
  }
}

// target (lanes, target_stride) = source (lines, source_stride) transposed, in whole blocks of kWidth lines and lanes.
inline void transpose_matrix(
    const float* source, int64_t source_stride, int64_t lines, float* target, int64_t target_stride, int64_t lanes) {
  for (int64_t i = 0; i < lines; i += kWidth) {
    for (int64_t j = 0; j < lanes; j += kWidth) {
      Vector block[kWidth];
      for (int64_t l = 0; l < kWidth; ++l) block[l] = load(source + (i + l) * source_stride + j);
      transpose(block);
      for (int64_t l = 0; l < kWidth; ++l) store(target + (j + l) * target_stride + i, block[l]);
    }
  }
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
