// The matrix products of attention: c[i][j] = sum_k left[i][k] · right[k][j] of floats. Operands are prepared once for all
// products that use them: as tiles of bfloat16 if the CPU has AMX, else as vectors of floats.

#pragma once

#if defined(__AMX_BF16__)
#include "attention/products_amx.h"
#else
#include "attention/products_vector.h"
#endif
