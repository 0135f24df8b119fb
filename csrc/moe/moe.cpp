// `route` and `moe` on the CPU: unpacking, parallel tasks, and dispatch to the kernels of the CPU level.

#include "moe/moe.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "common/arena.h"
#include "common/contiguous_memory.h"
#include "common/cpu_level.h"
#include "common/parallel.h"
#include "decode_step/plan.h"
#include "linear/blocks.h"
#include "linear/products.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(
    int64_t route_scratch(const Routing& r); void route_rows(const Routing& r, float* scratch, int64_t begin, int64_t end);
    void moe_sum(const ExpertSums& s, int64_t begin, int64_t end);)

namespace fastgpt {
namespace {

using torch::headeronly::ScalarType;

// (row, expert) pairs whose products are in memory at a time. More would be read from it, fewer would read experts' weights
// more often.
constexpr int64_t kMaxPairs = 1024;

// The data of a tensor of one dtype, which is copied if it is not contiguous.
class Numbers {
 public:
  const void* of(const Tensor& x, const char* name, int64_t size) {
    check_cpu(x, name);
    check_storage(x, name, size);
    if (x.is_contiguous()) return x.const_data_ptr();
    return copies_.emplace_back(torch::stable::contiguous(x)).const_data_ptr();
  }
  bool copied() const { return !copies_.empty(); }

 private:
  std::vector<Tensor> copies_;
};

int64_t rows_of(const Tensor& x, const char* name) {
  FASTGPT_CHECK(x.dim() >= 1, name, ": expected at least one dimension");
  int64_t rows = 1;
  for (int64_t i = 0; i < x.dim() - 1; ++i) rows *= x.size(i);
  return rows;
}

std::tuple<Tensor, Tensor> route_cpu(
    const Tensor& logits, int64_t top_k, bool sigmoid, const std::optional<Tensor>& selection_bias, int64_t num_groups,
    int64_t top_groups, bool top2, bool normalize, double scale) {
  Routing r{};
  r.rows = rows_of(logits, "logits");
  r.experts = logits.size(logits.dim() - 1);
  r.top_k = top_k, r.groups = num_groups, r.top_groups = top_groups;
  FASTGPT_CHECK(num_groups >= 1 && r.experts % num_groups == 0, "num_groups: expected a divisor of ", r.experts, " experts");
  FASTGPT_CHECK(top_groups >= 1 && top_groups <= num_groups, "top_groups: expected a number from 1 to ", num_groups);
  FASTGPT_CHECK(
      !top2 || top_groups == num_groups || r.group_size() > 1, "num_groups: expected groups of at least 2 experts for top2");
  FASTGPT_CHECK(
      top_k >= 1 && top_k <= top_groups * r.group_size(), "top_k: expected a number from 1 to ", top_groups * r.group_size(),
      ", got ", top_k);
  constexpr float kLargest = std::numeric_limits<float>::max();
  FASTGPT_CHECK(std::abs(scale) <= kLargest, "scale: expected a finite number of fp32, got ", scale);
  r.sigmoid = sigmoid, r.top2 = top2, r.normalize = normalize, r.scale = static_cast<float>(scale);
  ContiguousMemory memory(logits, "logits");
  r.element = memory.element();
  r.logits = memory.of(logits, "logits");
  Numbers numbers;
  if (selection_bias) {
    check_dtype(*selection_bias, "selection_bias", ScalarType::Float);
    check_shape(*selection_bias, "selection_bias", {r.experts});
    r.bias = static_cast<const float*>(numbers.of(*selection_bias, "selection_bias", sizeof(float)));
  }
  std::vector<int64_t> shape = shape_of(logits), strides(shape.size(), 1);
  shape.back() = top_k;
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  const auto make = [&](int32_t dtype) { return new_empty(logits, shape.size(), shape.data(), strides.data(), dtype); };
  Tensor experts = make(aoti_torch_dtype_int32()), weights = make(aoti_torch_dtype_float32());
  r.chosen = static_cast<int32_t*>(experts.mutable_data_ptr()), r.weights = static_cast<float*>(weights.mutable_data_ptr());
  const auto operation = [r] {
    // A score takes about as long as 16 multiply-adds.
    for_tasks(r.rows, 16 * r.experts + 1, [&](int64_t begin, int64_t end) {
      FASTGPT_AT_CPU_LEVEL(route_rows)(r, thread_scratch(FASTGPT_AT_CPU_LEVEL(route_scratch)(r)), begin, end);
    });
  };
  memory.copied() || numbers.copied() ? operation() : perform(operation);  // a plan must not read a stale copy again
  return {experts, weights};
}

struct Moe {
  Linear up, down;                                               // of the first expert
  int64_t up_bytes, down_bytes, up_bias_bytes, down_bias_bytes;  // of an expert
  int64_t rows, experts, top_k;
  const void* chosen;  // (rows, top_k) int32 or int64
  bool chosen_is_int64;
  const float* weights;  // (rows, top_k)
  const void* residual;  // (rows, down.out_features) or null
  void* out;             // (rows, down.out_features)

