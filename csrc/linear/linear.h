// The arguments of the CPU kernels of `linear`: out = residual + activation(norm(x) weight^T + bias), or if gated the
// activation of the product's first half times the second. Where PyTorch's product of many rows of x is faster, the kernels do
// the epilogue alone.

#pragma once

#include <cstdint>

#include "common/elements.h"
#include "norm/norm.h"

namespace fastgpt {

constexpr int64_t kMaxRows = 64;   // rows of x that the kernels of few rows multiply at a time
constexpr int64_t kRowBlock = 16;  // rows of x that are prepared (normalized, converted) at a time
constexpr int64_t kFeatures = 64;  // output features of a step of the epilogue; half of it if gated

// As ACTIVATIONS in fastgpt/ops/linear.py, and after them the gated ones of fastgpt/ops/experts.py.
enum class Activation : int64_t { none, gelu_tanh, gelu, silu, relu, swiglu_clamped };

// How quantized weights are stored, see Packing in fastgpt/ops/quantized_weight.py.
struct Packing {
  int64_t bits;  // 8 or 4, or 0: weights are not quantized
  int64_t group_size;
  bool minima;
  int64_t block_type;  // GGML's number of a type of blocks; 0: groups of `group_size` numbers of `bits` bits

  int64_t header() const { return minima ? 4 : 2; }
  int64_t row_bytes(int64_t in) const { return in / group_size * (header() + group_size * bits / 8); }  // without block_type
};
constexpr int64_t kPacked = 32;  // weights that are packed together

// All tensors are contiguous; optional ones may be null.
struct Linear {
  Element element;  // of weights that are not quantized, bias, residual and norm
  Element x_element, out_element;
  int64_t rows, in, out_features;
  bool many;              // of an operation with more than kMaxRows rows: results need not have the bits that few rows give
  const void* x;          // (rows, in), or with x_rows (any number, in)
  const int64_t* x_rows;  // (rows,): which rows of x these are, or null: all
  const void* weight;     // (weight_rows(), in), or (weight_rows(), packing.row_bytes(in)) bytes
  const void* bias;       // (weight_rows(),) or null
  const void* residual;   // (rows, out_features) or null
  Norm norm;
  Activation activation;
  bool gated;
  Packing packing;
  const float* values_of_halves;  // of quantized weights: the values of all 65,536 float16
  void* out;                      // (rows, out_features)

  int64_t weight_rows() const { return gated ? 2 * out_features : out_features; }
  int64_t row_blocks() const { return (rows + kRowBlock - 1) / kRowBlock; }
};

}  // namespace fastgpt
