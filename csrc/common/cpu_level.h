// The instruction sets that the CPU kernels are compiled for, and the choice among them at run time.
//
// Files named *_kernels.cpp are compiled once per level, with that level's -m flags and with
// FASTGPT_CPU_LEVEL defined as its name, and put their functions into a namespace of that name:
//
//     namespace fastgpt::FASTGPT_CPU_LEVEL { void scale(float* x, int64_t n, float factor) {...} }
//
// The caller, compiled for the baseline, declares and picks:
//
//     FASTGPT_DECLARE_PER_CPU_LEVEL(void scale(float* x, int64_t n, float factor);)
//     FASTGPT_AT_CPU_LEVEL(scale)(x, n, factor);
//
// Everything else in a *_kernels.cpp file belongs in an anonymous namespace, including templates and inline
// functions of headers: the linker keeps one copy of an inline function, and with the AVX-512 one, the
// baseline code would crash. tests/test_build.py checks this.

#pragma once

#if defined(FASTGPT_HAS_AMX)
#define FASTGPT_DECLARE_FOR_AMX(...) namespace fastgpt::amx { __VA_ARGS__ }
#define FASTGPT_IF_AMX(function) ::fastgpt::cpu_level() == ::fastgpt::CpuLevel::amx ? ::fastgpt::amx::function :
#else
#define FASTGPT_DECLARE_FOR_AMX(...)
#define FASTGPT_IF_AMX(function)
#endif

#if defined(__x86_64__)
#define FASTGPT_DECLARE_PER_CPU_LEVEL(...)             \
  namespace fastgpt::baseline { __VA_ARGS__ }          \
  namespace fastgpt::avx2 { __VA_ARGS__ }              \
  namespace fastgpt::avx512 { __VA_ARGS__ }            \
  FASTGPT_DECLARE_FOR_AMX(__VA_ARGS__)
#define FASTGPT_AT_CPU_LEVEL(function)                                                     \
  (FASTGPT_IF_AMX(function)                                                                \
   ::fastgpt::cpu_level() == ::fastgpt::CpuLevel::avx512 ? ::fastgpt::avx512::function     \
   : ::fastgpt::cpu_level() == ::fastgpt::CpuLevel::avx2 ? ::fastgpt::avx2::function       \
                                                         : ::fastgpt::baseline::function)
#elif defined(__aarch64__)
#define FASTGPT_DECLARE_PER_CPU_LEVEL(...) namespace fastgpt::neon { __VA_ARGS__ }
#define FASTGPT_AT_CPU_LEVEL(function) (::fastgpt::neon::function)
#else
#define FASTGPT_DECLARE_PER_CPU_LEVEL(...) namespace fastgpt::baseline { __VA_ARGS__ }
#define FASTGPT_AT_CPU_LEVEL(function) (::fastgpt::baseline::function)
#endif

namespace fastgpt {

// On 64-bit Arm the only level is neon, which every CPU has. On x86-64, amx is AVX-512 with bfloat16 tiles; baseline is plain
// x86-64 or any other architecture, with the compiler's generic vectors.
enum class CpuLevel { baseline, neon, avx2, avx512, amx };

// The best level that this CPU supports, or the one that the environment variable
// FASTGPT_CPU_LEVEL names; std::invalid_argument (ValueError in Python) if that is unknown or not
// supported here. The choice is made once.
CpuLevel cpu_level();

const char* cpu_level_name(CpuLevel level);

// What choices depend on beyond the level: the vendor, and instructions that the level does not imply.
struct CpuFeatures {
  bool amd, avx512_vnni, avx512_bf16, avx512_fp16;
};

const CpuFeatures& cpu_features();

}  // namespace fastgpt
