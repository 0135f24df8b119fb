// From tensors to KVCacheUpdate, with the checks that memory safety needs. The Python wrapper's checks say more; they run
// when one of these fails.

#pragma once

#include <algorithm>
#include <optional>
#include <utility>

#include "common/regions.h"
#include "common/tensors.h"
#include "kv_cache/kv_cache.h"

namespace fastgpt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Properties of a tensor that the checks need, read once: every read is a call through PyTorch's C interface.
struct TensorInfo {
  TensorInfo(const Tensor& tensor, const char* name)
      : tensor(tensor),
        name(name),
        sizes(tensor.sizes()),
        strides(tensor.strides()),
        is_cuda(tensor.is_cuda()),
        device_index(is_cuda ? tensor.get_device_index() : -1) {}

  int64_t dim() const { return static_cast<int64_t>(sizes.size()); }

  const Tensor& tensor;
  const char* name;
  torch::headeronly::IntHeaderOnlyArrayRef sizes, strides;
  bool is_cuda;
  int32_t device_index;
};

inline void check_device(const TensorInfo& x, const TensorInfo& k) {
  FASTGPT_CHECK(x.is_cuda == k.is_cuda && x.device_index == k.device_index, x.name, ": expected the device of k");
}

// (B, H, N, D) with contiguous rows, or (B, H, N) if D is 1 and ndim 3.
inline Rows rows_of(
    const TensorInfo& x, Element element, const TensorInfo& k, const int64_t (&sizes)[4], bool writable, int64_t ndim = 4) {
  FASTGPT_CHECK(element_of(x.tensor, x.name) == element, x.name, ": unexpected dtype");
  check_device(x, k);
  FASTGPT_CHECK(x.dim() == ndim, x.name, ": expected ", ndim, " dimensions");
  for (int64_t i = 0; i < ndim; ++i) FASTGPT_CHECK(x.sizes[i] == sizes[i], x.name, ": unexpected shape");
  FASTGPT_CHECK(ndim == 3 || x.strides[3] == 1 || sizes[3] <= 1, x.name, ": expected a contiguous last dimension");
  const int64_t size = size_of(element);
  check_storage(x.tensor, x.name, size, x.sizes, x.strides);
  void* data = writable ? x.tensor.mutable_data_ptr() : const_cast<void*>(x.tensor.const_data_ptr());
  return {static_cast<char*>(data), x.strides[0] * size, x.strides[1] * size, x.strides[2] * size};
}

inline Indices indices_of(const TensorInfo& x, const TensorInfo& k) {
  const ScalarType dtype = x.tensor.scalar_type();
  FASTGPT_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, x.name, ": expected dtype int32 or int64");
  FASTGPT_CHECK(x.dim() == 2 && x.sizes[0] == k.sizes[0] && x.sizes[1] == k.sizes[2], x.name, ": expected shape (B, T)");
  check_device(x, k);
  const bool is_int64 = dtype == ScalarType::Long;
  check_storage(x.tensor, x.name, is_int64 ? 8 : 4, x.sizes, x.strides);
  return {x.tensor.const_data_ptr(), is_int64, x.strides[0], x.strides[1]};
}

// Checks that no two elements that an update writes share memory, in one tensor or in several, nor with what it reads.
class Written {
 public:
  // Adds a tensor that is written. `size`: of an element.
  void add(const TensorInfo& x, const Rows& rows, int64_t size) {
    const Region region = region_of(rows.data, size, x.sizes, x.strides);
    FASTGPT_CHECK(has_no_internal_overlap(region), x.name, ": expected elements that do not overlap each other in memory");
    for (int i = 0; i < count_; ++i) {
      const Region& other = regions_[i];
      if (!overlap(region, other)) continue;
      // Interleaved tensors with the same strides may span the same bytes without sharing an element.
      const int64_t distance = region.begin - other.begin;
      const bool alike = size == other.size &&
          std::equal(region.strides.begin(), region.strides.end(), other.strides.begin(), other.strides.end());
      FASTGPT_CHECK(
          alike && (distance % size != 0 || !share_element(distance / size, other, region)), x.name,
          ": expected memory apart from that of ", names_[i]);
    }
    regions_[count_] = region, names_[count_++] = x.name;
  }

