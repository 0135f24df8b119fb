// The products of `linear` by VDPBF16PS, which adds dot products of pairs of bfloat16 to floats (AVX512_BF16).
//
// For files that are compiled once per CPU level, where that has AVX-512: everything is in an anonymous namespace (see
// cpu_level.h).

#pragma once

#include "linear/paired_rows.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// x in one piece: if it has been normalized or is float32, it is rounded to bfloat16. Each pair of a weight row is multiplied
// by the pairs of all rows of x, which are the lanes of the accumulators.
class DotRows : public PairedRows {
 public:
  static constexpr int64_t kGroup = 48;        // weight rows: a multiple of those at a time, and of a vector
  static constexpr int64_t kDequantized = 24;  // quantized weight rows that are dequantized before they are multiplied

  static bool serves(const Linear& l) {
    constexpr int64_t kLeast = 9;  // rows of x that are worth it
    return l.element == Element::bfloat16 && l.rows >= kLeast && may_be_rounded(l) && cpu_features().avx512_bf16;
  }

  DotRows(const Linear& l, float* memory) : PairedRows(l, 1, memory) {}

  // dots[n][r] = weight[n] · x[r] for `count` rows of the weight and rows() of x. If `ahead` is not 0, the weights that many
  // elements on are prefetched.
  void multiply(const BFloat16* weight, int64_t count, int64_t ahead, float* dots) const {
    switch (rows_ / kWidth) {
      case 1: return multiply_vectors<1, 12>(weight, count, ahead, dots);
      case 2: return multiply_vectors<2, 12>(weight, count, ahead, dots);
      case 3: return multiply_vectors<3, 8>(weight, count, ahead, dots);
      default: return multiply_vectors<4, 6>(weight, count, ahead, dots);
    }
  }

 private:
  // kVectors vectors of rows of x, and kRows of the weight at a time: registers hold all accumulators. If fewer rows are left,
  // the last one is multiplied several times.
  template <int kVectors, int kRows>
  FASTGPT_BF16_DOT void multiply_vectors(const BFloat16* weight, int64_t count, int64_t ahead, float* dots) const {
    constexpr int64_t kLine = 64 / sizeof(BFloat16);  // of the caches
    for (int64_t n = 0; n < count; n += kRows) {
      const BFloat16* rows[kRows];
      for (int64_t i = 0; i < kRows; ++i) rows[i] = weight + smaller(n + i, count - 1) * in_;
      const int64_t next = n + kRows < count ? kRows * in_ : ahead ? ahead - n * in_ : 0;
      __m512 total[kRows][kVectors] = {};
      for (int64_t k = 0; k < in_; k += kLine) {
        for (int i = 0; next && i < kRows; ++i) __builtin_prefetch(rows[i] + k + next, 0, 2);
        const int64_t end = smaller(k + kLine, in_ & ~int64_t{1});
        for (int64_t c = k; c < end; c += 2) {
          int32_t pairs[kRows];
          for (int i = 0; i < kRows; ++i) std::memcpy(&pairs[i], rows[i] + c, sizeof pairs[i]);
          add_products<kVectors, kRows>(c, pairs, total);
        }
      }
      if (in_ % 2) {
        int32_t pairs[kRows];
        for (int i = 0; i < kRows; ++i) {
          uint16_t bits;
          std::memcpy(&bits, rows[i] + in_ - 1, sizeof bits);
          pairs[i] = bits;
        }
        add_products<kVectors, kRows>(in_ - 1, pairs, total);
      }
      for (int64_t i = 0; i < smaller(kRows, count - n); ++i) {
        for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(dots + (n + i) * rows_ + v * kWidth, total[i][v]);
      }
    }
  }

  template <int kVectors, int kRows>
  FASTGPT_BF16_DOT __attribute__((always_inline)) inline void add_products(
      int64_t c, const int32_t (&pairs)[kRows], __m512 (&total)[kRows][kVectors]) const {
    __m512i x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = _mm512_loadu_si512(this->pairs(c, v * kWidth));
    for (int i = 0; i < kRows; ++i) {
      const __m512i pair = _mm512_set1_epi32(pairs[i]);
      for (int v = 0; v < kVectors; ++v) total[i][v] = _mm512_dpbf16_ps(total[i][v], (__m512bh)x[v], (__m512bh)pair);
    }
  }
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
