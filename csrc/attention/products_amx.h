// The products of attention in tiles of bfloat16 (AMX): see attention_products.h.
//
// Floats are split into pieces (see bfloat16_pieces.h), and multiplied piece by piece: 1, 4, or for three pieces 6 products,
// without those below the last bit. Accumulated in float32 they have no more error than products of floats. An infinite piece
// makes the result infinite or NaN (see ForwardBlock); subnormals count as zero.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "attention/attention.h"
#include "common/bfloat16_pieces.h"
#include "common/integers.h"
#include "common/tiles.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// A tile has kWidth rows of kWidth pairs of neighbors along k. Results are computed in blocks of 2 x 2 tiles, kStep rows and
// columns; kStep is also the extent of a tile along k.
constexpr int64_t kStep = 2 * kWidth;

// bfloat16 elements, `size` of them per piece; both operands of a product have the same number of pieces. In a left operand,
// lines of `stride` elements run along k; in a right one, lines hold the pairs (k, k + 1) of all columns. Zero-padded along k
// to a multiple of kStep.
struct Operand {
  uint16_t* data;
  int64_t stride, size;
  int pieces;
};
struct Left : Operand {
  Left from(int64_t i, int64_t k) const { return {{data + i * stride + k, stride, size, pieces}}; }
};
struct Right : Operand {
  Right from(int64_t k, int64_t j) const { return {{data + k / 2 * stride + 2 * j, stride, size, pieces}}; }
};

// Products begin at multiples of kPanel columns, and of kStep along rows and k.
constexpr int64_t kPanel = kStep;

// 8-bit elements have a float32 scale, so they need all pieces.
constexpr int pieces_of(Element element) { return element == Element::bfloat16 ? 1 : element == Element::float16 ? 2 : 3; }

// Maximum size of an operand in floats, for n rows or columns.
constexpr int64_t operand_size(int64_t n, int64_t K) {
  return rounded_up(n, kStep) * rounded_up(K, kStep) * pieces_of(Element::float32) / 2;
}

// left[i][k] = rows[i * stride + k], for K up to a multiple of kWidth.
inline Left left_of_rows(const float* rows, int64_t stride, int64_t count, int64_t K, int pieces, float* memory) {
  uint16_t* data = reinterpret_cast<uint16_t*>(memory);
  const int64_t line = rounded_up(K, kStep), size = rounded_up(count, kStep) * line;
  with_pieces(pieces, [&](auto number) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < K; k += kStep) {
        const float* source = rows + i * stride + k;
        const Vector second = K - k > kWidth ? load(source + kWidth) : Vector{};
        store_line<decltype(number)::value>(load(source), second, data + i * line + k, size);
      }
    }
  });
  return {{data, line, size, pieces}};
}

// A right operand of K rows, uninitialized but for the padding past K. To be filled by store_rows, two rows at a time.
inline Right new_right(int64_t K, int64_t columns, int pieces, float* memory) {
  const int64_t line = 2 * rounded_up(columns, kStep), lines = rounded_up(K, kStep) / 2, size = lines * line;
  const Right right{{reinterpret_cast<uint16_t*>(memory), line, size, pieces}};
  for (int p = 0; p < pieces; ++p) {
    const int64_t used = (K + 1) / 2 * line;
    std::memset(right.data + p * size + used, 0, (size - used) * sizeof(uint16_t));
  }
  return right;
}

// Stores columns j to j + kWidth of rows k and k + 1.
template <int kPieces>
inline void store_rows(const Right& right, int64_t k, int64_t j, Vector a, Vector b) {
  store_pairs<kPieces>(a, b, right.data + k / 2 * right.stride + 2 * j, right.size);
}

// right[k][j] = rows[k * stride + j], whole vectors of columns.
inline Right right_of_rows(const float* rows, int64_t stride, int64_t K, int64_t columns, int pieces, float* memory) {
  const Right right = new_right(K, columns, pieces, memory);
  with_pieces(pieces, [&](auto number) {
    for (int64_t k = 0; k < K; k += 2) {
      for (int64_t j = 0; j < columns; j += kWidth) {
        const float* source = rows + k * stride + j;
        store_rows<decltype(number)::value>(right, k, j, load(source), k + 1 < K ? load(source + stride) : Vector{});
      }
    }
  });
  return right;
}

