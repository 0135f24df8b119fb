"""A linear layer with quantized weights, fused with norm, activation, gate and residual: see linear.py.

Blocks are read as they lie (fastgpt/ops/quantized_weight.py). The header of each group, 2 or 4 bytes, leaves its integers at
multiples of 2 or 4 bytes: a thread loads as many at a time, consecutive threads consecutive ones, and all of them one tile ahead.
A row is taken in units of 32 columns, whatever the size of its groups:

    x w^T = sum over units of scale · (x q^T) + minimum · sum(x)

where q is what is stored, less 128 or 8, and the minimum is larger by so many scales. Up to 32 rows, nothing but the result is
rounded more coarsely than fp32, as q is exact in 16 bits. One row of x is multiplied with q in fp32. Several are matrix products,
one for each unit of a tile, shared among the warps; a norm makes x fp32, which is split into two 16-bit numbers, high and low part.
Many rows are matrix products of tiles, whose weights are rounded to the dtype of x, as the reference rounds them.
"""

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.dependent_launch import dependent_launch, has_dependent_launch, launch_dependents, wait_for_dependencies
from fastgpt.kernels.launch import Constants, Launch, contiguous, dense, kernel, no_launch, plan
from fastgpt.kernels.limits import cdiv, grid
from fastgpt.kernels.linear import (
    INTERPRETED,
    activate,
    masked_load,
    normalized,
    row_stride,
    start_program,
    store_rows,
    unit_of,
)
from fastgpt.kernels.norm import moments, norm
from fastgpt.kernels.tiles import LONGEST_NORM, MOST_FEW_ROWS, QuantizedTile, quantized_tile


@triton.jit
def _load_units(
    weights, first, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, UNITS: tl.constexpr
):  # fmt: skip
    """Units from `first` on of rows of blocks, whose first bytes `weights` (N, 1, 1) points to: integers as they are stored,
    (N, UNITS, 4 · BITS) uint8, and fp16 scales and minima, (N, UNITS, 1). Past the last unit, all are zero. No minima: in their
    place, the scales."""
    HEADER: tl.constexpr = 4 if MINIMA else 2
    IN_GROUP: tl.constexpr = GROUP // 32
    MASKED: tl.constexpr = K // 32 % UNITS != 0
    units = first + tl.arange(0, UNITS)[None, :, None]
    valid = units < K // 32
    headers = units // IN_GROUP * (HEADER + GROUP * BITS // 8)
    integers = headers + (HEADER + units % IN_GROUP * (4 * BITS)) + tl.arange(0, 4 * BITS)[None, None, :]
    q = masked_load(weights, integers, valid, MASKED)
    numbers = (weights + headers).to(tl.pointer_type(tl.float16))
    scale = masked_load(numbers, 0, valid, MASKED)
    return q, scale, masked_load(numbers, 1, valid, MASKED) if MINIMA else scale


@triton.jit
def _number(half, SHIFT: tl.constexpr, BITS: tl.constexpr, MINIMA: tl.constexpr):
    """BITS bits of integers from the bit SHIFT on, less 128 or 8, times 2^SHIFT, in fp32: moved into the lowest bits of 2^23, which
    is subtracted, since conversions are slow on many GPUs."""
    MASK: tl.constexpr = (2**BITS - 1) << SHIFT
    OFFSET: tl.constexpr = 2 ** (BITS - 1 + SHIFT)
    # The index of the program is zero, which the compiler does not know: of two constants, an instruction would take one from a
    # register, into which it would be moved each time.
    bits = 0x4B000000 + tl.program_id(2)
    if BITS == 8 and not MINIMA:  # signed
        bits += OFFSET
    return (half & MASK ^ bits).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)


@triton.jit
def _numbers(q, HALF: tl.constexpr, BITS: tl.constexpr, MINIMA: tl.constexpr):
    """Integers of `_load_units`, or their lower (0) or upper (1) half, less 128 or 8, in fp32."""
    q = q.to(tl.int32)
    return _number(q >> 4 if HALF else q, 0, BITS, MINIMA)


