// The products of `linear` with GGUF's K types by VPDPBUSD, which adds dot products of four bytes to integers (AVX512_VNNI): up
// to kFewRows rows of x, in digits, are multiplied with integers.
//
// For files that are compiled once per CPU level, where that has AVX-512: everything is in an anonymous namespace (see
// cpu_level.h).

#pragma once

#include "linear/byte_dot.h"
#include "linear/digit_products.h"
#include "linear/products_blocks.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

constexpr int64_t kTile = 64;  // columns that are multiplied at a time, four in a lane

inline __m512i low_bits(__m512i x, char mask) { return _mm512_and_si512(x, _mm512_set1_epi8(mask)); }

// 32 bytes twice, the first time moved right by `lower` bits and then by `upper`. Bits that come from a neighbor byte are left
// to the caller.
inline __m512i load_moved(const uint8_t* source, int64_t lower, int64_t upper) {
  const __m512i twice = _mm512_maskz_broadcast_i64x4(0xff, load_32_bytes(source));
  return _mm512_maskz_srlv_epi64(0xff, twice, _mm512_setr_epi64(lower, lower, lower, lower, upper, upper, upper, upper));
}

// Adds `number` where `bit` of 32 bytes is set, and in the upper half where the next one is.
inline __m512i add_where(__m512i x, const uint8_t* bytes, int bit, char number) {
  const auto in_each = [](int bit) { return static_cast<int64_t>(0x0101010101010101u << bit); };
  const int64_t lower = in_each(bit), upper = in_each(bit + 1);
  const __m512i bits = _mm512_setr_epi64(lower, lower, lower, lower, upper, upper, upper, upper);
  const uint64_t set = _mm512_test_epi8_mask(_mm512_maskz_broadcast_i64x4(0xff, load_32_bytes(bytes)), bits);
  return _mm512_mask_add_epi8(x, set, x, _mm512_set1_epi8(number));
}

// A number in the first eight lanes and another one in the last.
inline Vector halves_of(float lower, float upper) {
  return _mm512_mask_broadcastss_ps(reinterpret_cast<__m512>(broadcast(lower)), 0xff00, _mm_set_ss(upper));
}

// Of 16 bytes. (GCC would compute these in vectors, one by one.)
inline Vector to_floats(uint64_t first, uint64_t last) {
  asm("" : "+r"(first), "+r"(last));
  const __m128i bytes = _mm_set_epi64x(static_cast<int64_t>(last), static_cast<int64_t>(first));
  return to_floats(reinterpret_cast<IntVector>(_mm512_maskz_cvtepu8_epi32(0xffff, bytes)));
}

// Scales of a block's groups, and if its type has some, minima, from lane kFirstMinimum on.
struct ScalesAndMinima {
  Vector scales, minima;
};

// How blocks of 256 columns are read.
//   kOffset             is added to numbers, so that none is negative
//   scales(block, ...)  of all groups
//   numbers(block, t)   of tile t, a byte each
template <typename Block>
struct BlockTiles;

template <>
struct BlockTiles<Q2_K> {
  static constexpr int kOffset = 0, kFirstMinimum = 0;

  static ScalesAndMinima scales(const uint8_t* block, const float* values_of_halves) {
    const IntVector bytes = widen(block);
    return {
        to_floats(bytes & 15) * value_of_half(block + 80, values_of_halves),
        to_floats(bytes >> 4) * -value_of_half(block + 82, values_of_halves)};
  }

  static __m512i numbers(const uint8_t* block, int t) {
    return low_bits(load_moved(block + 16 + t / 2 * 32, t % 2 * 4, t % 2 * 4 + 2), 3);
  }
};

template <>
struct BlockTiles<Q3_K> {
  static constexpr int kOffset = 4, kFirstMinimum = 0;

  static ScalesAndMinima scales(const uint8_t* block, const float* values_of_halves) {
    const Vector numbers = to_floats(Q3_K::bytes_of_scales(block, 0), Q3_K::bytes_of_scales(block, 1));
    return {(numbers - 32.0f) * value_of_half(block + 108, values_of_halves), Vector{}};
  }

