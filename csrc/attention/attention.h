// The arguments of the kernels of attention.cpp and attention_backward.cpp, which are compiled per CPU level.

#pragma once

#include "common/elements.h"

namespace fastgpt {

// Tile sizes: rows of queries, and keys.
constexpr int64_t kBlockM = 64, kBlockN = 64;

// Up to kGroup blocks of queries loop over the keys together.
constexpr int64_t kGroup = 4;

// With up to kFewTokens, and kFewQueries of each that share a key/value head, as in decoding, keys are split into tasks of
// kSplit keys, since there may be fewer heads than threads. The splits depend on the shape alone, and a token's result has the
// bits of a call of its own, which is what speculation checks drafts by (fastgpt/generation/speculation.py).
constexpr int64_t kFewQueries = 8, kFewTokens = 8, kSplit = 2048;

constexpr int64_t kMaxHeadDim = 576;

constexpr int64_t padded_head_dim(int64_t D) { return (D + 15) / 16 * 16; }

// With large head dims groups are smaller: the queries and accumulators of all blocks must fit into the L2 cache of a core.
constexpr int64_t largest_group(int64_t D, int64_t D_v) {
  const int64_t fit = kGroup * 512 / (padded_head_dim(D) + padded_head_dim(D_v));
  return fit < 1 ? 1 : fit < kGroup ? fit : kGroup;
}

// One row per query, (B, H, T, D) or (B, H, T, D_v), last dimension contiguous; or one element per query, (B, H, T). Strides in
// elements.
template <typename Data>
struct PerQuery {
  Data data;
  int64_t stride_b, stride_h, stride_t;

  int64_t at(int64_t b, int64_t h, int64_t t) const { return b * stride_b + h * stride_h + t * stride_t; }
};

// Keys (B, H_kv, S, D) or values (B, H_kv, S, D_v), or with a block table a pool of pages (pages, H_kv, page, ...). Strides in
// elements.
struct Keys {
  const void* data;
  int64_t head_dim;
  int64_t stride_b, stride_h, stride_s;
  const float* scale;  // (B, H_kv, S) or (pages, H_kv, page) for elements of 8 bits, or null
  int64_t scale_stride_b, scale_stride_h, scale_stride_s;
};

// One element per score: (B, H, T, S), or null. Strides in elements, 0 in dimensions of size 1.
template <typename Data>
struct PerScore {
  Data data;
  Element element;
  int64_t stride_b, stride_h, stride_t, stride_s;

  int64_t at(int64_t b, int64_t h, int64_t t) const { return b * stride_b + h * stride_h + t * stride_t; }
};

// Arguments of the forward and the backward pass. Sequences may be packed one after the other: strides over B are then 0.
struct Attention {
  PerQuery<const void*> q;
  Keys k, v;
  const int32_t* kv_lengths;  // (B,) keys of each sequence, or null for S
  int64_t kv_length_stride;
  const int32_t* block_table;  // (B, S / page) page of each `page` keys, or null
  int64_t table_stride_b, table_stride_p, page;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // (B + 1,) where packed sequences begin and end, or null
  Element element;                             // of q and out
  Element key_element;                         // of k and v
  bool causal;                                 // bottom-right aligned
  int64_t window;                              // number of keys that a query sees at most, up to its own position
  float scale;
  float softcap;                  // 0 for none
  const float* alibi_slopes;      // (H,) or null
  const float* sinks;             // (H,) or null
  PerScore<const uint8_t*> mask;  // 0 where a query does not see a key
  PerScore<const void*> bias;
  const int64_t* dropout_seed;  // null for no dropout
  uint32_t keep_threshold;      // weights with a smaller random 31-bit integer are dropped
  float keep_scale;             // 1 / (1 - dropout_p)
  int64_t B, H, H_kv, T, S;     // T and S: of the longest sequence
  int64_t D, D_v;               // head dims of q and k, and of v and out

  // The queries of all heads that share a key/value head form one list of rows, in blocks of kBlockM, so that keys and values
  // are read once for all of them. Keys are processed in tiles of kBlockN.
  int64_t blocks() const { return (H / H_kv * T + kBlockM - 1) / kBlockM; }
  int64_t tiles() const { return (S + kBlockN - 1) / kBlockN; }
};

struct AttentionForward : Attention {
  PerQuery<void*> out;
  PerQuery<float*> lse;  // natural log
  float* partial;        // split_size() floats for each (b, h_kv, split), if there is more than one split
  int64_t group;         // blocks of queries that a task takes, up to largest_group(D, D_v)

  bool few_queries(int64_t tokens) const { return H / H_kv <= kFewQueries && tokens <= kFewTokens && !dropout_seed; }
  int64_t splits() const { return few_queries(T) && S > kSplit ? (S + kSplit - 1) / kSplit : 1; }
  int64_t split_size() const { return H / H_kv * T * (padded_head_dim(D_v) + 2); }

  // A task is one group of blocks of one (b, h_kv), and one split of its keys.
  int64_t groups() const { return (blocks() + group - 1) / group; }
  int64_t tasks() const { return B * H_kv * groups() * splits(); }
};

// Gradients of keys (B, H_kv, S, D) or values (B, H_kv, S, D_v). Strides in elements.
struct KeyGradients {
  void* data;
  int64_t stride_b, stride_h, stride_s;
};

struct AttentionBackward : Attention {
  PerQuery<const void*> dout;
  PerQuery<const float*> dlse;  // or null
  PerQuery<void*> dq;
  KeyGradients dk, dv;
  PerScore<float*> dbias;   // zero-initialized, accumulated into; or null
  PerQuery<float*> dsinks;  // (B, H, T) each query's contribution to its head's gradient; or null

  // A task is all queries and keys of one (b, h_kv), or of all b or h_kv that share elements of dbias.
  int64_t batch_tasks() const { return dbias.data && dbias.stride_b == 0 ? B > 0 : B; }
  int64_t head_tasks() const { return dbias.data && dbias.stride_h == 0 ? 1 : H_kv; }
};

}  // namespace fastgpt
