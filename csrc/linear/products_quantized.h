// The products of `linear` with quantized weights: a few rows of x are multiplied with integers as they are read, each group's
// sum with its scale; for more rows, weights are dequantized a panel at a time.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "linear/linear.h"
#include "linear/products_vector.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

constexpr int kPackedVectors = kPacked / kWidth;

// Numbers of kBits bits as floats, kPacked at a time.
template <int kBits, bool kMinima>
struct Packed {
  static constexpr int64_t kBytes = kPacked * kBits / 8;

  __attribute__((always_inline)) static inline void load_all(const uint8_t* source, Vector (&w)[kPackedVectors]) {
    if constexpr (kBits == 8) {
      for (int v = 0; v < kPackedVectors; ++v) w[v] = load_number(source + v * kWidth);
    } else {
#if defined(__AVX512F__)
      const __m128i bytes = load_16_bytes(source), mask = _mm_set1_epi8(15), offset = _mm_set1_epi8(kOffset);
      const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
      w[0] = _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_sub_epi8(low, offset)));
      w[1] = _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_sub_epi8(high, offset)));
#elif defined(__AVX2__)
      // Sign extension takes two instructions' time. A byte is moved into the lowest bits of 2^23 instead, which is taken off.
      const __m256i bytes = _mm256_broadcastsi128_si256(load_16_bytes(source)), mask = _mm256_set1_epi8(15);
      const __m256i low = _mm256_and_si256(bytes, mask), high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
      const auto numbers = [](__m256i bytes, __m256i places) {
        const __m256i bits = _mm256_or_si256(_mm256_shuffle_epi8(bytes, places), _mm256_set1_epi32(0x4b000000));
        return reinterpret_cast<Vector>(bits) - (0x1p23f + kOffset);
      };
      const __m256i first = _mm256_setr_epi32(-256, -255, -254, -253, -252, -251, -250, -249);  // 0x80 in what becomes zero
      const __m256i second = _mm256_or_si256(first, _mm256_set1_epi32(8));
      w[0] = numbers(low, first), w[1] = numbers(low, second), w[2] = numbers(high, first), w[3] = numbers(high, second);
#else
      int8_t numbers[kPacked];
      for (int i = 0; i < kPacked / 2; ++i) {
        numbers[i] = static_cast<int8_t>((source[i] & 15) - kOffset);
        numbers[i + kPacked / 2] = static_cast<int8_t>((source[i] >> 4) - kOffset);
      }
      for (int v = 0; v < kPackedVectors; ++v) w[v] = load(numbers + v * kWidth);
#endif
    }
  }

 private:
  static constexpr int kOffset = kMinima ? 0 : 8;  // of numbers of 4 bits

  static Vector load_number(const uint8_t* source) {
    if constexpr (kMinima) {
      return __builtin_convertvector(widen(source), Vector);
    } else {
      return load(reinterpret_cast<const int8_t*>(source));
    }
  }
};

inline Vector broadcast_half(const uint8_t* source) {
  uint16_t bits;
  std::memcpy(&bits, source, sizeof bits);
#if defined(__AVX512F__)
  return _mm512_maskz_broadcastss_ps(0xffff, _mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(bits)));
#else
  return broadcast(half_to_float(bits));
#endif
}

// Lanes of the sums of x[i] · w for kCount rows of x and one of the weights, in groups of kGroup, or if that is 0 of any size.
// If `ahead` is not 0, the bytes that far on are prefetched.
template <int kCount, int kGroup, int kBits, bool kMinima>
__attribute__((always_inline)) inline void multiply_quantized(
    const float* x, int64_t x_row, int64_t in, const uint8_t* weight, int64_t group_size, int64_t ahead,
    Vector (&total)[kCount]) {
  using Numbers = Packed<kBits, kMinima>;
  constexpr int kSums = kPackedVectors < 2 ? 1 : 2;  // independent accumulators
  const int64_t size = kGroup ? kGroup : group_size;
  for (int i = 0; i < kCount; ++i) total[i] = Vector{};
  for (const float* const end = x + in; x < end;) {
    const Vector scale = broadcast_half(weight), minimum = kMinima ? broadcast_half(weight + 2) : Vector{};
    weight += kMinima ? 4 : 2;
    Vector sums[kCount][kSums] = {};
    const float* const group_end = x + size;
    do {
      if (ahead) __builtin_prefetch(weight + ahead, 0, 2);
      Vector w[kPackedVectors];
      Numbers::load_all(weight, w);
      for (int v = 0; v < kPackedVectors; ++v) {
        if (kMinima) w[v] = w[v] * scale + minimum;
        for (int i = 0; i < kCount; ++i) sums[i][v % kSums] += load(x + i * x_row + v * kWidth) * w[v];
      }
      x += kPacked, weight += Numbers::kBytes;
    } while (kGroup != kPacked && x < group_end);
    for (int i = 0; i < kCount; ++i) {
      for (int s = 1; s < kSums; ++s) sums[i][0] += sums[i][s];
      total[i] = kMinima ? total[i] + sums[i][0] : total[i] + sums[i][0] * scale;
    }
  }
}

