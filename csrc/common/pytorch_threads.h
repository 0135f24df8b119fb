// PyTorch's threads, which spin for some milliseconds after each operation of theirs, on the CPUs that a team's members want.

#pragma once

#include <cstdint>

namespace fastgpt {

// Between these two, PyTorch's operations use one thread, if this thread calls them and PyTorch has OpenMP. Pairs may be
// nested. Unlike torch.set_num_threads, which is for the whole process and stops threads of other pools, this takes a fraction
// of a microsecond.
void begin_one_thread();
void end_one_thread();

// The threads that fastgpt's operations may use: torch.get_num_threads() outside of such a pair.
int64_t num_threads();

}  // namespace fastgpt
