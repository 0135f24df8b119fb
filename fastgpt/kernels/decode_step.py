"""The parts of a decode step around the blocks, one launch each: embedding, advancing positions, recording tokens."""

import functools

import torch
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.dependent_launch import dependent_launch, has_dependent_launch, launch_dependents, wait_for_dependencies
from fastgpt.kernels.launch import Constants, kernel
from fastgpt.kernels.limits import cdiv, grid
from fastgpt.kernels.tiles import ADVANCED, embedding_tile


@kernel(do_not_specialize=["ids_ptr", "positions_ptr", "vocabulary", "n_positions", "period"])
def embed_kernel(
    ids_ptr, weight_ptr, positions_ptr, position_weight_ptr, out_ptr, vocabulary, n_positions, period, scale,
    C: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C features of one token. Positions repeat after `period` tokens. All tensors are contiguous."""
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    token = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < C
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    row = tl.load(ids_ptr + token).to(tl.int64)
    read = tl.minimum(tl.maximum(row, 0), vocabulary - 1)
    x = tl.load(weight_ptr + read * C + offs_c, mask=mask, other=0.0)
    x = tl.where(row == read, x, float("nan")).to(dtype)
    if scale is not None:
        x = (x.to(tl.float32) * scale).to(dtype)
    if position_weight_ptr is not None:
        place = tl.load(positions_ptr + token % period).to(tl.int64)
        place = tl.minimum(tl.maximum(place, 0), n_positions - 1)
        p = tl.load(position_weight_ptr + place * C + offs_c, mask=mask, other=0.0).to(dtype)
        x = (x.to(tl.float32) + p.to(tl.float32)).to(dtype)
    tl.store(out_ptr + token * C + offs_c, x, mask=mask)


def embed(
    ids: Tensor, weight: Tensor, positions: Tensor | None = None, position_weight: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Launches the kernel; see `fastgpt.ops.decode_step.embed`."""
    C = weight.shape[1]
    out = torch.empty((*ids.shape, C), dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    ids, weight = ids.contiguous(), weight.contiguous()
    period, n_positions = 1, 1
    if position_weight is not None:
        positions, position_weight = positions.contiguous(), position_weight.contiguous()
        period, n_positions = positions.numel(), len(position_weight)
    else:
        positions = None
    scale = None if scale is None else float(scale)
    constants = embed_constants(C, has_dependent_launch(weight.device))
    embed_kernel.launch(
        (*grid("ids", ids.numel())[:1], cdiv(C, constants["BLOCK_C"]), 1), constants,
        ids, weight, positions, position_weight, out, len(weight), n_positions, period, scale,
    )  # fmt: skip
    return out


@functools.cache
def embed_constants(C: int, pdl: bool) -> Constants:
    """The compile-time arguments and options of `embed_kernel` for rows of C features; sums round as PyTorch's do."""
    return Constants(C=C, **embedding_tile(C), enable_fp_fusion=False, **dependent_launch(pdl))


@kernel(do_not_specialize=["lengths_ptr", "positions_ptr", "n_sequences"])
def advance_kernel(lengths_ptr, positions_ptr, n_sequences, BLOCK: tl.constexpr, PDL: tl.constexpr):
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n_sequences
    lengths = tl.load(lengths_ptr + offsets, mask=mask)
    tl.store(positions_ptr + offsets, lengths, mask=mask)
    tl.store(lengths_ptr + offsets, lengths + 1, mask=mask)


def advance(lengths: Tensor, positions: Tensor) -> None:
    """Launches the kernel; see `fastgpt.ops.decode_step.advance`. Both tensors are contiguous."""
    constants = one_warp_constants(ADVANCED, has_dependent_launch(lengths.device))
    advance_kernel.launch((cdiv(len(lengths), ADVANCED), 1, 1), constants, lengths, positions, len(lengths))


@kernel(
    do_not_specialize=[
        "token_ptr", "largest_ptr", "tokens_ptr", "extreme_ptr", "step_ptr", "ended_ptr", "eos_ptr", "n_rows", "n_eos",
    ]
)  # fmt: skip
def record_token_kernel(
    token_ptr, largest_ptr, tokens_ptr, extreme_ptr, step_ptr, ended_ptr, eos_ptr, n_rows, n_eos, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program of one warp, whose threads have all read the step before one of them increments it."""
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    step = tl.load(step_ptr)
    for start in range(0, n_rows, BLOCK):
        offsets = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        mask = offsets < n_rows
        token = tl.load(token_ptr + offsets, mask=mask, other=0)
        magnitude = tl.abs(tl.load(largest_ptr + offsets, mask=mask, other=0)).to(extreme_ptr.dtype.element_ty)
        extreme = tl.load(extreme_ptr + offsets, mask=mask, other=0)
        recorded, grows = token, (magnitude > extreme) | (magnitude != magnitude)
        if ended_ptr is not None:
            ended = tl.load(ended_ptr + offsets, mask=mask, other=0)
            recorded, grows = tl.where(ended != 0, -1, token), grows & (ended == 0)
            for i in range(n_eos):
                ended = tl.where(token == tl.load(eos_ptr + tl.cast(i, tl.int64)), 1, ended)
            tl.store(ended_ptr + offsets, ended.to(tl.uint8), mask=mask)
        tl.store(tokens_ptr + (tl.cast(step, tl.int64) * n_rows + offsets), recorded, mask=mask)
        tl.store(extreme_ptr + offsets, magnitude, mask=mask & grows)
    tl.store(step_ptr, step + 1)


def record_token(
    token: Tensor, largest: Tensor, tokens: Tensor, extreme: Tensor, step: Tensor, ended: Tensor | None = None,
    eos: Tensor | None = None,
) -> None:  # fmt: skip
    """Launches the kernel; see `fastgpt.ops.decode_step.record_token`. All tensors are contiguous."""
    if ended is not None:
        ended = ended.view(torch.uint8)
    n_rows = len(token)
    constants = one_warp_constants(32 if n_rows <= 32 else 256, has_dependent_launch(token.device))
    record_token_kernel.launch(
        (1, 1, 1), constants, token, largest, tokens, extreme, step, ended, eos, n_rows, 0 if eos is None else len(eos)
    )


@functools.cache
def one_warp_constants(block: int, pdl: bool) -> Constants:
    """The compile-time arguments and options of `advance_kernel` and `record_token_kernel`; `block` sequences at a time."""
    return Constants(BLOCK=block, num_warps=1, num_stages=1, enable_fp_fusion=False, **dependent_launch(pdl))