  static __m512i numbers(const uint8_t* block, int t) {
    const __m512i low = low_bits(load_moved(block + 32 + t / 2 * 32, t % 2 * 4, t % 2 * 4 + 2), 3);
    return add_where(low, block, 2 * t, 4);
  }
};

template <>
struct BlockTiles<Q4_K> {
  static constexpr int kOffset = 0, kFirstMinimum = 8;

  static ScalesAndMinima scales(const uint8_t* block, const float* values_of_halves) {
    const auto [scales, minima] = Q4_K::bytes_of_scales(block);
    const float scale = value_of_half(block, values_of_halves), minimum = value_of_half(block + 2, values_of_halves);
    const Vector both = to_floats(scales, minima) * halves_of(scale, -minimum);
    return {both, both};
  }

  static __m512i numbers(const uint8_t* block, int t) { return low_bits(load_moved(block + 16 + 32 * t, 0, 4), 15); }
};

template <>
struct BlockTiles<Q5_K> : BlockTiles<Q4_K> {
  static __m512i numbers(const uint8_t* block, int t) {
    return add_where(low_bits(load_moved(block + 48 + 32 * t, 0, 4), 15), block + 16, 2 * t, 16);
  }
};

template <>
struct BlockTiles<Q6_K> {
  static constexpr int kOffset = 32, kFirstMinimum = 0;

  static ScalesAndMinima scales(const uint8_t* block, const float* values_of_halves) {
    return {load(reinterpret_cast<const int8_t*>(block) + 192) * value_of_half(block + 208, values_of_halves), Vector{}};
  }

  static __m512i numbers(const uint8_t* block, int t) {
    const __m512i bytes = _mm512_loadu_si512(block + t / 2 * 64);
    const uint8_t* const high = block + 128 + t / 2 * 32;
    if (t % 2) {
      const __m512i upper = low_bits(_mm512_maskz_srli_epi16(~0u, bytes, 4), 15);
      return _mm512_or_si512(upper, low_bits(load_moved(high, 0, 2), 48));
    }
    const __m512i twice = _mm512_maskz_broadcast_i64x4(0xff, load_32_bytes(high));
    const __m512i moved = _mm512_maskz_sllv_epi64(0xff, twice, _mm512_setr_epi64(4, 4, 4, 4, 2, 2, 2, 2));
    return _mm512_or_si512(low_bits(bytes, 15), low_bits(moved, 48));
  }
};

// A quarter of a tile in which numbers are left to floats, zeros otherwise, and where in a row its weights are.
struct LeftQuarter {
  float numbers[kWidth];
  int64_t block;  // bytes
  int32_t tile, quarter;
};

// Rows of blocks of K types.
template <typename Block>
class DigitDots : public DigitProducts<DigitDots<Block>, BlockRows<Block>, 1, Block::kMinima, LeftQuarter> {
  using Base = DigitProducts<DigitDots, BlockRows<Block>, 1, Block::kMinima, LeftQuarter>;
  using Tile = typename Base::Tile;
  using Of = BlockTiles<Block>;
  static constexpr int kTiles = Block::kColumns / kTile, kGroupLanes = Block::kGroup / 4;

 public:
  static constexpr int kOffset = Of::kOffset, kMostLeft = 4;

  using Base::Base;

  static constexpr int streams(int count) { return count == 1 ? 4 : 2; }

  static int64_t tiles(const Linear& l) { return l.in / kTile; }

  template <typename Leave>
  static void lay_out(const Linear& l, const float* x, const Bounds& bounds, Tile* tile, const Leave& leave) {
    for (int64_t c = 0; c < l.in; c += kTile) {
      LeftQuarter left{{}, c / Block::kColumns * Block::kBytes, static_cast<int32_t>(c % Block::kColumns / kTile), 0};
      lay_out_tile(x + c, bounds, *tile++, left, leave);
    }
  }

  Vector of_left(const uint8_t* row, const LeftQuarter& left) const {
    const uint8_t* const block = row + left.block;
    const int64_t group = (left.tile * kTile + left.quarter * kWidth) / Block::kGroup;
    const ScalesAndMinima of = Of::scales(block, this->l_.values_of_halves);
    const __m512i bytes = spread(Of::numbers(block, left.tile), left.quarter * 4, 1);
    uint8_t numbers[sizeof bytes];
    std::memcpy(numbers, &bytes, sizeof bytes);
    Vector w = to_floats(widen(numbers) - Of::kOffset) * spread(of.scales, group, kWidth);
    if constexpr (Block::kMinima) w += spread(of.minima, Of::kFirstMinimum + group, kWidth);
    return load(left.numbers) * w;
  }

