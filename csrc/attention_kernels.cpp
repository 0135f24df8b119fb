// Attention on the CPU, compiled once per CPU level: FlashAttention-2's forward (arXiv 2307.08691, algorithm 1) in fp32.
//
// Many queries ("wide"): everything is held transposed, a vector running along the queries. Scores are then
// K · Q^T and outputs V^T · P^T, in which K and V are the operands that are broadcast from where they lie, so neither is
// packed, and the softmax runs along the vectors' lanes without horizontal sums.
// Few queries ("narrow", decoding): a vector runs along the head dim, and each key is read once from memory.

#include "attention_block.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

constexpr int64_t kNarrowRows = kWidth / 4 < 2 ? 2 : kWidth / 4;

// One block of queries against all its keys.
class ForwardBlock : QueryBlock {
 public:
  ForwardBlock(const AttentionForward& args, int64_t b, int64_t h_kv, int64_t first, float* workspace)
      : QueryBlock(args, b, h_kv, first), results_(args) {
    q_ = workspace;
    acc_ = q_ + D_ * kBlockM;
    scores_ = acc_ + D_ * kBlockM;
    factors_ = scores_ + kBlockM * kBlockN;
    k_ = factors_ + kBlockM * kBlockN;
    v_ = k_ + kBlockN * D_;
    max_ = v_ + kBlockN * D_;
    sum_ = max_ + kBlockM;
    rescale_ = sum_ + kBlockM;
  }

  void run() {
    if (rows_ == 0) return;  // a shorter sequence than the longest
    std::memset(acc_, 0, D_ * kBlockM * sizeof(float));
    for (int64_t r = 0; r < kBlockM; ++r) max_[r] = -kInfinity, sum_[r] = 0.0f;
    // Dropout's random numbers come for vectors of queries.
    const bool narrow = rows_ <= kNarrowRows && !args_.dropout_seed;
    load_queries(narrow);
    bool first = true;
    for (int64_t n = start(); n < last_end_; n += kBlockN) {
      const int64_t keys = keys_from(n);
      if (args_.mask.data && !mask_shows(n, keys)) continue;
      if (narrow) {
        step_narrow(n, keys, first);
      } else {
        step_wide(n, keys, first);
      }
      first = false;
    }
    write_results(narrow);
  }

 private:
  // q · scale: (rows, D_) when narrow, transposed to (D_, kBlockM) when wide. What lies beyond is zero.
  void load_queries(bool narrow) {
    std::memset(q_, 0, D_ * kBlockM * sizeof(float));
    float* row = scores_;  // not in use yet, and large enough: D_ <= 256
    for (int64_t r = 0; r < rows_; ++r) {
      load_row(args_.q, r, row);
      for (int64_t d = 0; d < args_.D; ++d) (narrow ? q_[r * D_ + d] : q_[d * kBlockM + r]) = row[d] * args_.scale;
    }
  }

  void step_wide(int64_t n, int64_t keys, bool first) {
    const int64_t lanes = columns() * kWidth;
    const Rows k = load_keys(args_.k, n, keys, k_);
    // scores[n][m] = k[n] · q[m]
    multiply<kTileRows, kTileVectors>(
        keys, columns(), k.data, k.stride, 1, q_, kBlockM, scores_, kBlockM, args_.D, false);
    finish_scores<Along::queries>(scores_, n, keys);

    for (int64_t m = 0; m < lanes; m += kWidth) {
      const Vector before = load(max_ + m);
      Vector highest = before;
      for (int64_t i = 0; i < keys; ++i) highest = maximum(load(scores_ + i * kBlockM + m), highest);
      // While a query has seen no key, its maximum is -inf: subtract 0 then, as -inf - -inf is NaN.
      const Vector shift = highest > broadcast(-kInfinity) ? highest : Vector{};
      Vector total{};
      for (int64_t i = 0; i < keys; ++i) {
        const Vector weight = exp_nonpositive(load(scores_ + i * kBlockM + m) - shift);
        store(scores_ + i * kBlockM + m, weight);
        total += weight;
      }
      const Vector factor = exp_nonpositive(before - shift);
      store(max_ + m, highest);
      store(sum_ + m, load(sum_ + m) * factor + total);
      store(rescale_ + m, factor);
    }

    if (!first) {
      for (int64_t d = 0; d < args_.D; ++d) {
        for (int64_t m = 0; m < lanes; m += kWidth) {
          store(acc_ + d * kBlockM + m, load(acc_ + d * kBlockM + m) * load(rescale_ + m));
        }
      }
    }
    if (args_.dropout_seed) drop_weights(n, keys);
    // acc[d][m] += sum_n v[n][d] · weight[n][m]
    const Rows v = load_keys(args_.v, n, keys, v_);
    multiply<kTileRows, kTileVectors>(
        args_.D, columns(), v.data, 1, v.stride, scores_, kBlockM, acc_, kBlockM, keys, true);
  }

