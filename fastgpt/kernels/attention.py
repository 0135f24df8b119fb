"""Causal attention, forward: one pass over the keys with an online softmax.

    out[b,h,i] = sum_j softmax_j(scale * q[b,h,i]·k[b,h//g,j]) v[b,h//g,j],   g = H // H_kv
    lse[b,h,i] = log sum_j exp(scale * q[b,h,i]·k[b,h//g,j])

Each program owns BLOCK_M queries of one head and walks over the keys they see, BLOCK_N at a time.
It holds, per query, the running maximum m and the sum l of exp(score - m), and rescales what it has
accumulated whenever m grows, so no (T, S) matrix ever exists. Exponentials are in base 2, the
hardware's own: exp(x) = 2^(x log2 e), with log2 e folded into the scale.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))


class Tile(NamedTuple):
    """What one program works on, and the warps and pipeline stages it works with."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys per step
    num_warps: int
    num_stages: int


SHORT = 16  # up to this many queries, the short tile of a pair

# (head dim padded to a power of two, bytes per element) -> tiles for (more than SHORT queries, up to SHORT).
TILES = {
    (16, 2): (Tile(128, 64, 4, 3), Tile(16, 64, 4, 3)),
    (32, 2): (Tile(128, 64, 4, 3), Tile(16, 128, 4, 3)),
    (64, 2): (Tile(128, 64, 4, 4), Tile(16, 64, 4, 3)),
    (128, 2): (Tile(128, 64, 8, 3), Tile(16, 64, 4, 3)),
    (256, 2): (Tile(64, 32, 8, 2), Tile(16, 32, 4, 3)),
    (16, 4): (Tile(64, 32, 4, 2), Tile(16, 128, 4, 2)),
    (32, 4): (Tile(64, 64, 8, 2), Tile(16, 32, 4, 2)),
    (64, 4): (Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
    (128, 4): (Tile(32, 16, 8, 3), Tile(16, 16, 8, 2)),
    (256, 4): (Tile(32, 16, 8, 2), Tile(16, 16, 4, 2)),
}


@triton.jit
def _load_rows(ptr, stride, offs_row, n_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """A tile (rows, BLOCK_D), zero from n_rows on and past HEAD_DIM. Rows start and end at multiples of 16 bytes."""
    ALIGN: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth  # elements in 16 bytes
    ROW: tl.constexpr = (HEAD_DIM + ALIGN - 1) // ALIGN * ALIGN
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs_row[:, None] * tl.multiple_of(tl.cast(stride, tl.int64), ALIGN) + offs_d[None, :]
    mask = tl.full([1, 1], True, tl.int1)
    if MASK_ROWS:
        mask = mask & (offs_row[:, None] < n_rows)
    if ROW < BLOCK_D:
        mask = mask & (offs_d[None, :] < ROW)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _attend(
    acc, row_sum, row_max_log2,
    q, k_ptr, v_ptr, stride_kn, stride_vn,
    begin, end, last_key, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the keys begin..end-1 into (acc, row_sum, row_max_log2).

    Unmasked, every query sees every key of that range and end - begin is a multiple of BLOCK_N.
    Masked, keys from `end` on are not read and, if causal, a query sees the keys up to its last_key.
    """
    for start_n in range(begin, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, stride_kn, offs_n, end, HEAD_DIM, BLOCK_D, MASKED)
        qk = tl.dot(q, k.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N) fp32, not yet scaled
        if MASKED:
            visible = offs_n[None, :] <= last_key[:, None] if IS_CAUSAL else offs_n[None, :] < end
            qk = tl.where(visible, qk, float("-inf"))

        new_max_log2 = tl.maximum(row_max_log2, tl.max(qk, 1) * scale_log2)
        # A query that has seen no key yet has maximum -inf, and -inf - -inf would be NaN.
        shift_log2 = tl.where(new_max_log2 == float("-inf"), 0.0, new_max_log2) if MASKED else new_max_log2
        p = tl.exp2(qk * scale_log2 - shift_log2[:, None])
        rescale = tl.exp2(row_max_log2 - shift_log2)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max_log2 = new_max_log2

        v = _load_rows(v_ptr, stride_vn, offs_n, end, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, row_sum, row_max_log2


# Numbers that vary between calls must not compile the kernel again. What specialising would gain, the divisibility
# of strides, the launcher guarantees and the kernel states.
@triton.jit(
    do_not_specialize=[
        "kv_lengths_ptr",
        "stride_qb", "stride_qh", "stride_qm",
        "stride_kb", "stride_kh", "stride_kn",
        "stride_vb", "stride_vh", "stride_vn",
        "n_heads", "group", "n_queries", "n_keys",
    ]
)  # fmt: skip
def _attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, kv_lengths_ptr,
    stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    n_heads, group, n_queries, n_keys, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Strides are in elements; the last dimension's is 1.

    out is (B, T, H, D) and lse (B, H, T), both contiguous; kv_lengths (B,) int32 or None.
    """
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    pid = tl.program_id(0)
    start_m = (n_tiles - 1 - pid % n_tiles) * BLOCK_M  # last queries first: if causal, they have most to do
    head = pid // n_tiles  # of all B * H
    b = tl.cast(head // n_heads, tl.int64)
    h = tl.cast(head % n_heads, tl.int64)
    h_kv = tl.cast(head % n_heads // group, tl.int64)

    length = n_keys
    if kv_lengths_ptr is not None:
        length = tl.maximum(0, tl.minimum(tl.load(kv_lengths_ptr + b), n_keys))
    rows = tl.arange(0, BLOCK_M)  # queries of the tile, counted from start_m
    n_rows = n_queries - start_m
    past = start_m + length - n_queries  # keys before the one at the position of the tile's first query
    last_key = past + rows  # that each query sees, if causal

    # Keys from `end` on are seen by no query of the tile, keys before `interior` by all of them.
    end = past + tl.minimum(BLOCK_M, n_rows) if IS_CAUSAL else length
    interior = tl.maximum(past + 1, 0) // BLOCK_N * BLOCK_N if IS_CAUSAL else length // BLOCK_N * BLOCK_N

    q_ptr = tl.multiple_of(q_ptr + b * stride_qb + h * stride_qh + tl.cast(start_m, tl.int64) * stride_qm, 16)
    k_ptr = tl.multiple_of(k_ptr + b * stride_kb + h_kv * stride_kh, 16)
    v_ptr = tl.multiple_of(v_ptr + b * stride_vb + h_kv * stride_vh, 16)
    q = _load_rows(q_ptr, stride_qm, rows, n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max_log2 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, row_sum, row_max_log2 = _attend(
        acc, row_sum, row_max_log2, q, k_ptr, v_ptr, stride_kn, stride_vn, 0, interior, last_key, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, IS_CAUSAL, MASKED=False,
    )  # fmt: skip
    acc, row_sum, row_max_log2 = _attend(
        acc, row_sum, row_max_log2, q, k_ptr, v_ptr, stride_kn, stride_vn, interior, end, last_key, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, IS_CAUSAL, MASKED=True,
    )  # fmt: skip

    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # no key seen: out 0, lse -inf
    lse = (row_max_log2 + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + (b * n_heads + h) * n_queries + start_m + rows, lse, mask=rows < n_rows)
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    out_ptr += ((b * n_queries + start_m) * n_heads + h) * HEAD_DIM
    offs_d = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < n_rows) & (offs_d[None, :] < HEAD_DIM)
    tl.store(out_ptr + rows[:, None] * (n_heads * HEAD_DIM) + offs_d[None, :], out, mask=mask)


INTERPRETED = not isinstance(_attention_forward, triton.JITFunction)  # TRITON_INTERPRET was set


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, kv_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launches the kernel: one launch, no host sync.

    Args:
        q: (B, H, T, D) fp16|bf16|fp32, last dimension contiguous, other strides free, D <= 256.
        k, v: (B, H_kv, S, D), likewise; H_kv divides H.
        causal: bottom-right aligned: query i sees key j when j <= i + L - T, L = kv_lengths[b] or S.
        scale: factor on q·k.
        kv_lengths: (B,) int32 on the device, or None. Keys at and past it are not read.

    Returns:
        out (B, H, T, D) in q's dtype, contiguous as (B, T, H, D), and lse (B, H, T) fp32, natural log.
        A query that sees no key gets zeros and -inf.
    """
    B, H, T, D = q.shape
    H_kv, S = k.shape[1:3]
    if INTERPRETED and q.dtype is torch.bfloat16:  # there, tl.dot reads bf16 as integers (Triton 3.6 to 3.9)
        out, lse = attention_forward(q.float(), k.float(), v.float(), causal, scale, kv_lengths)
        return out.bfloat16(), lse

    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if scale <= 0.0:  # the kernel takes the maximum before it scales
        q, scale = (-q, -scale) if scale < 0.0 else (torch.zeros_like(q), 1.0)
    q, k, v = _aligned_rows(q), _aligned_rows(k), _aligned_rows(v)
    kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()

    constants = _constants(D, q.element_size(), T <= SHORT, causal)
    grid = (triton.cdiv(T, constants["BLOCK_M"]) * B * H,)
    with torch.cuda.device_of(q):
        _attention_forward[grid](
            q, k, v, out, lse, kv_lengths,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            H, H // H_kv, T, S, scale * LOG2_E,
            **constants,
        )  # fmt: skip
    return out, lse


def _aligned_rows(x: Tensor) -> Tensor:
    """x (B, H, N, D), or a copy, if its rows do not start and end at multiples of 16 bytes as vector loads need."""
    b, h, n, _ = x.stride()
    size, D = x.element_size(), x.shape[-1]
    if (x.data_ptr() | (b | h | n | D) * size) % 16 == 0:
        return x
    padded = x.new_zeros((*x.shape[:-1], triton.cdiv(D * size, 16) * 16 // size))
    padded[..., :D] = x
    return padded


@functools.cache
def _constants(head_dim: int, element_size: int, short: bool, causal: bool) -> dict:
    """The kernel's compile-time arguments and options."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    tile = TILES[block_d, element_size][short]
    return dict(HEAD_DIM=head_dim, BLOCK_D=block_d, IS_CAUSAL=causal, **tile._asdict(), enable_fp_fusion=True)


def aot_configurations():
    """Yields (dtype, constants, whether kv_lengths is given) for each kernel that ships, to compile ahead of time.

    Of the head dims that share a tile there are two: one that fills it and one that does not.
    """
    for (block_d, element_size), dtype in itertools.product(TILES, (torch.float16, torch.bfloat16, torch.float32)):
        if dtype.itemsize != element_size:
            continue
        for head_dim, short, causal, has_lengths in itertools.product(
            (block_d, block_d * 5 // 8), (False, True), (True, False), (True, False)
        ):
            yield dtype, _constants(head_dim, element_size, short, causal), has_lengths
