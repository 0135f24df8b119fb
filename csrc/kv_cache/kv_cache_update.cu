// kv_cache_update and rope_kv_cache_update on a GPU: one launch each.
//
// They can be captured into a CUDA graph: positions are read by the kernel, without a host sync. If two tokens have the same
// slot, either may win, for K and V independently. A token whose position or page is out of range is not written.

#include <algorithm>

#include <torch/csrc/stable/library.h>

#include "common/cuda_launch.h"
#include "kv_cache/kv_cache_arguments.h"

namespace fastgpt {
namespace {

// Copies rows unchanged. One thread copies one Vec of K and one of V, if the shorter row has it; threads are numbered over
// (b, h, t, Vec of the longer row). Rows are loaded before the slot is known, so that the latencies of both overlap.
template <typename Vec>
__global__ void __launch_bounds__(kThreads)
    copy_rows(KVCacheUpdate u, uint32_t k_vecs_per_row, uint32_t v_vecs_per_row, uint32_t vecs) {
  const uint32_t vecs_per_row = k_vecs_per_row > v_vecs_per_row ? k_vecs_per_row : v_vecs_per_row;
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= vecs) return;
  const uint32_t heads = static_cast<uint32_t>(u.H_kv), tokens = static_cast<uint32_t>(u.T);
  const uint32_t vec = i % vecs_per_row, bht = i / vecs_per_row;
  const uint32_t t = bht % tokens, bh = bht / tokens;
  const uint32_t h = bh % heads, b = bh / heads;

  const bool has_k = vec < k_vecs_per_row, has_v = vec < v_vecs_per_row;
  Vec k, v;
  if (has_k) k = reinterpret_cast<const Vec*>(row_of(u.k, b, h, t))[vec];
  if (has_v) v = reinterpret_cast<const Vec*>(row_of(u.v, b, h, t))[vec];
  const Slot slot = slot_of(u, b, t);
  if (slot.b < 0) return;
  if (has_k) reinterpret_cast<Vec*>(row_of(u.k_cache, slot.b, h, slot.n))[vec] = k;
  if (has_v) reinterpret_cast<Vec*>(row_of(u.v_cache, slot.b, h, slot.n))[vec] = v;
}

// Conversions of each format from and to its bits.
struct Float32 {
  using Bits = uint32_t;
  static __device__ float from(Bits bits) { return bits_to_float(bits); }
  static __device__ Bits to(float x) { return float_to_bits(x); }
};
struct Float16 {
  using Bits = uint16_t;
  static __device__ float from(Bits bits) { return half_to_float(bits); }
  static __device__ Bits to(float x) { return float_to_half(x); }
};
struct BFloat16 {
  using Bits = uint16_t;
  static __device__ float from(Bits bits) { return bfloat16_to_float(bits); }
  static __device__ Bits to(float x) { return float_to_bfloat16(x); }
};

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T x[N];
};

template <typename T, int N>
__device__ Vector<T, N> load(const char* row, int index) {
  return *reinterpret_cast<const Vector<T, N>*>(row + index * sizeof(T));
}

template <int N, typename T>
__device__ void store(char* row, int index, const T (&x)[N]) {
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) vector.x[i] = x[i];
  *reinterpret_cast<Vector<T, N>*>(row + index * sizeof(T)) = vector;
}

// Two runs of N elements of a row, starting at a and at b, as floats.
template <int N>
struct Unit {
  int a, b;
  float x[2 * N];
};

// A row is divided into units such that rotated pairs lie within one. Where pairs are split between the halves of the rotary
// dimensions, a pair is (a + i, b + i); elsewhere b follows a. With N = 1 the last unit of an odd row has no b.
template <int N>
__device__ void place(Unit<N>& unit, int index, const KVCacheUpdate& u, bool rotated) {
  const int half = rotated && !u.interleaved ? static_cast<int>(u.rotary_dim) / 2 : 0;
  const bool split = index * N < half;
  unit.a = split ? index * N : 2 * index * N;
  unit.b = split ? index * N + half : unit.a + N;
}

