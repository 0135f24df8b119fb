// The output of a block of queries, common to decode and prefill.
//
// Products of whole tiles multiply values that a query does not see by a weight of 0, which is NaN for infinity and NaN. So
// result rows that are not finite are recomputed from the keys alone that the query sees.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include <memory>

#include "attention/query_block.h"
#include "common/integers.h"
#include "common/stored_elements.h"
#include "common/vector_math.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

class ForwardBlock : protected QueryBlock {
 public:
  ForwardBlock(const AttentionForward& args, int64_t b, int64_t h_kv, int64_t first, bool one_token)
      : QueryBlock(args, b, h_kv, first, one_token), results_(args) {}

 protected:
  // `rows`: weighted sums of values (rows, D_v_), overwritten.
  void write_results(float* rows) const {
    uint64_t broken = 0;  // a bit for each row
    static_assert(kBlockM <= 64);
    for (int64_t r = 0; r < rows_; ++r) {
      if (!write_result(r, rows + r * D_v_, max_[r], sum_[r])) broken |= uint64_t{1} << r;
    }
    if (broken) write_again(broken);
  }

 private:
  // Writes a row of results, given the weighted sum of values divided by `divided` (overwritten), the maximum score and the sum
  // of weights. Returns whether it is finite.
  bool write_result(int64_t r, float* row, float highest, float total, float divided = 1.0f) const {
    const bool fully_masked = total == 0.0f;
    float rescale = 1.0f;
    if (args_.sinks) {
      const float sink = args_.sinks[queries_.head[r]], before = highest;
      highest = sink > highest ? sink : highest;
      rescale = exp_nonpositive(before - highest);
      total = total * rescale + exp_nonpositive(sink - highest);
    }
    const float factor = fully_masked ? 0.0f : rescale / total * divided;
    Vector zeros{};  // becomes NaN at the first result that is not finite
    for (int64_t d = 0; d < D_v_; d += kWidth) {
      const Vector result = load(row + d) * factor;
      store(row + d, result);
      zeros += result * 0.0f;
    }
    write(row, args_.D_v, results_.out.data, at(results_.out, r), args_.element);
    results_.lse.data[at(results_.lse, r)] = fully_masked ? -kInfinity
        : highest == kInfinity                            ? highest
                                                          : highest + __builtin_logf(total);
    return sum(zeros) == 0.0f;
  }

  // Recomputes the rows whose bits are set, in double, from the keys that they see alone: those with a score above -inf.
  void write_again(uint64_t broken) const {
    alignas(64) float scores[kBlockN * kBlockM] = {}, factors[kBlockN * kBlockM];  // a line for each key
    alignas(64) float q[kMaxHeadDim] = {};
    struct Copies {
      float k[kBlockN * kMaxHeadDim], v[kBlockN * kMaxHeadDim];
    };
    const std::unique_ptr<Copies> copies(new Copies);  // too large for some threads' stacks
    const auto each_broken = [&](auto function) {
      for (int64_t r = 0; r < rows_; ++r) {
        if (broken >> r & 1) function(r);
      }
    };
    struct Sums {
      double of_values[kMaxHeadDim], of_weights, highest;
    };
    const std::unique_ptr<Sums[]> sums(new Sums[rows_]());
    each_broken([&](int64_t r) { sums[r].highest = -kInfinity; });
    for (int64_t n = begin(); n < end(); n += kBlockN) {
      const int64_t keys = keys_from(n);
      const KeyRows k = load_keys(args_.k, n, keys, copies->k), v = load_keys(args_.v, n, keys, copies->v);
      each_broken([&](int64_t r) {
        load_row(args_.q, r, args_.D, q);
        for (int64_t i = 0; i < keys; ++i) {
          double dot = 0.0;
          for (int64_t d = 0; d < args_.D; ++d) dot += double{q[d]} * double{k.data[i * k.stride + d]};
          scores[i * kBlockM + r] = static_cast<float>(dot * double{args_.scale});
        }
      });
      finish_scores<Along::queries>(scores, n, keys);
      if (args_.dropout_seed) load_keep_factors(factors, n, keys);
      each_broken([&](int64_t r) {
        Sums& row = sums[r];
        for (int64_t i = 0; i < keys; ++i) {
          const double score = scores[i * kBlockM + r];
          if (score == -double{kInfinity}) continue;
          if (score > row.highest) {
            const double rescale = __builtin_exp(row.highest - score);
            for (int64_t d = 0; d < args_.D_v; ++d) row.of_values[d] *= rescale;
            row.of_weights *= rescale, row.highest = score;
          }
          double weight = __builtin_exp(score - row.highest);  // NaN where that is infinite
          row.of_weights += weight;
          if (args_.dropout_seed) {
            const float factor = factors[i * kBlockM + r];
            if (factor == 0.0f) continue;
            weight *= double{factor};
          }
          for (int64_t d = 0; d < args_.D_v; ++d) row.of_values[d] += weight * double{v.data[i * v.stride + d]};
        }
      });
    }
    each_broken([&](int64_t r) {
      alignas(64) float row[kMaxHeadDim] = {};
      const double weights = sums[r].of_weights;
      const double divisor = weights == 0.0 ? 1.0 : weights;
      for (int64_t d = 0; d < args_.D_v; ++d) row[d] = static_cast<float>(sums[r].of_values[d] / divisor);
      const float total = static_cast<float>(weights);
      write_result(r, row, static_cast<float>(sums[r].highest), total, total);
    });
  }

 protected:
  const AttentionForward& results_;
  float *acc_, *max_, *sum_;  // per row: weighted sum of values, running maximum of scores, sum of weights
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
