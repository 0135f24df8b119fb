// The products of `linear` with groups of 32 weights of 4 bits, without minima, by VPDPBUSD (AVX512_VNNI): up to kFewRows rows
// of x, in digits, are multiplied with integers.
//
// For files that are compiled once per CPU level, where that has AVX-512: everything is in an anonymous namespace (see
// cpu_level.h).

#pragma once

#include "linear/byte_dot.h"
#include "linear/products_quantized.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

constexpr int kChunkGroups = 4;
constexpr int64_t kChunk = kChunkGroups * kPacked;  // columns that are multiplied at a time

// Columns of a row of x. Four lanes belong to a group, each to four neighbors of its first half and four of its second: digits,
// the scale of each lane's, and the sums of its integers times -8.
struct ChunkOfX {
  int8_t digits[2][3][64];
  float scale[kWidth];
  int32_t sums[kWidth];
};

// Rows of weights, which are multiplied with up to kFewRows rows of x.
class DigitGroups {
 public:
  static constexpr int64_t kRows = kWidth;  // of weights, whose lanes are reduced together

  static bool serves(const Linear& l) {
    return l.packing.bits == 4 && !l.packing.minima && l.packing.group_size == kPacked && cpu_features().avx512_vnni;
  }

  explicit DigitGroups(const Linear& l) : l_(l), rows_(l), layout_(l), far_(!cpu_features().amd) {}

  int64_t row_bytes() const { return rows_.row_bytes(); }

  static int64_t x_row(const Linear& l) { return l.rows > kFewRows ? Rows::x_row(l) : Layout(l).size; }  // floats of a row of x

  static void arrange(const Linear& l, const float* x, float* target) {
    const Layout layout(l);
    const Bounds bounds(x, l.in, false);
    auto* chunk = reinterpret_cast<X*>(target);
    auto* const left = reinterpret_cast<LeftLane*>(target + layout.left);
    int64_t count = 0;
    for (int64_t c = 0; c < l.in; c += kChunk) {
      float numbers[kChunk] = {};
      std::memcpy(numbers, x + c, smaller(kChunk, l.in - c) * sizeof(float));
      set_chunk(numbers, bounds, *chunk++, [&](int lane, const float* numbers) {
        LeftLane& of_lane = left[count++];
        std::memcpy(of_lane.numbers, numbers, sizeof of_lane.numbers);
        of_lane.group = (c / kPacked + lane / 4) * kGroupBytes, of_lane.bytes = Header::kBytes + lane % 4 * 4;
      });
    }
    std::memcpy(target + layout.count, &count, sizeof count);
  }

  // As QuantizedRows.
  void multiply(const float* x, int64_t row, int64_t count, int64_t ahead, float* dots) const {
    const auto* weight = static_cast<const uint8_t*>(l_.weight) + row * row_bytes();
    if (l_.rows > kFewRows) return multiply_panels(l_, x, weight, row_bytes(), count, dots, rows_);
    multiply_few<kFewRows>(x, weight, count, ahead, dots);
  }

  void dequantize(const uint8_t* row, int64_t c, int64_t count, float* target) const {
    rows_.dequantize(row, c, count, target);
  }

 private:
  using Rows = QuantizedRows<4, false>;
  using Header = GroupHeader<false>;
  using X = ChunkOfX;
  static constexpr int64_t kGroupBytes = Header::kBytes + kPacked / 2;

  // The numbers of a lane that are left to floats, and then zeros, and where in a row their weights are: a group, and of that
  // four bytes.
  struct LeftLane {
    float numbers[kWidth];
    int64_t group, bytes;
  };

  // Where things are in a row of x, in floats: chunks, the lanes that are left to floats, and their number.
  struct Layout {
    int64_t left, count, size;

    explicit Layout(const Linear& l) {
      const int64_t chunks = (l.in + kChunk - 1) / kChunk;
      left = chunks * sizeof(X) / sizeof(float), count = left + chunks * kWidth * sizeof(LeftLane) / sizeof(float);
      size = count + kWidth;
    }
  };

  // Lays out kChunk numbers of x. leave(lane, numbers) is called with those that are left to floats.
  template <typename Leave>
  static void set_chunk(const float* x, const Bounds& bounds, X& chunk, const Leave& leave) {
    Vector numbers[2][4];
    for (int half = 0; half < 2; ++half) {
      const float* const first = x + half * 16;
      to_lanes_of_four({first, first + kPacked, first + 2 * kPacked, first + 3 * kPacked}, numbers[half]);
    }
    const Digits<2> digits(numbers, bounds);
    std::memcpy(chunk.digits, digits.digits, sizeof chunk.digits);
    store(chunk.scale, digits.scale);
    const IntVector sums = digits.sums * -8;
    std::memcpy(chunk.sums, &sums, sizeof sums);
    for (uint32_t lanes = _mm512_movepi32_mask(reinterpret_cast<__m512i>(digits.left)); lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      float of_lane[kWidth] = {};
      for (int j = 0; j < 4; ++j) of_lane[j] = numbers[0][j][lane], of_lane[4 + j] = numbers[1][j][lane];
      leave(lane, of_lane);
    }
  }

