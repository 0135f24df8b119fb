// From tensors to KVCacheUpdate, with the checks that memory safety needs. The Python wrapper's checks say more; they run
// when one of these fails.

#pragma once

#include <optional>

#include "kv_cache.h"
#include "tensors.h"

namespace fastgpt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the checks need to know of a tensor, each read once: every read is a call through PyTorch's C interface.
struct Facts {
  Facts(const Tensor& tensor, const char* name)
      : tensor(tensor), name(name), sizes(tensor.sizes()), strides(tensor.strides()), is_cuda(tensor.is_cuda()),
        device_index(is_cuda ? tensor.get_device_index() : -1) {}

  int64_t dim() const { return static_cast<int64_t>(sizes.size()); }

  const Tensor& tensor;
  const char* name;
  torch::headeronly::IntHeaderOnlyArrayRef sizes, strides;
  bool is_cuda;
  int32_t device_index;
};

inline void check_device(const Facts& x, const Facts& k) {
  STD_TORCH_CHECK(x.is_cuda == k.is_cuda && x.device_index == k.device_index, x.name, ": expected the device of k");
}

// (B, H, N, D) with contiguous rows, or (B, H, N) if D is 1 and ndim 3.
inline Rows rows_of(
    const Facts& x, Element element, const Facts& k, const int64_t (&sizes)[4], bool writable, int64_t ndim = 4) {
  STD_TORCH_CHECK(element_of(x.tensor, x.name) == element, x.name, ": unexpected dtype");
  check_device(x, k);
  STD_TORCH_CHECK(x.dim() == ndim, x.name, ": expected ", ndim, " dimensions");
  for (int64_t i = 0; i < ndim; ++i) STD_TORCH_CHECK(x.sizes[i] == sizes[i], x.name, ": unexpected shape");
  STD_TORCH_CHECK(ndim == 3 || x.strides[3] == 1 || sizes[3] <= 1, x.name, ": expected a contiguous last dimension");
  void* data = writable ? x.tensor.mutable_data_ptr() : const_cast<void*>(x.tensor.const_data_ptr());
  const int64_t size = size_of(element);
  return {static_cast<char*>(data), x.strides[0] * size, x.strides[1] * size, x.strides[2] * size};
}

inline Indices indices_of(const Facts& x, const Facts& k) {
  const ScalarType dtype = x.tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, x.name, ": expected dtype int32 or int64");
  STD_TORCH_CHECK(
      x.dim() == 2 && x.sizes[0] == k.sizes[0] && x.sizes[1] == k.sizes[2], x.name, ": expected shape (B, T)");
  check_device(x, k);
  return {x.tensor.const_data_ptr(), dtype == ScalarType::Long, x.strides[0], x.strides[1]};
}

