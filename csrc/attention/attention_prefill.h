// Attention for many queries. Everything is transposed: vectors run along the queries. Scores are K · Q^T and outputs V^T ·
// P^T, in which floats of K and V are broadcast from memory, so neither is packed, and the softmax needs no horizontal
// reductions. Blocks of queries loop over the keys together, so that keys that must be converted or copied are so only once for
// all of them.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include <optional>

#include "attention/attention_forward.h"
#include "attention/attention_products.h"
#include "common/arena.h"
#include "common/integers.h"
#include "common/vector_math.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Scratch memory that the blocks of a task share, and that of each block.
struct PrefillShared {
  PrefillShared(int64_t head_dim, int64_t v_head_dim, Arena& parts) {
    const int64_t D = padded_head_dim(head_dim), D_v = padded_head_dim(v_head_dim);
    scores = parts.take(kBlockN * kBlockM), factors = parts.take(kBlockN * kBlockM), rescale = parts.take(kBlockM);
    k = parts.take(kBlockN * copied_stride(D)), v = parts.take(kBlockN * copied_stride(D_v));
    k_operand = parts.take(operand_size(kBlockN, D)), v_operand = parts.take(operand_size(D_v, kBlockN));
    weights = parts.take(operand_size(kBlockM, kBlockN));
  }

  float *scores, *factors, *rescale;       // (kBlockN, kBlockM); rescale: (kBlockM,) of the last step
  float *k, *v;                            // (kBlockN, D or D_v), copies if needed
  float *k_operand, *v_operand, *weights;  // see attention_products.h
};
struct PrefillMemory {
  PrefillMemory(int64_t head_dim, int64_t v_head_dim, Arena& parts) {
    const int64_t D = padded_head_dim(head_dim), size = larger(D, padded_head_dim(v_head_dim)) * kBlockM;
    acc = parts.take(size), q = parts.take(size), q_operand = parts.take(operand_size(kBlockM, D));
    max = parts.take(kBlockM), sum = parts.take(kBlockM);
  }

  // acc: (D_v, kBlockM), at first holds rows of queries; q: (D, kBlockM), at last rows of results; max, sum: (kBlockM,).
  float *acc, *q, *q_operand, *max, *sum;
};

// Software prefetching of rows, a few cache lines at a time: CPUs drop prefetches if there are too many at once, and hardware
// prefetchers stop at each page of 4 KiB.
class Prefetches {
 public:
  // Starts with `rows` rows of k_bytes each and then as many of v_bytes, to be prefetched by `calls` calls of next().
  void start(int64_t rows, int64_t k_bytes, int64_t v_bytes, int64_t calls) {
    row_ = count_ = byte_ = 0, keys_ = rows, bytes_ = k_bytes, v_bytes_ = v_bytes;
    lines_ = (rows * ((k_bytes + 63) / 64 + (v_bytes + 63) / 64) + calls - 1) / calls;
  }

  void add(const char* row) { rows_[count_++] = row; }

  void next() {
    for (int64_t i = 0; i < lines_ && row_ < count_; ++i) {
      __builtin_prefetch(rows_[row_] + byte_, 0, 2);
      byte_ += 64;
      if (byte_ < bytes_) continue;
      byte_ = 0;
      if (++row_ == keys_) bytes_ = v_bytes_;
    }
  }

 private:
  const char* rows_[2 * kBlockN];
  int64_t row_ = 0, count_ = 0, keys_ = 0, byte_ = 0, bytes_ = 0, v_bytes_ = 0, lines_ = 0;
};

// The keys and values of a tile as operands of the products K · Q^T and V^T · P^T.
struct Tile {
  int64_t n;
  Left k, v;
};

class PrefillBlock : public ForwardBlock {
 public:
  PrefillBlock(
      const AttentionForward& args, int64_t b, int64_t h_kv, int64_t block, const PrefillShared& shared,
      const PrefillMemory& memory)
      : ForwardBlock(args, b, h_kv, block * kBlockM, false),
        w_(shared),
        pieces_(larger(pieces_of(args.element), pieces_of(args.key_element))),
        q_(memory.q) {
    acc_ = memory.acc, max_ = memory.max, sum_ = memory.sum;
    load_queries(memory.q_operand);
    std::memset(acc_, 0, D_v_ * kBlockM * sizeof(float));
    for (int64_t r = 0; r < kBlockM; ++r) max_[r] = -kInfinity, sum_[r] = 0.0f;
    find_panels();
  }

