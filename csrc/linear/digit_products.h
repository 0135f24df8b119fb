// What all products of quantized weights with digits of x share: how rows of x are laid out, the numbers of x that are left to
// floats, and rows of weights that are multiplied in turns.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "linear/digits.h"
#include "linear/products_quantized.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Columns of a row of x: digits, the scale of each lane's, and with minima the sums of its numbers, otherwise those of its
// integers times minus what is added to weights so that none is negative.
template <int kHalves, bool kMinima>
struct DigitTile {
  int8_t digits[kHalves][3][sizeof(Vector)];
  float scale[kWidth];
  std::conditional_t<kMinima, float, int32_t> sums[kWidth];
};

// Rows of weights, which are multiplied with up to kFewRows rows of x in digits; `Rows` multiplies them with more rows.
//
// A row of x is a number of tiles, and then Lefts: numbers that are left to floats, and where in a row their weights are.
// `Products`, which derives from this class, has
//   kOffset            added to weights
//   kMostLeft          Lefts of a tile
//   streams(count)     rows of weights that are multiplied in turns with this number of rows of x
//   tiles(l)           of a row of x
//   lay_out(l, x, bounds, tile, leave)  lays out a row; leave(left) keeps one
//   of_left(row, left)  lanes of its products with a row of weights
//   Streams<kStreams, kCount>{l, x, x_row, rows, ahead}.multiply(), then .total[kStreams][kCount]: lanes of the sums
template <typename Products, typename Rows, int kHalves, bool kMinima, typename Left>
class DigitProducts {
 public:
  static constexpr int64_t kRows = kWidth;  // of weights, whose lanes are reduced together

  explicit DigitProducts(const Linear& l) : l_(l), rows_(l), layout_(l) {}

  int64_t row_bytes() const { return rows_.row_bytes(); }

  static int64_t x_row(const Linear& l) { return l.rows > kFewRows ? Rows::x_row(l) : Layout(l).size; }  // floats of a row of x

  static void arrange(const Linear& l, const float* x, float* target) {
    const Layout layout(l);
    auto* const left = reinterpret_cast<Left*>(target + layout.left);
    int64_t count = 0;
    const Bounds bounds(x, l.in, kMinima);
    Products::lay_out(l, x, bounds, reinterpret_cast<Tile*>(target), [&](const Left& of_tile) { left[count++] = of_tile; });
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

 protected:
  using Tile = DigitTile<kHalves, kMinima>;

  static void set_tile(const Digits<kHalves>& digits, Tile& tile) {
    std::memcpy(tile.digits, digits.digits, sizeof tile.digits);
    store(tile.scale, digits.scale);
    if constexpr (kMinima) {
      store(tile.sums, to_floats(digits.sums) * digits.scale);
    } else {
      const IntVector sums = digits.sums * -Products::kOffset;
      std::memcpy(tile.sums, &sums, sizeof sums);
    }
  }

  const Linear& l_;

 private:
  // Where things are in a row of x, in floats: what is left to floats, and the number of these.
  struct Layout {
    int64_t left, count, size;

    explicit Layout(const Linear& l) {
      const int64_t tiles = Products::tiles(l);
      left = tiles * sizeof(Tile) / sizeof(float), count = left + tiles * Products::kMostLeft * sizeof(Left) / sizeof(float);
      size = rounded_up(count + 2, kWidth);
    }
  };

  template <int kCount>
  FASTGPT_BYTE_DOT void multiply_few(const float* x, const uint8_t* weight, int64_t count, int64_t ahead, float* dots) const {
    if constexpr (kCount > 1) {
      if (l_.rows < kCount) return multiply_few<kCount - 1>(x, weight, count, ahead, dots);
    }
    constexpr int kStreams = Products::streams(kCount);
    const bool apart = kWidth == 16 && !cpu_features().amd && count == kRows;  // see kMostStreams
    multiply_in_streams<kCount, kStreams>(
        weight, row_bytes(), count, apart, dots, [&](const auto& rows, auto& total) FASTGPT_BYTE_DOT {
          typename Products::template Streams<kStreams, kCount> streams{l_, x, layout_.size, rows, ahead};
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
    const auto* left = reinterpret_cast<const Left*>(x + layout_.left);
    int64_t count;
    std::memcpy(&count, x + layout_.count, sizeof count);
    for (const Left* const end = left + count; left < end; ++left) {
      total += static_cast<const Products*>(this)->of_left(row, *left);
    }
  }

  Rows rows_;
  Layout layout_;
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