inline KVCacheUpdate kv_cache_arguments(
    const Tensor& k_tensor, const Tensor& v, const Tensor& k_cache_tensor, const Tensor& v_cache, const Tensor& slots,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale) {
  KVCacheUpdate u{};
  const Facts k(k_tensor, "k"), k_cache(k_cache_tensor, "k_cache");
  STD_TORCH_CHECK(k.dim() == 4 && k_cache.dim() == 4, "k, k_cache: expected 4 dimensions");
  u.B = k.sizes[0], u.H_kv = k.sizes[1], u.T = k.sizes[2], u.D = k.sizes[3];
  u.element = element_of(k_tensor, "k");
  STD_TORCH_CHECK(size_of(u.element) > 1, "k: expected dtype float32, float16 or bfloat16");
  u.k = rows_of(k, u.element, k, {u.B, u.H_kv, u.T, u.D}, false);
  u.v = rows_of({v, "v"}, u.element, k, {u.B, u.H_kv, u.T, u.D}, false);
  u.slots = indices_of({slots, "positions"}, k);

  const int64_t rows = k_cache.sizes[2];
  u.capacity = rows;
  int64_t first = u.B;
  if (block_table) {
    const Facts table(*block_table, "block_table");
    STD_TORCH_CHECK(
        block_table->scalar_type() == ScalarType::Int && table.dim() == 2 && table.sizes[0] == u.B,
        "block_table: expected (B, pages) int32");
    check_device(table, k);
    first = k_cache.sizes[0];
    u.page = rows, u.pages = first, u.capacity = rows * table.sizes[1];
    STD_TORCH_CHECK(u.capacity < int64_t{1} << 32, "block_table: expected slots for less than 2^32 tokens");
    u.block_table = static_cast<const int32_t*>(block_table->const_data_ptr());
    u.table_stride_b = table.strides[0], u.table_stride_p = table.strides[1];
  }
  u.cache_element = element_of(k_cache_tensor, "k_cache");
  u.k_cache = rows_of(k_cache, u.cache_element, k, {first, u.H_kv, rows, u.D}, true);
  u.v_cache = rows_of({v_cache, "v_cache"}, u.cache_element, k, {first, u.H_kv, rows, u.D}, true);

  const bool quantised = size_of(u.cache_element) == 1;
  STD_TORCH_CHECK(quantised || u.cache_element == u.element, "k_cache: expected the dtype of k, int8 or float8_e4m3fn");
  STD_TORCH_CHECK(
      k_scale.has_value() == quantised && v_scale.has_value() == quantised,
      "k_scale, v_scale: expected for int8 and float8_e4m3fn caches, and only for them");
  STD_TORCH_CHECK(!quantised || u.D <= kMaxTransformedDim, "k: expected a head dim up to ", kMaxTransformedDim);
  if (quantised) {
    u.k_scale = rows_of({*k_scale, "k_scale"}, Element::float32, k, {first, u.H_kv, rows, 1}, true, 3);
    u.v_scale = rows_of({*v_scale, "v_scale"}, Element::float32, k, {first, u.H_kv, rows, 1}, true, 3);
  }
  return u;
}

// Adds q and its rotation to u. Returns the tensor for the rotated q, contiguous.
inline Tensor add_rotation(
    KVCacheUpdate& u, const Tensor& q_tensor, const Tensor& k_tensor, const Tensor& positions, const Tensor& cos,
    const Tensor& sin, bool interleaved) {
  const Facts k(k_tensor, "k"), q(q_tensor, "q");
  STD_TORCH_CHECK(q.dim() == 4, "q: expected 4 dimensions");
  u.H = q.sizes[1];
  u.q = rows_of(q, u.element, k, {u.B, u.H, u.T, u.D}, false);
  u.positions = indices_of({positions, "positions"}, k);
  u.interleaved = interleaved;
  STD_TORCH_CHECK(u.D <= kMaxTransformedDim, "q: expected a head dim up to ", kMaxTransformedDim);
  const auto table = [&](const Facts& x, int64_t& stride) {
    STD_TORCH_CHECK(x.tensor.scalar_type() == ScalarType::Float && x.dim() == 2, x.name, ": expected 2-d float32");
    STD_TORCH_CHECK(x.strides[1] == 1 || x.sizes[1] == 1, x.name, ": expected contiguous rows");
    check_device(x, k);
    stride = x.strides[0];
    return static_cast<const float*>(x.tensor.const_data_ptr());
  };
  const Facts c(cos, "cos"), s(sin, "sin");
  u.cos = table(c, u.cos_stride), u.sin = table(s, u.sin_stride);
  u.angles = c.sizes[0], u.rotary_dim = 2 * c.sizes[1];
  STD_TORCH_CHECK(u.rotary_dim >= 2 && u.rotary_dim <= u.D, "cos: expected from 1 to D / 2 columns");
  STD_TORCH_CHECK(s.sizes[0] == c.sizes[0] && s.sizes[1] == c.sizes[1], "sin: expected the shape of cos");

  const Tensor q_out = new_empty(
      q_tensor, {u.B, u.H, u.T, u.D}, {u.H * u.T * u.D, u.T * u.D, u.D, int64_t{1}}, dtype_of(q_tensor));
  u.q_out = rows_of({q_out, "q_out"}, u.element, k, {u.B, u.H, u.T, u.D}, true);
  return q_out;
}

}  // namespace
}  // namespace fastgpt
