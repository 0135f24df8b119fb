// Attention on the CPU, compiled once per CPU level: FlashAttention-2's forward (arXiv 2307.08691, algorithm 1) in fp32.
//
// Many queries ("wide"): everything is held transposed, a vector running along the queries. Scores are then
// K · Q^T and outputs V^T · P^T, in which K and V are the operands that are broadcast from where they lie, so neither is
// packed, and the softmax runs along the vectors' lanes without horizontal sums.
// Few queries ("narrow", decoding): a vector runs along the head dim, and keys are read once from memory, as they are
// stored: they turn into floats on their way to the arithmetic.

#include <optional>

#include "attention_block.h"
#include "attention_narrow.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Blocks of few queries that a thread may hold at a time, and floats between the running maxima of one and the next.
constexpr int64_t kBlocks = 16, kBlockLanes = 16;
static_assert(kFewQueries <= kBlockLanes && kBlockLanes % kWidth == 0);

// One block of queries against all its keys, or one split of them.
class ForwardBlock : QueryBlock {
 public:
  ForwardBlock(
      const AttentionForward& args, int64_t b, int64_t h_kv, int64_t block, int64_t split, float* workspace,
      int64_t place = 0)
      : QueryBlock(args, b, h_kv, block * kBlockM), results_(args), narrow_(rows_ <= kFewQueries && !args.dropout_seed) {
    q_ = workspace;
    acc_ = q_ + D_ * kBlockM;
    scores_ = acc_ + D_ * kBlockM;
    factors_ = scores_ + kBlockM * kBlockN;
    k_ = factors_ + kBlockM * kBlockN;
    v_ = k_ + kBlockN * D_;
    max_ = v_ + kBlockN * D_;
    sum_ = max_ + kBlockM;
    rescale_ = sum_ + kBlockM;
    if (narrow_) {  // which needs no factors
      q_ += place * rows_ * D_;
      acc_ += place * rows_ * D_;
      max_ = factors_ + place * 3 * kBlockLanes;
      sum_ = max_ + kBlockLanes;
      rescale_ = sum_ + kBlockLanes;
    }
    begin_ = start(), end_ = last_end_;
    if (args.splits() > 1) {
      partial_ = args.partial + ((b * args.H_kv + h_kv) * args.splits() + split) * args.split_size();
      begin_ = begin_ > split * kSplit ? begin_ : split * kSplit;
      end_ = end_ < (split + 1) * kSplit ? end_ : (split + 1) * kSplit;
    }
  }

  void run() {
    if (rows_ == 0) return;  // a shorter sequence than the longest
    load_queries();
    clear();
    for (int64_t n = begin_; n < end_; n += kBlockN) step(n);
    finish();
  }

