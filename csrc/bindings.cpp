// The Python module fastgpt._C: facts about the build, and helpers that run on the host.
// The operations are not here; their files register themselves with PyTorch when this library loads.

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "cpu_level.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

py::list words(const char* text) {
  std::istringstream stream(text);
  py::list list;
  for (std::string word; stream >> word;) list.append(word);
  return list;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["torch_target_version"] =
      std::to_string(TORCH_TARGET_VERSION >> 56) + "." + std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
  info["cpu_levels"] = words(FASTGPT_CPU_LEVELS);
  info["cpu_level"] = fastgpt::cpu_level_name(fastgpt::cpu_level());
  info["cuda_archs"] = words(FASTGPT_CUDA_ARCHS);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info, R"(What this build holds, as a dict.

compiler: its name and version; torch_target_version: the oldest torch it loads on; cpu_levels:
the instruction sets compiled in; cpu_level: the one in use; cuda_archs: GPU architectures of
libfastgpt_cuda.so, [] if that was not built.

Raises ValueError if FASTGPT_CPU_LEVEL names a level that is unknown or that this CPU lacks.)");
}
