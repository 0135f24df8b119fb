// The gradients of attention on the CPU, compiled once per CPU level, in fp32:
//
//     p = softmax(score),   dp = dout · v^T,   ds = p (dp - mean + dlse),   mean = sum p dp
//     dv = p^T · dout,   dk = scale ds^T · q,   dq = scale ds · k,   dbias = ds,   dsinks = sum p_sink (dlse - mean)
//
// where ds is also multiplied by the soft cap's derivative on its way to dq and dk. A block of queries loops over its keys
// twice. The first pass stores scores and dp of the whole block in scratch memory, for all keys, so that the softmax uses their
// maximum and sum: exp(score - lse) would carry the rounding error of lse, and sum out dout, in place of the mean, that of out.
// The second pass turns them into weights and ds, and accumulates dq. They are kept until they have been added to the gradients
// of keys and values, which are in scratch memory, too.
//
// A query and a key that it does not see do not affect each other's gradients, even if they are infinite or NaN: with a weight
// of 0 every term is 0, and where products of whole tiles would multiply 0 by infinity or NaN, they are done element by
// element.
//
// The order of all sums is fixed: gradients are the same bits on every run, whatever is done in parallel.
//
// As in the forward kernel, tiles of scores have a line per key, and vectors run along queries.
//
// Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2.

#include "attention/query_block.h"
#include "common/arena.h"
#include "common/matrices.h"
#include "common/stored_elements.h"
#include "common/vector_math.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Terms per partial sum, the same for dot products of more than kFewRows queries, and kFewRows.
constexpr int64_t kPart = 8, kLongPart = 256, kFewRows = 16;

// The scratch memory of a block of queries.
struct Workspace : Arena {
  Workspace(const Attention& args, float* memory) : Arena(memory) {
    const int64_t D = padded_head_dim(args.D), D_v = padded_head_dim(args.D_v), S = args.tiles() * kBlockN;
    weights = take(S * kBlockM), dweights = take(S * kBlockM);
    cap_slopes = args.softcap > 0.0f ? take(S * kBlockM) : nullptr;
    keep_factors = args.dropout_seed ? take(S * kBlockM) : nullptr;
    q = take(kBlockM * D), dout = take(kBlockM * D_v);
    q_columns = take(D * kBlockM), dout_columns = take(D_v * kBlockM), dq = take(D * kBlockM);
    k = take(kBlockN * copied_stride(D)), v = take(kBlockN * copied_stride(D_v));
    max = take(kBlockM), sum = take(kBlockM), mean = take(kBlockM), norm = take(kBlockM), dlse = take(kBlockM);
    finite = take(1);
  }

  float *weights, *dweights, *cap_slopes, *keep_factors;  // (S, kBlockM), a tile after the other
  float *q, *dout, *q_columns, *dout_columns, *dq;        // (kBlockM, D or D_v); columns and dq: (D or D_v, kBlockM)
  float *k, *v;                                           // (kBlockN, D or D_v)
  float *max, *sum, *mean, *norm, *dlse;                  // (kBlockM,) of scores, of weights; norm is 1 / sum
  float* finite;                                          // (1,): 0 if q or dout is not finite
};

// One block of queries against all its keys.
class BackwardBlock : QueryBlock {
 public:
  BackwardBlock(const AttentionBackward& args, int64_t b, int64_t h_kv, int64_t block, float* workspace)
      : QueryBlock(args, b, h_kv, block * kBlockM), grads_(args), w_(args, workspace) {}

  void run() {
    if (rows_ == 0) return;  // a shorter sequence than the longest
    load_queries();
    each_tile([this](int64_t n, int64_t keys) { score(n, keys); });
    start_sums();
    each_tile([this](int64_t n, int64_t keys) { weigh(n, keys); });
    finish_sums();
    each_tile([this](int64_t n, int64_t keys) { add_to_dq(n, keys); });
    write_dq();
  }

  // After run(): adds to the gradients of the keys from n on, one tile of them.
  void add_to_keys(int64_t n, float* dk, float* dv) const {
    const int64_t keys = keys_from(n);
    if (n < begin() || keys <= 0 || (args_.mask.data && !mask_shows(n, keys))) return;
    if (*w_.finite == 0.0f) {
      add_products(tile(w_.dweights, n), keys, w_.q, D_, dk + n * D_);
      add_products(tile(w_.weights, n), keys, w_.dout, D_v_, dv + n * D_v_);
      return;
    }
    // dk[n][d] += sum_m ds[n][m] · q[m][d], dv likewise
    multiply<kTileRows, kTileVectors>(
        keys, vectors(args_.D), tile(w_.dweights, n), kBlockM, 1, w_.q, D_, dk + n * D_, D_, rows_, true);
    multiply<kTileRows, kTileVectors>(
        keys, vectors(args_.D_v), tile(w_.weights, n), kBlockM, 1, w_.dout, D_v_, dv + n * D_v_, D_v_, rows_, true);
  }