  // Checks a tensor that is read. Call it when all that are written have been added.
  void check_apart(const TensorInfo& x, const void* data, int64_t size) const {
    const Region read = region_of(data, size, x.sizes, x.strides);
    for (int i = 0; i < count_; ++i) {
      FASTGPT_CHECK(
          !overlap(read, regions_[i]), x.name, ": expected memory apart from that of ", names_[i],
          ", which is written; clone it");
    }
  }

 private:
  Region regions_[4];
  const char* names_[4];
  int count_ = 0;
};

inline KVCacheUpdate kv_cache_arguments(
    const Tensor& k_tensor, const Tensor& v_tensor, const Tensor& k_cache_tensor, const Tensor& v_cache_tensor,
    const Tensor& slots_tensor, const std::optional<Tensor>& block_table, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, Written& written) {
  KVCacheUpdate u{};
  const TensorInfo k(k_tensor, "k"), v(v_tensor, "v"), k_cache(k_cache_tensor, "k_cache"), v_cache(v_cache_tensor, "v_cache");
  const TensorInfo slots(slots_tensor, "positions");
  FASTGPT_CHECK(k.dim() == 4, "k: expected 4 dimensions");
  FASTGPT_CHECK(v.dim() == 4, "v: expected 4 dimensions");
  FASTGPT_CHECK(k_cache.dim() == 4, "k_cache: expected 4 dimensions");
  u.B = k.sizes[0], u.H_kv = k.sizes[1], u.T = k.sizes[2], u.D = k.sizes[3], u.D_v = v.sizes[3];
  u.element = floating_element_of(k_tensor, "k");
  u.k = rows_of(k, u.element, k, {u.B, u.H_kv, u.T, u.D}, false);
  u.v = rows_of(v, u.element, k, {u.B, u.H_kv, u.T, u.D_v}, false);
  u.slots = indices_of(slots, k);

  const int64_t rows = k_cache.sizes[2];
  u.capacity = rows;
  int64_t first = u.B;
  if (block_table) {
    const TensorInfo table(*block_table, "block_table");
    FASTGPT_CHECK(
        block_table->scalar_type() == ScalarType::Int && table.dim() == 2 && table.sizes[0] == u.B,
        "block_table: expected (B, pages) int32");
    check_device(table, k);
    first = k_cache.sizes[0];
    u.page = rows, u.pages = first;
    FASTGPT_CHECK(
        !__builtin_mul_overflow(rows, table.sizes[1], &u.capacity) && u.capacity < int64_t{1} << 32,
        "block_table: expected slots for less than 2^32 tokens");
    u.block_table = static_cast<const int32_t*>(data_of(*block_table, "block_table", sizeof(int32_t)));
    u.table_stride_b = table.strides[0], u.table_stride_p = table.strides[1];
  }
  u.cache_element = element_of(k_cache_tensor, "k_cache");
  u.k_cache = rows_of(k_cache, u.cache_element, k, {first, u.H_kv, rows, u.D}, true);
  u.v_cache = rows_of(v_cache, u.cache_element, k, {first, u.H_kv, rows, u.D_v}, true);

  const bool quantized = size_of(u.cache_element) == 1;
  FASTGPT_CHECK(quantized || u.cache_element == u.element, "k_cache: expected the dtype of k, int8 or float8_e4m3fn");
  for (const auto& [scale, name] : {std::pair(&k_scale, "k_scale"), std::pair(&v_scale, "v_scale")}) {
    FASTGPT_CHECK(scale->has_value() == quantized, name, ": expected for int8 and float8_e4m3fn caches, and only for them");
  }
  for (const auto& [head_dim, name] : {std::pair(u.D, "k"), std::pair(u.D_v, "v")}) {
    FASTGPT_CHECK(
        !quantized || (head_dim >= 1 && head_dim <= kMaxTransformedDim), name, ": expected a head dim from 1 to ",
        kMaxTransformedDim);
  }
  if (quantized) {
    u.k_scale = rows_of({*k_scale, "k_scale"}, Element::float32, k, {first, u.H_kv, rows, 1}, true, 3);
    u.v_scale = rows_of({*v_scale, "v_scale"}, Element::float32, k, {first, u.H_kv, rows, 1}, true, 3);
  }

  const int64_t size = size_of(u.element), cache_size = size_of(u.cache_element);
  written.add(k_cache, u.k_cache, cache_size);
  written.add(v_cache, u.v_cache, cache_size);
  if (k_scale) written.add({*k_scale, "k_scale"}, u.k_scale, sizeof(float));
  if (v_scale) written.add({*v_scale, "v_scale"}, u.v_scale, sizeof(float));
  written.check_apart(k, u.k.data, size);
  written.check_apart(v, u.v.data, size);
  written.check_apart(slots, u.slots.data, u.slots.is_int64 ? 8 : 4);
  if (block_table) written.check_apart({*block_table, "block_table"}, u.block_table, sizeof(int32_t));
  return u;
}

