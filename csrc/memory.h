// The memory of an operation's tensors.

#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "tensors.h"

namespace fastgpt {
namespace {

using torch::stable::Tensor;

inline std::vector<int64_t> shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

// Checks tensors and hands out their memory; copies what is not contiguous.
class Memory {
 public:
  explicit Memory(const Tensor& x) : dtype_(dtype_of(x)) {}

  const void* of(const Tensor& tensor) {
    STD_TORCH_CHECK(dtype_of(tensor) == dtype_, "expected tensors of one dtype");
    if (tensor.is_contiguous()) return tensor.const_data_ptr();
    return copies_.emplace_back(torch::stable::contiguous(tensor)).const_data_ptr();
  }

  const void* of(const std::optional<Tensor>& tensor, const char* name, const std::vector<int64_t>& shape) {
    if (!tensor) return nullptr;
    const auto sizes = tensor->sizes();
    STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), name, ": unexpected shape");
    return of(*tensor);
  }

  bool copied() const { return !copies_.empty(); }

 private:
  int32_t dtype_;
  std::vector<Tensor> copies_;
};

}  // namespace
}  // namespace fastgpt
