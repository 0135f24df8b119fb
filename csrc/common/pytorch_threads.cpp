#include "common/pytorch_threads.h"

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fastgpt {
namespace {

thread_local int depth = 0, outside = 0, mkl_outside = 0;  // nesting of begin and end, and the numbers of threads outside

// Looks up a function in the libraries that PyTorch is linked with: a process may hold several OpenMP runtimes.
template <typename Function>
Function* find(const char* name) {
#if defined(__linux__)
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch ? reinterpret_cast<Function*>(dlsym(torch, name)) : nullptr;
#else
  static_cast<void>(name);
  return nullptr;
#endif
}

void set_openmp_threads(int threads) {
  static auto* const set = find<void(int)>("omp_set_num_threads");
  if (set) set(threads);
}

// Sets the number of MKL threads of the calling thread (0: the global number), and returns the previous one.
int set_mkl_threads(int threads) {
  static auto* const set = find<int(int)>("MKL_Set_Num_Threads_Local");
  return set ? set(threads) : 0;
}

}  // namespace

void begin_one_thread() {
  if (depth++ > 0) return;
  outside = static_cast<int>(torch::stable::get_num_threads());
  if (outside == 1) return;
  set_openmp_threads(1);
  mkl_outside = set_mkl_threads(1);
}

void end_one_thread() {
  if (--depth > 0 || outside == 1) return;
  set_openmp_threads(outside);
  set_mkl_threads(mkl_outside);
}

int64_t num_threads() { return depth > 0 ? outside : torch::stable::get_num_threads(); }

}  // namespace fastgpt
