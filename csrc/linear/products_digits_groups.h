// The products of `linear` with groups of 32 weights of 4 bits, without minima, by VPDPBUSD (AVX512_VNNI): up to kFewRows rows
// of x, in digits, are multiplied with integers. (Of weights of 8 bits, floats are as fast.)
//
// For files that are compiled once per CPU level, where that has AVX-512: everything is in an anonymous namespace (see
// cpu_level.h).

#pragma once

#include "linear/byte_dot.h"
#include "linear/digit_products.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// The numbers of a lane that are left to floats, and then zeros, and where in a row their weights are: a group, and of that
// four bytes.
struct LeftLane {
  float numbers[kWidth];
  int64_t group, bytes;
};

// A tile is four groups, of which each has four lanes, of four neighbors of its first half and four of its second.
class DigitGroups : public DigitProducts<DigitGroups, QuantizedRows<4, false>, 2, false, LeftLane> {
  using Header = GroupHeader<false>;
  static constexpr int kTileGroups = 4;
  static constexpr int64_t kTile = kTileGroups * kPacked, kGroupBytes = Header::kBytes + kPacked / 2;

 public:
  static constexpr int kOffset = 8, kMostLeft = kWidth;

  static bool serves(const Linear& l) {
    return l.packing.bits == 4 && !l.packing.minima && l.packing.group_size == kPacked && cpu_features().avx512_vnni;
  }

  using DigitProducts::DigitProducts;

  static constexpr int streams(int count) { return count == 1 ? 4 : 2; }

  static int64_t tiles(const Linear& l) { return (l.in + kTile - 1) / kTile; }

  template <typename Leave>
  static void lay_out(const Linear& l, const float* x, const Bounds& bounds, Tile* tile, const Leave& leave) {
    for (int64_t c = 0; c < l.in; c += kTile) {
      float of_tile[kTile] = {};
      std::memcpy(of_tile, x + c, smaller(kTile, l.in - c) * sizeof(float));
      Vector numbers[2][4];
      for (int half = 0; half < 2; ++half) {
        const float* const first = of_tile + half * 16;
        to_lanes_of_four({first, first + kPacked, first + 2 * kPacked, first + 3 * kPacked}, numbers[half]);
      }
      const Digits<2> digits(numbers, bounds);
      set_tile(digits, *tile++);
      for (uint32_t lanes = _mm512_movepi32_mask(reinterpret_cast<__m512i>(digits.left)); lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        LeftLane left{{}, (c / kPacked + lane / 4) * kGroupBytes, Header::kBytes + lane % 4 * 4};
        for (int j = 0; j < 4; ++j) left.numbers[j] = numbers[0][j][lane], left.numbers[4 + j] = numbers[1][j][lane];
        leave(left);
      }
    }
  }

  Vector of_left(const uint8_t* row, const LeftLane& left) const {
    const UIntVector shifts{0, 8, 16, 24, 4, 12, 20, 28};
    const Header header(row + left.group, l_.values_of_halves);
    int32_t bytes;
    std::memcpy(&bytes, row + left.group + left.bytes, sizeof bytes);
    const IntVector numbers = reinterpret_cast<IntVector>(reinterpret_cast<UIntVector>(broadcast(bytes)) >> shifts) & 15;
    return load(left.numbers) * (to_floats(numbers - 8) * header.scale);
  }

  // Lanes of the sums of kCount rows of x times kStreams of the weights.
  template <int kStreams, int kCount>
  struct Streams {
    const Linear& l;
    const float* x;
    const int64_t x_row;
    const uint8_t* const (&rows)[kStreams];
    const int64_t ahead;
    Vector total[kStreams][kCount] = {};

    // The last group is read in place of those that are not there, as x is zero.
    FASTGPT_BYTE_DOT __attribute__((always_inline)) inline void multiply() {
      const int64_t groups = l.in / kPacked;
      int64_t first = 0;
      for (; first + kTileGroups <= groups; first += kTileGroups) add_tile([&](int g) { return first + g; });
      if (first < groups) add_tile([&](int g) { return smaller(first + g, groups - 1); });
    }

    __attribute__((always_inline)) static inline __m256i two(const uint8_t* first, const uint8_t* second) {
      return _mm256_inserti128_si256(_mm256_castsi128_si256(load_16_bytes(first)), load_16_bytes(second), 1);
    }

    // The scales of groups in their lanes.
    __attribute__((always_inline)) static inline Vector scales_of(const uint8_t* const (&groups)[kTileGroups]) {
      uint64_t bits = 0;
      for (int g = kTileGroups; g-- > 0;) {
        uint16_t half;
        std::memcpy(&half, groups[g], sizeof half);
        bits = bits << 16 | half;
      }
      asm("" : "+r"(bits));  // GCC would compute them in vectors
      const __m128 scales = _mm_cvtph_ps(_mm_cvtsi64_si128(static_cast<int64_t>(bits)));
      return spread(reinterpret_cast<Vector>(_mm512_zextps128_ps512(scales)), 0, kWidth / kTileGroups);
    }

    template <typename GroupOf>
    FASTGPT_BYTE_DOT __attribute__((always_inline)) inline void add_tile(const GroupOf& group_of) {
      const auto tile = [&](int i) -> const Tile& { return *reinterpret_cast<const Tile*>(x + i * x_row); };
      __m512i w[2][kStreams], sums[kStreams][kCount];
      Vector scale[kStreams][kCount];
      for (int j = 0; j < kStreams; ++j) {
        const uint8_t* groups[kTileGroups];
        for (int g = 0; g < kTileGroups; ++g) groups[g] = rows[j] + group_of(g) * kGroupBytes;
        if (ahead) __builtin_prefetch(groups[0] + ahead, 0, 2), __builtin_prefetch(groups[3] + ahead, 0, 2);
        const auto bytes = [&](int g) { return groups[g] + Header::kBytes; };
        const __m512i both = _mm512_maskz_inserti64x4(
            0xff, _mm512_castsi256_si512(two(bytes(0), bytes(1))), two(bytes(2), bytes(3)), 1);
        const __m512i mask = _mm512_set1_epi8(15);
        w[0][j] = in_register(_mm512_and_si512(both, mask));
        w[1][j] = in_register(_mm512_and_si512(_mm512_maskz_srli_epi16(~0u, both, 4), mask));
        const Vector of_groups = scales_of(groups);
        for (int i = 0; i < kCount; ++i) scale[j][i] = in_register(of_groups * load(tile(i).scale));
      }
      multiply_bytes(w, [&](int i, int half, int d) { return tile(i).digits[half][d]; }, sums);
      for (int j = 0; j < kStreams; ++j) {
        for (int i = 0; i < kCount; ++i) sums[j][i] = _mm512_add_epi32(sums[j][i], _mm512_load_si512(tile(i).sums));
      }
      add_scaled(sums, scale, total);
      x += sizeof(Tile) / sizeof(float);
    }
  };
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