// left[i][k] = rows[k * stride + i], whole vectors of i: pairs of rows, transposed.
inline Left left_of_columns(const float* rows, int64_t stride, int64_t count, int64_t K, int pieces, float* memory) {
  uint16_t* data = reinterpret_cast<uint16_t*>(memory);
  const int64_t line = rounded_up(K, kStep), size = rounded_up(count, kStep) * line;
  with_pieces(pieces, [&](auto number) {
    for (int64_t k = 0; k < K; k += kStep) {
      for (int64_t i = 0; i < count; i += kWidth) {
        uint16_t pairs[pieces_of(Element::float32)][kWidth][kStep];
        for (int64_t l = 0; l < kWidth; ++l) {
          const int64_t row = k + 2 * l;
          const float* source = rows + row * stride + i;
          const Vector a = row < K ? load(source) : Vector{}, b = row + 1 < K ? load(source + stride) : Vector{};
          store_pairs<decltype(number)::value>(a, b, pairs[0][l], sizeof pairs[0] / sizeof **pairs[0]);
        }
        for (int p = 0; p < decltype(number)::value; ++p) {
          Vector block[kWidth];
          std::memcpy(block, pairs[p], sizeof block);
          transpose(block);
          for (int64_t l = 0; l < kWidth; ++l) {
            std::memcpy(data + p * size + (i + l) * line + k, &block[l], sizeof block[l]);
          }
        }
      }
    }
  });
  return {{data, line, size, pieces}};
}

// Tiles 0 to 3 += the product of tiles (4; 5), stacked, and (6, 7), side by side.
inline void multiply_held_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

inline void load_left_tiles(const uint16_t* data, int64_t stride) {
  _tile_loadd(4, data, stride * sizeof *data);
  _tile_loadd(5, data + kWidth * stride, stride * sizeof *data);
}

inline void load_right_tiles(const uint16_t* data, int64_t stride) {
  _tile_loadd(6, data, stride * sizeof *data);
  _tile_loadd(7, data + kStep, stride * sizeof *data);
}

// Tiles 0 to 3 = left[i to i + kStep][all k] · right[all k][j to j + kStep]. Products of pieces are ordered such that only one
// operand is reloaded from one to the next.
template <int kPieces>
inline void multiply_tiles(const Left& left, const Right& right, int64_t i, int64_t j, int64_t K) {
  const uint16_t* a = left.data + i * left.stride;
  const uint16_t* b = right.data + 2 * j;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < K; k += kStep, a += kStep, b += kWidth * right.stride) {
    const auto load_left = [&](int piece) { load_left_tiles(a + piece * left.size, left.stride); };
    const auto load_right = [&](int piece) { load_right_tiles(b + piece * right.size, right.stride); };
    if constexpr (kPieces == 1) {
      load_right(0);
    } else {
      load_left(1), load_right(1), multiply_held_tiles();
      load_right(0), multiply_held_tiles();
    }
    if constexpr (kPieces == 3) load_left(2), multiply_held_tiles();
    load_left(0), multiply_held_tiles();
    if constexpr (kPieces > 1) load_right(1), multiply_held_tiles();
    if constexpr (kPieces > 2) load_right(2), multiply_held_tiles();
  }
}

inline void store_tiles(float* c, int64_t stride) {
  float* const below = c + kWidth * stride;
  _tile_stored(0, c, stride * sizeof(float));
  _tile_stored(1, c + kWidth, stride * sizeof(float));
  _tile_stored(2, below, stride * sizeof(float));
  _tile_stored(3, below + kWidth, stride * sizeof(float));
}

// c = left · right. Lines of c are `stride` floats apart; rows and columns are padded to multiples of kStep.
inline void multiply(const Left& left, const Right& right, int64_t rows, int64_t columns, int64_t K, float* c, int64_t stride) {
  asm volatile("" ::: "memory");  // stores to operands come first: the compiler does not know that the intrinsics read memory
  with_pieces(left.pieces, [&](auto pieces) {
    for (int64_t i = 0; i < rows; i += kStep) {
      for (int64_t j = 0; j < columns; j += kStep) {
        multiply_tiles<decltype(pieces)::value>(left, right, i, j, K);
        store_tiles(c + i * stride + j, stride);
      }
    }
  });
}

// c[i][j] = c[i][j] · factors[j] + (left · right)[i][j], for whole vectors of columns; null factors mean 1. All tiles of kPart
// rows, which fit into the L1 cache, are stored before the first is loaded again, so that no load waits for a store.
inline void multiply_add(
    const Left& left, const Right& right, int64_t rows, int64_t columns, int64_t K, float* c, int64_t stride,
    const float* factors = nullptr) {
  constexpr int64_t kPart = 256;
  alignas(64) float product[kPart][kPanel];
  for (int64_t j = 0; j < columns; j += kPanel) {
    for (int64_t first = 0; first < rows; first += kPart) {
      const int64_t count = smaller(rows - first, kPart);
      multiply(left.from(first, 0), right.from(0, j), count, kPanel, K, product[0], kPanel);
      for (int64_t m = 0; m < kPanel && j + m < columns; m += kWidth) {
        const Vector factor = factors ? load(factors + j + m) : broadcast(1.0f);
        for (int64_t i = 0; i < count; ++i) {
          float* target = c + (first + i) * stride + j + m;
          store(target, load(target) * factor + load(product[i] + m));
        }
      }
    }
  }
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