template <typename Format, int N>
__device__ void read(Unit<N>& unit, const char* row, int D) {
  using Bits = typename Format::Bits;
  const auto a = load<Bits, N>(row, unit.a);
#pragma unroll
  for (int i = 0; i < N; ++i) unit.x[i] = Format::from(a.x[i]), unit.x[N + i] = 0.0f;
  if (unit.b >= D) return;
  const auto b = load<Bits, N>(row, unit.b);
#pragma unroll
  for (int i = 0; i < N; ++i) unit.x[N + i] = Format::from(b.x[i]);
}

__device__ void rotate(float& a, float& b, float cosine, float sine) {
  const float first = rotated_first(a, b, cosine, sine);
  b = rotated_second(a, b, cosine, sine);
  a = first;
}

// cos and sin: the position's rows.
template <int N>
__device__ void rotate(Unit<N>& unit, const float* cos, const float* sin, const KVCacheUpdate& u) {
  const int rotary_dim = static_cast<int>(u.rotary_dim);
  if (unit.a >= rotary_dim) return;
  if (!u.interleaved || N == 1) {
    const int pair = u.interleaved ? unit.a / 2 : unit.a;
    const auto c = load<float, N>(reinterpret_cast<const char*>(cos), pair);
    const auto s = load<float, N>(reinterpret_cast<const char*>(sin), pair);
#pragma unroll
    for (int i = 0; i < N; ++i) rotate(unit.x[i], unit.x[N + i], c.x[i], s.x[i]);
  } else {
    // a is a multiple of 2 N, and so is the rotary dim: one run of 2 N elements, N pairs.
    const auto c = load<float, N>(reinterpret_cast<const char*>(cos), unit.a / 2);
    const auto s = load<float, N>(reinterpret_cast<const char*>(sin), unit.a / 2);
#pragma unroll
    for (int i = 0; i < N; ++i) rotate(unit.x[2 * i], unit.x[2 * i + 1], c.x[i], s.x[i]);
  }
}

template <typename Format, int N>
__device__ void write(const Unit<N>& unit, char* row, int D) {
  typename Format::Bits a[N], b[N];
#pragma unroll
  for (int i = 0; i < N; ++i) a[i] = Format::to(unit.x[i]), b[i] = Format::to(unit.x[N + i]);
  store<N>(row, unit.a, a);
  if (unit.b < D) store<N>(row, unit.b, b);
}

template <int N>
__device__ void write_quantized(const Unit<N>& unit, float factor, Element element, char* row, int D) {
  uint8_t a[N], b[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    a[i] = element == Element::int8 ? quantized_int8(unit.x[i], factor) : quantized_e4m3(unit.x[i], factor);
    b[i] = element == Element::int8 ? quantized_int8(unit.x[N + i], factor) : quantized_e4m3(unit.x[N + i], factor);
  }
  store<N>(row, unit.a, a);
  if (unit.b < D) store<N>(row, unit.b, b);
}

