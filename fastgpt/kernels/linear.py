"""A linear layer of few rows, fused with norm, activation, gate and residual, in one launch.

    y = norm(x) weight^T + bias
    out = residual + activation(y), or if gated residual + activation(y[..., :N]) · y[..., N:]

It is bound by reading the weights, and by the launch. One row is a matrix-vector product: a program reads a few rows of the
weight, 16 bytes per thread and load, and loads the next tile while it multiplies one; while the first is loaded, it computes
the mean and variance of x, which is in the L2 cache. Several rows are a matrix product whose tiles go through shared memory,
and the norm is applied after it, so that one pass over x is enough:

    norm(x) weight^T = (x g weight^T - mean · g weight^T) / sqrt(variance + eps) + b weight^T,   g = norm_weight + offset

where g and b, the norm's bias, are two additional rows of x, and x is first shifted and scaled by the moments of its first
columns, so that nothing cancels or overflows. Each element of these rows is split into two 16-bit numbers, high and low part,
so that nothing but the result is rounded more coarsely than fp32. fp32 itself is multiplied without TF32.
"""

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention_scores import LOG2_E, tanh
from fastgpt.kernels.dependent_launch import (
    dependent_launch,
    has_dependent_launch,
    launch_dependents,
    prefetch_to_l2,
    wait_for_dependencies,
)
from fastgpt.kernels.launch import Constants, Launch, Layout, contiguous, dense, kernel, no_launch, plan
from fastgpt.kernels.limits import cdiv, grid
from fastgpt.kernels.norm import finish_moments, folded, moments, update_moments
from fastgpt.kernels.tiles import LONGEST_NORM, LinearTile, linear_tile


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation with this number in fastgpt/ops/linear.py; propagates NaN."""
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
def masked_load(ptr, offsets, mask, MASKED: tl.constexpr):
    """A load; MASKED: zeros past the last column."""
    return tl.load(ptr + offsets, mask=mask, other=0.0) if MASKED else tl.load(ptr + offsets)


@triton.jit
def _load_columns(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weights, up_weights, start, K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The columns from `start` on: of x, norm_weight, norm_bias, and tiles of the weight and, if gated, of its second half. In
    place of an absent one, another is returned."""
    MASKED: tl.constexpr = K % BLOCK_K != 0
    offs_k = start + tl.arange(0, BLOCK_K)
    valid = offs_k < K
    w = masked_load(weights, offs_k[None, :], valid[None, :], MASKED)
    u = w if up_weights is None else masked_load(up_weights, offs_k[None, :], valid[None, :], MASKED)
    x = masked_load(x_ptr, offs_k, valid, MASKED)
    g = x if norm_weight_ptr is None else masked_load(norm_weight_ptr, offs_k, valid, MASKED)
    b = x if norm_bias_ptr is None else masked_load(norm_bias_ptr, offs_k, valid, MASKED)
    return x, g, b, w, u


@triton.jit
def normalized(x, g, b, mean, rest, rstd, offset, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr):
    x = x.to(tl.float32)
    if HAS_NORM:
        x = ((x - mean) - rest) * rstd * (g.to(tl.float32) + offset)
    return x + b.to(tl.float32) if HAS_BIAS else x


@triton.jit
def start_program(weight_ptr, n_features, K: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr):
    """The prologue of a program: prefetches its rows of the weight, BLOCK_N or less, into the L2 cache, while the previous kernel
    still computes x."""
    launch_dependents(PDL)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    SIZE: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
    n_bytes = tl.minimum(n_features - first, BLOCK_N) * (K * SIZE)
    prefetch_to_l2(weight_ptr + first * K, n_bytes, PDL)
    if GATED:
        prefetch_to_l2(weight_ptr + (first + n_features) * K, n_bytes, PDL)
    wait_for_dependencies(PDL)