  int64_t pairs() const { return rows * top_k; }
};

// Up to linear_most_rows rows that have chosen the same expert: their products with its matrices, and x and h as these read
// them.
struct ExpertRows {
  Linear up, down;
  float *x, *h;  // or null, if threads lay them out for themselves
};

// What a call computes with, kept for the next one of a plan.
class MoeMemory {
 public:
  std::vector<int64_t> ends, order, rows, places, filled;
  std::vector<ExpertRows> groups;

  float* floats(int64_t count) {
    if (size_ < count) floats_ = scratch(count), size_ = count;
    return floats_.get();
  }

 private:
  Scratch floats_;
  int64_t size_ = 0;
};

// Sorts pairs by expert, those of an expert by row.
void sort(const Moe& m, MoeMemory& memory) {
  const auto expert_of = [&](int64_t pair) {
    return m.chosen_is_int64 ? static_cast<const int64_t*>(m.chosen)[pair] : static_cast<const int32_t*>(m.chosen)[pair];
  };
  int64_t least = m.experts, most = -1;
  for (int64_t pair = 0; pair < m.pairs(); ++pair) {
    least = std::min(least, expert_of(pair)), most = std::max(most, expert_of(pair));
  }
  FASTGPT_CHECK(
      least >= 0 && most < m.experts, "experts: expected indices from 0 to ", m.experts - 1, ", got ", least, " to ", most);
  memory.ends.assign(m.experts + 1, 0);  // ends[e]: of expert e's pairs, once they are sorted
  for (int64_t pair = 0; pair < m.pairs(); ++pair) ++memory.ends[expert_of(pair) + 1];
  for (int64_t e = 0; e < m.experts; ++e) memory.ends[e + 1] += memory.ends[e];
  memory.order.resize(m.pairs()), memory.rows.resize(m.pairs());
  for (int64_t pair = 0; pair < m.pairs(); ++pair) {
    const int64_t place = memory.ends[expert_of(pair)]++;
    memory.order[place] = pair, memory.rows[place] = pair / m.top_k;
  }
  memory.ends.pop_back();
  memory.places.resize(m.pairs()), memory.filled.assign(m.rows, 0);
  for (int64_t place = 0; place < m.pairs(); ++place) {
    const int64_t row = memory.rows[place];
    memory.places[row * m.top_k + memory.filled[row]++] = place;
  }
}

const void* advanced(const void* start, int64_t bytes) { return start ? static_cast<const char*>(start) + bytes : nullptr; }

// The rows of expert e at `count` places from `place` on.
ExpertRows expert_rows(const Moe& m, const MoeMemory& memory, int64_t e, int64_t place, int64_t count) {
  ExpertRows group{m.up, m.down, nullptr, nullptr};
  group.up.rows = group.down.rows = count;
  group.up.x_rows = &memory.rows[place];
  group.up.weight = advanced(m.up.weight, e * m.up_bytes), group.down.weight = advanced(m.down.weight, e * m.down_bytes);
  group.up.bias = advanced(m.up.bias, e * m.up_bias_bytes), group.down.bias = advanced(m.down.bias, e * m.down_bias_bytes);
  return group;
}

// Lays out x, or h, of all groups, where the threads that multiply do not.
void lay_out(const std::vector<ExpertRows>& all, Linear ExpertRows::* product, float* ExpertRows::* target) {
  std::vector<ExpertRows> groups;
  int64_t rows = 0;
  for (const ExpertRows& group : all) {
    if (group.*target) groups.push_back(group), rows += (group.*product).rows;
  }
  if (groups.empty()) return;
  const auto lay_out_group = [&](const ExpertRows& group, int64_t begin, int64_t end) {
    const Linear& l = group.*product;
    float* memory = thread_scratch(FASTGPT_AT_CPU_LEVEL(linear_inputs_scratch)(l));
    FASTGPT_AT_CPU_LEVEL(linear_inputs)(l, group.*target, memory, begin, end);
  };
  const int64_t count = groups.size(), work = 16 * (groups[0].*product).in * (rows / count) + 1;
  if (count == 1) {  // an element takes about as long as 16 multiply-adds
    const int64_t blocks = (groups[0].*product).row_blocks();
    return for_tasks(blocks, work / blocks + 1, [&](int64_t begin, int64_t end) { lay_out_group(groups[0], begin, end); });
  }
  for_tasks(count, work, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) lay_out_group(groups[g], 0, (groups[g].*product).row_blocks());
  });
}

