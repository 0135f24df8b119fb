// The products of `linear` with weights of 4 bits on CPUs with AVX2: up to kFewRows rows of x, in digits, are multiplied with
// integers.
//
// For files that are compiled once per CPU level, where that is AVX2: everything is in an anonymous namespace (see
// cpu_level.h).

#pragma once

#include "linear/digits.h"
#include "linear/products_quantized.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

constexpr int64_t kTile = 2 * kPacked;  // columns whose digits lie together: two units of weights

// kTile numbers of a row of x. Lane i has four neighbors of each half of a unit, of the first one if i < 4: integers times the
// lane's scale, digits[half][0] · 2^16 + digits[half][1] · 2^8 + digits[half][2]. With minima, `sums` are those of the lane's
// numbers, otherwise -8 times those of its integers.
template <bool kMinima>
struct Tile {
  int8_t digits[2][3][32];
  std::conditional_t<kMinima, float, int32_t> sums[kWidth];
  float scale[kWidth];
};

inline __m256i load_32_bytes(const void* source) { return _mm256_loadu_si256(static_cast<const __m256i*>(source)); }

// Lays out kTile numbers. Of lanes that are left to floats, leave(lane, numbers) is called with the numbers of the first half
// and then of the second.
template <bool kMinima, typename Leave>
inline void set_tile(const float* x, const Bounds& bounds, Tile<kMinima>& tile, const Leave& leave) {
  const __m256i columns = _mm256_setr_epi32(0, 4, 8, 12, 32, 36, 40, 44);
  Vector numbers[2][4];
  for (int half = 0; half < 2; ++half) {
    for (int j = 0; j < 4; ++j) numbers[half][j] = _mm256_i32gather_ps(x + 16 * half + j, columns, 4);
  }
  const Digits<2> digits(numbers, bounds);
  std::memcpy(tile.digits, digits.digits, sizeof tile.digits);
  store(tile.scale, digits.scale);
  if constexpr (kMinima) {
    store(tile.sums, to_floats(digits.sums) * digits.scale);
  } else {
    const IntVector sums = digits.sums * -8;
    std::memcpy(tile.sums, &sums, sizeof sums);
  }
  for (int lanes = _mm256_movemask_ps(reinterpret_cast<__m256>(digits.left)); lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    float of_lane[kWidth];
    for (int j = 0; j < 4; ++j) of_lane[j] = numbers[0][j][lane], of_lane[4 + j] = numbers[1][j][lane];
    leave(lane, of_lane);
  }
}

// The numbers of a lane that are left to floats, and where in a row its weights are: four bytes, and their group's header.
struct LeftLane {
  float numbers[kWidth];
  int32_t bytes, header;
};

