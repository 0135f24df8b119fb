// The products of `linear` on the CPU, for `linear` and `moe`.

#pragma once

#include <atomic>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "linear/linear.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(
    int64_t linear_most_rows(const Linear& l);     // of x at a time
    bool linear_multiplies_many(const Linear& l);  // by the kernel of many rows
    // Floats of x as linear_inputs lays it out, and of scratch memory that it and linear_outputs need.
    int64_t linear_inputs_size(const Linear& l); int64_t linear_inputs_scratch(const Linear& l);
    int64_t linear_outputs_scratch(const Linear& l);
    void linear_inputs(const Linear& l, float* x, float* scratch, int64_t begin, int64_t end);
    void linear_outputs(const Linear& l, const float* x, float* scratch, int64_t begin, int64_t end, int64_t next);)

namespace fastgpt {

constexpr int64_t kLeastFeatures = 16;  // minimum number of output features per part

// A table is read in the time that conversion takes alone, without the broadcast after it.
const float* values_of_halves();

// Whether each thread lays out all of x for itself, not all threads a part. Copying lines of the cache between cores takes
// longer, up to an eighth of a product with 768 features on two cores of Zen 4. Laying out an element takes as long as about 8
// multiply-adds, so that many threads, with few output features each, share it.
inline bool threads_lay_out(const Linear& l) {
  const int64_t threads = team_threads() ? team_threads() : num_threads();
  return FASTGPT_AT_CPU_LEVEL(linear_multiplies_many)(l) && l.weight_rows() >= 64 * threads;
}

// Numbers that no other operation gets, from the result on: keys of linear_outputs_of_thread.
inline int64_t new_keys(int64_t count) {
  static std::atomic<int64_t> next{1};
  return next.fetch_add(count, std::memory_order_relaxed);
}

// As linear_outputs, with x laid out by this thread, once for all its calls in a row with this key.
inline void linear_outputs_of_thread(const Linear& l, int64_t key, int64_t begin, int64_t end, int64_t next) {
  thread_local int64_t laid_out = 0;
  const int64_t size = (FASTGPT_AT_CPU_LEVEL(linear_inputs_size)(l) + 15) / 16 * 16;  // in whole lines of the cache
  const int64_t more = std::max(
      FASTGPT_AT_CPU_LEVEL(linear_inputs_scratch)(l), FASTGPT_AT_CPU_LEVEL(linear_outputs_scratch)(l));
  float *const x = thread_scratch(size + more), *const memory = x + size;
  if (laid_out != key) FASTGPT_AT_CPU_LEVEL(linear_inputs)(l, x, memory, 0, l.row_blocks());
  laid_out = key;
  FASTGPT_AT_CPU_LEVEL(linear_outputs)(l, x, memory, begin, end, next);
}

}  // namespace fastgpt
