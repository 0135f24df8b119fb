"""A linear layer of few rows with what surrounds it in a decoder, in one launch.

    y = norm(x) weight^T + bias
    out = residual + activation(y), or if gated residual + activation(y[..., :N]) · y[..., N:]

The time is that of reading the weights, and of the launch. One row is a matrix-vector product: a program reads a few rows of
the weight, 16 bytes a thread and load, the next tile while it multiplies with one; before it waits for the first, it takes
the mean and variance of x, which is in the L2 cache. Several rows are a matrix product whose tiles go through shared memory,
and the norm is put together after it from what one pass over x gives:

    norm(x) weight^T = (x g weight^T - mean · g weight^T) / sqrt(variance + eps) + b weight^T,   g = norm_weight + offset

where g and b, the norm's bias, are two more rows of x, and x is first normalized by what its first columns suggest, so that
nothing cancels or overflows. Each of these rows is then two 16-bit numbers, a large one and what it lacks, so that all but
the result is as good as fp32. fp32 itself is multiplied without TF32.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention_scores import LOG2_E, tanh
from fastgpt.kernels.dependent_launch import (
    dependent_launch,
    has_dependent_launch,
    let_next_start,
    read_ahead,
    wait_for_previous,
)
from fastgpt.kernels.launch import Constants, kernel
from fastgpt.kernels.limits import cdiv, grid
from fastgpt.kernels.norm import finish_moments, moments, update_moments
from fastgpt.kernels.tiles import LONGEST_NORM, LinearTile, linear_tile


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation of this number in fastgpt/ops/linear.py; NaN stays NaN."""
    if ACTIVATION == 1:  # gelu_tanh
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == 2:  # gelu
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 3:  # silu
        x = x / (1.0 + tl.exp2(-x * LOG2_E))
    elif ACTIVATION == 4:  # relu
        x = tl.where(x < 0.0, 0.0, x)
    return x


@triton.jit
def _read(ptr, offsets, mask, MASKED: tl.constexpr):
    """Of columns past the last one, zeros."""
    return tl.load(ptr + offsets, mask=mask, other=0.0) if MASKED else tl.load(ptr + offsets)


