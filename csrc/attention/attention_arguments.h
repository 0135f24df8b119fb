// From tensors to Attention, with the checks that memory safety needs. The Python wrapper's checks say more; they run when
// one of these fails.

#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "attention/attention.h"
#include "common/tensors.h"

namespace fastgpt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_sizes(const Tensor& x, const char* name, std::initializer_list<int64_t> sizes) {
  check_cpu(x, name);
  check_shape(x, name, sizes);
}

inline void check_rows(const Tensor& x, const char* name) {
  FASTGPT_CHECK(x.stride(3) == 1 || x.size(3) == 1, name, ": expected a contiguous last dimension");
}

inline const int32_t* int32_data(const Tensor& x, const char* name) {
  FASTGPT_CHECK(x.scalar_type() == ScalarType::Int, name, ": expected dtype int32");
  return static_cast<const int32_t*>(data_of(x, name, sizeof(int32_t)));
}

// k or v, (first, H_kv, rows, head dim), with the scale that 8-bit elements need.
inline Keys keys_of(
    const Tensor& x, const char* name, Element element, const std::optional<Tensor>& scale, const char* scale_name,
    std::initializer_list<int64_t> sizes) {
  FASTGPT_CHECK(element_of(x, name) == element, name, ": unexpected dtype");
  check_sizes(x, name, sizes);
  check_rows(x, name);
  const void* data = data_of(x, name, size_of(element));
  Keys keys{data, x.size(3), x.stride(0), x.stride(1), x.stride(2), nullptr, 0, 0, 0};
  FASTGPT_CHECK(scale.has_value() == (size_of(element) == 1), scale_name, ": expected for 8 bits, and only then");
  if (scale) {
    check_sizes(*scale, scale_name, {sizes.begin()[0], sizes.begin()[1], sizes.begin()[2]});
    FASTGPT_CHECK(scale->scalar_type() == ScalarType::Float, scale_name, ": expected dtype float32");
    keys.scale = static_cast<const float*>(data_of(*scale, scale_name, sizeof(float)));
    keys.scale_stride_b = scale->stride(0), keys.scale_stride_h = scale->stride(1);
    keys.scale_stride_s = scale->stride(2);
  }
  return keys;
}

