// Queries that share a key/value head, as rows, and the range of keys that each sees.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "attention/attention.h"
#include "common/cpu_level.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Numbers of queries and keys of a sequence, and the rows where they begin: 0 unless sequences are packed.
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

// Up to kBlockM rows, from `first` on, of the list of queries that share key/value head h_kv of sequence b: all tokens of the
// first head, then those of the next one. one_token: those of token `first` alone.
struct QueryRows {
  QueryRows(const Attention& args, int64_t b, int64_t h_kv, int64_t first, bool one_token)
      : b(b), h_kv(h_kv), sequence(sequence_of(args, b)), first_begin(args.S), first_end(args.S) {
    const int64_t T = sequence.queries, group = args.H / args.H_kv, apart = one_token ? T : 1;
    const int64_t left = one_token ? (first < T ? group : 0) : group * T - first;
    count = left < 0 ? 0 : left < kBlockM ? left : kBlockM;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = (first + r * apart) % T, h = h_kv * group + (first + r * apart) / T;
      const int64_t begin = keys_before(args, t), end = keys_seen(args, t);
      token[r] = static_cast<int32_t>(t), head[r] = static_cast<int32_t>(h);
      key_begin[r] = static_cast<int32_t>(begin), key_end[r] = static_cast<int32_t>(end);
      if (args.alibi_slopes) slope[r] = args.alibi_slopes[h];
      first_begin = begin < first_begin ? begin : first_begin, last_begin = begin > last_begin ? begin : last_begin;
      first_end = end < first_end ? end : first_end, last_end = end > last_end ? end : last_end;
    }
  }

  const int64_t b, h_kv;
  const Sequence sequence;
  int64_t count;
  // Minimum and maximum over the rows of key_begin and of key_end.
  int64_t first_begin, last_begin = 0, first_end, last_end = 0;
  // Per row: its token and head, the range of keys that it sees, [key_begin, key_end), and ALiBi's slope. Zero past `count`.
  int32_t token[kBlockM] = {}, head[kBlockM] = {}, key_begin[kBlockM] = {}, key_end[kBlockM] = {};
  float slope[kBlockM] = {};

 private:
  // Causal, window and lengths: query t sees the keys from keys_before(t) to keys_seen(t).
  int64_t keys_seen(const Attention& args, int64_t t) const {
    const int64_t length = sequence.keys, keys = args.causal ? length - sequence.queries + t + 1 : length;
    return keys < 0 ? 0 : keys < length ? keys : length;
  }
  int64_t keys_before(const Attention& args, int64_t t) const {
    const int64_t length = sequence.keys, keys = length - sequence.queries + t + 1 - args.window;
    return keys < 0 ? 0 : keys < length ? keys : length;
  }
};

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
