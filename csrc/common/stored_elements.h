// Stored elements as vectors of floats and back: float16, bfloat16, and the integers and FP8 of quantized caches, whose scale
// the reader applies.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include <cstring>

#include "common/elements.h"
#include "common/vectors.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Elements as memory holds them, so that pointers to them tell how to load.
struct Half {
  uint16_t bits;
  operator float() const { return half_to_float(bits); }
};
struct BFloat16 {
  uint16_t bits;
  operator float() const { return bfloat16_to_float(bits); }
};
struct Float8 {
  uint8_t bits;
  operator float() const { return e4m3_to_float(bits); }
};

// read(elements), with `data` as a pointer to elements of the type that it holds.
template <typename Read>
inline void as_elements(const void* data, Element element, const Read& read) {
  switch (element) {
    case Element::float32: return read(static_cast<const float*>(data));
    case Element::float16: return read(static_cast<const Half*>(data));
    case Element::bfloat16: return read(static_cast<const BFloat16*>(data));
    case Element::int8: return read(static_cast<const int8_t*>(data));
    case Element::float8_e4m3: return read(static_cast<const Float8*>(data));
  }
}

// kWidth numbers as 32-bit ones. From __builtin_convertvector, GCC 12 makes twice to three times the instructions; on Arm, of
// loops over lanes it makes loads of single ones. (Masks of all lanes, because its headers warn of AVX-512's plain forms.)
#if defined(__AVX512F__)
inline __m128i load_16_bytes(const void* source) { return _mm_loadu_si128(static_cast<const __m128i*>(source)); }
inline __m256i load_32_bytes(const void* source) { return _mm256_loadu_si256(static_cast<const __m256i*>(source)); }
inline IntVector widen(const int8_t* source) {
  return reinterpret_cast<IntVector>(_mm512_maskz_cvtepi8_epi32(0xffff, load_16_bytes(source)));
}
inline IntVector widen(const uint8_t* source) {
  return reinterpret_cast<IntVector>(_mm512_maskz_cvtepu8_epi32(0xffff, load_16_bytes(source)));
}
inline IntVector widen(const uint16_t* source) {
  return reinterpret_cast<IntVector>(_mm512_maskz_cvtepu16_epi32(0xffff, load_32_bytes(source)));
}
inline Vector load(const Half* source) { return _mm512_maskz_cvtph_ps(0xffff, load_32_bytes(source)); }
#elif defined(__AVX2__)
inline __m128i load_8_bytes(const void* source) { return _mm_loadl_epi64(static_cast<const __m128i*>(source)); }
inline __m128i load_16_bytes(const void* source) { return _mm_loadu_si128(static_cast<const __m128i*>(source)); }
inline IntVector widen(const int8_t* source) { return reinterpret_cast<IntVector>(_mm256_cvtepi8_epi32(load_8_bytes(source))); }
inline IntVector widen(const uint8_t* source) {
  return reinterpret_cast<IntVector>(_mm256_cvtepu8_epi32(load_8_bytes(source)));
}
inline IntVector widen(const uint16_t* source) {
  return reinterpret_cast<IntVector>(_mm256_cvtepu16_epi32(load_16_bytes(source)));
}
inline Vector load(const Half* source) { return _mm256_cvtph_ps(load_16_bytes(source)); }
#elif defined(__aarch64__)
inline uint8x8_t load_4_bytes(const void* source) {
  uint32_t bytes;
  std::memcpy(&bytes, source, sizeof bytes);
  return vreinterpret_u8_u32(vdup_n_u32(bytes));
}
inline IntVector widen(const int8_t* source) {
  const int16x8_t twice = vmovl_s8(vreinterpret_s8_u8(load_4_bytes(source)));
  return reinterpret_cast<IntVector>(vmovl_s16(vget_low_s16(twice)));
}
inline IntVector widen(const uint8_t* source) {
  return reinterpret_cast<IntVector>(vmovl_u16(vget_low_u16(vmovl_u8(load_4_bytes(source)))));
}
inline IntVector widen(const uint16_t* source) { return reinterpret_cast<IntVector>(vmovl_u16(vld1_u16(source))); }
// For all GCC 12 knows, the intrinsic of this instruction reads memory: it would store sums in registers before each.
inline Vector load(const Half* source) {
  Vector x;
  asm("fcvtl %0.4s, %1.4h" : "=w"(x) : "w"(vld1_u16(&source->bits)));
  return x;
}
#else
template <typename Number>
inline IntVector widen(const Number* source) {
  IntVector x;
  for (int i = 0; i < kWidth; ++i) x[i] = source[i];
  return x;
}
inline Vector load(const Half* source) {
  Vector x;
  for (int i = 0; i < kWidth; ++i) x[i] = source[i];
  return x;
}
#endif

inline Vector load(const BFloat16* source) {
  const IntVector bits = widen(&source->bits) << 16;
  return reinterpret_cast<Vector>(bits);
}

inline Vector load(const int8_t* source) { return __builtin_convertvector(widen(source), Vector); }

// As e4m3_to_float.
inline Vector load(const Float8* source) {
  const IntVector bits = widen(&source->bits), magnitude = bits & 0x7f, shifted = magnitude << 20;
  const Vector scaled = reinterpret_cast<Vector>(shifted) * 0x1p120f;
  const IntVector number = magnitude == 0x7f ? broadcast(0x7fc00000) : reinterpret_cast<IntVector>(scaled);
  return reinterpret_cast<Vector>(number | (bits & 0x80) << 24);
}

// `count` elements of `element`, from index `offset` of `source`, as floats.
inline void convert(const void* source, int64_t offset, int64_t count, Element element, float* target) {
  as_elements(source, element, [&](const auto* elements) {
    elements += offset;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(target + i, load(elements + i));
    for (; i < count; ++i) target[i] = elements[i];
  });
}

// `count` floats as elements of q's dtype, from index `offset` of `target` on.
inline void write(const float* source, int64_t count, void* target, int64_t offset, Element element) {
  if (element == Element::float32) {
    std::memcpy(static_cast<float*>(target) + offset, source, count * sizeof(float));
  } else if (element == Element::float16) {
    for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(target)[offset + i] = float_to_half(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(target)[offset + i] = float_to_bfloat16(source[i]);
  }
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
