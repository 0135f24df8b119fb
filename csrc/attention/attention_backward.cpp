// attention_backward and attention_varlen_backward on the CPU: unpacking, parallel tasks, and dispatch to the kernels of the
// CPU level. Semantics: fastgpt/ops/attention/__init__.py.

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "attention/attention_arguments.h"
#include "common/cpu_level.h"
#include "common/parallel.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(
    // Size in floats of the 64-byte aligned scratch memory for one block of queries and all keys.
    int64_t attention_backward_workspace(const Attention& args);
    // dq, dbias and dsinks of a block of queries; leaves in `workspace` what attention_backward_keys needs.
    void attention_backward_queries(const AttentionBackward& args, int64_t b, int64_t h_kv, int64_t block, float* workspace);
    // Adds the block's contribution to the gradients (S, padded head dim) of some tiles of keys and values.
    void attention_backward_keys(
        const AttentionBackward& args, int64_t b, int64_t h_kv, int64_t block, int64_t first_tile, int64_t last_tile,
        float* workspace, float* dk, float* dv);
    void attention_backward_write_keys(
        const AttentionBackward& args, int64_t b, int64_t h_kv, const float* dk, const float* dv);)

namespace fastgpt {
namespace {

// An uninitialized gradient of x, with its layout if the last dimension is contiguous, else contiguous.
Tensor gradient_like(const Tensor& x) {
  const Tensor like = torch::stable::empty_like(x);
  if (like.stride(3) == 1 || like.size(3) == 1) return like;
  return new_empty(x, std::vector<int64_t>{x.sizes().begin(), x.sizes().end()});
}

PerQuery<const float*> numbers_of(const Tensor& x, const char* name, const Tensor& q) {
  check_sizes(x, name, {q.size(0), q.size(1), q.size(2)});
  FASTGPT_CHECK(x.scalar_type() == ScalarType::Float, name, ": expected dtype float32");
  return {static_cast<const float*>(data_of(x, name, sizeof(float))), x.stride(0), x.stride(1), x.stride(2)};
}

KeyGradients gradients_of(const Tensor& x) { return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// All gradients of one key/value head of one sequence. `threads` blocks of queries are processed at a time, by
// for_each(tasks, run).
template <typename ForEach>
void run_head(const AttentionBackward& args, int64_t b, int64_t h_kv, int64_t threads, float* memory, ForEach for_each) {
  const int64_t rows = args.tiles() * kBlockN, size = FASTGPT_AT_CPU_LEVEL(attention_backward_workspace)(args);
  float *dk = memory, *dv = dk + rows * padded_head_dim(args.D), *workspaces = dv + rows * padded_head_dim(args.D_v);
  std::fill(dk, workspaces, 0.0f);
  for (int64_t first = 0; first < args.blocks(); first += threads) {
    const int64_t count = std::min(threads, args.blocks() - first);
    for_each(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        FASTGPT_AT_CPU_LEVEL(attention_backward_queries)(args, b, h_kv, first + i, workspaces + i * size);
      }
    });
    for_each(args.tiles(), [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count; ++i) {
        FASTGPT_AT_CPU_LEVEL(attention_backward_keys)(args, b, h_kv, first + i, begin, end, workspaces + i * size, dk, dv);
      }
    });
  }
  FASTGPT_AT_CPU_LEVEL(attention_backward_write_keys)(args, b, h_kv, dk, dv);
}

