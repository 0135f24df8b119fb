// PyTorch's threads spin for some milliseconds after each operation, on the CPUs that the team's workers need.

#pragma once

#include <cstdint>

namespace fastgpt {

// Between these two calls, PyTorch's operations on this thread use one thread, if PyTorch is built with OpenMP. Pairs may be
// nested. Unlike torch.set_num_threads, which affects the whole process and stops threads of other pools, this takes a
// fraction of a microsecond.
void begin_one_thread();
void end_one_thread();

// The threads that fastgpt's operations may use: torch.get_num_threads() outside of such a pair.
int64_t num_threads();

}  // namespace fastgpt