// Columns c to c + count of a row as floats.
template <int kBits, bool kMinima>
void dequantize(const uint8_t* row, const Packing& packing, int64_t c, int64_t count, float* target) {
  using Numbers = Packed<kBits, kMinima>;
  constexpr int64_t kHeader = kMinima ? 4 : 2;
  const int64_t size = packing.group_size, group_bytes = kHeader + size / kPacked * Numbers::kBytes;
  while (count > 0) {
    const uint8_t* group = row + c / size * group_bytes;
    const Vector scale = broadcast_half(group), minimum = kMinima ? broadcast_half(group + 2) : Vector{};
    const int64_t within = c % size, end = smaller(within + count, size);
    for (int64_t k = within; k < end; k += kPacked, target += kPacked) {
      Vector w[kPackedVectors];
      Numbers::load_all(group + kHeader + k / kPacked * Numbers::kBytes, w);
      for (int v = 0; v < kPackedVectors; ++v) store(target + v * kWidth, w[v] * scale + minimum);
    }
    c += end - within, count -= end - within;
  }
}

// Quantized weights, which are multiplied row by row with all rows of x.
template <int kBits, bool kMinima>
class QuantizedRows {
 public:
  static constexpr int64_t kRows = kWidth;  // of weights, whose lanes are reduced together

  explicit QuantizedRows(const Linear& l) : l_(l), row_bytes_(l.packing.row_bytes(l.in)) {}

  int64_t row_bytes() const { return row_bytes_; }

  // dots[r][s] = x[r] · weight[row + s] for all rows of x and `count` of the weights, up to kRows. If `ahead` is not 0, the
  // weights that many bytes on are prefetched.
  void multiply(const float* x, int64_t row, int64_t count, int64_t ahead, float* dots) const {
    const auto* weight = static_cast<const uint8_t*>(l_.weight) + row * row_bytes_;
    if (l_.rows <= kFewRows) return multiply_few<kFewRows>(x, weight, count, ahead, dots);
    for (int64_t s = 0; s < count; s += kMostStreams) {
      multiply_many(x, weight + s * row_bytes_, smaller(count - s, kMostStreams), dots + s);
    }
  }

 private:
  static constexpr int kFewRows = 4;  // of x, that are multiplied with integers
  static constexpr int64_t kPanel = 16 * kPacked;

  template <int kCount>
  void multiply_few(const float* x, const uint8_t* weight, int64_t count, int64_t ahead, float* dots) const {
    if constexpr (kCount > 1) {
      if (l_.rows < kCount) return multiply_few<kCount - 1>(x, weight, count, ahead, dots);
    }
    const auto multiply = [&](auto group) {
      Vector lanes[kCount][kRows] = {}, total[kCount];
      for (int64_t s = 0; s < count; ++s, weight += row_bytes_) {
        multiply_quantized<kCount, group, kBits, kMinima>(x, padded(l_.in), l_.in, weight, l_.packing.group_size, ahead, total);
        for (int i = 0; i < kCount; ++i) lanes[i][s] = total[i];
      }
      for (int i = 0; i < kCount; ++i) {
        const Vector added = sums(lanes[i]);
        std::memcpy(dots + i * kFeatures, &added, count * sizeof(float));
      }
    };
    if (l_.packing.group_size == kPacked) {
      multiply(std::integral_constant<int, kPacked>());
    } else {
      multiply(std::integral_constant<int, 0>());
    }
  }

  // dots[r][s] for `count` rows of the weights, up to kMostStreams.
  void multiply_many(const float* x, const uint8_t* weight, int64_t count, float* dots) const {
    const int64_t x_row = padded(l_.in);
    alignas(64) float panel[kMostStreams * kPanel], parts[kMaxRows][kMostStreams];
    for (int64_t r = 0; r < l_.rows; ++r) {
      for (int64_t s = 0; s < count; ++s) dots[r * kFeatures + s] = 0.0f;
    }
    for (int64_t c = 0; c < l_.in; c += kPanel) {
      const int64_t columns = smaller(kPanel, l_.in - c);
      for (int64_t s = 0; s < kMostStreams; ++s) {  // where fewer are left, the last several times
        const uint8_t* source = weight + smaller(s, count - 1) * row_bytes_;
        dequantize<kBits, kMinima>(source, l_.packing, c, columns, panel + s * columns);
      }
      multiply_blocks<kMostStreams>(x + c, x_row, l_.rows, panel, columns, 1, 0, parts[0], kMostStreams);
      for (int64_t r = 0; r < l_.rows; ++r) {
        for (int64_t s = 0; s < count; ++s) dots[r * kFeatures + s] += parts[r][s];
      }
    }
  }

  const Linear& l_;
  int64_t row_bytes_;
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
