// Attention for few queries, as in decoding, on keys and values as they are stored: vectors run along the head dim, every row
// is read once, and while it is read, a later one is prefetched. That spreads memory accesses evenly over the arithmetic.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include <optional>
#include <type_traits>

#include "attention/attention_forward.h"
#include "common/arena.h"
#include "common/integers.h"
#include "common/stored_elements.h"
#include "common/vector_math.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Up to kBlockN keys or values, in groups of kWidth that may lie anywhere.
template <typename Stored>
struct StoredRows {
  const Stored* group[kBlockN / kWidth];
  const char* ahead[kBlockN / kWidth];  // a group to prefetch meanwhile, or null
  int64_t stride, ahead_stride;         // the latter in bytes
  int64_t count;
  bool scaled;
  float scale[kBlockN];
};

// Calls function(r, rows) for all rows from r on, in blocks of kRows, and for the rest in blocks of a half of that, and so on.
// `rows` is an std::integral_constant.
template <int kRows, typename Function>
inline void in_blocks(int64_t r, int64_t end, const Function& function) {
  for (; r + kRows <= end; r += kRows) function(r, std::integral_constant<int, kRows>());
  if constexpr (kRows > 1) in_blocks<kRows / 2>(r, end, function);
}

// Prefetches kBytes of each of a group's rows, one row per call of next().
template <int64_t kBytes>
struct Prefetch {
  const char* data;  // or null
  int64_t stride;

  void next() {
    if (!data) return;
    for (int64_t byte = 0; byte < kBytes; byte += 64) __builtin_prefetch(data + byte, 0, 2);
    data += stride;
  }
};

// Prefetches at once the bytes from `done` to `bytes` of each of a group's rows.
inline void prefetch_rest(const char* ahead, int64_t stride, int64_t done, int64_t bytes) {
  for (int i = 0; i < kWidth; ++i, ahead += stride) {
    for (int64_t byte = done; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
  }
}

// Adds the products of kVectors vectors of q[r] and k[i] to total[r · kKeys + i], lane by lane.
template <int kRows, int kVectors, typename Stored>
inline void add_products(
    Vector (&total)[kWidth], const float* q, int64_t q_stride, const Stored* k, int64_t k_stride, const char* ahead,
    int64_t ahead_stride) {
  constexpr int kKeys = kWidth / kRows;
  Prefetch<kVectors * kWidth * sizeof(Stored)> prefetch{ahead, ahead_stride};
  Vector query[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kVectors; ++j) query[r][j] = load(q + r * q_stride + j * kWidth);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i, k += k_stride) {
    for (int j = 0; j < kVectors; ++j) {
      const Vector key = load(k + j * kWidth);
      for (int r = 0; r < kRows; ++r) total[r * kKeys + i] += query[r][j] * key;
    }
    prefetch.next();
  }
}

// scores[r][i] = q[r] · k[i] for kRows rows and as many keys of a group as make a vector of scores, group by group.
template <int kRows, typename Stored>
inline void multiply_group(
    const float* q, int64_t q_stride, const Stored* k, int64_t k_stride, int64_t width, float* scores, const char* ahead,
    int64_t ahead_stride) {
  constexpr int kKeys = kWidth / kRows, kVectors = kRows < 4 ? 4 / kRows : 1;
  for (int i = 0; i < kWidth; i += kKeys, k += kKeys * k_stride) {
    Vector total[kWidth] = {};
    int64_t j = 0;
    const auto add = [&](auto vectors) {
      const char* part = ahead ? ahead + i * ahead_stride + j * sizeof(Stored) : nullptr;
      add_products<kRows, vectors>(total, q + j, q_stride, k + j, k_stride, part, ahead_stride);
      j += vectors * kWidth;
    };
    while (j + kVectors * kWidth <= width) add(std::integral_constant<int, kVectors>());
    if constexpr (kVectors > 1) {
      while (j < width) add(std::integral_constant<int, 1>());
    }
    const Vector products = sums(total);
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(scores + r * kBlockN + i, reinterpret_cast<const float*>(&products) + r * kKeys, kKeys * sizeof(float));
    }
  }
}

// scores[r][i] = q[r] · k[i] over `width` elements, whole vectors. Lines of scores are kBlockN apart.
template <typename Stored>
inline void multiply_keys(
    int64_t rows, const float* q, int64_t q_stride, const StoredRows<Stored>& k, int64_t width, float* scores) {
  for (int64_t i = 0; i < k.count; i += kWidth) {
    const Stored* group = k.group[i / kWidth];
    const char* ahead = k.ahead[i / kWidth];
    if (i + kWidth <= k.count) {
      in_blocks<kWidth / 2>(0, rows, [&](int64_t r, auto block) {
        multiply_group<block>(
            q + r * q_stride, q_stride, group, k.stride, width, scores + r * kBlockN + i, r == 0 ? ahead : nullptr,
            k.ahead_stride);
      });
      continue;
    }
    for (int64_t l = 0; i + l < k.count; ++l) {
      for (int64_t r = 0; r < rows; ++r) {
        Vector total{};
        for (int64_t j = 0; j < width; j += kWidth) total += load(q + r * q_stride + j) * load(group + l * k.stride + j);
        scores[r * kBlockN + i + l] = sum(total);
      }
    }
  }
}