// A row of head_dim elements for each query of q, in q's dtype.
inline PerQuery<const void*> queries_of(const Tensor& x, const char* name, const Tensor& q, int64_t head_dim) {
  check_sizes(x, name, {q.size(0), q.size(1), q.size(2), head_dim});
  check_rows(x, name);
  FASTGPT_CHECK(x.scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
  return {data_of(x, name, size_of(element_of(x, name))), x.stride(0), x.stride(1), x.stride(2)};
}

// A mask or bias that broadcasts to (B, H, T, S).
template <typename Data>
PerScore<Data> scores_of(const Tensor& x, const char* name, Element element, const Attention& args) {
  check_cpu(x, name);
  FASTGPT_CHECK(x.dim() <= 4, name, ": expected at most 4 dimensions");
  const int64_t sizes[4] = {args.B, args.H, args.T, args.S}, missing = 4 - x.dim();
  int64_t strides[4] = {};
  for (int64_t i = missing; i < 4; ++i) {
    const int64_t size = x.size(i - missing);
    FASTGPT_CHECK(size == 1 || size == sizes[i], name, ": expected a shape that broadcasts to (B, H, T, S)");
    strides[i] = size == 1 ? 0 : x.stride(i - missing);
  }
  return {static_cast<Data>(data_of(x, name, size_of(element))), element, strides[0], strides[1], strides[2], strides[3]};
}

// A number of each head as floats, of a tensor of any floating-point dtype.
class NumbersOfHeads {
 public:
  NumbersOfHeads(const Tensor& x, const char* name, int64_t H) : numbers_(H) {
    check_sizes(x, name, {H});
    is_double_ = x.scalar_type() == ScalarType::Double;
    element_ = is_double_ ? Element::float32 : floating_element_of(x, name);
    data_ = data_of(x, name, is_double_ ? sizeof(double) : size_of(element_));
    stride_ = x.stride(0);
    read();
  }

  // From the tensor's memory, which is as it was when a recorded operation runs again; its contents may have changed.
  void read() {
    for (size_t h = 0; h < numbers_.size(); ++h) {
      const int64_t at = h * stride_;
      numbers_[h] = is_double_           ? static_cast<float>(static_cast<const double*>(data_)[at])
          : element_ == Element::float32 ? static_cast<const float*>(data_)[at]
          : element_ == Element::float16 ? half_to_float(static_cast<const uint16_t*>(data_)[at])
                                         : bfloat16_to_float(static_cast<const uint16_t*>(data_)[at]);
    }
  }

  const float* data() const { return numbers_.data(); }

 private:
  std::vector<float> numbers_;
  const void* data_;
  int64_t stride_;
  Element element_;
  bool is_double_;
};

// The features that all attention operations take, and storage that must live as long as Attention.
struct Features {
  bool causal;
  double scale;
  std::optional<int64_t> window;
  std::optional<double> softcap;
  const std::optional<Tensor>& alibi_slopes;
  const std::optional<Tensor>& sinks;
  double dropout_p;
  const std::optional<Tensor>& dropout_seed;
  std::shared_ptr<NumbersOfHeads> slopes_of_heads = {}, sinks_of_heads = {};
};

// Sets sizes, q, k, v and features; the caller sets the other arguments of its operation.
inline void set_inputs(
    Attention& args, const Tensor& q, const Tensor& k, const Tensor& v, Features& features,
    const std::optional<Tensor>& block_table = {}, const std::optional<Tensor>& k_scale = {},
    const std::optional<Tensor>& v_scale = {}) {
  FASTGPT_CHECK(q.dim() == 4, "q: expected 4 dimensions");
  FASTGPT_CHECK(k.dim() == 4, "k: expected 4 dimensions");
  FASTGPT_CHECK(v.dim() == 4, "v: expected 4 dimensions");
  args.B = q.size(0), args.H = q.size(1), args.T = q.size(2), args.D = q.size(3), args.D_v = v.size(3);
  args.H_kv = k.size(1), args.S = k.size(2);
  FASTGPT_CHECK(args.H_kv > 0 && args.H % args.H_kv == 0, "k: expected a number of heads that divides q's");
  FASTGPT_CHECK(args.D >= 1 && args.D <= kMaxHeadDim, "q: expected a head dim from 1 to ", kMaxHeadDim);
  FASTGPT_CHECK(args.D_v >= 1 && args.D_v <= kMaxHeadDim, "v: expected a head dim from 1 to ", kMaxHeadDim);
  FASTGPT_CHECK(args.T <= INT32_MAX && args.H <= INT32_MAX, "q: expected at most 2^31 - 1 queries and heads");
  args.element = floating_element_of(q, "q"), args.key_element = element_of(k, "k");
  FASTGPT_CHECK(args.key_element == args.element || size_of(args.key_element) == 1, "k: expected the dtype of q, or 8 bits");
  args.q = queries_of(q, "q", q, args.D);
  int64_t first = args.B;
  if (block_table) {
    FASTGPT_CHECK(block_table->dim() == 2, "block_table: expected (B, pages)");
    check_sizes(*block_table, "block_table", {args.B, block_table->size(1)});
    args.block_table = int32_data(*block_table, "block_table");
    args.table_stride_b = block_table->stride(0), args.table_stride_p = block_table->stride(1);
    first = k.size(0), args.page = k.size(2);
    FASTGPT_CHECK(
        !__builtin_mul_overflow(args.page, block_table->size(1), &args.S), "block_table: expected at most 2^31 - 1 keys");
  }
  FASTGPT_CHECK(args.S <= INT32_MAX, "k: expected at most 2^31 - 1 keys");
  args.k = keys_of(k, "k", args.key_element, k_scale, "k_scale", {first, args.H_kv, k.size(2), args.D});
  args.v = keys_of(v, "v", args.key_element, v_scale, "v_scale", {first, args.H_kv, k.size(2), args.D_v});

  args.causal = features.causal;
  args.scale = static_cast<float>(features.scale);
  FASTGPT_CHECK(std::isfinite(args.scale), "scale: expected a finite number");
  FASTGPT_CHECK(!features.window || *features.window >= 1, "window: expected at least 1");
  args.window = std::min<int64_t>(features.window.value_or(INT32_MAX), INT32_MAX);
  args.softcap = static_cast<float>(features.softcap.value_or(0.0));
  // Neither the cap nor its inverse may be subnormal.
  FASTGPT_CHECK(!features.softcap || (args.softcap >= 0x1p-126f && args.softcap <= 0x1p126f), "softcap: expected a number > 0");
  if (features.alibi_slopes) {
    FASTGPT_CHECK(features.alibi_slopes->scalar_type() == ScalarType::Float, "alibi_slopes: expected dtype float32");
    features.slopes_of_heads = std::make_shared<NumbersOfHeads>(*features.alibi_slopes, "alibi_slopes", args.H);
    args.alibi_slopes = features.slopes_of_heads->data();
  }
  if (features.sinks) {
    features.sinks_of_heads = std::make_shared<NumbersOfHeads>(*features.sinks, "sinks", args.H);
    args.sinks = features.sinks_of_heads->data();
  }
  const double p = features.dropout_p;
  FASTGPT_CHECK(p >= 0 && p < 1, "dropout_p: expected 0 <= dropout_p < 1");
  if (p > 0) {
    FASTGPT_CHECK(features.dropout_seed, "dropout_seed: expected a tensor");
    check_sizes(*features.dropout_seed, "dropout_seed", {1});
    FASTGPT_CHECK(features.dropout_seed->scalar_type() == ScalarType::Long, "dropout_seed: expected dtype int64");
    args.dropout_seed = static_cast<const int64_t*>(data_of(*features.dropout_seed, "dropout_seed", sizeof(int64_t)));
    args.keep_threshold = static_cast<uint32_t>(std::min(std::nearbyint(p * 0x1p31), 0x1p31 - 1));
    args.keep_scale = static_cast<float>(1.0 / (1.0 - p));
  }
}

inline void set_mask_and_bias(Attention& args, const std::optional<Tensor>& mask, const std::optional<Tensor>& bias) {
  if (mask) {
    FASTGPT_CHECK(mask->scalar_type() == ScalarType::Bool, "mask: expected dtype bool");
    args.mask = scores_of<const uint8_t*>(*mask, "mask", Element::int8, args);
  }
  if (bias) {
    const Element element = element_of(*bias, "bias");
    FASTGPT_CHECK(element == args.element || element == Element::float32, "bias: expected dtype of q, or float32");
    args.bias = scores_of<const void*>(*bias, "bias", element, args);
  }
}

inline void set_lengths(Attention& args, const std::optional<Tensor>& kv_lengths) {
  if (!kv_lengths) return;
  check_sizes(*kv_lengths, "kv_lengths", {args.B});
  args.kv_lengths = int32_data(*kv_lengths, "kv_lengths");
  args.kv_length_stride = kv_lengths->stride(0);
}

// Checks where sequences begin (cu_seqlens), and returns the length of the longest.
inline int64_t check_starts(const Tensor& starts, const char* name, int64_t B, int64_t total) {
  check_sizes(starts, name, {B + 1});
  FASTGPT_CHECK(B >= 1 && (starts.stride(0) == 1 || B == 0), name, ": expected contiguous numbers, two at least");
  const int32_t* data = int32_data(starts, name);
  int64_t longest = 0;
  bool ascend = data[0] == 0 && data[B] == total;
  for (int64_t b = 0; b < B; ++b) {
    ascend = ascend && data[b] <= data[b + 1];
    longest = std::max<int64_t>(longest, data[b + 1] - data[b]);
  }
  FASTGPT_CHECK(ascend, name, ": expected numbers that ascend from 0 to ", total);
  return longest;
}

// Turns q, k and v (1, heads, total, head dim), which must be set, into packed sequences.
inline void set_packing(Attention& args, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k) {
  FASTGPT_CHECK(args.B == 1 && cu_seqlens_q.dim() == 1, "cu_seqlens_q: expected (B + 1,), and q (1, H, total, D)");
  args.B = cu_seqlens_q.size(0) - 1;
  args.T = check_starts(cu_seqlens_q, "cu_seqlens_q", args.B, args.T);
  args.S = check_starts(cu_seqlens_k, "cu_seqlens_k", args.B, args.S);
  args.cu_seqlens_q = int32_data(cu_seqlens_q, "cu_seqlens_q");
  args.cu_seqlens_k = int32_data(cu_seqlens_k, "cu_seqlens_k");
  args.q.stride_b = args.k.stride_b = args.v.stride_b = 0;
}

}  // namespace
}  // namespace fastgpt
