"""Attention, backward: the pass over keys. Each program owns a tile of keys and loops over the queries that see them.

See attention_backward.py.
"""

import triton
import triton.language as tl

from fastgpt.kernels.attention_arguments import BACKWARD_NUMBERS, POINTERS
from fastgpt.kernels.attention_rows import Descriptors, load_rows, load_vector, sequence_of, store_rows
from fastgpt.kernels.attention_scores import Features, kept_weights, recomputed_weights
from fastgpt.kernels.launch import kernel


@triton.jit
def _query_ranges(
    start_n, n_queries, length, window, HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """The queries that see a key of the tile from start_n on, in three ranges: (begins, stops).

    Range 0 (causal, or all queries with a mask): queries that see only some of the tile's keys. Range 1: queries that see all
    of them. Range 2 (window): queries for which some keys are outside the window. A range may be empty: stop <= begin.
    """
    # A query's position is token + length - n_queries: at least start_n if causal, and below the last key's position + window.
    past = length - n_queries
    first = tl.maximum(start_n - past, 0) // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
    inner = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - past, 0), BLOCK_M) * BLOCK_M if IS_CAUSAL else 0
    last = n_queries
    outer = n_queries // BLOCK_M * BLOCK_M
    if window is not None:
        last = tl.minimum(n_queries, tl.minimum(start_n + BLOCK_N, length) - 1 + window - past)
        outer = tl.minimum(outer, tl.maximum(start_n + window - past, 0) // BLOCK_M * BLOCK_M)
    if start_n >= length:
        last = 0
    first_stop = last if HAS_MASK else tl.minimum(inner, last)
    return (first, inner, tl.maximum(inner, outer)), (first_stop, tl.minimum(outer, last), last)


@triton.jit
def _fold_queries(
    dk, dv, k, v, q_ptr, dout_ptr, stride_qm, stride_gm, bulk, shift_ptr, delta_ptr, norm_ptr, features, begin, stop,
    n_queries, length, b, h, start_n,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of the queries begin..stop-1 of one head to dk and dv of a tile of keys. Pointers, `Descriptors` (of
    q and dout) and `Features` start at the head's first query.

    Scores are transposed, (keys, queries): then weights are left operands of the products, and stay in registers. Unmasked,
    every query sees every key of the tile, except keys from length on, whose rows the caller discards, and stop - begin is a
    multiple of BLOCK_M.
    """
    EXACT: tl.constexpr = k.dtype == tl.float32
    BLOCK_N: tl.constexpr = k.shape[0]
    BLOCK_D: tl.constexpr = k.shape[1]
    BLOCK_V: tl.constexpr = v.shape[1]
    offs_n = (start_n + tl.arange(0, BLOCK_N))[:, None]
    cols = tl.arange(0, BLOCK_M)
    for start_m in range(begin, stop, BLOCK_M):
        offs_m = start_m + cols
        rows = offs_m[None, :]
        if BULK:
            q = bulk.x.load([bulk.b, bulk.h, bulk.row + start_m, 0]).reshape(BLOCK_M, BLOCK_D)
            dout = bulk.y.load([bulk.b, bulk.h, bulk.row + start_m, 0]).reshape(BLOCK_M, BLOCK_V)
        else:
            q = load_rows(q_ptr, stride_qm, offs_m, n_queries, HEAD_DIM, BLOCK_D, MASKED)
            dout = load_rows(dout_ptr, stride_gm, offs_m, n_queries, V_DIM, BLOCK_V, MASKED)
        at = tl.cast(start_m, tl.int64)
        n_rows = n_queries - start_m
        shift = load_vector(shift_ptr + at, cols, n_rows, 0.0, MASKED)
        p, slope_of_cap = recomputed_weights(
            tl.dot(k, q.T, input_precision="ieee"), shift[None, :], features, rows, n_queries, offs_n,
            rows + length - n_queries, None, MASK_UNIT, BIAS_UNIT, IS_CAUSAL, MASKED, EXACT,
        )  # fmt: skip
        if EXACT:
            p *= load_vector(norm_ptr + at, cols, n_rows, 1.0, MASKED)[None, :]
        if features.seed is not None:
            heads = tl.zeros([BLOCK_M], tl.int32) + tl.cast(h, tl.int32)
            keep = kept_weights(features, b, heads, offs_m, start_n, BLOCK_N).T
            kept = tl.where(keep, p * features.keep_scale, 0.0).to(q.dtype)
        else:
            kept = p.to(q.dtype)
            p = kept  # rounded to 16 bits, it takes half the registers while dp is computed
        dv = tl.dot(kept, dout, dv, input_precision="ieee")
        dp = tl.dot(v, dout.T, input_precision="ieee")
        if features.seed is not None:
            dp = tl.where(keep, dp * features.keep_scale, 0.0)
        delta = load_vector(delta_ptr + at, cols, n_rows, 0.0, MASKED)
        ds = p.to(tl.float32) * (dp - delta[None, :]) * slope_of_cap
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@kernel(do_not_specialize=[*BACKWARD_NUMBERS, *POINTERS])
def backward_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, shift_ptr, delta_ptr, norm_ptr, dk_ptr, dv_ptr,
    kv_lengths_ptr, cu_q_ptr, cu_k_ptr, alibi_ptr, mask_ptr, bias_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_lb, stride_lh,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    n_heads, group, n_queries, n_keys, window, threshold, scale, softcap, keep_scale, q_desc, dout_desc,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key/value head. Strides are in elements; the last dimension's is 1."""
    n_tiles = tl.cdiv(n_keys, BLOCK_N)
    pid = tl.program_id(0)
    start_n = pid % n_tiles * BLOCK_N
    n_kv_heads = n_heads // group
    b = tl.cast(pid // n_tiles // n_kv_heads, tl.int64)
    h_kv = tl.cast(pid // n_tiles % n_kv_heads, tl.int64)
    n_rows_of_k = n_keys - start_n  # to write
    T, length, first_q, first_k = sequence_of(b, n_queries, n_keys, kv_lengths_ptr, cu_q_ptr, cu_k_ptr)
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

    window = window if HAS_WINDOW else None
    begins, stops = _query_ranges(start_n, T, length, window, mask_ptr is not None, BLOCK_M, BLOCK_N, IS_CAUSAL)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for i in range(group):
        h = h_kv * group + i
        desc_h = tl.cast(tl.minimum(h, n_heads - 1), tl.int32)  # a bound that shows that 32 bits are enough
        slope = None
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
        bulk = Descriptors(q_desc, None, dout_desc, desc_b, desc_h, desc_m)
        features = Features(
            scale, softcap if HAS_SOFTCAP else None, slope, window, mask_head, stride_mask_m, stride_mask_n,
            bias_head, stride_bias_m, stride_bias_n, n_keys, seed, threshold, keep_scale,
        )  # fmt: skip
        for r in tl.static_range(3):
            if (IS_CAUSAL or mask_ptr is not None) if r == 0 else mask_ptr is None:
                dk, dv = _fold_queries(
                    dk, dv, k, v, q_head, dout_head, stride_qm, stride_gm, bulk, shift_ptr + at, delta_ptr + at, norm_ptr + at,
                    features, begins[r], stops[r], T, length, b, h, start_n,
                    HEAD_DIM, V_DIM, BLOCK_M, MASK_UNIT, BIAS_UNIT, IS_CAUSAL,
                    MASKED=r != 1, BULK=BULK and (r == 1 or cu_q_ptr is None),
                )  # fmt: skip
    unread = offs_n[:, None] >= length
    dk_ptr += b * stride_dkb + h_kv * stride_dkh + start * stride_dkn
    dv_ptr += b * stride_dvb + h_kv * stride_dvh + start * stride_dvn
    store_rows(dk_ptr, stride_dkn, cols, n_rows_of_k, tl.where(unread, 0.0, dk * scale), HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, stride_dvn, cols, n_rows_of_k, tl.where(unread, 0.0, dv), V_DIM, BLOCK_V)
