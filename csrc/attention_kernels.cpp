// Attention on the CPU, compiled once per CPU level: FlashAttention-2's forward (arXiv 2307.08691, algorithm 1) in fp32.
//
// Many queries ("wide"): everything is held transposed, a vector running along the queries. Scores are then
// K · Q^T and outputs V^T · P^T, in which K and V are the operands that are broadcast from where they lie, so neither is
// packed, and the softmax runs along the vectors' lanes without horizontal sums.
// Few queries ("narrow", decoding): a vector runs along the head dim, and each key is read once from memory.
//
// Loops are written on vectors of kWidth floats (GCC's vector extension, which Clang shares).

#include "attention.h"

#include <cstring>

#include "cpu_level.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kTileRows = 6, kTileVectors = 4;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kWidth = 8, kTileRows = 6, kTileVectors = 2;  // 12 of 16
#else
constexpr int kWidth = 4, kTileRows = 6, kTileVectors = 2;  // 12 of 16 (SSE2) or of 32 (NEON)
#endif

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t IntVector __attribute__((vector_size(kWidth * sizeof(float))));

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 1.44269504088896340736f;
constexpr int64_t kNarrowRows = kWidth / 4 < 2 ? 2 : kWidth / 4;  // up to so many queries, vectors run along D

inline Vector load(const float* source) {
  Vector x;
  std::memcpy(&x, source, sizeof x);
  return x;
}

inline void store(float* target, Vector x) { std::memcpy(target, &x, sizeof x); }

inline Vector broadcast(float x) { return x - Vector{}; }

inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }

typedef float Quad __attribute__((vector_size(16)));

// One vector's lanes combined pairwise, halves first.
template <int kLanes, typename Combine>
inline float reduce(const float* lanes, Combine combine) {
  if constexpr (kLanes == 4) {
    Quad x;
    std::memcpy(&x, lanes, sizeof x);
    return combine(combine(x[0], x[2]), combine(x[1], x[3]));
  } else {
    typedef float Half __attribute__((vector_size(kLanes / 2 * sizeof(float))));
    Half low, high;
    std::memcpy(&low, lanes, sizeof low);
    std::memcpy(&high, lanes + kLanes / 2, sizeof high);
    low = combine(low, high);
    return reduce<kLanes / 2>(reinterpret_cast<const float*>(&low), combine);
  }
}

inline float sum(Vector x) {
  return reduce<kWidth>(reinterpret_cast<const float*>(&x), [](auto a, auto b) { return a + b; });
}

inline float maximum(Vector x) {
  return reduce<kWidth>(reinterpret_cast<const float*>(&x), [](auto a, auto b) { return a > b ? a : b; });
}