  using ForwardBlock::begin, ForwardBlock::end;

  // Schedules the keys and values from n on to be prefetched during the next step.
  void prefetch(int64_t n, int64_t keys) {
    const int64_t size = size_of(args_.key_element);
    ahead_.start(keys, args_.D * size, args_.D_v * size, columns() * kBlockN / 2);
    for (const Keys* source : {&args_.k, &args_.v}) {
      each_run(*source, n, keys, [&](int64_t, int64_t count, int64_t offset, const float*) {
        const char* row = static_cast<const char*>(source->data) + offset * size;
        for (int64_t i = 0; i < count; ++i) ahead_.add(row + i * source->stride_s * size);
      });
    }
  }

  // The tile from key n on, as operands that all blocks of this sequence and head share.
  Tile load_tile(int64_t n, int64_t keys) const {
    const KeyRows k = load_keys(args_.k, n, keys, w_.k), v = load_keys(args_.v, n, keys, w_.v);
    return {
        n, left_of_rows(k.data, k.stride, keys, args_.D, pieces_, w_.k_operand),
        left_of_columns(v.data, v.stride, args_.D_v, keys, pieces_, w_.v_operand)};
  }

  // Whether a query sees one of the keys from n on.
  bool sees(int64_t n) const {
    const int64_t keys = keys_from(n);
    return n >= begin() && keys > 0 && (!args_.mask.data || mask_shows(n, keys));
  }

  void step(const Tile& tile) {
    const int64_t n = tile.n, keys = keys_from(n);
    float* const scores = w_.scores;
    const auto each_panel = [&](auto function) {
      for (int64_t m = 0; m < rows_; m += kPanel) {
        const Panel& panel = panels_[m / kPanel];
        const int64_t first = larger(panel.first - n, 0) / kStep * kStep, end = smaller(panel.end - n, keys);
        if (first < end) function(m, rounded_up(smaller(rows_ - m, kPanel), kWidth), first, end - first);
      }
    };
    // scores[n][m] = k[n] · q[m]
    each_panel([&](int64_t m, int64_t lanes, int64_t first, int64_t count) {
      const Right queries = q_operand_.from(0, m);
      multiply(tile.k.from(first, 0), queries, count, lanes, args_.D, scores + first * kBlockM + m, kBlockM);
    });
    if (late_scale_ != 1.0f) {
      for (int64_t i = 0; i < keys * kBlockM; i += kWidth) store(scores + i, load(scores + i) * late_scale_);
    }
    finish_scores<Along::queries>(scores, n, keys);
    if (args_.dropout_seed) load_keep_factors(w_.factors, n, keys);
    // acc[d][m] = acc[d][m] · rescale[m] + sum_n v[n][d] · weight[n][m]
    each_panel([&](int64_t m, int64_t lanes, int64_t first, int64_t count) {
      const Right weights = new_right(count, lanes, pieces_, w_.weights);
      for (int64_t j = 0; j < lanes; j += kWidth) weigh(m + j, first, count, weights.from(0, j));
      multiply_add(tile.v.from(0, first), weights, args_.D_v, lanes, count, acc_ + m, kBlockM, w_.rescale + m);
    });
  }

  void finish() const {
    to_rows(acc_, D_v_, q_);  // the queries are no longer needed
    write_results(q_);
  }

 private:
  // q · scale, transposed to (D_, kBlockM), zero-padded.
  void load_queries(float* operand) {
    float* const rows = acc_;  // not in use yet
    // Fewer than three pieces hold q times a power of two exactly: the rest of the scale is applied to the scores.
    const bool all = pieces_ == pieces_of(Element::float32);
    const float scale = all ? args_.scale : bits_to_float(float_to_bits(args_.scale) & 0xff800000u);
    late_scale_ = scale == args_.scale ? 1.0f : args_.scale / scale;
    std::memset(rows, 0, D_ * kBlockM * sizeof(float));
    for (int64_t r = 0; r < rows_; ++r) {
      float* row = rows + r * D_;
      load_row(args_.q, r, args_.D, row);
      for (int64_t d = 0; d < args_.D; ++d) row[d] *= scale;
    }
    to_columns(rows, D_, q_);
    q_operand_ = right_of_rows(q_, kBlockM, args_.D, columns() * kWidth, pieces_, operand);
  }

