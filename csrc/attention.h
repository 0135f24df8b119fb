// What attention.cpp hands to the kernels of attention_kernels.cpp, which are compiled per CPU level.

#pragma once

#include "elements.h"

namespace fastgpt {

// Queries and keys that a kernel holds at a time, in rows.
constexpr int64_t kBlockM = 64, kBlockN = 64;

// Keys or values: (B, H_kv, S, D), or with a block table a pool of pages (pages, H_kv, page, D). Strides in elements.
struct Keys {
  const void* data;
  int64_t stride_b, stride_h, stride_s;
  const float* scale;  // (B, H_kv, S) or (pages, H_kv, page) for elements of 8 bits, or null
  int64_t scale_stride_b, scale_stride_h, scale_stride_s;
};

struct AttentionForward {
  const void* q;              // (B, H, T, D), last dimension contiguous
  Keys k, v;
  void* out;                  // (B, H, T, D)
  float* lse;                 // (B, H, T) contiguous, natural log
  const int32_t* kv_lengths;  // (B,) keys of each sequence, or null for S
  const int32_t* block_table; // (B, S / page) page of each `page` keys, or null
  int64_t table_stride_b, table_stride_p, page;
  Element element;            // of q and out
  Element key_element;        // of k and v
  bool causal;                // bottom-right aligned
  int64_t window;             // keys that a query sees at most, up to its own position
  float scale;
  int64_t B, H, H_kv, T, S, D;
  // In elements.
  int64_t q_stride_b, q_stride_h, q_stride_t;
  int64_t out_stride_b, out_stride_h, out_stride_t;
  int64_t kv_length_stride;

  // The queries of the heads that share a key/value head form one list of `rows`, cut into blocks of kBlockM, so that
  // keys and values are read once for all of them. A task is one block of one (b, h_kv).
  int64_t rows() const { return H / H_kv * T; }
  int64_t blocks() const { return (rows() + kBlockM - 1) / kBlockM; }
  int64_t tasks() const { return B * H_kv * blocks(); }
};

// Floats of scratch memory, 64-byte aligned, that a thread needs for head dim D.
constexpr int64_t attention_workspace(int64_t D) {
  const int64_t padded = (D + 15) / 16 * 16;
  return 2 * padded * kBlockM + kBlockM * kBlockN + 2 * kBlockN * padded + 5 * kBlockM;
}

}  // namespace fastgpt