 private:
  template <typename Function>
  void each_tile(Function function) const {
    for (int64_t n = begin(); n < end(); n += kBlockN) {
      const int64_t keys = keys_from(n);
      if (!args_.mask.data || mask_shows(n, keys)) function(n, keys);
    }
  }

  // q · scale and dout, as rows and transposed, zero-padded.
  void load_queries() {
    std::memset(w_.q, 0, (3 * D_ + 2 * D_v_) * kBlockM * sizeof(float));  // up to dq
    for (int64_t r = 0; r < kBlockM; ++r) w_.max[r] = -kInfinity;
    for (int64_t r = 0; r < rows_; ++r) {
      float* q = w_.q + r * D_;
      load_row(args_.q, r, args_.D, q);
      load_row(grads_.dout, r, args_.D_v, w_.dout + r * D_v_);
      for (int64_t d = 0; d < args_.D; ++d) q[d] *= args_.scale;
    }
    Vector zeros{};  // becomes NaN at the first element that is not finite
    for (int64_t i = 0; i < rows_ * D_; i += kWidth) zeros += load(w_.q + i) * 0.0f;
    for (int64_t i = 0; i < rows_ * D_v_; i += kWidth) zeros += load(w_.dout + i) * 0.0f;
    *w_.finite = sum(zeros) == 0.0f ? 1.0f : 0.0f;
    to_columns(w_.q, D_, w_.q_columns);
    to_columns(w_.dout, D_v_, w_.dout_columns);
  }

  // The tile of the keys from n on in a panel (S, kBlockM).
  float* tile(float* panel, int64_t n) const { return panel + n * kBlockM; }

  // Scores, dp, and the running maximum of each row's scores.
  void score(int64_t n, int64_t keys) {
    float *scores = tile(w_.weights, n), *dweights = tile(w_.dweights, n);
    const KeyRows k = load_keys(args_.k, n, keys, w_.k), v = load_keys(args_.v, n, keys, w_.v);
    dot_products(k, keys, w_.q_columns, args_.D, scores);
    finish_scores<Along::queries>(scores, n, keys, w_.cap_slopes ? tile(w_.cap_slopes, n) : nullptr);
    dot_products(v, keys, w_.dout_columns, args_.D_v, dweights);
    if (w_.keep_factors) {
      load_keep_factors(tile(w_.keep_factors, n), n, keys);
      scale_tile(dweights, tile(w_.keep_factors, n), keys);
    }
    for (int64_t m = 0; m < rows_; m += kWidth) {
      Vector highest = load(w_.max + m);
      for (int64_t i = 0; i < keys; ++i) highest = maximum(load(scores + i * kBlockM + m), highest);
      store(w_.max + m, highest);
    }
  }

  // Starts the sums of weights relative to the row's maximum score, or to 0 in a fully masked row.
  void start_sums() {
    std::memset(w_.sum, 0, 4 * kBlockM * sizeof(float));  // up to dlse
    for (int64_t r = 0; r < kBlockM; ++r) {
      if (w_.max[r] == -kInfinity) {
        w_.max[r] = 0.0f;
        continue;
      }
      w_.norm[r] = 1.0f;  // not 0, as of a fully masked row: weights may all underflow beside a sink
      if (r < rows_ && args_.sinks && args_.sinks[queries_.head[r]] > w_.max[r]) w_.max[r] = args_.sinks[queries_.head[r]];
    }
  }

  // Unnormalized weights, and the sums of p and p dp.
  void weigh(int64_t n, int64_t keys) {
    float *weights = tile(w_.weights, n), *dweights = tile(w_.dweights, n);
    for (int64_t m = 0; m < rows_; m += kWidth) {
      const Vector highest = load(w_.max + m);
      Vector sum{}, product{};
      for (int64_t i = 0; i < keys;) {
        Vector part_of_sum{}, part_of_product{};
        for (const int64_t end = i + kPart < keys ? i + kPart : keys; i < end; ++i) {
          const Vector weight = exp_nonpositive(load(weights + i * kBlockM + m) - highest);
          const Vector dweight = weight == 0.0f ? weight : load(dweights + i * kBlockM + m);
          store(weights + i * kBlockM + m, weight);
          store(dweights + i * kBlockM + m, dweight);
          part_of_sum += weight;
          part_of_product += weight * dweight;
        }
        sum += part_of_sum, product += part_of_product;
      }
      store(w_.sum + m, load(w_.sum + m) + sum);
      store(w_.mean + m, load(w_.mean + m) + product);
    }
  }

