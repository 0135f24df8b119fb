// attention_backward and attention_varlen_backward on the CPU: unpacking, parallel tasks, and the kernels of the CPU's
// level. Semantics: fastgpt/ops/attention.py.

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "attention_arguments.h"
#include "cpu_level.h"
#include "parallel.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(
    void attention_backward(const AttentionBackward& args, int64_t begin, int64_t end, float* workspace);)

namespace fastgpt {
namespace {

using torch::stable::empty_like;

PerQuery<const float*> numbers_of(const Tensor& x, const char* name, const Tensor& q) {
  check_sizes(x, name, {q.size(0), q.size(1), q.size(2)});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, name, ": expected dtype float32");
  return {static_cast<const float*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

KeyGradients gradients_of(const Tensor& x) {
  check_rows(x, "k, v");
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

struct Gradients {
  Tensor dq, dk, dv, dsinks;
};

// Of a call whose arguments are all set but these.
Gradients run(
    AttentionBackward& args, const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const std::optional<Tensor>& sinks) {
  const int64_t H = q.size(1), T = q.size(2);
  const bool packed = args.cu_seqlens_q != nullptr;
  Gradients grads{empty_like(q), empty_like(k), empty_like(v), new_empty(q, {0}, {1}, dtype_of(q))};
  args.dout = queries_of(dout, "dout", q);
  if (dlse) args.dlse = numbers_of(*dlse, "dlse", q);
  check_rows(grads.dq, "q");
  args.dq = {grads.dq.mutable_data_ptr(), grads.dq.stride(0), grads.dq.stride(1), grads.dq.stride(2)};
  args.dk = gradients_of(grads.dk), args.dv = gradients_of(grads.dv);
  std::vector<float> dsinks_of_queries;
  if (sinks) {
    dsinks_of_queries.resize(q.size(0) * H * T);
    args.dsinks = {dsinks_of_queries.data(), H * T, T, 1};
  }
  if (packed) {
    args.dout.stride_b = args.dlse.stride_b = args.dsinks.stride_b = 0;
    args.dq.stride_b = args.dk.stride_b = args.dv.stride_b = 0;
  }

  const auto kernel = FASTGPT_AT_CPU_LEVEL(attention_backward);
  const auto tasks = [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, scratch(attention_backward_workspace(args)).get());
  };
  const int64_t count = args.batch_tasks() * args.head_tasks();
  if (count > 0) for_tasks(count, 5 * args.B * H * args.T * args.S * args.D / count + 1, tasks);

  if (sinks) {
    Tensor dsinks = new_empty(q, {H}, {1}, aoti_torch_dtype_float32());
    float* data = static_cast<float*>(dsinks.mutable_data_ptr());
    for (int64_t h = 0; h < H; ++h) {
      double total = 0.0;
      for (int64_t b = 0; b < q.size(0); ++b) {
        for (int64_t t = 0; t < T; ++t) total += dsinks_of_queries[(b * H + h) * T + t];
      }
      data[h] = static_cast<float>(total);
    }
    grads.dsinks = torch::stable::to(dsinks, sinks->scalar_type());
  }
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& dout,
    const std::optional<Tensor>& dlse,
    const Tensor& /*out*/,
    const Tensor& /*lse*/,
    bool needs_dbias,
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
    double dropout_p,
    const std::optional<Tensor>& dropout_seed) {
  AttentionBackward args{};
  Features features{causal, scale, window, softcap, alibi_slopes, sinks, dropout_p, dropout_seed};
  set_queries(args, q, k, features);
  args.k = keys_of(k, "k", args.element, std::nullopt, {args.B, args.H_kv, args.S, args.D});
  args.v = keys_of(v, "v", args.element, std::nullopt, {args.B, args.H_kv, args.S, args.D});
  set_lengths(args, kv_lengths);
  set_mask_and_bias(args, mask, bias);
  Tensor dbias = new_empty(q, {0}, {1}, dtype_of(q));
  if (needs_dbias) {
    STD_TORCH_CHECK(bias, "bias: expected a tensor");
    dbias = torch::stable::new_zeros(*bias, bias->sizes(), ScalarType::Float);
    const auto layout = scores_of<const void*>(dbias, "bias", Element::float32, args);
    args.dbias = {static_cast<float*>(dbias.mutable_data_ptr()), Element::float32,
                  layout.stride_b, layout.stride_h, layout.stride_t, layout.stride_s};
  }
  Gradients grads = run(args, dout, dlse, q, k, v, sinks);
  if (needs_dbias) dbias = torch::stable::to(dbias, bias->scalar_type());
  return {grads.dq, grads.dk, grads.dv, dbias, grads.dsinks};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_varlen_backward_cpu(
    const Tensor& dout,
    const std::optional<Tensor>& dlse,
    const Tensor& /*out*/,
    const Tensor& /*lse*/,
    const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k,
    int64_t /*max_q*/,
    int64_t /*max_k*/,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    bool causal,
    double scale,
    std::optional<int64_t> window,
    std::optional<double> softcap,
    const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks,
    double dropout_p,
    const std::optional<Tensor>& dropout_seed) {
  AttentionBackward args{};
  Features features{causal, scale, window, softcap, alibi_slopes, sinks, dropout_p, dropout_seed};
  set_queries(args, q, k, features);
  args.k = keys_of(k, "k", args.element, std::nullopt, {args.B, args.H_kv, args.S, args.D});
  args.v = keys_of(v, "v", args.element, std::nullopt, {args.B, args.H_kv, args.S, args.D});
  const Tensor starts_q = torch::stable::contiguous(cu_seqlens_q), starts_k = torch::stable::contiguous(cu_seqlens_k);
  set_packing(args, starts_q, starts_k);
  Gradients grads = run(args, dout, dlse, q, k, v, sinks);
  return {grads.dq, grads.dk, grads.dv, grads.dsinks};
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&fastgpt::attention_backward_cpu));
  m.impl("attention_varlen_backward", TORCH_BOX(&fastgpt::attention_varlen_backward_cpu));
}