// Heads in parallel; or, if there are fewer heads than threads, one after the other, with blocks of queries and tiles of keys
// in parallel. (Not with dbias: blocks of queries may share elements of it.)
void run_heads(const AttentionBackward& args) {
  const int64_t keys_size = args.tiles() * kBlockN * (padded_head_dim(args.D) + padded_head_dim(args.D_v));
  const int64_t size = FASTGPT_AT_CPU_LEVEL(attention_backward_workspace)(args);
  const int64_t batches = args.batch_tasks(), heads = args.head_tasks(), tasks = batches * heads;
  if (tasks == 0) return;
  const int64_t head_dims = 3 * args.D + 2 * args.D_v;  // of five products
  const int64_t work = kAttentionGrains * args.B * args.H * args.T * args.S * head_dims / tasks + 1;
  const int64_t threads = num_threads();
  if (tasks < threads && work > grain() && !args.dbias.data) {
    const Scratch memory = scratch(keys_size + threads * size);
    const auto for_each = [](int64_t count, const auto& run) { torch::stable::parallel_for(0, count, 1, run); };
    for (int64_t b = 0; b < args.B; ++b) {
      for (int64_t h_kv = 0; h_kv < args.H_kv; ++h_kv) run_head(args, b, h_kv, threads, memory.get(), for_each);
    }
    return;
  }
  for_tasks(tasks, work, [&](int64_t begin, int64_t end) {
    const Scratch memory = scratch(keys_size + size);
    const auto for_each = [](int64_t count, const auto& run) { run(0, count); };
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t b = task / heads; b < args.B; b += batches) {
        for (int64_t h_kv = task % heads; h_kv < args.H_kv; h_kv += heads) {
          run_head(args, b, h_kv, 1, memory.get(), for_each);
        }
      }
    }
  });
}

struct Gradients {
  Tensor dq, dk, dv, dsinks;
};

// Runs a call whose other arguments are set.
Gradients run(
    AttentionBackward& args, const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& out, const Tensor& lse,
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& sinks) {
  queries_of(out, "out", q, args.D_v), numbers_of(lse, "lse", q);  // which other implementations read
  const int64_t H = q.size(1), T = q.size(2);
  const bool packed = args.cu_seqlens_q != nullptr;
  Gradients grads{gradient_like(q), gradient_like(k), gradient_like(v), new_empty(q, {0}, {1}, dtype_of(q))};
  args.dout = queries_of(dout, "dout", q, args.D_v);
  if (dlse) args.dlse = numbers_of(*dlse, "dlse", q);
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

  run_heads(args);

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
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& out, const Tensor& lse, bool needs_dbias,
    const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale, std::optional<int64_t> window,
    std::optional<double> softcap, const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& bias, const std::optional<Tensor>& kv_lengths,
    double dropout_p, const std::optional<Tensor>& dropout_seed) {
  AttentionBackward args{};
  Features features{causal, scale, window, softcap, alibi_slopes, sinks, dropout_p, dropout_seed};
  set_inputs(args, q, k, v, features);
  set_lengths(args, kv_lengths);
  set_mask_and_bias(args, mask, bias);
  Tensor dbias = new_empty(q, {0}, {1}, dtype_of(q));
  if (needs_dbias) {
    FASTGPT_CHECK(bias, "bias: expected a tensor");
    dbias = torch::stable::new_zeros(*bias, bias->sizes(), ScalarType::Float);
    const auto layout = scores_of<const void*>(dbias, "bias", Element::float32, args);
    args.dbias = {
        static_cast<float*>(dbias.mutable_data_ptr()),
        Element::float32,
        layout.stride_b,
        layout.stride_h,
        layout.stride_t,
        layout.stride_s};
  }
  Gradients grads = run(args, dout, dlse, out, lse, q, k, v, sinks);
  if (needs_dbias) dbias = torch::stable::to(dbias, bias->scalar_type());
  return {grads.dq, grads.dk, grads.dv, dbias, grads.dsinks};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_varlen_backward_cpu(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/, const Tensor& q, const Tensor& k,
    const Tensor& v, bool causal, double scale, std::optional<int64_t> window, std::optional<double> softcap,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks, double dropout_p,
    const std::optional<Tensor>& dropout_seed) {
  AttentionBackward args{};
  Features features{causal, scale, window, softcap, alibi_slopes, sinks, dropout_p, dropout_seed};
  set_inputs(args, q, k, v, features);
  const Tensor starts_q = torch::stable::contiguous(cu_seqlens_q), starts_k = torch::stable::contiguous(cu_seqlens_k);
  set_packing(args, starts_q, starts_k);
  Gradients grads = run(args, dout, dlse, out, lse, q, k, v, sinks);
  return {grads.dq, grads.dk, grads.dv, grads.dsinks};
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&fastgpt::attention_backward_cpu));
  m.impl("attention_varlen_backward", TORCH_BOX(&fastgpt::attention_varlen_backward_cpu));
}
