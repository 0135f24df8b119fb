// The arguments of kv_cache_update and rope_kv_cache_update for their CPU and CUDA kernels, and the address arithmetic
// from a token to its slot. Semantics: fastgpt/ops/kv_cache_update/__init__.py.

#pragma once

#include "common/elements.h"

namespace fastgpt {

constexpr int64_t kMaxTransformedDim = 1024;  // largest head dim that can be rotated or quantized

// A tensor (B, H, N, D) or (B, H, N, D_v) with contiguous rows. Strides are in bytes.
struct Rows {
  char* data;
  int64_t stride_b, stride_h, stride_n;
};

// A tensor (B, T) of int32 or int64. Strides are in elements.
struct Indices {
  const void* data;
  bool is_int64;
  int64_t stride_b, stride_t;
};

struct KVCacheUpdate {
  int64_t B, H_kv, T;
  int64_t D, D_v;   // head dims of q and k, and of v
  Element element;  // of q, k and v
  Rows k, v;        // (B, H_kv, T, D) and (B, H_kv, T, D_v)
  Indices slots;    // (B, T): where each token is stored; negative: skipped
  // The cache: (B, H_kv, S, D or D_v), or with a block table a pool of pages (pages, H_kv, page, D or D_v).
  Element cache_element;  // `element`, int8 or float8_e4m3
  Rows k_cache, v_cache;
  Rows k_scale, v_scale;       // (B, H_kv, S) or (pages, H_kv, page) of float; data is null if the cache has none
  int64_t capacity;            // maximum number of tokens per sequence
  const int32_t* block_table;  // (B, capacity / page): the page of each `page` tokens; or null
  int64_t table_stride_b, table_stride_p;
  int64_t page, pages;  // tokens in a page, pages in the pool
  // Rotary embedding; rotary_dim is 0 without. cos, sin: (angles, rotary_dim / 2), a row for each position.
  int64_t H;          // heads of q; 0 without rotation
  Rows q, q_out;      // (B, H, T, D)
  Indices positions;  // (B, T); a token at a negative position is not rotated
  const float *cos, *sin;
  int64_t cos_stride, sin_stride;  // of a row, in elements
  int64_t angles, rotary_dim;
  bool interleaved;  // pairs are (2i, 2i + 1), not (i, i + rotary_dim / 2)
};

namespace {

FASTGPT_HOST_DEVICE char* row_of(const Rows& rows, int64_t b, int64_t h, int64_t n) {
  return rows.data + b * rows.stride_b + h * rows.stride_h + n * rows.stride_n;
}

FASTGPT_HOST_DEVICE int64_t index_at(const Indices& indices, int64_t b, int64_t t) {
  const int64_t i = b * indices.stride_b + t * indices.stride_t;
  return indices.is_int64 ? static_cast<const int64_t*>(indices.data)[i] : static_cast<const int32_t*>(indices.data)[i];
}

// A token's indices in the cache's tensors: of the first dimension (sequence or page), and of the third.
struct Slot {
  int64_t b, n;
};

constexpr int64_t kSkipped = -1, kOutside = -2, kNoPage = -3;  // a Slot's b where there is no slot

FASTGPT_HOST_DEVICE Slot slot_of(const KVCacheUpdate& u, int64_t b, int64_t t) {
  const int64_t token = index_at(u.slots, b, t);
  if (token < 0) return {kSkipped, 0};
  if (token >= u.capacity) return {kOutside, 0};
  if (u.block_table == nullptr) return {b, token};
  const uint32_t token32 = static_cast<uint32_t>(token), page = static_cast<uint32_t>(u.page);
  const int64_t index = u.block_table[b * u.table_stride_b + token32 / page * u.table_stride_p];
  if (index < 0 || index >= u.pages) return {kNoPage, 0};
  return {index, token32 % page};
}

}  // namespace
}  // namespace fastgpt