// total += x · (scale · numbers + minimum), or without minima x · scale · (numbers - 8). `halves`: those of the units.
template <bool kMinima>
__attribute__((always_inline)) inline void add_products(
    const Tile<kMinima>& x, const __m256i (&halves)[2], Vector scale, Vector minimum, Vector& total) {
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

// Rows of weights of 4 bits, which are multiplied with up to kFewRows rows of x.
template <bool kMinima>
class DigitRows {
 public:
  static constexpr int64_t kRows = kWidth;  // of weights, whose lanes are reduced together

  explicit DigitRows(const Linear& l) : l_(l), rows_(l), layout_(l) {}

  int64_t row_bytes() const { return rows_.row_bytes(); }

  static int64_t x_row(const Linear& l) { return l.rows > kFewRows ? Rows::x_row(l) : Layout(l).size; }  // floats of a row of x

  static void arrange(const Linear& l, const float* x, float* target) {
    const Layout layout(l);
    const Bounds bounds(x, l.in, kMinima);
    auto* tile = reinterpret_cast<X*>(target);
    auto* const left = reinterpret_cast<LeftLane*>(target + layout.left);
    const int64_t group = l.packing.group_size, group_bytes = Header::kBytes + group / 2;
    int32_t count = 0;
    for (int64_t c = 0, next; c < l.in; c = next) {
      next = smaller(c + kTile, layout.end_of_span(c));
      float numbers[kTile] = {};
      std::memcpy(numbers, x + c, (next - c) * sizeof(float));
      set_tile(numbers, bounds, *tile++, [&](int lane, const float* numbers) {
        const int64_t column = c + lane / 4 * kPacked, header = column / group * group_bytes;
        const int64_t bytes = header + Header::kBytes + column % group / kPacked * kUnitBytes + lane % 4 * 4;
        LeftLane& of_lane = left[count++];
        std::memcpy(of_lane.numbers, numbers, sizeof of_lane.numbers);
        of_lane.bytes = static_cast<int32_t>(bytes), of_lane.header = static_cast<int32_t>(header);
      });
    }
    std::memcpy(target + layout.count, &count, sizeof count);
  }

  // As QuantizedRows.
  void multiply(const float* x, int64_t row, int64_t count, int64_t ahead, float* dots) const {
    const auto* weight = static_cast<const uint8_t*>(l_.weight) + row * row_bytes();
    if (l_.rows > kFewRows) return multiply_panels(l_, x, weight, row_bytes(), count, dots, rows_);
    l_.packing.group_size == kPacked ? multiply_few<kFewRows, true>(x, weight, count, ahead, dots)
                                     : multiply_few<kFewRows, false>(x, weight, count, ahead, dots);
  }

  void dequantize(const uint8_t* row, int64_t c, int64_t count, float* target) const {
    rows_.dequantize(row, c, count, target);
  }

 private:
  using Rows = QuantizedRows<4, kMinima>;
  using Header = GroupHeader<kMinima>;
  using X = Tile<kMinima>;
  static constexpr int64_t kUnitBytes = kPacked / 2;
  static constexpr int kStreams = 2;  // rows of weights that share what is loaded of x

  // Where things are in a row of x, in floats: tiles, the lanes that are left to floats, and their number. Each span of
  // columns, which is a group unless that is half of a tile, has its own tiles.
  struct Layout {
    int64_t span, left, count, size;

    explicit Layout(const Linear& l) : span(l.packing.group_size == kPacked ? l.in : l.packing.group_size) {
      const int64_t tiles = l.in / span * ((span + kTile - 1) / kTile);
      left = tiles * sizeof(X) / sizeof(float), count = left + tiles * kWidth * sizeof(LeftLane) / sizeof(float);
      size = count + kWidth;
    }

    int64_t end_of_span(int64_t c) const { return c / span * span + span; }
  };

  template <int kCount, bool kPairs>
  void multiply_few(const float* x, const uint8_t* weight, int64_t count, int64_t ahead, float* dots) const {
    if constexpr (kCount > 1) {
      if (l_.rows < kCount) return multiply_few<kCount - 1, kPairs>(x, weight, count, ahead, dots);
    }
    multiply_in_streams<kCount, kStreams>(weight, row_bytes(), count, false, dots, [&](const auto& rows, auto& total) {
      Streams<kCount, kPairs> streams{l_, x, layout_.size, rows, ahead};
      streams.multiply(layout_.span);
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
    int32_t count;
    std::memcpy(&count, x + layout_.count, sizeof count);
    const __m256i shifts = _mm256_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28);
    for (const LeftLane* const end = lane + count; lane < end; ++lane) {
      const Header header(row + lane->header, l_.values_of_halves);
      int32_t bytes;
      std::memcpy(&bytes, row + lane->bytes, sizeof bytes);
      const __m256i numbers = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(bytes), shifts), _mm256_set1_epi32(15));
      const Vector w = to_floats(reinterpret_cast<IntVector>(numbers)) - (kMinima ? 0.0f : 8.0f);
      total += load(lane->numbers) * (w * header.scale + header.minimum);
    }
  }

  // Lanes of the sums of kCount rows of x, x_row floats apart, times rows of weights. kPairs: tiles are two groups.
  template <int kCount, bool kPairs>
  struct Streams {
    const Linear& l;
    const float* x;
    const int64_t x_row;
    const uint8_t* const (&rows)[kStreams];
    const int64_t ahead;
    int64_t at = 0;  // bytes of rows
    Vector scale[kStreams] = {}, minimum[kStreams] = {}, total[kStreams][kCount] = {};

    __attribute__((always_inline)) inline void multiply(int64_t span) {
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
        const X& tile = *reinterpret_cast<const X*>(x + i * x_row);
        for (int j = 0; j < kStreams; ++j) add_products(tile, halves[j], scale[j], minimum[j], total[j][i]);
      }
      at += kApart + kUnitBytes, x += sizeof(X) / sizeof(float);
    }
  };

  const Linear& l_;
  Rows rows_;
  Layout layout_;
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