// Adds q and the rotary embedding to u. Returns the uninitialized, contiguous tensor for the rotated q.
inline Tensor add_rotation(
    KVCacheUpdate& u, const Written& written, const Tensor& q_tensor, const Tensor& k_tensor, const Tensor& positions,
    const Tensor& cos, const Tensor& sin, bool interleaved) {
  const TensorInfo k(k_tensor, "k"), q(q_tensor, "q");
  FASTGPT_CHECK(q.dim() == 4, "q: expected 4 dimensions");
  u.H = q.sizes[1];
  u.q = rows_of(q, u.element, k, {u.B, u.H, u.T, u.D}, false);
  const TensorInfo p(positions, "positions");
  u.positions = indices_of(p, k);
  u.interleaved = interleaved;
  FASTGPT_CHECK(u.D <= kMaxTransformedDim, "q: expected a head dim up to ", kMaxTransformedDim);
  const auto table = [&](const TensorInfo& x, int64_t& stride) {
    FASTGPT_CHECK(x.tensor.scalar_type() == ScalarType::Float && x.dim() == 2, x.name, ": expected 2-d float32");
    FASTGPT_CHECK(x.strides[1] == 1 || x.sizes[1] == 1, x.name, ": expected contiguous rows");
    check_device(x, k);
    stride = x.strides[0];
    check_storage(x.tensor, x.name, sizeof(float), x.sizes, x.strides);
    return static_cast<const float*>(x.tensor.const_data_ptr());
  };
  const TensorInfo c(cos, "cos"), s(sin, "sin");
  u.cos = table(c, u.cos_stride), u.sin = table(s, u.sin_stride);
  u.angles = c.sizes[0], u.rotary_dim = 2 * c.sizes[1];
  FASTGPT_CHECK(u.rotary_dim >= 2 && u.rotary_dim <= u.D, "cos: expected from 1 to D / 2 columns");
  FASTGPT_CHECK(s.sizes[0] == c.sizes[0] && s.sizes[1] == c.sizes[1], "sin: expected the shape of cos");
  written.check_apart(q, u.q.data, size_of(u.element));
  written.check_apart(p, u.positions.data, u.positions.is_int64 ? 8 : 4);
  written.check_apart(c, u.cos, sizeof(float));
  written.check_apart(s, u.sin, sizeof(float));

  const Tensor q_out = new_empty(
      q_tensor, {u.B, u.H, u.T, u.D}, {u.H * u.T * u.D, u.T * u.D, u.D, int64_t{1}}, dtype_of(q_tensor));
  u.q_out = rows_of({q_out, "q_out"}, u.element, k, {u.B, u.H, u.T, u.D}, true);
  return q_out;
}

}  // namespace
}  // namespace fastgpt
