// Quantization of a row to bytes and a scale: the functions of elements.h, vectorized, with the same bits.
//
// For files that are compiled once per CPU level, with -ffp-contract=off: everything is in an anonymous namespace (see
// cpu_level.h).

#pragma once

#include "common/elements.h"
#include "common/vectors.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

inline UIntVector bits_of(Vector x) { return reinterpret_cast<UIntVector>(x); }
inline UIntVector magnitude_of(Vector x) { return bits_of(x) & 0x7fffffffu; }

// As quantized_int8 and quantized_e4m3, for a factor other than 0; results are in the lowest bytes of the lanes.
inline UIntVector int8_of(Vector x, float factor) { return bits_of(x * factor + 12582912.0f) - 0x4b400000u; }
inline UIntVector e4m3_of(Vector x, float factor) {
  x *= factor;
  const UIntVector magnitude = magnitude_of(x);
  const UIntVector normal = (magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  const UIntVector subnormal = bits_of(reinterpret_cast<Vector>(magnitude) + 16384.0f) - 0x46800000u;
  const UIntVector rounded = magnitude < (UIntVector{} + (121u << 23)) ? subnormal : normal;
  const UIntVector capped = magnitude >= (UIntVector{} + 0x43e00000u) ? UIntVector{} + 0x7eu : rounded;
  return (bits_of(x) >> 24 & 0x80u) | capped;
}

// Stores the lowest byte of each lane.
inline void store_bytes(UIntVector x, uint8_t* target) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(x)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  const Bytes bytes = __builtin_convertvector(x, Bytes);
  std::memcpy(target, &bytes, sizeof bytes);
#endif
}

// Quantizes D floats, and returns the scale.
inline float quantize(const float* x, Element element, int64_t D, uint8_t* target) {
  const int64_t whole = D / kWidth * kWidth;
  UIntVector lanes = {};
  for (int64_t d = 0; d < whole; d += kWidth) {
    const UIntVector magnitude = magnitude_of(load(x + d));
    lanes = magnitude > lanes ? magnitude : lanes;
  }
  float largest = 0.0f;
  for (int i = 0; i < kWidth; ++i) largest = larger_magnitude(largest, bits_to_float(lanes[i]));
  for (int64_t d = whole; d < D; ++d) largest = larger_magnitude(largest, x[d]);

  const Quantizer quantizer = quantizer_of(largest, element);
  const float factor = quantizer.factor;
  if (factor == 0.0f) {
    std::memset(target, 0, D);
  } else if (element == Element::int8) {
    for (int64_t d = 0; d < whole; d += kWidth) store_bytes(int8_of(load(x + d), factor), target + d);
    for (int64_t d = whole; d < D; ++d) target[d] = quantized_int8(x[d], factor);
  } else {
    for (int64_t d = 0; d < whole; d += kWidth) store_bytes(e4m3_of(load(x + d), factor), target + d);
    for (int64_t d = whole; d < D; ++d) target[d] = quantized_e4m3(x[d], factor);
  }
  return quantizer.scale;
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
