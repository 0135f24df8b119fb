// From scale · q·k to scores, in the order of the operation's contract: softcap, ALiBi, bias, masks.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "attention/bias.h"
#include "attention/mask.h"
#include "attention/score_tile.h"
#include "common/vector_math.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// softcap · tanh(score / softcap). `slopes` gets the derivatives unless it is null.
template <Along kAlong>
inline void cap_scores(const QueryRows& queries, float softcap, float* scores, int64_t keys, float* slopes) {
  const float inverse = 1.0f / softcap;
  each_vector<kAlong>(queries, keys, [&](int64_t line, int64_t lane) {
    const Vector capped = tanh(load(scores + line * kBlockN + lane) * inverse);
    store(scores + line * kBlockN + lane, capped * softcap);
    if (slopes) store(slopes + line * kBlockN + lane, 1.0f - capped * capped);
  });
}

// Scores of the keys from n on; -inf where a query does not see a key. With a softcap, `cap_slopes` gets its derivatives unless
// it is null.
template <Along kAlong>
inline void finish_scores(
    const Attention& args, const QueryRows& queries, float* scores, int64_t n, int64_t keys, float* cap_slopes) {
  if (args.softcap > 0.0f) cap_scores<kAlong>(queries, args.softcap, scores, keys, cap_slopes);
  if (args.alibi_slopes) add_alibi<kAlong>(queries, scores, n, keys);
  if (args.bias.data) add_bias<kAlong>(args.bias, queries, scores, n, keys);
  hide_out_of_range<kAlong>(queries, scores, n, keys);
  if (args.mask.data) hide_masked<kAlong>(args.mask, queries, scores, n, keys);
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
