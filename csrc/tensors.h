// Tensors as the kernels take them, and what the stable ABI lacks or does slowly.

#pragma once

#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "elements.h"

namespace fastgpt {
namespace {

// The dtype's number in the C interface.
inline int32_t dtype_of(const torch::stable::Tensor& x) {
  int32_t dtype;
  STD_TORCH_CHECK(aoti_torch_get_dtype(x.get(), &dtype) == 0, "cannot read a tensor's dtype");
  return dtype;
}

inline Element element_of(const torch::stable::Tensor& x, const char* name) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return Element::float32;
    case ScalarType::Half: return Element::float16;
    case ScalarType::BFloat16: return Element::bfloat16;
    case ScalarType::Char: return Element::int8;
    case ScalarType::Float8_e4m3fn: return Element::float8_e4m3;
    default: STD_TORCH_CHECK(false, name, ": unexpected dtype");
  }
}

// An uninitialised tensor on the device of `like`. torch::stable::new_empty goes through the boxed dispatcher: two of
// them and a transpose cost more than a decode step's attention.
inline torch::stable::Tensor new_empty(
    const torch::stable::Tensor& like, int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  int32_t device_type, device_index;
  AtenTensorHandle handle;
  STD_TORCH_CHECK(
      aoti_torch_get_device_type(like.get(), &device_type) == 0 &&
          aoti_torch_get_device_index(like.get(), &device_index) == 0 &&
          aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle) == 0,
      "cannot allocate the output");
  return torch::stable::Tensor(handle);
}

template <size_t N>
torch::stable::Tensor new_empty(
    const torch::stable::Tensor& like, const int64_t (&sizes)[N], const int64_t (&strides)[N], int32_t dtype) {
  return new_empty(like, N, sizes, strides, dtype);
}

// A contiguous one of the dtype of `like`.
inline torch::stable::Tensor new_empty(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return new_empty(like, sizes.size(), sizes.data(), strides.data(), dtype_of(like));
}

}  // namespace
}  // namespace fastgpt
