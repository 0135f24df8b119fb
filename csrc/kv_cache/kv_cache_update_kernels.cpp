// The cache update on the CPU, compiled once per CPU level: copies rows, or rotates and quantizes them on the way. setup.py
// compiles this file with -ffp-contract=off, so that results are those of the reference, bit for bit.

#include "kv_cache/kv_cache.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/cpu_level.h"
#include "common/stored_elements.h"
#include "kv_cache/quantize.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Tokens of one head that are copied before those of the next head, for long runs.
constexpr int64_t kBlockTokens = 512;

// From this size of the keys on, which exceeds the L2 cache, non-temporal stores are used.
constexpr int64_t kLargeBytes = 4 << 20;

inline void store(const float* x, Element element, int64_t D, char* target) {
  if (element == Element::float32) {
    std::memcpy(target, x, D * sizeof(float));
    return;
  }
  uint16_t* halves = reinterpret_cast<uint16_t*>(target);
  if (element == Element::float16) {
    for (int64_t d = 0; d < D; ++d) halves[d] = float_to_half(x[d]);
  } else {
    for (int64_t d = 0; d < D; ++d) halves[d] = float_to_bfloat16(x[d]);
  }
}

// Rounds to `element`, as if stored and loaded again.
inline void round_to(Element element, int64_t D, float* x) {
  if (element == Element::float16) {
    for (int64_t d = 0; d < D; ++d) x[d] = half_to_float(float_to_half(x[d]));
  } else if (element == Element::bfloat16) {
    for (int64_t d = 0; d < D; ++d) x[d] = bfloat16_to_float(float_to_bfloat16(x[d]));
  }
}

inline void rotate(float* x, const float* cos, const float* sin, int64_t pairs, bool interleaved) {
  if (interleaved) {
    for (int64_t i = 0; i < pairs; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = rotated_first(a, b, cos[i], sin[i]);
      x[2 * i + 1] = rotated_second(a, b, cos[i], sin[i]);
    }
  } else {
    float* y = x + pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      const float a = x[i], b = y[i];
      x[i] = rotated_first(a, b, cos[i], sin[i]);
      y[i] = rotated_second(a, b, cos[i], sin[i]);
    }
  }
}

inline void rotate_for(const KVCacheUpdate& u, int64_t b, int64_t t, float* x) {
  const int64_t position = index_at(u.positions, b, t);
  if (position < 0) return;
  rotate(x, u.cos + position * u.cos_stride, u.sin + position * u.sin_stride, u.rotary_dim / 2, u.interleaved);
}

// The functions below process the tokens from begin to end of one (b, h).

void rotate_queries(const KVCacheUpdate& u, int64_t b, int64_t h, int64_t begin, int64_t end) {
  alignas(64) float x[kMaxTransformedDim];
  for (int64_t t = begin; t < end; ++t) {
    convert(row_of(u.q, b, h, t), 0, u.D, u.element, x);
    rotate_for(u, b, t, x);
    store(x, u.element, u.D, row_of(u.q_out, b, h, t));
  }
}

// Stores rows that are rotated or quantized, or both.
void store_transformed(const KVCacheUpdate& u, bool is_k, int64_t b, int64_t h, int64_t begin, int64_t end, const Slot* slots) {
  const Rows &source = is_k ? u.k : u.v, &cache = is_k ? u.k_cache : u.v_cache, &scale = is_k ? u.k_scale : u.v_scale;
  const int64_t D = is_k ? u.D : u.D_v;
  const bool quantized = u.cache_element != u.element;
  alignas(64) float x[kMaxTransformedDim];
  for (int64_t t = begin; t < end; ++t) {
    const Slot slot = slots[t - begin];
    if (slot.b < 0) continue;
    convert(row_of(source, b, h, t), 0, D, u.element, x);
    if (is_k && u.rotary_dim > 0) {
      rotate_for(u, b, t, x);
      if (quantized) round_to(u.element, D, x);  // as if rotated first and stored afterwards
    }
    char* target = row_of(cache, slot.b, h, slot.n);
    if (quantized) {
      *reinterpret_cast<float*>(row_of(scale, slot.b, h, slot.n)) = quantize(
          x, u.cache_element, D, reinterpret_cast<uint8_t*>(target));
    } else {
      store(x, u.element, D, target);
    }
  }
}

