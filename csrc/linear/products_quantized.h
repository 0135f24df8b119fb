// The products of `linear` with quantized weights: a few rows of x are multiplied with integers as they are read, each group's
// sum with its scale; for more rows, weights are dequantized a panel at a time.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "linear/linear.h"
#include "linear/products_panels.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

constexpr int kPackedVectors = kPacked / kWidth;
constexpr int64_t kFewRows = 4;  // of x, that are multiplied with integers

// A unit of kPacked numbers of kBits bits as floats. kUnsigned: from 0 on, as weights with minima have them.
template <int kBits, bool kUnsigned>
struct Packed {
  static constexpr int64_t kBytes = kPacked * kBits / 8;

#if defined(__AVX512F__)
  static Vector numbers() {
    const Vector numbers{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return kUnsigned ? numbers : numbers - 8.0f;
  }

  // What 4 bits each stand for in a table. A permutation ignores all but the lowest 4 bits of a lane's index.
  __attribute__((always_inline)) static inline void look_up(const uint8_t* source, Vector table, Vector (&w)[kPackedVectors]) {
    const __m512i bytes = reinterpret_cast<__m512i>(widen(source));
    w[0] = _mm512_maskz_permutexvar_ps(0xffff, bytes, table);
    w[1] = _mm512_maskz_permutexvar_ps(0xffff, _mm512_maskz_srli_epi32(0xffff, bytes, 4), table);
  }
#endif

  // Weights with minima.
  __attribute__((always_inline)) static inline void load_weights(
      const uint8_t* source, Vector scale, Vector minimum, Vector (&w)[kPackedVectors]) {
#if defined(__AVX512F__)
    if constexpr (kBits == 4) return look_up(source, numbers() * scale + minimum, w);
#endif
    load_all(source, w);
    for (int v = 0; v < kPackedVectors; ++v) w[v] = w[v] * scale + minimum;
  }

  __attribute__((always_inline)) static inline void load_all(const uint8_t* source, Vector (&w)[kPackedVectors]) {
    if constexpr (kBits == 8) {
      for (int v = 0; v < kPackedVectors; ++v) {
        if constexpr (kUnsigned) {
          w[v] = __builtin_convertvector(widen(source + v * kWidth), Vector);
        } else {
          w[v] = load(reinterpret_cast<const int8_t*>(source) + v * kWidth);
        }
      }
    } else {
#if defined(__AVX512F__)
      look_up(source, numbers(), w);
#elif defined(__AVX2__)
      // Moved apart, 4 bits become the highest ones of mantissas: 8 + q / 2. Extending signs and converting takes twice as
      // long. Of numbers 0 to 3 and 16 to 19, 4 to 7 and 20 to 23, and so on.
      const __m256i bytes = _mm256_broadcastsi128_si256(load_16_bytes(source));
      const __m256i halves = _mm256_srlv_epi32(bytes, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
      const __m256i numbers = _mm256_slli_epi16(_mm256_and_si256(halves, _mm256_set1_epi8(15)), 3);
      const __m256i exponents = _mm256_set1_epi8(0x41), zero = _mm256_setzero_si256();
      const __m256i low = _mm256_unpacklo_epi8(numbers, exponents), high = _mm256_unpackhi_epi8(numbers, exponents);
      const __m256i parts[] = {
          _mm256_unpacklo_epi16(zero, low), _mm256_unpackhi_epi16(zero, low), _mm256_unpacklo_epi16(zero, high),
          _mm256_unpackhi_epi16(zero, high)};
      for (int v = 0; v < 2; ++v) {
        const Vector least = broadcast(kUnsigned ? 16.0f : 24.0f);
        const Vector first = reinterpret_cast<Vector>(parts[2 * v]) * 2.0f - least;
        const Vector second = reinterpret_cast<Vector>(parts[2 * v + 1]) * 2.0f - least;
        w[v] = _mm256_permute2f128_ps(first, second, 0x20), w[v + 2] = _mm256_permute2f128_ps(first, second, 0x31);
      }
#else
      uint8_t numbers[kPacked];
      for (int i = 0; i < kPacked / 2; ++i) numbers[i] = source[i] & 15, numbers[i + kPacked / 2] = source[i] >> 4;
      for (int v = 0; v < kPackedVectors; ++v) {
        w[v] = __builtin_convertvector(widen(numbers + v * kWidth), Vector) - (kUnsigned ? 0.0f : 8.0f);
      }
#endif
    }
  }
};

// Of a float16 as it is stored, looked up in the values of all.
inline float value_of_half(const uint8_t* source, const float* values_of_halves) {
  uint16_t bits;
  std::memcpy(&bits, source, sizeof bits);
  return values_of_halves[bits];
}

template <bool kMinima>
struct GroupHeader {
  static constexpr int64_t kBytes = kMinima ? 4 : 2;

  GroupHeader(const uint8_t* source, const float* values_of_halves) {
    scale = value_of_half(source, values_of_halves);
    minimum = kMinima ? value_of_half(source + 2, values_of_halves) : 0.0f;
  }

  float scale, minimum;
};

// Adds to lanes of the sums of x[i] · rows[s] for kCount rows of x and kStreams of the weights, in groups of kUnits
// units, or if that is 0 of any number. If `ahead` is not 0, the bytes that far on are prefetched. With minima each weight is
// computed: a part of the sums that is the minimum times a sum of x would cancel another one.
template <int kUnits, int kBits, bool kMinima, int kStreams, int kCount>
__attribute__((always_inline)) inline void multiply_quantized(
    const float* x, int64_t x_row, const uint8_t* (&rows)[kStreams], int64_t row_bytes, const Linear& l, int64_t ahead,
    Vector (&total)[kStreams][kCount]) {
  using Numbers = Packed<kBits, kMinima>;
  constexpr int kSums = kUnits == 1 || kPackedVectors < 2 ? 1 : 2;  // independent accumulators
  const int64_t units = kUnits ? kUnits : l.packing.group_size / kPacked;
  for (int64_t at = 0; at < row_bytes;) {
    Vector scale[kStreams], minimum[kStreams], sums[kStreams][kCount][kSums] = {};
    for (int s = 0; s < kStreams; ++s) {
      const GroupHeader<kMinima> header(rows[s] + at, l.values_of_halves);
      scale[s] = broadcast(header.scale), minimum[s] = broadcast(header.minimum);
    }
    at += GroupHeader<kMinima>::kBytes;
    for (int64_t unit = 0; unit < units; ++unit, at += Numbers::kBytes, x += kPacked) {
      for (int s = 0; s < kStreams; ++s) {
        const uint8_t* const source = rows[s] + at;
        if (ahead) __builtin_prefetch(source + ahead, 0, 2);
        Vector w[kPackedVectors];
        if constexpr (kMinima) {
          Numbers::load_weights(source, scale[s], minimum[s], w);
        } else {
          Numbers::load_all(source, w);
        }
        for (int v = 0; v < kPackedVectors; ++v) {
          for (int i = 0; i < kCount; ++i) sums[s][i][v % kSums] += load(x + i * x_row + v * kWidth) * w[v];
        }
      }
    }
    for (int s = 0; s < kStreams; ++s) {
      for (int i = 0; i < kCount; ++i) {
        if (kSums == 2) sums[s][i][0] += sums[s][i][1];
        total[s][i] = kMinima ? total[s][i] + sums[s][i][0] : total[s][i] + sums[s][i][0] * scale[s];
      }
    }
  }
}

// Quantized weights, which are multiplied row by row with all rows of x.
template <int kBits, bool kMinima>
class QuantizedRows {
 public:
  static constexpr int64_t kRows = kWidth;  // of weights, whose lanes are reduced together

  explicit QuantizedRows(const Linear& l) : l_(l), row_bytes_(l.packing.row_bytes(l.in)), far_(!cpu_features().amd) {}

  static int64_t x_row(const Linear& l) { return padded(l.in); }  // floats of a row of x

  static void arrange(const Linear& l, const float* x, float* target) { std::memcpy(target, x, l.in * sizeof(float)); }

  int64_t row_bytes() const { return row_bytes_; }

  // dots[r][s] = x[r] · weight[row + s] for all rows of x and `count` of the weights, up to kRows. If `ahead` is not 0, the
  // weights that many bytes on are prefetched.
  void multiply(const float* x, int64_t row, int64_t count, int64_t ahead, float* dots) const {
    const auto* weight = static_cast<const uint8_t*>(l_.weight) + row * row_bytes_;
    if (l_.rows <= kFewRows) return multiply_few<kFewRows>(x, weight, count, ahead, dots);
    multiply_panels(l_, x, weight, row_bytes_, count, dots, *this);
  }

  // Columns c to c + count of a row as floats.
  void dequantize(const uint8_t* row, int64_t c, int64_t count, float* target) const {
    using Header = GroupHeader<kMinima>;
    const int64_t size = l_.packing.group_size, group_bytes = Header::kBytes + size / kPacked * Numbers::kBytes;
    const uint8_t* group = row + c / size * group_bytes;
    for (int64_t within = c % size; count > 0; within = 0, group += group_bytes) {
      const Header header(group, l_.values_of_halves);
      const Vector scale = broadcast(header.scale), minimum = broadcast(header.minimum);
      const int64_t end = smaller(within + count, size);
      for (int64_t k = within; k < end; k += kPacked, target += kPacked) {
        Vector w[kPackedVectors];
        Numbers::load_all(group + Header::kBytes + k / kPacked * Numbers::kBytes, w);
        for (int v = 0; v < kPackedVectors; ++v) store(target + v * kWidth, w[v] * scale + minimum);
      }
      count -= end - within;
    }
  }

 private:
  using Numbers = Packed<kBits, kMinima>;

  template <int kCount>
  void multiply_few(const float* x, const uint8_t* weight, int64_t count, int64_t ahead, float* dots) const {
    if constexpr (kCount > 1) {
      if (l_.rows < kCount) return multiply_few<kCount - 1>(x, weight, count, ahead, dots);
    }
    const auto multiply_all_in = [&](auto units, auto streams, bool apart) {
      multiply_in_streams<kCount, streams>(weight, row_bytes_, count, apart, dots, [&](auto& rows, auto& total) {
        multiply_quantized<units, kBits, kMinima>(x, x_row(l_), rows, row_bytes_, l_, ahead, total);
      });
    };
    const auto multiply_all = [&](auto units) {
      if constexpr (kCount == 1 && kWidth == 16) {
        if (far_ && count == kRows) return multiply_all_in(units, std::integral_constant<int, kMostStreams>(), true);
      }
      multiply_all_in(units, std::integral_constant<int, kCount == 1 ? 2 : 1>(), false);
    };
    if (l_.packing.group_size == kPacked) {
      multiply_all(std::integral_constant<int, 1>());
    } else {
      multiply_all(std::integral_constant<int, 0>());
    }
  }

  const Linear& l_;
  int64_t row_bytes_;
  bool far_;  // rows that are read concurrently are far apart, see kMostStreams
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
