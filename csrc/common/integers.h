// Integer arithmetic for loops. std::min and std::max would be inline functions that all CPU levels share (see cpu_level.h).

#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace
}  // namespace fastgpt::FASTGPT_CPU_LEVEL
