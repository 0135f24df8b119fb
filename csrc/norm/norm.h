// The arguments of the CPU kernels of `norm`, and how `linear` and it normalize a row.

#pragma once

#include <cstdint>

#include "common/elements.h"

namespace fastgpt {

// A row x of `count` numbers becomes (x - mean) / sqrt(variance + eps) · (weight + offset) + bias, or if `rms`
// x / sqrt(mean of squares + eps) · (weight + offset) + bias. Weight and bias have the rows' element type.
struct Norm {
  const void* weight;  // (count,), or null: rows stay as they are
  const void* bias;    // (count,) or null
  float eps, offset;
  bool rms;
};

// Contiguous rows of a tensor, wherever they lie: sizes and strides (in bytes) of the other dimensions, the innermost first.
constexpr int kRowDims = 3;
struct StridedRows {
  const char* data = nullptr;
  int64_t sizes[kRowDims] = {1, 1, 1}, strides[kRowDims] = {};
};

struct NormRows {
  Element element;
  int64_t rows, count;
  Norm norm;
  StridedRows x, residual;  // residual.data may be null
  void* out;                // (rows, count), contiguous
};

namespace {

// Floats of a row as kernels keep it, filled up with zeros to whole vectors.
constexpr int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

}  // namespace
}  // namespace fastgpt
