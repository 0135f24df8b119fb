// attention_forward on the CPU: unpacking, parallel tasks, and the kernels of the CPU's level.
// Semantics: fastgpt/ops/attention.py.

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>

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

Element element_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float: return Element::float32;
    case ScalarType::Half: return Element::float16;
    case ScalarType::BFloat16: return Element::bfloat16;
    default: STD_TORCH_CHECK(false, "q: expected dtype float32, float16 or bfloat16");
  }
}

// Checks what memory safety needs; the Python wrapper's checks come first and say more.
void check(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& kv_lengths) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k, v: expected 4 dimensions");
  for (const auto& [tensor, name] : {std::pair{&k, "k"}, std::pair{&v, "v"}}) {
    STD_TORCH_CHECK(tensor->scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
    STD_TORCH_CHECK(tensor->get_device_index() == q.get_device_index(), name, ": expected the device of q");
    STD_TORCH_CHECK(
        tensor->size(0) == q.size(0) && tensor->size(1) == k.size(1) && tensor->size(2) == k.size(2) &&
            tensor->size(3) == q.size(3),
        name, ": expected shape (B, H_kv, S, D) to match q and k");
  }
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "k: expected a number of heads that divides q's");
  for (const auto& [tensor, name] : {std::pair{&q, "q"}, std::pair{&k, "k"}, std::pair{&v, "v"}}) {
    STD_TORCH_CHECK(
        tensor->stride(3) == 1 || q.size(3) == 1, name, ": expected a contiguous last dimension");
  }
  STD_TORCH_CHECK(k.size(2) <= INT32_MAX, "k: expected at most 2^31 - 1 keys");
  STD_TORCH_CHECK(q.size(3) >= 1 && q.size(3) <= 256, "q: expected a head dim from 1 to 256");
  if (kv_lengths) {
    STD_TORCH_CHECK(
        kv_lengths->dim() == 1 && kv_lengths->size(0) == q.size(0) && kv_lengths->scalar_type() == ScalarType::Int &&
            !kv_lengths->is_cuda(),
        "kv_lengths: expected (B,) int32 on the CPU");
  }
}

std::tuple<Tensor, Tensor> attention_forward_cpu(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const std::optional<Tensor>& kv_lengths,
    bool causal,
    double scale) {
  check(q, k, v, kv_lengths);
  AttentionForward args{};
  args.element = element_of(q);
  args.causal = causal;
  args.scale = static_cast<float>(scale);
  args.B = q.size(0), args.H = q.size(1), args.T = q.size(2), args.D = q.size(3);
  args.H_kv = k.size(1), args.S = k.size(2);

  args.q = q.const_data_ptr(), args.k = k.const_data_ptr(), args.v = v.const_data_ptr();
  args.q_stride_b = q.stride(0), args.q_stride_h = q.stride(1), args.q_stride_t = q.stride(2);
  args.k_stride_b = k.stride(0), args.k_stride_h = k.stride(1), args.k_stride_s = k.stride(2);
  args.v_stride_b = v.stride(0), args.v_stride_h = v.stride(1), args.v_stride_s = v.stride(2);
  // Token-major storage: the model reads the result as (B, T, H * D) without a copy.
  args.out_stride_b = args.T * args.H * args.D, args.out_stride_h = args.D, args.out_stride_t = args.H * args.D;
  Tensor out = new_empty(
      q, {args.B, args.H, args.T, args.D}, {args.out_stride_b, args.out_stride_h, args.out_stride_t, 1}, dtype_of(q));
  Tensor lse = new_empty(q, {args.B, args.H, args.T}, {args.H * args.T, args.T, 1}, aoti_torch_dtype_float32());
  args.out = out.mutable_data_ptr(), args.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (kv_lengths) {
    args.kv_lengths = static_cast<const int32_t*>(kv_lengths->const_data_ptr());
    args.kv_length_stride = kv_lengths->stride(0);
  }

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