// The products of all groups, of which threads take parts: the features of one group after those of the other.
void multiply(const std::vector<ExpertRows>& groups, Linear ExpertRows::* product, float* ExpertRows::* x) {
  const int64_t features = (groups[0].*product).out_features, count = groups.size() * features;
  const int64_t keys = new_keys(groups.size());
  const auto outputs = [&](int64_t begin, int64_t end, int64_t next) {
    for (int64_t stop; begin < end; begin = stop) {
      const ExpertRows& group = groups[begin / features];
      const Linear& l = group.*product;
      const int64_t first = begin / features * features;
      stop = std::min(end, first + features);
      const int64_t after = stop < end ? features : std::min(next - first, features);  // `features`: not of this group
      if (!(group.*x)) {
        linear_outputs_of_thread(l, keys + begin / features, begin - first, stop - first, after);
        continue;
      }
      float* memory = thread_scratch(FASTGPT_AT_CPU_LEVEL(linear_outputs_scratch)(l));
      FASTGPT_AT_CPU_LEVEL(linear_outputs)(l, group.*x, memory, begin - first, stop - first, after);
    }
  };
  int64_t work = 0;
  for (const ExpertRows& group : groups) work += (group.*product).rows * (group.*product).in * (group.*product).weight_rows();
  if (work <= grain()) return outputs(0, count, count);
  for_parts(count, kLeastFeatures, outputs);
}

