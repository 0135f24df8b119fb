// kv_cache_update on a GPU: one launch that copies the K and V rows of every token.
//
// It can be captured into a CUDA graph: positions are read by the kernel, nothing is allocated and
// nothing waits. If two tokens name the same slot, either may stay, K and V independently. A
// position outside the cache is never written.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "kv_cache.h"

namespace fastgpt {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;

// One thread copies one Vec of K and one of V; threads are numbered over (b, h, t, Vec of the row).
template <typename Vec, typename Index>
__global__ void __launch_bounds__(kThreads)
    store_rows(KVCacheUpdate u, Positions<Index> positions, uint32_t vecs_per_row, uint32_t vecs) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= vecs) return;
  const uint32_t heads = static_cast<uint32_t>(u.heads), tokens = static_cast<uint32_t>(u.tokens);
  const uint32_t vec = i % vecs_per_row, bht = i / vecs_per_row;
  const uint32_t t = bht % tokens, bh = bht / tokens;
  const uint32_t h = bh % heads, b = bh / heads;

  const int64_t slot = positions.at(b, t);
  if (!is_slot(slot, u.capacity)) return;
  const Vec k = reinterpret_cast<const Vec*>(u.k.row(b, h, t))[vec];
  const Vec v = reinterpret_cast<const Vec*>(u.v.row(b, h, t))[vec];
  reinterpret_cast<Vec*>(u.k_cache.row(b, h, slot))[vec] = k;
  reinterpret_cast<Vec*>(u.v_cache.row(b, h, slot))[vec] = v;
}

// The widest access, in bytes, that every row of every tensor is aligned for: 16, 8, 4 or 2.
int64_t access_bytes(const KVCacheUpdate& u) {
  int64_t bits = 16 | u.row_bytes;
  const auto add = [&](const Rows& rows, int64_t count) {
    bits |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data));
    // The stride of a dimension of size 1 is never used and may be anything.
    if (u.batch > 1) bits |= rows.stride_b;
    if (u.heads > 1) bits |= rows.stride_h;
    if (count > 1) bits |= rows.stride_n;
  };
  add(u.k, u.tokens);
  add(u.v, u.tokens);
  add(u.k_cache, u.capacity);
  add(u.v_cache, u.capacity);
  return bits & -bits;  // the lowest bit set
}

template <typename Vec, typename Index>
void launch(const KVCacheUpdate& u, const Positions<Index>& positions, cudaStream_t stream) {
  const int64_t vecs_per_row = u.row_bytes / static_cast<int64_t>(sizeof(Vec));
  const int64_t vecs = u.batch * u.heads * u.tokens * vecs_per_row;
  STD_TORCH_CHECK(
      vecs < int64_t{1} << 31,
      "k: expected less than 2^31 accesses of ", sizeof(Vec), " bytes, got ", vecs);
  const unsigned blocks = static_cast<unsigned>((vecs + kThreads - 1) / kThreads);
  store_rows<Vec, Index><<<blocks, kThreads, 0, stream>>>(
      u, positions, static_cast<uint32_t>(vecs_per_row), static_cast<uint32_t>(vecs));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Index>
void update(const KVCacheUpdate& u, const Positions<Index>& positions, cudaStream_t stream) {
  switch (access_bytes(u)) {
    case 16: return launch<uint4>(u, positions, stream);
    case 8: return launch<uint2>(u, positions, stream);
    case 4: return launch<uint32_t>(u, positions, stream);
    default: return launch<uint16_t>(u, positions, stream);
  }
}

void kv_cache_update_cuda(
    const Tensor& k,
    const Tensor& v,
    const Tensor& k_cache,
    const Tensor& v_cache,
    const Tensor& positions) {
  const KVCacheUpdate u = unpack_kv_cache_update(k, v, k_cache, v_cache, positions);
  if (u.batch * u.heads * u.tokens * u.row_bytes == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  // Torch's own stream class gives no native handle before 2.13.
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(k.get_device_index(), &stream));
  if (positions.element_size() == sizeof(int32_t)) {
    update(u, positions_of<int32_t>(positions), static_cast<cudaStream_t>(stream));
  } else {
    update(u, positions_of<int64_t>(positions), static_cast<cudaStream_t>(stream));
  }
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("kv_cache_update", TORCH_BOX(&fastgpt::kv_cache_update_cuda));
}
