// Launching a kernel on the current stream of a tensor's device. tests/cuda_on_cpu/ has a stand-in that runs kernels on
// the host.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace fastgpt {
namespace {

constexpr int kThreads = 256;  // of a block
constexpr int kWarp = 32;

// Launches a kernel with at least `threads` threads, in blocks of kThreads; nothing if 0. Does not synchronize.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t threads, const torch::stable::Tensor& like, const Arguments&... arguments) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "expected less than 2^31 blocks in one launch, got ", blocks);
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  // PyTorch's stable stream class has no native handle before 2.13.
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace fastgpt
