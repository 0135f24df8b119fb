#include "cpu_level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastgpt {
namespace {

constexpr CpuLevel kLevels[] = {CpuLevel::baseline, CpuLevel::avx2, CpuLevel::avx512};

// Counts the operating system's support too: without it the registers' upper halves are lost.
bool supported(CpuLevel level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl");
#else
  const bool avx2 = false, avx512 = false;
#endif
  return level == CpuLevel::baseline || (level == CpuLevel::avx2 ? avx2 : avx512);
}

CpuLevel choose() {
  const char* forced = std::getenv("FASTGPT_CPU_LEVEL");
  const std::string name = forced ? forced : "";
  CpuLevel best = CpuLevel::baseline;
  std::string usable;
  for (CpuLevel level : kLevels) {
    if (!supported(level)) continue;
    if (name == cpu_level_name(level)) return level;
    best = level;
    usable += (usable.empty() ? "" : ", ") + std::string(cpu_level_name(level));
  }
  if (name.empty()) return best;
  throw std::invalid_argument(
      "FASTGPT_CPU_LEVEL: expected one of " + usable + " on this CPU, got '" + name + "'");
}

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel level = choose();
  return level;
}

const char* cpu_level_name(CpuLevel level) {
  return level == CpuLevel::avx512 ? "avx512" : level == CpuLevel::avx2 ? "avx2" : "baseline";
}

}  // namespace fastgpt
