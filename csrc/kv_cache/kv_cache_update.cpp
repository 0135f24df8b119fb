// kv_cache_update and rope_kv_cache_update on the CPU: checks, parallel tasks, and dispatch to the kernels of the CPU level.

#include <torch/csrc/stable/library.h>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "decode_step/plan.h"
#include "kv_cache/kv_cache_arguments.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(void kv_cache_store(const KVCacheUpdate& u, int64_t begin, int64_t end);)

namespace fastgpt {
namespace {

constexpr int64_t kWorkOfByte = 2;  // cost of moving a byte, in multiply-adds

// Checks all slots before the first write, so that the cache is unchanged if one is invalid.
void check_slots(const KVCacheUpdate& u) {
  for (int64_t b = 0; b < u.B; ++b) {
    for (int64_t t = 0; t < u.T; ++t) {
      const int64_t problem = slot_of(u, b, t).b;
      FASTGPT_CHECK(problem != kOutside, "positions: expected values < ", u.capacity, " (cache capacity)");
      FASTGPT_CHECK(problem != kNoPage, "block_table: expected pages from 0 to ", u.pages - 1);
      FASTGPT_CHECK(
          u.rotary_dim == 0 || index_at(u.positions, b, t) < u.angles, "positions: expected values < ", u.angles,
          " (rows of cos)");
    }
  }
}

void run(const KVCacheUpdate& u) {
  check_slots(u);
  const auto kernel = FASTGPT_AT_CPU_LEVEL(kv_cache_store);
  // An item is one head's rows of one sequence; only items that write different slots run in parallel.
  const int64_t items = u.B * (u.H + 2 * u.H_kv);
  const int64_t item_bytes = std::max<int64_t>(u.T * std::max(u.D, u.D_v) * size_of(u.element), 1);
  if (u.block_table) {
    // Sequences may share a page: one thread writes a head of all sequences, so that the last of two tokens for one slot wins.
    const int64_t heads = u.H + 2 * u.H_kv;
    return for_tasks(heads, u.B * item_bytes * kWorkOfByte, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < u.B; ++b) kernel(u, b * heads + begin, b * heads + end);
    });
  }
  for_tasks(items, item_bytes * kWorkOfByte, [&](int64_t begin, int64_t end) { kernel(u, begin, end); });
}

void kv_cache_update_cpu(
    const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  Written written;
  const KVCacheUpdate u = kv_cache_arguments(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale, written);
  perform([u] { run(u); });
}

Tensor rope_kv_cache_update_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
    const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& slots, bool interleaved,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  Written written;
  KVCacheUpdate u = kv_cache_arguments(
      k, v, k_cache, v_cache, slots ? *slots : positions, block_table, k_scale, v_scale, written);
  const Tensor q_out = add_rotation(u, written, q, k, positions, cos, sin, interleaved);
  perform([u] { run(u); });
  return q_out;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("kv_cache_update", TORCH_BOX(&fastgpt::kv_cache_update_cpu));
  m.impl("rope_kv_cache_update", TORCH_BOX(&fastgpt::rope_kv_cache_update_cpu));
}
