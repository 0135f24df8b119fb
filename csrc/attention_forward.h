// A block of queries on its way to its output, whichever way its keys are walked over.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "attention_block.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

class ForwardBlock : protected QueryBlock {
 public:
  ForwardBlock(const AttentionForward& args, int64_t b, int64_t h_kv, int64_t block)
      : QueryBlock(args, b, h_kv, block * kBlockM), results_(args) {}

 protected:
  // `rows`: sums of values (rows, D_), changed on the way. Returns whether all results are finite.
  bool write_results(float* rows) const {
    Vector zeros{};  // NaN from the first result on that is not finite
    for (int64_t r = 0; r < rows_; ++r) {
      const bool blind = sum_[r] == 0.0f;  // it sees no key
      float highest = max_[r], total = sum_[r], rescale = 1.0f;
      if (args_.sinks) {
        const float sink = args_.sinks[head_[r]];
        highest = sink > highest ? sink : highest;
        rescale = exp_nonpositive(max_[r] - highest);
        total = total * rescale + exp_nonpositive(sink - highest);
      }
      const float factor = blind ? 0.0f : rescale / total;
      float* row = rows + r * D_;
      for (int64_t d = 0; d < D_; d += kWidth) {
        const Vector result = load(row + d) * factor;
        store(row + d, result);
        zeros += result * 0.0f;
      }
      write(row, args_.D, results_.out.data, at(results_.out, r), args_.element);
      results_.lse.data[at(results_.lse, r)] = blind ? -kInfinity : highest + __builtin_logf(total);
    }
    return sum(zeros) == 0.0f;
  }

  const AttentionForward& results_;
  float *acc_, *max_, *sum_;  // per row: sum of values, running maximum of scores and sum of weights
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
