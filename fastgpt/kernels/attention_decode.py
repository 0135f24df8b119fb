"""Attention of few queries over a long cache, forward: keys are split among programs, and partial results combined.

    out[b,h,i] = sum_j softmax_j(score[b,h,i,j]) v[b,h//g,j],   g = H // H_kv

The queries of one token make too few programs to fill a GPU, and the time is spent reading K and V. So the keys of a sequence
are cut into splits of equal size, one per program, and the queries of all heads that share K and V are rows of that program's
tile: K and V are read once. For each row, a split stores the maximum score m, the sum l of exp(score - m), and acc, the sum of
exp(score - m) v. The last program of GROUP splits to finish combines theirs, and the last program of all groups those of the
groups:

    out = sum_s exp(m_s - m) acc_s / sum_s exp(m_s - m) l_s,   m = max_s m_s

always in the order of the keys, whichever program it is, so that results are the same bits in every run. A token that is
appended to the cache is rotated, stored and attended to in the same launch.

Lengths are read on the device. The size of a split does not depend on them, but on how many programs there are for the GPU's
multiprocessors: on the batch size, the number of heads and the cache's capacity. Calls with the same split size return the
same bits for a sequence, whatever the other sequences are.

Source: Flash-Decoding (https://pytorch.org/blog/flash-decoding/), FlashAttention-2 (arXiv 2307.08691), algorithm 1.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.architecture import architecture, multiprocessors
from fastgpt.kernels.attention_decode_new import Rotation, append_token, rotated_rows
from fastgpt.kernels.attention_decode_parts import GROUP, combine, finish
from fastgpt.kernels.attention_rows import (
    KeysValues,
    aligned_rows,
    from_8_bits,
    has_aligned_rows,
    load_keys,
    pages_of,
    values_from_8_bits,
)
from fastgpt.kernels.attention_scores import (
    HEADROOM,
    LN_2,
    LOG2_E,
    MIN_EXPONENT,
    Features,
    exponents_of,
    load_scores,
    modified_scores,
    online_softmax,
    power_of_two,
    score_rows,
    seen_keys,
    unit_of,
    visible_keys,
)
from fastgpt.kernels.dependent_launch import dependent_launch, has_dependent_launch, launch_dependents, wait_for_dependencies
from fastgpt.kernels.launch import Constants, Launch, contiguous, dense, kernel, no_launch, plan
from fastgpt.kernels.limits import cdiv, check_count, check_sizes, grid
from fastgpt.kernels.tiles import FEW_ROWS, decode_tile, head_blocks, padded_dim, parts_at_once, splits


@triton.jit
def _visible_range(kv_lengths_ptr, b, n_keys, n_queries, window):
    """begin, end: the range of keys that any query of sequence b may see."""
    end = n_keys
    if kv_lengths_ptr is not None:
        end = tl.maximum(0, tl.minimum(tl.load(kv_lengths_ptr + b), n_keys))
    begin = 0
    if window is not None:
        begin = tl.maximum(0, end - n_queries - window + 1)
    return begin, end


@triton.jit
def _attend_keys(
    acc, row_sum, row_max, exponent, q, q_rest, kv, features, mask_rows, bias_rows, b, q_pos, start, stop, begin, end, slot,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Accumulates a split's keys into (acc, row_sum, row_max), of which row_max is returned in base e.

    Args: exponent of acc's unit, see MIN_EXPONENT; kv and features: `KeysValues` of sequence b, and `Features`; mask_rows and
        bias_rows (M, 1): pointers to the rows of their tiles, or None; q_pos (M,): each query's position among the keys;
        start, stop: the split's range of keys, where start is a multiple of BLOCK_N; begin, end: the range of keys that any
        query sees, others are not read; slot: a key that is not read either, or None.
    """
    dtype: tl.constexpr = q.dtype
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_V: tl.constexpr = acc.shape[1]
    EXACT: tl.constexpr = dtype == tl.float32
    HAS_UNIT: tl.constexpr = kv.v_scale_ptr is not None and dtype == tl.float16
    start = tl.maximum(start, begin // BLOCK_N * BLOCK_N)
    if kv.block_table_ptr is not None:  # one iteration ahead, or the pipeliner would spend a stage on this load
        next_pages = pages_of(kv, start + tl.arange(0, BLOCK_N), end)
    for start_n in range(start, stop, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        in_range = (offs_n >= begin) & (offs_n < end)
        if slot is not None:
            in_range = in_range & (offs_n != slot)
        pages, key_rows = b, offs_n
        if kv.block_table_ptr is not None:
            pages, key_rows = next_pages.to(tl.int64), offs_n % kv.page
            next_pages = pages_of(kv, offs_n + BLOCK_N, end)

        k = load_keys(kv.k_ptr, kv.stride_kb, kv.stride_kn, pages, key_rows, in_range, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
        qk = tl.dot(q, from_8_bits(k, dtype).T, input_precision="ieee")  # (BLOCK_M, BLOCK_N) fp32
        if q_rest is not None:
            k_rest = load_keys(
                kv.k_ptr + BLOCK_D, kv.stride_kb, kv.stride_kn, pages, key_rows, in_range, HEAD_DIM - BLOCK_D,
                q_rest.shape[1], MASK_ROWS=True,
            )  # fmt: skip
            qk = tl.dot(q_rest, from_8_bits(k_rest, dtype).T, qk, input_precision="ieee")
        if kv.k_scale_ptr is not None:
            offsets = pages * kv.stride_ksb + key_rows * tl.cast(kv.stride_ksn, tl.int64)
            qk *= tl.load(kv.k_scale_ptr + offsets, mask=in_range, other=0.0)[None, :]
        bias = None
        if bias_rows is not None:
            bias = load_scores(
                bias_rows, offs_n[None, :], features.stride_bias_n, True, features.n_keys, BIAS_UNIT, WHOLE=False
            ).to(tl.float32)  # fmt: skip
        scores = modified_scores(qk, features.scale, features.softcap, features.slope, q_pos, offs_n, bias)
        visible = visible_keys(q_pos[:, None], offs_n[None, :], end, features.window, IS_CAUSAL)
        if slot is not None:
            visible = visible & (offs_n != slot)[None, :]
        if mask_rows is not None:
            kept = load_scores(
                mask_rows, offs_n[None, :], features.stride_mask_n, True, features.n_keys, MASK_UNIT, WHOLE=False
            )
            visible = visible & (kept != 0)
        scores = tl.where(visible, scores, float("-inf"))

        if mask_rows is not None or bias_rows is not None:  # values of keys that are masked in all rows count as zeros
            seen = seen_keys(scores, None)
        p, rescale, row_sum, row_max = online_softmax(scores, row_sum, row_max, LOG2_E, EXACT=EXACT)
        if kv.v_scale_ptr is not None:
            offsets = pages * kv.stride_vsb + key_rows * tl.cast(kv.stride_vsn, tl.int64)
            factors = tl.load(kv.v_scale_ptr + offsets, mask=in_range, other=0.0)
            if mask_rows is not None or bias_rows is not None:
                factors = tl.where(seen, factors, 0.0)
            if HAS_UNIT:
                last = exponent
                exponent = tl.maximum(exponent, tl.max(exponents_of(factors), 0))
                factors *= power_of_two(254 + HEADROOM - exponent)
                rescale *= power_of_two(127 + last - exponent)
            p *= factors[None, :]
        v = load_keys(kv.v_ptr, kv.stride_vb, kv.stride_vn, pages, key_rows, in_range, V_DIM, BLOCK_V, MASK_ROWS=True)
        v = values_from_8_bits(v, dtype)
        if mask_rows is not None or bias_rows is not None:
            v = tl.where(seen[:, None], v, 0.0)
        acc = tl.dot(p.to(dtype), v, acc * rescale[:, None], input_precision="ieee")

    if HAS_UNIT:
        acc *= power_of_two(exponent - HEADROOM)
    if not EXACT:  # see online_softmax
        row_max *= LN_2
    return acc, row_sum, row_max


# Not specialized: integers that vary between calls must not recompile the kernel. Specialization would tell it the
# divisibility of strides, which the launcher guarantees and the kernel asserts by tl.multiple_of.
@kernel(
    do_not_specialize=[
        "counters_ptr", "kv_lengths_ptr", "block_table_ptr", "k_scale_ptr", "v_scale_ptr", "alibi_ptr", "sinks_ptr", "mask_ptr",
        "bias_ptr",
        "new_k_ptr", "new_v_ptr", "slots_ptr", "positions_ptr", "cos_ptr", "sin_ptr",
        "stride_qb", "stride_qh", "stride_qm",
        "stride_kb", "stride_kh", "stride_kn",
        "stride_vb", "stride_vh", "stride_vn",
        "stride_ksb", "stride_ksh", "stride_ksn",
        "stride_vsb", "stride_vsh", "stride_vsn",
        "stride_tb", "stride_tp",
        "stride_mask_b", "stride_mask_h", "stride_mask_m", "stride_mask_n",
        "stride_bias_b", "stride_bias_h", "stride_bias_m", "stride_bias_n",
        "stride_nkb", "stride_nkh", "stride_nvb", "stride_nvh", "stride_sb", "stride_pb", "stride_cos", "stride_sin",
        "n_heads", "group", "rows_of_head", "n_queries", "n_keys", "n_splits", "page", "n_pages", "n_angles", "pairs", "window",
    ]
)  # fmt: skip
def attend_split_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, acc_ptr, softmax_ptr, counters_ptr,
    kv_lengths_ptr, alibi_ptr, sinks_ptr, block_table_ptr, k_scale_ptr, v_scale_ptr, mask_ptr, bias_ptr,
    new_k_ptr, new_v_ptr, slots_ptr, positions_ptr, cos_ptr, sin_ptr,
    stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ksb, stride_ksh, stride_ksn,
    stride_vsb, stride_vsh, stride_vsn,
    stride_tb, stride_tp,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_nkb, stride_nkh, stride_nvb, stride_nvh, stride_sb, stride_pb, stride_cos, stride_sin,
    n_heads, group, rows_of_head, n_queries, n_keys, n_splits, page, n_pages, n_angles, pairs, scale, softcap, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    IS_CAUSAL: tl.constexpr, INTERLEAVED: tl.constexpr, MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, AT_ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one key/value head, over the keys of one split.

    Strides are in elements; the last stride of q, k and v is 1. With a block table, stride_kb and the like are those of a page.
    Rows of q and k have HEAD_DIM elements, those past BLOCK_D in a tile of BLOCK_R unless that is 0; rows of v and out V_DIM.
    Contiguous: out (B, T, H, V_DIM), lse (B, H, T), acc (B, H, T, n_parts, V_DIM), softmax (B, H, T, n_parts, 2) for m and l,
    counters (B * H_kv * tiles, n_groups + 1), zeros. n_groups = cdiv(n_splits, GROUP), n_parts = n_splits + n_groups: the
    splits' partial results, then those of groups of splits. With a single split, acc, softmax and counters are None.

    With new_k and new_v (B, H_kv, 1, ...), a token of each sequence is appended to the cache in slot slots[b], unless that is
    negative, and is attended to there: every program takes it from new_k and new_v, and one of each head stores it, so none
    waits for another. With cos, q and new_k are rotated by positions[b] first. Optional arguments are None if absent.

    Row r of rows_of_head = group * n_queries is head h_kv * group + r // n_queries, token r % n_queries.
    """
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    n_tiles = tl.cdiv(rows_of_head, BLOCK_M)
    pid = tl.program_id(0)
    tile = pid % n_tiles  # neighboring programs read the same keys
    split = pid // n_tiles % n_splits
    head_kv = pid // n_tiles // n_splits  # of all B * H_kv
    n_heads_kv = n_heads // group
    b = tl.cast(head_kv // n_heads_kv, tl.int64)
    h_kv = tl.cast(head_kv % n_heads_kv, tl.int64)

    begin, end = _visible_range(kv_lengths_ptr, b, n_keys, n_queries, window)
    n_written = tl.maximum(tl.cdiv(end, SPLIT) - begin // SPLIT, 1)  # splits of this sequence, at least one
    if acc_ptr is not None:
        if split >= n_written:
            return
    start_split = (begin // SPLIT + split) * SPLIT
    stop = tl.minimum(start_split + SPLIT, end)

    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, rows_of_head - 1)  # rows past the last repeat it, and are not stored
    heads = h_kv * group + rows // n_queries
    tokens = rows % n_queries
    q_pos = tokens + end - n_queries  # a query's position among the keys
    stored = offs_m < rows_of_head

    q_ptr = tl.multiple_of(q_ptr + b * stride_qb, 16)
    q = load_keys(q_ptr, stride_qh, stride_qm, heads, tokens, True, HEAD_DIM, BLOCK_D, MASK_ROWS=False)
    q_rest = None
    if BLOCK_R > 0:
        q_rest = load_keys(
            q_ptr + BLOCK_D, stride_qh, stride_qm, heads, tokens, True, HEAD_DIM - BLOCK_D, BLOCK_R, MASK_ROWS=False
        )
    if k_scale_ptr is not None:
        k_scale_ptr += h_kv * stride_ksh
        v_scale_ptr += h_kv * stride_vsh
    if block_table_ptr is not None:
        block_table_ptr += b * stride_tb
    kv = KeysValues(
        tl.multiple_of(k_ptr + h_kv * stride_kh, 16), stride_kb, stride_kn,
        tl.multiple_of(v_ptr + h_kv * stride_vh, 16), stride_vb, stride_vn,
        k_scale_ptr, stride_ksb, stride_ksn, v_scale_ptr, stride_vsb, stride_vsn, block_table_ptr, stride_tp, page, n_pages,
    )  # fmt: skip
    slopes = None
    if alibi_ptr is not None:
        slopes = tl.load(alibi_ptr + heads)
    features = Features(
        scale, softcap, slopes, window, mask_ptr, stride_mask_m, stride_mask_n, bias_ptr, stride_bias_m, stride_bias_n,
        n_keys, None, 0, 1.0,
    )  # fmt: skip
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    exponent = tl.full([], MIN_EXPONENT, tl.int32)

    slot = -1  # a key that is not read
    if new_k_ptr is not None:
        rotation = None
        if cos_ptr is not None:
            position = tl.load(positions_ptr + b * stride_pb).to(tl.int64)
            end_rotary = tl.where((position >= 0) & (position < n_angles), 2 * pairs, 0)
            rotation = Rotation(
                cos_ptr + position * stride_cos, sin_ptr + position * stride_sin, pairs, end_rotary, position < n_angles
            )
            q_rows = q_ptr + heads * stride_qh + tokens * tl.cast(stride_qm, tl.int64)
            q = rotated_rows(q, q_rows, rotation, 0, INTERLEAVED)
            if BLOCK_R > 0:
                q_rest = rotated_rows(q_rest, q_rows, rotation, BLOCK_D, INTERLEAVED)
        new_k_row = new_k_ptr + b * stride_nkb + h_kv * stride_nkh
        new_v_row = new_v_ptr + b * stride_nvb + h_kv * stride_nvh
        wanted = tl.load(slots_ptr + b * stride_sb).to(tl.int64)
        acc, row_sum, row_max, exponent, slot = append_token(
            acc, row_sum, row_max, exponent, q, q_rest, new_k_row, new_v_row, wanted, rotation, kv, features, b, q_pos,
            tl.maximum(begin, start_split), stop, (split == 0) & (tile == 0), HEAD_DIM, V_DIM, INTERLEAVED,
        )  # fmt: skip

    mask_rows = None
    if mask_ptr is not None:
        mask_rows = score_rows(mask_ptr + b * stride_mask_b, heads[:, None], stride_mask_h, MASK_UNIT)
        mask_rows = score_rows(mask_rows, tokens[:, None], stride_mask_m, MASK_UNIT)
    bias_rows = None
    if bias_ptr is not None:
        bias_rows = score_rows(bias_ptr + b * stride_bias_b, heads[:, None], stride_bias_h, BIAS_UNIT)
        bias_rows = score_rows(bias_rows, tokens[:, None], stride_bias_m, BIAS_UNIT)
    acc, row_sum, row_max = _attend_keys(
        acc, row_sum, row_max, exponent, q, q_rest, kv, features, mask_rows, bias_rows, b, q_pos, start_split, stop, begin, end,
        slot if new_k_ptr is not None else None, HEAD_DIM, V_DIM, BLOCK_N, MASK_UNIT, BIAS_UNIT, IS_CAUSAL,
    )  # fmt: skip

    first_row = (b * n_heads + h_kv * group) * n_queries  # of all B * H * T
    lse_rows = lse_ptr + (first_row + rows)
    out_rows = out_ptr + ((b * n_queries + tokens) * n_heads + heads) * V_DIM
    if acc_ptr is None:
        finish(out_rows, lse_rows, acc, row_sum, row_max, sinks_ptr, heads, stored, V_DIM)
    elif n_written == 1:
        finish(out_rows, lse_rows, acc, row_sum, row_max, sinks_ptr, heads, stored, V_DIM)
    else:
        n_groups = tl.cdiv(n_splits, GROUP)
        counters_ptr += (tl.cast(head_kv, tl.int64) * n_tiles + tile) * (n_groups + 1)
        parts = (first_row + rows) * (n_splits + n_groups)
        combine(
            out_rows, lse_rows, acc, row_sum, row_max, softmax_ptr, acc_ptr, counters_ptr, parts, split, n_splits, n_written,
            sinks_ptr, heads, stored, V_DIM, AT_ONCE,
        )  # fmt: skip


INTERPRETED = not isinstance(attend_split_kernel, triton.JITFunction)  # Triton's interpreter: TRITON_INTERPRET was set


class NewToken(NamedTuple):
    """A token of each sequence that is appended to the cache, as `attention_with_kv_cache` takes it. If k and v have 8 bits,
    their scales are written, too."""

    k: Tensor  # (B, H_kv, 1, D) in q's dtype, last dimension contiguous
    v: Tensor
    slots: Tensor  # (B, 1) int32|int64
    positions: Tensor | None = None  # (B, 1) int32|int64, with cos and sin
    cos: Tensor | None = None  # (positions, R/2) fp32, rows contiguous
    sin: Tensor | None = None
    interleaved: bool = False


NO_TOKEN = NewToken(None, None, None)  # type: ignore[arg-type]  # what the kernel gets without one


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor,
    *, causal: bool, scale: float, window: int | None = None, softcap: float | None = None,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, kv_lengths: Tensor | None = None,
    block_table: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    mask: Tensor | None = None, bias: Tensor | None = None,
    new: NewToken | None = None, counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the kernel; no host sync. It computes `attention`, or with a new token `attention_with_kv_cache`.

    Args:
        q: (B, H, T, D) fp16|bf16|fp32, last dimension contiguous, other strides free, D <= 576; meant for T <= 16.
        k, v: (B, H_kv, S, D), or with block_table a pool (num_pages, H_kv, page, D), with the same layout; in q's dtype, or
            int8 or float8_e4m3fn with scales. H_kv divides H. v may have another head dim D_v, up to 576, in fp32 512. Unless
            rows start and end at multiples of 16 bytes, k and v are copied.
        causal: bottom-right aligned: query i, at position i + L - T, sees key j when j <= i + L - T, L = kv_lengths[b]
            or S.
        scale: factor on q·k, of either sign.
        window: query i sees only keys j > i + L - T - window. Other keys and their pages are not read.
        softcap: scores become softcap * tanh(score / softcap).
        alibi_slopes: (H,) fp32; slope * |i + L - T - j| is subtracted.
        sinks: (H,), floating point: an extra logit per head in the denominator and in lse.
        kv_lengths: (B,) int32 on the device, or None. Keys from there on and their pages are not read.
        block_table: (B, pages) int32.
        k_scale, v_scale: (B, H_kv, S) or (num_pages, H_kv, page) fp32, with 8-bit k and v.
        mask: bool, broadcastable to (B, H, T, S); where it is False, a query does not see a key.
        bias: fp16|bf16|fp32, broadcastable likewise, added to the scores; -inf masks a key.
        new: a token of each sequence that is appended to the cache, if T = 1, without mask and bias. Rows of k and v must then
            start and end at multiples of 16 bytes (`has_aligned_rows`).
        counters: int32 zeros, zero again afterwards; concurrent calls must not share them. If there are too few, or None, and
            keys are split, they are allocated and zeroed, which is another launch.

    Returns:
        out (B, H, T, D_v) in q's dtype, contiguous as (B, T, H, D_v), and lse (B, H, T) fp32, natural log.
        A fully masked row gets zeros and -inf.
    """
    if INTERPRETED and q.dtype is torch.bfloat16 and new is None:  # its tl.dot reads bf16 as integers (Triton 3.6 to 3.9)
        options = dict(
            causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            kv_lengths=kv_lengths, block_table=block_table, k_scale=k_scale, v_scale=v_scale, mask=mask, bias=bias,
        )  # fmt: skip
        k, v = (x.float() if x.dtype is torch.bfloat16 else x for x in (k, v))
        out, lse = attention_decode(q.float(), k, v, **options)
        return out.bfloat16(), lse

    vectors = kv_lengths, alibi_slopes, sinks
    x = NO_TOKEN if new is None else new
    rest = block_table, k_scale, v_scale, mask, bias, x.k, x.v, x.slots, x.positions, x.cos, x.sin, counters
    numbers = q.shape[3], v.shape[3], causal, scale, window, softcap, x.interleaved
    planned = plan(decide, (q, k, v, *vectors, *rest), *numbers)
    if planned is None:
        q, vectors = aligned_rows(q), tuple(map(contiguous, vectors))
        if new is None:
            k, v = aligned_rows(k), aligned_rows(v)
        planned = plan(decide, (q, k, v, *vectors, *rest), *numbers)
    launch, of_out, of_lse, of_acc, of_softmax, n_counters = planned
    out, lse = q.new_empty_strided(*of_out), q.new_empty_strided(*of_lse, dtype=torch.float32)
    acc = softmax = None
    if of_acc is None:
        counters = None
    else:
        acc = q.new_empty_strided(*of_acc, dtype=torch.float32)
        softmax = q.new_empty_strided(*of_softmax, dtype=torch.float32)
        if n_counters:
            counters = torch.zeros(n_counters, dtype=torch.int32, device=q.device)
    launch(q, k, v, out, lse, acc, softmax, counters, *vectors, *rest[:-1])
    return out, lse


def decide(
    layouts: tuple, D: int, D_v: int, causal: bool, scale: float, window: int | None, softcap: float | None, interleaved: bool
) -> tuple[Callable, tuple, tuple, tuple | None, tuple | None, int] | None:
    """The launch for tensors with these layouts, the shapes and strides of out, lse, acc and softmax, and how many counters have
    to be allocated; None if some of the tensors have to be copied."""
    q, k, v, *vectors, block_table, k_scale, v_scale, mask, bias, new_k, new_v, slots, positions, cos, sin, counters = layouts
    B, H, T, _ = q.shape
    n_pages, H_kv, page = k.shape[:3]
    S = page if block_table is None else page * block_table.shape[1]
    n_rows = H // H_kv * T
    check_sizes(q=q, k=k)
    check_count("q", "queries of heads that share keys", n_rows)
    check_count("block_table", "keys in a sequence's pages", S)
    of_results = ((B, H, T, D_v), (T * H * D_v, D_v, H * D_v, 1)), dense(B, H, T)
    if 0 in (B, H, T, D_v):
        return no_launch, *of_results, None, None, 0
    rows = (q, k, v) if new_k is None else (q,)
    if not all(map(has_aligned_rows, rows)) or not all(x is None or x.is_contiguous() for x in vectors):
        return None
    window = None if window is None else min(window, S)
    few, has_mask_or_bias = n_rows <= FEW_ROWS, mask is not None or bias is not None
    mask = None if mask is None else mask.expand(B, H, T, S).view(torch.uint8)
    bias = None if bias is None else bias.expand(B, H, T, S)
    device = q.device
    variant = (
        D, D_v, q.element_size(), architecture(device), k_scale is not None, few, new_k is not None, has_mask_or_bias
    )  # fmt: skip
    tile = decode_tile(*variant)
    n_tiles = cdiv(n_rows, tile.BLOCK_M)
    split, n_splits = splits(tile, B * H_kv * n_tiles, S, T, window, multiprocessors(device))
    constants = kernel_constants(
        variant, split, causal, interleaved, unit_of(mask), unit_of(bias), has_dependent_launch(device)
    )
    of_acc, of_softmax, n_counters = None, None, 0
    if n_splits > 1:
        n_groups = cdiv(n_splits, GROUP.value)
        of_acc, of_softmax = (dense(B, H, T, n_splits + n_groups, columns) for columns in (D_v, 2))
        n_counters = B * H_kv * n_tiles * (n_groups + 1)
        if counters is not None and counters.numel() >= n_counters:
            n_counters = 0
    n_angles, pairs = (0, 0) if cos is None else cos.shape
    launch = Launch(
        attend_split_kernel, grid("q", n_tiles, n_splits, B, H_kv), constants,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *((0, 0, 0) if k_scale is None else k_scale.stride()),
        *((0, 0, 0) if v_scale is None else v_scale.stride()),
        *((0, 0) if block_table is None else block_table.stride()),
        *((0, 0, 0, 0) if mask is None else mask.stride()),
        *((0, 0, 0, 0) if bias is None else bias.stride()),
        *((0, 0, 0, 0, 0) if new_k is None else (*new_k.stride()[:2], *new_v.stride()[:2], slots.stride(0))),
        *((0, 0, 0) if cos is None else (positions.stride(0), cos.stride(0), sin.stride(0))),
        H, H // H_kv, n_rows, T, S, n_splits, page, n_pages, n_angles, pairs, float(scale),
        None if softcap is None else float(softcap), window,
    )  # fmt: skip
    return launch, *of_results, of_acc, of_softmax, n_counters


@functools.cache
def kernel_constants(
    variant: tuple, split: int, causal: bool, interleaved: bool, mask_unit: int, bias_unit: int, pdl: bool
) -> Constants:
    """The compile-time arguments and options of `attend_split_kernel`. variant: the arguments of `decode_tile`."""
    head_dim, v_dim, _, _, _, few, has_new_token, _ = variant
    block_d, block_r = head_blocks(head_dim)
    block_v = padded_dim(v_dim)
    tile = decode_tile(*variant)
    return Constants(
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_R=block_r, V_DIM=v_dim, BLOCK_V=block_v,
        IS_CAUSAL=causal, INTERLEAVED=interleaved, MASK_UNIT=mask_unit, BIAS_UNIT=bias_unit,
        AT_ONCE=parts_at_once(tile, block_v, few), **tile._replace(SPLIT=split)._asdict(),
        enable_fp_fusion=not has_new_token, **dependent_launch(pdl),
    )  # fmt: skip