// acc[r][j] = acc[r][j] · rescale[r] + sum_i weights[r][i] · v[i][j] for kRows rows and kVectors vectors from j on, with kKeys
// independent accumulators, to hide the latency of additions.
template <int kRows, int kKeys, int kVectors, typename Stored>
inline void add_columns(
    const float* weights, const StoredRows<Stored>& v, int64_t j, const float* rescale, float* acc, int64_t acc_stride,
    bool ahead) {
  Vector total[kKeys][kRows][kVectors] = {};
  const auto add = [&](Vector(&sums)[kRows][kVectors], const float* weight, const Stored* row) {
    Vector values[kVectors];
    for (int c = 0; c < kVectors; ++c) values[c] = load(row + c * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vector factor = broadcast(weight[r * kBlockN]);
      for (int c = 0; c < kVectors; ++c) sums[r][c] += factor * values[c];
    }
  };
  for (int64_t i = 0; i < v.count; i += kWidth) {
    const Stored* row = v.group[i / kWidth] + j;
    const char* next = ahead ? v.ahead[i / kWidth] : nullptr;
    if (i + kWidth <= v.count) {
      Prefetch<kVectors * kWidth * sizeof(Stored)> prefetch{next ? next + j * sizeof(Stored) : nullptr, v.ahead_stride};
      // Unrolled, GCC loads the weights of all keys first, for which registers do not suffice.
#pragma GCC unroll 1
      for (int64_t l = 0; l < kWidth; l += kKeys) {
        for (int u = 0; u < kKeys; ++u, row += v.stride) add(total[u], weights + i + l + u, row), prefetch.next();
      }
    } else {
      for (int64_t l = i; l < v.count; ++l, row += v.stride) add(total[0], weights + l, row);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVectors; ++c) {
      for (int u = 1; u < kKeys; ++u) total[0][r][c] += total[u][r][c];
      float* target = acc + r * acc_stride + j + c * kWidth;
      store(target, load(target) * rescale[r] + total[0][r][c]);
    }
  }
}

// acc[r] = acc[r] · rescale[r] + sum_i weights[r][i] · v[i] over `width` elements, whole vectors. Lines of weights are
// kBlockN apart.
template <typename Stored>
inline void add_values(
    int64_t rows, const float* weights, const StoredRows<Stored>& v, int64_t width, const float* rescale, float* acc,
    int64_t acc_stride) {
  in_blocks<2 * kTileVectors>(0, rows, [&](int64_t r, auto block) {
    constexpr int kRows = block, kKeys = kRows < 4 ? 4 / kRows : 1, kVectors = 4 * kTileVectors / (kRows * kKeys);
    int64_t j = 0;
    const auto add = [&](auto vectors) {
      add_columns<kRows, kKeys, vectors>(weights + r * kBlockN, v, j, rescale + r, acc + r * acc_stride, acc_stride, r == 0);
      j += vectors * kWidth;
    };
    while (j + kVectors * kWidth <= width) add(std::integral_constant<int, kVectors>());
    while (j < width) add(std::integral_constant<int, 1>());
  });
}

// scores[r][i] *= scale[i]
template <typename Stored>
inline void scale_scores(int64_t rows, const StoredRows<Stored>& stored, float* scores) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < stored.count; i += kWidth) {
      store(scores + r * kBlockN + i, load(scores + r * kBlockN + i) * load(stored.scale + i));
    }
  }
}

// Number of blocks of few queries that a thread processes at a time, and padded size of their vectors of one float per row.
constexpr int64_t kBlocks = 16, kBlockLanes = 16;
static_assert(kFewQueries <= kBlockLanes && kBlockLanes % kWidth == 0);

// Scratch memory that blocks share, and that of a block of `rows` queries.
struct DecodeShared {
  DecodeShared(int64_t D, int64_t D_v, Arena& parts) {
    scores = parts.take(kFewQueries * kBlockN);
    k = parts.take(kBlockN * copied_stride(D)), v = parts.take(kBlockN * copied_stride(D_v));
  }