  // Runs blocks that see the same keys, each at its own place in the workspace, tile by tile.
  static void run(std::optional<ForwardBlock>* blocks, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      blocks[i]->load_queries();
      blocks[i]->clear();
    }
    for (int64_t n = blocks[0]->begin_; n < blocks[0]->end_; n += kBlockN) {
      for (int64_t i = 0; i < count; ++i) blocks[i]->step(n);
    }
    for (int64_t i = 0; i < count; ++i) blocks[i]->finish();
  }

  // Of a block that was made for the first split, when all splits have run.
  void join() {
    if (rows_ == 0) return;
    clear();
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t s = 0; s < results_.splits(); ++s) {
        const float highest = partial(s, r)[D_];
        max_[r] = highest > max_[r] ? highest : max_[r];
      }
      const float shift = max_[r] > -kInfinity ? max_[r] : 0.0f;  // as in step_wide
      for (int64_t s = 0; s < results_.splits(); ++s) {
        const float *part = partial(s, r), factor = exp_nonpositive(part[D_] - shift);
        for (int64_t d = 0; d < D_; ++d) acc_[r * D_ + d] += part[d] * factor;
        sum_[r] += part[D_ + 1] * factor;
      }
    }
    write_results();
  }

 private:
  int64_t held_rows() const { return narrow_ ? rows_ : kBlockM; }

  void clear() {
    std::memset(acc_, 0, D_ * held_rows() * sizeof(float));
    for (int64_t r = 0; r < (narrow_ ? kBlockLanes : kBlockM); ++r) max_[r] = -kInfinity, sum_[r] = 0.0f;
  }

  // q · scale: (rows, D_) when narrow, transposed to (D_, kBlockM) when wide. What lies beyond is zero.
  void load_queries() {
    float* rows = narrow_ ? q_ : acc_;  // which is not in use yet
    std::memset(rows, 0, D_ * held_rows() * sizeof(float));
    for (int64_t r = 0; r < rows_; ++r) {
      float* row = rows + r * D_;
      load_row(args_.q, r, row);
      for (int64_t d = 0; d < args_.D; ++d) row[d] *= args_.scale;
    }
    if (!narrow_) to_columns(rows, q_);
  }

  void step(int64_t n) {
    const int64_t keys = keys_from(n);
    if (args_.mask.data && !mask_shows(n, keys)) return;
    if (narrow_) {
      step_narrow(n, keys);
    } else {
      step_wide(n, keys, first_);
    }
    first_ = false;
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

  void step_narrow(int64_t n, int64_t keys) {
    with_stored(args_.k, n, keys, k_, args_.v, n, [&](const auto& k) {
      multiply_keys(rows_, q_, D_, k, vectors() * kWidth, scores_);
      if (k.scaled) scale_scores(rows_, k, scores_);
    });
    finish_scores<Along::keys>(scores_, n, keys);
    weigh_keys(keys);
    with_stored(args_.v, n, keys, v_, args_.k, n + keys, [&](const auto& v) {
      if (v.scaled) scale_scores(rows_, v, scores_);
      add_values(rows_, scores_, v, vectors() * kWidth, rescale_, acc_, D_);
    });
  }

  // Turns the scores of a tile into weights, kWidth rows at a time. Past the last key they are -inf and 0.
  void weigh_keys(int64_t keys) {
    for (int64_t m = 0; m < rows_; m += kWidth) {
      const int64_t rows = rows_ - m < kWidth ? rows_ - m : kWidth;
      float* scores = scores_ + m * kBlockN;
      Vector highest_lanes[kWidth], totals[kWidth] = {};
      for (int64_t r = 0; r < kWidth; ++r) highest_lanes[r] = broadcast(-kInfinity);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < keys; i += kWidth) {
          highest_lanes[r] = maximum(load(scores + r * kBlockN + i), highest_lanes[r]);
        }
      }
      const Vector before = load(max_ + m), highest = maximum(maxima(highest_lanes), before);
      const Vector shift = highest > broadcast(-kInfinity) ? highest : Vector{};  // as above
      float shifts[kWidth];
      store(shifts, shift);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < keys; i += kWidth) {
          const Vector weight = exp_nonpositive(load(scores + r * kBlockN + i) - shifts[r]);
          store(scores + r * kBlockN + i, weight);
          totals[r] += weight;
        }
      }
      const Vector factor = exp_nonpositive(before - shift);
      store(max_ + m, highest);
      store(sum_ + m, load(sum_ + m) * factor + sums(totals));
      store(rescale_ + m, factor);
    }
  }

  // function(rows): keys or values from n on as they are stored, while those of `next` from next_n on are prefetched; or a
  // copy, where vectors do not divide D or a page, so that pages change no bits.
  template <typename Function>
  void with_stored(
      const Keys& source, int64_t n, int64_t keys, float* copy, const Keys& next, int64_t next_n,
      const Function& function) const {
    const auto group_size = [&](int64_t i) { return keys - i < kWidth ? keys - i : kWidth; };
    if (args_.D % kWidth != 0 || (args_.block_table && args_.page % kWidth != 0)) {
      const Rows rows = load_keys(source, n, keys, copy);
      StoredRows<float> stored;
      stored.stride = rows.stride, stored.count = keys, stored.scaled = false;
      for (int64_t i = 0; i < keys; i += kWidth) {
        stored.group[i / kWidth] = rows.data + i * rows.stride;
        stored.ahead[i / kWidth] = nullptr;
      }
      return function(stored);
    }
    as_elements(source.data, args_.key_element, [&](const auto* elements) {
      StoredRows<std::remove_const_t<std::remove_pointer_t<decltype(elements)>>> stored;
      const int64_t size = sizeof *elements;
      stored.stride = source.stride_s, stored.ahead_stride = next.stride_s * size;
      stored.count = keys, stored.scaled = source.scale != nullptr;
      for (int64_t i = 0; i < keys; i += kWidth) {
        each_run(source, n + i, group_size(i), [&](int64_t, int64_t count, int64_t offset, const float* scale) {
          stored.group[i / kWidth] = elements + offset;
          for (int64_t l = 0; scale && l < count; ++l) stored.scale[i + l] = scale[l * source.scale_stride_s];
        });
        stored.ahead[i / kWidth] = nullptr;
        if (next_n + i >= end_) continue;
        each_run(next, next_n + i, 1, [&](int64_t, int64_t, int64_t offset, const float*) {
          stored.ahead[i / kWidth] = static_cast<const char*>(next.data) + offset * size;
        });
      }
      function(stored);
    });
  }

  void finish() const {
    if (partial_) {
      write_partial();
    } else {
      write_results();
    }
  }

  float* partial(int64_t split, int64_t r) const { return partial_ + split * results_.split_size() + r * (D_ + 2); }

  // A row is its sum of values, its highest score and its sum of weights.
  void write_partial() const {
    for (int64_t r = 0; r < rows_; ++r) {
      float* row = partial(0, r);
      std::memcpy(row, acc_ + r * D_, D_ * sizeof(float));
      row[D_] = max_[r], row[D_ + 1] = sum_[r];
    }
  }

  void write_results() const {
    float* rows = narrow_ ? acc_ : q_;  // which is not in use any more
    if (!narrow_) to_rows(acc_, rows);
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
      for (int64_t d = 0; d < args_.D; ++d) row[d] *= factor;
      write(row, args_.D, results_.out.data, at(results_.out, r), args_.element);
      results_.lse.data[at(results_.lse, r)] = blind ? -kInfinity : highest + __builtin_logf(total);
    }
  }

  const AttentionForward& results_;
  const bool narrow_;  // not with dropout, whose random numbers come for vectors of queries
  float *q_, *acc_, *scores_, *factors_, *k_, *v_;
  float *max_, *sum_, *rescale_;  // per row: running maximum and sum, factor of the last rescaling
  float* partial_ = nullptr;      // where a split leaves its rows
  int64_t begin_, end_;           // keys to walk over
  bool first_ = true;             // no tile has been seen
};