@triton.jit
def _read_columns(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weights, others, start, K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """What a step of one row needs of the columns from `start` on: of x, norm_weight, norm_bias, and tiles of the weight and,
    with a gate, of the rows that it multiplies. What there is not is another again."""
    MASKED: tl.constexpr = K % BLOCK_K != 0
    offs_k = start + tl.arange(0, BLOCK_K)
    valid = offs_k < K
    w = _read(weights, offs_k[None, :], valid[None, :], MASKED)
    u = w if others is None else _read(others, offs_k[None, :], valid[None, :], MASKED)
    x = _read(x_ptr, offs_k, valid, MASKED)
    g = x if norm_weight_ptr is None else _read(norm_weight_ptr, offs_k, valid, MASKED)
    b = x if norm_bias_ptr is None else _read(norm_bias_ptr, offs_k, valid, MASKED)
    return x, g, b, w, u


@triton.jit
def _normalized(x, g, b, mean, rest, factor, offset, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr):
    x = x.to(tl.float32)
    if HAS_NORM:
        x = ((x - mean) - rest) * factor * (g.to(tl.float32) + offset)
    return x + b.to(tl.float32) if HAS_BIAS else x


@triton.jit
def _start(weight_ptr, n_features, K: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr):
    """What a program does before it reads anything else: of its rows of the weight, BLOCK_N or less, the L2 cache gets as many
    as there is room for, while the kernel before is still at what they will be multiplied with."""
    let_next_start(PDL)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    SIZE: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
    n_bytes = tl.minimum(n_features - first, BLOCK_N) * (K * SIZE)
    read_ahead(weight_ptr + first * K, n_bytes, PDL)
    if GATED:
        read_ahead(weight_ptr + (first + n_features) * K, n_bytes, PDL)
    wait_for_previous(PDL)


# Numbers that vary between calls, and where what is read by single numbers begins, must not compile a kernel again.
@kernel(do_not_specialize=["n_features", "bias_ptr", "residual_ptr"])
def one_row_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr,
    n_features, eps, offset,
    K: tl.constexpr, RMS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N of the output features, of all K columns. Everything is contiguous; what is left out is None. If
    gated, the first n_features rows of the weight are the gate's."""
    _start(weight_ptr, n_features, K, GATED, BLOCK_N, PDL)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.minimum(offs_n, n_features - 1)  # past the last, the last again, which is not stored
    weights = weight_ptr + features[:, None] * K
    others = weight_ptr + (features[:, None] + n_features) * K if GATED else None
    x, g, b, w, u = _read_columns(x_ptr, norm_weight_ptr, norm_bias_ptr, weights, others, 0, K, BLOCK_K)
    bias = tl.load(bias_ptr + features).to(tl.float32) if bias_ptr is not None else 0.0
    other_bias = tl.load(bias_ptr + n_features + features).to(tl.float32) if bias_ptr is not None and GATED else 0.0
    residual = tl.load(residual_ptr + features).to(tl.float32) if residual_ptr is not None else 0.0
    mean, rest, factor = 0.0, 0.0, 1.0
    if norm_weight_ptr is not None:
        # Or the compiler moves the loads behind the moments, which wait for x; so they read x anew, too.
        tl.debug_barrier()
        mean, rest, factor = moments(x_ptr, eps, K, BLOCK_C, RMS, KEEP=False)

    HAS_NORM: tl.constexpr = norm_weight_ptr is not None
    HAS_BIAS: tl.constexpr = norm_bias_ptr is not None
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    other_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(BLOCK_K, K, BLOCK_K):
        next = _read_columns(x_ptr, norm_weight_ptr, norm_bias_ptr, weights, others, start, K, BLOCK_K)
        y = _normalized(x, g, b, mean, rest, factor, offset, HAS_NORM, HAS_BIAS)[None, :]
        acc += w.to(tl.float32) * y
        if GATED:
            other_acc += u.to(tl.float32) * y
        x, g, b, w, u = next
    y = _normalized(x, g, b, mean, rest, factor, offset, HAS_NORM, HAS_BIAS)[None, :]
    out = _activate(tl.sum(acc + w.to(tl.float32) * y, 1) + bias, ACTIVATION)
    if GATED:
        out *= tl.sum(other_acc + u.to(tl.float32) * y, 1) + other_bias
    out += residual
    tl.store(out_ptr + offs_n, out.to(out_ptr.dtype.element_ty), mask=offs_n < n_features)


@triton.jit
def _multiply(x, w, acc):
    """acc + x w^T; x (M, K) is fp32, w (N, K) of any dtype."""
    if w.dtype == tl.float32:
        return tl.dot(x, w.T, acc, input_precision="ieee")
    high = x.to(w.dtype)
    low = (x - high.to(tl.float32)).to(w.dtype)
    return tl.dot(low, w.T, tl.dot(high, w.T, acc))


@triton.jit
def _row_of(acc, offs_m, row):
    """One row of acc (M, N), as (N,)."""
    return tl.sum(tl.where((offs_m == row)[:, None], acc, 0.0), 0)


@triton.jit
def _normalized_product(acc, offs_m, n_rows, mean, factor, RMS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """That of norm(x), from that of x g, with those of g and b in the rows after the last of x."""
    product = acc if RMS else acc - mean * _row_of(acc, offs_m, n_rows)[None, :]
    return product * factor + _row_of(acc, offs_m, n_rows + 1)[None, :] if HAS_BIAS else product * factor


@kernel(do_not_specialize=["n_rows", "n_features", "stride_xm", "stride_rm", "bias_ptr", "residual_ptr"])
def several_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr,
    n_rows, n_features, stride_xm, stride_rm, eps, offset,
    K: tl.constexpr, RMS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, X_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N of the output features, of n_rows rows of x, two less than BLOCK_M with a norm. Strides are in
    elements; X_UNIT divides stride_xm."""
    _start(weight_ptr, n_features, K, GATED, BLOCK_N, PDL)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.minimum(offs_n, n_features - 1)
    offs_m = tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, n_rows - 1)
    x_rows = (x_ptr + rows * tl.multiple_of(tl.cast(stride_xm, tl.int64), X_UNIT))[:, None]
    weights = weight_ptr + features[:, None] * K
    others = weight_ptr + (features[:, None] + n_features) * K
    HAS_NORM: tl.constexpr = norm_weight_ptr is not None
    MASKED: tl.constexpr = K % BLOCK_K != 0
    HAS_BIAS: tl.constexpr = norm_bias_ptr is not None

    shift, scale = 0.0, 1.0
    if HAS_NORM:  # near the mean of x and one over its deviation, or well below
        FIRST: tl.constexpr = K if K < BLOCK_K else BLOCK_K
        shift, _, scale = moments(x_rows, eps, FIRST, BLOCK_K, RMS, KEEP=True)
        scale *= 1 / 16  # other columns may have far larger numbers, and fp16 no such ones
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    other_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        valid = offs_k[None, :] < K
        x = _read(x_rows, offs_k[None, :], valid, MASKED)
        w = _read(weights, offs_k[None, :], valid, MASKED)
        if HAS_NORM:
            y = (x.to(tl.float32) - shift) * scale
            mean, squares = update_moments(y, mean, squares, start // BLOCK_K + 1, valid, RMS)
            g = _read(norm_weight_ptr, offs_k, offs_k < K, MASKED).to(tl.float32)[None, :] + offset
            y = tl.where((offs_m == n_rows)[:, None], g, y * g)
            if HAS_BIAS:
                b = _read(norm_bias_ptr, offs_k, offs_k < K, MASKED).to(tl.float32)[None, :]
                y = tl.where((offs_m == n_rows + 1)[:, None], b, y)
            acc = _multiply(y, w, acc)
            if GATED:
                other_acc = _multiply(y, _read(others, offs_k[None, :], valid, MASKED), other_acc)
        else:
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
            if GATED:
                u = _read(others, offs_k[None, :], valid, MASKED)
                other_acc = tl.dot(x, u.T, other_acc, input_precision="ieee")

    if HAS_NORM:
        EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
        of_row, rest, factor = finish_moments(mean, squares, eps * scale * scale, K, BLOCK_K, RMS, KEEP=True, EXACT=EXACT)
        acc = _normalized_product(acc, offs_m, n_rows, of_row + rest, factor, RMS, HAS_BIAS)
        if GATED:
            other_acc = _normalized_product(other_acc, offs_m, n_rows, of_row + rest, factor, RMS, HAS_BIAS)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + features).to(tl.float32)[None, :]
    acc = _activate(acc, ACTIVATION)
    if GATED:
        if bias_ptr is not None:
            other_acc += tl.load(bias_ptr + n_features + features).to(tl.float32)[None, :]
        acc *= other_acc
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + (rows * tl.cast(stride_rm, tl.int64))[:, None] + features[None, :]).to(tl.float32)
    mask = (offs_m < n_rows)[:, None] & (offs_n < n_features)[None, :]
    places = offs_m.to(tl.int64)[:, None] * n_features + offs_n[None, :]
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=mask)


INTERPRETED = not isinstance(one_row_kernel, triton.JITFunction)  # TRITON_INTERPRET was set


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, activation: int = 0,
    gated: bool = False, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, rms: bool = False,
    norm_eps: float = 1e-5, norm_offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """Launches the kernel of one row, or that of several; no host sync. What it computes, and the arguments, see
    `fastgpt.linear`.

    Args:
        x: (..., K) fp16|bf16|fp32, of 32 rows at most; copied if the last dimension is not contiguous.
        weight: (N, K), contiguous, in x's dtype, as all others.
        activation: its number in ACTIVATIONS.

    Returns: (..., N) in x's dtype, contiguous.
    """
    weight_rows, K = weight.shape
    N = weight_rows // 2 if gated else weight_rows
    if INTERPRETED and x.dtype is torch.bfloat16:  # there, tl.dot reads bf16 as integers (Triton 3.6 to 3.9)
        tensors = (y if y is None else y.float() for y in (x, weight, bias, residual))
        norms = (y if y is None else y.float() for y in (norm_weight, norm_bias))
        return linear(*tensors, activation, gated, *norms, rms, norm_eps, norm_offset).bfloat16()
    out = x.new_empty((*x.shape[:-1], N))
    if out.numel() == 0:
        return out
    x = rows_of(x, K)
    bias = None if bias is None else bias.contiguous()
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    norm_bias = None if norm_bias is None else norm_bias.contiguous()
    residual = None if residual is None else rows_of(residual, N)
    rows, stride, size = x.shape[0], x.stride(0), x.element_size()
    tile = linear_tile(rows, weight_rows, K, size, norm_weight is not None)
    unit = 1 if rows == 1 else unit_of(stride, size)
    constants = kernel_constants(tile, K, rms, activation, gated, unit, has_dependent_launch(x.device))
    programs = grid("weight", cdiv(N, constants["BLOCK_N"]))
    tensors = x, weight, bias, residual, norm_weight, norm_bias, out
    of_norm = float(norm_eps), float(norm_offset)
    with torch.cuda.device_of(x):
        if rows == 1:
            one_row_kernel.launch(programs, constants, *tensors, N, *of_norm)
        else:
            stride_r = 0 if residual is None else residual.stride(0)
            several_rows_kernel.launch(programs, constants, *tensors, rows, N, stride, stride_r, *of_norm)
    return out


def rows_of(x: Tensor, columns: int) -> Tensor:
    """x (..., columns) as (rows, columns), with rows that are contiguous."""
    x = x if x.dim() == 2 else x.reshape(-1, columns)
    return x if x.stride(1) == 1 or columns == 1 else x.contiguous()


def unit_of(stride: int, element_size: int) -> int:
    """The power of two that divides a stride, up to 16 bytes: how wide loads of rows can be."""
    bits = stride | 16 // element_size
    return bits & -bits


@functools.cache
def kernel_constants(tile: LinearTile, K: int, rms: bool, activation: int, gated: bool, unit: int, pdl: bool) -> Constants:
    """The compile-time arguments and options of `one_row_kernel`, or `several_rows_kernel`, as the tile has one row or several."""
    options = dict(enable_fp_fusion=True, **dependent_launch(pdl))
    constants = dict(K=K, RMS=rms, ACTIVATION=activation, GATED=gated, **tile._asdict(), **options)
    if gated:
        constants["BLOCK_N"] = max(1 if tile.BLOCK_M == 1 else 16, tile.BLOCK_N // 2)
    if tile.BLOCK_M == 1:
        del constants["BLOCK_M"]
        if gated:  # left to itself, ptxas spills some on compute capability 9.0 for more programs at once
            constants["maxnreg"] = 128
        return Constants(constants, BLOCK_C=min(triton.next_power_of_2(K), LONGEST_NORM))
    return Constants(constants, X_UNIT=unit)