  // The range of keys that some of kPanel queries of the block see.
  struct Panel {
    int64_t first, end;
  };

  void find_panels() {
    for (int64_t m = 0; m < rows_; m += kPanel) {
      Panel& panel = panels_[m / kPanel];
      panel = {args_.S, 0};
      for (int64_t r = m; r < m + kPanel && r < rows_; ++r) {
        panel.first = smaller(panel.first, queries_.key_begin[r]), panel.end = larger(panel.end, queries_.key_end[r]);
      }
    }
  }

  // Turns the scores of `count` keys from `first` on, for a vector of queries, into weights relative to the running maximum.
  void weigh(int64_t m, int64_t first, int64_t count, const Right& weights) {
    const float *scores = w_.scores + first * kBlockM + m, *factors = w_.factors + first * kBlockM + m;
    const Vector before = load(max_ + m);
    Vector highest = before;
    for (int64_t i = 0; i < count; ++i) highest = maximum(load(scores + i * kBlockM), highest);
    // The maximum of a query that has seen no key yet is -inf: then subtract 0, as -inf - -inf is NaN.
    const Vector shift = highest > broadcast(-kInfinity) ? highest : Vector{};
    Vector total{};
    with_pieces(pieces_, [&](auto pieces) {
      for (int64_t i = 0; i < count; i += 2) {
        const int64_t other = i + 1 < count ? i + 1 : i;
        Vector a = exp_nonpositive(load(scores + i * kBlockM) - shift);
        Vector b = other == i ? Vector{} : exp_nonpositive(load(scores + other * kBlockM) - shift);
        total += a + b;
        if (args_.dropout_seed) a *= load(factors + i * kBlockM), b *= load(factors + other * kBlockM);
        store_rows<decltype(pieces)::value>(weights, i, 0, a, b);
        ahead_.next();
      }
    });
    const Vector factor = exp_nonpositive(before - shift);
    store(max_ + m, highest);
    store(sum_ + m, load(sum_ + m) * factor + total);
    store(w_.rescale + m, factor);
  }

  const PrefillShared& w_;
  const int pieces_;
  float* const q_;
  float late_scale_;
  Right q_operand_;
  Prefetches ahead_;
  Panel panels_[(kBlockM + kPanel - 1) / kPanel];
};

inline int64_t prefill_workspace(int64_t D, int64_t D_v, int64_t blocks) {
  Arena parts(nullptr);
  PrefillShared(D, D_v, parts);
  for (int64_t i = 0; i < blocks; ++i) PrefillMemory(D, D_v, parts);
  return parts.taken();
}

// Runs `count` blocks of queries from `first` on, which loop over their keys together.
inline void run_prefill(const AttentionForward& args, int64_t b, int64_t h_kv, int64_t first, int64_t count, float* workspace) {
  const Tiles tiles;
  Arena parts(workspace);
  const PrefillShared shared(args.D, args.D_v, parts);
  std::optional<PrefillBlock> blocks[kGroup];
  int64_t begin = args.S, end = 0;
  for (int64_t i = 0; i < count; ++i) {
    PrefillBlock& block = blocks[i].emplace(args, b, h_kv, first + i, shared, PrefillMemory(args.D, args.D_v, parts));
    begin = smaller(begin, block.begin()), end = larger(end, block.end());
  }
  for (int64_t n = begin; n < end; n += kBlockN) {
    Tile tile{-1, {}, {}};
    for (int64_t i = 0; i < count; ++i) {
      if (!blocks[i]->sees(n)) continue;
      if (tile.n != n) tile = blocks[i]->load_tile(n, smaller(kBlockN, end - n));
      // Meanwhile the next tile is prefetched, a part by each block.
      const int64_t from = n + kBlockN + i * kBlockN / count, to = n + kBlockN + (i + 1) * kBlockN / count;
      blocks[i]->prefetch(from, larger(smaller(to, end) - from, 0));
      blocks[i]->step(tile);
    }
  }
  for (int64_t i = 0; i < count; ++i) blocks[i]->finish();
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
