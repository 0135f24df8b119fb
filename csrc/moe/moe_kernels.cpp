// `route`, and the sums over the experts of `moe`.

#include "common/integers.h"
#include "common/vector_math.h"
#include "moe/moe.h"
#include "norm/normalize.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

// Larger for the larger number, then for the smaller index; NaN is the largest.
uint64_t key_of(float number, int64_t index) {
  number += 0.0f;  // -0 as 0
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  const uint32_t ordered = number != number ? ~uint32_t{0} : bits >> 31 ? ~bits : bits | uint32_t{1} << 31;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(index);
}

int64_t index_of(uint64_t key) { return ~static_cast<uint32_t>(key); }

// Inserts a key into the `count` largest so far, in descending order.
void insert(uint64_t key, uint64_t* largest, int64_t count) {
  if (key <= largest[count - 1]) return;
  int64_t i = count - 1;
  for (; i > 0 && largest[i - 1] < key; --i) largest[i] = largest[i - 1];
  largest[i] = key;
}

// The scores of zero-padded logits, in place.
void score(float* x, int64_t count, bool sigmoid) {
  if (sigmoid) {
    for (int64_t c = 0; c < count; c += kWidth) {
      const Vector y = load(x + c), e = exp_nonpositive<true>(y < 0.0f ? y : -y);
      store(x + c, (y < 0.0f ? e : broadcast(1.0f)) / (1.0f + e));
    }
    return;
  }
  for (int64_t c = count; c < padded(count); ++c) x[c] = -kInfinity;
  Vector highest = broadcast(-kInfinity), total = {};
  for (int64_t c = 0; c < count; c += kWidth) highest = maximum(load(x + c), highest);
  const float largest = maximum(highest);
  for (int64_t c = 0; c < count; c += kWidth) {
    const Vector e = exp_nonpositive<true>(load(x + c) - largest);
    store(x + c, e);
    total += e;
  }
  const float sum_of_all = sum(total);
  for (int64_t c = 0; c < count; c += kWidth) store(x + c, load(x + c) / sum_of_all);
}

// The best groups: largest[0] to largest[top_groups - 1].
void choose_groups(const Routing& r, const float* choice, uint64_t* largest) {
  std::memset(largest, 0, r.top_groups * sizeof *largest);
  for (int64_t g = 0; g < r.groups; ++g) {
    float first = -kInfinity, second = -kInfinity;  // the two largest
    for (int64_t e = g * r.group_size(); e < (g + 1) * r.group_size(); ++e) {
      const float x = choice[e];
      if (x > first || x != x) {
        second = first, first = x;
      } else if (x > second) {
        second = x;
      }
    }
    insert(key_of(r.top2 ? first + second : first, g), largest, r.top_groups);
  }
}

}  // namespace

// Floats of scratch memory.
int64_t route_scratch(const Routing& r) { return 2 * padded(r.experts) + 2 * (r.top_k + r.top_groups); }

void route_rows(const Routing& r, float* scratch, int64_t begin, int64_t end) {
  float *const scores = scratch, *const choice = scratch + padded(r.experts);
  auto* const best = reinterpret_cast<uint64_t*>(choice + padded(r.experts));
  uint64_t* const best_groups = best + r.top_k;
  for (int64_t row = begin; row < end; ++row) {
    convert_padded(r.logits, row * r.experts, r.experts, r.element, scores);
    score(scores, r.experts, r.sigmoid);
    for (int64_t e = 0; e < r.experts; ++e) choice[e] = r.bias ? scores[e] + r.bias[e] : scores[e];
    std::memset(best, 0, r.top_k * sizeof *best);
    const auto insert_group = [&](int64_t first, int64_t count) {
      for (int64_t e = first; e < first + count; ++e) insert(key_of(choice[e], e), best, r.top_k);
    };
    if (r.top_groups < r.groups) {
      choose_groups(r, choice, best_groups);
      for (int64_t i = 0; i < r.top_groups; ++i) insert_group(index_of(best_groups[i]) * r.group_size(), r.group_size());
    } else {
      insert_group(0, r.experts);
    }
    float sum = 0.0f;
    for (int64_t k = 0; k < r.top_k; ++k) sum += scores[index_of(best[k])];
    for (int64_t k = 0; k < r.top_k; ++k) {
      const int64_t e = index_of(best[k]);
      r.chosen[row * r.top_k + k] = static_cast<int32_t>(e);
      r.weights[row * r.top_k + k] = (r.normalize ? scores[e] / sum : scores[e]) * r.scale;
    }
  }
}

void moe_sum(const ExpertSums& s, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 256;  // at a time
  alignas(64) float sums[kColumns], other[kColumns];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* const places = s.places + row * s.top_k;
    const auto is_in_batch = [&](int64_t k) { return places[k] >= s.begin && places[k] < s.end; };
    bool has_pairs = s.is_last;
    for (int64_t k = 0; k < s.top_k; ++k) has_pairs |= is_in_batch(k);
    if (!has_pairs) continue;  // else the time would grow with the number of rows times that of batches
    for (int64_t c = 0; c < s.columns; c += kColumns) {
      const int64_t count = smaller(kColumns, s.columns - c), offset = row * s.columns + c;
      const auto add = [&](const void* source, int64_t from, Element element, float factor) {
        convert_padded(source, from, count, element, other);
        for (int64_t i = 0; i < count; i += kWidth) store(sums + i, load(sums + i) + factor * load(other + i));
      };
      if (s.totals && s.begin > 0) {
        convert_padded(s.totals, offset, count, Element::float32, sums);
      } else {
        std::memset(sums, 0, sizeof sums);
      }
      for (int64_t k = 0; k < s.top_k; ++k) {
        if (!is_in_batch(k)) continue;
        add(s.products, (places[k] - s.begin) * s.columns + c, Element::float32, s.weights[s.order[places[k]]]);
      }
      if (!s.is_last) {
        write(sums, count, s.totals, offset, Element::float32);
        continue;
      }
      if (s.residual) add(s.residual, offset, s.element, 1.0f);
      write(sums, count, s.out, offset, s.element);
    }
  }
}

}  // namespace fastgpt::FASTGPT_CPU_LEVEL
