"""Attention, forward: one pass over the keys with an online softmax.

    out[b,h,i] = sum_j softmax_j(score[b,h,i,j]) v[b,h//g,j],   g = H // H_kv
    lse[b,h,i] = log sum_j exp(score[b,h,i,j])

Each program owns BLOCK_M queries of one head and loops over the keys that they see, BLOCK_N at a time.
It keeps, per query, the running maximum m and the sum l of exp(score - m), and rescales its
accumulators whenever m grows, so no (T, S) matrix is materialized. Tiles of keys that none of its
queries sees are skipped, and only tiles that not all queries see are masked.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.architecture import architecture
from fastgpt.kernels.attention_arguments import (
    NUMBERS,
    POINTERS,
    Extras,
    TileDescriptor,
    have_bulk_copies,
    leading_strides,
    tile_of,
)
from fastgpt.kernels.attention_rows import (
    Descriptors,
    KeysValues,
    aligned_rows,
    from_8_bits,
    has_aligned_rows,
    load_keys,
    load_rows,
    pages_of,
    sequence_of,
    store_rows,
    values_from_8_bits,
)
from fastgpt.kernels.attention_scores import (
    LN_2,
    LOG2_E,
    Features,
    finish_softmax,
    kept_weights,
    key_ranges,
    load_bias,
    load_mask,
    modified_scores,
    online_softmax,
    seen_keys,
    visible_keys,
)
from fastgpt.kernels.launch import Constants, Launch, contiguous, dense, kernel, no_launch, plan
from fastgpt.kernels.limits import cdiv, grid
from fastgpt.kernels.tiles import attention_tile, forward_table, head_blocks, masked_columns, padded_dim

WIDEST_BULK = 256  # largest head dim of tiles that are copied in bulk (TMA)
NO_TILES = (None,) * 5


@triton.jit
def _attend(
    acc, row_sum, row_max, q, q_rest, kv, bulk, features, begin, stop, first, end, factor, q_pos, offs_m, n_rows, b, heads,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Accumulates the keys begin..stop-1 into (acc, row_sum, row_max); begin is a multiple of BLOCK_N.

    Unmasked, every query sees every key of that range and stop - begin is a multiple of BLOCK_N.
    Masked, keys from `end` on are not read, nor (except in bulk) values before `first`, and visible_keys and the mask say
    which keys a query sees. Values of keys that are masked for all queries of the tile count as zeros: a weight of zero times
    infinity or NaN would be NaN.

    Args: kv, bulk, features: `KeysValues`, `Descriptors` of keys and values, and `Features`; q_rest may be None;
        factor: scales the loop's scores to base 2; q_pos, offs_m, heads (M,): position among the keys, token and head of each
        query, of which the first n_rows exist.
    """
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_V: tl.constexpr = acc.shape[1]
    rows = tl.arange(0, q.shape[0])
    MODIFIED: tl.constexpr = features.softcap is not None or features.slope is not None or features.bias_ptr is not None
    if kv.block_table_ptr is not None:  # looked up one iteration ahead, as in attention_decode.py
        next_pages = pages_of(kv, begin + tl.arange(0, BLOCK_N), end)
    for start_n in range(begin, stop, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        in_range = offs_n < end
        pages, key_rows = 0, offs_n
        if kv.block_table_ptr is not None:
            pages, key_rows = next_pages.to(tl.int64), offs_n % kv.page
            next_pages = pages_of(kv, offs_n + BLOCK_N, end)
        if BULK:
            k = bulk.x.load([bulk.b, bulk.h, bulk.row + start_n, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            k = load_keys(kv.k_ptr, kv.stride_kb, kv.stride_kn, pages, key_rows, in_range, HEAD_DIM, BLOCK_D, MASKED)
        qk = tl.dot(q, from_8_bits(k, q.dtype).T, input_precision="ieee")  # (BLOCK_M, BLOCK_N) fp32, not yet scaled
        if q_rest is not None:
            BLOCK_R: tl.constexpr = q_rest.shape[1]
            if BULK:
                k_rest = bulk.x_rest.load([bulk.b, bulk.h, bulk.row + start_n, BLOCK_D]).reshape(BLOCK_N, BLOCK_R)
            else:
                k_rest = load_keys(
                    kv.k_ptr + BLOCK_D, kv.stride_kb, kv.stride_kn, pages, key_rows, in_range, HEAD_DIM - BLOCK_D, BLOCK_R,
                    MASKED,
                )  # fmt: skip
            qk = tl.dot(q_rest, from_8_bits(k_rest, q.dtype).T, qk, input_precision="ieee")
        if kv.k_scale_ptr is not None:
            offsets = pages * kv.stride_ksb + key_rows * tl.cast(kv.stride_ksn, tl.int64)
            qk *= tl.load(kv.k_scale_ptr + offsets, mask=in_range, other=0.0)[None, :]
        if MODIFIED:
            bias = None
            if features.bias_ptr is not None:
                bias = load_bias(features, rows[:, None], offs_n[None, :], n_rows, BIAS_UNIT, not MASKED)
            qk = modified_scores(qk, features.scale, features.softcap, features.slope, q_pos, offs_n, bias)
        if MASKED:
            visible = visible_keys(q_pos[:, None], offs_n[None, :], end, features.window, IS_CAUSAL)
            if features.mask_ptr is not None:
                visible = visible & load_mask(features, rows[:, None], offs_n[None, :], n_rows, MASK_UNIT)
            qk = tl.where(visible, qk, float("-inf"))

        p, rescale, row_sum, row_max = online_softmax(qk, row_sum, row_max, factor, EXACT=q.dtype == tl.float32)
        if features.seed is not None:
            keep = kept_weights(features, b, heads, offs_m, start_n, BLOCK_N)
            p = tl.where(keep, p * features.keep_scale, 0.0)

        if BULK:
            v = bulk.y.load([bulk.b, bulk.h, bulk.row + start_n, 0]).reshape(BLOCK_N, BLOCK_V)
        else:
            if features.window is not None:
                in_range = in_range & (offs_n >= first)
            v = load_keys(kv.v_ptr, kv.stride_vb, kv.stride_vn, pages, key_rows, in_range, V_DIM, BLOCK_V, MASKED)
        v = values_from_8_bits(v, q.dtype)
        if kv.v_scale_ptr is not None:
            offsets = pages * kv.stride_vsb + key_rows * tl.cast(kv.stride_vsn, tl.int64)
            v_scale = tl.load(kv.v_scale_ptr + offsets, mask=in_range, other=0.0)
            v = (v.to(tl.float32) * v_scale[:, None]).to(q.dtype)
        if features.mask_ptr is not None or features.bias_ptr is not None:
            v = tl.where(seen_keys(qk, rows < n_rows)[:, None], v, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, row_sum, row_max


@kernel(do_not_specialize=[*NUMBERS, *POINTERS])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, kv_lengths_ptr, cu_q_ptr, cu_k_ptr, alibi_ptr, sinks_ptr, mask_ptr, bias_ptr,
    block_table_ptr, k_scale_ptr, v_scale_ptr, seed_ptr, q_desc, k_desc, v_desc, q_rest_desc, k_rest_desc,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_lb, stride_lh,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    stride_tb, stride_tp, stride_ksb, stride_ksh, stride_ksn, stride_vsb, stride_vsh, stride_vsn,
    page, n_pages, n_heads, group, n_queries, n_keys, window, threshold, scale, softcap, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Strides are in elements; the last dimension's is 1.

    Rows of q and k have HEAD_DIM elements, those past BLOCK_D in a tile of BLOCK_R unless that is 0; rows of v and out V_DIM.
    lse (B, H, T) fp32. Packed sequences: cu_q, cu_k (B + 1,) int32 say where each begins, batch strides are 0 and
    n_queries is that of the longest. Optional arguments are None if absent.
    """
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    pid = tl.program_id(0)
    start_m = (n_tiles - 1 - pid % n_tiles) * BLOCK_M  # last queries first: if causal, they have the most work
    b = tl.cast(pid // n_tiles // n_heads, tl.int64)
    h = tl.cast(pid // n_tiles % n_heads, tl.int64)
    h_kv = tl.cast(pid // n_tiles % n_heads // group, tl.int64)

    n_queries, length, first_q, first_k = sequence_of(b, n_queries, n_keys, kv_lengths_ptr, cu_q_ptr, cu_k_ptr)
    if cu_q_ptr is not None:
        if start_m >= n_queries:
            return
        q_ptr += first_q * stride_qm
        out_ptr += first_q * stride_om
        lse_ptr += first_q
        k_ptr += first_k * stride_kn
        v_ptr += first_k * stride_vn
    rows = tl.arange(0, BLOCK_M)  # queries of the tile, counted from start_m
    n_rows = n_queries - start_m
    past = start_m + length - n_queries  # keys before the one at the position of the tile's first query
    q_pos = past + rows

    q_ptr = tl.multiple_of(q_ptr + b * stride_qb + h * stride_qh + tl.cast(start_m, tl.int64) * stride_qm, 16)
    k_ptr = tl.multiple_of(k_ptr + h_kv * stride_kh, 16)
    v_ptr = tl.multiple_of(v_ptr + h_kv * stride_vh, 16)
    if block_table_ptr is not None:
        block_table_ptr += b * stride_tb
    else:
        k_ptr = tl.multiple_of(k_ptr + b * stride_kb, 16)
        v_ptr = tl.multiple_of(v_ptr + b * stride_vb, 16)
    if k_scale_ptr is not None:
        k_scale_ptr += h_kv * stride_ksh
        v_scale_ptr += h_kv * stride_vsh
        if block_table_ptr is None:
            k_scale_ptr += b * stride_ksb
            v_scale_ptr += b * stride_vsb
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b + h * stride_mask_h + tl.cast(start_m, tl.int64) * stride_mask_m
    if bias_ptr is not None:
        bias_ptr += b * stride_bias_b + h * stride_bias_h + tl.cast(start_m, tl.int64) * stride_bias_m
    slope = None
    if alibi_ptr is not None:
        slope = tl.zeros([BLOCK_M], tl.float32) + tl.load(alibi_ptr + h)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    heads = tl.zeros([BLOCK_M], tl.int32) + tl.cast(h, tl.int32)
    MODIFIED: tl.constexpr = HAS_SOFTCAP or alibi_ptr is not None or bias_ptr is not None
    unit = 1.0 if MODIFIED else scale  # factor that the loop's scores still lack
    BULK: tl.constexpr = k_desc is not None
    # Bulk copies (TMA) read whole tiles of keys, with zeros past the end of the tensor.
    WHOLE: tl.constexpr = BULK and kv_lengths_ptr is None and cu_k_ptr is None
    kv = KeysValues(
        k_ptr, stride_kb if block_table_ptr is not None else 0, stride_kn,
        v_ptr, stride_vb if block_table_ptr is not None else 0, stride_vn,
        k_scale_ptr, stride_ksb, stride_ksn, v_scale_ptr, stride_vsb, stride_vsn, block_table_ptr, stride_tp, page, n_pages,
    )  # fmt: skip
    desc_b = 0 if cu_k_ptr is not None else tl.cast(b, tl.int32)
    bulk = Descriptors(k_desc, k_rest_desc, v_desc, desc_b, tl.cast(h_kv, tl.int32), tl.cast(first_k, tl.int32))
    features = Features(
        scale, softcap if HAS_SOFTCAP else None, slope, window if HAS_WINDOW else None, mask_ptr, stride_mask_m, stride_mask_n,
        bias_ptr, stride_bias_m, stride_bias_n, n_keys, seed, threshold, keep_scale,
    )  # fmt: skip

    q_rest = None
    if q_desc is not None:  # also loads rows past the last; these are not stored
        at_m = tl.cast(first_q, tl.int32) + start_m
        q = q_desc.load([desc_b, tl.cast(h, tl.int32), at_m, 0]).reshape(BLOCK_M, BLOCK_D)
        if BLOCK_R > 0:
            q_rest = q_rest_desc.load([desc_b, tl.cast(h, tl.int32), at_m, BLOCK_D]).reshape(BLOCK_M, BLOCK_R)
    else:
        q = load_rows(q_ptr, stride_qm, rows, n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
        if BLOCK_R > 0:
            q_rest = load_rows(q_ptr + BLOCK_D, stride_qm, rows, n_rows, HEAD_DIM - BLOCK_D, BLOCK_R, MASK_ROWS=True)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    begins, stops, first, end = key_ranges(
        past, n_rows, length, features.window, mask_ptr is not None, BLOCK_M, BLOCK_N, IS_CAUSAL
    )  # fmt: skip
    for i in tl.static_range(3):
        if i == 2 or (HAS_WINDOW if i == 0 else mask_ptr is None):
            acc, row_sum, row_max = _attend(
                acc, row_sum, row_max, q, q_rest, kv, bulk, features, begins[i], stops[i], first, end, unit * LOG2_E, q_pos,
                start_m + rows, n_rows, b, heads, HEAD_DIM, V_DIM, BLOCK_N, MASK_UNIT, BIAS_UNIT, IS_CAUSAL,
                MASKED=i != 1, BULK=BULK if i == 1 else WHOLE and i == 2,
            )  # fmt: skip

    row_max *= unit if q.dtype == tl.float32 else LN_2  # see online_softmax
    out, lse = finish_softmax(acc, row_sum, row_max, sinks_ptr, h)
    tl.store(lse_ptr + (b * stride_lb + h * stride_lh + start_m) + rows, lse, mask=rows < n_rows)
    out_ptr += b * stride_ob + h * stride_oh + tl.cast(start_m, tl.int64) * stride_om
    store_rows(out_ptr, stride_om, rows, n_rows, out, V_DIM, BLOCK_V)


INTERPRETED = not isinstance(attention_forward_kernel, triton.JITFunction)  # Triton's interpreter: TRITON_INTERPRET was set


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float, window: int | None = None,
    softcap: float | None = None, alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, mask: Tensor | None = None,
    bias: Tensor | None = None, kv_lengths: Tensor | None = None, block_table: Tensor | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, dropout_p: float = 0.0, dropout_seed: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the kernel: one launch, no host sync. Arguments: `fastgpt.attention`, with dropout_seed (1,) int64 on
    the device; head dims D <= 576 of q and k, D_v of v up to 576, in fp32 512.

    Packed sequences: q (1, H, total_q, D), k, v (1, H_kv, total_k, D), and cu_seqlens_q, cu_seqlens_k (B + 1,) int32;
    max_seqlen_q is the longest sequence's number of queries. Rows past the last sequence see no key; two more launches fill
    them.

    Returns:
        out (B, H, T, D_v) in q's dtype, contiguous as (B, T, H, D_v), and lse (B, H, T) fp32, natural log.
        A fully masked query gets zeros and -inf.
    """
    if INTERPRETED and q.dtype is torch.bfloat16:  # its tl.dot reads bf16 as integers (Triton 3.6 to 3.9)
        options = {name: value for name, value in locals().items() if name not in ("q", "k", "v")}
        k, v = (x.float() if x.dtype is torch.bfloat16 else x for x in (k, v))
        out, lse = attention_forward(q.float(), k, v, **options)
        return out.bfloat16(), lse

    if scale <= 0.0:  # the kernel takes the maximum before it scales
        q, scale = (-q, -scale) if scale < 0.0 else (torch.zeros_like(q), 1.0)
    seed = dropout_seed if dropout_p > 0 else None
    vectors = kv_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks
    rest = mask, bias, block_table, k_scale, v_scale, seed
    numbers = q.shape[3], v.shape[3], causal, scale, window, softcap, dropout_p, max_seqlen_q
    planned = plan(decide, (q, k, v, *vectors, *rest), *numbers)
    if planned is None:
        q, k, v, vectors = aligned_rows(q), aligned_rows(k), aligned_rows(v), tuple(map(contiguous, vectors))
        planned = plan(decide, (q, k, v, *vectors, *rest), *numbers)
    launch, of_out, of_lse, tiles = planned
    out, lse = q.new_empty_strided(*of_out), q.new_empty_strided(*of_lse, dtype=torch.float32)
    if cu_seqlens_q is not None:  # no program writes rows past the last sequence
        out.zero_(), lse.fill_(-math.inf)
    descriptors = [None if tile is None else TileDescriptor(x, tile) for x, tile in zip((q, k, v, q, k), tiles)]
    launch(q, k, v, out, lse, *vectors, *rest, *descriptors)
    return out, lse


def decide(
    layouts: tuple, D: int, D_v: int, causal: bool, scale: float, window: int | None, softcap: float | None, dropout_p: float,
    max_seqlen_q: int | None,
) -> tuple[Callable, tuple, tuple, Sequence[dict | None]] | None:  # fmt: skip
    """The launch for tensors with these layouts, the shapes and strides of out and lse, and the tiles of q, k, v, q and k that
    have descriptors; None if some of the tensors have to be copied."""
    q, k, v, *vectors, mask, bias, block_table, k_scale, v_scale, seed = layouts
    kv_lengths, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks = vectors
    B, H, T, _ = q.shape
    out_strides = T * H * D_v, D_v, H * D_v, 1
    of_results = ((B, H, T, D_v), out_strides), dense(B, H, T)
    if 0 in (B, H, T, D_v):
        return no_launch, *of_results, NO_TILES
    if not all(map(has_aligned_rows, (q, k, v))) or not all(x is None or x.is_contiguous() for x in vectors):
        return None
    packed = cu_seqlens_q is not None
    extras = Extras(q, k, window, softcap, alibi_slopes, sinks, mask, bias, kv_lengths, block_table, k_scale, v_scale,
                    dropout_p, seed, cu_seqlens_q, cu_seqlens_k)  # fmt: skip
    n_queries = T if max_seqlen_q is None else min(max_seqlen_q, T)
    bulk = max(D, D_v) <= WIDEST_BULK and block_table is None and k.dtype is q.dtype and have_bulk_copies(q, k, v)
    arch = architecture(q.device) if bulk else 80
    flags = causal, window is not None, softcap is not None, extras.with_extras, extras.ragged
    constants = kernel_constants(D, D_v, q.element_size(), arch, *flags, *extras.units)
    tiles: Sequence[dict | None] = NO_TILES
    if bulk:
        block_m, block_n, block_d, block_r = (constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_R"))
        tiles = [
            tile_of(q, block_m, block_d, D),
            tile_of(k, block_n, block_d, D),
            tile_of(v, block_n, constants["BLOCK_V"], D_v),
        ]
        tiles += [tile_of(q, block_m, block_r, D), tile_of(k, block_n, block_r, D)] if block_r else [None, None]
    batch = cu_seqlens_q.shape[0] - 1 if packed else B
    page, n_pages, n_keys, window, softcap, threshold, keep_scale = extras.numbers.values()
    launch = Launch(
        attention_forward_kernel, grid("q", cdiv(n_queries, constants["BLOCK_M"]), batch, H), constants,
        *leading_strides(q, packed), *leading_strides(k, packed), *leading_strides(v, packed),
        *((0, *out_strides[1:3]) if packed else out_strides[:3]), 0 if packed else H * T, T, *extras.strides,
        page, n_pages, H, H // k.shape[1], n_queries, n_keys, window, threshold, float(scale), softcap, keep_scale,
    )  # fmt: skip
    return launch, *of_results, tiles


@functools.cache
def kernel_constants(
    head_dim: int, v_dim: int, element_size: int, arch: int, causal: bool, has_window: bool = False, has_softcap: bool = False,
    with_extras: bool = False, ragged: bool = False, mask_unit: int = 0, bias_unit: int = 0,
) -> Constants:  # fmt: skip
    """The compile-time arguments and options of `attention_forward_kernel`, which follow from shapes, dtypes and features."""
    block_d, block_r = head_blocks(head_dim)
    table = forward_table(causal, has_window, with_extras, ragged, masked_columns(head_dim, v_dim, arch))
    tile = attention_tile(table, head_dim, v_dim, element_size, arch)
    return Constants(
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_R=block_r, V_DIM=v_dim, BLOCK_V=padded_dim(v_dim),
        IS_CAUSAL=causal, HAS_WINDOW=has_window, HAS_SOFTCAP=has_softcap, MASK_UNIT=mask_unit, BIAS_UNIT=bias_unit,
        # Without a limit of its own, ptxas spills some registers for higher occupancy.
        **tile._asdict(), enable_fp_fusion=True, maxnreg=255,
    )  # fmt: skip
