"""Attention of few queries over a long cache, forward: the keys are split among programs, then the parts combined.

    out[b,h,i] = sum_j softmax_j(score[b,h,i,j]) v[b,h//g,j],   g = H // H_kv

One token's queries are too few programs to fill a GPU, and the time goes into reading K and V. So the keys of a
sequence are cut into splits of a fixed number, each a program's own, and the queries of all heads that share K and V
are rows of that program's tile: K and V are read once. Of each row a split leaves the maximum score m, the sum l of
exp(score - m) and acc, the sum of exp(score - m) v; a second kernel adds those of all splits,

    out = sum_s exp(m_s - m) acc_s / sum_s exp(m_s - m) l_s,   m = max_s m_s

Lengths are read on the device, and where a sequence is cut depends neither on them nor on the rest of the batch: what
is returned for a sequence is, bit for bit, what it would be alone or in a larger cache.

Source: Flash-Decoding (https://pytorch.org/blog/flash-decoding/), FlashAttention-2 (arXiv 2307.08691), algorithm 1.
"""

import functools
import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention_tiles import (
    LN_2,
    LOG2_E,
    aligned_rows,
    finish_softmax,
    load_keys,
    modified_scores,
    online_softmax,
    page_rows,
    visible_keys,
)


class Tile(NamedTuple):
    """What one program works on, and the warps, pipeline stages and registers it works with."""

    BLOCK_M: int  # rows: queries of the heads that share K and V
    BLOCK_N: int  # keys per step
    SPLIT: int  # keys per program, a multiple of BLOCK_N
    num_warps: int
    num_stages: int
    maxnreg: int  # registers a thread may use; left to itself, ptxas spills some for more programs at once


FEW = 16  # up to this many rows, the second tile of a pair

# (head dim padded to a power of two, bytes per element of q) -> tiles for (more than FEW rows, up to FEW).
# More rows leave more to combine, so they get longer splits. The same for every architecture: memory sets the pace.
TILES = {
    (16, 2): (Tile(64, 64, 1024, 4, 3, 255), Tile(16, 64, 256, 4, 3, 168)),
    (32, 2): (Tile(64, 64, 1024, 4, 3, 255), Tile(16, 64, 256, 4, 3, 168)),
    (64, 2): (Tile(64, 64, 1024, 4, 3, 255), Tile(16, 64, 256, 4, 4, 168)),
    (128, 2): (Tile(64, 64, 1024, 8, 3, 255), Tile(16, 64, 256, 4, 3, 255)),
    (256, 2): (Tile(32, 32, 1024, 8, 2, 255), Tile(16, 32, 256, 4, 3, 255)),
    (16, 4): (Tile(32, 32, 1024, 4, 2, 255), Tile(16, 32, 256, 4, 2, 168)),
    (32, 4): (Tile(32, 32, 1024, 4, 2, 255), Tile(16, 32, 256, 4, 2, 168)),
    (64, 4): (Tile(32, 32, 1024, 8, 2, 255), Tile(16, 32, 256, 4, 2, 255)),
    (128, 4): (Tile(32, 16, 1024, 8, 2, 255), Tile(16, 16, 256, 4, 2, 168)),
    (256, 4): (Tile(32, 16, 1024, 8, 2, 255), Tile(16, 16, 256, 8, 2, 255)),
}
BLOCK_SPLITS = tl.constexpr(16)  # splits that are added at once

# fp16 has no small numbers, and v_scale is one: weights times v_scale are computed this much too large. Of rows that
# fp16 can hold, v_scale is at most 65504 / 127 if int8, 65504 / 448 if e4m3.
INT8_UNIT, E4M3_UNIT = tl.constexpr(64.0), tl.constexpr(256.0)


@triton.jit
def _reach(kv_lengths_ptr, b, n_keys, n_queries, window):
    """The keys begin..end-1 that some query of sequence b may see."""
    end = n_keys
    if kv_lengths_ptr is not None:
        end = tl.maximum(0, tl.minimum(tl.load(kv_lengths_ptr + b), n_keys))
    begin = 0
    if window is not None:
        begin = tl.maximum(0, end - n_queries - window + 1)
    return begin, end