# Not specialized: integers that vary between calls, and the alignment of what is not loaded in vectors, must not recompile it.
@kernel(do_not_specialize=["n_features", "bias_ptr", "residual_ptr"])
def one_row_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr,
    n_features, eps, offset,
    K: tl.constexpr, RMS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N output features, over all K columns. All tensors are contiguous; absent ones are None. If gated, the
    first n_features rows of the weight are the gate's."""
    start_program(weight_ptr, n_features, K, GATED, BLOCK_N, PDL)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.minimum(offs_n, n_features - 1)  # features past the last repeat it, and are not stored
    weights = weight_ptr + features[:, None] * K
    up_weights = weight_ptr + (features[:, None] + n_features) * K if GATED else None
    x, g, b, w, u = _load_columns(x_ptr, norm_weight_ptr, norm_bias_ptr, weights, up_weights, 0, K, BLOCK_K)
    bias = tl.load(bias_ptr + features).to(tl.float32) if bias_ptr is not None else 0.0
    up_bias = tl.load(bias_ptr + n_features + features).to(tl.float32) if bias_ptr is not None and GATED else 0.0
    residual = tl.load(residual_ptr + features).to(tl.float32) if residual_ptr is not None else 0.0
    mean, rest, rstd = 0.0, 0.0, 1.0
    if norm_weight_ptr is not None:
        # Keeps the compiler from moving the loads behind the moments, which wait for x. So the moments load x again.
        tl.debug_barrier()
        mean, rest, rstd = moments(x_ptr, eps, K, BLOCK_C, RMS, KEEP=False)

    HAS_NORM: tl.constexpr = norm_weight_ptr is not None
    HAS_BIAS: tl.constexpr = norm_bias_ptr is not None
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(BLOCK_K, K, BLOCK_K):
        next = _load_columns(x_ptr, norm_weight_ptr, norm_bias_ptr, weights, up_weights, start, K, BLOCK_K)
        y = normalized(x, g, b, mean, rest, rstd, offset, HAS_NORM, HAS_BIAS)[None, :]
        acc += w.to(tl.float32) * y
        if GATED:
            up_acc += u.to(tl.float32) * y
        x, g, b, w, u = next
    y = normalized(x, g, b, mean, rest, rstd, offset, HAS_NORM, HAS_BIAS)[None, :]
    out = activate(tl.sum(acc + w.to(tl.float32) * y, 1) + bias, ACTIVATION)
    if GATED:
        out *= tl.sum(up_acc + u.to(tl.float32) * y, 1) + up_bias
    out += residual
    tl.store(out_ptr + offs_n, out.to(out_ptr.dtype.element_ty), mask=offs_n < n_features)


