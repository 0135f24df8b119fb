// Element arithmetic that CPU and CUDA kernels share: conversion between formats, rotation, quantization. Each function
// rounds after every operation, as PyTorch does, so that results are the same bits everywhere. Everything is in an
// anonymous namespace, for files that are compiled once per CPU level (see cpu_level.h).

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define FASTGPT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTGPT_HOST_DEVICE inline
#endif

namespace fastgpt {

// Storage formats. Kernels compute on the first three; the others are for quantized caches, with a scale.
enum class Element { float32, float16, bfloat16, int8, float8_e4m3 };

namespace {

constexpr int64_t size_of(Element element) {
  return element == Element::float32 ? 4 : element == Element::float16 || element == Element::bfloat16 ? 2 : 1;
}

FASTGPT_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FASTGPT_HOST_DEVICE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Products and sums that are never fused. On the CPU that needs -ffp-contract=off, see setup.py.
FASTGPT_HOST_DEVICE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FASTGPT_HOST_DEVICE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

FASTGPT_HOST_DEVICE float half_to_float(uint16_t half) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(half));
#else
  // The exponent biases differ by 112. A subnormal half gets an implicit one of 2^-14, which is subtracted again: so no float
  // is subnormal, which might be flushed to zero. Infinity and NaN are handled apart.
  const uint32_t magnitude = (half & 0x7fffu) << 13, normal = magnitude + (112u << 23);
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude + (113u << 23)) - 0x1p-14f);
  const uint32_t finite = magnitude < 1u << 23 ? subnormal : normal;
  const uint32_t bits = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : finite;
  return bits_to_float(bits | (half & 0x8000u) << 16);
#endif
}

// Without branches, so that loops over it are vectorized.
FASTGPT_HOST_DEVICE uint16_t float_to_half(float x) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t magnitude = float_to_bits(x) & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
  const uint32_t subnormal = float_to_bits(add(bits_to_float(magnitude), 0.5f)) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 113u << 23 ? subnormal : normal;
  return static_cast<uint16_t>((float_to_bits(x) >> 16 & 0x8000u) | (magnitude >= 143u << 23 ? special : finite));
#endif
}

FASTGPT_HOST_DEVICE float bfloat16_to_float(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }

FASTGPT_HOST_DEVICE uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// FP8 with 4 exponent bits and 3 mantissa bits, without infinity (arXiv 2209.05433).
FASTGPT_HOST_DEVICE float e4m3_to_float(uint8_t x) {
  const uint32_t magnitude = (x & 0x7fu) << 20, normal = magnitude + (120u << 23);
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude + (121u << 23)) - 0x1p-6f);  // as in half_to_float
  const uint32_t finite = magnitude < 1u << 23 ? subnormal : normal;
  const uint32_t bits = magnitude == 0x7fu << 20 ? 0x7fc00000u : finite;
  return bits_to_float(bits | (x & 0x80u) << 24);
}

// Rounds to nearest, ties to even, and saturates to 448; x is not NaN.
FASTGPT_HOST_DEVICE uint8_t float_to_e4m3(float x) {
  const uint32_t magnitude = float_to_bits(x) & 0x7fffffffu;
  const uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  // Below 2^-6: adding 2^14 leaves the rounded multiple of 2^-9 in the low bits.
  const uint32_t subnormal = float_to_bits(add(bits_to_float(magnitude), 16384.0f)) - 0x46800000u;
  const uint32_t rounded = magnitude < 121u << 23 ? subnormal : normal;
  const uint32_t capped = magnitude >= 0x43e00000u ? 0x7eu : rounded;
  return static_cast<uint8_t>((float_to_bits(x) >> 24 & 0x80u) | capped);
}

// One rotated pair (a, b) of a query or key: (a cos - b sin, b cos + a sin).
FASTGPT_HOST_DEVICE float rotated_first(float a, float b, float cosine, float sine) {
  return add(multiply(a, cosine), -multiply(b, sine));
}
FASTGPT_HOST_DEVICE float rotated_second(float a, float b, float cosine, float sine) {
  return add(multiply(b, cosine), multiply(a, sine));
}

// Quantization of a row: its elements are multiplied by `factor` and rounded; multiplying by `scale` dequantizes them.
struct Quantizer {
  float scale, factor;
};

// For a row whose largest magnitude is `largest`: below 1e-30 it counts as zero; if it is infinite or NaN, the scale is NaN,
// and so are the dequantized elements.
FASTGPT_HOST_DEVICE Quantizer quantizer_of(float largest, Element element) {
  const float limit = element == Element::int8 ? 127.0f : 448.0f;
  if (!(largest <= 3.402823466e+38f)) return {bits_to_float(0x7fc00000u), 0.0f};
  if (largest < 1e-30f) return {0.0f, 0.0f};
#if defined(__CUDA_ARCH__)
  return {__fdiv_rn(largest, limit), __fdiv_rn(limit, largest)};
#else
  return {largest / limit, limit / largest};
#endif
}

// The larger of a magnitude and |x|; NaN if either is.
FASTGPT_HOST_DEVICE float larger_magnitude(float magnitude, float x) {
  const uint32_t a = float_to_bits(magnitude), b = float_to_bits(x) & 0x7fffffffu;  // ordered like integers, NaN above all
  return bits_to_float(a > b ? a : b);
}

// With factor 0 (a row of zeros, or one that is not finite) elements are stored as zero.
FASTGPT_HOST_DEVICE uint8_t quantized_int8(float x, float factor) {
  const float y = multiply(x, factor);
  // Adding 1.5 · 2^23 rounds to the nearest integer, ties to even, in the low bits.
  const uint32_t rounded = float_to_bits(add(y, 12582912.0f)) - 0x4b400000u;
  return static_cast<uint8_t>(factor == 0.0f ? 0u : rounded);
}

FASTGPT_HOST_DEVICE uint8_t quantized_e4m3(float x, float factor) {
  return factor == 0.0f ? 0 : float_to_e4m3(multiply(x, factor));
}

}  // namespace
}  // namespace fastgpt
