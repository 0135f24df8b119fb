// The products of `linear` with weights of 4 bits on CPUs with AVX2: up to kFewRows rows of x, in digits, are multiplied with
// integers.
//
// For files that are compiled once per CPU level, where that is AVX2: everything is in an anonymous namespace (see
// cpu_level.h).

#pragma once

#include "linear/digit_products.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

inline __m256i load_32_bytes(const void* source) { return _mm256_loadu_si256(static_cast<const __m256i*>(source)); }

// total += x · (scale · numbers + minimum), or without minima x · scale · (numbers - 8). `halves`: those of the units.
template <bool kMinima>
__attribute__((always_inline)) inline void add_products(
    const DigitTile<2, kMinima>& x, const __m256i (&halves)[2], Vector scale, Vector minimum, Vector& total) {
  __m256i of_digits[3];  // sums of 16 bits
  for (int d = 0; d < 3; ++d) {
    of_digits[d] = _mm256_add_epi16(
        _mm256_maddubs_epi16(halves[0], load_32_bytes(x.digits[0][d])),
        _mm256_maddubs_epi16(halves[1], load_32_bytes(x.digits[1][d])));
  }
  const __m256i one = _mm256_set1_epi16(1), radix = _mm256_set1_epi16(256);
  const __m256i upper = _mm256_add_epi32(_mm256_madd_epi16(of_digits[0], radix), _mm256_madd_epi16(of_digits[1], one));
  __m256i products = _mm256_add_epi32(_mm256_slli_epi32(upper, 8), _mm256_madd_epi16(of_digits[2], one));
  if constexpr (kMinima) {
    total += load(x.sums) * minimum;
  } else {
    products = _mm256_add_epi32(products, load_32_bytes(x.sums));
  }
  total += to_floats(reinterpret_cast<IntVector>(products)) * (scale * load(x.scale));
}

// The numbers of a lane that are left to floats, and where in a row its weights are: four bytes, and their group's header.
struct LeftLane {
  float numbers[kWidth];
  int32_t bytes, header;
};

// Weights of 4 bits. A tile is two units: lane i has four neighbors of each half of a unit, of the first one if i < 4.
// kPairs: these are two groups. Otherwise a group has its own tiles.
template <bool kMinima, bool kPairs>
class DigitRows : public DigitProducts<DigitRows<kMinima, kPairs>, QuantizedRows<4, kMinima>, 2, kMinima, LeftLane> {
  using Base = DigitProducts<DigitRows, QuantizedRows<4, kMinima>, 2, kMinima, LeftLane>;
  using Tile = typename Base::Tile;
  using Header = GroupHeader<kMinima>;
  static constexpr int64_t kTile = 2 * kPacked, kUnitBytes = kPacked / 2;

 public:
  static constexpr int kOffset = 8, kMostLeft = kWidth;

  using Base::Base;

  static constexpr int streams(int) { return 2; }

  static int64_t tiles(const Linear& l) { return l.in / span(l) * ((span(l) + kTile - 1) / kTile); }

  template <typename Leave>
  static void lay_out(const Linear& l, const float* x, const Bounds& bounds, Tile* tile, const Leave& leave) {
    const int64_t group = l.packing.group_size, group_bytes = Header::kBytes + group / 2;
    for (int64_t c = 0, next; c < l.in; c = next) {
      next = smaller(c + kTile, (c / span(l) + 1) * span(l));
      float of_tile[kTile] = {};
      std::memcpy(of_tile, x + c, (next - c) * sizeof(float));
      const __m256i columns = _mm256_setr_epi32(0, 4, 8, 12, 32, 36, 40, 44);
      Vector numbers[2][4];
      for (int half = 0; half < 2; ++half) {
        for (int j = 0; j < 4; ++j) numbers[half][j] = _mm256_i32gather_ps(of_tile + 16 * half + j, columns, 4);
      }
      const Digits<2> digits(numbers, bounds);
      Base::set_tile(digits, *tile++);
      for (int lanes = _mm256_movemask_ps(reinterpret_cast<__m256>(digits.left)); lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        const int64_t column = c + lane / 4 * kPacked, header = column / group * group_bytes;
        const int64_t bytes = header + Header::kBytes + column % group / kPacked * kUnitBytes + lane % 4 * 4;
        LeftLane left{{}, static_cast<int32_t>(bytes), static_cast<int32_t>(header)};
        for (int j = 0; j < 4; ++j) left.numbers[j] = numbers[0][j][lane], left.numbers[4 + j] = numbers[1][j][lane];
        leave(left);
      }
    }
  }

  Vector of_left(const uint8_t* row, const LeftLane& left) const {
    const __m256i shifts = _mm256_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28);
    const Header header(row + left.header, this->l_.values_of_halves);
    int32_t bytes;
    std::memcpy(&bytes, row + left.bytes, sizeof bytes);
    const __m256i numbers = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(bytes), shifts), _mm256_set1_epi32(15));
    const Vector w = to_floats(reinterpret_cast<IntVector>(numbers)) - (kMinima ? 0.0f : 8.0f);
    return load(left.numbers) * (w * header.scale + header.minimum);
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
    Vector scale[kStreams] = {}, minimum[kStreams] = {}, total[kStreams][kCount] = {};

    __attribute__((always_inline)) inline void multiply() {
      const int64_t span = DigitRows::span(l);
      for (int64_t c = 0; c < l.in; c += span) {
        if (!kPairs) set_scales(0);
        for (int64_t unit = kPacked; unit < span; unit += kTile) add_tile<true>();
        if (span % kTile) add_tile<false>();
      }
    }

    // From headers that are `apart` from each other, for each half of the lanes.
    __attribute__((always_inline)) inline void set_scales(int64_t apart) {
      const auto halves = [](float lower, float upper) {
        return reinterpret_cast<Vector>(_mm256_blend_ps(_mm256_set1_ps(lower), _mm256_set1_ps(upper), 0xf0));
      };
      for (int j = 0; j < kStreams; ++j) {
        const Header first(rows[j] + at, l.values_of_halves), second(rows[j] + at + apart, l.values_of_halves);
        scale[j] = halves(first.scale, second.scale), minimum[j] = halves(first.minimum, second.minimum);
      }
      at += Header::kBytes;
    }

    // kWhole: it has two units. Otherwise x is zero for the second one, in place of which the first is read again.
    template <bool kWhole>
    __attribute__((always_inline)) inline void add_tile() {
      constexpr int64_t kApart = kWhole ? kUnitBytes + (kPairs ? Header::kBytes : 0) : 0;
      if (kPairs) set_scales(kApart);
      __m256i halves[kStreams][2];
      const __m256i mask = _mm256_set1_epi8(15);
      for (int j = 0; j < kStreams; ++j) {
        const uint8_t* const source = rows[j] + at;
        if (ahead) __builtin_prefetch(source + ahead, 0, 2);
        const __m256i first = _mm256_castsi128_si256(load_16_bytes(source));
        const __m256i bytes = _mm256_inserti128_si256(first, load_16_bytes(source + kApart), 1);
        halves[j][0] = _mm256_and_si256(bytes, mask), halves[j][1] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
      }
      for (int i = 0; i < kCount; ++i) {
        const Tile& tile = *reinterpret_cast<const Tile*>(x + i * x_row);
        for (int j = 0; j < kStreams; ++j) add_products(tile, halves[j], scale[j], minimum[j], total[j][i]);
      }
      at += kApart + kUnitBytes, x += sizeof(Tile) / sizeof(float);
    }
  };

 private:
  // Columns that have tiles of their own.
  static int64_t span(const Linear& l) { return kPairs ? l.in : l.packing.group_size; }
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
