"""Attention, backward: two passes that recompute the weights from the saved log-sum-exp, each writing what it owns.

    p = exp(score - lse),   dp = dout · v^T,   ds = p (dp - delta),   delta = sum_d out · dout - dlse
    dv = p^T · dout,   dk = scale ds^T · q,   dq = scale ds · k,   dbias = ds,   dsinks = sum exp(sink - lse) (-delta)

where ds is also multiplied by the soft cap's derivative on its way to dq and dk. A program of the first pass owns
BLOCK_M queries and walks over their keys; one of the second owns BLOCK_N keys of one key/value head and walks over the
queries that see them, head by head of its group. Nothing is added atomically, so gradients are the same bits on every run.

A large lse is rounded more coarsely than the softmax was, and all weights of a row with it. The first pass, which sees the
whole row, therefore sums its weights and divides by their sum, and leaves 1 / sum to the second pass.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention_forward import INTERPRETED, NUMBERS, POINTERS, Extras, Tile, strides
from fastgpt.kernels.attention_tiles import LOG2_E, aligned_rows, kept_weights, load_rows, tanh, visible_keys

# (head dim padded to a power of two, bytes per element) -> tile, the same for all passes.
TILES = {
    (16, 2): Tile(64, 64, 4, 2),
    (32, 2): Tile(64, 64, 4, 2),
    (64, 2): Tile(64, 32, 8, 1),
    (128, 2): Tile(32, 32, 4, 1),
    (256, 2): Tile(32, 16, 8, 1),
    (16, 4): Tile(64, 64, 8, 2),
    (32, 4): Tile(64, 32, 8, 1),
    (64, 4): Tile(32, 32, 8, 1),
    (128, 4): Tile(16, 16, 8, 1),
    (256, 4): Tile(16, 16, 4, 1),
}


# Where scores are more than q·k · scale, tiles that leave registers for that.
RICH_TILES = {
    (16, 2): Tile(64, 32, 8, 1),
    (32, 2): Tile(64, 32, 8, 1),
    (64, 2): Tile(32, 32, 8, 1),
    (128, 2): Tile(32, 16, 8, 1),
    (256, 2): Tile(32, 16, 8, 1),
    (16, 4): Tile(64, 32, 8, 1),
    (32, 4): Tile(32, 32, 8, 1),
    (64, 4): Tile(32, 16, 8, 1),
    (128, 4): Tile(32, 16, 8, 1),
    (256, 4): Tile(16, 16, 8, 1),
}


@triton.jit
def _delta(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm, stride_lb, stride_lh, n_heads, n_queries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
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
    out_ptr += b * stride_ob + h * stride_oh + start * stride_om
    dout_ptr += b * stride_gb + h * stride_gh + start * stride_gm
    out = load_rows(out_ptr, stride_om, rows, n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS=True).to(tl.float32)
    dout = load_rows(dout_ptr, stride_gm, rows, n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS=True).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    at = b * stride_lb + h * stride_lh + start + rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=rows < n_rows, other=0.0)
    tl.store(delta_ptr + at, delta, mask=rows < n_rows)


@triton.jit
def _weights(
    qk, lse, rows, n_rows, offs_n, own, end, scale, softcap, slope, window,
    mask_ptr, bias_ptr, stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    """The softmax's weights (M, N) before dropout, zero where a query does not see a key; and d score / d (scale q·k)."""
    within = (rows[:, None] < n_rows) & (offs_n[None, :] < end)
    x = qk * scale
    slope_of_cap = 1.0
    if HAS_SOFTCAP:
        capped = tanh(x / softcap)
        x = softcap * capped
        slope_of_cap = 1.0 - capped * capped
    if HAS_ALIBI:
        x -= slope * tl.abs(own[:, None] - offs_n[None, :]).to(tl.float32)
    if bias_ptr is not None:
        ptrs = bias_ptr + rows[:, None] * stride_bias_m + offs_n[None, :] * stride_bias_n
        x += tl.load(ptrs, mask=within, other=0.0).to(tl.float32)
    visible = visible_keys(own, offs_n, end, window, IS_CAUSAL, HAS_WINDOW) & (rows[:, None] < n_rows)
    if mask_ptr is not None:
        ptrs = mask_ptr + rows[:, None] * stride_mask_m + offs_n[None, :] * stride_mask_n
        visible = visible & (tl.load(ptrs, mask=within, other=0) != 0)
    return tl.where(visible, tl.exp2((x - lse[:, None]) * LOG2_E), 0.0), slope_of_cap


