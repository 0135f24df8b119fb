// attention_forward and attention_varlen_forward on the CPU: unpacking, parallel tasks, and dispatch to the kernels of the CPU
// level. Semantics: fastgpt/ops/attention/__init__.py.

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "attention/attention_arguments.h"
#include "common/cpu_level.h"
#include "common/parallel.h"
#include "decode_step/plan.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(
    // Size in floats of a thread's 64-byte aligned scratch memory for `group` blocks.
    int64_t attention_workspace(int64_t D, int64_t D_v, int64_t group);
    void attention_forward(const AttentionForward& args, int64_t begin, int64_t end, float* workspace);
    // Combines the partial results of splits, for B · H_kv blocks of queries.
    void attention_forward_join(const AttentionForward& args, int64_t begin, int64_t end, float* workspace);)

namespace fastgpt {
namespace {

// Checks that every page that will be read is in the pool.
void check_pages(const Attention& args, int64_t pages) {
  for (int64_t b = 0; b < args.B; ++b) {
    const int64_t length = args.kv_lengths ? std::min<int64_t>(args.kv_lengths[b * args.kv_length_stride], args.S) : args.S;
    for (int64_t i = 0; i * args.page < length; ++i) {
      const int32_t page = args.block_table[b * args.table_stride_b + i * args.table_stride_p];
      FASTGPT_CHECK(page >= 0 && page < pages, "block_table: expected pages from 0 to ", pages - 1);
    }
  }
}

void run_tasks(const AttentionForward& args) {
  const int64_t splits = args.splits();
  const int64_t floats = FASTGPT_AT_CPU_LEVEL(attention_workspace)(args.D, args.D_v, args.group);
  const auto tasks = [&](auto kernel, int64_t count, int64_t keys) {
    const int64_t rows = std::min(args.H / args.H_kv * args.T, args.group * kBlockM);
    const int64_t work = kAttentionGrains * (args.D + args.D_v) * keys * rows + 1;
    for_tasks(count, work, [&](int64_t begin, int64_t end) { kernel(args, begin, end, thread_scratch(floats)); });
  };
  tasks(FASTGPT_AT_CPU_LEVEL(attention_forward), args.tasks(), splits > 1 ? kSplit : args.S);
  if (splits > 1) tasks(FASTGPT_AT_CPU_LEVEL(attention_forward_join), args.B * args.H_kv, splits);
}

// Allocates (out, lse) and runs a call whose other arguments are set. pages: size of the pool, with a block table.
std::tuple<Tensor, Tensor> run(AttentionForward args, const Features& features, const Tensor& q, int64_t pages = 0) {
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D_v = args.D_v;
  const bool packed = args.cu_seqlens_q != nullptr;
  // Token-major storage: the model reads the result as (B, T, H * D_v) without a copy.
  Tensor out = new_empty(q, {B, H, T, D_v}, {T * H * D_v, D_v, H * D_v, 1}, dtype_of(q));
  Tensor lse = new_empty(q, {B, H, T}, {H * T, T, 1}, aoti_torch_dtype_float32());
  args.out = {out.mutable_data_ptr(), packed ? 0 : T * H * D_v, D_v, H * D_v};
  args.lse = {static_cast<float*>(lse.mutable_data_ptr()), packed ? 0 : H * T, T, 1};

  // Four tasks per thread, if there is enough work. Results do not depend on the group size.
  const int64_t share = args.B * args.H_kv * args.blocks() / (4 * num_threads());
  args.group = std::max<int64_t>(std::min(share, largest_group(args.D, D_v)), 1);
  std::shared_ptr<float> partial;
  if (args.splits() > 1) partial = scratch(args.tasks() * args.split_size());
  args.partial = partial.get();
  perform([args, partial, pages, slopes = features.slopes_of_heads, sinks = features.sinks_of_heads] {
    if (args.block_table) check_pages(args, pages);  // also on replay, as block tables change
    if (slopes) slopes->read();
    if (sinks) sinks->read();
    run_tasks(args);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_forward_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale, std::optional<int64_t> window,
    std::optional<double> softcap, const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& bias, const std::optional<Tensor>& kv_lengths,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
    double dropout_p, const std::optional<Tensor>& dropout_seed) {
  AttentionForward args{};
  Features features{causal, scale, window, softcap, alibi_slopes, sinks, dropout_p, dropout_seed};
  set_inputs(args, q, k, v, features, block_table, k_scale, v_scale);
  set_lengths(args, kv_lengths);
  set_mask_and_bias(args, mask, bias);
  return run(args, features, q, k.size(0));
}

// Raises what attention_forward would raise, for callers that write to a cache before they call it.
void attention_check_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, bool causal, double scale, std::optional<int64_t> window,
    std::optional<double> softcap, const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& kv_lengths, const std::optional<Tensor>& block_table, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale) {
  AttentionForward args{};
  Features features{causal, scale, window, softcap, alibi_slopes, sinks, 0.0, std::nullopt};
  set_inputs(args, q, k, v, features, block_table, k_scale, v_scale);
  set_lengths(args, kv_lengths);
  perform([] {});  // recorded like any operation, so that the plan is complete
}

std::tuple<Tensor, Tensor> attention_varlen_forward_cpu(
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/, const Tensor& q,
    const Tensor& k, const Tensor& v, bool causal, double scale, std::optional<int64_t> window, std::optional<double> softcap,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks, double dropout_p,
    const std::optional<Tensor>& dropout_seed) {
  AttentionForward args{};
  Features features{causal, scale, window, softcap, alibi_slopes, sinks, dropout_p, dropout_seed};
  set_inputs(args, q, k, v, features);
  const Tensor starts_q = torch::stable::contiguous(cu_seqlens_q), starts_k = torch::stable::contiguous(cu_seqlens_k);
  set_packing(args, starts_q, starts_k);
  return run(args, features, q);
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastgpt::attention_forward_cpu));
  m.impl("attention_check", TORCH_BOX(&fastgpt::attention_check_cpu));
  m.impl("attention_varlen_forward", TORCH_BOX(&fastgpt::attention_varlen_forward_cpu));
}