# Numbers that vary between calls must not compile a kernel again. What specialising would gain, the divisibility of
# strides, the launcher guarantees and the kernel states.
@triton.jit(
    do_not_specialize=[
        "kv_lengths_ptr", "block_table_ptr", "k_scale_ptr", "v_scale_ptr", "alibi_ptr", "sinks_ptr",
        "stride_qb", "stride_qh", "stride_qm",
        "stride_kb", "stride_kh", "stride_kn",
        "stride_vb", "stride_vh", "stride_vn",
        "stride_ksb", "stride_ksh", "stride_ksn",
        "stride_vsb", "stride_vsh", "stride_vsn",
        "stride_tb", "stride_tp",
        "n_heads", "group", "n_queries", "n_keys", "n_splits", "page", "n_pages", "window",
    ]
)  # fmt: skip
def _attend_split(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, acc_ptr, softmax_ptr,
    kv_lengths_ptr, block_table_ptr, k_scale_ptr, v_scale_ptr, alibi_ptr, sinks_ptr,
    stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ksb, stride_ksh, stride_ksn,
    stride_vsb, stride_vsh, stride_vsn,
    stride_tb, stride_tp,
    n_heads, group, n_queries, n_keys, n_splits, page, n_pages, scale, softcap, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one key/value head, over the keys of one split.

    Strides are in elements; q's, k's and v's last is 1. With a block table, stride_kb and the like are those of a page.
    out is (B, T, H, D), lse (B, H, T), acc (B, H, T, n_splits, D), softmax (B, H, T, n_splits, 2), m and l: contiguous.
    A split that is the only one writes out and lse, and acc and softmax are None; else sinks is None, for `_combine`.
    Optional tensors and numbers are None where they do not apply.
    """
    rows_of_head = group * n_queries  # row r: head h_kv * group + r // n_queries, token r % n_queries
    n_tiles = tl.cdiv(rows_of_head, BLOCK_M)
    pid = tl.program_id(0)
    tile = pid % n_tiles  # tiles that read the same keys run side by side
    split = pid // n_tiles % n_splits
    head_kv = pid // n_tiles // n_splits  # of all B * H_kv
    n_heads_kv = n_heads // group
    b = tl.cast(head_kv // n_heads_kv, tl.int64)
    h_kv = tl.cast(head_kv % n_heads_kv, tl.int64)

    begin, end = _reach(kv_lengths_ptr, b, n_keys, n_queries, window)
    start_split = (begin // SPLIT + split) * SPLIT
    if acc_ptr is not None:
        if start_split >= end:
            return  # and _combine will not look here

    offs_r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_r, rows_of_head - 1)  # past the last row, the last row again, which is not stored
    heads = h_kv * group + rows // n_queries
    tokens = rows % n_queries
    own = tokens + end - n_queries  # a query's position among the keys
    slopes = tl.load(alibi_ptr + heads) if alibi_ptr is not None else None

    q_ptr = tl.multiple_of(q_ptr + b * stride_qb, 16)
    k_ptr = tl.multiple_of(k_ptr + h_kv * stride_kh, 16)
    v_ptr = tl.multiple_of(v_ptr + h_kv * stride_vh, 16)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    q = load_keys(q_ptr, stride_qh, stride_qm, heads, tokens, True, dtype, HEAD_DIM, BLOCK_D, MASK_ROWS=False)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    V_UNIT: tl.constexpr = INT8_UNIT if v_ptr.dtype.element_ty == tl.int8 else E4M3_UNIT

    first = tl.maximum(start_split, begin // BLOCK_N * BLOCK_N)
    for start_n in range(first, tl.minimum(start_split + SPLIT, end), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        in_reach = (offs_n >= begin) & (offs_n < end)  # other keys are not read
        if block_table_ptr is not None:
            pages, key_rows = page_rows(block_table_ptr + b * stride_tb, stride_tp, offs_n, end, page, n_pages)
        else:
            pages, key_rows = b, offs_n

        k = load_keys(k_ptr, stride_kb, stride_kn, pages, key_rows, in_reach, dtype, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
        qk = tl.dot(q, k.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N) fp32
        if k_scale_ptr is not None:
            offsets = pages * stride_ksb + h_kv * stride_ksh + key_rows * tl.cast(stride_ksn, tl.int64)
            qk *= tl.load(k_scale_ptr + offsets, mask=in_reach, other=0.0)[None, :]
        scores = modified_scores(
            qk, scale, softcap, slopes, own, offs_n, None,
            HAS_SOFTCAP=softcap is not None, HAS_ALIBI=alibi_ptr is not None, HAS_BIAS=False,
        )  # fmt: skip
        visible = visible_keys(own[:, None], offs_n[None, :], end, window, IS_CAUSAL, HAS_WINDOW=window is not None)
        scores = tl.where(visible, scores, float("-inf"))

        p, rescale, row_sum, row_max = online_softmax(
            scores, row_sum, row_max, LOG2_E, MASKED=True, EXACT=dtype == tl.float32
        )
        if v_scale_ptr is not None:
            offsets = pages * stride_vsb + h_kv * stride_vsh + key_rows * tl.cast(stride_vsn, tl.int64)
            p *= (tl.load(v_scale_ptr + offsets, mask=in_reach, other=0.0) * V_UNIT)[None, :]
        v = load_keys(v_ptr, stride_vb, stride_vn, pages, key_rows, in_reach, dtype, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
        acc = tl.dot(p.to(dtype), v, acc * rescale[:, None], input_precision="ieee")

    if v_scale_ptr is not None:
        acc *= 1.0 / V_UNIT
    if dtype != tl.float32:  # see online_softmax
        row_max *= LN_2

    offs_d = tl.arange(0, BLOCK_D)
    stored = offs_r < rows_of_head
    mask = stored[:, None] & (offs_d[None, :] < HEAD_DIM)
    first_row = (b * n_heads + h_kv * group) * n_queries  # of all B * H * T
    if acc_ptr is None:
        out, lse = finish_softmax(acc, row_sum, row_max, sinks_ptr, heads)
        tl.store(lse_ptr + first_row + rows, lse, mask=stored)
        offsets = ((b * n_queries + tokens) * n_heads + heads) * HEAD_DIM
        tl.store(out_ptr + offsets[:, None] + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        parts = (first_row + rows) * n_splits + split
        tl.store(softmax_ptr + 2 * parts, row_max, mask=stored)
        tl.store(softmax_ptr + 2 * parts + 1, row_sum, mask=stored)
        tl.store(acc_ptr + parts[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=mask)


@triton.jit(
    do_not_specialize=["kv_lengths_ptr", "sinks_ptr", "n_heads", "n_queries", "n_keys", "n_splits", "window"]
)  # fmt: skip
def _combine(
    acc_ptr, softmax_ptr, out_ptr, lse_ptr, kv_lengths_ptr, sinks_ptr,
    n_heads, n_queries, n_keys, n_splits, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program: one row, of all the splits that `_attend_split` has written for its sequence."""
    row = tl.cast(tl.program_id(0), tl.int64)  # of all B * H * T
    token = row % n_queries
    head = row // n_queries % n_heads + tl.zeros([1], tl.int64)
    b = row // n_queries // n_heads

    begin, end = _reach(kv_lengths_ptr, b, n_keys, n_queries, window)
    written = tl.cdiv(end, SPLIT) - begin // SPLIT
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    row_max = tl.full([1], float("-inf"), tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    for start in range(0, written, BLOCK_SPLITS):
        offs_s = start + tl.arange(0, BLOCK_SPLITS)
        parts = row * n_splits + offs_s
        mask = offs_s < written
        maxima = tl.load(softmax_ptr + 2 * parts, mask=mask, other=float("-inf"))
        sums = tl.load(softmax_ptr + 2 * parts + 1, mask=mask, other=0.0)
        mask = mask[:, None] & (offs_d[None, :] < HEAD_DIM)
        accs = tl.load(acc_ptr + parts[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)

        new_max = tl.maximum(row_max, tl.max(maxima, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # as in online_softmax
        weights = tl.exp2((maxima - shift) * LOG2_E)
        rescale = tl.exp2((row_max - shift) * LOG2_E)
        row_sum = row_sum * rescale + tl.sum(weights * sums, 0)
        acc = acc * rescale[:, None] + tl.sum(weights[:, None] * accs, 0)[None, :]
        row_max = new_max

    out, lse = finish_softmax(acc, row_sum, row_max, sinks_ptr, head)
    tl.store(lse_ptr + row + tl.arange(0, 1), lse)
    offsets = ((b * n_queries + token) * n_heads + head) * HEAD_DIM
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets[:, None] + offs_d[None, :], out, mask=offs_d[None, :] < HEAD_DIM)


INTERPRETED = not isinstance(_attend_split, triton.JITFunction)  # TRITON_INTERPRET was set


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor,
    *, causal: bool, scale: float, window: int | None = None, softcap: float | None = None,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, kv_lengths: Tensor | None = None,
    block_table: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the kernels: two, or one where a split holds all keys; no host sync. What it computes, see `attention`.

    Args:
        q: (B, H, T, D) fp16|bf16|fp32, last dimension contiguous, other strides free, D <= 256; meant for T <= 16.
        k, v: (B, H_kv, S, D), or with block_table a pool (num_pages, H_kv, page, D), likewise; in q's dtype, or int8 or
            float8_e4m3fn with scales. H_kv divides H. Where rows do not start and end at multiples of 16 bytes (D times
            the size of an element is not one), all of k and v is copied.
        causal: bottom-right aligned: query i, at position i + L - T, sees key j when j <= i + L - T, L = kv_lengths[b]
            or S.
        scale: factor on q·k, any.
        window: query i sees only keys j > i + L - T - window. Others are not read, nor are their pages.
        softcap: scores become softcap * tanh(score / softcap).
        alibi_slopes: (H,) fp32; slope * |i + L - T - j| is subtracted.
        sinks: (H,), floating point: one more logit a head in the denominator and in lse.
        kv_lengths: (B,) int32 on the device, or None. Keys at and past it are not read, nor are their pages.
        block_table: (B, pages) int32.
        k_scale, v_scale: (B, H_kv, S) or (num_pages, H_kv, page) fp32, with 8-bit k and v.

    Returns:
        out (B, H, T, D) in q's dtype, contiguous as (B, T, H, D), and lse (B, H, T) fp32, natural log.
        A row that sees no key gets zeros and -inf.
    """
    B, H, T, D = q.shape
    n_pages, H_kv, page = k.shape[:3]
    S = page if block_table is None else page * block_table.shape[1]
    options = dict(
        causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        kv_lengths=kv_lengths, block_table=block_table, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    if INTERPRETED and q.dtype is torch.bfloat16:  # there, tl.dot reads bf16 as integers (Triton 3.6 to 3.9)
        k, v = (x.float() if x.dtype is torch.bfloat16 else x for x in (k, v))
        out, lse = attention_decode(q.float(), k, v, **options)
        return out.bfloat16(), lse

    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if k.dtype is torch.float8_e4m3fn:  # which the kernel decodes itself: not every architecture can
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    q, k, v = aligned_rows(q), aligned_rows(k), aligned_rows(v)
    kv_lengths, alibi_slopes, sinks = (x if x is None else x.contiguous() for x in (kv_lengths, alibi_slopes, sinks))
    window = None if window is None else min(window, S)

    constants = _constants(D, q.element_size(), k_scale is not None, H // H_kv * T <= FEW)
    split = constants["SPLIT"]
    n_splits = max(1, triton.cdiv(S, split))
    if window is not None:  # all queries together see at most T + window - 1 keys, wherever these begin
        n_splits = min(n_splits, (T + window - 3) // split + 2)
    acc = softmax = None
    if n_splits > 1:
        acc = torch.empty((B, H, T, n_splits, D), dtype=torch.float32, device=q.device)
        softmax = torch.empty((B, H, T, n_splits, 2), dtype=torch.float32, device=q.device)

    grid = (triton.cdiv(H // H_kv * T, constants["BLOCK_M"]) * n_splits * B * H_kv,)
    with torch.cuda.device_of(q):
        _attend_split[grid](
            q, k, v, out, lse, acc, softmax,
            kv_lengths, block_table, k_scale, v_scale, alibi_slopes, sinks if n_splits == 1 else None,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *((0, 0, 0) if k_scale is None else k_scale.stride()),
            *((0, 0, 0) if v_scale is None else v_scale.stride()),
            *((0, 0) if block_table is None else block_table.stride()),
            H, H // H_kv, T, S, n_splits, page, n_pages, scale, softcap, window,
            IS_CAUSAL=causal, **constants,
        )  # fmt: skip
        if n_splits > 1:
            _combine[(B * H * T,)](
                acc, softmax, out, lse, kv_lengths, sinks, H, T, S, n_splits, window, **_combine_constants(D, split)
            )
    return out, lse


@functools.cache
def _constants(head_dim: int, element_size: int, is_8_bits: bool, few: bool) -> dict:
    """Compile-time arguments and options of `_attend_split` that follow from shapes and dtypes."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    tile = TILES[block_d, element_size][few]
    if is_8_bits and element_size == 4:  # pipelined, Triton 3.9 decodes a key once per row, in too many registers
        tile = tile._replace(num_stages=1)
    return dict(HEAD_DIM=head_dim, BLOCK_D=block_d, **tile._asdict(), enable_fp_fusion=True)


@functools.cache
def _combine_constants(head_dim: int, split: int) -> dict:
    """Likewise of `_combine`."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    return dict(HEAD_DIM=head_dim, BLOCK_D=block_d, SPLIT=split, num_warps=4, num_stages=1, enable_fp_fusion=True)


# What a call may bring along, by the kernel's argument that is None without it, and what tells that keys are split.
FEATURES = ("kv_lengths_ptr", "block_table_ptr", "alibi_ptr", "softcap", "window")
PARTS = ("acc_ptr", "softmax_ptr")


def aot_configurations(arch: int):
    """As in attention_forward.py; tiles are the same for every architecture.

    Of each tile there are the kernels without features, with all, and those in between that serving a model needs. Of
    the head dims that share a tile there are two: one that fills it and one that does not.
    """
    for (block_d, element_size), dtype in itertools.product(TILES, (torch.float16, torch.bfloat16, torch.float32)):
        if dtype.itemsize != element_size:
            continue
        for head_dim, few in itertools.product((block_d, block_d * 5 // 8), (False, True)):
            for cache_dtype, given in (
                (dtype, ()),
                (dtype, (*PARTS, "kv_lengths_ptr")),
                (dtype, (*PARTS, "kv_lengths_ptr", "block_table_ptr")),
                (torch.int8, (*PARTS, "kv_lengths_ptr")),
                (torch.float8_e4m3fn, (*PARTS, "kv_lengths_ptr")),
                (torch.int8, (*PARTS, *FEATURES)),
                (torch.float8_e4m3fn, (*FEATURES, "sinks_ptr")),
            ):
                constants = _constants(head_dim, element_size, cache_dtype != dtype, few)
                scales = () if cache_dtype == dtype else ("k_scale_ptr", "v_scale_ptr")
                yield _attend_split, dtype, cache_dtype, dict(constants, IS_CAUSAL=True), (*given, *scales)
            if few:
                for given in (PARTS, (*PARTS, "kv_lengths_ptr", "sinks_ptr", "window")):
                    yield _combine, dtype, dtype, _combine_constants(head_dim, 256), given
