// attention_forward on the CPU: unpacking, parallel tasks, and the kernels of the CPU's level.
// Semantics: fastgpt/ops/attention.py.

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "attention.h"
#include "cpu_level.h"
#include "tensors.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(
    void attention_forward(const AttentionForward& args, int64_t begin, int64_t end, float* workspace);)

namespace fastgpt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Multiply-adds that a thread should have to do: waking it up costs some microseconds.
constexpr int64_t kGrain = 1 << 19;

// This thread's scratch memory: grows to the largest head dim seen, and stays.
float* workspace(int64_t floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    STD_TORCH_CHECK(memory != nullptr, "attention: out of memory for ", bytes, " bytes of scratch");
    size = floats;
  }
  return memory.get();
}

Element element_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Element::float32;
    case ScalarType::Half: return Element::float16;
    case ScalarType::BFloat16: return Element::bfloat16;
    case ScalarType::Char: return Element::int8;
    case ScalarType::Float8_e4m3fn: return Element::float8_e4m3;
    default: STD_TORCH_CHECK(false, name, ": unexpected dtype");
  }
}

// The checks below are what memory safety needs; the Python wrapper's say more, and run when one of these fails.

void check_sizes(const Tensor& x, const char* name, std::initializer_list<int64_t> sizes) {
  bool same = x.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(same && !x.is_cuda(), name, ": unexpected shape or device");
}

void check_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1, name, ": expected a contiguous last dimension");
}

const int32_t* int32_data(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int, name, ": expected dtype int32");
  return static_cast<const int32_t*>(x.const_data_ptr());
}

// k or v, (first, H_kv, rows, D), with the scale that elements of 8 bits need.
Keys keys_of(
    const Tensor& x, const char* name, Element element, const std::optional<Tensor>& scale,
    std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(element_of(x, name) == element, name, ": unexpected dtype");
  check_sizes(x, name, sizes);
  check_rows(x, name);
  Keys keys{x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), nullptr, 0, 0, 0};
  STD_TORCH_CHECK(scale.has_value() == (size_of(element) == 1), name, ": expected a scale for 8 bits, and only then");
  if (scale) {
    check_sizes(*scale, "scale", {sizes.begin()[0], sizes.begin()[1], sizes.begin()[2]});
    STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Float, "scale: expected dtype float32");
    keys.scale = static_cast<const float*>(scale->const_data_ptr());
    keys.scale_stride_b = scale->stride(0), keys.scale_stride_h = scale->stride(1);
    keys.scale_stride_s = scale->stride(2);
  }
  return keys;
}

// Every page that will be read is in the pool.
void check_pages(const AttentionForward& args, int64_t pages) {
  for (int64_t b = 0; b < args.B; ++b) {
    const int64_t length = args.kv_lengths ? std::min<int64_t>(args.kv_lengths[b * args.kv_length_stride], args.S) : args.S;
    for (int64_t i = 0; i * args.page < length; ++i) {
      const int32_t page = args.block_table[b * args.table_stride_b + i * args.table_stride_p];
      STD_TORCH_CHECK(page >= 0 && page < pages, "block_table: expected pages from 0 to ", pages - 1);
    }
  }
}

std::tuple<Tensor, Tensor> attention_forward_cpu(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    bool causal,
    double scale,
    std::optional<int64_t> window,
    std::optional<double> softcap,
    const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& mask,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& kv_lengths,
    const std::optional<Tensor>& block_table,
    const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale,
    double dropout_p,
    const std::optional<Tensor>& dropout_seed) {
  STD_TORCH_CHECK(
      !softcap && !alibi_slopes && !sinks && !mask && !bias && dropout_p == 0.0 && !dropout_seed,
      "softcap, alibi_slopes, sinks, mask, bias, dropout: not on the CPU yet");
  AttentionForward args{};
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && !q.is_cuda(), "q, k: expected 4 dimensions, on the CPU");
  args.B = q.size(0), args.H = q.size(1), args.T = q.size(2), args.D = q.size(3);
  args.H_kv = k.size(1), args.S = k.size(2);
  STD_TORCH_CHECK(args.H_kv > 0 && args.H % args.H_kv == 0, "k: expected a number of heads that divides q's");
  STD_TORCH_CHECK(args.D >= 1 && args.D <= 256, "q: expected a head dim from 1 to 256");
  STD_TORCH_CHECK(!window || *window >= 1, "window: expected at least 1");
  check_rows(q, "q");
  args.element = element_of(q, "q"), args.key_element = element_of(k, "k");
  STD_TORCH_CHECK(size_of(args.element) > 1, "q: expected dtype float32, float16 or bfloat16");
  STD_TORCH_CHECK(
      args.key_element == args.element || size_of(args.key_element) == 1, "k: expected the dtype of q, or 8 bits");

  int64_t first = args.B;
  if (block_table) {
    STD_TORCH_CHECK(block_table->dim() == 2, "block_table: expected (B, pages)");
    check_sizes(*block_table, "block_table", {args.B, block_table->size(1)});
    args.block_table = int32_data(*block_table, "block_table");
    args.table_stride_b = block_table->stride(0), args.table_stride_p = block_table->stride(1);
    first = k.size(0), args.page = k.size(2), args.S = args.page * block_table->size(1);
  }
  STD_TORCH_CHECK(args.S <= INT32_MAX, "k: expected at most 2^31 - 1 keys");
  args.k = keys_of(k, "k", args.key_element, k_scale, {first, args.H_kv, k.size(2), args.D});
  args.v = keys_of(v, "v", args.key_element, v_scale, {first, args.H_kv, k.size(2), args.D});
  if (kv_lengths) {
    check_sizes(*kv_lengths, "kv_lengths", {args.B});
    args.kv_lengths = int32_data(*kv_lengths, "kv_lengths");
    args.kv_length_stride = kv_lengths->stride(0);
  }
  if (block_table) check_pages(args, first);

  args.causal = causal;
  args.window = std::min<int64_t>(window.value_or(INT32_MAX), INT32_MAX);
  args.scale = static_cast<float>(scale);
  args.q = q.const_data_ptr();
  args.q_stride_b = q.stride(0), args.q_stride_h = q.stride(1), args.q_stride_t = q.stride(2);
  // Token-major storage: the model reads the result as (B, T, H * D) without a copy.
  args.out_stride_b = args.T * args.H * args.D, args.out_stride_h = args.D, args.out_stride_t = args.H * args.D;
  Tensor out = new_empty(
      q, {args.B, args.H, args.T, args.D}, {args.out_stride_b, args.out_stride_h, args.out_stride_t, 1}, dtype_of(q));
  Tensor lse = new_empty(q, {args.B, args.H, args.T}, {args.H * args.T, args.T, 1}, aoti_torch_dtype_float32());
  args.out = out.mutable_data_ptr(), args.lse = static_cast<float*>(lse.mutable_data_ptr());

  const auto kernel = FASTGPT_AT_CPU_LEVEL(attention_forward);
  const auto run = [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, workspace(attention_workspace(args.D)));
  };
  const int64_t task_work = 2 * args.D * args.S * std::min(args.rows(), kBlockM) + 1;
  if (args.tasks() * task_work <= kGrain) {
    run(0, args.tasks());
  } else {
    torch::stable::parallel_for(0, args.tasks(), std::max<int64_t>(kGrain / task_work, 1), run);
  }
  return {out, lse};
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastgpt::attention_forward_cpu));
}
