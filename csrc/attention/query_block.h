// A block of queries: the common base of the forward and the backward kernels.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "attention/dropout.h"
#include "attention/load_keys.h"
#include "attention/mask.h"
#include "attention/query_rows.h"
#include "attention/scores.h"
#include "common/matrices.h"
#include "common/stored_elements.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

class QueryBlock {
 public:
  QueryBlock(const Attention& args, int64_t b, int64_t h_kv, int64_t first, bool one_token = false)
      : args_(args),
        D_(padded_head_dim(args.D)),
        D_v_(padded_head_dim(args.D_v)),
        queries_(args, b, h_kv, first, one_token),
        rows_(queries_.count) {}

 protected:
  // Index of row r of the block in q, out, their gradients and lse.
  template <typename Data>
  int64_t at(const PerQuery<Data>& x, int64_t r) const {
    return x.at(queries_.b, queries_.head[r], queries_.sequence.first_q + queries_.token[r]);
  }

  // Numbers of vectors that cover the block's rows, and a head dim.
  int64_t columns() const { return (rows_ + kWidth - 1) / kWidth; }
  static int64_t vectors(int64_t head_dim) { return (head_dim + kWidth - 1) / kWidth; }

  // The first key of the first tile, and the end of the keys. Tiles begin at multiples of kBlockN.
  int64_t begin() const { return queries_.first_begin / kBlockN * kBlockN; }
  int64_t end() const { return queries_.last_end; }
  int64_t keys_from(int64_t n) const { return end() - n < kBlockN ? end() - n : kBlockN; }

  // Row r of q, or of a tensor with its shape, as floats.
  void load_row(const PerQuery<const void*>& x, int64_t r, int64_t head_dim, float* row) const {
    convert(x.data, at(x, r), head_dim, args_.element, row);
  }

  // Transposes the block's rows (kBlockM, D) to columns (D, kBlockM), and back, for a padded head dim D, in whole vectors.
  void to_columns(const float* rows, int64_t D, float* columns) const { transpose_matrix(rows, D, rows_, columns, kBlockM, D); }
  void to_rows(const float* columns, int64_t D, float* rows) const { transpose_matrix(columns, kBlockM, D, rows, D, rows_); }

  // The functions of load_keys.h, mask.h, scores.h and dropout.h for the block's queries.
  KeyRows load_keys(const Keys& source, int64_t n, int64_t keys, float* copy) const {
    return FASTGPT_CPU_LEVEL::load_keys(args_, queries_, source, n, keys, copy);
  }
  template <typename Function>
  void each_run(const Keys& source, int64_t n, int64_t keys, const Function& function) const {
    FASTGPT_CPU_LEVEL::each_run(args_, queries_, source, n, keys, function);
  }
  bool mask_shows(int64_t n, int64_t keys) const { return FASTGPT_CPU_LEVEL::mask_shows(args_.mask, queries_, n, keys); }
  template <Along kAlong>
  void finish_scores(float* scores, int64_t n, int64_t keys, float* cap_slopes = nullptr) const {
    FASTGPT_CPU_LEVEL::finish_scores<kAlong>(args_, queries_, scores, n, keys, cap_slopes);
  }
  void load_keep_factors(float* factors, int64_t n, int64_t keys) const {
    FASTGPT_CPU_LEVEL::load_keep_factors(args_, queries_, n, keys, factors);
  }

  const Attention& args_;
  const int64_t D_, D_v_;  // head dims padded to 16
  const QueryRows queries_;
  const int64_t rows_;  // of queries
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
