"""Layer norm and RMS norm over the last dimension, in one launch; and the moments of a row, which `linear` uses, too.

    out = residual + (x - mean) / sqrt(variance + eps) · (weight + offset) + bias        kind "layer"
    out = residual + x / sqrt(mean of x^2 + eps) · (weight + offset) + bias              kind "rms"

Source: Layer Normalization (arXiv 1607.06450), Root Mean Square Layer Normalization (arXiv 1910.07467); the variances of
parts of a row are combined as in Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm (1979).
"""

import functools
from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.dependent_launch import dependent_launch, has_dependent_launch, launch_dependents, wait_for_dependencies
from fastgpt.kernels.launch import Constants, Launch, Layout, contiguous, dense, kernel, no_launch, plan
from fastgpt.kernels.limits import cdiv, grid
from fastgpt.kernels.tiles import norm_tile


@triton.jit
def update_moments(x, mean, squares, step, valid, RMS: tl.constexpr):
    """Updates the running mean of each element of a tile, and the sum of squares about it (about zero if RMS), by x, the
    `step`-th tile (from 1); `valid` says which elements of x exist."""
    if RMS:
        squares += tl.where(valid, x * x, 0.0)
    else:
        change = tl.where(valid, x - mean, 0.0)
        mean += change / step
        squares += change * tl.where(valid, x - mean, 0.0)
    return mean, squares


@triton.jit
def finish_moments(
    mean, squares, eps, C: tl.constexpr, BLOCK_C: tl.constexpr, RMS: tl.constexpr, KEEP: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """The moments of whole rows of C elements, given those of the elements of a tile (..., BLOCK_C): (mean, rest, rstd), such
    that the norm is ((x - mean) - rest) · rstd. `rest` is the rounding error of the mean, which matters for fp32 (EXACT) and a
    mean far from zero. With KEEP (..., 1)."""
    row_mean, rest = 0.0, 0.0
    if RMS:
        variance = tl.sum(squares, -1, keep_dims=KEEP) / C
    else:
        counts = ((C + BLOCK_C - 1 - tl.arange(0, BLOCK_C)) // BLOCK_C).to(tl.float32)  # tiles that had this element
        row_mean = tl.sum(counts * mean, -1, keep_dims=KEEP) / C
        deviation = mean - row_mean
        if EXACT:
            rest = tl.sum(counts * deviation, -1, keep_dims=KEEP) / C
        variance = tl.sum(squares + counts * deviation * deviation, -1, keep_dims=KEEP) / C - rest * rest
    return row_mean, rest, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def moments(rows, eps, C: tl.constexpr, BLOCK_C: tl.constexpr, RMS: tl.constexpr, KEEP: tl.constexpr):
    """`finish_moments` of rows of C elements at the pointers `rows`: (M, 1) with KEEP, else scalars."""
    offs_c = tl.arange(0, BLOCK_C)
    x = tl.load(rows + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    mean, squares = x, (x * x if RMS else tl.zeros_like(x))
    for start in range(BLOCK_C, C, BLOCK_C):
        valid = offs_c < C - start
        x = tl.load(rows + start + offs_c, mask=valid, other=0.0).to(tl.float32)
        mean, squares = update_moments(x, mean, squares, start // BLOCK_C + 1, valid, RMS)
    return finish_moments(mean, squares, eps, C, BLOCK_C, RMS, KEEP, EXACT=rows.dtype.element_ty == tl.float32)


# Not specialized: integers that vary between calls must not recompile the kernel.
@kernel(do_not_specialize=["n_rows", "size_1", "size_2", "stride_0", "stride_1", "stride_2"])
def norm_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, residual_ptr, out_ptr,
    n_rows, size_1, size_2, stride_0, stride_1, stride_2, eps, offset,
    C: tl.constexpr, RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows. Row r of x has the index (r // size_2 // size_1, r // size_2 % size_1, r % size_2), with strides
    stride_0 to stride_2 in elements; residual and out are contiguous."""
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, n_rows - 1)  # rows past the last repeat it, and are not stored
    starts = rows // size_2 // size_1 * stride_0 + rows // size_2 % size_1 * stride_1 + rows % size_2 * stride_2
    x_rows = (x_ptr + starts)[:, None]
    mean, rest, rstd = moments(x_rows, eps, C, BLOCK_C, RMS, KEEP=True)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        valid = offs_c < C
        y = ((tl.load(x_rows + offs_c, mask=valid, other=0.0).to(tl.float32) - mean) - rest) * rstd
        y *= tl.load(norm_weight_ptr + offs_c, mask=valid, other=0.0).to(tl.float32) + offset
        if norm_bias_ptr is not None:
            y += tl.load(norm_bias_ptr + offs_c, mask=valid, other=0.0).to(tl.float32)
        offsets = rows[:, None] * C + offs_c
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offsets, mask=valid[None, :], other=0.0).to(tl.float32)
        mask = (offs_m < n_rows)[:, None] & valid[None, :]
        tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, rms: bool = False,
    eps: float = 1e-5, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """Launches the kernel. See `fastgpt.norm`.

    Args:
        x: (..., C) fp16|bf16|fp32; copied if the last dimension is not contiguous, or the others do not fold into three.

    Returns: (..., C) in x's dtype, contiguous.
    """
    tensors = x, weight, bias, residual
    planned = plan(decide, tensors, rms, eps, offset)
    if planned is None:
        return norm(*map(contiguous, tensors), rms, eps, offset)
    launch, of_out = planned
    out = x.new_empty_strided(*of_out)
    launch(*tensors, out)
    return out


def decide(layouts: tuple, rms: bool, eps: float, offset: float) -> tuple[Callable, tuple] | None:
    """The launch for tensors with these layouts, and the shape and strides of out; None if some of them have to be copied."""
    x, *others = layouts
    of_out = dense(*x.shape)
    if x.numel() == 0:
        return no_launch, of_out
    dims = folded(x)
    if dims is None or not all(other is None or other.is_contiguous() for other in others):
        return None
    (_, stride_0), (size_1, stride_1), (size_2, stride_2) = dims
    C = x.shape[-1]
    rows = x.numel() // C
    constants = kernel_constants(C, rms, rows > 128, has_dependent_launch(x.device))
    launch = Launch(
        norm_kernel, grid("x", cdiv(rows, constants["BLOCK_M"])), constants,
        rows, size_1, size_2, stride_0, stride_1, stride_2, float(eps), float(offset),
    )  # fmt: skip
    return launch, of_out


def folded(x: Tensor | Layout) -> list[tuple[int, int]] | None:
    """(size, stride) of three dimensions that enumerate the rows of x (..., C) in order; None if three are not enough, or if the
    last dimension is not contiguous."""
    if x.is_contiguous():
        return [(1, 0), (1, 0), (x.numel() // x.shape[-1], x.shape[-1])]
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    dims = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            size *= dims.pop()[0]
        dims.append((size, stride))
    return None if len(dims) > 3 else [(1, 0)] * (3 - len(dims)) + dims


@functools.cache
def kernel_constants(C: int, rms: bool, many: bool, pdl: bool) -> Constants:
    """The compile-time arguments and options of `norm_kernel` for rows of C elements, few or many."""
    return Constants(C=C, RMS=rms, **norm_tile(C, many), enable_fp_fusion=True, **dependent_launch(pdl))
