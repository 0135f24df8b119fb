// The arguments of the CPU kernels of `route` and `moe`. The products of `moe` are those of `linear`.

#pragma once

#include <cstdint>

#include "common/elements.h"

namespace fastgpt {

// For each row of logits, the experts with the largest scores: softmax or sigmoid, plus a bias that matters only for choosing.
struct Routing {
  Element element;  // of the logits
  int64_t rows, experts, top_k;
  const void* logits;  // (rows, experts)
  const float* bias;   // (experts,) or null
  bool sigmoid;
  int64_t groups, top_groups;  // experts lie in `groups` groups, and only those of the best `top_groups` can be chosen
  bool top2;                   // a group's score is the sum of its two largest, not the largest
  bool normalize;              // weights are divided by their sum
  float scale;                 // of the weights
  int32_t* chosen;             // (rows, top_k)
  float* weights;              // (rows, top_k)

  int64_t group_size() const { return experts / groups; }
};

// Adds up products of experts, a batch of (row, k) pairs at a time, in the order of their places: pairs are sorted by expert.
// With the last batch: out = residual + sum_k weights[k] · products[k].
struct ExpertSums {
  Element element;  // of residual and out
  int64_t columns, top_k;
  const float* weights;   // (rows, top_k)
  const int64_t* order;   // the pairs in order: row · top_k + k
  const int64_t* places;  // (rows, top_k): where in `order` the pairs of a row are, ascending
  int64_t begin, end;     // places of this batch
  bool is_last;           // of all batches
  const float* products;  // (end - begin, columns)
  const void* residual;   // (rows, columns) or null
  float* totals;          // (rows, columns): sums of the batches before, at first zeros; null if this is the only one
  void* out;              // (rows, columns)
};

}  // namespace fastgpt
