// The products of `linear` with many rows of x, which arithmetic bounds: x is transposed, so that a vector holds a column of
// kWidth rows, and multiplied with single weights. No lanes are reduced, and weights that are not floats are converted once for
// all rows. Sums have another order than those of few rows.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "common/matrices.h"
#include "linear/products_panels.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

constexpr bool kHasManyRows = kWidth >= 8;
constexpr int64_t kLeastManyRows = 16;  // with fewer, converting weights takes too long
constexpr int64_t kMostManyRows = 256;  // of x at a time: a block of their columns stays in the L2 cache
// Columns and rows of the weights that are multiplied with all of x at a time, half of the rows factors if gated. They stay in
// the L2 cache, and with AVX2 these columns of a panel of x in the L1 cache. With AVX-512 panels are read from L2, which Zen 4
// does as fast as it multiplies: sums that are written half as often weigh more.
constexpr int64_t kBlockColumns = kWidth == 16 ? 512 : 256, kBlockRows = kWidth == 16 ? 96 : 48;

// Rows of weights as floats, `row` apart.
struct FloatsOfRows {
  const float* start;
  int64_t row;
};

// How weights are read: columns begin to end of `count` rows as floats, perhaps in `target`.
struct FloatRows {
  const Linear& l;

  int64_t row_bytes() const { return l.in * sizeof(float); }

  FloatsOfRows read(int64_t row, int64_t count, int64_t begin, int64_t end, float* target) const {
    return {static_cast<const float*>(l.weight) + row * l.in + begin, l.in};
  }
};

struct ConvertedRows {  // of 16 bits
  const Linear& l;

  int64_t row_bytes() const { return l.in * 2; }

  FloatsOfRows read(int64_t row, int64_t count, int64_t begin, int64_t end, float* target) const {
    for (int64_t s = 0; s < count; ++s) {
      convert(l.weight, (row + s) * l.in + begin, end - begin, l.element, target + s * kBlockColumns);
    }
    return {target, kBlockColumns};
  }
};

template <typename Quantized>  // as `Rows` of outputs_quantized
struct DequantizedRows {
  const Linear& l;
  Quantized weight{l};

  int64_t row_bytes() const { return weight.row_bytes(); }

  FloatsOfRows read(int64_t row, int64_t count, int64_t begin, int64_t end, float* target) const {
    const auto* source = static_cast<const uint8_t*>(l.weight) + row * row_bytes();
    for (int64_t s = 0; s < count; ++s) {
      weight.dequantize(source + s * row_bytes(), begin, end - begin, target + s * kBlockColumns);
    }
    return {target, kBlockColumns};
  }
};

// Rows `row` to `row` + count of the weights from `column` on, in a block of columns, whose lines of the cache are prefetched
// in about equal numbers by each of `steps` calls. All at once would stop the core until they arrive.
class WeightsAhead {
 public:
  WeightsAhead(const void* weights, int64_t row_bytes, int64_t row, int64_t count, int64_t column, int64_t in, int64_t steps)
      : at_(static_cast<const char*>(weights) + row * row_bytes + row_bytes * column / larger(in, 1)),
        row_bytes_(row_bytes),
        row_lines_((row_bytes * smaller(kBlockColumns, in - column) / larger(in, 1) + kLineBytes - 1) / kLineBytes),
        lines_(count * row_lines_),
        steps_(larger(steps, 1)) {}

  void operator()() {
    for (due_ += lines_; due_ >= steps_; due_ -= steps_) {
      __builtin_prefetch(at_ + line_ * kLineBytes, 0, 2);
      if (++line_ == row_lines_) line_ = 0, at_ += row_bytes_;
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;

  const char* at_;
  int64_t row_bytes_, row_lines_, lines_, steps_, line_ = 0, due_ = 0;
};

// x in panels of kPanelRows rows, the last one perhaps narrower, whose columns lie one after the other.
class ManyRows {
 public:
  static bool serves(const Linear& l) {
    if (!kHasManyRows || !l.many || l.rows < kLeastManyRows) return false;
    if (kWidth == 8 || l.rows > kMaxRows) return true;
    // Padding to whole vectors of 16 rows takes longer than the kernel of few rows loses.
    const int64_t rows = rounded_up(l.rows, kWidth);
    return (rows - l.rows) * (l.packing.bits || l.element != Element::float32 ? 8 : 4) <= rows;
  }

  explicit ManyRows(const Linear& l) : in_(l.in), rows_(rounded_up(l.rows, kWidth)) {}

  int64_t rows() const { return rows_; }  // of x and the dots, with padding

  // Lays out kRowBlock rows from `first` on, of `line` floats.
  void set(float* x, int64_t first, const float* rows, int64_t line) const {
    for (int64_t r = first; r < smaller(first + kRowBlock, rows_); r += kWidth, rows += kWidth * line) {
      const int64_t begin = r / kPanelRows * kPanelRows, width = smaller(kPanelRows, rows_ - begin);
      float* const target = x + begin * in_ + r - begin;
      for (int64_t c = 0; c < in_; c += kWidth) {
        Vector block[kWidth];
        for (int i = 0; i < kWidth; ++i) block[i] = load(rows + i * line + c);
        transpose(block);
        for (int64_t j = 0; j < smaller(kWidth, in_ - c); ++j) store(target + (c + j) * width, block[j]);
      }
    }
  }

  int64_t panel(int64_t row) const { return smaller(kPanelRows, rows_ - row); }  // rows of the panel that begins with a row

  // dots[s][i] (+)= weights[s][begin to end] · x[row + i][begin to end] for `count` rows of weights and a panel's rows of x.
  // `meanwhile` is called steps() times.
  template <typename Meanwhile>
  void multiply(
      const float* x, int64_t row, FloatsOfRows weights, int64_t count, int64_t begin, int64_t end, float* dots,
      const Meanwhile& meanwhile) const {
    const int64_t width = panel(row);
    const auto multiply_by = [&](auto vectors) {  // a constant: with a variable, GCC's loop takes 7% longer
      fastgpt::FASTGPT_CPU_LEVEL::multiply<kTileRows, vectors>(
          count, vectors, weights.start, weights.row, 1, x + row * in_ + begin * width, width, dots, width, end - begin,
          begin > 0, nullptr, meanwhile);
    };
    width == kWidth ? multiply_by(std::integral_constant<int, 1>()) : multiply_by(std::integral_constant<int, kPanelVectors>());
  }

  // Of `count` rows of weights and these columns, with all panels.
  int64_t steps(int64_t count, int64_t columns) const {
    const auto divided_up = [](int64_t n, int64_t step) { return (n + step - 1) / step; };
    return divided_up(rows_, kPanelRows) * divided_up(count, kTileRows) * divided_up(columns, kAtATime);
  }

 private:
  static constexpr int kPanelVectors = 2;
  static constexpr int64_t kPanelRows = kPanelVectors * kWidth;

  int64_t in_, rows_;
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
