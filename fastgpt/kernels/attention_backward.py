"""Attention, backward: two passes that recompute the weights from the saved log-sum-exp, each writing what it owns.

    p = exp(score - lse),   dp = dout · v^T,   ds = p (dp - delta),   delta = sum_j p dp - dlse
    dv = p^T · dout,   dk = scale ds^T · q,   dq = scale ds · k,   dbias = ds,   dsinks = sum exp(sink - lse) (-delta)

where ds is also multiplied by the soft cap's derivative on its way to dq and dk. A program of the first pass owns
BLOCK_M queries and walks over their keys; one of the second owns BLOCK_N keys of one key/value head and walks over the
queries that see them, head by head of its group. Nothing is added atomically, so gradients are the same bits on every run.

What is saved is rounded: a large lse more coarsely than the softmax was, and all weights of a row with it; out, whose
product with dout is delta, to its dtype. The first pass, which sees whole rows, takes them as they are, but sums p and p dp
as it goes, and from these leaves a better lse (in fp32, the factor 1 / sum p) and delta to what comes after; in fp32 it
also corrects dq for the difference.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.architecture import ARCHITECTURES, architecture
from fastgpt.kernels.attention_forward import (
    INTERPRETED,
    NUMBERS,
    POINTERS,
    Extras,
    Tile,
    descriptors,
    have_bulk_copies,
    strides,
)
from fastgpt.kernels.attention_tiles import (
    LOG2_E,
    aligned_rows,
    head_dims,
    kept_weights,
    key_ranges,
    load_rows,
    load_scores,
    padded_dim,
    score_rows,
    store_rows,
    tanh,
    tile_key,
    units_of,
    visible_keys,
)
from fastgpt.kernels.launch import kernel
from fastgpt.kernels.limits import cdiv, grid

# pass -> (head dims as of `tile_key`, bytes per element) -> a tile for each of ARCHITECTURES, see attention_forward.py.
# The rich ones leave registers for scores that are more than q·k · scale; the bias's pass uses that of the queries.
TILES = {
    "keys": {
        (16, 2): (Tile(64, 64, 4, 2), Tile(32, 128, 8, 2), Tile(64, 128, 8, 2)),
        (32, 2): (Tile(64, 64, 4, 2), Tile(32, 128, 8, 2), Tile(64, 128, 8, 2)),
        (64, 2): (Tile(64, 32, 8, 1), Tile(32, 128, 8, 2), Tile(64, 64, 8, 2)),
        (128, 2): (Tile(32, 32, 4, 1), Tile(32, 128, 8, 2), Tile(32, 64, 8, 1)),
        (256, 2): (Tile(32, 32, 8, 1),) * 3,
        (16, 4): (Tile(32, 64, 8, 2),) * 3,
        (32, 4): (Tile(32, 32, 8, 2),) * 3,
        (64, 4): (Tile(32, 32, 8, 1),) * 3,
        (128, 4): (Tile(16, 16, 8, 1),) * 3,
        (256, 4): (Tile(16, 16, 4, 1),) * 3,
    },
    "queries": {
        (16, 2): (Tile(64, 64, 4, 2), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        (32, 2): (Tile(64, 64, 4, 2), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        (64, 2): (Tile(64, 32, 8, 1), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        (128, 2): (Tile(32, 32, 4, 1), *(Tile(128, 32, 8, 2),) * 2),
        (256, 2): (Tile(32, 16, 8, 1),) * 3,
        (16, 4): (Tile(64, 32, 8, 2),) * 3,
        (32, 4): (Tile(64, 32, 8, 1),) * 3,
        (64, 4): (Tile(32, 32, 8, 1),) * 3,
        (128, 4): (Tile(16, 16, 8, 1),) * 3,
        (256, 4): (Tile(16, 16, 8, 1),) * 3,
    },
    "rich keys": {
        (16, 2): (Tile(32, 32, 8, 1),) * 3,
        (32, 2): (Tile(32, 32, 8, 1),) * 3,
        (64, 2): (Tile(32, 32, 8, 1),) * 3,
        (128, 2): (Tile(32, 32, 8, 1),) * 3,
        (256, 2): (Tile(16, 16, 8, 1),) * 3,
        (16, 4): (Tile(32, 32, 8, 1),) * 3,
        (32, 4): (Tile(32, 32, 8, 1),) * 3,
        (64, 4): (Tile(32, 16, 8, 1),) * 3,
        (128, 4): (Tile(32, 16, 8, 1),) * 3,
        (256, 4): (Tile(16, 16, 8, 1),) * 3,
    },
    "rich queries": {
        (16, 2): (Tile(64, 32, 8, 1),) * 3,
        (32, 2): (Tile(64, 32, 8, 1),) * 3,
        (64, 2): (Tile(32, 32, 8, 1),) * 3,
        (128, 2): (Tile(32, 16, 8, 1),) * 3,
        (256, 2): (Tile(16, 16, 8, 1),) * 3,
        (16, 4): (Tile(64, 32, 8, 1),) * 3,
        (32, 4): (Tile(32, 32, 8, 1),) * 3,
        (64, 4): (Tile(32, 16, 8, 1),) * 3,
        (128, 4): (Tile(16, 16, 8, 1),) * 3,
        (256, 4): (Tile(16, 16, 8, 1),) * 3,
    },
}
# Of packed sequences, the pass over the keys has fewer registers left.
TILES["packed keys"] = {**TILES["keys"], (128, 2): (Tile(32, 32, 4, 1), Tile(32, 64, 8, 2), Tile(32, 64, 8, 1))}

WIDEST = 256  # head dim
DELTA_ROWS = 32
# Of wider heads, or where scores are more than q·k · scale, a pass over the queries has no registers left for bulk copies.
BULK_HEAD_DIM = 128


DELTA_ARGUMENTS = [
    "dlse_ptr", "stride_ob", "stride_oh", "stride_om", "stride_gb", "stride_gh", "stride_gm", "stride_lb", "stride_lh",
    "n_heads", "n_queries",
]  # fmt: skip


@kernel(do_not_specialize=DELTA_ARGUMENTS)
def _delta(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm, stride_lb, stride_lh, n_heads, n_queries,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (B, H, T): sum over the head dim of out · dout, less the gradient of lse."""
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    pid = tl.program_id(0)
    start_m = pid % n_tiles * BLOCK_M
    b = tl.cast(pid // n_tiles // n_heads, tl.int64)
    h = tl.cast(pid // n_tiles % n_heads, tl.int64)
    rows = tl.arange(0, BLOCK_M)
    n_rows = n_queries - start_m
    start = tl.cast(start_m, tl.int64)
    out_ptr = tl.multiple_of(out_ptr + b * stride_ob + h * stride_oh + start * stride_om, 16)
    dout_ptr = tl.multiple_of(dout_ptr + b * stride_gb + h * stride_gh + start * stride_gm, 16)
    out = load_rows(out_ptr, stride_om, rows, n_rows, V_DIM, BLOCK_V, MASK_ROWS=True).to(tl.float32)
    dout = load_rows(dout_ptr, stride_gm, rows, n_rows, V_DIM, BLOCK_V, MASK_ROWS=True).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    at = b * stride_lb + h * stride_lh + start + rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=rows < n_rows, other=0.0)
    tl.store(delta_ptr + at, delta, mask=rows < n_rows)


@triton.jit
def _weights(
    qk, shift, rows, n_rows, offs_n, own, end, n_keys, scale, softcap, slope, window,
    mask_ptr, bias_ptr, stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The softmax's weights before dropout; and d score / d (scale q·k). MASKED: zero where a query does not see a key, for
    keys before `end`, or all if it is None.

    qk is (M, N) with shift, rows, own (M, 1) and offs_n (1, N), or all of them transposed. shift is the log-sum-exp, in
    base e if EXACT (as in online_softmax), else in base 2.
    """
    slope_of_cap = 1.0
    factor = scale * LOG2_E  # what is left to multiply qk with for scores in base 2
    if EXACT or HAS_SOFTCAP or HAS_ALIBI or bias_ptr is not None:
        qk *= scale
        factor = LOG2_E
    if HAS_SOFTCAP:
        capped = tanh(qk / softcap)
        qk = softcap * capped
        slope_of_cap = 1.0 - capped * capped
    if HAS_ALIBI:
        qk -= slope * tl.abs(own - offs_n).to(tl.float32)
    if bias_ptr is not None:
        bias_rows = score_rows(bias_ptr, rows, stride_bias_m, BIAS_UNIT)
        bias = load_scores(bias_rows, offs_n, stride_bias_n, rows < n_rows, n_keys, BIAS_UNIT, False).to(tl.float32)
        qk = tl.where(bias == float("-inf"), float("-inf"), qk + bias)
    if EXACT:
        p = tl.exp2((qk - shift) * factor)
    else:
        p = tl.exp2(qk * factor - shift)
    if MASKED:
        visible = visible_keys(own, offs_n, end, window, IS_CAUSAL, HAS_WINDOW)
        if HAS_ALIBI:  # of which no row past the last may make an infinity; else its p is finite, and met by zeros
            visible = visible & (rows < n_rows)
        if mask_ptr is not None:
            mask_rows = score_rows(mask_ptr, rows, stride_mask_m, MASK_UNIT)
            visible = visible & (load_scores(mask_rows, offs_n, stride_mask_n, rows < n_rows, n_keys, MASK_UNIT, False) != 0)
        p = tl.where(visible, p, 0.0)
    return p, slope_of_cap


@triton.jit
def _load_vector(ptr, rows, n_rows, other, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptr + rows, mask=rows < n_rows, other=other)
    return tl.load(ptr + rows)


@triton.jit
def _sequence(b, n_queries, n_keys, kv_lengths_ptr, cu_q_ptr, cu_k_ptr):
    """(queries, keys, first query, first key) of sequence b; the firsts are 0 unless sequences are packed."""
    length = n_keys
    first_q = 0
    first_k = 0
    if kv_lengths_ptr is not None:
        length = tl.maximum(0, tl.minimum(tl.load(kv_lengths_ptr + b), n_keys))
    if cu_q_ptr is not None:
        first_q = tl.load(cu_q_ptr + b)
        first_k = tl.load(cu_k_ptr + b)
        n_queries = tl.load(cu_q_ptr + b + 1) - first_q
        length = tl.load(cu_k_ptr + b + 1) - first_k
    return n_queries, length, tl.cast(first_q, tl.int64), tl.cast(first_k, tl.int64)


BACKWARD_NUMBERS = [
    *NUMBERS, "stride_gb", "stride_gh", "stride_gm", "stride_dqb", "stride_dqh", "stride_dqm",
    "stride_dkb", "stride_dkh", "stride_dkn", "stride_dvb", "stride_dvh", "stride_dvn",
    "stride_dbb", "stride_dbh", "stride_dbm", "stride_dbn",
]  # fmt: skip


@triton.jit
def _fold_queries(
    dk, dv, k, v, q_ptr, dout_ptr, q_desc, dout_desc, desc_b, desc_h, desc_m, shift_ptr, delta_ptr, norm_ptr, begin, stop,
    n_queries, length, b, h, start_n, scale, softcap, slope, window, mask_ptr, bias_ptr, seed, threshold, keep_scale,
    stride_qm, stride_gm, stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n, n_keys,
    MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    MASKED: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """What the queries begin..stop-1 of one head add to dk and dv of a tile of keys; pointers are to its first query.

    Everything is transposed, (keys, queries): weights are then the left factors of what they are multiplied with, and
    stay in registers. Unmasked, every query sees every key of the tile, but those from length on, whose rows the caller
    discards, and stop - begin is a multiple of BLOCK_M.
    """
    EXACT: tl.constexpr = k.dtype == tl.float32
    offs_n = (start_n + tl.arange(0, BLOCK_N))[:, None]
    cols = tl.arange(0, BLOCK_M)
    for start_m in range(begin, stop, BLOCK_M):
        offs_m = start_m + cols
        rows = offs_m[None, :]
        if BULK:
            q = q_desc.load([desc_b, desc_h, desc_m + start_m, 0]).reshape(BLOCK_M, BLOCK_D)
            dout = dout_desc.load([desc_b, desc_h, desc_m + start_m, 0]).reshape(BLOCK_M, BLOCK_V)
        else:
            q = load_rows(q_ptr, stride_qm, offs_m, n_queries, HEAD_DIM, BLOCK_D, MASKED)
            dout = load_rows(dout_ptr, stride_gm, offs_m, n_queries, V_DIM, BLOCK_V, MASKED)
        at = tl.cast(start_m, tl.int64)
        n_rows = n_queries - start_m
        shift = _load_vector(shift_ptr + at, cols, n_rows, 0.0, MASKED)
        p, slope_of_cap = _weights(
            tl.dot(k, q.T, input_precision="ieee"), shift[None, :], rows, n_queries, offs_n, rows + length - n_queries,
            None, n_keys, scale, softcap, slope, window, mask_ptr, bias_ptr, stride_mask_m, stride_mask_n, stride_bias_m,
            stride_bias_n, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI, MASK_UNIT, BIAS_UNIT, MASKED, EXACT,
        )  # fmt: skip
        if EXACT:
            p *= _load_vector(norm_ptr + at, cols, n_rows, 1.0, MASKED)[None, :]
        if seed is not None:
            heads = tl.zeros([BLOCK_M], tl.int32) + tl.cast(h, tl.int32)
            keep = kept_weights(seed, threshold, b, heads, offs_m, start_n, BLOCK_N).T
            kept = tl.where(keep, p * keep_scale, 0.0).to(q.dtype)
        else:
            kept = p.to(q.dtype)
            p = kept  # rounded, it takes half the registers until dp is there
        dv = tl.dot(kept, dout, dv, input_precision="ieee")
        dp = tl.dot(v, dout.T, input_precision="ieee")
        if seed is not None:
            dp = tl.where(keep, dp * keep_scale, 0.0)
        delta = _load_vector(delta_ptr + at, cols, n_rows, 0.0, MASKED)
        ds = p.to(tl.float32) * (dp - delta[None, :]) * slope_of_cap
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@kernel(do_not_specialize=[*BACKWARD_NUMBERS, *POINTERS])
def _backward_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, shift_ptr, delta_ptr, norm_ptr, dk_ptr, dv_ptr,
    kv_lengths_ptr, cu_q_ptr, cu_k_ptr, alibi_ptr, mask_ptr, bias_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_lb, stride_lh,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    n_heads, group, n_queries, n_keys, window, threshold, scale, softcap, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, q_desc=None, dout_desc=None,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key/value head. Strides are in elements; the last dimension's is 1."""
    n_tiles = tl.cdiv(n_keys, BLOCK_N)
    pid = tl.program_id(0)
    start_n = pid % n_tiles * BLOCK_N
    n_kv_heads = n_heads // group
    b = tl.cast(pid // n_tiles // n_kv_heads, tl.int64)
    h_kv = tl.cast(pid // n_tiles % n_kv_heads, tl.int64)
    n_rows_of_k = n_keys - start_n  # to write
    T, length, first_q, first_k = _sequence(b, n_queries, n_keys, kv_lengths_ptr, cu_q_ptr, cu_k_ptr)
    if cu_q_ptr is not None:
        n_rows_of_k = length - start_n
        if n_rows_of_k <= 0:
            return

    cols = tl.arange(0, BLOCK_N)
    offs_n = start_n + cols
    start = first_k + start_n
    BULK: tl.constexpr = q_desc is not None
    desc_b = 0 if cu_q_ptr is not None else tl.cast(b, tl.int32)
    desc_m = tl.cast(first_q, tl.int32)
    k_ptr = tl.multiple_of(k_ptr + b * stride_kb + h_kv * stride_kh + start * stride_kn, 16)
    v_ptr = tl.multiple_of(v_ptr + b * stride_vb + h_kv * stride_vh + start * stride_vn, 16)
    k = load_rows(k_ptr, stride_kn, cols, length - start_n, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    v = load_rows(v_ptr, stride_vn, cols, length - start_n, V_DIM, BLOCK_V, MASK_ROWS=True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)

    # Tokens that may see a key of the tile: own position, token + length - T, from start_n on if causal, and before
    # the last key's position + window. Of those, all from `inner` to `outer` see all its keys.
    first = tl.maximum(start_n - (length - T), 0) // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
    inner = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - (length - T), 0), BLOCK_M) * BLOCK_M if IS_CAUSAL else 0
    last = T
    outer = T // BLOCK_M * BLOCK_M
    if HAS_WINDOW:
        last = tl.minimum(T, tl.minimum(start_n + BLOCK_N, length) - 1 + window - (length - T))
        outer = tl.minimum(outer, tl.maximum(start_n + window - (length - T), 0) // BLOCK_M * BLOCK_M)
    if start_n >= length:
        last = 0
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for i in range(group):
        h = h_kv * group + i
        desc_h = tl.cast(tl.minimum(h, n_heads - 1), tl.int32)  # it is no more, which tells that 32 bits are enough
        slope = 0.0
        if alibi_ptr is not None:
            slope = tl.load(alibi_ptr + h)
        q_head = tl.multiple_of(q_ptr + b * stride_qb + h * stride_qh + first_q * stride_qm, 16)
        dout_head = tl.multiple_of(dout_ptr + b * stride_gb + h * stride_gh + first_q * stride_gm, 16)
        at = b * stride_lb + h * stride_lh + first_q
        mask_head = None
        if mask_ptr is not None:
            mask_head = mask_ptr + b * stride_mask_b + h * stride_mask_h
        bias_head = None
        if bias_ptr is not None:
            bias_head = bias_ptr + b * stride_bias_b + h * stride_bias_h
        stop = tl.minimum(inner, last) if mask_ptr is None else last
        if IS_CAUSAL or mask_ptr is not None:
            dk, dv = _fold_queries(
                dk, dv, k, v, q_head, dout_head, q_desc, dout_desc, desc_b, desc_h, desc_m, shift_ptr + at, delta_ptr + at,
                norm_ptr + at, first, stop, T, length,
                b, h, start_n, scale, softcap, slope, window, mask_head, bias_head, seed, threshold, keep_scale,
                stride_qm, stride_gm, stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n, n_keys,
                MASK_UNIT, BIAS_UNIT, HEAD_DIM, BLOCK_D, V_DIM, BLOCK_V, BLOCK_M, BLOCK_N,
                IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, alibi_ptr is not None, True,
                BULK and cu_q_ptr is None,
            )  # fmt: skip
        if mask_ptr is None:
            dk, dv = _fold_queries(
                dk, dv, k, v, q_head, dout_head, q_desc, dout_desc, desc_b, desc_h, desc_m, shift_ptr + at, delta_ptr + at,
                norm_ptr + at, inner, tl.minimum(outer, last),
                T, length, b, h, start_n, scale, softcap, slope, window, mask_head, bias_head, seed, threshold, keep_scale,
                stride_qm, stride_gm, stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n, n_keys,
                MASK_UNIT, BIAS_UNIT, HEAD_DIM, BLOCK_D, V_DIM, BLOCK_V, BLOCK_M, BLOCK_N,
                IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, alibi_ptr is not None, False, BULK,
            )  # fmt: skip
            dk, dv = _fold_queries(
                dk, dv, k, v, q_head, dout_head, q_desc, dout_desc, desc_b, desc_h, desc_m, shift_ptr + at, delta_ptr + at,
                norm_ptr + at, tl.maximum(inner, outer), last,
                T, length, b, h, start_n, scale, softcap, slope, window, mask_head, bias_head, seed, threshold, keep_scale,
                stride_qm, stride_gm, stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n, n_keys,
                MASK_UNIT, BIAS_UNIT, HEAD_DIM, BLOCK_D, V_DIM, BLOCK_V, BLOCK_M, BLOCK_N,
                IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, alibi_ptr is not None, True,
                BULK and cu_q_ptr is None,
            )  # fmt: skip
    unread = offs_n[:, None] >= length
    dk_ptr += b * stride_dkb + h_kv * stride_dkh + start * stride_dkn
    dv_ptr += b * stride_dvb + h_kv * stride_dvh + start * stride_dvn
    store_rows(dk_ptr, stride_dkn, cols, n_rows_of_k, tl.where(unread, 0.0, dk * scale), HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, stride_dvn, cols, n_rows_of_k, tl.where(unread, 0.0, dv), V_DIM, BLOCK_V)


@triton.jit
def _fold_keys(
    dq, pk, row_sum, mean_dp, q, dout, shift, delta, k_ptr, v_ptr, k_desc, v_desc, desc_b, desc_h, desc_n, begin, stop, end,
    own, offs_m, rows, n_rows, b, h, scale, softcap, slope, window, mask_ptr, bias_ptr, seed, threshold, keep_scale,
    stride_kn, stride_vn, stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n, n_keys,
    MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    MASKED: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """What the keys begin..stop-1 add to dq and the sums over a row of weights p: p k, p, p dp.

    Unmasked, every query of the tile sees every key of that range, and stop - begin is a multiple of BLOCK_N.
    """
    EXACT: tl.constexpr = q.dtype == tl.float32
    for start_n in range(begin, stop, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        if BULK:
            k = k_desc.load([desc_b, desc_h, desc_n + start_n, 0]).reshape(BLOCK_N, BLOCK_D)
            v = v_desc.load([desc_b, desc_h, desc_n + start_n, 0]).reshape(BLOCK_N, BLOCK_V)
        else:
            k = load_rows(k_ptr, stride_kn, offs_n, end, HEAD_DIM, BLOCK_D, MASKED)
            v = load_rows(v_ptr, stride_vn, offs_n, end, V_DIM, BLOCK_V, MASKED)
        p, slope_of_cap = _weights(
            tl.dot(q, k.T, input_precision="ieee"), shift[:, None], rows[:, None], n_rows, offs_n[None, :], own[:, None],
            end, n_keys, scale, softcap, slope, window, mask_ptr, bias_ptr, stride_mask_m, stride_mask_n, stride_bias_m,
            stride_bias_n, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI, MASK_UNIT, BIAS_UNIT, MASKED, EXACT,
        )  # fmt: skip
        row_sum += tl.sum(p, 1)
        dp = tl.dot(dout, v.T, input_precision="ieee")
        if seed is not None:
            heads = tl.zeros([BLOCK_M], tl.int32) + tl.cast(h, tl.int32)
            keep = kept_weights(seed, threshold, b, heads, offs_m, start_n, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        mean_dp += tl.sum(p * dp, 1)
        ds = p * (dp - delta[:, None]) * slope_of_cap
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        if EXACT:
            pk = tl.dot(p * slope_of_cap, k, pk, input_precision="ieee")
    return dq, pk, row_sum, mean_dp


@kernel(do_not_specialize=[*BACKWARD_NUMBERS, *POINTERS, "lse_ptr", "dlse_ptr"])
def _backward_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, dlse_ptr, shift_ptr, delta_ptr, norm_ptr, dq_ptr,
    kv_lengths_ptr, cu_q_ptr, cu_k_ptr, alibi_ptr, sinks_ptr, mask_ptr, bias_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_lb, stride_lh, stride_dqb, stride_dqh, stride_dqm,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    n_heads, group, n_queries, n_keys, window, threshold, scale, softcap, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, q_desc=None, k_desc=None, v_desc=None, dout_desc=None,
):  # fmt: skip
    """dq of BLOCK_M queries of one head. Strides are in elements; the last dimension's is 1."""
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    pid = tl.program_id(0)
    start_m = (n_tiles - 1 - pid % n_tiles) * BLOCK_M  # last queries first: if causal, they have most to do
    b = tl.cast(pid // n_tiles // n_heads, tl.int64)
    h = tl.cast(pid // n_tiles % n_heads, tl.int64)
    h_kv = h // group
    T, length, first_q, first_k = _sequence(b, n_queries, n_keys, kv_lengths_ptr, cu_q_ptr, cu_k_ptr)
    if cu_q_ptr is not None:
        if start_m >= T:
            return
    rows = tl.arange(0, BLOCK_M)
    n_rows = T - start_m
    past = start_m + length - T
    own = past + rows
    row = first_q + start_m
    BULK: tl.constexpr = k_desc is not None
    desc_b = 0 if cu_k_ptr is not None else tl.cast(b, tl.int32)
    desc_h = tl.cast(h_kv, tl.int32)
    desc_n = tl.cast(first_k, tl.int32)
    if BULK:  # also rows past the last, which are not stored
        at_m = [desc_b, tl.cast(h, tl.int32), tl.cast(row, tl.int32), 0]
        q = q_desc.load(at_m).reshape(BLOCK_M, BLOCK_D)
        dout = dout_desc.load(at_m).reshape(BLOCK_M, BLOCK_V)
    else:
        q_ptr = tl.multiple_of(q_ptr + b * stride_qb + h * stride_qh + row * stride_qm, 16)
        dout_ptr = tl.multiple_of(dout_ptr + b * stride_gb + h * stride_gh + row * stride_gm, 16)
        q = load_rows(q_ptr, stride_qm, rows, n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
        dout = load_rows(dout_ptr, stride_gm, rows, n_rows, V_DIM, BLOCK_V, MASK_ROWS=True)
    at = b * stride_lb + h * stride_lh + row
    lse = _load_vector(lse_ptr + at, rows, n_rows, 0.0, True)
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # sees no key: all its weights are masked
    shift = lse if q.dtype == tl.float32 else lse * LOG2_E
    delta = _load_vector(delta_ptr + at, rows, n_rows, 0.0, True)
    slope = 0.0
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + h)
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b + h * stride_mask_h + row * stride_mask_m
    if bias_ptr is not None:
        bias_ptr += b * stride_bias_b + h * stride_bias_h + row * stride_bias_m
    k_ptr = tl.multiple_of(k_ptr + b * stride_kb + h_kv * stride_kh + first_k * stride_kn, 16)
    v_ptr = tl.multiple_of(v_ptr + b * stride_vb + h_kv * stride_vh + first_k * stride_vn, 16)

    begin, inner, outer, end = key_ranges(past, n_rows, length, window, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_WINDOW)
    if mask_ptr is not None:
        outer = begin
    EXACT: tl.constexpr = q.dtype == tl.float32
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    pk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    mean_dp = tl.zeros([BLOCK_M], tl.float32)
    offs_m = start_m + rows
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if HAS_WINDOW:
        dq, pk, row_sum, mean_dp = _fold_keys(
            dq, pk, row_sum, mean_dp, q, dout, shift, delta, k_ptr, v_ptr, k_desc, v_desc, desc_b, desc_h, desc_n, begin, tl.minimum(inner, end), end,
            own, offs_m, rows, n_rows, b, h, scale, softcap, slope, window, mask_ptr, bias_ptr, seed, threshold, keep_scale,
            stride_kn, stride_vn, stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n, n_keys,
            MASK_UNIT, BIAS_UNIT, HEAD_DIM, BLOCK_D, V_DIM, BLOCK_V, BLOCK_M, BLOCK_N,
            IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, alibi_ptr is not None, True,
            BULK and cu_k_ptr is None and kv_lengths_ptr is None,
        )  # fmt: skip
        begin = inner
    if mask_ptr is None:
        dq, pk, row_sum, mean_dp = _fold_keys(
            dq, pk, row_sum, mean_dp, q, dout, shift, delta, k_ptr, v_ptr, k_desc, v_desc, desc_b, desc_h, desc_n, begin, outer, end,
            own, offs_m, rows, n_rows, b, h, scale, softcap, slope, window, mask_ptr, bias_ptr, seed, threshold, keep_scale,
            stride_kn, stride_vn, stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n, n_keys,
            MASK_UNIT, BIAS_UNIT, HEAD_DIM, BLOCK_D, V_DIM, BLOCK_V, BLOCK_M, BLOCK_N,
            IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, alibi_ptr is not None, False, BULK,
        )  # fmt: skip
    dq, pk, row_sum, mean_dp = _fold_keys(
        dq, pk, row_sum, mean_dp, q, dout, shift, delta, k_ptr, v_ptr, k_desc, v_desc, desc_b, desc_h, desc_n, tl.maximum(begin, outer), end, end,
        own, offs_m, rows, n_rows, b, h, scale, softcap, slope, window, mask_ptr, bias_ptr, seed, threshold, keep_scale,
        stride_kn, stride_vn, stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n, n_keys,
        MASK_UNIT, BIAS_UNIT, HEAD_DIM, BLOCK_D, V_DIM, BLOCK_V, BLOCK_M, BLOCK_N,
        IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, alibi_ptr is not None, True,
            BULK and cu_k_ptr is None and kv_lengths_ptr is None,
    )  # fmt: skip
    seen = row_sum > 0.0
    if sinks_ptr is not None:
        row_sum += tl.exp2((tl.load(sinks_ptr + h).to(tl.float32) - lse) * LOG2_E)
    row_sum = tl.where(seen, row_sum, 1.0)
    norm = 1.0 / row_sum
    tl.store(norm_ptr + at + rows, norm, mask=rows < n_rows)
    if not EXACT:
        shift += tl.log2(row_sum)
    tl.store(shift_ptr + at + rows, shift, mask=rows < n_rows)
    mean_dp = tl.where(seen, mean_dp * norm, 0.0)  # a value that is NaN reaches no row that sees no key
    if dlse_ptr is not None:
        mean_dp -= tl.load(dlse_ptr + at + rows, mask=rows < n_rows, other=0.0)
    tl.store(delta_ptr + at + rows, mean_dp, mask=rows < n_rows)
    if EXACT:
        dq -= (mean_dp - delta)[:, None] * pk
    dq_ptr += b * stride_dqb + h * stride_dqh + row * stride_dqm
    dq = tl.where(seen[:, None], dq * (norm * scale)[:, None], 0.0)
    store_rows(dq_ptr, stride_dqm, rows, n_rows, dq, HEAD_DIM, BLOCK_D)


@kernel(do_not_specialize=[*BACKWARD_NUMBERS, *POINTERS, "n_batch", "bias_batch", "bias_heads", "m_tiles", "n_tiles"])
def _backward_bias(
    q_ptr, k_ptr, v_ptr, dout_ptr, shift_ptr, delta_ptr, norm_ptr, dbias_ptr,
    kv_lengths_ptr, alibi_ptr, mask_ptr, bias_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_lb, stride_lh, stride_dbb, stride_dbh, stride_dbm, stride_dbn,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    n_batch, bias_batch, bias_heads, m_tiles, n_tiles,
    n_heads, group, n_queries, n_keys, window, threshold, scale, softcap, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr,
):  # fmt: skip
    """One tile of the bias's gradient: ds, summed over the dimensions in which the bias has size 1.

    bias_batch, bias_heads: its sizes. With ONE_ROW it has one row for all queries, with ONE_COLUMN one for all keys;
    a program then walks over all tiles of that dimension.
    """
    pid = tl.program_id(0)
    own_m_tiles = 1 if ONE_ROW else m_tiles
    own_n_tiles = 1 if ONE_COLUMN else n_tiles
    n_tile = pid % own_n_tiles
    m_tile = pid // own_n_tiles % own_m_tiles
    bias_h = tl.cast(pid // own_n_tiles // own_m_tiles % bias_heads, tl.int64)
    bias_b = tl.cast(pid // own_n_tiles // own_m_tiles // bias_heads, tl.int64)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for index in range(tl.cast(n_batch // bias_batch, tl.int64) * (n_heads // bias_heads)):
        b = bias_b + index // (n_heads // bias_heads)
        h = bias_h + index % (n_heads // bias_heads)
        h_kv = h // group
        length = n_keys
        if kv_lengths_ptr is not None:
            length = tl.maximum(0, tl.minimum(tl.load(kv_lengths_ptr + b), n_keys))
        slope = 0.0
        if alibi_ptr is not None:
            slope = tl.load(alibi_ptr + h)
        for tile_m in range(m_tile, m_tiles if ONE_ROW else m_tile + 1):
            start_m = tl.cast(tile_m * BLOCK_M, tl.int64)
            n_rows = n_queries - tile_m * BLOCK_M
            own = tile_m * BLOCK_M + rows + length - n_queries
            q_tile = tl.multiple_of(q_ptr + b * stride_qb + h * stride_qh + start_m * stride_qm, 16)
            dout_tile = tl.multiple_of(dout_ptr + b * stride_gb + h * stride_gh + start_m * stride_gm, 16)
            q = load_rows(q_tile, stride_qm, rows, n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
            dout = load_rows(dout_tile, stride_gm, rows, n_rows, V_DIM, BLOCK_V, MASK_ROWS=True)
            at = b * stride_lb + h * stride_lh + start_m
            shift = _load_vector(shift_ptr + at, rows, n_rows, 0.0, True)
            delta = _load_vector(delta_ptr + at, rows, n_rows, 0.0, True)
            mask_tile = None
            if mask_ptr is not None:
                mask_tile = mask_ptr + b * stride_mask_b + h * stride_mask_h + start_m * stride_mask_m
            bias_tile = bias_ptr + b * stride_bias_b + h * stride_bias_h + start_m * stride_bias_m
            for tile_n in range(n_tile, n_tiles if ONE_COLUMN else n_tile + 1):
                offs_n = tile_n * BLOCK_N + cols
                k_tile = tl.multiple_of(k_ptr + b * stride_kb + h_kv * stride_kh, 16)
                v_tile = tl.multiple_of(v_ptr + b * stride_vb + h_kv * stride_vh, 16)
                k = load_rows(k_tile, stride_kn, offs_n, length, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
                v = load_rows(v_tile, stride_vn, offs_n, length, V_DIM, BLOCK_V, MASK_ROWS=True)
                p, _ = _weights(
                    tl.dot(q, k.T, input_precision="ieee"), shift[:, None], rows[:, None], n_rows, offs_n[None, :],
                    own[:, None], length, n_keys, scale, softcap, slope, window, mask_tile, bias_tile,
                    stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n,
                    IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, alibi_ptr is not None, MASK_UNIT, BIAS_UNIT,
                    MASKED=True, EXACT=q.dtype == tl.float32,
                )  # fmt: skip
                if q.dtype == tl.float32:
                    p *= _load_vector(norm_ptr + at, rows, n_rows, 1.0, True)[:, None]
                dp = tl.dot(dout, v.T, input_precision="ieee")
                if seed_ptr is not None:
                    heads = tl.zeros([BLOCK_M], tl.int32) + tl.cast(h, tl.int32)
                    offs_m = tile_m * BLOCK_M + rows
                    keep = kept_weights(tl.load(seed_ptr), threshold, b, heads, offs_m, tile_n * BLOCK_N, BLOCK_N)
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                total += p * (dp - delta[:, None])

    offs_m = m_tile * BLOCK_M + rows
    offs_n = n_tile * BLOCK_N + cols
    mask = (offs_m[:, None] < n_queries) & (offs_n[None, :] < n_keys)
    dbias_ptr += bias_b * stride_dbb + bias_h * stride_dbh
    if ONE_ROW:
        total = tl.broadcast_to(tl.sum(total, 0)[None, :], [BLOCK_M, BLOCK_N])
        mask = mask & (rows[:, None] == 0)
    if ONE_COLUMN:
        total = tl.broadcast_to(tl.sum(total, 1)[:, None], [BLOCK_M, BLOCK_N])
        mask = mask & (cols[None, :] == 0)
    ptrs = dbias_ptr + offs_m[:, None] * tl.cast(stride_dbm, tl.int64) + offs_n[None, :] * tl.cast(stride_dbn, tl.int64)
    tl.store(ptrs, total.to(dbias_ptr.dtype.element_ty), mask=mask)


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *, causal=True, scale, window=None, softcap=None, alibi_slopes=None, sinks=None, mask=None, bias=None,
    kv_lengths=None, dropout_p=0.0, dropout_seed=None, cu_seqlens_q=None, cu_seqlens_k=None, max_q=None, max_k=None,
    needs_dbias=False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Launches the passes: dq, dk, dv in the dtypes and shapes of q, k, v; dbias in that of bias, or None; dsinks or None.

    Args: dout (B, H, T, D_v) and dlse (B, H, T) or None, the gradients of out and lse that `attention_forward` returned;
        the rest as it took them, with D and D_v up to 256. No host sync.
    Raises: ValueError for wider heads.
    """
    if INTERPRETED and q.dtype is torch.bfloat16:  # as in attention_forward
        options = {name: value for name, value in locals().items() if name not in ("dout", "dlse", "q", "k", "v", "out", "lse")}
        grads = attention_backward(dout.float(), dlse, q.float(), k.float(), v.float(), out.float(), lse, **options)
        return (*(grad.bfloat16() for grad in grads[:3]), *grads[3:])

    B, H, T, D = q.shape
    H_kv, S, D_v = v.shape[1:]
    if max(D, D_v) > WIDEST:
        raise ValueError(f"q: expected head dims up to {WIDEST} of q, k and v, got {D} and {D_v}")
    packed = cu_seqlens_q is not None
    # No program writes what is past the last of packed sequences.
    dq, dk, dv = (torch.zeros_like(x) if packed else torch.empty_like(x) for x in (q, k, v))
    dbias = torch.zeros_like(bias, memory_format=torch.contiguous_format) if needs_dbias else None
    if dq.numel() == 0 or dk.numel() == 0:
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias, dsinks
    q, k, v, dout, out = (aligned_rows(x) for x in (q, k, v, dout, out))
    lse = lse.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    delta, norm, shift = (torch.empty_like(lse) for _ in range(3))
    dlse = None if dlse is None else dlse.contiguous()

    extras = Extras(q, k, window, softcap, alibi_slopes, None, mask, bias, kv_lengths, None, None, None, dropout_p,
                    dropout_seed, cu_seqlens_q, cu_seqlens_k)  # fmt: skip
    rich = "rich " if extras.rich else ""
    flags = (D, D_v, q.element_size(), causal, window is not None, softcap is not None)
    bulk = have_bulk_copies(q, k, v, dout)
    of_keys = _constants((rich or ("packed " if packed else "")) + "keys", architecture(q.device) if bulk else 80, *flags)
    tiles = {"q_desc": (q, "BLOCK_M", "BLOCK_D"), "dout_desc": (dout, "BLOCK_M", "BLOCK_V")}
    bulk_of_keys = descriptors(of_keys, tiles) if bulk else {}
    bulk = bulk and not rich and max(D, D_v) <= BULK_HEAD_DIM
    of_queries = _constants(rich + "queries", architecture(q.device) if bulk else 80, *flags)
    tiles |= {"k_desc": (k, "BLOCK_N", "BLOCK_D"), "v_desc": (v, "BLOCK_N", "BLOCK_V")}
    bulk_of_queries = descriptors(of_queries, tiles) if bulk else {}
    n_queries, n_keys = (T, S) if not packed else (min(max_q, T), min(max_k, S))
    batch = len(cu_seqlens_q) - 1 if packed else B
    m_tiles = cdiv(n_queries, of_queries["BLOCK_M"])
    names = ("kv_lengths_ptr", "cu_q_ptr", "cu_k_ptr", "alibi_ptr", "mask_ptr", "bias_ptr", "seed_ptr")
    skipped = ("stride_t", "stride_ks", "stride_vs", "page", "n_pages", "n_keys")
    common = {name: extras.tensors[name] for name in names}
    numbers = extras.strides | extras.numbers
    common |= {name: value for name, value in numbers.items() if not name.startswith(skipped)}
    common |= {**strides(q, "q", "bhm", packed), **strides(k, "k", "bhn", packed), **strides(v, "v", "bhn", packed)}
    common |= {**strides(dout, "g", "bhm", packed), **strides(lse, "l", "bh", packed)}
    common |= extras.units
    common |= {"n_heads": H, "group": H // H_kv, "n_queries": n_queries, "n_keys": n_keys, "scale": float(scale)}
    with torch.cuda.device_of(q):
        _delta[grid("q", cdiv(T, DELTA_ROWS), B, H)](
            out, dout, dlse, delta, **strides(out, "o", "bhm"), **strides(dout, "g", "bhm"), **strides(lse, "l", "bh"),
            n_heads=H, n_queries=T, **_delta_constants(D_v),
        )  # fmt: skip
        _backward_queries[grid("q", m_tiles, batch, H)](
            q, k, v, dout, lse, dlse, shift, delta, norm, dq, sinks_ptr=sinks, **strides(dq, "dq", "bhm", packed), **common,
            **of_queries, **bulk_of_queries,
        )  # fmt: skip
        _backward_keys[grid("k", cdiv(n_keys, of_keys["BLOCK_N"]), batch, H_kv)](
            q, k, v, dout, shift, delta, norm, dk, dv, **strides(dk, "dk", "bhn", packed),
            **strides(dv, "dv", "bhn", packed), **common, **of_keys,
            **bulk_of_keys,
        )  # fmt: skip
        if needs_dbias:
            shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
            one_row, one_column = shape[2] == 1, shape[3] == 1
            n_tiles = cdiv(n_keys, of_queries["BLOCK_N"])
            tiles = shape[0], shape[1], 1 if one_row else m_tiles, 1 if one_column else n_tiles
            _backward_bias[grid("bias", *tiles)](
                q, k, v, dout, shift, delta, norm, dbias, **strides(dbias.view(shape), "db", "bhmn"),
                n_batch=B, bias_batch=shape[0], bias_heads=shape[1], m_tiles=m_tiles, n_tiles=n_tiles,
                ONE_ROW=one_row, ONE_COLUMN=one_column, **of_queries,
                **{name: value for name, value in common.items() if not name.startswith("cu_")},
            )  # fmt: skip
    dsinks = None
    if sinks is not None:
        # A row that sees no key has no weights, and gives nothing.
        weight = (sinks.double().view(-1, 1) - lse).exp().masked_fill(lse == -torch.inf, 0.0)  # (B, H, T)
        dsinks = -(weight * norm * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks


@functools.cache
def _delta_constants(v_dim: int) -> dict:
    return dict(V_DIM=v_dim, BLOCK_V=padded_dim(v_dim), BLOCK_M=DELTA_ROWS, enable_fp_fusion=True)


@functools.cache
def _constants(
    tiles: str, arch: int, head_dim: int, v_dim: int, element_size: int, causal: bool, has_window=False, has_softcap=False
) -> dict:
    """The compile-time arguments and options of a pass."""
    tile = TILES[tiles][tile_key(head_dim, v_dim, element_size)][ARCHITECTURES.index(arch)]
    return dict(
        HEAD_DIM=head_dim, BLOCK_D=padded_dim(head_dim), V_DIM=v_dim, BLOCK_V=padded_dim(v_dim),
        IS_CAUSAL=causal, HAS_WINDOW=has_window, HAS_SOFTCAP=has_softcap,
        # Left alone, ptxas spills some bytes to fit more programs on a multiprocessor.
        **tile._asdict(), enable_fp_fusion=True, maxnreg=255,
    )  # fmt: skip


def aot_configurations(arch: int):
    """As in attention_forward.py."""
    features = [
        ((), {}),
        (("dlse_ptr",), {}),
        (("kv_lengths_ptr",), {"has_window": True}),
        (("cu_q_ptr", "cu_k_ptr"), {"has_window": True}),
        (
            ("kv_lengths_ptr", "alibi_ptr", "sinks_ptr", "mask_ptr", "bias_ptr", "seed_ptr", "dlse_ptr"),
            {"has_window": True, "has_softcap": True},
        ),
        (("alibi_ptr", "bias_ptr", "seed_ptr"), {"has_softcap": True}),
        (("cu_q_ptr", "cu_k_ptr", "seed_ptr"), {}),
    ]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        dims = [x for x in head_dims(TILES["keys"], dtype.itemsize) if max(x) <= WIDEST]
        for (head_dim, v_dim), causal, (given, flags) in itertools.product(dims, (True, False), features):
            if causal and given in ((), ("dlse_ptr",)):
                yield _delta, dtype, dtype, _delta_constants(v_dim), given
            if given == ("dlse_ptr",):
                continue
            rich = "rich " if "seed_ptr" in given else ""
            sizes = (head_dim, v_dim, dtype.itemsize, causal)
            for bulk in (False, True) if arch >= 90 and dtype.itemsize == 2 else (False,):
                kind = rich or ("packed " if "cu_q_ptr" in given else "")
                of_keys = _constants(kind + "keys", arch if bulk else 80, *sizes, **flags) | units_of(given, dtype)
                yield _backward_keys, dtype, dtype, of_keys, (*given, "q_desc", "dout_desc") if bulk else given
                if bulk and (rich or max(head_dim, v_dim) > BULK_HEAD_DIM):
                    continue
                of_queries = _constants(rich + "queries", arch if bulk else 80, *sizes, **flags) | units_of(given, dtype)
                tiles = ("q_desc", "k_desc", "v_desc", "dout_desc") if bulk else ()
                yield _backward_queries, dtype, dtype, of_queries, (*given, *tiles)
                if "bias_ptr" in given:
                    for one_row, one_column in itertools.product((False, True), repeat=2):
                        shape = {"ONE_ROW": one_row, "ONE_COLUMN": one_column}
                        yield _backward_bias, dtype, dtype, of_queries | shape, given
