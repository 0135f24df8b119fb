// The products of `linear` on the CPU, for `linear` and `moe`.

#pragma once

#include "common/cpu_level.h"
#include "linear/linear.h"

FASTGPT_DECLARE_PER_CPU_LEVEL(
    int64_t linear_most_rows(const Linear& l);  // of x at a time
    // Floats of x as linear_inputs lays it out, and of scratch memory that it and linear_outputs need.
    int64_t linear_inputs_size(const Linear& l); int64_t linear_inputs_scratch(const Linear& l);
    int64_t linear_outputs_scratch(const Linear& l);
    void linear_inputs(const Linear& l, float* x, float* scratch, int64_t begin, int64_t end);
    void linear_outputs(const Linear& l, const float* x, float* scratch, int64_t begin, int64_t end, int64_t next);)

namespace fastgpt {

constexpr int64_t kLeastFeatures = 16;  // minimum number of output features per part

// A table is read in the time that conversion takes alone, without the broadcast after it.
const float* values_of_halves();

}  // namespace fastgpt