void run(const Moe& m, MoeMemory& memory) {
  if (!m.rows) return;
  sort(m, memory);
  const int64_t columns = m.down.out_features, pairs = m.pairs();
  const int64_t most = FASTGPT_AT_CPU_LEVEL(linear_most_rows)(m.up);
  const bool in_batches = pairs > kMaxPairs;
  std::vector<float> totals(in_batches ? m.rows * columns : 0);
  for (int64_t begin = 0, expert = 0, end; begin < pairs; begin = end) {
    memory.groups.clear();
    for (end = begin; end < pairs;) {
      while (memory.ends[expert] <= end) ++expert;
      const int64_t left = memory.ends[expert] - end, blocks = (left + most - 1) / most;
      // Blocks of about equal numbers of rows, as each reads all weights.
      const int64_t step = std::min(left, (left + blocks * kRowBlock - 1) / (blocks * kRowBlock) * kRowBlock);
      if (end > begin && end + step > begin + kMaxPairs) break;
      memory.groups.push_back(expert_rows(m, memory, expert, end, step));
      end += step;
    }
    const bool shares_x = m.rows == 1 && static_cast<int64_t>(memory.groups.size()) == end - begin;  // each has this row once
    float *activated = nullptr, *products = nullptr;
    const auto take_all = [&](Arena arena) {
      activated = arena.take((end - begin) * m.up.out_features), products = arena.take((end - begin) * columns);
      for (ExpertRows& group : memory.groups) {
        const bool has_x = shares_x && &group != memory.groups.data();
        const auto take_for = [&](const Linear& l) {
          return threads_lay_out(l) ? nullptr : arena.take(FASTGPT_AT_CPU_LEVEL(linear_inputs_size)(l));
        };
        group.x = has_x ? memory.groups[0].x : take_for(group.up);
        group.h = take_for(group.down);
      }
      return arena.taken();
    };
    take_all(Arena(memory.floats(take_all(Arena(nullptr)))));
    int64_t done = 0;
    for (ExpertRows& group : memory.groups) {
      group.up.out = activated + done * m.up.out_features, group.down.x = group.up.out;
      group.down.out = products + done * columns;
      done += group.up.rows;
    }
    if (shares_x) {
      lay_out({memory.groups[0]}, &ExpertRows::up, &ExpertRows::x);
    } else {
      lay_out(memory.groups, &ExpertRows::up, &ExpertRows::x);
    }
    multiply(memory.groups, &ExpertRows::up, &ExpertRows::x);
    lay_out(memory.groups, &ExpertRows::down, &ExpertRows::h);
    multiply(memory.groups, &ExpertRows::down, &ExpertRows::h);
    const ExpertSums sums{
        m.up.element, columns, m.top_k,      m.weights, memory.order.data(), memory.places.data(),
        begin,        end,     end == pairs, products,  m.residual,          in_batches ? totals.data() : nullptr,
        m.out};
    for_tasks(m.rows, (2 * m.top_k + 16) * columns + 1, [&](int64_t first, int64_t last) {
      FASTGPT_AT_CPU_LEVEL(moe_sum)(sums, first, last);
    });
  }
}

struct Surroundings {  // of the experts' matrices
  const Tensor &experts, &weights;
  const std::optional<Tensor>&up_bias, &down_bias, &residual;
  int64_t activation;
  bool gated;
};

// m: with the matrices' memory and sizes, and the number of experts.
Tensor run_moe(Moe m, const Tensor& x, ContiguousMemory& memory, const Surroundings& with) {
  const int64_t number = with.activation, most = static_cast<int64_t>(Activation::swiglu_clamped);
  FASTGPT_CHECK(number >= 0 && number <= most, "activation: unknown number ", number);
  FASTGPT_CHECK(number != most || with.gated, "activation: expected gated for swiglu_clamped");
  std::vector<int64_t> shape = shape_of(x);
  m.rows = rows_of(x, "x"), m.up.many = m.down.many = m.rows > kMaxRows;
  m.top_k = with.experts.dim() ? with.experts.size(with.experts.dim() - 1) : 0;
  FASTGPT_CHECK(m.top_k >= 1 && m.up.in >= 1, "experts: expected shape (..., K), an expert at least of each row of x (..., C)");
  shape.back() = m.top_k;
  check_shape(with.experts, "experts", shape), check_shape(with.weights, "weights", shape);
  Numbers numbers;
  m.chosen_is_int64 = with.experts.scalar_type() == ScalarType::Long;
  if (!m.chosen_is_int64) check_dtype(with.experts, "experts", ScalarType::Int);
  m.chosen = numbers.of(with.experts, "experts", m.chosen_is_int64 ? 8 : 4);
  check_dtype(with.weights, "weights", ScalarType::Float);
  m.weights = static_cast<const float*>(numbers.of(with.weights, "weights", sizeof(float)));
  shape.back() = m.up.in;

  m.up.element = m.up.x_element = m.down.element = memory.element();
  m.up.out_element = m.down.x_element = m.down.out_element = Element::float32;
  m.up.x = memory.of(x, "x");
  m.up.activation = static_cast<Activation>(number), m.up.gated = with.gated;
  const int64_t size = size_of(memory.element());
  m.up.bias = memory.of(with.up_bias, "up_bias", {m.experts, m.up.weight_rows()});
  m.down.bias = memory.of(with.down_bias, "down_bias", {m.experts, m.down.out_features});
  m.up_bias_bytes = m.up.weight_rows() * size, m.down_bias_bytes = m.down.out_features * size;
  m.residual = memory.of(with.residual, "residual", shape);
  const Tensor out = new_empty(x, shape);
  m.out = out.mutable_data_ptr();
  const auto kept = std::make_shared<MoeMemory>();
  const auto operation = [m, kept] { run(m, *kept); };
  memory.copied() || numbers.copied() ? operation() : perform(operation);  // a plan must not read a stale copy again
  return out;
}

