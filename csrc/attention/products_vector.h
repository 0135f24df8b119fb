// The products of attention in vectors of floats: see attention_products.h.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "attention/attention.h"
#include "common/integers.h"
#include "common/matrices.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Operands are floats in place. Strides in floats.
struct Left {
  const float* data;
  int64_t row, k;  // strides of a row, and along k

  Left from(int64_t i, int64_t first) const { return {data + i * row + first * k, row, k}; }
};
struct Right {
  float* data;
  int64_t k;  // stride along k; columns are contiguous

  Right from(int64_t first, int64_t j) const { return {data + first * k + j, k}; }
};

constexpr int64_t kStep = 2, kPanel = kTileVectors * kWidth;
// Terms per partial sum of a long sum: a single running sum would have a larger rounding error than the reference.
constexpr int64_t kPiece = 32;

constexpr int pieces_of(Element) { return 3; }
constexpr int64_t operand_size(int64_t n, int64_t K) { return n * K; }

struct Tiles {
  Tiles() {}  // not trivial, so that compilers do not warn of an unused variable
};

template <typename Function>
inline void with_pieces(int, const Function& function) {
  function(std::integral_constant<int, 0>());
}

inline Left left_of_rows(const float* rows, int64_t stride, int64_t, int64_t, int, float*) { return {rows, stride, 1}; }
inline Left left_of_columns(const float* rows, int64_t stride, int64_t, int64_t, int, float*) { return {rows, 1, stride}; }
inline Right right_of_rows(float* rows, int64_t stride, int64_t, int64_t, int, float*) { return {rows, stride}; }

inline Right new_right(int64_t, int64_t columns, int, float* memory) { return {memory, columns}; }

template <int>
inline void store_rows(const Right& right, int64_t k, int64_t j, Vector a, Vector b) {
  store(right.data + k * right.k + j, a);
  store(right.data + (k + 1) * right.k + j, b);
}

inline void multiply(const Left& left, const Right& right, int64_t rows, int64_t columns, int64_t K, float* c, int64_t stride) {
  for (int64_t k = 0; k < K; k += kPiece) {
    const Left a = left.from(0, k);
    const Right b = right.from(k, 0);
    multiply<kTileRows, kTileVectors>(
        rows, columns / kWidth, a.data, a.row, a.k, b.data, b.k, c, stride, smaller(K - k, kPiece), k > 0);
  }
}

inline void multiply_add(
    const Left& left, const Right& right, int64_t rows, int64_t columns, int64_t K, float* c, int64_t stride,
    const float* factors = nullptr) {
  multiply<kTileRows, kTileVectors>(
      rows, columns / kWidth, left.data, left.row, left.k, right.data, right.k, c, stride, K, true, factors);
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
