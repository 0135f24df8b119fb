// The products of `linear` in tiles of bfloat16 (AMX).
//
// For files that are compiled once per CPU level, where that has tiles: everything is in an anonymous namespace (see
// cpu_level.h).

#pragma once

#include "common/stored_elements.h"
#include "common/tiles.h"
#include "linear/paired_rows.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// x in one piece if it is bfloat16; in two, which keep 16 bits, if it has been normalized or is float32.
class TileRows : public PairedRows {
 public:
  static constexpr int64_t kGroup = 32;            // weight rows, in two tiles
  static constexpr int64_t kDequantized = kGroup;  // quantized weight rows that are dequantized before they are multiplied

  static bool serves(const Linear& l) {
    constexpr int64_t kLeast = 9;  // rows of x that are worth it
    return l.element == Element::bfloat16 && l.rows >= kLeast && may_be_rounded(l);
  }

  TileRows(const Linear& l, float* memory) : PairedRows(l, l.norm.weight || l.x_element == Element::float32 ? 2 : 1, memory) {}

  // dots[n][r] = weight[n] · x[r] for `count` rows of the weight and rows() of x. If `ahead` is not 0, the weights that many
  // elements on are prefetched. Tiles of weights are loaded in place; partial tiles are copied and zero-padded.
  void multiply(const BFloat16* weight, int64_t count, int64_t ahead, float* dots) const {
    const Tiles tiles;
    alignas(64) BFloat16 filled[kGroup][kBlock];
    alignas(64) float product[kGroup][kMaxRows];
    for (int64_t n = 0; n < count; n += kGroup) {
      const int64_t group = smaller(count - n, kGroup);
      const int64_t next = n + kGroup < count ? kGroup * in_ : ahead ? ahead - n * in_ : 0;
      for (int64_t k = 0, columns; k < in_; k += columns) {
        const BFloat16* source = weight + n * in_ + k;
        Weights weights{source, in_, next ? source + next : nullptr};
        if (group == kGroup && in_ - k >= kColumns) {
          columns = (in_ - k) / kColumns * kColumns;
        } else {
          columns = smaller(in_ - k, kBlock);
          for (int64_t i = 0; i < group; ++i) fill_up(source + i * in_, columns, filled[i]);
          weights = {filled[0], kBlock, nullptr};
        }
        asm volatile("" ::: "memory");  // the compiler does not know that the intrinsics read it
        for (int64_t r = 0; r < rows_; r += 2 * kWidth) {
          rows_ - r > kWidth ? multiply_tiles<2>(weights, k, columns, r, product[0] + r)
                             : multiply_tiles<1>(weights, k, columns, r, product[0] + r);
          weights.ahead = nullptr;
        }
      }
      for (int64_t i = 0; i < group; ++i) {
        for (int64_t r = 0; r < rows_; r += kWidth) store(dots + (n + i) * rows_ + r, load(product[i] + r));
      }
    }
  }

 private:
  static constexpr int64_t kBlock = 512;  // columns that are copied at a time

  struct Weights {
    const BFloat16* data;
    int64_t stride;
    const BFloat16* ahead;  // those of the next group, or null
  };

  // product (kGroup, kMaxRows) += weights · x, of the columns from k on, kWidth or twice as many rows from r on.
  template <int kTiles>
  void multiply_tiles(const Weights& weights, int64_t k, int64_t columns, int64_t r, float* product) const {
    constexpr int64_t kStride = kMaxRows * sizeof(float);
    const int64_t stride = weights.stride * sizeof(BFloat16);
    float* const below = product + kWidth * kMaxRows;
    if (k == 0) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, product, kStride);
      _tile_loadd(2, below, kStride);
      if constexpr (kTiles == 2) {
        _tile_loadd(1, product + kWidth, kStride);
        _tile_loadd(3, below + kWidth, kStride);
      }
    }
    for (int64_t c = 0; c < columns; c += kColumns) {
      // Into the L2 cache, as x occupies the L1 cache.
      for (int64_t i = 0; weights.ahead && i < kGroup; ++i) __builtin_prefetch(weights.ahead + i * in_ + c, 0, 2);
      _tile_loadd(4, weights.data + c, stride);
      _tile_loadd(5, weights.data + kWidth * weights.stride + c, stride);
      for (int p = pieces_; p-- > 0;) {
        const uint16_t* x = pairs(k + c, r, p);
        _tile_loadd(6, x, 2 * rows_ * sizeof *x);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kTiles == 2) {
          _tile_loadd(7, x + 2 * kWidth, 2 * rows_ * sizeof *x);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, product, kStride);
    _tile_stored(2, below, kStride);
    if constexpr (kTiles == 2) {
      _tile_stored(1, product + kWidth, kStride);
      _tile_stored(3, below + kWidth, kStride);
    }
  }

  // Copies elements, zero-padded to whole tiles.
  static void fill_up(const BFloat16* source, int64_t count, BFloat16* target) {
    std::memcpy(target, source, count * sizeof *source);
    std::memset(target + count, 0, (rounded_up(count, kColumns) - count) * sizeof *source);
  }
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