  // Lanes of the sums of kCount rows of x times kStreams of the weights.
  template <int kStreams, int kCount>
  struct Streams {
    const Linear& l;
    const float* x;
    const int64_t x_row;
    const uint8_t* const (&rows)[kStreams];
    const int64_t ahead;
    int64_t at = 0;  // bytes of rows
    ScalesAndMinima of[kStreams] = {};
    Vector total[kStreams][kCount] = {};

    FASTGPT_BYTE_DOT __attribute__((always_inline)) inline void multiply() {
      for (int64_t c = 0; c < l.in; c += Block::kColumns, at += Block::kBytes, x += kTiles * sizeof(Tile) / sizeof(float)) {
        for (int j = 0; j < kStreams; ++j) {
          for (int64_t line = 0; ahead && line < Block::kBytes; line += 64) {
            __builtin_prefetch(rows[j] + at + ahead + line, 0, 2);
          }
          of[j] = Of::scales(rows[j] + at, l.values_of_halves);
        }
        add_tiles(std::make_integer_sequence<int, kTiles>());
      }
    }

    template <int... kTile>
    FASTGPT_BYTE_DOT __attribute__((always_inline)) inline void add_tiles(std::integer_sequence<int, kTile...>) {
      (add_tile<kTile>(), ...);
    }

    template <int t>
    FASTGPT_BYTE_DOT __attribute__((always_inline)) inline void add_tile() {
      const auto tile = [&](int i) -> const Tile& { return reinterpret_cast<const Tile*>(x + i * x_row)[t]; };
      __m512i w[1][kStreams], sums[kStreams][kCount];
      for (int j = 0; j < kStreams; ++j) w[0][j] = in_register(Of::numbers(rows[j] + at, t));
      multiply_bytes(w, [&](int i, int half, int d) { return tile(i).digits[half][d]; }, sums);
      Vector scale[kStreams][kCount];
      constexpr int kFirst = t * kWidth / kGroupLanes;  // group
      for (int j = 0; j < kStreams; ++j) {
        const Vector of_groups = spread(of[j].scales, kFirst, kGroupLanes);
        for (int i = 0; i < kCount; ++i) scale[j][i] = in_register(of_groups * load(tile(i).scale));
      }
      // Minima cancel products lane by lane: sums stay small where weights are.
      for (int j = 0; j < kStreams; ++j) {
        if constexpr (Block::kMinima) {
          const Vector minima = spread(of[j].minima, Of::kFirstMinimum + kFirst, kGroupLanes);
          for (int i = 0; i < kCount; ++i) total[j][i] = in_register(total[j][i] + minima * load(tile(i).sums));
        } else {
          for (int i = 0; i < kCount; ++i) sums[j][i] = _mm512_add_epi32(sums[j][i], _mm512_load_si512(tile(i).sums));
        }
      }
      add_scaled(sums, scale, total);
    }
  };

 private:
  template <typename Leave>
  static void lay_out_tile(const float* x, const Bounds& bounds, Tile& tile, LeftQuarter& left, const Leave& leave) {
    Vector numbers[1][4];
    to_lanes_of_four({x, x + 16, x + 32, x + 48}, numbers[0]);
    const Digits<1> digits(numbers, bounds);
    Base::set_tile(digits, tile);
    const uint32_t lanes = _mm512_movepi32_mask(reinterpret_cast<__m512i>(digits.left));
    for (left.quarter = 0; lanes >> 4 * left.quarter; ++left.quarter) {
      const uint32_t of_quarter = lanes >> 4 * left.quarter & 15;
      if (!of_quarter) continue;
      for (int i = 0; i < kWidth; ++i) left.numbers[i] = of_quarter >> i / 4 & 1 ? x[left.quarter * kWidth + i] : 0.0f;
      leave(left);
    }
  }
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