  // tile[n][m] = rows[n] · columns[m]. Short partial sums halve the rounding error, but are slower. They are used for few
  // queries, whose errors do not average out, and which PyTorch multiplies by more accurate matrix-vector products.
  void dot_products(const KeyRows& rows, int64_t keys, const float* columns, int64_t head_dim, float* tile) const {
    const int64_t part = rows_ <= kFewRows ? kPart : kLongPart;
    for (int64_t d = 0; d < head_dim; d += part) {
      const int64_t terms = head_dim - d < part ? head_dim - d : part;
      multiply<kTileRows, kTileVectors>(
          keys, this->columns(), rows.data + d, rows.stride, 1, columns + d * kBlockM, kBlockM, tile, kBlockM, terms, d > 0);
    }
  }

  void scale_tile(float* tile, const float* factors, int64_t keys) const {
    for (int64_t i = 0; i < keys * kBlockM; i += kWidth) {
      const Vector number = load(tile + i);
      store(tile + i, number == 0.0f ? number : number * load(factors + i));
    }
  }

  // target[n][d] += sum_m weights[n][m] · rows[m][d] over weights other than 0, for a padded head dim D.
  void add_products(const float* weights, int64_t keys, const float* rows, int64_t D, float* target) const {
    for (int64_t i = 0; i < keys; ++i) {
      for (int64_t r = 0; r < rows_; ++r) {
        const float weight = weights[i * kBlockM + r];
        if (weight == 0.0f) continue;
        for (int64_t d = 0; d < D; ++d) target[i * D + d] += weight * rows[r * D + d];
      }
    }
  }

  // Normalizes the sums, and adds each row's contribution to the gradient of its head's sink. Zeros in a fully masked row.
  void finish_sums() {
    for (int64_t r = 0; r < rows_; ++r) {
      const bool fully_masked = w_.norm[r] == 0.0f;
      const float sink = args_.sinks && !fully_masked ? exp_nonpositive(args_.sinks[queries_.head[r]] - w_.max[r]) : 0.0f;
      w_.norm[r] = fully_masked ? 0.0f : 1.0f / (w_.sum[r] + sink);
      w_.mean[r] *= w_.norm[r];
      if (grads_.dlse.data && !fully_masked) w_.dlse[r] = grads_.dlse.data[at(grads_.dlse, r)];
      if (args_.sinks) grads_.dsinks.data[at(grads_.dsinks, r)] = sink * w_.norm[r] * (w_.dlse[r] - w_.mean[r]);
    }
  }

  void add_to_dq(int64_t n, int64_t keys) {
    float *weights = tile(w_.weights, n), *ds = tile(w_.dweights, n);
    for (int64_t m = 0; m < rows_; m += kWidth) {
      const Vector norm = load(w_.norm + m), mean = load(w_.mean + m), dlse = load(w_.dlse + m);
      for (int64_t i = 0; i < keys; ++i) {
        const Vector relative = load(weights + i * kBlockM + m);
        const auto unseen = relative == 0.0f;
        const Vector weight = unseen ? relative : relative * norm;
        store(weights + i * kBlockM + m, weight);
        store(ds + i * kBlockM + m, unseen ? relative : weight * (load(ds + i * kBlockM + m) - mean + dlse));
      }
    }
    if (grads_.dbias.data) add_bias_gradients(ds, n, keys);
    if (w_.cap_slopes) scale_tile(ds, tile(w_.cap_slopes, n), keys);
    if (w_.keep_factors) scale_tile(weights, tile(w_.keep_factors, n), keys);

    // dq[d][m] += sum_n k[n][d] · ds[n][m]
    const KeyRows k = load_keys(args_.k, n, keys, w_.k);
    multiply<kTileRows, kTileVectors>(args_.D, columns(), k.data, 1, k.stride, ds, kBlockM, w_.dq, kBlockM, keys, true);
  }

  // kWidth columns of a tile as rows.
  static void transpose_columns(const float* columns, int64_t keys, float (&rows)[kWidth][kBlockN]) {
    for (int64_t n = 0; n < keys; n += kWidth) {
      Vector block[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) block[i] = load(columns + (n + i) * kBlockM);
      transpose(block);
      for (int64_t r = 0; r < kWidth; ++r) store(rows[r] + n, block[r]);
    }
  }