// Rotates or quantizes rows; with rotation it also copies those of v. `group` threads, a power of two up to a warp, process a
// row: of the heads of q, k and v, in this order, of token t of sequence b. N elements at a time; with N > 1 a thread has at
// most one unit, which then stays in registers.
template <typename Format, int N>
__global__ void __launch_bounds__(kThreads)
    transform_rows(KVCacheUpdate u, uint32_t group, uint32_t k_units, uint32_t v_units, uint32_t rows) {
  const uint32_t index = blockIdx.x * (kThreads / group) + threadIdx.x / group;
  if (index >= rows) return;
  const uint32_t first_unit = threadIdx.x % group;
  const uint32_t heads = static_cast<uint32_t>(u.H + 2 * u.H_kv), tokens = static_cast<uint32_t>(u.T);
  const uint32_t bt = index / heads, head = index % heads;
  const uint32_t b = bt / tokens, t = bt % tokens;
  const bool is_q = head < u.H, is_k = !is_q && head < u.H + u.H_kv;
  const int D = static_cast<int>(is_q || is_k ? u.D : u.D_v);
  const uint32_t units = is_q || is_k ? k_units : v_units;
  const uint32_t h = is_q ? head : is_k ? head - u.H : head - u.H - u.H_kv;

  const int64_t position = u.rotary_dim > 0 ? index_at(u.positions, b, t) : -1;
  const bool rotated = (is_q || is_k) && position >= 0 && position < u.angles;
  const float* cos = u.cos + position * u.cos_stride;
  const float* sin = u.sin + position * u.sin_stride;

  const char* source = row_of(is_q ? u.q : is_k ? u.k : u.v, b, h, t);
  char *target, *scale = nullptr;
  if (is_q) {
    target = row_of(u.q_out, b, h, t);
  } else {
    const Slot slot = slot_of(u, b, t);
    if (slot.b < 0 || (u.rotary_dim > 0 && position >= u.angles)) return;
    target = row_of(is_k ? u.k_cache : u.v_cache, slot.b, h, slot.n);
    if (u.k_scale.data) scale = row_of(is_k ? u.k_scale : u.v_scale, slot.b, h, slot.n);
  }

  Unit<N> unit;
  float largest = 0.0f;
  const auto prepare = [&](uint32_t i) {
    place(unit, static_cast<int>(i), u, rotated);
    read<Format>(unit, source, D);
    if (!rotated) return;
    rotate(unit, cos, sin, u);
    if (scale) {  // as if rotated first and stored afterwards
#pragma unroll
      for (int j = 0; j < 2 * N; ++j) unit.x[j] = Format::from(Format::to(unit.x[j]));
    }
  };
  for (uint32_t i = first_unit; i < units; i += group) {
    prepare(i);
    if (scale) {
#pragma unroll
      for (int j = 0; j < 2 * N; ++j) largest = larger_magnitude(largest, unit.x[j]);
    } else {
      write<Format>(unit, target, D);
    }
  }
  if (!scale) return;

  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t mask = (group == kWarp ? ~0u : (1u << group) - 1) << (lane & ~(group - 1));
  for (uint32_t offset = group / 2; offset > 0; offset /= 2) {
    largest = larger_magnitude(largest, __shfl_xor_sync(mask, largest, offset));
  }
  const Quantizer quantizer = quantizer_of(largest, u.cache_element);
  if (first_unit == 0) *reinterpret_cast<float*>(scale) = quantizer.scale;
  for (uint32_t i = first_unit; i < units; i += group) {
    if (N == 1) prepare(i);
    write_quantized(unit, quantizer.factor, u.cache_element, target, D);
  }
}

// The widest access, in bytes, that rows are aligned for: a power of two, at most 16. B, H, N: the dimensions' sizes; the
// stride of a dimension of size 1 is not used and may be anything.
int64_t alignment(const Rows& rows, int64_t B, int64_t H, int64_t N) {
  int64_t bits = 16 | static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data));
  if (B > 1) bits |= rows.stride_b;
  if (H > 1) bits |= rows.stride_h;
  if (N > 1) bits |= rows.stride_n;
  return bits & -bits;  // the lowest bit set
}

int64_t source_alignment(const KVCacheUpdate& u) {
  int64_t bits = alignment(u.k, u.B, u.H_kv, u.T) | alignment(u.v, u.B, u.H_kv, u.T);
  if (u.H > 0) bits |= alignment(u.q, u.B, u.H, u.T) | alignment(u.q_out, u.B, u.H, u.T);
  return bits & -bits;
}

int64_t cache_alignment(const KVCacheUpdate& u) {
  const int64_t first = u.block_table ? u.pages : u.B, rows = u.block_table ? u.page : u.capacity;
  const int64_t bits = alignment(u.k_cache, first, u.H_kv, rows) | alignment(u.v_cache, first, u.H_kv, rows);
  return bits & -bits;
}