// e^x for x <= 0, zero below 2^-126: with y = x · log2(e), 2^y = 2^n · 2^f where n = round(y) and a polynomial for 2^f
// on [-1/2, 1/2], fitted for least relative error (1.9e-9 before rounding). Scores stay in natural units until here: the
// rounding of y then matters least for the largest weights, while scores in base 2 would all carry it at full size.
inline Vector exp_nonpositive(Vector natural) {
  const Vector x = natural * kLog2e;
  const Vector lowest = broadcast(-126.0f), clamped = x < lowest ? lowest : x;
  const Vector shifter = broadcast(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer in the low bits
  const Vector shifted = clamped + shifter;
  const Vector f = clamped - (shifted - shifter);
  Vector y = broadcast(1.534581097e-04f);
  y = y * f + 1.339993090e-03f;
  y = y * f + 9.618489072e-03f;
  y = y * f + 5.550328642e-02f;
  y = y * f + 2.402264625e-01f;
  y = y * f + 6.931471825e-01f;
  y = y * f + 1.0f;
  IntVector n, bits;
  std::memcpy(&n, &shifted, sizeof n);
  std::memcpy(&bits, &y, sizeof bits);
  bits += n << 23;  // the shifter's own bits are shifted out
  std::memcpy(&y, &bits, sizeof y);
  y = x == x ? y : x;  // NaN stays
  return x < lowest ? Vector{} : y;
}

inline float exp_nonpositive(float x) { return exp_nonpositive(broadcast(x))[0]; }

// `count` elements of `element`, from index `offset` of `source`, as floats.
inline void convert(const void* source, int64_t offset, int64_t count, Element element, float* target) {
  if (element == Element::float32) {
    std::memcpy(target, static_cast<const float*>(source) + offset, count * sizeof(float));
  } else if (element == Element::float16) {
    const uint16_t* x = static_cast<const uint16_t*>(source) + offset;
    for (int64_t i = 0; i < count; ++i) target[i] = half_to_float(x[i]);
  } else if (element == Element::bfloat16) {
    const uint16_t* x = static_cast<const uint16_t*>(source) + offset;
    for (int64_t i = 0; i < count; ++i) target[i] = bfloat16_to_float(x[i]);
  } else if (element == Element::int8) {
    const int8_t* x = static_cast<const int8_t*>(source) + offset;
    for (int64_t i = 0; i < count; ++i) target[i] = static_cast<float>(x[i]);
  } else {
    const uint8_t* x = static_cast<const uint8_t*>(source) + offset;
    for (int64_t i = 0; i < count; ++i) target[i] = e4m3_to_float(x[i]);
  }
}

inline void write(float x, void* target, int64_t offset, Element element) {
  if (element == Element::float32) {
    static_cast<float*>(target)[offset] = x;
  } else {
    static_cast<uint16_t*>(target)[offset] = element == Element::float16 ? float_to_half(x) : float_to_bfloat16(x);
  }
}

// c[i][j] (+)= sum_k a[i][k] · b[k][j] for i < kRows and j < kVectors vectors. Strides in floats. What c held joins last,
// so that the rounding of a long sum grows with the number of blocks, not of terms.
template <int kRows, int kVectors>
inline void multiply_tile(
    const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, float* c, int64_t c_row, int64_t K,
    bool accumulate) {
  Vector total[kRows][kVectors] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vector row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + k * b_k + j * kWidth);
    for (int i = 0; i < kRows; ++i) {
      const Vector factor = broadcast(a[i * a_row + k * a_k]);
      for (int j = 0; j < kVectors; ++j) total[i][j] += factor * row[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* target = c + i * c_row + j * kWidth;
      store(target, accumulate ? load(target) + total[i][j] : total[i][j]);
    }
  }
}

// The same for any number of rows and vectors, tile by tile.
template <int kRows, int kVectors>
inline void multiply(
    int64_t rows, int64_t vectors, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, float* c,
    int64_t c_row, int64_t K, bool accumulate) {
  for (; rows >= kRows; rows -= kRows, a += kRows * a_row, c += kRows * c_row) {
    int64_t j = 0;
    for (; j + kVectors <= vectors; j += kVectors) {
      multiply_tile<kRows, kVectors>(a, a_row, a_k, b + j * kWidth, b_k, c + j * kWidth, c_row, K, accumulate);
    }
    for (; j < vectors; ++j) {
      multiply_tile<kRows, 1>(a, a_row, a_k, b + j * kWidth, b_k, c + j * kWidth, c_row, K, accumulate);
    }
  }
  if constexpr (kRows > 1) {
    if (rows) multiply<kRows - 1, kVectors>(rows, vectors, a, a_row, a_k, b, b_k, c, c_row, K, accumulate);
  }
}

// One block of queries against all its keys.
class Block {
 public:
  Block(const AttentionForward& args, int64_t task, float* workspace) : args_(args) {
    const int64_t blocks = args.blocks(), index = task % blocks;
    // From both ends in turn: early and late queries of a causal mask cost differently, and threads get equal shares.
    first_ = (index % 2 ? blocks - 1 - index / 2 : index / 2) * kBlockM;
    rows_ = args.rows() - first_ < kBlockM ? args.rows() - first_ : kBlockM;
    h_kv_ = task / blocks % args.H_kv, b_ = task / blocks / args.H_kv;
    length_ = args.kv_lengths ? args.kv_lengths[b_ * args.kv_length_stride] : args.S;
    length_ = length_ < 0 ? 0 : length_ > args.S ? args.S : length_;
    D_ = (args.D + 15) / 16 * 16;

    q_ = workspace;
    acc_ = q_ + D_ * kBlockM;
    scores_ = acc_ + D_ * kBlockM;
    k_ = scores_ + kBlockM * kBlockN;
    v_ = k_ + kBlockN * D_;
    max_ = v_ + kBlockN * D_;
    sum_ = max_ + kBlockM;
    factor_ = sum_ + kBlockM;
    visible_ = reinterpret_cast<int32_t*>(factor_ + kBlockM);
    hidden_ = visible_ + kBlockM;
  }

