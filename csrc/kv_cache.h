// What the CPU and CUDA implementations of kv_cache_update share: the checks that keep memory safe,
// and the arithmetic from (batch, head, token) to addresses. Semantics: fastgpt/ops/kv_cache_update.py.

#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__CUDACC__)
#define FASTGPT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTGPT_HOST_DEVICE inline
#endif

namespace fastgpt {

// A tensor (B, H, N, D) with contiguous rows of D elements. Strides are in bytes.
struct Rows {
  char* data;
  int64_t stride_b, stride_h, stride_n;

  FASTGPT_HOST_DEVICE char* row(int64_t b, int64_t h, int64_t n) const {
    return data + b * stride_b + h * stride_h + n * stride_n;
  }
};

// Where each token goes: (B, T), Index is int32_t or int64_t. Strides are in elements.
template <typename Index>
struct Positions {
  const Index* data;
  int64_t stride_b, stride_t;

  FASTGPT_HOST_DEVICE int64_t at(int64_t b, int64_t t) const {
    return data[b * stride_b + t * stride_t];
  }
};

// True if a token at this position is to be stored; negative positions mean "skip".
FASTGPT_HOST_DEVICE bool is_slot(int64_t position, int64_t capacity) {
  return position >= 0 && position < capacity;
}

struct KVCacheUpdate {
  int64_t batch, heads, tokens, capacity;  // B, H_kv, T, S
  int64_t row_bytes;                       // D elements
  Rows k, v, k_cache, v_cache;
};

inline Rows rows_of(const torch::stable::Tensor& tensor, int64_t itemsize, bool writable) {
  void* data = writable ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  const auto strides = tensor.strides();
  return {static_cast<char*>(data), strides[0] * itemsize, strides[1] * itemsize, strides[2] * itemsize};
}

// Checks what memory safety needs (the Python wrapper's checks come first and say more) and unpacks.
inline KVCacheUpdate unpack_kv_cache_update(
    const torch::stable::Tensor& k,
    const torch::stable::Tensor& v,
    const torch::stable::Tensor& k_cache,
    const torch::stable::Tensor& v_cache,
    const torch::stable::Tensor& positions) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = k.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      "k: expected dtype float32, float16 or bfloat16");
  STD_TORCH_CHECK(k.dim() == 4, "k: expected (B, H_kv, T, D), got ", k.dim(), " dimensions");
  const auto sizes = k.sizes();
  const int64_t capacity = k_cache.dim() == 4 ? k_cache.size(2) : 0;

  const auto check = [&](const torch::stable::Tensor& tensor, const char* name, int64_t rows) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected the dtype of k");
    STD_TORCH_CHECK(
        tensor.get_device_index() == k.get_device_index(), name, ": expected the device of k");
    const auto shape = tensor.sizes();
    STD_TORCH_CHECK(
        shape.size() == 4 && shape[0] == sizes[0] && shape[1] == sizes[1] && shape[2] == rows &&
            shape[3] == sizes[3],
        name, ": expected shape (", sizes[0], ", ", sizes[1], ", ", rows, ", ", sizes[3], ")");
    STD_TORCH_CHECK(
        tensor.stride(3) == 1 || shape[3] <= 1, name, ": expected a contiguous last dimension");
  };
  check(k, "k", sizes[2]);
  check(v, "v", sizes[2]);
  check(k_cache, "k_cache", capacity);
  check(v_cache, "v_cache", capacity);

  const ScalarType index = positions.scalar_type();
  STD_TORCH_CHECK(
      index == ScalarType::Int || index == ScalarType::Long,
      "positions: expected dtype int32 or int64");
  STD_TORCH_CHECK(
      positions.dim() == 2 && positions.size(0) == sizes[0] && positions.size(1) == sizes[2],
      "positions: expected shape (", sizes[0], ", ", sizes[2], ")");
  STD_TORCH_CHECK(
      positions.is_cuda() == k.is_cuda() && positions.get_device_index() == k.get_device_index(),
      "positions: expected the device of k");

  const int64_t itemsize = dtype == ScalarType::Float ? 4 : 2;
  return {
      sizes[0],
      sizes[1],
      sizes[2],
      capacity,
      sizes[3] * itemsize,
      rows_of(k, itemsize, false),
      rows_of(v, itemsize, false),
      rows_of(k_cache, itemsize, true),
      rows_of(v_cache, itemsize, true)};
}

template <typename Index>
Positions<Index> positions_of(const torch::stable::Tensor& positions) {
  return {
      static_cast<const Index*>(positions.const_data_ptr()),
      positions.stride(0),
      positions.stride(1)};
}

}  // namespace fastgpt
