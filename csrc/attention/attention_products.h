// The matrix products of attention: c[i][j] = sum_k left[i][k] · right[k][j] of floats, where j counts queries or numbers
// of a head. Operands are made once for all products that they take part in: in tiles of bfloat16 where the CPU multiplies
// such, else in vectors of floats.

#pragma once

#if defined(__AMX_BF16__)
#include "attention/products_amx.h"
#else
#include "attention/products_vector.h"
#endif