  float *scores, *k, *v;  // (kFewQueries, kBlockN); (kBlockN, D) and (kBlockN, D_v), copies if needed
};
struct DecodeMemory {
  DecodeMemory(int64_t D, int64_t D_v, int64_t rows, Arena& parts) {
    q = parts.take(rows * padded_head_dim(D)), acc = parts.take(rows * padded_head_dim(D_v));
    max = parts.take(kBlockLanes), sum = parts.take(kBlockLanes), rescale = parts.take(kBlockLanes);
  }

  float *q, *acc, *max, *sum, *rescale;  // q: (rows, D); acc: (rows, D_v); max, sum, rescale: (kBlockLanes,)
};

// The queries of a token against all keys, or one split of them.
class DecodeBlock : public ForwardBlock {
 public:
  DecodeBlock(
      const AttentionForward& args, int64_t b, int64_t h_kv, int64_t token, int64_t split, const DecodeShared& shared,
      Arena& parts)
      : ForwardBlock(args, b, h_kv, token, true), w_(shared), begin_(begin()), end_(end()) {
    const DecodeMemory memory(args.D, args.D_v, rows_, parts);
    q_ = memory.q, acc_ = memory.acc, max_ = memory.max, sum_ = memory.sum, rescale_ = memory.rescale;
    std::memset(acc_, 0, rows_ * D_v_ * sizeof(float));
    for (int64_t r = 0; r < kBlockLanes; ++r) max_[r] = -kInfinity, sum_[r] = 0.0f;
    if (args.splits() > 1) {
      partial_ = args.partial + ((b * args.H_kv + h_kv) * args.splits() + split) * args.split_size() +
          token * rows_ * (D_v_ + 2);
      begin_ = larger(begin_, split * kSplit), end_ = smaller(end_, (split + 1) * kSplit);
    }
  }

  // Runs blocks of a sequence together, tile by tile. Those of packed sequences that are shorter than the longest have no rows.
  static void run(std::optional<DecodeBlock>* blocks, int64_t count) {
    int64_t first = blocks[0]->begin_, end = 0;
    for (int64_t i = 0; i < count; ++i) {
      blocks[i]->load_queries();
      first = smaller(first, blocks[i]->begin_), end = larger(end, blocks[i]->end_);
    }
    for (int64_t n = first; n < end; n += kBlockN) {
      for (int64_t i = 0; i < count; ++i) {
        if (blocks[i]->begin_ <= n && n < blocks[i]->end_) blocks[i]->step(n);
      }
    }
    for (int64_t i = 0; i < count; ++i) blocks[i]->finish();
  }