@triton.jit
def _multiply(x, w, acc):
    """acc + x w^T; x (M, K) is fp32, w (N, K) of any dtype: a 16-bit one is multiplied by x's high and low parts."""
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
def _normalized_product(acc, offs_m, n_rows, mean, rstd, RMS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The product of norm(x), given that of x g, and in the rows after the last of x those of g and b."""
    product = acc if RMS else acc - mean * _row_of(acc, offs_m, n_rows)[None, :]
    return product * rstd + _row_of(acc, offs_m, n_rows + 1)[None, :] if HAS_BIAS else product * rstd


@triton.jit
def store_rows(
    acc, up_acc, bias_ptr, residual_ptr, out_ptr, offs_m, offs_n, n_rows, n_features, stride_rm, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Bias, activation, gate and residual of a tile of products, and its store. Rows and features past the last are not stored."""
    rows, features = tl.minimum(offs_m, n_rows - 1), tl.minimum(offs_n, n_features - 1)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + features).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    if GATED:
        if bias_ptr is not None:
            up_acc += tl.load(bias_ptr + n_features + features).to(tl.float32)[None, :]
        acc *= up_acc
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + (rows * tl.cast(stride_rm, tl.int64))[:, None] + features[None, :]).to(tl.float32)
    mask = (offs_m < n_rows)[:, None] & (offs_n < n_features)[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * n_features + offs_n[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["n_rows", "n_features", "stride_xm", "stride_rm", "bias_ptr", "residual_ptr"])
def several_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr,
    n_rows, n_features, stride_xm, stride_rm, eps, offset,
    K: tl.constexpr, RMS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, X_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N output features of n_rows rows of x; at most BLOCK_M, or BLOCK_M - 2 with a norm. Strides are in
    elements; X_UNIT divides stride_xm."""
    start_program(weight_ptr, n_features, K, GATED, BLOCK_N, PDL)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.minimum(offs_n, n_features - 1)
    offs_m = tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, n_rows - 1)
    x_rows = (x_ptr + rows * tl.multiple_of(tl.cast(stride_xm, tl.int64), X_UNIT))[:, None]
    weights = weight_ptr + features[:, None] * K
    up_weights = weight_ptr + (features[:, None] + n_features) * K
    HAS_NORM: tl.constexpr = norm_weight_ptr is not None
    MASKED: tl.constexpr = K % BLOCK_K != 0
    HAS_BIAS: tl.constexpr = norm_bias_ptr is not None

    shift, scale = 0.0, 1.0
    if HAS_NORM:  # estimates of the mean and the reciprocal standard deviation of x
        FIRST: tl.constexpr = K if K < BLOCK_K else BLOCK_K
        shift, _, scale = moments(x_rows, eps, FIRST, BLOCK_K, RMS, KEEP=True)
        scale *= 1 / 16  # later columns may have far larger elements, which would overflow fp16
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        valid = offs_k[None, :] < K
        x = masked_load(x_rows, offs_k[None, :], valid, MASKED)
        w = masked_load(weights, offs_k[None, :], valid, MASKED)
        if HAS_NORM:
            y = (x.to(tl.float32) - shift) * scale
            mean, squares = update_moments(y, mean, squares, start // BLOCK_K + 1, valid, RMS)
            g = masked_load(norm_weight_ptr, offs_k, offs_k < K, MASKED).to(tl.float32)[None, :] + offset
            y = tl.where((offs_m == n_rows)[:, None], g, y * g)
            if HAS_BIAS:
                b = masked_load(norm_bias_ptr, offs_k, offs_k < K, MASKED).to(tl.float32)[None, :]
                y = tl.where((offs_m == n_rows + 1)[:, None], b, y)
            acc = _multiply(y, w, acc)
            if GATED:
                up_acc = _multiply(y, masked_load(up_weights, offs_k[None, :], valid, MASKED), up_acc)
        else:
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
            if GATED:
                u = masked_load(up_weights, offs_k[None, :], valid, MASKED)
                up_acc = tl.dot(x, u.T, up_acc, input_precision="ieee")

    if HAS_NORM:
        EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
        row_mean, rest, rstd = finish_moments(mean, squares, eps * scale * scale, K, BLOCK_K, RMS, KEEP=True, EXACT=EXACT)
        acc = _normalized_product(acc, offs_m, n_rows, row_mean + rest, rstd, RMS, HAS_BIAS)
        if GATED:
            up_acc = _normalized_product(up_acc, offs_m, n_rows, row_mean + rest, rstd, RMS, HAS_BIAS)
    store_rows(
        acc, up_acc, bias_ptr, residual_ptr, out_ptr, offs_m, offs_n, n_rows, n_features, stride_rm, ACTIVATION, GATED
    )  # fmt: skip


INTERPRETED = not isinstance(one_row_kernel, triton.JITFunction)  # Triton's interpreter: TRITON_INTERPRET was set


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, activation: int = 0,
    gated: bool = False, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, rms: bool = False,
    norm_eps: float = 1e-5, norm_offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """Launches the kernel for one row, or for several; no host sync. See `fastgpt.linear`.

    Args:
        x: (..., K) fp16|bf16|fp32, of 32 rows at most; copied if the last dimension is not contiguous.
        weight: (N, K), contiguous; it and all other tensors in x's dtype.
        activation: its number in ACTIVATIONS.

    Returns: (..., N) in x's dtype, contiguous.
    """
    if INTERPRETED and x.dtype is torch.bfloat16:  # its tl.dot reads bf16 as integers (Triton 3.6 to 3.9)
        tensors = (y if y is None else y.float() for y in (x, weight, bias, residual))
        norms = (y if y is None else y.float() for y in (norm_weight, norm_bias))
        return linear(*tensors, activation, gated, *norms, rms, norm_eps, norm_offset).bfloat16()
    tensors = x, weight, bias, residual, norm_weight, norm_bias
    planned = plan(decide, tensors, activation, gated, rms, norm_eps, norm_offset)
    if planned is None:
        x, weight, bias, residual, norm_weight, norm_bias = map(contiguous, tensors)
        return linear(x, weight, bias, residual, activation, gated, norm_weight, norm_bias, rms, norm_eps, norm_offset)
    launch, of_out = planned
    out = x.new_empty_strided(*of_out)
    launch(*tensors, out)
    return out


def decide(
    layouts: tuple, activation: int, gated: bool, rms: bool, norm_eps: float, norm_offset: float
) -> tuple[Callable, tuple] | None:
    """The launch for tensors with these layouts, and the shape and strides of out; None if some of them have to be copied."""
    x, weight, bias, residual, norm_weight, norm_bias = layouts
    weight_rows, K = weight.shape
    N = weight_rows // 2 if gated else weight_rows
    of_out = dense(*x.shape[:-1], N)
    rows = math.prod(x.shape[:-1])
    if rows * N == 0:
        return no_launch, of_out
    stride, stride_r = row_stride(x), 0 if residual is None else row_stride(residual)
    if stride is None or stride_r is None or not all(y is None or y.is_contiguous() for y in (bias, norm_weight, norm_bias)):
        return None
    size = x.element_size()
    tile = linear_tile(rows, weight_rows, K, size, norm_weight is not None)
    unit = 1 if rows == 1 else unit_of(stride, size)
    constants = kernel_constants(tile, K, rms, activation, gated, unit, has_dependent_launch(x.device))
    programs = grid("weight", cdiv(N, constants["BLOCK_N"]))
    of_norm = float(norm_eps), float(norm_offset)
    if rows == 1:
        return Launch(one_row_kernel, programs, constants, N, *of_norm), of_out
    return Launch(several_rows_kernel, programs, constants, rows, N, stride, stride_r, *of_norm), of_out


def row_stride(x: Layout) -> int | None:
    """The stride of the rows of x (..., columns); None if they do not have one, or are not contiguous."""
    dims = folded(x)
    return None if dims is None or dims[1] != (1, 0) else dims[2][1]


def rows_of(x: Tensor, columns: int) -> Tensor:
    """x (..., columns) as (rows, columns), with rows that are contiguous."""
    x = x if x.dim() == 2 else x.reshape(-1, columns)
    return x if x.stride(1) == 1 or columns == 1 else x.contiguous()


def unit_of(stride: int, element_size: int) -> int:
    """The largest power of two of elements, up to 16 bytes, that divides a stride: how wide loads of rows can be."""
    bits = stride | 16 // element_size
    return bits & -bits


@functools.cache
def kernel_constants(tile: LinearTile, K: int, rms: bool, activation: int, gated: bool, unit: int, pdl: bool) -> Constants:
    """The compile-time arguments and options of `one_row_kernel`, or of `several_rows_kernel` if the tile has several rows."""
    options = dict(enable_fp_fusion=True, **dependent_launch(pdl))
    constants = dict(K=K, RMS=rms, ACTIVATION=activation, GATED=gated, **tile._asdict(), **options)
    if gated:
        constants["BLOCK_N"] = max(1 if tile.BLOCK_M == 1 else 16, tile.BLOCK_N // 2)
    if tile.BLOCK_M == 1:
        del constants["BLOCK_M"]
        if gated:  # without a limit of its own, ptxas spills some registers on 9.0 for higher occupancy
            constants["maxnreg"] = 128
        return Constants(constants, BLOCK_C=min(triton.next_power_of_2(K), LONGEST_NORM))
    return Constants(constants, X_UNIT=unit)