  void run() {
    std::memset(acc_, 0, D_ * kBlockM * sizeof(float));
    for (int64_t r = 0; r < kBlockM; ++r) max_[r] = -kInfinity, sum_[r] = 0.0f, visible_[r] = hidden_[r] = 0;
    // Of the keys that rows see: where the first and the last begin, and where the first and the last end.
    int64_t first_begin = args_.S, last_begin = 0, first_end = args_.S, last_end = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t begin = keys_before(token(r)), end = keys_seen(token(r));
      hidden_[r] = static_cast<int32_t>(begin), visible_[r] = static_cast<int32_t>(end);
      first_begin = begin < first_begin ? begin : first_begin, last_begin = begin > last_begin ? begin : last_begin;
      first_end = end < first_end ? end : first_end, last_end = end > last_end ? end : last_end;
    }
    const bool narrow = rows_ <= kNarrowRows;
    load_queries(narrow);
    const int64_t start = first_begin / kBlockN * kBlockN;  // aligned, as pages are
    for (int64_t n = start; n < last_end; n += kBlockN) {
      const int64_t keys = last_end - n < kBlockN ? last_end - n : kBlockN;
      const bool masked = first_end < n + keys || last_begin > n, first = n == start;
      if (narrow) {
        step_narrow(n, keys, masked, first);
      } else {
        step_wide(n, keys, masked, first);
      }
    }
    write_results(narrow);
  }

 private:
  // Row r of the list is query `token` of head `head`.
  int64_t token(int64_t r) const { return (first_ + r) % args_.T; }
  int64_t head(int64_t r) const { return h_kv_ * (args_.H / args_.H_kv) + (first_ + r) / args_.T; }

  // Query t sees the keys from keys_before(t) to keys_seen(t).
  int64_t keys_seen(int64_t t) const {
    const int64_t keys = args_.causal ? length_ - args_.T + t + 1 : length_;
    return keys < 0 ? 0 : keys < length_ ? keys : length_;
  }
  int64_t keys_before(int64_t t) const {
    const int64_t keys = length_ - args_.T + t + 1 - args_.window;
    return keys < 0 ? 0 : keys < length_ ? keys : length_;
  }

  // q · scale: (rows, D_) when narrow, transposed to (D_, kBlockM) when wide. What lies beyond is zero.
  void load_queries(bool narrow) {
    std::memset(q_, 0, D_ * kBlockM * sizeof(float));
    float* row = scores_;  // not in use yet, and large enough: D_ <= 256
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t offset = b_ * args_.q_stride_b + head(r) * args_.q_stride_h + token(r) * args_.q_stride_t;
      convert(args_.q, offset, args_.D, args_.element, row);
      for (int64_t d = 0; d < args_.D; ++d) (narrow ? q_[r * D_ + d] : q_[d * kBlockM + r]) = row[d] * args_.scale;
    }
  }

  // The block of `keys` rows from n on, as floats: where it lies, or a copy padded with zeros to D_.
  struct Rows {
    const float* data;
    int64_t stride;
  };
  Rows block_of(const Keys& source, int64_t n, int64_t keys, float* copy) const {
    for (int64_t i = 0, run; i < keys; i += run) {  // of rows that lie together: up to the end of a page
      int64_t b = b_, row = n + i;
      run = keys - i;
      if (args_.block_table) {
        b = args_.block_table[b_ * args_.table_stride_b + row / args_.page * args_.table_stride_p];
        row %= args_.page;
        run = run < args_.page - row ? run : args_.page - row;
      }
      const int64_t offset = b * source.stride_b + h_kv_ * source.stride_h + row * source.stride_s;
      if (run == keys && args_.key_element == Element::float32 && args_.D % kWidth == 0) {
        return {static_cast<const float*>(source.data) + offset, source.stride_s};
      }
      const float* scale =
          source.scale + b * source.scale_stride_b + h_kv_ * source.scale_stride_h + row * source.scale_stride_s;
      for (int64_t j = 0; j < run; ++j) {
        float* target = copy + (i + j) * D_;
        convert(source.data, offset + j * source.stride_s, args_.D, args_.key_element, target);
        if (source.scale) {
          const float factor = scale[j * source.scale_stride_s];
          for (int64_t d = 0; d < args_.D; ++d) target[d] *= factor;
        }
        for (int64_t d = args_.D; d < D_; ++d) target[d] = 0.0f;
      }
    }
    return {copy, D_};
  }
  // The head dim as loops over vectors see it.
  int64_t vectors() const { return (args_.D + kWidth - 1) / kWidth; }

  void step_wide(int64_t n, int64_t keys, bool masked, bool first) {
    const int64_t columns = (rows_ + kWidth - 1) / kWidth;  // vectors of queries
    const Rows k = block_of(args_.k, n, keys, k_);
    // scores[n][m] = k[n] · q[m]
    multiply<kTileRows, kTileVectors>(
        keys, columns, k.data, k.stride, 1, q_, kBlockM, scores_, kBlockM, args_.D, false);

    for (int64_t m = 0; m < columns * kWidth; m += kWidth) {
      const Vector before = load(max_ + m);
      IntVector visible, hidden;
      std::memcpy(&visible, visible_ + m, sizeof visible);
      std::memcpy(&hidden, hidden_ + m, sizeof hidden);
      Vector highest = before;
      for (int64_t i = 0; i < keys; ++i) {
        Vector score = load(scores_ + i * kBlockM + m);
        if (masked) {
          const int32_t key = static_cast<int32_t>(n + i);
          score = (key < visible) & (key >= hidden) ? score : broadcast(-kInfinity);
          store(scores_ + i * kBlockM + m, score);
        }
        highest = maximum(score, highest);
      }
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
      store(factor_ + m, factor);
    }

    if (!first) {
      for (int64_t d = 0; d < args_.D; ++d) {
        for (int64_t m = 0; m < columns * kWidth; m += kWidth) {
          store(acc_ + d * kBlockM + m, load(acc_ + d * kBlockM + m) * load(factor_ + m));
        }
      }
    }
    // acc[d][m] += sum_n v[n][d] · weight[n][m]
    const Rows v = block_of(args_.v, n, keys, v_);
    multiply<kTileRows, kTileVectors>(
        args_.D, columns, v.data, 1, v.stride, scores_, kBlockM, acc_, kBlockM, keys, true);
  }

  void step_narrow(int64_t n, int64_t keys, bool masked, bool first) {
    const Rows k = block_of(args_.k, n, keys, k_), v = block_of(args_.v, n, keys, v_);
    const int64_t padded = (keys + kWidth - 1) / kWidth * kWidth;
    for (int64_t r = 0; r < rows_; ++r) {
      float* scores = scores_ + r * kBlockN;
      const int64_t seen = visible_[r] - n, unseen = hidden_[r] - n;
      dot_products(k, q_ + r * D_, keys, scores);
      for (int64_t i = masked ? (seen > 0 ? seen : 0) : keys; i < padded; ++i) scores[i] = -kInfinity;
      for (int64_t i = 0; i < unseen && i < keys; ++i) scores[i] = -kInfinity;

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
      const int64_t t = token(r), h = head(r);
      const bool blind = sum_[r] == 0.0f;  // it sees no key
      const float factor = blind ? 0.0f : 1.0f / sum_[r];
      const int64_t offset = b_ * args_.out_stride_b + h * args_.out_stride_h + t * args_.out_stride_t;
      for (int64_t d = 0; d < args_.D; ++d) {
        const float total = narrow ? acc_[r * D_ + d] : acc_[d * kBlockM + r];
        write(total * factor, args_.out, offset + d, args_.element);
      }
      args_.lse[(b_ * args_.H + h) * args_.T + t] =
          blind ? -kInfinity : max_[r] + __builtin_logf(sum_[r]);
    }
  }

  const AttentionForward& args_;
  int64_t b_, h_kv_, first_, rows_, length_, D_;  // D_: head dim padded to 16
  float *q_, *acc_, *scores_, *k_, *v_;
  // Per row: running maximum and sum, factor of the last rescaling; of how many first keys it sees all but how many.
  float *max_, *sum_, *factor_;
  int32_t *visible_, *hidden_;
};

}  // namespace

void attention_forward(const AttentionForward& args, int64_t begin, int64_t end, float* workspace) {
  for (int64_t task = begin; task < end; ++task) Block(args, task, workspace).run();
}

}  // namespace fastgpt::FASTGPT_CPU_LEVEL
