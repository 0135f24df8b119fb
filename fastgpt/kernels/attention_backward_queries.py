"""Attention, backward: the pass over queries. Each program owns a tile of queries and loops over the keys that they see.

See attention_backward.py.
"""

import triton
import triton.language as tl

from fastgpt.kernels.attention_arguments import BACKWARD_NUMBERS, POINTERS
from fastgpt.kernels.attention_rows import Descriptors, load_rows, load_vector, sequence_of, store_rows
from fastgpt.kernels.attention_scores import LOG2_E, Features, kept_weights, key_ranges, recomputed_weights
from fastgpt.kernels.launch import kernel


@triton.jit
def _fold_keys(
    dq, pk, row_sum, mean_dp, q, dout, shift, delta, k_ptr, v_ptr, stride_kn, stride_vn, bulk, features, begin, stop, end,
    q_pos, offs_m, n_rows, b, h,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of the keys begin..stop-1 to dq and, for the weights p of a row, to the sums of p k, p and p dp.
    bulk, features: `Descriptors` of k and v, and `Features`.

    Unmasked, every query of the tile sees every key of that range, and stop - begin is a multiple of BLOCK_N.
    """
    EXACT: tl.constexpr = q.dtype == tl.float32
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_V: tl.constexpr = dout.shape[1]
    rows = tl.arange(0, BLOCK_M)[:, None]
    for start_n in range(begin, stop, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        if BULK:
            k = bulk.x.load([bulk.b, bulk.h, bulk.row + start_n, 0]).reshape(BLOCK_N, BLOCK_D)
            v = bulk.y.load([bulk.b, bulk.h, bulk.row + start_n, 0]).reshape(BLOCK_N, BLOCK_V)
        else:
            k = load_rows(k_ptr, stride_kn, offs_n, end, HEAD_DIM, BLOCK_D, MASKED)
            v = load_rows(v_ptr, stride_vn, offs_n, end, V_DIM, BLOCK_V, MASKED)
        p, slope_of_cap = recomputed_weights(
            tl.dot(q, k.T, input_precision="ieee"), shift[:, None], features, rows, n_rows, offs_n[None, :], q_pos[:, None],
            end, MASK_UNIT, BIAS_UNIT, IS_CAUSAL, MASKED, EXACT,
        )  # fmt: skip
        row_sum += tl.sum(p, 1)
        dp = tl.dot(dout, v.T, input_precision="ieee")
        if features.seed is not None:
            heads = tl.zeros([BLOCK_M], tl.int32) + tl.cast(h, tl.int32)
            keep = kept_weights(features, b, heads, offs_m, start_n, BLOCK_N)
            dp = tl.where(keep, dp * features.keep_scale, 0.0)
        mean_dp += tl.sum(p * dp, 1)
        ds = p * (dp - delta[:, None]) * slope_of_cap
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        if EXACT:
            pk = tl.dot(p * slope_of_cap, k, pk, input_precision="ieee")
    return dq, pk, row_sum, mean_dp


@kernel(do_not_specialize=[*BACKWARD_NUMBERS, *POINTERS, "lse_ptr", "dlse_ptr"])
def backward_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, dlse_ptr, shift_ptr, delta_ptr, norm_ptr, dq_ptr,
    kv_lengths_ptr, cu_q_ptr, cu_k_ptr, alibi_ptr, sinks_ptr, mask_ptr, bias_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_lb, stride_lh, stride_dqb, stride_dqh, stride_dqm,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    n_heads, group, n_queries, n_keys, window, threshold, scale, softcap, keep_scale, q_desc, k_desc, v_desc, dout_desc,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head. Strides are in elements; the last dimension's is 1."""
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    pid = tl.program_id(0)
    start_m = (n_tiles - 1 - pid % n_tiles) * BLOCK_M  # last queries first: if causal, they have the most work
    b = tl.cast(pid // n_tiles // n_heads, tl.int64)
    h = tl.cast(pid // n_tiles % n_heads, tl.int64)
    h_kv = h // group
    T, length, first_q, first_k = sequence_of(b, n_queries, n_keys, kv_lengths_ptr, cu_q_ptr, cu_k_ptr)
    if cu_q_ptr is not None:
        if start_m >= T:
            return
    rows = tl.arange(0, BLOCK_M)
    n_rows = T - start_m
    past = start_m + length - T
    q_pos = past + rows
    row = first_q + start_m
    BULK: tl.constexpr = k_desc is not None
    desc_b = 0 if cu_k_ptr is not None else tl.cast(b, tl.int32)
    desc_h = tl.cast(h_kv, tl.int32)
    desc_n = tl.cast(first_k, tl.int32)
    if BULK:  # also loads rows past the last; these are not stored
        at_m = [desc_b, tl.cast(h, tl.int32), tl.cast(row, tl.int32), 0]
        q = q_desc.load(at_m).reshape(BLOCK_M, BLOCK_D)
        dout = dout_desc.load(at_m).reshape(BLOCK_M, BLOCK_V)
    else:
        q_ptr = tl.multiple_of(q_ptr + b * stride_qb + h * stride_qh + row * stride_qm, 16)
        dout_ptr = tl.multiple_of(dout_ptr + b * stride_gb + h * stride_gh + row * stride_gm, 16)
        q = load_rows(q_ptr, stride_qm, rows, n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
        dout = load_rows(dout_ptr, stride_gm, rows, n_rows, V_DIM, BLOCK_V, MASK_ROWS=True)
    at = b * stride_lb + h * stride_lh + row
    lse = load_vector(lse_ptr + at, rows, n_rows, 0.0, True)
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # fully masked rows
    shift = lse if q.dtype == tl.float32 else lse * LOG2_E
    delta = load_vector(delta_ptr + at, rows, n_rows, 0.0, True)
    slope = None
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + h)
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b + h * stride_mask_h + row * stride_mask_m
    if bias_ptr is not None:
        bias_ptr += b * stride_bias_b + h * stride_bias_h + row * stride_bias_m
    k_ptr = tl.multiple_of(k_ptr + b * stride_kb + h_kv * stride_kh + first_k * stride_kn, 16)
    v_ptr = tl.multiple_of(v_ptr + b * stride_vb + h_kv * stride_vh + first_k * stride_vn, 16)

    EXACT: tl.constexpr = q.dtype == tl.float32
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    pk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    mean_dp = tl.zeros([BLOCK_M], tl.float32)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    bulk = Descriptors(k_desc, None, v_desc, desc_b, desc_h, desc_n)
    features = Features(
        scale, softcap if HAS_SOFTCAP else None, slope, window if HAS_WINDOW else None, mask_ptr, stride_mask_m, stride_mask_n,
        bias_ptr, stride_bias_m, stride_bias_n, n_keys, seed, threshold, keep_scale,
    )  # fmt: skip
    begins, stops, _, end = key_ranges(
        past, n_rows, length, features.window, mask_ptr is not None, BLOCK_M, BLOCK_N, IS_CAUSAL
    )  # fmt: skip
    for i in tl.static_range(3):
        if i == 2 or (HAS_WINDOW if i == 0 else mask_ptr is None):
            dq, pk, row_sum, mean_dp = _fold_keys(
                dq, pk, row_sum, mean_dp, q, dout, shift, delta, k_ptr, v_ptr, stride_kn, stride_vn, bulk, features,
                begins[i], stops[i], end, q_pos, start_m + rows, n_rows, b, h,
                HEAD_DIM, V_DIM, BLOCK_N, MASK_UNIT, BIAS_UNIT, IS_CAUSAL,
                MASKED=i != 1, BULK=BULK and (i == 1 or cu_k_ptr is None and kv_lengths_ptr is None),
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
    mean_dp = tl.where(seen, mean_dp * norm, 0.0)  # a NaN in v must not reach fully masked rows
    if dlse_ptr is not None:
        mean_dp -= tl.load(dlse_ptr + at + rows, mask=rows < n_rows, other=0.0)
    tl.store(delta_ptr + at + rows, mean_dp, mask=rows < n_rows)
    if EXACT:
        dq -= (mean_dp - delta)[:, None] * pk
    dq_ptr += b * stride_dqb + h * stride_dqh + row * stride_dqm
    dq = tl.where(seen[:, None], dq * (norm * scale)[:, None], 0.0)
    store_rows(dq_ptr, stride_dqm, rows, n_rows, dq, HEAD_DIM, BLOCK_D)