Tensor moe_cpu(
    const Tensor& x, const Tensor& experts, const Tensor& weights, const Tensor& up, const Tensor& down,
    const std::optional<Tensor>& up_bias, const std::optional<Tensor>& down_bias, const std::optional<Tensor>& residual,
    int64_t activation, bool gated) {
  FASTGPT_CHECK(x.dim() >= 1, "x: expected shape (..., C)");
  FASTGPT_CHECK(up.dim() == 3 && up.size(2) == x.size(x.dim() - 1), "up: expected shape (E, rows, C)");
  FASTGPT_CHECK(!gated || up.size(1) % 2 == 0, "up: expected an even number of rows with a gate");
  const int64_t E = up.size(0), C = up.size(2), I = gated ? up.size(1) / 2 : up.size(1);
  check_shape(down, "down", {E, C, I});
  ContiguousMemory memory(x, "x");
  const int64_t size = size_of(memory.element());
  Moe m{};
  m.experts = E;
  m.up.in = m.down.out_features = C, m.up.out_features = m.down.in = I;
  m.up.weight = memory.of(up, "up"), m.down.weight = memory.of(down, "down");
  m.up_bytes = up.size(1) * C * size, m.down_bytes = C * I * size;
  return run_moe(m, x, memory, {experts, weights, up_bias, down_bias, residual, activation, gated});
}

// Experts' matrices one below the other: (E · rows, bytes).
Tensor moe_quantized_cpu(
    const Tensor& x, const Tensor& experts, const Tensor& weights, const Tensor& up_blocks, int64_t up_bits,
    int64_t up_group_size, bool up_minima, int64_t up_block_type, const Tensor& down_blocks, int64_t down_bits,
    int64_t down_group_size, bool down_minima, int64_t down_block_type, int64_t num_experts,
    const std::optional<Tensor>& up_bias, const std::optional<Tensor>& down_bias, const std::optional<Tensor>& residual,
    int64_t activation, bool gated) {
  FASTGPT_CHECK(x.dim() >= 1, "x: expected shape (..., C)");
  FASTGPT_CHECK(up_blocks.dim() == 2 && down_blocks.dim() == 2, "up, down: expected shape (E rows, bytes)");
  const int64_t C = x.size(x.dim() - 1), factor = gated ? 2 : 1;
  FASTGPT_CHECK(
      num_experts >= 1 && num_experts <= up_blocks.size(0) && up_blocks.size(0) % (factor * num_experts) == 0,
      "up: expected the same number of rows for each of ", num_experts, " experts");
  const int64_t I = up_blocks.size(0) / num_experts / factor;
  FASTGPT_CHECK(down_blocks.size(0) == num_experts * C, "down: expected ", num_experts * C, " rows");
  Moe m{};
  m.experts = num_experts;
  m.up.packing = {up_bits, up_group_size, up_minima, up_block_type};
  m.down.packing = {down_bits, down_group_size, down_minima, down_block_type};
  check_blocks(up_blocks, "up", m.up.packing, C, "x");
  check_blocks(down_blocks, "down", m.down.packing, I, "up");
  m.up.in = m.down.out_features = C, m.up.out_features = m.down.in = I;
  m.up.weight = up_blocks.const_data_ptr(), m.down.weight = down_blocks.const_data_ptr();
  m.up.values_of_halves = m.down.values_of_halves = values_of_halves();
  m.up_bytes = factor * I * up_blocks.size(1), m.down_bytes = C * down_blocks.size(1);
  ContiguousMemory memory(x, "x");
  return run_moe(m, x, memory, {experts, weights, up_bias, down_bias, residual, activation, gated});
}

}  // namespace
}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("route", TORCH_BOX(&fastgpt::route_cpu));
  m.impl("moe", TORCH_BOX(&fastgpt::moe_cpu));
  m.impl("moe_quantized", TORCH_BOX(&fastgpt::moe_quantized_cpu));
}