  // Combines the partial results, when all splits have run. For a block that was constructed for the first split.
  void join() {
    if (rows_ == 0) return;
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t s = 0; s < results_.splits(); ++s) {
        const float highest = partial(s, r)[D_v_];
        max_[r] = highest > max_[r] ? highest : max_[r];
      }
      const float shift = max_[r] > -kInfinity ? max_[r] : 0.0f;  // as in PrefillBlock
      for (int64_t s = 0; s < results_.splits(); ++s) {
        const float *part = partial(s, r), factor = exp_nonpositive(part[D_v_] - shift);
        for (int64_t d = 0; d < D_v_; ++d) acc_[r * D_v_ + d] += part[d] * factor;
        sum_[r] += part[D_v_ + 1] * factor;
      }
    }
    write_results(acc_);
  }

 private:
  // q · scale: (rows, D_), zero-padded.
  void load_queries() {
    std::memset(q_, 0, rows_ * D_ * sizeof(float));
    for (int64_t r = 0; r < rows_; ++r) {
      float* row = q_ + r * D_;
      load_row(args_.q, r, args_.D, row);
      for (int64_t d = 0; d < args_.D; ++d) row[d] *= args_.scale;
    }
  }

  void step(int64_t n) {
    const int64_t keys = keys_from(n);
    if (args_.mask.data && !mask_shows(n, keys)) return;
    with_stored(args_.k, n, keys, w_.k, args_.v, n, [&](const auto& k) {
      multiply_keys(rows_, q_, D_, k, vectors(args_.D) * kWidth, w_.scores);
      if (k.scaled) scale_scores(rows_, k, w_.scores);
    });
    finish_scores<Along::keys>(w_.scores, n, keys);
    weigh_keys(keys);
    with_stored(args_.v, n, keys, w_.v, args_.k, n + keys, [&](const auto& v) {
      if (v.scaled) scale_scores(rows_, v, w_.scores);
      add_values(rows_, w_.scores, v, vectors(args_.D_v) * kWidth, rescale_, acc_, D_v_);
    });
  }

  // Turns the scores of a tile into weights, kWidth rows at a time. Past the last key they are -inf and 0.
  void weigh_keys(int64_t keys) {
    for (int64_t m = 0; m < rows_; m += kWidth) {
      const int64_t rows = rows_ - m < kWidth ? rows_ - m : kWidth;
      float* scores = w_.scores + m * kBlockN;
      Vector highest_lanes[kWidth], totals[kWidth] = {};
      for (int64_t r = 0; r < kWidth; ++r) highest_lanes[r] = broadcast(-kInfinity);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < keys; i += kWidth) {
          highest_lanes[r] = maximum(load(scores + r * kBlockN + i), highest_lanes[r]);
        }
      }
      const Vector before = load(max_ + m), highest = maximum(maxima(highest_lanes), before);
      const Vector shift = highest > broadcast(-kInfinity) ? highest : Vector{};  // as in PrefillBlock
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

  // Calls function(rows) with the keys or values from n on as they are stored. Meanwhile those of `next` from next_n on are
  // prefetched, as much of each row as is read; the rest of longer rows, and shorter rows, are prefetched at once. With a copy
  // if the vector width does not divide the head dim or the page size, so that results do not depend on pages.
  template <typename Function>
  void with_stored(
      const Keys& source, int64_t n, int64_t keys, float* copy, const Keys& next, int64_t next_n,
      const Function& function) const {
    const auto group_size = [&](int64_t i) { return keys - i < kWidth ? keys - i : kWidth; };
    if (source.head_dim % kWidth != 0 || (args_.block_table && args_.page % kWidth != 0)) {
      const KeyRows rows = load_keys(source, n, keys, copy);
      StoredRows<float> stored;
      stored.stride = rows.stride, stored.count = keys, stored.scaled = false;
      stored.ahead_stride = 0;
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
          const char* ahead = static_cast<const char*>(next.data) + offset * size;
          const int64_t along = next.head_dim < source.head_dim ? 0 : source.head_dim * size, bytes = next.head_dim * size;
          stored.ahead[i / kWidth] = along ? ahead : nullptr;
          if (along < bytes) prefetch_rest(ahead, stored.ahead_stride, along, bytes);
        });
      }
      function(stored);
    });
  }

  void finish() const {
    if (partial_) {
      write_partial();
    } else {
      write_results(acc_);
    }
  }

  float* partial(int64_t split, int64_t r) const { return partial_ + split * results_.split_size() + r * (D_v_ + 2); }

  // Stores each row's weighted sum of values, maximum score and sum of weights.
  void write_partial() const {
    for (int64_t r = 0; r < rows_; ++r) {
      float* row = partial(0, r);
      std::memcpy(row, acc_ + r * D_v_, D_v_ * sizeof(float));
      row[D_v_] = max_[r], row[D_v_ + 1] = sum_[r];
    }
  }

  const DecodeShared& w_;
  float *q_, *rescale_;       // rescale: factor of the last step
  float* partial_ = nullptr;  // partial results of a split
  int64_t begin_, end_;       // range of keys
};

inline int64_t decode_workspace(int64_t D, int64_t D_v) {
  Arena parts(nullptr);
  DecodeShared(D, D_v, parts);
  for (int64_t i = 0; i < kBlocks; ++i) DecodeMemory(D, D_v, kBlockM / kBlocks, parts);
  return parts.taken();
}

// Runs one split of the keys of `heads` heads for all tokens, tile by tile.
inline void run_decode(const AttentionForward& args, int64_t b, int64_t h_kv, int64_t heads, int64_t split, float* workspace) {
  Arena parts(workspace);
  const DecodeShared shared(args.D, args.D_v, parts);
  std::optional<DecodeBlock> blocks[kBlocks];
  int64_t count = 0;
  const int64_t tokens = sequence_of(args, b).queries;
  for (int64_t i = 0; i < heads; ++i) {
    for (int64_t token = 0; token < tokens; ++token) blocks[count++].emplace(args, b, h_kv + i, token, split, shared, parts);
  }
  if (count) DecodeBlock::run(blocks, count);
}

// The innermost index of tasks is the split, or with a block table the head: heads of a page are adjacent in memory, and small
// pages are read much faster if their heads are read together, up to kBlockM rows of queries.
inline void run_decode_tasks(const AttentionForward& args, int64_t begin, int64_t end, float* workspace) {
  const int64_t splits = args.splits(), T = larger(args.T, 1), rows = args.H / args.H_kv * T;
  const int64_t together = args.block_table ? smaller(kBlocks / T, kBlockM / rows) : 1;
  for (int64_t task = begin, heads; task < end; task += heads) {
    const int64_t b = task / (args.H_kv * splits);
    const int64_t h_kv = args.block_table ? task % args.H_kv : task / splits % args.H_kv;
    const int64_t split = args.block_table ? task / args.H_kv % splits : task % splits;
    heads = smaller(smaller(together, args.H_kv - h_kv), end - task);
    run_decode(args, b, h_kv, heads, split, workspace);
  }
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
