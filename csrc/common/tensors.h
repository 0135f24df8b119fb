// Checks of tensor arguments that memory safety needs, and functions that the stable ABI lacks or that are slow in it.
//
// Every tensor argument goes through these functions, which check dtype, device, shape, layout and storage before they return
// an address. Messages begin with the argument's name; the Python wrappers turn them into a TypeError or ValueError with
// details.

#pragma once

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/elements.h"

// Like STD_TORCH_CHECK, but the message begins with the argument's name, not with the file's.
#define FASTGPT_CHECK(condition, ...)                  \
  do {                                                 \
    if (!(condition)) fastgpt::fail(__VA_ARGS__);      \
  } while (false)

namespace fastgpt {
namespace {

template <typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The dtype's code in PyTorch's C interface.
inline int32_t dtype_of(const torch::stable::Tensor& x) {
  int32_t dtype;
  FASTGPT_CHECK(aoti_torch_get_dtype(x.get(), &dtype) == 0, "cannot read a tensor's dtype");
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
    default: FASTGPT_CHECK(false, name, ": unexpected dtype");
  }
}

// Requires one of the formats that kernels compute on.
inline Element floating_element_of(const torch::stable::Tensor& x, const char* name) {
  const Element element = element_of(x, name);
  FASTGPT_CHECK(size_of(element) > 1, name, ": expected dtype float32, float16 or bfloat16");
  return element;
}

inline void check_dtype(const torch::stable::Tensor& x, const char* name, torch::headeronly::ScalarType dtype) {
  FASTGPT_CHECK(x.scalar_type() == dtype, name, ": unexpected dtype");
}

inline bool is_on_cpu(const torch::stable::Tensor& x) {
  int32_t device_type;
  return aoti_torch_get_device_type(x.get(), &device_type) == 0 && device_type == aoti_torch_device_type_cpu();
}

inline void check_cpu(const torch::stable::Tensor& x, const char* name) {
  FASTGPT_CHECK(is_on_cpu(x), name, ": expected a tensor on the CPU");
}

inline void check_shape(const torch::stable::Tensor& x, const char* name, const int64_t* sizes, size_t dims) {
  const auto actual = x.sizes();
  FASTGPT_CHECK(std::equal(actual.begin(), actual.end(), sizes, sizes + dims), name, ": unexpected shape");
}
inline void check_shape(const torch::stable::Tensor& x, const char* name, std::initializer_list<int64_t> sizes) {
  check_shape(x, name, sizes.begin(), sizes.size());
}
inline void check_shape(const torch::stable::Tensor& x, const char* name, const std::vector<int64_t>& sizes) {
  check_shape(x, name, sizes.data(), sizes.size());
}

// Checks that a tensor's elements, of `size` bytes each, lie within its storage, which may have been resized. The caller passes
// sizes and strides if it has read them: each read is a call through PyTorch's C interface.
inline void check_storage(
    const torch::stable::Tensor& x, const char* name, int64_t size, torch::headeronly::IntHeaderOnlyArrayRef sizes,
    torch::headeronly::IntHeaderOnlyArrayRef strides) {
  int64_t last = 0;  // index of the last element
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return;
    last += (sizes[i] - 1) * strides[i];
  }
  int64_t offset, bytes;
  FASTGPT_CHECK(
      aoti_torch_get_storage_offset(x.get(), &offset) == 0 && aoti_torch_get_storage_size(x.get(), &bytes) == 0 &&
          (offset + last + 1) * size <= bytes,
      name, ": expected a storage that holds the tensor");
}
inline void check_storage(const torch::stable::Tensor& x, const char* name, int64_t size) {
  check_storage(x, name, size, x.sizes(), x.strides());
}

// The data of a tensor whose dtype, of `size` bytes, has been checked.
inline const void* data_of(const torch::stable::Tensor& x, const char* name, int64_t size) {
  check_storage(x, name, size);
  return x.const_data_ptr();
}
inline void* mutable_data_of(const torch::stable::Tensor& x, const char* name, int64_t size) {
  check_storage(x, name, size);
  return x.mutable_data_ptr();
}

// An uninitialized tensor on the device of `like`. torch::stable::new_empty goes through the boxed dispatcher: two calls
// and a transpose cost more than the attention of a decode step.
inline torch::stable::Tensor new_empty(
    const torch::stable::Tensor& like, int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  int32_t device_type, device_index;
  AtenTensorHandle handle;
  FASTGPT_CHECK(
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

// An uninitialized contiguous tensor with the dtype and device of `like`.
inline torch::stable::Tensor new_empty(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return new_empty(like, sizes.size(), sizes.data(), strides.data(), dtype_of(like));
}

}  // namespace
}  // namespace fastgpt