// memcpy by non-temporal stores if the CPU has them: memory that is only written need not be read first. For sizes that do not
// fit into the caches anyway.
inline void copy_past_caches(char* target, const char* source, int64_t bytes) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  constexpr int64_t kBytes = 64;
#elif defined(__AVX2__)
  constexpr int64_t kBytes = 32;
#else
  constexpr int64_t kBytes = 16;
#endif
  if (reinterpret_cast<uintptr_t>(target) % kBytes == 0 && bytes % kBytes == 0) {
    for (int64_t i = 0; i < bytes; i += kBytes) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
#elif defined(__AVX2__)
      _mm256_stream_si256(
          reinterpret_cast<__m256i*>(target + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
#else
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
#endif
    }
    return;
  }
#endif
  std::memcpy(target, source, bytes);
}

// Copies rows unchanged, contiguous ones in whole runs.
void store_copied(const KVCacheUpdate& u, bool is_k, int64_t b, int64_t h, int64_t begin, int64_t end, const Slot* slots) {
  const Rows &source = is_k ? u.k : u.v, &cache = is_k ? u.k_cache : u.v_cache;
  const int64_t row_bytes = (is_k ? u.D : u.D_v) * size_of(u.element);
  const bool large = u.B * u.H_kv * u.T * row_bytes >= kLargeBytes;
  const bool dense = source.stride_n == row_bytes && cache.stride_n == row_bytes;
  for (int64_t t = begin; t < end;) {
    const Slot slot = slots[t - begin];
    int64_t run = 1;
    if (slot.b >= 0) {
      const Slot* after = slots + (t - begin);
      while (dense && t + run < end && after[run].b == slot.b && after[run].n == slot.n + run) ++run;
      char* target = row_of(cache, slot.b, h, slot.n);
      if (large) {
        copy_past_caches(target, row_of(source, b, h, t), run * row_bytes);
      } else {
        std::memcpy(target, row_of(source, b, h, t), run * row_bytes);
      }
    }
    t += run;
  }
}

}  // namespace

// Processes a range of items, one for each of the H + 2 H_kv heads of each sequence, in the order of tokens: the last of two
// for one slot wins. Every slot has been checked.
void kv_cache_store(const KVCacheUpdate& u, int64_t begin, int64_t end) {
  const int64_t heads = u.H + 2 * u.H_kv;
  const bool quantized = u.cache_element != u.element;
  // Token-major input (as a projection writes it, the heads of a token together) is read in memory order: one token at a time
  // if rows are transformed, in blocks of 16, which measured fastest, if they are copied.
  const bool token_major = u.k.stride_n > u.k.stride_h;
  const int64_t block = !token_major ? kBlockTokens : quantized || u.rotary_dim > 0 ? 1 : 16;
  Slot slots[kBlockTokens];
  while (begin < end) {
    const int64_t b = begin / heads, first = begin % heads;
    const int64_t last = first + (end - begin) < heads ? first + (end - begin) : heads;
    for (int64_t t = 0; t < u.T; t += block) {
      const int64_t t_end = t + block < u.T ? t + block : u.T;
      for (int64_t i = t; i < t_end; ++i) slots[i - t] = slot_of(u, b, i);
      for (int64_t head = first; head < last; ++head) {
        if (head < u.H) {
          rotate_queries(u, b, head, t, t_end);
          continue;
        }
        const bool is_k = head < u.H + u.H_kv;
        const int64_t h = is_k ? head - u.H : head - u.H - u.H_kv;
        const auto store_rows = quantized || (is_k && u.rotary_dim > 0) ? store_transformed : store_copied;
        store_rows(u, is_k, b, h, t, t_end, slots);
      }
    }
    begin += last - first;
  }
#if defined(__SSE2__)
  _mm_sfence();  // orders non-temporal stores before later stores of this thread
#endif
}

}  // namespace fastgpt::FASTGPT_CPU_LEVEL
