// A tile of scores, of some rows of queries and the keys from n on, and iteration over it.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "attention/query_rows.h"
#include "common/vectors.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// The layout of a tile, whose lines are kBlockM = kBlockN floats apart: a line is a key and a vector runs along queries, or a
// line is a query and a vector runs along keys.
enum class Along { queries, keys };

static_assert(kBlockM == kBlockN, "a tile of scores has lines of one length");

// Calls function(line, lane) for the first lane of every vector of a tile.
template <Along kAlong, typename Function>
inline void each_vector(const QueryRows& queries, int64_t keys, Function function) {
  const int64_t rows = queries.count;
  const int64_t lines = kAlong == Along::queries ? keys : rows, lanes = kAlong == Along::queries ? rows : keys;
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t lane = 0; lane < lanes; lane += kWidth) function(line, lane);
  }
}

// Per lane of a vector: the element of `numbers` of its row, and the index of its key relative to the tile's first.
template <Along kAlong, typename T>
inline auto of_rows(const T* numbers, int64_t line, int64_t lane) {
  return kAlong == Along::queries ? load(numbers + lane) : broadcast(numbers[line]);
}
template <Along kAlong>
inline IntVector of_keys(int64_t line, int64_t lane) {
  if constexpr (kAlong == Along::queries) return broadcast(static_cast<int32_t>(line));
  IntVector keys;
  for (int i = 0; i < kWidth; ++i) keys[i] = static_cast<int32_t>(lane) + i;
  return keys;
}

// scores = combine(scores, numbers), where load_numbers(r, row) writes the numbers of row r, one per key.
template <Along kAlong, typename Load, typename Combine>
inline void combine_rows(const QueryRows& queries, float* scores, int64_t keys, Load load_numbers, Combine combine) {
  float numbers[kWidth][kBlockN] = {};
  for (int64_t m = 0; m < queries.count; m += kWidth) {
    const int64_t rows = queries.count - m < kWidth ? queries.count - m : kWidth;
    for (int64_t r = 0; r < rows; ++r) load_numbers(m + r, numbers[r]);
    for (int64_t n = 0; n < keys; n += kWidth) {
      Vector block[kWidth];
      for (int64_t r = 0; r < kWidth; ++r) block[r] = load(numbers[r] + n);
      if constexpr (kAlong == Along::queries) transpose(block);
      const int64_t lines = kAlong == Along::keys ? rows : keys - n < kWidth ? keys - n : kWidth;
      float* score = scores + (kAlong == Along::queries ? n * kBlockM + m : m * kBlockN + n);
      for (int64_t i = 0; i < lines; ++i, score += kBlockN) store(score, combine(load(score), block[i]));
    }
  }
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
