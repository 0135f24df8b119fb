// Checks of the scalars of a norm, for `norm` and `linear`.

#pragma once

#include <cmath>

#include "common/tensors.h"

namespace fastgpt {
namespace {

inline void check_norm(double eps, const char* eps_name, double offset, const char* offset_name) {
  FASTGPT_CHECK(eps >= 0.0 && std::isfinite(eps), eps_name, ": expected a finite number >= 0");
  FASTGPT_CHECK(std::isfinite(offset), offset_name, ": expected a finite number");
}

}  // namespace
}  // namespace fastgpt