  template <int kCount>
  FASTGPT_BYTE_DOT void multiply_few(const float* x, const uint8_t* weight, int64_t count, int64_t ahead, float* dots) const {
    if constexpr (kCount > 1) {
      if (l_.rows < kCount) return multiply_few<kCount - 1>(x, weight, count, ahead, dots);
    }
    constexpr int kStreams = kCount == 1 ? 4 : 2;  // rows of weights whose products are computed in turns
    multiply_in_streams<kCount, kStreams>(
        weight, row_bytes(), count, far_ && count == kRows, dots, [&](const auto& rows, auto& total) FASTGPT_BYTE_DOT {
          Streams<kStreams, kCount> streams{l_, layout_, rows, ahead, x};
          streams.multiply();
          for (int j = 0; j < kStreams; ++j) {
            for (int i = 0; i < kCount; ++i) {
              total[j][i] = in_register(streams.total[j][i]);
              add_left(x + i * layout_.size, rows[j], total[j][i]);
            }
          }
        });
  }

  // Adds the products of what is left to floats.
  void add_left(const float* x, const uint8_t* row, Vector& total) const {
    const auto* lane = reinterpret_cast<const LeftLane*>(x + layout_.left);
    int64_t count;
    std::memcpy(&count, x + layout_.count, sizeof count);
    const UIntVector shifts{0, 8, 16, 24, 4, 12, 20, 28};
    for (const LeftLane* const end = lane + count; lane < end; ++lane) {
      const Header header(row + lane->group, l_.values_of_halves);
      int32_t bytes;
      std::memcpy(&bytes, row + lane->group + lane->bytes, sizeof bytes);
      const IntVector numbers = reinterpret_cast<IntVector>(reinterpret_cast<UIntVector>(broadcast(bytes)) >> shifts) & 15;
      total += load(lane->numbers) * (to_floats(numbers - 8) * header.scale);
    }
  }

  // Lanes of the sums of kCount rows of x times kStreams of the weights.
  template <int kStreams, int kCount>
  struct Streams {
    const Linear& l;
    const Layout& layout;
    const uint8_t* const (&rows)[kStreams];
    const int64_t ahead;
    const float* x;
    Vector total[kStreams][kCount] = {};

    // The last group is read in place of those that are not there, as x is zero.
    FASTGPT_BYTE_DOT __attribute__((always_inline)) inline void multiply() {
      const int64_t groups = l.in / kPacked;
      int64_t first = 0;
      for (; first + kChunkGroups <= groups; first += kChunkGroups) add_chunk([&](int g) { return first + g; });
      if (first < groups) add_chunk([&](int g) { return smaller(first + g, groups - 1); });
    }

    // The scales of groups in their lanes.
    __attribute__((always_inline)) static inline Vector scales_of(const uint8_t* const (&groups)[kChunkGroups]) {
      uint64_t bits = 0;
      for (int g = kChunkGroups; g-- > 0;) {
        uint16_t half;
        std::memcpy(&half, groups[g], sizeof half);
        bits = bits << 16 | half;
      }
      asm("" : "+r"(bits));  // GCC would compute them in vectors
      const __m128 scales = _mm_cvtph_ps(_mm_cvtsi64_si128(static_cast<int64_t>(bits)));
      return spread(reinterpret_cast<Vector>(_mm512_zextps128_ps512(scales)), 0, kWidth / kChunkGroups);
    }

    __attribute__((always_inline)) static inline __m256i two(const uint8_t* first, const uint8_t* second) {
      return _mm256_inserti128_si256(_mm256_castsi128_si256(load_16_bytes(first)), load_16_bytes(second), 1);
    }

    template <typename GroupOf>
    FASTGPT_BYTE_DOT __attribute__((always_inline)) inline void add_chunk(const GroupOf& group_of) {
      const auto chunk = [&](int i) -> const X& { return *reinterpret_cast<const X*>(x + i * layout.size); };
      __m512i w[2][kStreams], sums[kStreams][kCount];
      Vector scale[kStreams][kCount];
      for (int j = 0; j < kStreams; ++j) {
        const uint8_t* groups[kChunkGroups];
        for (int g = 0; g < kChunkGroups; ++g) groups[g] = rows[j] + group_of(g) * kGroupBytes;
        if (ahead) __builtin_prefetch(groups[0] + ahead, 0, 2), __builtin_prefetch(groups[3] + ahead, 0, 2);
        const auto bytes = [&](int g) { return groups[g] + Header::kBytes; };
        const __m512i both = _mm512_maskz_inserti64x4(
            0xff, _mm512_castsi256_si512(two(bytes(0), bytes(1))), two(bytes(2), bytes(3)), 1);
        const __m512i mask = _mm512_set1_epi8(15);
        w[0][j] = in_register(_mm512_and_si512(both, mask));
        w[1][j] = in_register(_mm512_and_si512(_mm512_maskz_srli_epi16(~0u, both, 4), mask));
        const Vector of_groups = scales_of(groups);
        for (int i = 0; i < kCount; ++i) scale[j][i] = in_register(of_groups * load(chunk(i).scale));
      }
      multiply_bytes(w, [&](int i, int half, int d) { return chunk(i).digits[half][d]; }, sums);
      for (int j = 0; j < kStreams; ++j) {
        for (int i = 0; i < kCount; ++i) sums[j][i] = _mm512_add_epi32(sums[j][i], _mm512_load_si512(chunk(i).sums));
      }
      add_scaled(sums, scale, total);
      x += sizeof(X) / sizeof(float);
    }
  };

  const Linear& l_;
  Rows rows_;
  Layout layout_;
  bool far_;  // as in QuantizedRows
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