  void drop_weights(int64_t n, int64_t keys) {
    load_keep_factors(factors_, n, keys);
    for (int64_t i = 0; i < keys * kBlockM; i += kWidth) store(scores_ + i, load(scores_ + i) * load(factors_ + i));
  }

  void step_narrow(int64_t n, int64_t keys, bool first) {
    const Rows k = load_keys(args_.k, n, keys, k_), v = load_keys(args_.v, n, keys, v_);
    const int64_t padded = (keys + kWidth - 1) / kWidth * kWidth;
    for (int64_t r = 0; r < rows_; ++r) dot_products(k, q_ + r * D_, keys, scores_ + r * kBlockN);
    finish_scores<Along::keys>(scores_, n, keys);
    for (int64_t r = 0; r < rows_; ++r) {
      float* scores = scores_ + r * kBlockN;
      Vector highest_lanes = broadcast(max_[r]);
      for (int64_t i = 0; i < padded; i += kWidth) highest_lanes = maximum(load(scores + i), highest_lanes);
      const float highest = maximum(highest_lanes);
      const float shift = highest > -kInfinity ? highest : 0.0f;  // as above
      Vector total{};
      for (int64_t i = 0; i < padded; i += kWidth) {
        const Vector weight = exp_nonpositive(load(scores + i) - shift);
        store(scores + i, weight);
        total += weight;
      }
      const float factor = exp_nonpositive(max_[r] - shift);
      max_[r] = highest;
      sum_[r] = sum_[r] * factor + sum(total);
      if (!first) {
        for (int64_t d = 0; d < D_; d += kWidth) store(acc_ + r * D_ + d, load(acc_ + r * D_ + d) * factor);
      }
    }
    // acc[r][d] += sum_n weight[r][n] · v[n][d]
    multiply<kNarrowRows, kTileVectors>(
        rows_, vectors(), scores_, kBlockN, 1, v.data, v.stride, acc_, D_, keys, true);
  }

  // scores[n] = k[n] · q, four keys at a time so that their sums do not wait for each other.
  void dot_products(const Rows& k, const float* q, int64_t keys, float* scores) const {
    constexpr int kKeys = 4;
    int64_t n = 0;
    for (; n + kKeys <= keys; n += kKeys) {
      Vector total[kKeys] = {};
      for (int64_t j = 0; j < vectors() * kWidth; j += kWidth) {
        const Vector query = load(q + j);
        for (int i = 0; i < kKeys; ++i) total[i] += query * load(k.data + (n + i) * k.stride + j);
      }
      for (int i = 0; i < kKeys; ++i) scores[n + i] = sum(total[i]);
    }
    for (; n < keys; ++n) {
      Vector total{};
      for (int64_t j = 0; j < vectors() * kWidth; j += kWidth) total += load(q + j) * load(k.data + n * k.stride + j);
      scores[n] = sum(total);
    }
  }

  void write_results(bool narrow) const {
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
      const int64_t offset = at(results_.out, r);
      for (int64_t d = 0; d < args_.D; ++d) {
        const float sum = narrow ? acc_[r * D_ + d] : acc_[d * kBlockM + r];
        write(sum * factor, results_.out.data, offset + d, args_.element);
      }
      results_.lse.data[at(results_.lse, r)] = blind ? -kInfinity : highest + __builtin_logf(total);
    }
  }

  const AttentionForward& results_;
  float *q_, *acc_, *scores_, *factors_, *k_, *v_;
  float *max_, *sum_, *rescale_;  // per row: running maximum and sum, factor of the last rescaling
};

}  // namespace

void attention_forward(const AttentionForward& args, int64_t begin, int64_t end, float* workspace) {
  const int64_t blocks = args.blocks();
  for (int64_t task = begin; task < end; ++task) {
    // From both ends in turn: early and late queries of a causal mask cost differently, and threads get equal shares.
    const int64_t index = task % blocks, block = index % 2 ? blocks - 1 - index / 2 : index / 2;
    ForwardBlock(args, task / blocks / args.H_kv, task / blocks % args.H_kv, block * kBlockM, workspace).run();
  }
}

}  // namespace fastgpt::FASTGPT_CPU_LEVEL