  // Rows of ds that share a row of the bias are summed before they are added to its gradient.
  void add_bias_gradients(const float* ds, int64_t n, int64_t keys) const {
    const auto& dbias = grads_.dbias;
    float total[kBlockN] = {};
    float* target = nullptr;
    const auto add_total = [&] {
      float sum = 0.0f;
      for (int64_t i = 0; i < keys; ++i) {
        if (dbias.stride_s) target[i * dbias.stride_s] += total[i];
        sum += total[i];
        total[i] = 0.0f;
      }
      if (!dbias.stride_s) *target += sum;
    };
    float rows[kWidth][kBlockN];
    for (int64_t r = 0; r < rows_; ++r) {
      if (r % kWidth == 0) transpose_columns(ds + r, keys, rows);
      float* row = dbias.data + dbias.at(queries_.b, queries_.head[r], queries_.token[r]) + n * dbias.stride_s;
      if (target && row != target) add_total();
      target = row;
      for (int64_t i = 0; i < keys; ++i) total[i] += rows[r % kWidth][i];
    }
    add_total();
  }

  void write_dq() const {
    float* rows = w_.q_columns;  // not in use any more
    to_rows(w_.dq, D_, rows);
    Vector zeros{};
    for (int64_t i = 0; i < rows_ * D_; i += kWidth) zeros += load(rows + i) * 0.0f;
    if (sum(zeros) != 0.0f) sum_dq(rows);
    for (int64_t r = 0; r < rows_; ++r) {
      float* row = rows + r * D_;
      for (int64_t d = 0; d < args_.D; ++d) row[d] *= args_.scale;
      write(row, args_.D, grads_.dq.data, at(grads_.dq, r), args_.element);
    }
  }

  // Recomputes rows of dq from the keys that they see alone.
  void sum_dq(float* rows) const {
    std::memset(rows, 0, rows_ * D_ * sizeof(float));
    each_tile([&](int64_t n, int64_t keys) {
      const float* ds = tile(w_.dweights, n);
      const KeyRows k = load_keys(args_.k, n, keys, w_.k);
      for (int64_t i = 0; i < keys; ++i) {
        for (int64_t r = 0; r < rows_; ++r) {
          const float factor = ds[i * kBlockM + r];
          if (factor == 0.0f) continue;
          for (int64_t d = 0; d < args_.D; ++d) rows[r * D_ + d] += factor * k.data[i * k.stride + d];
        }
      }
    });
  }

  const AttentionBackward& grads_;
  const Workspace w_;
};

// Writes the gradients of `rows` keys or values; those past `seen` are zero.
void write_key_gradients(
    const AttentionBackward& args, const KeyGradients& target, int64_t head_dim, int64_t b, int64_t h_kv, int64_t first,
    int64_t rows, int64_t seen, const float* source) {
  const float zeros[kMaxHeadDim] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t offset = b * target.stride_b + h_kv * target.stride_h + (first + i) * target.stride_s;
    write(i < seen ? source + i * padded_head_dim(head_dim) : zeros, head_dim, target.data, offset, args.element);
  }
}

}  // namespace

int64_t attention_backward_workspace(const Attention& args) { return Workspace(args, nullptr).taken(); }

void attention_backward_queries(const AttentionBackward& args, int64_t b, int64_t h_kv, int64_t block, float* workspace) {
  BackwardBlock(args, b, h_kv, block, workspace).run();
}

void attention_backward_keys(
    const AttentionBackward& args, int64_t b, int64_t h_kv, int64_t block, int64_t first_tile, int64_t last_tile,
    float* workspace, float* dk, float* dv) {
  const BackwardBlock queries(args, b, h_kv, block, workspace);
  for (int64_t tile = first_tile; tile < last_tile; ++tile) queries.add_to_keys(tile * kBlockN, dk, dv);
}

void attention_backward_write_keys(const AttentionBackward& args, int64_t b, int64_t h_kv, const float* dk, const float* dv) {
  const Sequence sequence = sequence_of(args, b);
  const int64_t rows = args.cu_seqlens_q ? sequence.keys : args.S;
  write_key_gradients(args, args.dk, args.D, b, h_kv, sequence.first_k, rows, sequence.keys, dk);
  write_key_gradients(args, args.dv, args.D_v, b, h_kv, sequence.first_k, rows, sequence.keys, dv);
}

}  // namespace fastgpt::FASTGPT_CPU_LEVEL
