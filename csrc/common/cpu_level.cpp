#include "common/cpu_level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(FASTGPT_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastgpt {
namespace {

// In ascending order; a CPU supports levels of its own architecture only.
constexpr CpuLevel kLevels[] = {CpuLevel::baseline, CpuLevel::neon, CpuLevel::avx2, CpuLevel::avx512, CpuLevel::amx};

// Whether the CPU has AMX tiles and multiplies bfloat16 in them, and Linux grants this process permission to use them.
bool supports_tiles() {
#if defined(FASTGPT_HAS_AMX) && defined(__linux__)
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;  // of leaf 7's edx
  constexpr int kRequestPermission = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBFloat16) && (edx & kTiles) &&
      syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Requires the operating system's support, too: without it, context switches lose the registers' upper halves.
bool supported(CpuLevel level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  const bool avx2 = false, avx512 = false;
#endif
#if defined(__aarch64__)
  const bool neon = true;  // part of the architecture
#else
  const bool neon = false;
#endif
  switch (level) {
    case CpuLevel::baseline: return !neon;
    case CpuLevel::neon: return neon;
    case CpuLevel::avx2: return avx2;
    case CpuLevel::avx512: return avx512;
    case CpuLevel::amx: return avx512 && supports_tiles();
  }
  return false;
}

CpuFeatures find_features() {
  CpuFeatures features{};
#if defined(__x86_64__)
  // Of leaf 7's edx and ecx, and of its second part's eax.
  constexpr unsigned kFP16 = 1u << 23, kVNNI = 1u << 11, kBFloat16 = 1u << 5;
  unsigned eax, ebx, ecx, edx;
  features.amd = __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_AMD_ebx && ecx == signature_AMD_ecx;
  const bool avx512 = supported(CpuLevel::avx512);
  features.avx512_fp16 = avx512 && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kFP16);
  features.avx512_vnni = avx512 && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ecx & kVNNI);
  features.avx512_bf16 = avx512 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kBFloat16);
#endif
  return features;
}

CpuLevel choose() {
  const char* forced = std::getenv("FASTGPT_CPU_LEVEL");
  const std::string name = forced ? forced : "";
  CpuLevel best{};
  std::string usable;
  for (CpuLevel level : kLevels) {
    if (!supported(level)) continue;
    if (name == cpu_level_name(level)) return level;
    best = level;
    usable += (usable.empty() ? "" : ", ") + std::string(cpu_level_name(level));
  }
  if (name.empty()) return best;
  throw std::invalid_argument("FASTGPT_CPU_LEVEL: expected one of " + usable + " on this CPU, got '" + name + "'");
}

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel level = choose();
  return level;
}

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = find_features();
  return features;
}

const char* cpu_level_name(CpuLevel level) {
  switch (level) {
    case CpuLevel::baseline: return "baseline";
    case CpuLevel::neon: return "neon";
    case CpuLevel::avx2: return "avx2";
    case CpuLevel::avx512: return "avx512";
    case CpuLevel::amx: return "amx";
  }
  return "";
}

}  // namespace fastgpt
