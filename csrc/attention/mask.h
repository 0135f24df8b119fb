// Which keys a query sees: those in its range, which causal, window and lengths define, unless the mask hides them.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "attention/score_tile.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Sets scores to -inf for keys out of a row's range. n: the tile's first key.
template <Along kAlong>
inline void hide_out_of_range(const QueryRows& queries, float* scores, int64_t n, int64_t keys) {
  // If vectors run along keys, lanes of the last one past the last key hold no scores.
  const bool partial = kAlong == Along::keys && keys % kWidth != 0;
  if (!partial && queries.first_end >= n + keys && queries.last_begin <= n) return;
  each_vector<kAlong>(queries, keys, [&](int64_t line, int64_t lane) {
    const IntVector at = of_keys<kAlong>(line, lane) + static_cast<int32_t>(n);
    const auto seen = (at < of_rows<kAlong>(queries.key_end, line, lane)) &
        (at >= of_rows<kAlong>(queries.key_begin, line, lane));
    float* score = scores + line * kBlockN + lane;
    store(score, seen ? load(score) : broadcast(-kInfinity));
  });
}

// The mask of row r, from key n on; elements are mask.stride_s apart.
inline const uint8_t* mask_row(const PerScore<const uint8_t*>& mask, const QueryRows& queries, int64_t r, int64_t n) {
  return mask.data + mask.at(queries.b, queries.head[r], queries.token[r]) + n * mask.stride_s;
}

// Whether the mask lets any of the rows see any of the keys from n on.
inline bool mask_shows(const PerScore<const uint8_t*>& mask, const QueryRows& queries, int64_t n, int64_t keys) {
  for (int64_t r = 0; r < queries.count; ++r) {
    const uint8_t* row = mask_row(mask, queries, r, n);
    for (int64_t i = 0; i < keys; ++i) {
      if (row[i * mask.stride_s]) return true;
    }
  }
  return false;
}

// Sets scores to -inf for keys that the mask hides.
template <Along kAlong>
inline void hide_masked(
    const PerScore<const uint8_t*>& mask, const QueryRows& queries, float* scores, int64_t n, int64_t keys) {
  const auto load_mask = [&](int64_t r, float* numbers) {
    const uint8_t* row = mask_row(mask, queries, r, n);
    for (int64_t i = 0; i < keys; ++i) numbers[i] = static_cast<float>(row[i * mask.stride_s]);
  };
  combine_rows<kAlong>(queries, scores, keys, load_mask, [](Vector score, Vector shown) {
    return shown > 0.0f ? score : broadcast(-kInfinity);
  });
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
