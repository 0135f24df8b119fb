// kv_cache_update on the CPU: bytes copied row by row, whole runs of rows where they lie together.

#include <algorithm>
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "kv_cache.h"

namespace fastgpt {
namespace {

using torch::stable::Tensor;

// Bytes that a thread should have to copy: waking it up costs about as long as copying these.
constexpr int64_t kGrainBytes = 256 * 1024;

// Copies the rows of one (b, h), in order of t: of two tokens for one slot, the last stays.
template <typename Index>
void store(
    const Rows& source,
    const Rows& cache,
    const Positions<Index>& positions,
    int64_t b,
    int64_t h,
    int64_t tokens,
    int64_t row_bytes) {
  const bool dense = source.stride_n == row_bytes && cache.stride_n == row_bytes;
  for (int64_t t = 0; t < tokens;) {
    const int64_t slot = positions.at(b, t);
    int64_t run = 1;
    if (slot >= 0) {
      while (dense && t + run < tokens && positions.at(b, t + run) == slot + run) ++run;
      std::memcpy(cache.row(b, h, slot), source.row(b, h, t), run * row_bytes);
    }
    t += run;
  }
}

template <typename Index>
void update(const KVCacheUpdate& u, const Positions<Index>& positions) {
  // All positions before the first write, so that a bad one leaves the cache as it was.
  for (int64_t b = 0; b < u.batch; ++b) {
    for (int64_t t = 0; t < u.tokens; ++t) {
      const int64_t position = positions.at(b, t);
      STD_TORCH_CHECK(
          position < u.capacity,
          "positions: expected values < ", u.capacity, " (cache capacity), got ", position);
    }
  }
  // One item is the K or the V rows of one (b, h); only items of different slots run in parallel.
  const auto items = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / 2 / u.heads, h = item / 2 % u.heads;
      const bool is_k = item % 2 == 0;
      store(
          is_k ? u.k : u.v, is_k ? u.k_cache : u.v_cache, positions, b, h, u.tokens, u.row_bytes);
    }
  };
  const int64_t count = 2 * u.batch * u.heads;
  const int64_t item_bytes = std::max<int64_t>(u.tokens * u.row_bytes, 1);
  if (count * item_bytes <= kGrainBytes) return items(0, count);
  torch::stable::parallel_for(0, count, std::max<int64_t>(kGrainBytes / item_bytes, 1), items);
}

void kv_cache_update_cpu(
    const Tensor& k,
    const Tensor& v,
    const Tensor& k_cache,
    const Tensor& v_cache,
    const Tensor& positions) {
  const KVCacheUpdate u = unpack_kv_cache_update(k, v, k_cache, v_cache, positions);
  if (positions.element_size() == sizeof(int32_t)) {
    update(u, positions_of<int32_t>(positions));
  } else {
    update(u, positions_of<int64_t>(positions));
  }
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("kv_cache_update", TORCH_BOX(&fastgpt::kv_cache_update_cpu));
}
