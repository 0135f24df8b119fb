"""Mixtures of experts whose matrices are quantized, for few rows: the two launches of moe.py, over blocks that linear_quantized.py
reads.

A program multiplies one row of x, or of h, with a few rows of an expert's blocks; each row of x reads the experts that it is routed
to, which are in the L2 cache if another row has them, too. h is fp32, and nothing but the result is rounded more coarsely. Nothing
waits for the GPU. Many rows are left to `linear`, expert by expert.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.dependent_launch import dependent_launch, has_dependent_launch, launch_dependents, wait_for_dependencies
from fastgpt.kernels.launch import Constants, kernel
from fastgpt.kernels.limits import grid
from fastgpt.kernels.linear import activate, rows_of
from fastgpt.kernels.linear_quantized import load_row, load_words, row_products
from fastgpt.kernels.moe import activate_gated
from fastgpt.kernels.tiles import QuantizedTile, quantized_tile


@triton.jit
def _tile_products(
    low, high, scale, minimum, x, first, K: tl.constexpr, BITS: tl.constexpr, MINIMA: tl.constexpr, UNITS: tl.constexpr
):  # fmt: skip
    """The products of units from `first` on, of `load_words`, and a row of x."""
    x_low = load_row(x, None, None, first, 0, 0.0, 0.0, 0.0, 0.0, K, BITS, UNITS)
    x_high = x_low
    if BITS == 4:
        x_high = load_row(x, None, None, first, 1, 0.0, 0.0, 0.0, 0.0, K, BITS, UNITS)
    return row_products(low, high, scale, minimum, x_low, x_high, BITS, MINIMA)


@triton.jit
def _products(
    blocks, x, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, ROW_BYTES: tl.constexpr,
    BLOCK_N: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """The products of a row of x and BLOCK_N rows of blocks, in fp32."""
    WORD: tl.constexpr = tl.int32 if MINIMA else tl.uint16
    rows = tl.arange(0, BLOCK_N)[:, None, None] * (ROW_BYTES // (WORD.primitive_bitwidth // 8))
    weights = blocks.to(tl.pointer_type(WORD)) + rows
    low, high, scale, minimum = load_words(weights, 0, K, BITS, GROUP, MINIMA, UNITS)
    acc = tl.zeros([BLOCK_N, UNITS, BITS], tl.float32)
    for first in range(UNITS, K // 32, UNITS):
        next = load_words(weights, first, K, BITS, GROUP, MINIMA, UNITS)
        acc += _tile_products(low, high, scale, minimum, x, first - UNITS, K, BITS, MINIMA, UNITS)
        low, high, scale, minimum = next
    LAST: tl.constexpr = (K // 32 - 1) // UNITS * UNITS
    acc += _tile_products(low, high, scale, minimum, x, LAST, K, BITS, MINIMA, UNITS)
    return tl.sum(tl.sum(acc, 2), 1)


@kernel(do_not_specialize=["n_features", "n_experts", "stride_xm", "experts_ptr", "blocks_ptr", "bias_ptr"])
def quantized_expert_up_kernel(
    x_ptr, experts_ptr, blocks_ptr, bias_ptr, hidden_ptr,
    n_features, n_experts, stride_xm,
    TOP_K: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr,
    ROW_BYTES: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `expert_up_kernel` of moe.py. n_features is a multiple of BLOCK_N, as it is of 32; the experts' blocks are rows of ROW_BYTES."""
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    tiles = n_features // BLOCK_N
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N
    e = tl.load(experts_ptr + pair).to(tl.int64)
    e = tl.where((e >= 0) & (e < n_experts), e, 0)
    first = e * n_features * (2 if GATED else 1) + start
    offs_n = tl.arange(0, BLOCK_N)
    x = x_ptr + pair // TOP_K * tl.cast(stride_xm, tl.int64)
    y = _products(blocks_ptr + first * ROW_BYTES, x, K, BITS, GROUP, MINIMA, ROW_BYTES, BLOCK_N, UNITS)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + first + offs_n).to(tl.float32)
    if GATED:
        first += n_features
        up = _products(blocks_ptr + first * ROW_BYTES, x, K, BITS, GROUP, MINIMA, ROW_BYTES, BLOCK_N, UNITS)
        if bias_ptr is not None:
            up += tl.load(bias_ptr + first + offs_n).to(tl.float32)
        h = activate_gated(y, up, ACTIVATION)
    else:
        h = activate(y, ACTIVATION)
    tl.store(hidden_ptr + pair * n_features + start + offs_n, h)


