// Arithmetic of a few queries against keys and values as they are stored: a vector runs along the head dim, every row is
// read once, and reading it prefetches one of those that come next. That spreads the memory's work evenly over ours.
//
// For files that are compiled once per CPU level: everything is in an anonymous namespace (see cpu_level.h).

#pragma once

#include <type_traits>

#include "attention.h"
#include "attention_vectors.h"

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

// function(r, rows) for all rows from r on, in blocks of kRows, and of its halves for those that remain. `rows` is an
// std::integral_constant.
template <int kRows, typename Function>
inline void in_blocks(int64_t r, int64_t end, const Function& function) {
  for (; r + kRows <= end; r += kRows) function(r, std::integral_constant<int, kRows>());
  if constexpr (kRows > 1) in_blocks<kRows / 2>(r, end, function);
}

// Asks for kBytes of each of a group's rows, one after the other.
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

// Adds kVectors' part of q[r] · k[i] to total[r · kKeys + i], lane by lane.
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

// scores[r][i] = q[r] · k[i], of `width` numbers, whole vectors. Lines of scores are kBlockN apart.
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

// acc[r][j] = acc[r][j] · rescale[r] + sum_i weights[r][i] · v[i][j] for kRows rows and kVectors vectors from j on. kKeys
// keys are added up apart, for as many sums as hide the latency of an addition.
template <int kRows, int kKeys, int kVectors, typename Stored>
inline void add_columns(
    const float* weights, const StoredRows<Stored>& v, int64_t j, const float* rescale, float* acc, int64_t acc_stride,
    bool ahead) {
  Vector total[kKeys][kRows][kVectors] = {};
  const auto add = [&](Vector (&sums)[kRows][kVectors], const float* weight, const Stored* row) {
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

// acc[r] = acc[r] · rescale[r] + sum_i weights[r][i] · v[i], of `width` numbers, whole vectors. Lines of weights are
// kBlockN apart.
template <typename Stored>
inline void add_values(
    int64_t rows, const float* weights, const StoredRows<Stored>& v, int64_t width, const float* rescale, float* acc,
    int64_t acc_stride) {
  in_blocks<2 * kTileVectors>(0, rows, [&](int64_t r, auto block) {
    constexpr int kRows = block, kKeys = kRows < 4 ? 4 / kRows : 1, kVectors = 4 * kTileVectors / (kRows * kKeys);
    int64_t j = 0;
    const auto add = [&](auto vectors) {
      add_columns<kRows, kKeys, vectors>(
          weights + r * kBlockN, v, j, rescale + r, acc + r * acc_stride, acc_stride, r == 0);
      j += vectors * kWidth;
    };
    while (j + kVectors * kWidth <= width) add(std::integral_constant<int, kVectors>());
    while (j < width) add(std::integral_constant<int, 1>());
  });
}

// scores[r][i] *= scale of i
template <typename Stored>
inline void scale_scores(int64_t rows, const StoredRows<Stored>& stored, float* scores) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < stored.count; i += kWidth) {
      store(scores + r * kBlockN + i, load(scores + r * kBlockN + i) * load(stored.scale + i));
    }
  }
}

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