@triton.jit
def _scale_and_minimum(scale, minimum, BITS: tl.constexpr, MINIMA: tl.constexpr):
    """In fp32, for what `_numbers` returns; no minima: in their place, the scales."""
    scale = scale.to(tl.float32)
    return scale, minimum.to(tl.float32) + scale * (128.0 if BITS == 8 else 8.0) if MINIMA else scale


@triton.jit
def _columns(first, HALF: tl.constexpr, BITS: tl.constexpr, UNITS: tl.constexpr):
    """Of the numbers of units from `first` on, in this half of the integers: (UNITS, 4 · BITS)."""
    return (first + tl.arange(0, UNITS)[:, None]) * 32 + (tl.arange(0, 4 * BITS)[None, :] + HALF * 16)


@triton.jit
def _load_x(
    x, norm_weight_ptr, norm_bias_ptr, columns, mean, rest, rstd, offset, K: tl.constexpr, UNITS: tl.constexpr
):  # fmt: skip
    """Columns of the rows that x points to, in the dtype of x, or with a norm normalized in fp32."""
    MASKED: tl.constexpr = K // 32 % UNITS != 0
    valid = columns < K
    y = masked_load(x, columns, valid, MASKED)
    if norm_weight_ptr is not None:
        g = masked_load(norm_weight_ptr, columns, valid, MASKED)
        b = g if norm_bias_ptr is None else masked_load(norm_bias_ptr, columns, valid, MASKED)
        y = normalized(y, g, b, mean, rest, rstd, offset, True, norm_bias_ptr is not None)
    return y


