// Conversion between stored elements and vectors of floats: float16, bfloat16, and the int8 and FP8 of quantized caches, whose
// scale the caller applies.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include <cstring>

#include "common/elements.h"
#include "common/vectors.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Types of stored elements, by which `load` is overloaded.
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

// Calls read(elements) with `data` as a pointer to the type of `element`.
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

// kWidth integers, extended to 32 bits. For __builtin_convertvector GCC 12 emits two to three times as many instructions, and
// for loops over lanes, on Arm, scalar loads. (All-ones masks, as GCC's headers cause warnings in AVX-512's unmasked forms.)
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
// By inline assembly: to GCC 12, the intrinsic of this instruction reads memory, so it would spill accumulators before each.
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

// As e4m3_to_float. Where the CPU converts float16, the 8 bits are moved into the fields of a float16, whose value is 2^-8
// times that of the element.
#if defined(__AVX512F__)
inline Vector load(const Float8* source) {
  const __m128i bytes = load_16_bytes(source);
  const __mmask16 numbers = _mm_cmpneq_epi8_mask(_mm_or_si128(bytes, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
  const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), _mm256_set1_epi16(~0x4000));
  const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
  return _mm512_mask_mul_ps(nan, numbers, _mm512_maskz_cvtph_ps(0xffff, halves), _mm512_set1_ps(0x1p8f));
}
#elif defined(__AVX2__)
inline Vector load(const Float8* source) {
  const __m128i halves = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(load_8_bytes(source)), 7), _mm_set1_epi16(~0x4000));
  const __m128i largest = _mm_set1_epi16(0x3f80), nan = _mm_cmpeq_epi16(_mm_and_si128(halves, largest), largest);
  return _mm256_cvtph_ps(_mm_or_si128(halves, nan)) * 0x1p8f;
}
#else
inline Vector load(const Float8* source) {
  const IntVector bits = widen(&source->bits), magnitude = (bits & 0x7f) << 20, leading = magnitude + (121 << 23);
  const Vector subnormal = reinterpret_cast<Vector>(leading) - 0x1p-6f;
  const IntVector finite = magnitude < broadcast(1 << 23) ? reinterpret_cast<IntVector>(subnormal) : magnitude + (120 << 23);
  const IntVector number = magnitude == broadcast(0x7f << 20) ? broadcast(0x7fc00000) : finite;
  return reinterpret_cast<Vector>(number | (bits & 0x80) << 24);
}
#endif

// Converts `count` elements from index `offset` of `source` on to floats.
inline void convert(const void* source, int64_t offset, int64_t count, Element element, float* target) {
  as_elements(source, element, [&](const auto* elements) {
    elements += offset;
    const int64_t whole = count - count % kWidth;
    for (int64_t i = 0; i < whole; i += kWidth) store(target + i, load(elements + i));
    for (int64_t i = whole; i < count; ++i) target[i] = elements[i];
  });
}

// Converts `count` floats to `element` (a floating-point one), from index `offset` of `target` on.
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
