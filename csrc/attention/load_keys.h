// Access to keys and values in tensors or pages, as they are stored, and converted to floats.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "attention/query_rows.h"
#include "common/stored_elements.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Stride in floats of copied rows of keys or values: not a multiple of 2 KiB, which would map all rows of a tile to few sets of
// the L1 cache.
constexpr int64_t kConflicts = 512;
constexpr int64_t copied_stride(int64_t head_dim) {
  const int64_t padded = padded_head_dim(head_dim);
  return padded % kConflicts == 0 ? padded + 16 : padded;
}

// Calls function(first, count, offset, scale) for each contiguous run, up to the end of a page, of the keys or values from n on
// that `queries` share: index of a run's first key relative to n, number of keys, offset of its first element, and its scale or
// null.
template <typename Function>
inline void each_run(
    const Attention& args, const QueryRows& queries, const Keys& source, int64_t n, int64_t keys, const Function& function) {
  for (int64_t i = 0, count; i < keys; i += count) {
    int64_t b = queries.b, row = queries.sequence.first_k + n + i;
    count = keys - i;
    if (args.block_table) {
      b = args.block_table[queries.b * args.table_stride_b + row / args.page * args.table_stride_p];
      row %= args.page;
      count = count < args.page - row ? count : args.page - row;
    }
    const float* scale = source.scale
        ? source.scale + b * source.scale_stride_b + queries.h_kv * source.scale_stride_h + row * source.scale_stride_s
        : nullptr;
    function(i, count, b * source.stride_b + queries.h_kv * source.stride_h + row * source.stride_s, scale);
  }
}

// Some keys or values as floats, in place or copied. Stride in floats.
struct KeyRows {
  const float* data;
  int64_t stride;
};

// A copy is dequantized and zero-padded to a multiple of 16, with rows copied_stride() apart.
inline KeyRows load_keys(
    const Attention& args, const QueryRows& queries, const Keys& source, int64_t n, int64_t keys, float* copy) {
  const int64_t head_dim = source.head_dim, padded = padded_head_dim(head_dim);
  KeyRows rows{copy, copied_stride(head_dim)};
  const bool as_they_lie = args.key_element == Element::float32 && head_dim % kWidth == 0 &&
      (head_dim < kConflicts || source.stride_s % kConflicts != 0);
  each_run(args, queries, source, n, keys, [&](int64_t i, int64_t count, int64_t offset, const float* scale) {
    if (count == keys && as_they_lie) {
      rows = {static_cast<const float*>(source.data) + offset, source.stride_s};
      return;
    }
    for (int64_t j = 0; j < count; ++j) {
      float* target = copy + (i + j) * rows.stride;
      convert(source.data, offset + j * source.stride_s, head_dim, args.key_element, target);
      if (scale) {
        const float factor = scale[j * source.scale_stride_s];
        for (int64_t d = 0; d < head_dim; ++d) target[d] *= factor;
      }
      for (int64_t d = head_dim; d < padded; ++d) target[d] = 0.0f;
    }
  });
  return rows;
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
