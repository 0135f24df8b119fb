// Terms that are added to scores: ALiBi and the bias.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "attention/score_tile.h"
#include "common/stored_elements.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Subtracts slope · |query position - key position|, for the keys from n on.
template <Along kAlong>
inline void add_alibi(const QueryRows& queries, float* scores, int64_t n, int64_t keys) {
  const int32_t past = static_cast<int32_t>(queries.sequence.keys - queries.sequence.queries - n);
  each_vector<kAlong>(queries, keys, [&](int64_t line, int64_t lane) {
    const IntVector ahead = of_rows<kAlong>(queries.token, line, lane) + past - of_keys<kAlong>(line, lane);
    const Vector distance = __builtin_convertvector(ahead < 0 ? -ahead : ahead, Vector);
    float* score = scores + line * kBlockN + lane;
    store(score, load(score) - of_rows<kAlong>(queries.slope, line, lane) * distance);
  });
}

// A bias of -inf masks a key, whatever q·k is.
template <Along kAlong>
inline void add_bias(const PerScore<const void*>& bias, const QueryRows& queries, float* scores, int64_t n, int64_t keys) {
  const auto load_bias = [&](int64_t r, float* row) {
    const int64_t offset = bias.at(queries.b, queries.head[r], queries.token[r]) + n * bias.stride_s;
    if (bias.stride_s == 1) return convert(bias.data, offset, keys, bias.element, row);
    for (int64_t i = 0; i < keys; ++i) convert(bias.data, offset + i * bias.stride_s, 1, bias.element, row + i);
  };
  combine_rows<kAlong>(queries, scores, keys, load_bias, [](Vector score, Vector added) {
    return added == broadcast(-kInfinity) ? added : score + added;
  });
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
