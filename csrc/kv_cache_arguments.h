// From tensors to KVCacheUpdate, with the checks that memory safety needs. The Python wrapper's checks say more; they run
// when one of these fails.

#pragma once

#include <optional>

#include <torch/headeronly/core/ScalarType.h>

#include "kv_cache.h"
#include "tensors.h"

namespace fastgpt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::float32;
    case ScalarType::Half: return Element::float16;
    case ScalarType::BFloat16: return Element::bfloat16;
    case ScalarType::Char: return Element::int8;
    case ScalarType::Float8_e4m3fn: return Element::float8_e4m3;
    default: STD_TORCH_CHECK(false, name, ": unexpected dtype");
  }
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& k) {
  STD_TORCH_CHECK(
      tensor.is_cuda() == k.is_cuda() && tensor.get_device_index() == k.get_device_index(), name,
      ": expected the device of k");
}

// (B, H, N, D) with contiguous rows, or (B, H, N) if D is 1 and ndim 3.
inline Rows rows_of(
    const Tensor& tensor, const char* name, Element element, const Tensor& k, const int64_t (&sizes)[4], bool writable,
    int64_t ndim = 4) {
  STD_TORCH_CHECK(element_of(tensor, name) == element, name, ": unexpected dtype");
  check_device(tensor, name, k);
  STD_TORCH_CHECK(tensor.dim() == ndim, name, ": expected ", ndim, " dimensions");
  for (int64_t i = 0; i < ndim; ++i) STD_TORCH_CHECK(tensor.size(i) == sizes[i], name, ": unexpected shape");
  STD_TORCH_CHECK(
      ndim == 3 || tensor.stride(3) == 1 || sizes[3] <= 1, name, ": expected a contiguous last dimension");
  void* data = writable ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  const int64_t size = size_of(element);
  return {static_cast<char*>(data), tensor.stride(0) * size, tensor.stride(1) * size, tensor.stride(2) * size};
}

inline Indices indices_of(const Tensor& tensor, const char* name, const Tensor& k) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, name, ": expected dtype int32 or int64");
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(0) == k.size(0) && tensor.size(1) == k.size(2), name, ": expected shape (B, T)");
  check_device(tensor, name, k);
  return {tensor.const_data_ptr(), dtype == ScalarType::Long, tensor.stride(0), tensor.stride(1)};
}

inline KVCacheUpdate kv_cache_arguments(
    const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale) {
  KVCacheUpdate u{};
  STD_TORCH_CHECK(k.dim() == 4 && k_cache.dim() == 4, "k, k_cache: expected 4 dimensions");
  u.B = k.size(0), u.H_kv = k.size(1), u.T = k.size(2), u.D = k.size(3);
  u.element = element_of(k, "k");
  STD_TORCH_CHECK(size_of(u.element) > 1, "k: expected dtype float32, float16 or bfloat16");
  u.k = rows_of(k, "k", u.element, k, {u.B, u.H_kv, u.T, u.D}, false);
  u.v = rows_of(v, "v", u.element, k, {u.B, u.H_kv, u.T, u.D}, false);
  u.slots = indices_of(slots, "positions", k);

  const int64_t rows = k_cache.size(2);
  u.capacity = rows;
  int64_t first = u.B;
  if (block_table) {
    STD_TORCH_CHECK(
        block_table->scalar_type() == ScalarType::Int && block_table->dim() == 2 && block_table->size(0) == u.B,
        "block_table: expected (B, pages) int32");
    check_device(*block_table, "block_table", k);
    first = k_cache.size(0);
    u.page = rows, u.pages = first, u.capacity = rows * block_table->size(1);
    STD_TORCH_CHECK(u.capacity < int64_t{1} << 32, "block_table: expected slots for less than 2^32 tokens");
    u.block_table = static_cast<const int32_t*>(block_table->const_data_ptr());
    u.table_stride_b = block_table->stride(0), u.table_stride_p = block_table->stride(1);
  }
  u.cache_element = element_of(k_cache, "k_cache");
  u.k_cache = rows_of(k_cache, "k_cache", u.cache_element, k, {first, u.H_kv, rows, u.D}, true);
  u.v_cache = rows_of(v_cache, "v_cache", u.cache_element, k, {first, u.H_kv, rows, u.D}, true);

  const bool quantised = size_of(u.cache_element) == 1;
  STD_TORCH_CHECK(quantised || u.cache_element == u.element, "k_cache: expected the dtype of k, int8 or float8_e4m3fn");
  STD_TORCH_CHECK(
      k_scale.has_value() == quantised && v_scale.has_value() == quantised,
      "k_scale, v_scale: expected for int8 and float8_e4m3fn caches, and only for them");
  STD_TORCH_CHECK(!quantised || u.D <= kMaxTransformedDim, "k: expected a head dim up to ", kMaxTransformedDim);
  if (quantised) {
    u.k_scale = rows_of(*k_scale, "k_scale", Element::float32, k, {first, u.H_kv, rows, 1}, true, 3);
    u.v_scale = rows_of(*v_scale, "v_scale", Element::float32, k, {first, u.H_kv, rows, 1}, true, 3);
  }
  return u;
}

// Adds q and its rotation to u. Returns the tensor for the rotated q, contiguous.
inline Tensor add_rotation(
    KVCacheUpdate& u, const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos, const Tensor& sin,
    bool interleaved) {
  STD_TORCH_CHECK(q.dim() == 4, "q: expected 4 dimensions");
  u.H = q.size(1);
  u.q = rows_of(q, "q", u.element, k, {u.B, u.H, u.T, u.D}, false);
  u.positions = indices_of(positions, "positions", k);
  u.interleaved = interleaved;
  STD_TORCH_CHECK(cos.dim() == 2 && sin.dim() == 2, "cos, sin: expected 2 dimensions");
  u.angles = cos.size(0), u.rotary_dim = 2 * cos.size(1);
  STD_TORCH_CHECK(u.D <= kMaxTransformedDim, "q: expected a head dim up to ", kMaxTransformedDim);
  STD_TORCH_CHECK(u.rotary_dim >= 2 && u.rotary_dim <= u.D, "cos: expected from 1 to D / 2 columns");
  const auto table = [&](const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(
        tensor.scalar_type() == ScalarType::Float && tensor.size(0) == u.angles && 2 * tensor.size(1) == u.rotary_dim &&
            (tensor.stride(1) == 1 || u.rotary_dim == 2),
        name, ": expected (positions, rotary_dim / 2) float32 with contiguous rows");
    check_device(tensor, name, k);
    return static_cast<const float*>(tensor.const_data_ptr());
  };
  u.cos = table(cos, "cos"), u.cos_stride = cos.stride(0);
  u.sin = table(sin, "sin"), u.sin_stride = sin.stride(0);

  const Tensor q_out = new_empty(
      q, {u.B, u.H, u.T, u.D}, {u.H * u.T * u.D, u.T * u.D, u.D, int64_t{1}}, dtype_of(q));
  u.q_out = rows_of(q_out, "q_out", u.element, k, {u.B, u.H, u.T, u.D}, true);
  return q_out;
}

}  // namespace
}  // namespace fastgpt
