// e^x and tanh of vectors.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "common/vectors.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;

// 2^f on [-1/2, 1/2].
[[gnu::always_inline]] inline Vector power_of_two(Vector f) {
  Vector y = broadcast(1.534581097e-04f);
  y = y * f + 1.339993090e-03f;
  y = y * f + 9.618489072e-03f;
  y = y * f + 5.550328642e-02f;
  y = y * f + 2.402264625e-01f;
  y = y * f + 6.931471825e-01f;
  return y * f + 1.0f;
}

// e^x for x <= 0, zero below 2^-126: with y = x · log2(e), 2^y = 2^n · 2^f where n = round(y) and a polynomial for 2^f
// on [-1/2, 1/2], a minimax fit of the relative error (1.9e-9 before rounding). Scores are scaled to base 2 only here: then the
// rounding of y matters least for the largest weights, while all scores in base 2 would carry its full error.
// kSmallToo: small results have the same relative accuracy: f follows from x - n log(2), with log(2) in two parts, the first of
// few bits (Cody-Waite).
template <bool kSmallToo = false>
[[gnu::always_inline]] inline Vector exp_nonpositive(Vector natural) {
  const Vector x = natural * kLog2e;
#if defined(__AVX512DQ__)
  // The same bits with fewer instructions.
  if constexpr (!kSmallToo) {
    const Vector f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT);  // x - n
    const __mmask16 normal = _mm512_cmp_ps_mask(x, broadcast(-126.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, power_of_two(f), x - f);
  }
#endif
  const Vector shifter = broadcast(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer in the low bits
  const Vector shifted = x + shifter, whole = shifted - shifter;
  const Vector f = kSmallToo ? (natural - whole * 0.693359375f + whole * 2.12194440e-4f) * kLog2e : x - whole;
  const Vector y = power_of_two(f);
  UIntVector n, bits;  // unsigned: below -126 they wrap around, and are not used
  std::memcpy(&n, &shifted, sizeof n);
  std::memcpy(&bits, &y, sizeof bits);
  bits += n << 23;  // the shifter's own bits are shifted out
  Vector result;
  std::memcpy(&result, &bits, sizeof result);
  return x >= broadcast(-126.0f) ? result : maximum(Vector{}, x);  // which is 0, or NaN where x is
}

inline float exp_nonpositive(float x) { return exp_nonpositive(broadcast(x))[0]; }

// Within 2 ulp. Below 0.625, where 1 - e^-2x would cancel, an odd polynomial (that of Cephes' tanhf).
inline Vector tanh(Vector x) {
  const Vector magnitude = x < 0.0f ? -x : x, square = x * x;
  Vector y = broadcast(-5.70498872745e-03f);
  y = y * square + 2.06390887954e-02f;
  y = y * square - 5.37397155531e-02f;
  y = y * square + 1.33314422036e-01f;
  y = y * square - 3.33332819422e-01f;
  const Vector small = y * square * x + x;
  const Vector e = exp_nonpositive(-2.0f * magnitude), large = (1.0f - e) / (1.0f + e);
  return magnitude < 0.625f ? small : x < 0.0f ? -large : large;
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
