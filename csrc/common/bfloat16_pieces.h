// Floats split into pieces of bfloat16, for the instructions that multiply these: bfloat16 has 8 significant bits, so a float16
// is the sum of 2 pieces, and a float32 of 3.
//
// For files that are compiled once per CPU level, where that has AVX-512: everything is in an anonymous namespace (see
// cpu_level.h).

#pragma once

#include <type_traits>

#include "common/vectors.h"

// Of functions that use VDPBF16PS, on CPUs that have it.
#define FASTGPT_BF16_DOT __attribute__((target("avx512bf16")))

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Subtracts the next piece from x, and returns it in the upper halves of the lanes. The last of several is truncated, not
// rounded, as rounding turns some NaN into zero.
template <bool kLast, int kPieces>
inline UIntVector take_piece(Vector& x) {
  UIntVector bits = reinterpret_cast<UIntVector>(x);
  if constexpr (kLast && kPieces > 1) return bits & 0xffff0000u;
  bits = (bits + 0x8000u) & 0xffff0000u;
  x -= reinterpret_cast<Vector>(bits);
  return bits;
}

// Stores the pieces of the lanes of a and b as pairs (a, b); the pieces of one order are `size` elements after those before.
template <int kPieces, int kPiece = 0>
inline void store_pairs(Vector a, Vector b, uint16_t* target, int64_t size) {
  constexpr bool kLast = kPiece == kPieces - 1;
  const UIntVector pairs = take_piece<kLast, kPieces>(a) >> 16 | take_piece<kLast, kPieces>(b);
  std::memcpy(target, &pairs, sizeof pairs);
  if constexpr (!kLast) store_pairs<kPieces, kPiece + 1>(a, b, target + size, size);
}

// Stores the pieces of the lanes of a followed by those of b, likewise.
template <int kPieces, int kPiece = 0>
inline void store_line(Vector a, Vector b, uint16_t* target, int64_t size) {
  constexpr bool kLast = kPiece == kPieces - 1;
  const UIntVector first = take_piece<kLast, kPieces>(a), second = take_piece<kLast, kPieces>(b);
  // clang-format off
  const __m512i upper_halves = _mm512_set_epi16(
      63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
      31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  // clang-format on
  const __m512i line = _mm512_permutex2var_epi16(
      reinterpret_cast<__m512i>(first), upper_halves, reinterpret_cast<__m512i>(second));
  std::memcpy(target, &line, sizeof line);
  if constexpr (!kLast) store_line<kPieces, kPiece + 1>(a, b, target + size, size);
}

// Calls function(std::integral_constant<int, pieces>()).
template <typename Function>
inline void with_pieces(int pieces, const Function& function) {
  if (pieces == 1) return function(std::integral_constant<int, 1>());
  if (pieces == 2) return function(std::integral_constant<int, 2>());
  function(std::integral_constant<int, 3>());
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