// The heads of a page lie side by side, and small pages are read much faster if their heads are read together. Tasks go
// through the heads first.
void few_queries_of_pages(const AttentionForward& args, int64_t begin, int64_t end, float* workspace) {
  const int64_t splits = args.splits(), most = kBlockM / (args.H / args.H_kv * args.T);
  std::optional<ForwardBlock> blocks[kBlocks];
  for (int64_t task = begin, heads; task < end; task += heads) {
    const int64_t head = task % args.H_kv, split = task / args.H_kv % splits, b = task / args.H_kv / splits;
    heads = most < kBlocks ? most : kBlocks;
    if (heads > args.H_kv - head) heads = args.H_kv - head;
    if (heads > end - task) heads = end - task;
    for (int64_t i = 0; i < heads; ++i) blocks[i].emplace(args, b, head + i, 0, split, workspace, i);
    ForwardBlock::run(blocks, heads);
  }
}

}  // namespace

void attention_forward(const AttentionForward& args, int64_t begin, int64_t end, float* workspace) {
  if (args.block_table && args.few_queries()) return few_queries_of_pages(args, begin, end, workspace);
  const int64_t blocks = args.blocks(), splits = args.splits();  // one of them is 1
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / blocks / splits;
    // From both ends in turn: early and late queries of a causal mask cost differently, and threads get equal shares.
    const int64_t index = task % blocks, block = index % 2 ? blocks - 1 - index / 2 : index / 2;
    ForwardBlock(args, head / args.H_kv, head % args.H_kv, block, task % splits, workspace).run();
  }
}

void attention_forward_join(const AttentionForward& args, int64_t begin, int64_t end, float* workspace) {
  for (int64_t head = begin; head < end; ++head) {
    ForwardBlock(args, head / args.H_kv, head % args.H_kv, 0, 0, workspace).join();
  }
}

}  // namespace fastgpt::FASTGPT_CPU_LEVEL
