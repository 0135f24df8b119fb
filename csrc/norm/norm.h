// The arguments of the CPU kernels of `norm`, and of the norm in `linear`.

#pragma once

#include <cstdint>

#include "common/elements.h"

namespace fastgpt {

// A row x of `count` elements becomes (x - mean) / sqrt(variance + eps) · (weight + offset) + bias, or if `rms`
// x / sqrt(mean of squares + eps) · (weight + offset) + bias. Weight and bias have the rows' element type.
struct Norm {
  const void* weight;  // (count,), or null for no norm
  const void* bias;    // (count,) or null
  float eps, offset;
  bool rms;
};

// A tensor with contiguous rows: sizes and strides (in bytes) of the other dimensions, the innermost first.
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

// Floats of a row in scratch memory, zero-padded to whole vectors of any CPU level.
constexpr int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

}  // namespace
}  // namespace fastgpt
