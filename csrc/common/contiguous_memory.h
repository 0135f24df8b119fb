// Contiguous memory for the tensors of an operation that needs it.

#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/tensors.h"

namespace fastgpt {
namespace {

using torch::stable::Tensor;

inline std::vector<int64_t> shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

// Checks tensors, which must have the first one's dtype, and returns their memory; copies those that are not contiguous.
class ContiguousMemory {
 public:
  ContiguousMemory(const Tensor& x, const char* name)
      : element_(floating_element_of(x, name)), dtype_(dtype_of(x)), size_(size_of(element_)) {}

  Element element() const { return element_; }

  void check(const Tensor& tensor, const char* name) const {
    FASTGPT_CHECK(dtype_of(tensor) == dtype_, name, ": expected the dtype of the other tensors");
    check_cpu(tensor, name);
    check_storage(tensor, name, size_);
  }

  const void* of(const Tensor& tensor, const char* name) {
    check(tensor, name);
    if (tensor.is_contiguous()) return tensor.const_data_ptr();
    return copies_.emplace_back(torch::stable::contiguous(tensor)).const_data_ptr();
  }

  const void* of(const std::optional<Tensor>& tensor, const char* name, const std::vector<int64_t>& shape) {
    if (!tensor) return nullptr;
    check_shape(*tensor, name, shape);
    return of(*tensor, name);
  }

  bool copied() const { return !copies_.empty(); }

 private:
  Element element_;
  int32_t dtype_;
  int64_t size_;
  std::vector<Tensor> copies_;
};

}  // namespace
}  // namespace fastgpt