@triton.jit
def _finite_lse(lse_ptr, rows, n_rows):
    """lse of each row; 0 for one that sees no key, whose weights are all masked."""
    lse = tl.load(lse_ptr + rows, mask=rows < n_rows, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse)


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


@triton.jit(do_not_specialize=[*BACKWARD_NUMBERS, *POINTERS])
def _backward_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, norm_ptr, dk_ptr, dv_ptr,
    kv_lengths_ptr, cu_q_ptr, cu_k_ptr, alibi_ptr, mask_ptr, bias_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_lb, stride_lh,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    n_heads, group, n_queries, n_keys, window, threshold, scale, softcap, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
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
    k_ptr = tl.multiple_of(k_ptr + b * stride_kb + h_kv * stride_kh + start * stride_kn, 16)
    v_ptr = tl.multiple_of(v_ptr + b * stride_vb + h_kv * stride_vh + start * stride_vn, 16)
    k = load_rows(k_ptr, stride_kn, cols, length - start_n, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    v = load_rows(v_ptr, stride_vn, cols, length - start_n, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # Tokens that may see a key of the tile: own position, token + length - T, from start_n on if causal, and before
    # the last key's position + window.
    first = tl.maximum(start_n - (length - T), 0) // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
    last = T
    if HAS_WINDOW:
        last = tl.minimum(T, tl.minimum(start_n + BLOCK_N, length) - 1 + window - (length - T))
    if start_n >= length:
        last = 0
    for i in range(group):
        h = h_kv * group + i
        slope = 0.0
        if alibi_ptr is not None:
            slope = tl.load(alibi_ptr + h)
        for start_m in range(first, last, BLOCK_M):
            rows = tl.arange(0, BLOCK_M)
            n_rows = T - start_m
            own = start_m + rows + length - T
            row = first_q + start_m
            q_tile = tl.multiple_of(q_ptr + b * stride_qb + h * stride_qh + row * stride_qm, 16)
            dout_tile = tl.multiple_of(dout_ptr + b * stride_gb + h * stride_gh + row * stride_gm, 16)
            q = load_rows(q_tile, stride_qm, rows, n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
            dout = load_rows(dout_tile, stride_gm, rows, n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
            at = b * stride_lb + h * stride_lh + row
            mask_tile = None
            if mask_ptr is not None:
                mask_tile = mask_ptr + b * stride_mask_b + h * stride_mask_h + row * stride_mask_m
            bias_tile = None
            if bias_ptr is not None:
                bias_tile = bias_ptr + b * stride_bias_b + h * stride_bias_h + row * stride_bias_m
            p, slope_of_cap = _weights(
                tl.dot(q, k.T, input_precision="ieee"), _finite_lse(lse_ptr + at, rows, n_rows),
                rows, n_rows, offs_n, own, length, scale, softcap, slope, window,
                mask_tile, bias_tile, stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n,
                IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, alibi_ptr is not None,
            )  # fmt: skip
            p *= tl.load(norm_ptr + at + rows, mask=rows < n_rows, other=1.0)[:, None]
            dp = tl.dot(dout, v.T, input_precision="ieee")
            kept = p
            if seed_ptr is not None:
                heads = tl.zeros([BLOCK_M], tl.int32) + tl.cast(h, tl.int32)
                keep = kept_weights(tl.load(seed_ptr), threshold, b, heads, start_m + rows, start_n, BLOCK_N)
                kept = tl.where(keep, p * keep_scale, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dv = tl.dot(kept.to(dout.dtype).T, dout, dv, input_precision="ieee")
            delta = tl.load(delta_ptr + at + rows, mask=rows < n_rows, other=0.0)
            ds = p * (dp - delta[:, None]) * slope_of_cap
            dk = tl.dot(ds.to(q.dtype).T, q, dk, input_precision="ieee")

    offs_d = tl.arange(0, BLOCK_D)
    mask = (cols[:, None] < n_rows_of_k) & (offs_d[None, :] < HEAD_DIM)
    dk_ptr += b * stride_dkb + h_kv * stride_dkh + start * stride_dkn
    dv_ptr += b * stride_dvb + h_kv * stride_dvh + start * stride_dvn
    offsets = cols[:, None] * tl.cast(stride_dkn, tl.int64) + offs_d[None, :]
    tl.store(dk_ptr + offsets, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    offsets = cols[:, None] * tl.cast(stride_dvn, tl.int64) + offs_d[None, :]
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*BACKWARD_NUMBERS, *POINTERS])
def _backward_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, norm_ptr, dq_ptr,
    kv_lengths_ptr, cu_q_ptr, cu_k_ptr, alibi_ptr, sinks_ptr, mask_ptr, bias_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_lb, stride_lh, stride_dqb, stride_dqh, stride_dqm,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    n_heads, group, n_queries, n_keys, window, threshold, scale, softcap, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
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
    q_ptr = tl.multiple_of(q_ptr + b * stride_qb + h * stride_qh + row * stride_qm, 16)
    dout_ptr = tl.multiple_of(dout_ptr + b * stride_gb + h * stride_gh + row * stride_gm, 16)
    q = load_rows(q_ptr, stride_qm, rows, n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    dout = load_rows(dout_ptr, stride_gm, rows, n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    at = b * stride_lb + h * stride_lh + row
    lse = _finite_lse(lse_ptr + at, rows, n_rows)
    delta = tl.load(delta_ptr + at + rows, mask=rows < n_rows, other=0.0)
    slope = 0.0
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + h)
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b + h * stride_mask_h + row * stride_mask_m
    if bias_ptr is not None:
        bias_ptr += b * stride_bias_b + h * stride_bias_h + row * stride_bias_m
    k_ptr = tl.multiple_of(k_ptr + b * stride_kb + h_kv * stride_kh + first_k * stride_kn, 16)
    v_ptr = tl.multiple_of(v_ptr + b * stride_vb + h_kv * stride_vh + first_k * stride_vn, 16)

    end = tl.minimum(past + tl.minimum(BLOCK_M, n_rows), length) if IS_CAUSAL else length
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(past + 1 - window, 0) // BLOCK_N * BLOCK_N
    EXACT: tl.constexpr = q.dtype == tl.float32
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    pk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    mean_dp = tl.zeros([BLOCK_M], tl.float32)
    for start_n in range(begin, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, stride_kn, offs_n, end, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
        v = load_rows(v_ptr, stride_vn, offs_n, end, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
        p, slope_of_cap = _weights(
            tl.dot(q, k.T, input_precision="ieee"), lse, rows, n_rows, offs_n, own, end, scale, softcap, slope,
            window, mask_ptr, bias_ptr, stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n,
            IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, alibi_ptr is not None,
        )  # fmt: skip
        row_sum += tl.sum(p, 1)
        dp = tl.dot(dout, v.T, input_precision="ieee")
        if seed_ptr is not None:
            heads = tl.zeros([BLOCK_M], tl.int32) + tl.cast(h, tl.int32)
            keep = kept_weights(tl.load(seed_ptr), threshold, b, heads, start_m + rows, start_n, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        mean_dp += tl.sum(p * dp, 1)
        ds = p * (dp - delta[:, None]) * slope_of_cap
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        if EXACT:
            pk = tl.dot(p * slope_of_cap, k, pk, input_precision="ieee")
    seen = row_sum > 0.0
    if sinks_ptr is not None:
        row_sum += tl.exp2((tl.load(sinks_ptr + h).to(tl.float32) - lse) * LOG2_E)
    norm = tl.where(seen, 1.0 / tl.where(seen, row_sum, 1.0), 1.0)
    tl.store(norm_ptr + at + rows, norm, mask=rows < n_rows)
    mean_dp *= norm
    if dlse_ptr is not None:
        mean_dp -= tl.load(dlse_ptr + at + rows, mask=rows < n_rows, other=0.0)
    tl.store(delta_ptr + at + rows, mean_dp, mask=rows < n_rows)
    if EXACT:
        dq -= (mean_dp - delta)[:, None] * pk
    dq_ptr += b * stride_dqb + h * stride_dqh + row * stride_dqm
    offs_d = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < n_rows) & (offs_d[None, :] < HEAD_DIM)
    offsets = rows[:, None] * tl.cast(stride_dqm, tl.int64) + offs_d[None, :]
    tl.store(dq_ptr + offsets, (dq * (norm * scale)[:, None]).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*BACKWARD_NUMBERS, *POINTERS, "n_batch", "bias_batch", "bias_heads", "m_tiles", "n_tiles"])
def _backward_bias(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, norm_ptr, dbias_ptr,
    kv_lengths_ptr, alibi_ptr, mask_ptr, bias_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_lb, stride_lh, stride_dbb, stride_dbh, stride_dbm, stride_dbn,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    n_batch, bias_batch, bias_heads, m_tiles, n_tiles,
    n_heads, group, n_queries, n_keys, window, threshold, scale, softcap, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr,
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
    bias_h = pid // own_n_tiles // own_m_tiles % bias_heads
    bias_b = pid // own_n_tiles // own_m_tiles // bias_heads
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for index in range((n_batch // bias_batch) * (n_heads // bias_heads)):
        b = tl.cast(bias_b + index // (n_heads // bias_heads), tl.int64)
        h = tl.cast(bias_h + index % (n_heads // bias_heads), tl.int64)
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
            dout = load_rows(dout_tile, stride_gm, rows, n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
            at = b * stride_lb + h * stride_lh + start_m
            lse = _finite_lse(lse_ptr + at, rows, n_rows)
            delta = tl.load(delta_ptr + at + rows, mask=rows < n_rows, other=0.0)
            mask_tile = None
            if mask_ptr is not None:
                mask_tile = mask_ptr + b * stride_mask_b + h * stride_mask_h + start_m * stride_mask_m
            bias_tile = bias_ptr + b * stride_bias_b + h * stride_bias_h + start_m * stride_bias_m
            for tile_n in range(n_tile, n_tiles if ONE_COLUMN else n_tile + 1):
                offs_n = tile_n * BLOCK_N + cols
                k_tile = tl.multiple_of(k_ptr + b * stride_kb + h_kv * stride_kh, 16)
                v_tile = tl.multiple_of(v_ptr + b * stride_vb + h_kv * stride_vh, 16)
                k = load_rows(k_tile, stride_kn, offs_n, length, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
                v = load_rows(v_tile, stride_vn, offs_n, length, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
                p, _ = _weights(
                    tl.dot(q, k.T, input_precision="ieee"), lse, rows, n_rows, offs_n, own, length, scale,
                    softcap, slope, window, mask_tile, bias_tile,
                    stride_mask_m, stride_mask_n, stride_bias_m, stride_bias_n,
                    IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, alibi_ptr is not None,
                )  # fmt: skip
                p *= tl.load(norm_ptr + at + rows, mask=rows < n_rows, other=1.0)[:, None]
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
    dbias_ptr += tl.cast(bias_b, tl.int64) * stride_dbb + tl.cast(bias_h, tl.int64) * stride_dbh
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

    Args: dout (B, H, T, D) and dlse (B, H, T) or None, the gradients of out and lse that `attention_forward` returned;
        the rest as it took them. No host sync.
    """
    if INTERPRETED and q.dtype is torch.bfloat16:  # as in attention_forward
        options = {name: value for name, value in locals().items() if name not in ("dout", "dlse", "q", "k", "v", "out", "lse")}
        grads = attention_backward(dout.float(), dlse, q.float(), k.float(), v.float(), out.float(), lse, **options)
        return (*(grad.bfloat16() for grad in grads[:3]), *grads[3:])

    B, H, T, D = q.shape
    H_kv, S = k.shape[1:3]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dbias = torch.zeros_like(bias, memory_format=torch.contiguous_format) if needs_dbias else None
    if dq.numel() == 0 or dk.numel() == 0:
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias, dsinks
    packed = cu_seqlens_q is not None
    q, k, v, dout, out = (aligned_rows(x) for x in (q, k, v, dout, out))
    lse = lse.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    delta, norm = torch.empty_like(lse), torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()

    extras = Extras(q, k, window, softcap, alibi_slopes, None, mask, bias, kv_lengths, None, None, None, dropout_p,
                    dropout_seed, cu_seqlens_q, cu_seqlens_k)  # fmt: skip
    constants = _constants(D, q.element_size(), causal, window is not None, softcap is not None, extras.rich)
    tiles = {name: constants[name] for name in ("HEAD_DIM", "BLOCK_D", "BLOCK_M", "num_warps")}
    n_queries, n_keys = (T, S) if not packed else (max_q, max_k)
    batch = len(cu_seqlens_q) - 1 if packed else B
    m_tiles, n_tiles = triton.cdiv(n_queries, constants["BLOCK_M"]), triton.cdiv(n_keys, constants["BLOCK_N"])
    names = ("kv_lengths_ptr", "cu_q_ptr", "cu_k_ptr", "alibi_ptr", "mask_ptr", "bias_ptr", "seed_ptr")
    skipped = ("stride_t", "stride_ks", "stride_vs", "page", "n_pages", "n_keys")
    common = {name: extras.tensors[name] for name in names}
    common |= {name: value for name, value in extras.numbers.items() if not name.startswith(skipped)}
    common |= {**strides(q, "q", "bhm", packed), **strides(k, "k", "bhn", packed), **strides(v, "v", "bhn", packed)}
    common |= {**strides(dout, "g", "bhm", packed), **strides(lse, "l", "bh", packed)}
    common |= {"n_heads": H, "group": H // H_kv, "n_queries": n_queries, "n_keys": n_keys, "scale": scale, **constants}
    with torch.cuda.device_of(q):
        _delta[(triton.cdiv(T, constants["BLOCK_M"]) * B * H,)](
            out, dout, dlse, delta, **strides(out, "o", "bhm"), **strides(dout, "g", "bhm"), **strides(lse, "l", "bh"),
            n_heads=H, n_queries=T, **tiles,
        )  # fmt: skip
        _backward_queries[(m_tiles * batch * H,)](
            q, k, v, dout, lse, dlse, delta, norm, dq, sinks_ptr=sinks, **strides(dq, "dq", "bhm", packed), **common
        )
        _backward_keys[(n_tiles * batch * H_kv,)](
            q, k, v, dout, lse, delta, norm, dk, dv, **strides(dk, "dk", "bhn", packed),
            **strides(dv, "dv", "bhn", packed), **common,
        )  # fmt: skip
        if needs_dbias:
            shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
            one_row, one_column = shape[2] == 1, shape[3] == 1
            grid = shape[0] * shape[1] * (1 if one_row else m_tiles) * (1 if one_column else n_tiles)
            _backward_bias[(grid,)](
                q, k, v, dout, lse, delta, norm, dbias, **strides(dbias.view(shape), "db", "bhmn"),
                n_batch=B, bias_batch=shape[0], bias_heads=shape[1], m_tiles=m_tiles, n_tiles=n_tiles,
                ONE_ROW=one_row, ONE_COLUMN=one_column,
                **{name: value for name, value in common.items() if not name.startswith("cu_")},
            )  # fmt: skip
    dsinks = None
    if sinks is not None:
        # A row that sees no key has no weights, and gives nothing.
        weight = (sinks.double().view(-1, 1) - lse).exp().masked_fill(lse == -torch.inf, 0.0)  # (B, H, T)
        dsinks = -(weight * norm * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks


@functools.cache
def _constants(
    head_dim: int, element_size: int, causal: bool, has_window=False, has_softcap=False, rich=False
) -> dict:
    """The kernels' compile-time arguments and options."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    tile = (RICH_TILES if rich else TILES)[block_d, element_size]
    return dict(
        HEAD_DIM=head_dim, BLOCK_D=block_d, IS_CAUSAL=causal, HAS_WINDOW=has_window, HAS_SOFTCAP=has_softcap,
        # Left alone, ptxas spills some bytes to fit more programs on a multiprocessor.
        **tile._asdict(), enable_fp_fusion=True, maxnreg=255,
    )  # fmt: skip


def aot_configurations():
    """Yields (kernel, dtype, constants, the pointers that are not None), to compile ahead of time."""
    features = [
        ((), {}),
        (("kv_lengths_ptr",), {"has_window": True}),
        (("cu_q_ptr", "cu_k_ptr"), {"has_window": True}),
        (
            ("kv_lengths_ptr", "alibi_ptr", "sinks_ptr", "mask_ptr", "bias_ptr", "seed_ptr"),
            {"has_window": True, "has_softcap": True, "rich": True},
        ),
        (("cu_q_ptr", "cu_k_ptr", "seed_ptr"), {"rich": True}),
    ]
    for (block_d, element_size), dtype in itertools.product(TILES, (torch.float16, torch.bfloat16, torch.float32)):
        if dtype.itemsize != element_size:
            continue
        for head_dim, causal, (pointers, flags) in itertools.product(
            (block_d, block_d * 5 // 8), (True, False), features
        ):
            constants = _constants(head_dim, element_size, causal, **flags)
            yield _backward_keys, dtype, constants, pointers
            yield _backward_queries, dtype, constants, pointers
            if "bias_ptr" in pointers:
                for one_row, one_column in itertools.product((False, True), repeat=2):
                    yield _backward_bias, dtype, constants | {"ONE_ROW": one_row, "ONE_COLUMN": one_column}, pointers