@triton.jit
def load_words(
    words, first, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, UNITS: tl.constexpr
):  # fmt: skip
    """As `_load_units`, of which each thread gets 4 bytes of integers: their lower and upper halves (N, UNITS, BITS) int32, whose
    bits from 16 on may be any, and the scales and minima that belong to them. `words` (N, 1, 1) points to rows of words of 2 bytes,
    or with minima 4: so are headers and integers aligned."""
    WORD: tl.constexpr = 4 if MINIMA else 2
    IN_GROUP: tl.constexpr = GROUP // 32
    MASKED: tl.constexpr = K // 32 % UNITS != 0
    units = first + tl.arange(0, UNITS)[None, :, None]
    lanes = tl.arange(0, BITS)[None, None, :]
    headers = units // IN_GROUP * (1 + GROUP * BITS // (8 * WORD)) + lanes * 0
    valid = units + lanes * 0 < K // 32
    integers = headers + (1 + units % IN_GROUP * (4 * BITS // WORD)) + lanes * (4 // WORD)
    header = masked_load(words, headers, valid, MASKED)
    low = masked_load(words, integers, valid, MASKED).to(tl.int32)
    scale = header.to(tl.int16).to(tl.float16, bitcast=True)
    if MINIMA:
        return low, low >> 16, scale, (header >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low, masked_load(words, integers + 1, valid, MASKED).to(tl.int32), scale, scale


@triton.jit
def _split(x):
    """(1, UNITS, 4 · BITS') -> four of every fourth column, (1, UNITS, BITS')."""
    x = tl.reshape(x, [1, x.shape[1], x.shape[2] // 4, 2, 2])
    even, odd = tl.split(x)
    x_0, x_2 = tl.split(even)
    x_1, x_3 = tl.split(odd)
    return x_0, x_1, x_2, x_3


@triton.jit
def load_row(
    x_ptr, norm_weight_ptr, norm_bias_ptr, first, HALF: tl.constexpr, mean, rest, rstd, offset, K: tl.constexpr,
    BITS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """One row of x in fp32: columns that the bytes 0 to 3 of each thread's integers, or their lower or upper halves, are multiplied
    with, (1, UNITS, BITS); those of bytes 1 and 3 divided by 256, those of upper halves by 16."""
    columns = _columns(first, HALF, BITS, UNITS)[None, :, :]
    x = _load_x(x_ptr, norm_weight_ptr, norm_bias_ptr, columns, mean, rest, rstd, offset, K, UNITS).to(tl.float32)
    x_0, x_1, x_2, x_3 = _split(x * 0.0625 if HALF else x)
    return x_0, x_1 * 0.00390625, x_2, x_3 * 0.00390625


@triton.jit
def row_products(low, high, scale, minimum, x_low, x_high, BITS: tl.constexpr, MINIMA: tl.constexpr):
    """The products of one row of x and weights, (N, UNITS, BITS), those of 4 bytes added up; of `load_words` and `load_row`."""
    x_0, x_1, x_2, x_3 = x_low
    products = _number(low, 0, BITS, MINIMA) * x_0
    products += _number(low, 8, BITS, MINIMA) * x_1
    products += _number(high, 0, BITS, MINIMA) * x_2
    products += _number(high, 8, BITS, MINIMA) * x_3
    total = x_0 + x_2 + 256 * (x_1 + x_3)
    if BITS == 4:
        x_0, x_1, x_2, x_3 = x_high
        products += _number(low, 4, BITS, MINIMA) * x_0
        products += _number(low, 12, BITS, MINIMA) * x_1
        products += _number(high, 4, BITS, MINIMA) * x_2
        products += _number(high, 12, BITS, MINIMA) * x_3
        total += 16 * (x_0 + x_2) + 4096 * (x_1 + x_3)
    scale, minimum = _scale_and_minimum(scale, minimum, BITS, MINIMA)
    return products * scale + total * minimum if MINIMA else products * scale


# Not specialized: integers that vary between calls, and the alignment of what is not loaded in vectors, must not recompile it.
@kernel(do_not_specialize=["n_features", "blocks_ptr", "bias_ptr", "residual_ptr"])
def quantized_one_row_kernel(
    x_ptr, blocks_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr,
    n_features, eps, offset,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, ROW_BYTES: tl.constexpr,
    RMS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, UNITS: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N output features, n_features at most, over all K columns, in tiles of UNITS units. All tensors are
    contiguous; absent ones are None. If gated, the first n_features rows of the weight are the gate's."""
    start_program(blocks_ptr, n_features, ROW_BYTES, GATED, BLOCK_N, PDL)
    # The last program begins earlier where its features would otherwise go past the last: so each row is a constant number of bytes
    # after the first, which takes no registers and instructions.
    start = tl.minimum(tl.program_id(0).to(tl.int64) * BLOCK_N, n_features - BLOCK_N)
    features = start + tl.arange(0, BLOCK_N)
    WORD: tl.constexpr = tl.int32 if MINIMA else tl.uint16
    rows = tl.arange(0, BLOCK_N)[:, None, None] * (ROW_BYTES // (WORD.primitive_bitwidth // 8))
    weights = (blocks_ptr + start * ROW_BYTES).to(tl.pointer_type(WORD)) + rows
    up_weights = (blocks_ptr + (start + n_features) * ROW_BYTES).to(tl.pointer_type(WORD)) + rows
    words = load_words(weights, 0, K, BITS, GROUP, MINIMA, UNITS)
    if GATED:
        up_words = load_words(up_weights, 0, K, BITS, GROUP, MINIMA, UNITS)
    bias = tl.load(bias_ptr + features).to(tl.float32) if bias_ptr is not None else 0.0
    up_bias = tl.load(bias_ptr + n_features + features).to(tl.float32) if bias_ptr is not None and GATED else 0.0
    residual = tl.load(residual_ptr + features).to(tl.float32) if residual_ptr is not None else 0.0
    mean, rest, rstd = 0.0, 0.0, 1.0
    if norm_weight_ptr is not None:
        # Keeps the compiler from moving the loads behind the moments, which wait for x.
        tl.debug_barrier()
        mean, rest, rstd = moments(x_ptr, eps, K, BLOCK_C, RMS, KEEP=False)

    acc = tl.zeros([BLOCK_N, UNITS, BITS], tl.float32)
    up_acc = tl.zeros([BLOCK_N, UNITS, BITS], tl.float32)
    for first in range(UNITS, K // 32, UNITS):
        x_low = load_row(x_ptr, norm_weight_ptr, norm_bias_ptr, first - UNITS, 0, mean, rest, rstd, offset, K, BITS, UNITS)
        x_high = x_low
        if BITS == 4:
            x_high = load_row(x_ptr, norm_weight_ptr, norm_bias_ptr, first - UNITS, 1, mean, rest, rstd, offset, K, BITS, UNITS)
        next = load_words(weights, first, K, BITS, GROUP, MINIMA, UNITS)
        acc += row_products(*words, x_low, x_high, BITS, MINIMA)
        words = next
        if GATED:
            next = load_words(up_weights, first, K, BITS, GROUP, MINIMA, UNITS)
            up_acc += row_products(*up_words, x_low, x_high, BITS, MINIMA)
            up_words = next
    LAST: tl.constexpr = (K // 32 - 1) // UNITS * UNITS
    x_low = load_row(x_ptr, norm_weight_ptr, norm_bias_ptr, LAST, 0, mean, rest, rstd, offset, K, BITS, UNITS)
    x_high = x_low
    if BITS == 4:
        x_high = load_row(x_ptr, norm_weight_ptr, norm_bias_ptr, LAST, 1, mean, rest, rstd, offset, K, BITS, UNITS)
    acc += row_products(*words, x_low, x_high, BITS, MINIMA)
    out = activate(tl.sum(tl.sum(acc, 2), 1) + bias, ACTIVATION)
    if GATED:
        up_acc += row_products(*up_words, x_low, x_high, BITS, MINIMA)
        out *= tl.sum(tl.sum(up_acc, 2), 1) + up_bias
    out += residual
    tl.store(out_ptr + features, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _load_rows(
    x_rows, norm_weight_ptr, norm_bias_ptr, first, mean, rest, rstd, offset, K: tl.constexpr, BITS: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """Rows of x, (UNITS, M, 4 · BITS): what the lower and what the upper half of integers is multiplied with; and their sums over a
    unit's columns in fp32, (UNITS, M, 1)."""
    columns = _columns(first, 0, BITS, UNITS)[:, None, :]
    low = _load_x(x_rows, norm_weight_ptr, norm_bias_ptr, columns, mean, rest, rstd, offset, K, UNITS)
    if BITS == 8:
        return low, low, tl.sum(low.to(tl.float32), 2, keep_dims=True)
    columns = _columns(first, 1, BITS, UNITS)[:, None, :]
    high = _load_x(x_rows, norm_weight_ptr, norm_bias_ptr, columns, mean, rest, rstd, offset, K, UNITS)
    return low, high, tl.sum(low.to(tl.float32) + high.to(tl.float32), 2, keep_dims=True)


@triton.jit
def _dot(x, numbers, acc, DTYPE: tl.constexpr):
    """acc + x numbers^T of each unit; x (UNITS, M, 4 · BITS), numbers (N, UNITS, 4 · BITS) fp32, which are exact in DTYPE. If that
    has 16 bits, and x is fp32, x is multiplied by parts."""
    numbers = tl.permute(numbers.to(DTYPE), (1, 2, 0))
    if x.dtype == DTYPE:
        return tl.dot(x, numbers, acc, input_precision="ieee")
    high = x.to(DTYPE)
    low = (x - high.to(tl.float32)).to(DTYPE)
    return tl.dot(low, numbers, tl.dot(high, numbers, acc))


@triton.jit
def _unit_products(low, high, total, q, scale, minimum, BITS: tl.constexpr, MINIMA: tl.constexpr, DTYPE: tl.constexpr):
    """The products of rows of x and weights over each unit, (UNITS, M, N)."""
    scale, minimum = _scale_and_minimum(scale, minimum, BITS, MINIMA)
    products = _dot(low, _numbers(q, 0, BITS, MINIMA), None, DTYPE)
    if BITS == 4:
        products = _dot(high, _numbers(q, 1, BITS, MINIMA), products, DTYPE)
    products *= tl.permute(scale, (1, 2, 0))
    return products + total * tl.permute(minimum, (1, 2, 0)) if MINIMA else products


@kernel(do_not_specialize=["n_rows", "n_features", "stride_xm", "stride_rm", "bias_ptr", "residual_ptr"])
def quantized_several_rows_kernel(
    x_ptr, blocks_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr,
    n_rows, n_features, stride_xm, stride_rm, eps, offset,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, ROW_BYTES: tl.constexpr,
    RMS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, X_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N output features of BLOCK_M rows of x. Strides are in elements; X_UNIT divides stride_xm."""
    start_program(blocks_ptr, n_features, ROW_BYTES, GATED, BLOCK_N, PDL)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.minimum(offs_n, n_features - 1)
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, n_rows - 1)
    x_rows = (x_ptr + rows * tl.multiple_of(tl.cast(stride_xm, tl.int64), X_UNIT))[:, None]
    weights = blocks_ptr + features[:, None, None] * ROW_BYTES
    up_weights = blocks_ptr + (features[:, None, None] + n_features) * ROW_BYTES
    q, scale, minimum = _load_units(weights, 0, K, BITS, GROUP, MINIMA, UNITS)
    if GATED:
        up_q, up_scale, up_minimum = _load_units(up_weights, 0, K, BITS, GROUP, MINIMA, UNITS)
    mean, rest, rstd = 0.0, 0.0, 1.0
    if norm_weight_ptr is not None:
        tl.debug_barrier()
        mean, rest, rstd = moments(x_rows, eps, K, BLOCK_C, RMS, KEEP=True)

    acc = tl.zeros([UNITS, BLOCK_M, BLOCK_N], tl.float32)
    up_acc = tl.zeros([UNITS, BLOCK_M, BLOCK_N], tl.float32)
    for first in range(UNITS, K // 32, UNITS):
        low, high, total = _load_rows(
            x_rows, norm_weight_ptr, norm_bias_ptr, first - UNITS, mean, rest, rstd, offset, K, BITS, UNITS
        )  # fmt: skip
        next = _load_units(weights, first, K, BITS, GROUP, MINIMA, UNITS)
        if GATED:
            up_next = _load_units(up_weights, first, K, BITS, GROUP, MINIMA, UNITS)
            up_acc += _unit_products(low, high, total, up_q, up_scale, up_minimum, BITS, MINIMA, DTYPE)
            up_q, up_scale, up_minimum = up_next
        acc += _unit_products(low, high, total, q, scale, minimum, BITS, MINIMA, DTYPE)
        q, scale, minimum = next
    LAST: tl.constexpr = (K // 32 - 1) // UNITS * UNITS
    low, high, total = _load_rows(x_rows, norm_weight_ptr, norm_bias_ptr, LAST, mean, rest, rstd, offset, K, BITS, UNITS)
    acc += _unit_products(low, high, total, q, scale, minimum, BITS, MINIMA, DTYPE)
    if GATED:
        up_acc += _unit_products(low, high, total, up_q, up_scale, up_minimum, BITS, MINIMA, DTYPE)
    store_rows(
        tl.sum(acc, 0), tl.sum(up_acc, 0), bias_ptr, residual_ptr, out_ptr, offs_m, offs_n, n_rows, n_features, stride_rm,
        ACTIVATION, GATED,
    )  # fmt: skip


@triton.jit
def _dequantized(q, scale, minimum, HALF: tl.constexpr, BITS: tl.constexpr, MINIMA: tl.constexpr, DTYPE: tl.constexpr):
    """The weights of one half of integers, (N, UNITS · 4 · BITS), rounded to DTYPE."""
    scale, minimum = _scale_and_minimum(scale, minimum, BITS, MINIMA)
    w = _numbers(q, HALF, BITS, MINIMA) * scale
    w = (w + minimum if MINIMA else w).to(DTYPE)
    return tl.reshape(w, [w.shape[0], w.shape[1] * w.shape[2]])


@kernel(do_not_specialize=["n_rows", "n_features", "stride_xm", "stride_rm", "bias_ptr", "residual_ptr"])
def quantized_many_rows_kernel(
    x_ptr, blocks_ptr, bias_ptr, residual_ptr, out_ptr, n_rows, n_features, stride_xm, stride_rm,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, ROW_BYTES: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, X_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N output features of BLOCK_M rows of x. Programs of the same features follow one another, and find their
    weights in the L2 cache. Strides are in elements; X_UNIT divides stride_xm."""
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    MASKED: tl.constexpr = K // 32 % UNITS != 0
    m_tiles = (n_rows - 1) // BLOCK_M + 1
    offs_m = (tl.program_id(0) % m_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) // m_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, features = tl.minimum(offs_m, n_rows - 1), tl.minimum(offs_n, n_features - 1)
    x_rows = (x_ptr + rows * tl.multiple_of(tl.cast(stride_xm, tl.int64), X_UNIT))[:, None]
    weights = blocks_ptr + features[:, None, None] * ROW_BYTES
    up_weights = blocks_ptr + (features[:, None, None] + n_features) * ROW_BYTES
    offs_k = tl.arange(0, UNITS * 4 * BITS)
    offs_k = offs_k // (4 * BITS) * 32 + offs_k % (4 * BITS)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    q, scale, minimum = _load_units(weights, 0, K, BITS, GROUP, MINIMA, UNITS)
    if GATED:
        up_q, up_scale, up_minimum = _load_units(up_weights, 0, K, BITS, GROUP, MINIMA, UNITS)
    for first in range(0, K // 32, UNITS):
        after = tl.minimum(first + UNITS, (K // 32 - 1) // UNITS * UNITS)  # at the end, the last ones again
        next = _load_units(weights, after, K, BITS, GROUP, MINIMA, UNITS)
        if GATED:
            up_next = _load_units(up_weights, after, K, BITS, GROUP, MINIMA, UNITS)
        for half in tl.static_range(8 // BITS):
            columns = (first * 32 + half * 16 + offs_k)[None, :]
            x = masked_load(x_rows, columns, columns < K, MASKED)
            acc = tl.dot(x, _dequantized(q, scale, minimum, half, BITS, MINIMA, DTYPE).T, acc)
            if GATED:
                up_acc = tl.dot(x, _dequantized(up_q, up_scale, up_minimum, half, BITS, MINIMA, DTYPE).T, up_acc)
        q, scale, minimum = next
        if GATED:
            up_q, up_scale, up_minimum = up_next
    store_rows(
        acc, up_acc, bias_ptr, residual_ptr, out_ptr, offs_m, offs_n, n_rows, n_features, stride_rm, ACTIVATION, GATED
    )  # fmt: skip


def linear_quantized(
    x: Tensor, blocks: Tensor, bits: int, group_size: int, minima: bool, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: int = 0, gated: bool = False, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, rms: bool = False, norm_eps: float = 1e-5, norm_offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """Launches the kernel for one row, several, or many; before many, that of a norm. No host sync. See `fastgpt.linear`.

    Args:
        x: (..., K) fp16|bf16, or fp32 if it has 32 rows at most; copied if the last dimension is not contiguous.
        blocks: (N, bytes) uint8, contiguous, as `QuantizedWeight.blocks`, with bits, group_size and minima.
        activation: its number in ACTIVATIONS.

    Returns: (..., N) in x's dtype, contiguous.
    """
    if INTERPRETED and x.dtype is torch.bfloat16:  # its tl.dot reads bf16 as integers (Triton 3.6 to 3.9)
        bias, residual, norm_weight, norm_bias = (
            y if y is None else y.float() for y in (bias, residual, norm_weight, norm_bias)
        )
        rest = bias, residual, activation, gated, norm_weight, norm_bias, rms, norm_eps, norm_offset
        return linear_quantized(x.float(), blocks, bits, group_size, minima, *rest).bfloat16()
    tensors, norms = (x, blocks, bias, residual), (norm_weight, norm_bias)
    rest = activation, gated, rms, norm_eps, norm_offset
    planned = plan(decide, (*tensors, *norms), bits, group_size, minima, *rest)
    if planned is None:
        if norm_weight is not None and x.numel() > MOST_FEW_ROWS * x.shape[-1]:
            x = norm(x, norm_weight, norm_bias, None, rms, norm_eps, norm_offset)
            norm_weight = norm_bias = None
        x, bias, residual, norm_weight, norm_bias = map(contiguous, (x, bias, residual, norm_weight, norm_bias))
        rest = bias, residual, activation, gated, norm_weight, norm_bias, rms, norm_eps, norm_offset
        return linear_quantized(x, blocks if blocks.data_ptr() % 4 == 0 else blocks.clone(), bits, group_size, minima, *rest)
    launch, of_out, many = planned
    out = x.new_empty_strided(*of_out)
    launch(*tensors, *(() if many else norms), out)
    return out


def decide(
    layouts: tuple, bits: int, group_size: int, minima: bool, activation: int, gated: bool, rms: bool, norm_eps: float,
    norm_offset: float,
) -> tuple[Callable, tuple, bool] | None:  # fmt: skip
    """The launch for tensors with these layouts, the shape and strides of out, and whether x has many rows; None if some tensors
    have to be copied, or many rows to be normalized."""
    x, blocks, bias, residual, norm_weight, norm_bias = layouts
    K, weight_rows = x.shape[-1], blocks.shape[0]
    N = weight_rows // 2 if gated else weight_rows
    of_out, rows = dense(*x.shape[:-1], N), math.prod(x.shape[:-1])
    many = rows > MOST_FEW_ROWS
    if rows * N == 0:
        return no_launch, of_out, many
    stride, stride_r = row_stride(x), 0 if residual is None else row_stride(residual)
    if stride is None or stride_r is None or not all(y is None or y.is_contiguous() for y in (bias, norm_weight, norm_bias)):
        return None
    if blocks.data_ptr() % (4 if minima else 2) or many and norm_weight is not None:  # loaded in words of as many bytes
        return None
    tile = quantized_tile(rows, weight_rows, K, bits, x.element_size())
    unit = 1 if rows == 1 else unit_of(stride, x.element_size())
    constants = kernel_constants(
        tile, K, bits, group_size, minima, rms, activation, gated, unit, many, has_dependent_launch(x.device)
    )
    features, tiles = cdiv(N, constants["BLOCK_N"]), cdiv(rows, tile.BLOCK_M)
    of_norm = float(norm_eps), float(norm_offset)
    if rows == 1:
        launch = Launch(quantized_one_row_kernel, grid("weight", features), constants, N, *of_norm)
    elif not many:
        programs = (*grid("weight", features)[:1], tiles, 1)
        launch = Launch(quantized_several_rows_kernel, programs, constants, rows, N, stride, stride_r, *of_norm)
    else:
        launch = Launch(quantized_many_rows_kernel, grid("weight", features, tiles), constants, rows, N, stride, stride_r)
    return launch, of_out, many


@functools.cache
def kernel_constants(
    tile: QuantizedTile, K: int, bits: int, group_size: int, minima: bool, rms: bool, activation: int, gated: bool, unit: int,
    many: bool, pdl: bool,
) -> Constants:  # fmt: skip
    """The compile-time arguments and options of `quantized_one_row_kernel`, or if the tile has several rows of
    `quantized_several_rows_kernel`, or `quantized_many_rows_kernel`."""
    row_bytes = K // group_size * ((4 if minima else 2) + group_size * bits // 8)
    weight = dict(K=K, BITS=bits, GROUP=group_size, MINIMA=minima, ROW_BYTES=row_bytes, ACTIVATION=activation, GATED=gated)
    # Without a limit of their own, ptxas spills some registers for higher occupancy.
    options = dict(enable_fp_fusion=True, maxnreg=128 if tile.BLOCK_M == 1 else 255, **dependent_launch(pdl))
    constants = dict(**weight, **tile._asdict(), **options)
    if gated:
        constants["BLOCK_N"] = max(1 if tile.BLOCK_M == 1 else 16, tile.BLOCK_N // 2)
    if many:
        return Constants(constants, X_UNIT=unit)
    constants |= dict(RMS=rms, BLOCK_C=min(triton.next_power_of_2(K), LONGEST_NORM // tile.BLOCK_M))
    if tile.BLOCK_M > 1:
        return Constants(constants, X_UNIT=unit)
    del constants["BLOCK_M"]
    if bits == 4:  # of 8 rows, a thread would hold 64 weights
        constants["BLOCK_N"] = min(constants["BLOCK_N"], 4)
    return Constants(constants)
