// Products of integers of weights and digits of x by VPDPBUSD, which adds dot products of four bytes to integers (AVX512_VNNI).
//
// For files that are compiled once per CPU level, where that has AVX-512: everything is in an anonymous namespace (see
// cpu_level.h).

#pragma once

#include "linear/digits.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Lane first + i / times of x in lane i.
inline __m512i spread(__m512i x, int first, int times) {
  IntVector lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i / times;
  return _mm512_maskz_permutexvar_epi32(0xffff, reinterpret_cast<__m512i>(lanes + first), x);
}

inline Vector spread(Vector x, int first, int times) {
  return reinterpret_cast<Vector>(spread(reinterpret_cast<__m512i>(x), first, times));
}

// Number 4i + j of 64, of which kWidth begin at each x[k], goes to lane i of vector j.
inline void to_lanes_of_four(const float* const (&x)[4], Vector (&numbers)[4]) {
  const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i odd = _mm512_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
  __m512 halves[2][2];  // of vectors 0 and 1, 2 and 3
  for (int half = 0; half < 2; ++half) {
    const __m512 first = _mm512_loadu_ps(x[2 * half]), second = _mm512_loadu_ps(x[2 * half + 1]);
    halves[0][half] = _mm512_permutex2var_ps(first, even, second);
    halves[1][half] = _mm512_permutex2var_ps(first, odd, second);
  }
  for (int pair = 0; pair < 2; ++pair) {
    numbers[2 * pair] = _mm512_maskz_shuffle_f32x4(0xffff, halves[pair][0], halves[pair][1], 0x44);
    numbers[2 * pair + 1] = _mm512_maskz_shuffle_f32x4(0xffff, halves[pair][0], halves[pair][1], 0xee);
  }
}

// Without an asm, GCC copies a register of zeros.
inline __m512i zeros() {
  __m512i x;
  asm volatile("vpxord %0, %0, %0" : "=v"(x));
  return x;
}

// sums[j][i] = w[0][j] · x[0] + ... for kStreams rows of weights, not negative, and kCount of x, whose digits are 64 bytes at
// digits(i, half, d). Step by step for all sums: a core does not look far enough ahead to overlap the steps of one with those
// of the next.
template <int kHalves, int kStreams, int kCount, typename Digits>
FASTGPT_BYTE_DOT __attribute__((always_inline)) inline void multiply_bytes(
    const __m512i (&w)[kHalves][kStreams], const Digits& digits, __m512i (&sums)[kStreams][kCount]) {
  for (int d = 0; d < 3; ++d) {
    for (int half = 0; half < kHalves; ++half) {
      for (int i = 0; i < kCount; ++i) {
        const __m512i bytes = in_register(_mm512_load_si512(digits(i, half, d)));
        for (int j = 0; j < kStreams; ++j) {
          const __m512i before = d || half ? sums[j][i] : zeros();
          sums[j][i] = in_register(_mm512_dpbusd_epi32(before, w[half][j], bytes));
        }
      }
    }
    for (int j = 0; j < kStreams && d < 2; ++j) {
      for (int i = 0; i < kCount; ++i) sums[j][i] = in_register(_mm512_maskz_slli_epi32(0xffff, sums[j][i], 8));
    }
  }
}

// total[j][i] += sums[j][i] · scale[j][i].
template <int kStreams, int kCount>
__attribute__((always_inline)) inline void add_scaled(
    const __m512i (&sums)[kStreams][kCount], const Vector (&scale)[kStreams][kCount], Vector (&total)[kStreams][kCount]) {
  Vector products[kStreams][kCount];
  for (int j = 0; j < kStreams; ++j) {
    for (int i = 0; i < kCount; ++i) products[j][i] = in_register(to_floats(reinterpret_cast<IntVector>(sums[j][i])));
  }
  for (int j = 0; j < kStreams; ++j) {
    for (int i = 0; i < kCount; ++i) total[j][i] += products[j][i] * scale[j][i];
  }
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
