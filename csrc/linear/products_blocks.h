// The products of `linear` with GGUF's types of blocks that are unpacked first.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "linear/gguf_blocks.h"
#include "linear/products_panels.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// With up to kFewRows rows of x, a block is multiplied as soon as it is unpacked, in the first-level cache.
template <typename Block>
class BlockRows {
 public:
  static constexpr int64_t kRows = kWidth;  // of weights, whose lanes are reduced together

  explicit BlockRows(const Linear& l) : l_(l), row_bytes_(l.in / Block::kColumns * Block::kBytes) {}

  int64_t row_bytes() const { return row_bytes_; }

  static int64_t x_row(const Linear& l) { return padded(l.in); }  // floats of a row of x

  static void arrange(const Linear& l, const float* x, float* target) { std::memcpy(target, x, l.in * sizeof(float)); }

  // As QuantizedRows.
  void multiply(const float* x, int64_t row, int64_t count, int64_t ahead, float* dots) const {
    const auto* weight = static_cast<const uint8_t*>(l_.weight) + row * row_bytes_;
    if (l_.rows <= kFewRows) return multiply_few<kFewRows>(x, weight, count, ahead, dots);
    multiply_panels(l_, x, weight, row_bytes_, count, dots, *this);
  }

  // Columns c to c + columns of a row as floats.
  void dequantize(const uint8_t* row, int64_t c, int64_t columns, float* target) const {
    const uint8_t* block = row + c / Block::kColumns * Block::kBytes;
    for (; columns > 0; columns -= Block::kColumns, block += Block::kBytes, target += Block::kColumns) {
      dequantize_block(block, target);
    }
  }

 private:
  static constexpr int64_t kGroups = Block::kColumns / Block::kGroup;
  static constexpr int kVectors = Block::kGroup / kWidth;
  using Numbers = typename Block::Numbers;

  void dequantize_block(const uint8_t* block, float* target) const {
    Numbers unpacked;
    Block::unpack(block, l_.values_of_halves, unpacked);
    for (int64_t g = 0; g < kGroups; ++g) {
      const Vector scale = broadcast(unpacked.scales[g]);
      for (int64_t c = g * Block::kGroup; c < (g + 1) * Block::kGroup; c += kWidth) {
        Vector w = unpacked.numbers(c) * scale;
        if (Block::kMinima) w += broadcast(unpacked.minima[g]);
        store(target + c, w);
      }
    }
  }

  template <int kCount>
  void multiply_few(const float* x, const uint8_t* weight, int64_t count, int64_t ahead, float* dots) const {
    if constexpr (kCount > 1) {
      if (l_.rows < kCount) return multiply_few<kCount - 1>(x, weight, count, ahead, dots);
    }
    multiply_in_streams<kCount, kCount == 1 ? 2 : 1>(
        weight, row_bytes_, count, false, dots, [&](auto& rows, auto& total) { multiply_rows(x, rows, ahead, total); });
  }

  // Adds to lanes of the sums of x[i] · rows[j].
  template <int kStreams, int kCount>
  __attribute__((always_inline)) inline void multiply_rows(
      const float* x, const uint8_t* (&rows)[kStreams], int64_t ahead, Vector (&total)[kStreams][kCount]) const {
    const int64_t x_row = this->x_row(l_);
    for (const float* const end = x + l_.in; x < end; x += Block::kColumns) {
      Numbers blocks[kStreams];
      for (int j = 0; j < kStreams; ++j) {
        for (int64_t line = 0; ahead && line < Block::kBytes; line += 64) __builtin_prefetch(rows[j] + ahead + line, 0, 2);
        Block::unpack(rows[j], l_.values_of_halves, blocks[j]);
        rows[j] += Block::kBytes;
      }
      // Read again from memory, numbers are widened and scales broadcast as they are loaded. From registers GCC would shuffle
      // them.
      if (Block::kColumns > 32) asm volatile("" : : "r"(blocks) : "memory");
      for (int64_t g = 0; g < kGroups; ++g) {
        for (int j = 0; j < kStreams; ++j) {
          const Vector scale = broadcast(blocks[j].scales[g]);
          Vector sums[kCount] = {};
          for (int v = 0; v < kVectors; ++v) {
            const int64_t c = g * Block::kGroup + v * kWidth;
            const Vector w = Block::kMinima ? blocks[j].weights(c, scale, broadcast(blocks[j].minima[g]))
                                            : blocks[j].numbers(c);
            for (int i = 0; i < kCount; ++i) sums[i] += load(x + i * x_row + c) * w;
          }
          for (int i = 0; i < kCount; ++i) {
            total[j][i] = Block::kMinima ? total[j][i] + sums[i] : total[j][i] + sums[i] * scale;
          }
        }
      }
    }
  }

  const Linear& l_;
  int64_t row_bytes_;
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
