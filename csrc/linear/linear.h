// The arguments of the CPU kernels of `linear`: out = residual + activation(norm(x) weight^T + bias), or if gated the
// activation of the product's first half times the second. Where PyTorch's product of many rows of x is faster, the kernels do
// the epilogue alone.

#pragma once

#include <cstdint>

#include "common/elements.h"
#include "norm/norm.h"

namespace fastgpt {

constexpr int64_t kMaxRows = 64;   // rows of x that the kernels multiply at a time
constexpr int64_t kRowBlock = 16;  // rows of x that are prepared (normalized, converted) at a time
constexpr int64_t kFeatures = 64;  // output features of a step of the epilogue; half of it if gated

enum class Activation : int64_t { none, gelu_tanh, gelu, silu, relu };  // as ACTIVATIONS in fastgpt/ops/linear.py

// All tensors are contiguous and of one element type; optional ones may be null.
struct Linear {
  Element element;
  int64_t rows, in, out_features;
  const void* x;         // (rows, in)
  const void* weight;    // (weight_rows(), in)
  const void* bias;      // (weight_rows(),) or null
  const void* residual;  // (rows, out_features) or null
  Norm norm;
  Activation activation;
  bool gated;
  void* out;  // (rows, out_features)

  int64_t weight_rows() const { return gated ? 2 * out_features : out_features; }
  int64_t row_blocks() const { return (rows + kRowBlock - 1) / kRowBlock; }
};

}  // namespace fastgpt
