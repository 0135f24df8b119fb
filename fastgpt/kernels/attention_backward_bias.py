"""Attention, backward: the pass over tiles of the bias; see attention_backward.py."""

import triton.language as tl

from fastgpt.kernels.attention_arguments import BACKWARD_NUMBERS, POINTERS
from fastgpt.kernels.attention_rows import load_rows, load_vector
from fastgpt.kernels.attention_scores import Features, kept_weights, recomputed_weights
from fastgpt.kernels.launch import kernel


@kernel(do_not_specialize=[*BACKWARD_NUMBERS, *POINTERS, "n_batch", "bias_batch", "bias_heads", "m_tiles", "n_tiles"])
def backward_bias(
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

    bias_batch, bias_heads: the bias's batch size and heads. With ONE_ROW it has one row for all queries, with ONE_COLUMN one
    column for all keys; a program then loops over all tiles of that dimension.
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
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    for index in range(tl.cast(n_batch // bias_batch, tl.int64) * (n_heads // bias_heads)):
        b = bias_b + index // (n_heads // bias_heads)
        h = bias_h + index % (n_heads // bias_heads)
        h_kv = h // group
        length = n_keys
        if kv_lengths_ptr is not None:
            length = tl.maximum(0, tl.minimum(tl.load(kv_lengths_ptr + b), n_keys))
        slope = None
        if alibi_ptr is not None:
            slope = tl.load(alibi_ptr + h)
        for tile_m in range(m_tile, m_tiles if ONE_ROW else m_tile + 1):
            start_m = tl.cast(tile_m * BLOCK_M, tl.int64)
            n_rows = n_queries - tile_m * BLOCK_M
            q_pos = tile_m * BLOCK_M + rows + length - n_queries
            q_tile = tl.multiple_of(q_ptr + b * stride_qb + h * stride_qh + start_m * stride_qm, 16)
            dout_tile = tl.multiple_of(dout_ptr + b * stride_gb + h * stride_gh + start_m * stride_gm, 16)
            q = load_rows(q_tile, stride_qm, rows, n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
            dout = load_rows(dout_tile, stride_gm, rows, n_rows, V_DIM, BLOCK_V, MASK_ROWS=True)
            at = b * stride_lb + h * stride_lh + start_m
            shift = load_vector(shift_ptr + at, rows, n_rows, 0.0, True)
            delta = load_vector(delta_ptr + at, rows, n_rows, 0.0, True)
            mask_tile = None
            if mask_ptr is not None:
                mask_tile = mask_ptr + b * stride_mask_b + h * stride_mask_h + start_m * stride_mask_m
            features = Features(
                scale, softcap if HAS_SOFTCAP else None, slope, window if HAS_WINDOW else None,
                mask_tile, stride_mask_m, stride_mask_n,
                bias_ptr + b * stride_bias_b + h * stride_bias_h + start_m * stride_bias_m, stride_bias_m, stride_bias_n,
                n_keys, seed, threshold, keep_scale,
            )  # fmt: skip
            for tile_n in range(n_tile, n_tiles if ONE_COLUMN else n_tile + 1):
                offs_n = tile_n * BLOCK_N + cols
                k_tile = tl.multiple_of(k_ptr + b * stride_kb + h_kv * stride_kh, 16)
                v_tile = tl.multiple_of(v_ptr + b * stride_vb + h_kv * stride_vh, 16)
                k = load_rows(k_tile, stride_kn, offs_n, length, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
                v = load_rows(v_tile, stride_vn, offs_n, length, V_DIM, BLOCK_V, MASK_ROWS=True)
                p, _ = recomputed_weights(
                    tl.dot(q, k.T, input_precision="ieee"), shift[:, None], features, rows[:, None], n_rows, offs_n[None, :],
                    q_pos[:, None], length, MASK_UNIT, BIAS_UNIT, IS_CAUSAL, MASKED=True, EXACT=q.dtype == tl.float32,
                )  # fmt: skip
                if q.dtype == tl.float32:
                    p *= load_vector(norm_ptr + at, rows, n_rows, 1.0, True)[:, None]
                dp = tl.dot(dout, v.T, input_precision="ieee")
                if seed is not None:
                    heads = tl.zeros([BLOCK_M], tl.int32) + tl.cast(h, tl.int32)
                    offs_m = tile_m * BLOCK_M + rows
                    keep = kept_weights(features, b, heads, offs_m, tile_n * BLOCK_N, BLOCK_N)
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
