// x in the layout of instructions that multiply pairs of bfloat16.
//
// For files that are compiled once per CPU level, where that has AVX-512: everything is in an anonymous namespace (see
// cpu_level.h).

#pragma once

#include "common/bfloat16_pieces.h"
#include "common/integers.h"
#include "linear/linear.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Whether weights may be rounded to bfloat16, which quantized ones are when they are multiplied. Not if a row has 16 numbers
// only, whose rounding errors do not average out.
inline bool may_be_rounded(const Linear& l) {
  return !(l.packing.bits == 4 && l.packing.minima && !l.packing.block_type && l.packing.group_size == l.in);
}

// Pairs of neighboring columns, row-contiguous: the pairs of all rows for columns (k, k + 1) are adjacent. Zero-padded to whole
// vectors of rows and to 32 columns. Pieces are stored one after the other.
class PairedRows {
 public:
  PairedRows(const Linear& l, int pieces, float* memory)
      : x_(reinterpret_cast<uint16_t*>(memory)),
        in_(l.in),
        rows_(rounded_up(l.rows, kRowBlock)),
        piece_(rounded_up(l.in, kColumns) * rows_),
        pieces_(pieces) {}

  int64_t rows() const { return rows_; }                 // including padding
  int64_t size() const { return pieces_ * piece_ / 2; }  // in floats

  // Stores kRowBlock rows from `first` on, which are `stride` floats apart and zero-padded to that.
  void set(int64_t first, const float* rows, int64_t stride) const {
    with_pieces(pieces_, [&](auto pieces) {
      for (int64_t k = 0; k < rounded_up(in_, kColumns); k += kWidth) {
        Vector columns[kWidth] = {};
        for (int64_t r = 0; r < kWidth && k < stride; ++r) columns[r] = load(rows + r * stride + k);
        transpose(columns);
        for (int64_t i = 0; i < kWidth; i += 2) {
          store_pairs<decltype(pieces)::value>(columns[i], columns[i + 1], x_ + (k + i) * rows_ + 2 * first, piece_);
        }
      }
    });
  }

 protected:
  static constexpr int64_t kColumns = 32;
  static_assert(kRowBlock == kWidth, "a block of rows fills a vector");

  // The pairs of columns k and k + 1, k even, from row r on.
  const uint16_t* pairs(int64_t k, int64_t r, int piece = 0) const { return x_ + piece * piece_ + k * rows_ + 2 * r; }

  uint16_t* const x_;
  const int64_t in_, rows_, piece_;  // piece_: elements of a piece
  const int pieces_;
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