uint32_t count32(int64_t count, const char* what) {
  FASTGPT_CHECK(count < int64_t{1} << 31, "k: expected less than 2^31 ", what, " in one update, got ", count);
  return static_cast<uint32_t>(count);
}

template <typename Vec>
void copy(const KVCacheUpdate& u, const Tensor& k) {
  const auto vecs_of = [&](int64_t D) { return D * size_of(u.element) / static_cast<int64_t>(sizeof(Vec)); };
  const int64_t k_vecs = vecs_of(u.D), v_vecs = vecs_of(u.D_v);
  const uint32_t vecs = count32(u.B * u.H_kv * u.T * std::max(k_vecs, v_vecs), "accesses");
  launch(copy_rows<Vec>, vecs, k, u, static_cast<uint32_t>(k_vecs), static_cast<uint32_t>(v_vecs), vecs);
}

template <typename Format, int N>
void transform(const KVCacheUpdate& u, const Tensor& k) {
  const auto units_of = [](int64_t D) { return static_cast<uint32_t>((D + 2 * N - 1) / (2 * N)); };
  const uint32_t k_units = units_of(u.D), v_units = units_of(u.D_v);
  uint32_t group = 1;
  while (group < std::max(k_units, v_units) && group < kWarp) group *= 2;
  const uint32_t rows = count32(u.B * u.T * (u.H + 2 * u.H_kv), "rows");
  launch(transform_rows<Format, N>, static_cast<int64_t>(rows) * group, k, u, group, k_units, v_units, rows);
}

template <typename Format>
void transform(const KVCacheUpdate& u, const Tensor& k) {
  constexpr int N = 16 / sizeof(typename Format::Bits);
  const bool quantized = u.cache_element != u.element;
  const auto aligned = [](const float* data, int64_t stride) {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride * sizeof(float))) % 16 == 0;
  };
  const bool wide = (u.D | u.D_v) % (2 * N) == 0 && std::max(u.D, u.D_v) / (2 * N) <= kWarp && source_alignment(u) == 16 &&
      cache_alignment(u) >= (quantized ? N : 16) && u.rotary_dim % (2 * N) == 0 && aligned(u.cos, u.cos_stride) &&
      aligned(u.sin, u.sin_stride);
  return wide ? transform<Format, N>(u, k) : transform<Format, 1>(u, k);
}

void run(const KVCacheUpdate& u, const Tensor& k) {
  if (u.D == 0 && u.D_v == 0) return;
  if (u.rotary_dim > 0 || u.cache_element != u.element) {
    switch (u.element) {
      case Element::float32: return transform<Float32>(u, k);
      case Element::float16: return transform<Float16>(u, k);
      default: return transform<BFloat16>(u, k);
    }
  }
  const int64_t bits = (u.D | u.D_v) * size_of(u.element) | source_alignment(u) | cache_alignment(u);
  switch (bits & -bits) {
    case 16: return copy<uint4>(u, k);
    case 8: return copy<uint2>(u, k);
    case 4: return copy<uint32_t>(u, k);
    default: return copy<uint16_t>(u, k);
  }
}

void kv_cache_update_cuda(
    const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  Written written;
  run(kv_cache_arguments(k, v, k_cache, v_cache, positions, block_table, k_scale, v_scale, written), k);
}

Tensor rope_kv_cache_update_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
    const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& slots, bool interleaved,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  Written written;
  KVCacheUpdate u = kv_cache_arguments(
      k, v, k_cache, v_cache, slots ? *slots : positions, block_table, k_scale, v_scale, written);
  const Tensor q_out = add_rotation(u, written, q, k, positions, cos, sin, interleaved);
  run(u, k);
  return q_out;
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("kv_cache_update", TORCH_BOX(&fastgpt::kv_cache_update_cuda));
  m.impl("rope_kv_cache_update", TORCH_BOX(&fastgpt::rope_kv_cache_update_cuda));
}