@kernel(do_not_specialize=["n_features", "n_experts", "experts_ptr", "weights_ptr", "blocks_ptr", "bias_ptr", "residual_ptr"])
def quantized_expert_down_kernel(
    hidden_ptr, experts_ptr, weights_ptr, blocks_ptr, bias_ptr, residual_ptr, out_ptr,
    n_features, n_experts,
    TOP_K: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr,
    ROW_BYTES: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `expert_down_kernel` of moe.py; n_features is a multiple of BLOCK_N."""
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    tiles = n_features // BLOCK_N
    row = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for k in range(TOP_K):
        pair = row * TOP_K + k
        e = tl.load(experts_ptr + pair).to(tl.int64)
        exists = (e >= 0) & (e < n_experts)
        first = tl.where(exists, e, 0) * n_features + start
        y = _products(
            blocks_ptr + first * ROW_BYTES, hidden_ptr + pair * K, K, BITS, GROUP, MINIMA, ROW_BYTES, BLOCK_N, UNITS
        )  # fmt: skip
        if bias_ptr is not None:
            y += tl.load(bias_ptr + first + offs_n).to(tl.float32)
        total += tl.where(exists, y * tl.load(weights_ptr + pair), 0.0)
    offsets = row * n_features + start + offs_n
    if residual_ptr is not None:
        total += tl.load(residual_ptr + offsets).to(tl.float32)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty))


def moe_quantized(
    x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, up_packing: tuple[int, int, bool], down: Tensor,
    down_packing: tuple[int, int, bool], num_experts: int, up_bias: Tensor | None = None, down_bias: Tensor | None = None,
    residual: Tensor | None = None, activation: int = 3, gated: bool = True,
) -> Tensor:  # fmt: skip
    """Launches the kernels; no host sync. See `fastgpt.moe`.

    Args:
        x: (..., C) fp16|bf16|fp32; copied if the last dimension is not contiguous.
        up, down: (E · 2I or E · I, bytes) and (E · C, bytes) uint8, contiguous, as `QuantizedWeight.blocks`.
        up_packing, down_packing: bits, group_size and minima of each.
        num_experts: E.
        activation: its number in ACTIVATION_NUMBERS of fastgpt/ops/experts.py.

    Returns: (..., C) in x's dtype, contiguous.
    """
    out = x.new_empty(*x.shape)
    if out.numel() == 0:
        return out
    C, top_k = x.shape[-1], experts.shape[-1]
    I = up.shape[0] // num_experts // (2 if gated else 1)
    experts, weights = experts.reshape(-1, top_k).contiguous(), weights.reshape(-1, top_k).contiguous()
    up, down = (
        # They are loaded in words of as many bytes.
        blocks.clone() if blocks.data_ptr() % (4 if minima else 2) else blocks
        for blocks, (_, _, minima) in ((up, up_packing), (down, down_packing))
    )
    up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in (up_bias, down_bias))
    residual = None if residual is None else residual.contiguous()
    x = rows_of(x, C)
    rows, size, pdl = len(x), x.element_size(), has_dependent_launch(x.device)
    h = torch.empty((rows, top_k, I), dtype=torch.float32, device=x.device)
    tile = quantized_tile(1, rows * top_k * (up.shape[0] // num_experts), C, up_packing[0], size)
    constants = up_constants(tile, top_k, C, *up_packing, activation, gated, pdl)
    programs = grid("experts", rows * top_k, I // constants["BLOCK_N"])
    quantized_expert_up_kernel.launch(programs, constants, x, experts, up, up_bias, h, I, num_experts, x.stride(0))
    tile = quantized_tile(1, rows * C, I, down_packing[0], 4)
    constants = down_constants(tile, top_k, I, *down_packing, pdl)
    programs = grid("x", rows, C // constants["BLOCK_N"])
    quantized_expert_down_kernel.launch(
        programs, constants, h, experts, weights, down, down_bias, residual, out, C, num_experts
    )
    return out


@functools.cache
def up_constants(
    tile: QuantizedTile, top_k: int, K: int, bits: int, group_size: int, minima: bool, activation: int, gated: bool, pdl: bool
) -> Constants:
    """The compile-time arguments and options of `quantized_expert_up_kernel`."""
    most = max(1, tile.BLOCK_N // 2) if gated else tile.BLOCK_N
    return Constants(ACTIVATION=activation, GATED=gated, **_constants(tile, most, top_k, K, bits, group_size, minima, pdl))


@functools.cache
def down_constants(
    tile: QuantizedTile, top_k: int, K: int, bits: int, group_size: int, minima: bool, pdl: bool
) -> Constants:  # fmt: skip
    """Likewise, of `quantized_expert_down_kernel`."""
    return Constants(**_constants(tile, tile.BLOCK_N, top_k, K, bits, group_size, minima, pdl))


def _constants(tile, most_features, top_k, K, bits, group_size, minima, pdl):
    row_bytes = K // group_size * ((4 if minima else 2) + group_size * bits // 8)
    weight = dict(TOP_K=top_k, K=K, BITS=bits, GROUP=group_size, MINIMA=minima, ROW_BYTES=row_bytes)
    block_n = min(most_features, 4) if bits == 4 else most_features  # as in linear_quantized.py
    sizes = dict(BLOCK_N=block_n, UNITS=tile.UNITS, num_warps=tile.num_warps, num_stages=tile.num_stages)
    return dict(**weight, **sizes, maxnreg=128, enable_fp_fusion=True, **dependent_launch(pdl))
