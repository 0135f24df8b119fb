// A block of queries and what is between it and its keys, for the forward and the backward kernel: which keys it sees,
// how they are read, and how products q·k become scores.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "attention/attention.h"
#include "common/arena.h"
#include "common/vectors.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// The layout of a tile of scores, whose lines are kBlockM = kBlockN floats apart: a line is a key and a vector runs along
// queries, or a line is a query and a vector runs along keys.
enum class Along { queries, keys };

static_assert(kBlockM == kBlockN, "a tile of scores has lines of one length");

// Floats from a copied row of keys or values to the next one: no multiple of 2 KiB, which would put all rows of a tile into few
// sets of the first level of cache.
constexpr int64_t kConflicts = 512;
constexpr int64_t copied_stride(int64_t head_dim) {
  const int64_t padded = padded_head_dim(head_dim);
  return padded % kConflicts == 0 ? padded + 16 : padded;
}

// Queries and keys of a sequence, and the rows where they begin: 0 unless sequences are packed.
struct Sequence {
  int64_t queries, keys, first_q, first_k;
};

inline Sequence sequence_of(const Attention& args, int64_t b) {
  if (args.cu_seqlens_q) {
    const int64_t first_q = args.cu_seqlens_q[b], first_k = args.cu_seqlens_k[b];
    return {args.cu_seqlens_q[b + 1] - first_q, args.cu_seqlens_k[b + 1] - first_k, first_q, first_k};
  }
  const int64_t length = args.kv_lengths ? args.kv_lengths[b * args.kv_length_stride] : args.S;
  return {args.T, length < 0 ? 0 : length > args.S ? args.S : length, 0, 0};
}

