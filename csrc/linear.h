// The arguments of the CPU kernels of `linear`: out = activation(norm(x) weight^T + bias) + residual. Of many rows of x, the
// product is PyTorch's, and the kernels do what follows it.

#pragma once

#include <cstdint>

#include "elements.h"

namespace fastgpt {

constexpr int64_t kMaxRows = 32;   // that the kernels multiply
constexpr int64_t kFeatures = 64;  // that are finished at a time

// Everything is contiguous and of one element type; what may be null is left out.
struct Linear {
  Element element;
  int64_t rows, in, out_features;
  const void* x;            // (rows, in)
  const void* weight;       // (out_features, in)
  const void* bias;         // (out_features,) or null
  const void* residual;     // (rows, out_features) or null
  const void* norm_weight;  // (in,), or null: x is not normalised
  const void* norm_bias;    // (in,) or null
  float norm_eps;
  bool gelu;
  void* out;  // (rows, out_features)

  // Floats of a row of x as the kernels read it, filled up with zeros to whole vectors.
  int64_t padded() const { return (in + 15) / 16 * 16; }
};

}  // namespace fastgpt
