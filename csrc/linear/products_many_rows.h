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

constexpr bool kHasManyRows = kWidth == 8;  // it is measured with AVX2 only
constexpr int64_t kLeastManyRows = 16;      // with fewer, converting weights takes too long
constexpr int64_t kMostManyRows = 256;      // of x at a time: a block of their columns stays in the L2 cache
// Columns and rows of the weights that are multiplied with all of x at a time, half of the rows factors if gated. They stay in
// the L2 cache, these columns of a panel of x in the L1 cache.
constexpr int64_t kBlockColumns = 256, kBlockRows = 48;

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

// Rows `row` to `row` + count of the weights from `column` on, in a block of columns, which are prefetched in parts.
struct WeightsAhead {
  const char* source;
  int64_t row_bytes, count, bytes;

  WeightsAhead(const void* weights, int64_t row_bytes, int64_t row, int64_t count, int64_t column, int64_t in)
      : source(static_cast<const char*>(weights) + row * row_bytes + row_bytes * column / larger(in, 1)),
        row_bytes(row_bytes),
        count(count),
        bytes(row_bytes * smaller(kBlockColumns, in - column) / larger(in, 1)) {}

  // A part of `all`, of which those before `part` have been.
  void prefetch(int64_t part, int64_t parts, int64_t all) const {
    for (int64_t s = count * part / all; s < count * (part + parts) / all; ++s) {
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(source + s * row_bytes + byte, 0, 2);
    }
  }
};

// x in panels of kPanelRows rows, the last one perhaps narrower, whose columns lie one after the other.
class ManyRows {
 public:
  static bool serves(const Linear& l) { return kHasManyRows && l.many && l.rows >= kLeastManyRows; }

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
  void multiply(
      const float* x, int64_t row, FloatsOfRows weights, int64_t count, int64_t begin, int64_t end, float* dots) const {
    const int64_t width = panel(row);
    fastgpt::FASTGPT_CPU_LEVEL::multiply<kTileRows, kTileVectors>(
        count, width / kWidth, weights.start, weights.row, 1, x + row * in_ + begin * width, width, dots, width, end - begin,
        begin > 0);
  }

 private:
  static constexpr int64_t kPanelRows = kTileVectors * kWidth;

  int64_t in_, rows_;
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