// Up to kBlockM rows, from `first` on, of the list of queries that share a key/value head of sequence b.
class QueryBlock {
 public:
  QueryBlock(const Attention& args, int64_t b, int64_t h_kv, int64_t first)
      : args_(args),
        b_(b),
        h_kv_(h_kv),
        D_(padded_head_dim(args.D)),
        D_v_(padded_head_dim(args.D_v)),
        sequence_(sequence_of(args, b)) {
    const int64_t T = sequence_.queries, group = args.H / args.H_kv, left = group * T - first;
    rows_ = left < 0 ? 0 : left < kBlockM ? left : kBlockM;
    first_begin_ = first_end_ = args.S;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t t = (first + r) % T, h = h_kv * group + (first + r) / T, begin = keys_before(t), end = keys_seen(t);
      token_[r] = static_cast<int32_t>(t), head_[r] = static_cast<int32_t>(h);
      key_begin_[r] = static_cast<int32_t>(begin), key_end_[r] = static_cast<int32_t>(end);
      if (args.alibi_slopes) slope_[r] = args.alibi_slopes[h];
      first_begin_ = begin < first_begin_ ? begin : first_begin_, last_begin_ = begin > last_begin_ ? begin : last_begin_;
      first_end_ = end < first_end_ ? end : first_end_, last_end_ = end > last_end_ ? end : last_end_;
    }
  }

 protected:
  // Query t sees the keys from keys_before(t) to keys_seen(t).
  int64_t keys_seen(int64_t t) const {
    const int64_t length = sequence_.keys, keys = args_.causal ? length - sequence_.queries + t + 1 : length;
    return keys < 0 ? 0 : keys < length ? keys : length;
  }
  int64_t keys_before(int64_t t) const {
    const int64_t length = sequence_.keys, keys = length - sequence_.queries + t + 1 - args_.window;
    return keys < 0 ? 0 : keys < length ? keys : length;
  }

  // Index of row r of the block in q, out, their gradients and lse.
  template <typename Data>
  int64_t at(const PerQuery<Data>& x, int64_t r) const {
    return x.at(b_, head_[r], sequence_.first_q + token_[r]);
  }

  // Vectors that cover the block's rows, and a head dim.
  int64_t columns() const { return (rows_ + kWidth - 1) / kWidth; }
  static int64_t vectors(int64_t head_dim) { return (head_dim + kWidth - 1) / kWidth; }

  // Row r, as floats.
  void load_row(const PerQuery<const void*>& x, int64_t r, int64_t head_dim, float* row) const {
    convert(x.data, at(x, r), head_dim, args_.element, row);
  }

  // Some keys or values as floats: where they lie, or a copy, copied_stride() apart and padded with zeros to a multiple of 16.
  struct Rows {
    const float* data;
    int64_t stride;
  };
  Rows load_keys(const Keys& source, int64_t n, int64_t keys, float* copy) const {
    const int64_t head_dim = source.head_dim, padded = padded_head_dim(head_dim);
    Rows rows{copy, copied_stride(head_dim)};
    const bool as_they_lie = args_.key_element == Element::float32 && head_dim % kWidth == 0 &&
        (head_dim < kConflicts || source.stride_s % kConflicts != 0);
    each_run(source, n, keys, [&](int64_t i, int64_t count, int64_t offset, const float* scale) {
      if (count == keys && as_they_lie) {
        rows = {static_cast<const float*>(source.data) + offset, source.stride_s};
        return;
      }
      for (int64_t j = 0; j < count; ++j) {
        float* target = copy + (i + j) * rows.stride;
        convert(source.data, offset + j * source.stride_s, head_dim, args_.key_element, target);
        if (scale) {
          const float factor = scale[j * source.scale_stride_s];
          for (int64_t d = 0; d < head_dim; ++d) target[d] *= factor;
        }
        for (int64_t d = head_dim; d < padded; ++d) target[d] = 0.0f;
      }
    });
    return rows;
  }

  // Keys or values from n on in runs that lie together, up to the end of a page. function(first, count, offset, scale)
  // gets the number of a run's first key counted from n, the index of its first element, and its scale or null.
  template <typename Function>
  void each_run(const Keys& source, int64_t n, int64_t keys, const Function& function) const {
    for (int64_t i = 0, count; i < keys; i += count) {
      int64_t b = b_, row = sequence_.first_k + n + i;
      count = keys - i;
      if (args_.block_table) {
        b = args_.block_table[b_ * args_.table_stride_b + row / args_.page * args_.table_stride_p];
        row %= args_.page;
        count = count < args_.page - row ? count : args_.page - row;
      }
      const float* scale = source.scale
          ? source.scale + b * source.scale_stride_b + h_kv_ * source.scale_stride_h + row * source.scale_stride_s
          : nullptr;
      function(i, count, b * source.stride_b + h_kv_ * source.stride_h + row * source.stride_s, scale);
    }
  }

  // The block's rows (kBlockM, D) to columns (D, kBlockM), and back, for a padded head dim D. Whole vectors of them.
  void to_columns(const float* rows, int64_t D, float* columns) const { transpose_all(rows, D, rows_, columns, kBlockM, D); }
  void to_rows(const float* columns, int64_t D, float* rows) const { transpose_all(columns, kBlockM, D, rows, D, rows_); }

  // The first key of the first tile. Tiles are aligned, as pages are.
  int64_t start() const { return first_begin_ / kBlockN * kBlockN; }
  int64_t keys_from(int64_t n) const { return last_end_ - n < kBlockN ? last_end_ - n : kBlockN; }

  const uint8_t* mask_row(int64_t r, int64_t n) const {
    return args_.mask.data + args_.mask.at(b_, head_[r], token_[r]) + n * args_.mask.stride_s;
  }

  // The mask leaves a row of the block one of the keys from n on.
  bool mask_shows(int64_t n, int64_t keys) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const uint8_t* mask = mask_row(r, n);
      for (int64_t i = 0; i < keys; ++i) {
        if (mask[i * args_.mask.stride_s]) return true;
      }
    }
    return false;
  }

  // Turns scale · q·k of the keys from n on into scores, -inf where a query does not see a key. With a softcap,
  // `cap_slopes` gets the derivatives of its results unless it is null.
  template <Along kAlong>
  void finish_scores(float* scores, int64_t n, int64_t keys, float* cap_slopes = nullptr) const {
    if (args_.softcap > 0.0f) {
      const float inverse = 1.0f / args_.softcap;
      each_vector<kAlong>(keys, [&](int64_t line, int64_t lane) {
        const Vector capped = tanh(load(scores + line * kBlockN + lane) * inverse);
        store(scores + line * kBlockN + lane, capped * args_.softcap);
        if (cap_slopes) store(cap_slopes + line * kBlockN + lane, 1.0f - capped * capped);
      });
    }
    if (args_.alibi_slopes) {
      each_vector<kAlong>(keys, [&](int64_t line, int64_t lane) {
        const int32_t past = static_cast<int32_t>(sequence_.keys - sequence_.queries - n);
        const IntVector ahead = of_rows<kAlong>(token_, line, lane) + past - key<kAlong>(line, lane);
        const Vector distance = __builtin_convertvector(ahead < 0 ? -ahead : ahead, Vector);
        float* score = scores + line * kBlockN + lane;
        store(score, load(score) - of_rows<kAlong>(slope_, line, lane) * distance);
      });
    }
    if (args_.bias.data) {
      const auto& bias = args_.bias;
      const auto load_bias = [&](int64_t r, float* row) {
        const int64_t offset = bias.at(b_, head_[r], token_[r]) + n * bias.stride_s;
        if (bias.stride_s == 1) return convert(bias.data, offset, keys, bias.element, row);
        for (int64_t i = 0; i < keys; ++i) convert(bias.data, offset + i * bias.stride_s, 1, bias.element, row + i);
      };
      // A key with a bias of -inf is not seen, whatever q·k is.
      combine_rows<kAlong>(scores, keys, load_bias, [](Vector score, Vector added) {
        return added == broadcast(-kInfinity) ? added : score + added;
      });
    }
    // Where vectors run along keys, the last one's lanes past the last key hold no scores.
    const bool partial = kAlong == Along::keys && keys % kWidth != 0;
    if (partial || first_end_ < n + keys || last_begin_ > n) {
      each_vector<kAlong>(keys, [&](int64_t line, int64_t lane) {
        const IntVector at = key<kAlong>(line, lane) + static_cast<int32_t>(n);
        const auto seen = (at < of_rows<kAlong>(key_end_, line, lane)) & (at >= of_rows<kAlong>(key_begin_, line, lane));
        float* score = scores + line * kBlockN + lane;
        store(score, seen ? load(score) : broadcast(-kInfinity));
      });
    }
    if (args_.mask.data) {
      const auto load_mask = [&](int64_t r, float* row) {
        const uint8_t* mask = mask_row(r, n);
        for (int64_t i = 0; i < keys; ++i) row[i] = static_cast<float>(mask[i * args_.mask.stride_s]);
      };
      combine_rows<kAlong>(
          scores, keys, load_mask, [](Vector score, Vector shown) { return shown > 0.0f ? score : broadcast(-kInfinity); });
    }
  }

  // 1 / (1 - p) for the weights that dropout leaves, 0 for the others. Vectors run along queries.
  void load_keep_factors(float* factors, int64_t n, int64_t keys) const {
    const Words b = static_cast<uint32_t>(b_) - Words{};
    for (int64_t m = 0; m < rows_; m += kWidth) {
      const Words token = reinterpret_cast<Words>(load(token_ + m)), head = reinterpret_cast<Words>(load(head_ + m));
      for (int64_t i = 0; i < keys; i += 4) {
        const Words block = static_cast<uint32_t>((n + i) / 4) - Words{};
        const PhiloxWords words = philox(static_cast<uint64_t>(*args_.dropout_seed), block, token, head, b);
        for (int64_t j = 0; j < 4 && i + j < keys; ++j) {
          const auto kept = words.word[j] >> 1 >= args_.keep_threshold;
          store(factors + (i + j) * kBlockM + m, kept ? broadcast(args_.keep_scale) : Vector{});
        }
      }
    }
  }

  const Attention& args_;
  const int64_t b_, h_kv_, D_, D_v_;  // D_, D_v_: head dims padded to 16
  int64_t rows_;
  const Sequence sequence_;
  // Of the keys that rows see: where the first and the last begin, and where the first and the last end.
  int64_t first_begin_, last_begin_ = 0, first_end_, last_end_ = 0;
  // Per row: its query and head, and that it sees the keys from key_begin_ to key_end_. Zero past rows_.
  int32_t token_[kBlockM] = {}, head_[kBlockM] = {}, key_end_[kBlockM] = {}, key_begin_[kBlockM] = {};
  float slope_[kBlockM] = {};

 private:
  static void transpose_all(
      const float* source, int64_t source_stride, int64_t lines, float* target, int64_t target_stride, int64_t lanes) {
    for (int64_t i = 0; i < lines; i += kWidth) {
      for (int64_t j = 0; j < lanes; j += kWidth) {
        Vector block[kWidth];
        for (int64_t l = 0; l < kWidth; ++l) block[l] = load(source + (i + l) * source_stride + j);
        transpose(block);
        for (int64_t l = 0; l < kWidth; ++l) store(target + (j + l) * target_stride + i, block[l]);
      }
    }
  }

  template <Along kAlong, typename Function>
  void each_vector(int64_t keys, Function function) const {
    const int64_t lines = kAlong == Along::queries ? keys : rows_, lanes = kAlong == Along::queries ? rows_ : keys;
    for (int64_t line = 0; line < lines; ++line) {
      for (int64_t lane = 0; lane < lanes; lane += kWidth) function(line, lane);
    }
  }

  // The rows' numbers, and which keys counted from the tile's first, in the lanes of a vector.
  template <Along kAlong, typename T>
  static auto of_rows(const T* numbers, int64_t line, int64_t lane) {
    return kAlong == Along::queries ? load(numbers + lane) : broadcast(numbers[line]);
  }
  template <Along kAlong>
  static IntVector key(int64_t line, int64_t lane) {
    if constexpr (kAlong == Along::queries) return broadcast(static_cast<int32_t>(line));
    IntVector keys;
    for (int i = 0; i < kWidth; ++i) keys[i] = static_cast<int32_t>(lane) + i;
    return keys;
  }

  // scores = combine(scores, numbers), where load(r, row) gives the numbers of row r, a key after the other.
  template <Along kAlong, typename Load, typename Combine>
  void combine_rows(float* scores, int64_t keys, Load load_numbers, Combine combine) const {
    float numbers[kWidth][kBlockN] = {};
    for (int64_t m = 0; m < rows_; m += kWidth) {
      const int64_t rows = rows_ - m < kWidth ? rows_ - m : kWidth;
      for (int64_t r = 0; r < rows; ++r) load_numbers(m + r, numbers[r]);
      for (int64_t n = 0; n < keys; n += kWidth) {
        Vector block[kWidth];
        for (int64_t r = 0; r < kWidth; ++r) block[r] = load(numbers[r] + n);
        if constexpr (kAlong == Along::queries) transpose(block);
        const int64_t lines = kAlong == Along::keys ? rows : keys - n < kWidth ? keys - n : kWidth;
        float* score = scores + (kAlong == Along::queries ? n * kBlockM + m : m * kBlockN + n);
        for (int64_t i = 0; i < lines; ++i, score += kBlockN) store(score, combine(load(score), block[i]));
      }
    }
  }
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
