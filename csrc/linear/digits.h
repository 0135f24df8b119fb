// Numbers of x as integers of 24 bits in three digits of 8, which instructions for dot products of bytes multiply with integers
// of quantized weights. That takes fewer instructions than unpacking weights to floats.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "linear/activations.h"

// Of functions that use VPDPBUSD, on CPUs that have it (AVX512_VNNI).
#if defined(__AVX512F__)
#define FASTGPT_BYTE_DOT __attribute__((target("avx512vnni")))
#else
#define FASTGPT_BYTE_DOT
#endif

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

inline Vector masked(Vector x, IntVector mask) { return reinterpret_cast<Vector>(reinterpret_cast<IntVector>(x) & mask); }

#if defined(__AVX512F__)
inline Vector to_floats(IntVector x) { return _mm512_maskz_cvtepi32_ps(0xffff, reinterpret_cast<__m512i>(x)); }
inline IntVector rounded(Vector x) { return reinterpret_cast<IntVector>(_mm512_maskz_cvtps_epi32(0xffff, x)); }
#else
inline Vector to_floats(IntVector x) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(x)); }
inline IntVector rounded(Vector x) { return reinterpret_cast<IntVector>(_mm256_cvtps_epi32(x)); }
#endif

constexpr int64_t kTogether = 8;  // numbers that are left to floats together

// What eight numbers together may be: below `share` of the largest one they are small, and that one is at most `most`.
//
// Integers err by up to half of one in 2^22 of the largest number. In sums of n terms the numerics contract allows each term,
// even if it is the only one that its weights keep, an error of about 2^-24 sqrt(n) of it: numbers below 2 / sqrt(n) of the
// largest may err more. There must not be four of them, since the others may all meet weights of zero;
// nor two below a 128th of the largest, or one below a 2048th. Fewer and larger ones may err more than the contract allows if
// all others meet nothing but zeros.
//
// With minima, products with the integers and the sums' with the minimum cancel each other where weights are near zero, but
// for errors of 2^-24 of both. What the contract allows other lanes may be less where x is sqrt(n) / 4 times as large as in an
// eighth of its parts.
struct Bounds {
  float share, most = kInfinity;

  Bounds(const float* x, int64_t n, bool minima) : share(2 / __builtin_sqrtf(static_cast<float>(n))) {
    if (!minima) return;
    int64_t parts[256] = {}, before = 0;  // by exponent; those of zeros do not count
    for (int64_t c = 0; c < n; c += kWidth) {
      float sizes[kWidth];
      store(sizes, magnitude(load(x + c)));
      for (int i = 0; i < kWidth; i += kTogether) {
        ++parts[float_to_bits(reduce<kTogether>(sizes + i, [](auto a, auto b) { return a > b ? a : b; })) >> 23 & 255];
      }
    }
    const int64_t eighth = (n / kTogether - parts[0]) / 8;
    uint32_t exponent = 1;
    while (exponent < 255 && (before += parts[exponent]) <= eighth) ++exponent;
    most = bits_to_float(exponent << 23) / 2 / share;
  }
};

#if defined(__AVX512F__)
inline Vector neighbors(Vector x) { return _mm512_maskz_permute_ps(0xffff, x, 0xb1); }
#else
inline Vector neighbors(Vector x) { return _mm256_permute_ps(x, 0xb1); }
#endif
inline IntVector neighbors(IntVector x) { return reinterpret_cast<IntVector>(neighbors(reinterpret_cast<Vector>(x))); }

// Eight numbers, four in each of two halves of a lane or, if there is one half, of two neighbors, as integers times the lane's
// `scale`. Their digits are in the lane's bytes: digits[half][0] · 2^16 + digits[half][1] · 2^8 + digits[half][2], at most
// 2^23 · 128 / 129. `left`: lanes, -1 each, that are left to floats, and whose digits are zeros: those beyond the bounds, that
// have numbers that are not finite, others that integers cannot keep 8 bits of, or only ones so small that `scale` times the
// smallest float16 would be subnormal: where those are flushed to zero, the lane's whole product would be.
template <int kHalves>
struct Digits {
  IntVector digits[kHalves][3] = {}, sums = {}, left = {};
  Vector scale;

  Digits(const Vector (&numbers)[kHalves][4], const Bounds& bounds) {
    const Vector zero = {}, infinity = broadcast(kInfinity);
    Vector largest = zero;
    IntVector small = {}, tiny = {};  // minus the numbers of small ones
    for (const auto& of_half : numbers) {
      for (const Vector number : of_half) {
        const Vector size = magnitude(number);
        largest = maximum(largest, size), left |= ~(size < infinity);
      }
    }
    if constexpr (kHalves == 1) largest = maximum(largest, neighbors(largest));
    for (const auto& of_half : numbers) {
      for (const Vector number : of_half) {
        const Vector size = magnitude(number);
        small += (size > zero) & (size < largest * bounds.share), tiny += (size > zero) & (size < largest * 0x1p-7f);
        left |= (size > zero) & (size < largest * 0x1p-11f);
      }
    }
    if constexpr (kHalves == 1) small += neighbors(small), tiny += neighbors(tiny), left |= neighbors(left);
    left |= (small <= -4) | (tiny <= -2) | (largest > bounds.most) | (largest >= 0x1p126f) |
        ((largest < 0x1p-80f) & (largest > zero));
    const IntVector used = ~left & (largest > zero);
    // The power of two below the largest number, or above it if that would have too many digits.
    const Vector power = masked(largest * (1 + 0x1p-7f), used & 0x7f800000), factor = masked(0x1p22f / power, used);
    for (int half = 0; half < kHalves; ++half) {
      for (int j = 0; j < 4; ++j) {
        const IntVector integers = rounded(masked(numbers[half][j], ~left) * factor);
        const IntVector upper = (integers + 128) >> 8, first = (upper + 128) >> 8;
        digits[half][0] |= (first & 255) << 8 * j, digits[half][1] |= (upper & 255) << 8 * j;
        digits[half][2] |= (integers & 255) << 8 * j;
        sums += integers;
      }
    }
    scale = power * 0x1p-22f;
  }
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
