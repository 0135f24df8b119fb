// Dropout of attention weights: whether a weight is kept depends on the seed and its indices alone, so that the backward pass,
// and every implementation, drops the same ones.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include "attention/query_rows.h"
#include "common/vectors.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// The four words of Philox4x32-10, as in fastgpt/ops/dropout.py, for the counter (c0, c1, c2, c3) in each lane.
struct PhiloxWords {
  UIntVector word[4];
};

// The upper 32 bits of the product of each lane and a constant.
inline UIntVector high_product(UIntVector x, uint32_t factor) {
#if defined(__aarch64__)
  // NEON has no product of 64-bit lanes, which the generic code below would need.
  const uint32x4_t lanes = reinterpret_cast<uint32x4_t>(x);
  const uint64x2_t low = vmull_n_u32(vget_low_u32(lanes), factor), high = vmull_high_n_u32(lanes, factor);
  return reinterpret_cast<UIntVector>(vuzp2q_u32(vreinterpretq_u32_u64(low), vreinterpretq_u32_u64(high)));
#else
  // The products of even lanes, and of odd lanes.
  typedef uint64_t ULongVector __attribute__((vector_size(sizeof(UIntVector))));
  ULongVector pairs;
  std::memcpy(&pairs, &x, sizeof pairs);
  pairs = ((pairs & 0xffffffffu) * uint64_t{factor} >> 32) | ((pairs >> 32) * uint64_t{factor} & 0xffffffff00000000u);
  std::memcpy(&x, &pairs, sizeof x);
  return x;
#endif
}

inline PhiloxWords philox(uint64_t seed, UIntVector c0, UIntVector c1, UIntVector c2, UIntVector c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const UIntVector a = high_product(c0, 0xD2511F53u), b = high_product(c2, 0xCD9E8D57u);
    const UIntVector low_a = c0 * 0xD2511F53u, low_b = c2 * 0xCD9E8D57u;
    c0 = b ^ c1 ^ k0, c1 = low_b, c2 = a ^ c3 ^ k1, c3 = low_a;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 1 / (1 - p) for the weights of the keys from n on that are kept, 0 for the others. A line is a key, and vectors run along
// queries.
inline void load_keep_factors(const Attention& args, const QueryRows& queries, int64_t n, int64_t keys, float* factors) {
  const UIntVector b = static_cast<uint32_t>(queries.b) - UIntVector{};
  for (int64_t m = 0; m < queries.count; m += kWidth) {
    const UIntVector token = reinterpret_cast<UIntVector>(load(queries.token + m));
    const UIntVector head = reinterpret_cast<UIntVector>(load(queries.head + m));
    for (int64_t i = 0; i < keys; i += 4) {
      const UIntVector block = static_cast<uint32_t>((n + i) / 4) - UIntVector{};
      const PhiloxWords words = philox(static_cast<uint64_t>(*args.dropout_seed), block, token, head, b);
      for (int64_t j = 0; j < 4 && i + j < keys; ++j) {
        const auto kept = words.word[j] >> 1 >= args.keep_threshold;
        store(factors + (i + j) * kBlockM + m, kept ? broadcast(args.keep_scale) : Vector{});
      }
    }
  }
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
