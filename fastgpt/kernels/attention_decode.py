"""Attention of few queries over a long cache, forward: the keys are split among programs, then the parts combined.

    out[b,h,i] = sum_j softmax_j(score[b,h,i,j]) v[b,h//g,j],   g = H // H_kv

One token's queries are too few programs to fill a GPU, and the time goes into reading K and V. So the keys of a
sequence are cut into splits of a fixed number, each a program's own, and the queries of all heads that share K and V
are rows of that program's tile: K and V are read once. Of each row a split leaves the maximum score m, the sum l of
exp(score - m) and acc, the sum of exp(score - m) v; of GROUP splits, the program that ends last adds theirs, and of the groups
the last one theirs,

    out = sum_s exp(m_s - m) acc_s / sum_s exp(m_s - m) l_s,   m = max_s m_s

always in the order of the keys, whichever program it is, so that results are the same bits in every run. A token that joins
the cache is rotated, stored and attended to in the same launch.

Lengths are read on the device, and where a sequence is cut does not depend on them, nor on what the other sequences hold, but
on how many programs there would be for the GPU's multiprocessors: on numbers of sequences and heads, and on how many keys a
cache has room for. Calls that are cut alike return, bit for bit, the same for a sequence.

Source: Flash-Decoding (https://pytorch.org/blog/flash-decoding/), FlashAttention-2 (arXiv 2307.08691), algorithm 1.
"""

import functools
import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.architecture import multiprocessors
from fastgpt.kernels.attention_tiles import (
    LN_2,
    LOG2_E,
    aligned_rows,
    finish_softmax,
    from_8_bits,
    head_blocks,
    head_dims,
    load_keys,
    load_scores,
    modified_scores,
    online_softmax,
    padded_dim,
    pages_of,
    score_rows,
    tile_key,
    unit_of,
    units_of,
    values_from_8_bits,
    visible_keys,
)
from fastgpt.kernels.dependent_launch import dependent_launch, has_dependent_launch, let_next_start, wait_for_previous
from fastgpt.kernels.kv_cache_update import largest_of, quantised, rotated
from fastgpt.kernels.launch import kernel
from fastgpt.kernels.limits import cdiv, check_count, check_sizes, grid


class Tile(NamedTuple):
    """What one program works on, and the warps, pipeline stages and registers it works with."""

    BLOCK_M: int  # rows: queries of the heads that share K and V
    BLOCK_N: int  # keys per step
    SPLIT: int  # keys per program, BLOCK_N times a power of two: at the most, see `keys_per_split`
    num_warps: int
    num_stages: int
    maxnreg: int  # registers a thread may use; left to itself, ptxas spills some for more programs at once


FEW = 16  # up to this many rows, the second tile of a pair

# (head dims as of `tile_key`, bytes per element of q) -> tiles for (more than FEW rows, up to FEW).
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
    (512, 2): (Tile(32, 16, 1024, 8, 2, 255), Tile(16, 32, 256, 8, 2, 255)),
    (512, 4): (Tile(8, 16, 1024, 8, 2, 255), Tile(8, 16, 256, 8, 2, 255)),
    (1024, 2): (Tile(16, 16, 1024, 8, 2, 255), Tile(16, 16, 256, 8, 2, 255)),
    (1024, 4): (Tile(8, 16, 1024, 8, 1, 255), Tile(8, 16, 256, 8, 1, 255)),  # bf16 in the interpreter; a GPU is not asked to
}
# Parts that one program adds. More in a group make fewer groups, of which the last program adds all: 16 is the square root of
# the splits of 64 Ki keys. So many registers of a thread hold parts on their way, half of them where few are left. Neither was
# tuned on a GPU yet.
GROUP, IN_FLIGHT = tl.constexpr(16), 64

SHORTEST = 64  # keys that are worth a program of their own


def keys_per_split(tile: Tile, tiles: int, n_keys: int, n_multiprocessors: int) -> int:
    """The most keys, the tile's or those halved again and again, whose programs are as many as the multiprocessors; if none
    are, the fewest. Decided without a look at the device, and by few powers of two, as each is a kernel of its own.

    Args: tiles of rows, all that read other keys or hold other rows; n_keys that there are at most for each.
    """
    split = tile.SPLIT
    while split > max(SHORTEST, tile.BLOCK_N) and tiles * cdiv(n_keys, split) < n_multiprocessors:
        split //= 2
    return split


# Weights times v_scale are multiplied in fp16, which has no small numbers: a program computes them in a unit of its own, a
# power of two with which they are below 2^(HEADROOM + 1). It follows from the exponent, as fp32 stores it, of the largest
# scale so far, no less than FIRST, so that both the unit and its inverse are fp32's.
HEADROOM, FIRST = tl.constexpr(12), tl.constexpr(13)


@triton.jit
def _exponents(scales):
    """Of fp32 numbers, as stored; the largest finite one for infinity and NaN."""
    return tl.minimum(scales.to(tl.int32, bitcast=True) >> 23 & 0xFF, 254)


@triton.jit
def _power_of_two(exponent):
    """2^(exponent - 127) in fp32; 0 if exponent <= 0."""
    return (tl.maximum(exponent, 0) << 23).to(tl.float32, bitcast=True)


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


@triton.jit
def _rotated(x, rows, cos_ptr, sin_ptr, pairs, end, FIRST_D: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rows x (M, BLOCK_D), dimensions FIRST_D and on of those at the pointers `rows` (M,), rotated as by
    `rope_kv_cache_update`: in fp32, each operation rounded for itself, which takes a kernel without floating-point fusion, and
    rounded to x's dtype.

    cos_ptr, sin_ptr: the position's rows; pairs: numbers in each; end: of what is rotated, 2 * pairs, or 0 for nothing.
    """
    offs_d = FIRST_D + tl.arange(0, BLOCK_D)
    if INTERLEAVED:
        is_first = offs_d % 2 == 0
        partner = tl.where(is_first, offs_d + 1, offs_d - 1)
        pair = offs_d // 2
    else:
        is_first = offs_d < pairs
        partner = tl.where(is_first, offs_d + pairs, offs_d - pairs)
        pair = tl.where(is_first, offs_d, offs_d - pairs)
    mask = offs_d < end
    cosine = tl.load(cos_ptr + pair, mask=mask, other=1.0)
    sine = tl.load(sin_ptr + pair, mask=mask, other=0.0)
    other = tl.load(rows[:, None] + partner[None, :], mask=mask[None, :], other=0.0)
    turned = rotated(x, other, cosine[None, :], sine[None, :], is_first[None, :])
    return tl.where(mask[None, :], turned, x)


@triton.jit
def _is_last(counter_ptr, expected):
    """Whether this is the last of `expected` programs to come here; it then sees what each of them stored before.

    The counter is zero at first, and again afterwards, for the next launch.
    """
    tl.debug_barrier()  # the stores of all threads come before the atomic operation of one, which releases them
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    tl.debug_barrier()  # and their loads after it
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _store_part(softmax_ptr, acc_ptr, parts, acc, row_sum, row_max, stored, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr):
    """What each row's keys so far leave, to its part: parts (M,), of all."""
    offs_d = tl.arange(0, BLOCK_V)
    tl.store(softmax_ptr + 2 * parts, row_max, mask=stored)
    tl.store(softmax_ptr + 2 * parts + 1, row_sum, mask=stored)
    mask = stored[:, None] & (offs_d[None, :] < V_DIM)
    tl.store(acc_ptr + parts[:, None] * V_DIM + offs_d[None, :], acc, mask=mask)


@triton.jit
def _add_parts(
    softmax_ptr, acc_ptr, parts, count, stored,
    V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The sums (acc, row_sum, row_max) of the `count` parts from `parts` (M,) on, added in their order."""
    offs_d = tl.arange(0, BLOCK_V)
    maxima = tl.full([BLOCK_M, GROUP], float("-inf"), tl.float32)  # reduced in the loop, Triton 3.6 does not compile them
    for start in range(0, count, GROUP):
        offs_s = start + tl.arange(0, GROUP)
        mask = stored[:, None] & (offs_s < count)[None, :]
        ptrs = softmax_ptr + 2 * (parts[:, None] + offs_s[None, :])
        maxima = tl.maximum(maxima, tl.load(ptrs, mask=mask, other=float("-inf"), cache_modifier=".cg"))
    row_max = tl.max(maxima, 1)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)  # as in online_softmax

    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, count, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            part = parts + start + i
            row_mask = stored & (start + i + tl.zeros([BLOCK_M], tl.int32) < count)
            maximum = tl.load(softmax_ptr + 2 * part, mask=row_mask, other=float("-inf"), cache_modifier=".cg")
            sums = tl.load(softmax_ptr + 2 * part + 1, mask=row_mask, other=0.0, cache_modifier=".cg")
            mask = row_mask[:, None] & (offs_d[None, :] < V_DIM)
            x = tl.load(acc_ptr + part[:, None] * V_DIM + offs_d[None, :], mask=mask, other=0.0, cache_modifier=".cg")
            weight = tl.exp2((maximum - shift) * LOG2_E)
            row_sum += weight * sums
            acc += weight[:, None] * x
    return acc, row_sum, row_max


@triton.jit
def _finish(
    out_rows, lse_rows, acc, row_sum, row_max, sinks_ptr, heads, stored, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Stores rows of out and lse, at the pointers (M,), from the sums over all their keys."""
    out, lse = finish_softmax(acc, row_sum, row_max, sinks_ptr, heads)
    tl.store(lse_rows, lse, mask=stored)
    offs_d = tl.arange(0, BLOCK_V)
    mask = stored[:, None] & (offs_d[None, :] < V_DIM)
    tl.store(out_rows[:, None] + offs_d[None, :], out.to(out_rows.dtype.element_ty), mask=mask)


# Numbers that vary between calls must not compile a kernel again. What specialising would gain, the divisibility of
# strides, the launcher guarantees and the kernel states.
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
def _attend_split(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, acc_ptr, softmax_ptr, counters_ptr,
    kv_lengths_ptr, block_table_ptr, k_scale_ptr, v_scale_ptr, alibi_ptr, sinks_ptr, mask_ptr, bias_ptr,
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

    Strides are in elements; q's, k's and v's last is 1. With a block table, stride_kb and the like are those of a page.
    q and k have HEAD_DIM numbers a row, those past BLOCK_D in a tile of BLOCK_R, if it is not 0; v and out V_DIM.
    out is (B, T, H, V_DIM), lse (B, H, T), acc (B, H, T, n_parts, V_DIM), softmax (B, H, T, n_parts, 2), m and l, counters
    (B * H_kv * tiles, n_groups + 1), zeros: contiguous. n_groups = cdiv(n_splits, GROUP), n_parts = n_splits + n_groups:
    after the parts of splits, those of groups of splits. Where there is one split, acc, softmax and counters are None.

    With new_k and new_v (B, H_kv, 1, ...), a token of each sequence joins the cache in slot slots[b], if it has one, and counts
    as key there: all programs know it from new_k and new_v, and one of each head stores it, so none waits for another. With
    cos, q and new_k are rotated by positions[b] first. Optional tensors and numbers are None where they do not apply.

    Row r of rows_of_head = group * n_queries is head h_kv * group + r // n_queries, token r % n_queries.
    """
    let_next_start(PDL)
    wait_for_previous(PDL)
    n_tiles = tl.cdiv(rows_of_head, BLOCK_M)
    pid = tl.program_id(0)
    tile = pid % n_tiles  # tiles that read the same keys run side by side
    split = pid // n_tiles % n_splits
    head_kv = pid // n_tiles // n_splits  # of all B * H_kv
    n_heads_kv = n_heads // group
    b = tl.cast(head_kv // n_heads_kv, tl.int64)
    h_kv = tl.cast(head_kv % n_heads_kv, tl.int64)

    begin, end = _reach(kv_lengths_ptr, b, n_keys, n_queries, window)
    n_written = tl.maximum(tl.cdiv(end, SPLIT) - begin // SPLIT, 1)  # splits of this sequence; without a key still the first
    if acc_ptr is not None:
        if split >= n_written:
            return
    start_split = (begin // SPLIT + split) * SPLIT

    offs_r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_r, rows_of_head - 1)  # past the last row, the last row again, which is not stored
    heads = h_kv * group + rows // n_queries
    tokens = rows % n_queries
    own = tokens + end - n_queries  # a query's position among the keys
    slopes = tl.load(alibi_ptr + heads) if alibi_ptr is not None else None
    stored = offs_r < rows_of_head

    q_ptr = tl.multiple_of(q_ptr + b * stride_qb, 16)
    k_ptr = tl.multiple_of(k_ptr + h_kv * stride_kh, 16)
    v_ptr = tl.multiple_of(v_ptr + h_kv * stride_vh, 16)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    q = load_keys(q_ptr, stride_qh, stride_qm, heads, tokens, True, HEAD_DIM, BLOCK_D, MASK_ROWS=False)
    if BLOCK_R > 0:
        q_rest = load_keys(
            q_ptr + BLOCK_D, stride_qh, stride_qm, heads, tokens, True, HEAD_DIM - BLOCK_D, BLOCK_R, MASK_ROWS=False
        )
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    EXACT: tl.constexpr = dtype == tl.float32
    HAS_UNIT: tl.constexpr = v_scale_ptr is not None and dtype == tl.float16
    if HAS_UNIT:
        exponent = tl.full([], FIRST, tl.int32)

    slot = -1  # a key that is not read
    if new_k_ptr is not None:
        offs_d, offs_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        k_row = new_k_ptr + b * stride_nkb + h_kv * stride_nkh
        new_k = tl.load(k_row + offs_d, mask=offs_d < HEAD_DIM, other=0.0)
        if BLOCK_R > 0:
            offs_r = BLOCK_D + tl.arange(0, BLOCK_R)
            new_k_rest = tl.load(k_row + offs_r, mask=offs_r < HEAD_DIM, other=0.0)
        new_v = tl.load(new_v_ptr + b * stride_nvb + h_kv * stride_nvh + offs_v, mask=offs_v < V_DIM, other=0.0)
        wanted = tl.load(slots_ptr + b * stride_sb).to(tl.int64)
        joins = (wanted >= 0) & (wanted < n_keys)
        if cos_ptr is not None:
            position = tl.load(positions_ptr + b * stride_pb).to(tl.int64)
            joins = joins & (position < n_angles)
            end_rotary = tl.where((position >= 0) & (position < n_angles), 2 * pairs, 0)
            cos_row = cos_ptr + position * stride_cos
            sin_row = sin_ptr + position * stride_sin
            q_rows = q_ptr + heads * stride_qh + tokens * tl.cast(stride_qm, tl.int64)
            q = _rotated(q, q_rows, cos_row, sin_row, pairs, end_rotary, 0, BLOCK_D, INTERLEAVED)
            k_rows = k_row + tl.zeros([1], tl.int64)
            new_k = _rotated(
                new_k[None, :], k_rows, cos_row, sin_row, pairs, end_rotary, 0, BLOCK_D, INTERLEAVED
            ).reshape([BLOCK_D])  # fmt: skip
            if BLOCK_R > 0:
                q_rest = _rotated(q_rest, q_rows, cos_row, sin_row, pairs, end_rotary, BLOCK_D, BLOCK_R, INTERLEAVED)
                new_k_rest = _rotated(
                    new_k_rest[None, :], k_rows, cos_row, sin_row, pairs, end_rotary, BLOCK_D, BLOCK_R, INTERLEAVED
                ).reshape([BLOCK_R])  # fmt: skip
        slot = tl.where(joins, wanted, 0).to(tl.int32)
        slot_page = b
        slot_row = slot.to(tl.int64)
        if block_table_ptr is not None:
            entry = block_table_ptr + (b * stride_tb + slot // page * tl.cast(stride_tp, tl.int64))
            slot_page = tl.load(entry, mask=joins, other=-1).to(tl.int64)
            joins = joins & (slot_page >= 0) & (slot_page < n_pages)
            slot_row = slot_row % page
        slot = tl.where(joins, slot, -1)
        is_own = (slot >= tl.maximum(begin, start_split)) & (slot < tl.minimum(end, start_split + SPLIT))
        stores = joins & (split == 0) & (tile == 0)
        end_k = tl.where(stores, HEAD_DIM, 0)
        end_v = tl.where(stores, V_DIM, 0)

        new_k_scale = 1.0
        new_v_scale = 1.0
        if k_scale_ptr is not None:
            largest = largest_of(new_k, KEEP=False)
            if BLOCK_R > 0:
                largest = tl.maximum(largest, largest_of(new_k_rest, KEEP=False))
                new_k_rest, _ = quantised(new_k_rest, largest, k_ptr.dtype.element_ty)
            new_k, new_k_scale = quantised(new_k, largest, k_ptr.dtype.element_ty)
            new_v, new_v_scale = quantised(new_v, largest_of(new_v, KEEP=False), v_ptr.dtype.element_ty)
            offset = slot_page * stride_ksb + h_kv * stride_ksh + slot_row * stride_ksn
            tl.store(k_scale_ptr + offset, new_k_scale, mask=stores)
            offset = slot_page * stride_vsb + h_kv * stride_vsh + slot_row * stride_vsn
            tl.store(v_scale_ptr + offset, new_v_scale, mask=stores)
        k_slot = k_ptr + slot_page * stride_kb + slot_row * stride_kn
        tl.store(k_slot + offs_d, new_k, mask=offs_d < end_k)
        if BLOCK_R > 0:
            tl.store(k_slot + offs_r, new_k_rest, mask=offs_r < end_k)
        tl.store(v_ptr + slot_page * stride_vb + slot_row * stride_vn + offs_v, new_v, mask=offs_v < end_v)

        # The softmax begins with this key, as it reads back, if it is one of this split.
        new_k = from_8_bits(new_k, dtype).to(tl.float32)
        new_v = tl.where(is_own, from_8_bits(new_v, dtype).to(tl.float32), 0.0)
        product = tl.sum(q.to(tl.float32) * new_k[None, :], 1)
        if BLOCK_R > 0:
            product += tl.sum(q_rest.to(tl.float32) * from_8_bits(new_k_rest, dtype).to(tl.float32)[None, :], 1)
        score = modified_scores(
            product[:, None] * new_k_scale, scale, softcap, slopes, own, slot + tl.zeros([1], tl.int32), None,
            HAS_SOFTCAP=softcap is not None, HAS_ALIBI=alibi_ptr is not None, HAS_BIAS=False,
        )  # fmt: skip
        score = tl.where(is_own, score, float("-inf"))
        weight, _, row_sum, row_max = online_softmax(score, row_sum, row_max, LOG2_E, EXACT=EXACT)
        if v_scale_ptr is not None:
            factor = tl.where(is_own, new_v_scale, 0.0)
            if HAS_UNIT:
                exponent = tl.maximum(exponent, _exponents(factor))
                factor *= _power_of_two(254 + HEADROOM - exponent)
            weight *= factor
        acc = weight.to(dtype).to(tl.float32) * new_v[None, :]

    if mask_ptr is not None:
        mask_rows = score_rows(mask_ptr + b * stride_mask_b, heads[:, None], stride_mask_h, MASK_UNIT)
        mask_rows = score_rows(mask_rows, tokens[:, None], stride_mask_m, MASK_UNIT)
    if bias_ptr is not None:
        bias_rows = score_rows(bias_ptr + b * stride_bias_b, heads[:, None], stride_bias_h, BIAS_UNIT)
        bias_rows = score_rows(bias_rows, tokens[:, None], stride_bias_m, BIAS_UNIT)
    start_loop = tl.maximum(start_split, begin // BLOCK_N * BLOCK_N)
    if block_table_ptr is not None:  # looked up a step ahead: pipelined as what depends on it, it would take that one's stages
        block_table_ptr += b * stride_tb
        next_pages = pages_of(block_table_ptr, stride_tp, start_loop + tl.arange(0, BLOCK_N), end, page, n_pages)
    for start_n in range(start_loop, tl.minimum(start_split + SPLIT, end), BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        in_reach = (offs_n >= begin) & (offs_n < end)  # other keys are not read
        if new_k_ptr is not None:
            in_reach = in_reach & (offs_n != slot)
        pages, key_rows = b, offs_n
        if block_table_ptr is not None:
            pages, key_rows = next_pages.to(tl.int64), offs_n % page
            next_pages = pages_of(block_table_ptr, stride_tp, offs_n + BLOCK_N, end, page, n_pages)

        k = load_keys(k_ptr, stride_kb, stride_kn, pages, key_rows, in_reach, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
        qk = tl.dot(q, from_8_bits(k, dtype).T, input_precision="ieee")  # (BLOCK_M, BLOCK_N) fp32
        if BLOCK_R > 0:
            k_rest = load_keys(
                k_ptr + BLOCK_D, stride_kb, stride_kn, pages, key_rows, in_reach, HEAD_DIM - BLOCK_D, BLOCK_R, MASK_ROWS=True
            )
            qk = tl.dot(q_rest, from_8_bits(k_rest, dtype).T, qk, input_precision="ieee")
        if k_scale_ptr is not None:
            offsets = pages * stride_ksb + h_kv * stride_ksh + key_rows * tl.cast(stride_ksn, tl.int64)
            qk *= tl.load(k_scale_ptr + offsets, mask=in_reach, other=0.0)[None, :]
        bias = 0.0
        if bias_ptr is not None:
            bias = load_scores(bias_rows, offs_n[None, :], stride_bias_n, True, n_keys, BIAS_UNIT, WHOLE=False)
            bias = bias.to(tl.float32)
        scores = modified_scores(
            qk, scale, softcap, slopes, own, offs_n, bias,
            HAS_SOFTCAP=softcap is not None, HAS_ALIBI=alibi_ptr is not None, HAS_BIAS=bias_ptr is not None,
        )  # fmt: skip
        visible = visible_keys(own[:, None], offs_n[None, :], end, window, IS_CAUSAL, HAS_WINDOW=window is not None)
        if new_k_ptr is not None:
            visible = visible & (offs_n != slot)[None, :]
        if mask_ptr is not None:
            kept = load_scores(mask_rows, offs_n[None, :], stride_mask_n, True, n_keys, MASK_UNIT, WHOLE=False)
            visible = visible & (kept != 0)
        scores = tl.where(visible, scores, float("-inf"))

        p, rescale, row_sum, row_max = online_softmax(scores, row_sum, row_max, LOG2_E, EXACT=EXACT)
        if v_scale_ptr is not None:
            offsets = pages * stride_vsb + h_kv * stride_vsh + key_rows * tl.cast(stride_vsn, tl.int64)
            factors = tl.load(v_scale_ptr + offsets, mask=in_reach, other=0.0)
            if HAS_UNIT:
                last = exponent
                exponent = tl.maximum(exponent, tl.max(_exponents(factors), 0))
                factors *= _power_of_two(254 + HEADROOM - exponent)
                rescale *= _power_of_two(127 + last - exponent)
            p *= factors[None, :]
        v = load_keys(v_ptr, stride_vb, stride_vn, pages, key_rows, in_reach, V_DIM, BLOCK_V, MASK_ROWS=True)
        acc = tl.dot(p.to(dtype), values_from_8_bits(v, dtype), acc * rescale[:, None], input_precision="ieee")

    if HAS_UNIT:
        acc *= _power_of_two(exponent - HEADROOM)
    if not EXACT:  # see online_softmax
        row_max *= LN_2

    first_row = (b * n_heads + h_kv * group) * n_queries  # of all B * H * T
    lse_rows = lse_ptr + (first_row + rows)
    out_rows = out_ptr + ((b * n_queries + tokens) * n_heads + heads) * V_DIM
    if acc_ptr is None:
        _finish(out_rows, lse_rows, acc, row_sum, row_max, sinks_ptr, heads, stored, V_DIM, BLOCK_V)
    elif n_written == 1:
        _finish(out_rows, lse_rows, acc, row_sum, row_max, sinks_ptr, heads, stored, V_DIM, BLOCK_V)
    else:
        n_groups = tl.cdiv(n_splits, GROUP)
        parts = (first_row + rows) * (n_splits + n_groups)
        counters_ptr += (tl.cast(head_kv, tl.int64) * n_tiles + tile) * (n_groups + 1)
        of_group = split // GROUP
        n_parts = tl.minimum(n_written - of_group * GROUP, GROUP)
        _store_part(softmax_ptr, acc_ptr, parts + split, acc, row_sum, row_max, stored, V_DIM, BLOCK_V)
        if _is_last(counters_ptr + 1 + of_group, n_parts):
            first = parts + of_group * GROUP
            acc, row_sum, row_max = _add_parts(softmax_ptr, acc_ptr, first, n_parts, stored, V_DIM, BLOCK_M, BLOCK_V, AT_ONCE)
            is_last = n_written <= GROUP
            if n_written > GROUP:
                sums = parts + n_splits  # of groups
                _store_part(softmax_ptr, acc_ptr, sums + of_group, acc, row_sum, row_max, stored, V_DIM, BLOCK_V)
                n_sums = tl.cdiv(n_written, GROUP)
                is_last = _is_last(counters_ptr, n_sums)
                if is_last:
                    acc, row_sum, row_max = _add_parts(
                        softmax_ptr, acc_ptr, sums, n_sums, stored, V_DIM, BLOCK_M, BLOCK_V, AT_ONCE
                    )
            if is_last:
                _finish(out_rows, lse_rows, acc, row_sum, row_max, sinks_ptr, heads, stored, V_DIM, BLOCK_V)


INTERPRETED = not isinstance(_attend_split, triton.JITFunction)  # TRITON_INTERPRET was set


class New(NamedTuple):
    """A token of each sequence that joins the cache, as `attention_with_kv_cache` takes it; with 8-bit k and v their scales
    are written, too."""

    k: Tensor  # (B, H_kv, 1, D) in q's dtype, last dimension contiguous
    v: Tensor
    slots: Tensor  # (B, 1) int32|int64
    positions: Tensor | None = None  # (B, 1) int32|int64, with cos and sin
    cos: Tensor | None = None  # (positions, R/2) fp32, rows contiguous
    sin: Tensor | None = None
    interleaved: bool = False


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor,
    *, causal: bool, scale: float, window: int | None = None, softcap: float | None = None,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, kv_lengths: Tensor | None = None,
    block_table: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    mask: Tensor | None = None, bias: Tensor | None = None,
    new: New | None = None, counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the kernel; no host sync. What it computes, see `attention`, and with a new token `attention_with_kv_cache`.

    Args:
        q: (B, H, T, D) fp16|bf16|fp32, last dimension contiguous, other strides free, D <= 576; meant for T <= 16.
        k, v: (B, H_kv, S, D), or with block_table a pool (num_pages, H_kv, page, D), likewise; in q's dtype, or int8 or
            float8_e4m3fn with scales. H_kv divides H. v may have a head dim D_v of its own, up to 576, in fp32 512. Where rows
            do not start and end at multiples of 16 bytes (D times the size of an element is not one), all of k and v is copied.
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
        mask: bool, broadcastable to (B, H, T, S); where it is False, a query does not see a key.
        bias: fp16|bf16|fp32, likewise, added to the scores; -inf hides a key.
        new: a token of each sequence that joins the cache, if T = 1, without mask and bias. k's and v's rows then start and end
            at multiples of 16 bytes (`has_aligned_rows`).
        counters: int32 zeros, which are zero again afterwards; no call may use them at the same time. Where there are too few
            or none, and keys are split, zeros are made, which is another launch.

    Returns:
        out (B, H, T, D_v) in q's dtype, contiguous as (B, T, H, D_v), and lse (B, H, T) fp32, natural log.
        A row that sees no key gets zeros and -inf.
    """
    B, H, T, D = q.shape
    n_pages, H_kv, page = k.shape[:3]
    D_v = v.shape[3]
    S = page if block_table is None else page * block_table.shape[1]
    check_sizes(q=q, k=k)
    check_count("q", "queries of heads that share keys", H // H_kv * T)
    check_count("block_table", "keys in a sequence's pages", S)
    if INTERPRETED and q.dtype is torch.bfloat16 and new is None:  # there, tl.dot reads bf16 as integers (Triton 3.6 to 3.9)
        options = dict(
            causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            kv_lengths=kv_lengths, block_table=block_table, k_scale=k_scale, v_scale=v_scale, mask=mask, bias=bias,
        )  # fmt: skip
        k, v = (x.float() if x.dtype is torch.bfloat16 else x for x in (k, v))
        out, lse = attention_decode(q.float(), k, v, **options)
        return out.bfloat16(), lse

    out = q.new_empty_strided((B, H, T, D_v), (T * H * D_v, D_v, H * D_v, 1))
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if k.dtype is torch.float8_e4m3fn:  # which the kernel decodes itself: not every architecture can
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    q = aligned_rows(q)
    if new is None:
        k, v = aligned_rows(k), aligned_rows(v)
    kv_lengths, alibi_slopes, sinks = (x if x is None else x.contiguous() for x in (kv_lengths, alibi_slopes, sinks))
    window = None if window is None else min(window, S)
    scale, softcap = float(scale), None if softcap is None else float(softcap)

    has_scores = mask is not None or bias is not None
    few = H // H_kv * T <= FEW
    tile, constants = _constants(D, D_v, q.element_size(), k_scale is not None, few, new is not None, has_scores)
    n_tiles = cdiv(H // H_kv * T, tile.BLOCK_M)
    in_reach = S if window is None else min(S, T + window - 1)  # all queries together see no more, wherever these begin
    split = keys_per_split(tile, B * H_kv * n_tiles, in_reach, multiprocessors(q.device))
    n_splits = max(1, cdiv(S, split))
    if window is not None:
        n_splits = min(n_splits, (in_reach - 2) // split + 2)
    acc = softmax = None
    if n_splits > 1:
        n_groups = cdiv(n_splits, GROUP.value)
        acc = q.new_empty((B, H, T, n_splits + n_groups, D_v), dtype=torch.float32)
        softmax = q.new_empty((B, H, T, n_splits + n_groups, 2), dtype=torch.float32)
        needed = B * H_kv * n_tiles * (n_groups + 1)
        if counters is None or counters.numel() < needed:
            counters = torch.zeros(needed, dtype=torch.int32, device=q.device)
    else:
        counters = None
    mask = None if mask is None else mask.expand(B, H, T, S).view(torch.uint8)
    bias = None if bias is None else bias.expand(B, H, T, S)
    x = New(None, None, None) if new is None else new
    n_angles, pairs = (0, 0) if x.cos is None else x.cos.shape

    with torch.cuda.device_of(q):
        _attend_split[grid("q", n_tiles, n_splits, B, H_kv)](
            q, k, v, out, lse, acc, softmax, counters,
            kv_lengths, block_table, k_scale, v_scale, alibi_slopes, sinks, mask, bias,
            x.k, x.v, x.slots, x.positions, x.cos, x.sin,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *((0, 0, 0) if k_scale is None else k_scale.stride()),
            *((0, 0, 0) if v_scale is None else v_scale.stride()),
            *((0, 0) if block_table is None else block_table.stride()),
            *((0, 0, 0, 0) if mask is None else mask.stride()),
            *((0, 0, 0, 0) if bias is None else bias.stride()),
            *((0, 0, 0, 0, 0) if new is None else (*x.k.stride()[:2], *x.v.stride()[:2], x.slots.stride(0))),
            *((0, 0, 0) if x.cos is None else (x.positions.stride(0), x.cos.stride(0), x.sin.stride(0))),
            H, H // H_kv, H // H_kv * T, T, S, n_splits, page, n_pages, n_angles, pairs, scale, softcap, window,
            SPLIT=split, IS_CAUSAL=causal, INTERLEAVED=x.interleaved, MASK_UNIT=unit_of(mask), BIAS_UNIT=unit_of(bias),
            **constants, **dependent_launch(has_dependent_launch(q.device)),
        )  # fmt: skip
    return out, lse


@functools.cache
def _constants(
    head_dim: int, v_dim: int, element_size: int, is_8_bits: bool, few: bool, is_new: bool, has_scores: bool
) -> tuple[Tile, dict]:
    """The tile, and the compile-time arguments and options of `_attend_split` that follow from shapes and dtypes, but SPLIT."""
    block_d, block_r = head_blocks(head_dim)
    block_v = padded_dim(v_dim)
    tile = TILES[tile_key(head_dim, v_dim, element_size)][few]
    if is_8_bits and element_size == 4:  # pipelined, Triton 3.9 decodes a key once per row, in too many registers; 32 keys too
        tile = tile._replace(BLOCK_N=16, num_stages=1)
    elif is_8_bits and is_new:  # whose token takes registers, too
        tile = tile._replace(maxnreg=255) if few else tile._replace(BLOCK_N=32, num_warps=8)
    elif has_scores and not few:  # a mask and a bias of many rows, which are copied ahead, too, take shared memory
        tile = tile._replace(BLOCK_N=min(tile.BLOCK_N, 32))
    in_flight = IN_FLIGHT if few and tile.maxnreg == 255 else IN_FLIGHT // 2
    at_once = max(1, min(8, in_flight * 32 * tile.num_warps // (tile.BLOCK_M * block_v)))
    options = tile._asdict()
    del options["SPLIT"]
    return tile, dict(
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_R=block_r, V_DIM=v_dim, BLOCK_V=block_v, AT_ONCE=at_once, **options,
        enable_fp_fusion=not is_new,
    )  # fmt: skip


# What a call may bring along, by the kernel's argument that is None without it, and what tells that keys are split.
FEATURES = ("kv_lengths_ptr", "block_table_ptr", "alibi_ptr", "softcap", "window")
PARTS = ("acc_ptr", "softmax_ptr", "counters_ptr")
NEW = ("kv_lengths_ptr", "new_k_ptr", "new_v_ptr", "slots_ptr")
ROTATION = ("positions_ptr", "cos_ptr", "sin_ptr")


def aot_configurations(arch: int):
    """As in attention_forward.py; the same for every architecture but for dependent launches.

    Of each tile there are the kernels without features, with all, and those in between that serving a model needs. Of
    the head dims that share a tile there are two: one that fills it and one that does not.
    """
    for dtype, few in itertools.product((torch.float16, torch.bfloat16, torch.float32), (False, True)):
        for head_dim, v_dim in head_dims(TILES, dtype.itemsize):
            for cache_dtype, given in (
                (dtype, ()),
                (dtype, (*PARTS, "kv_lengths_ptr")),
                (dtype, (*PARTS, "kv_lengths_ptr", "block_table_ptr")),
                (dtype, (*PARTS, "mask_ptr", "bias_ptr")),
                (torch.int8, (*PARTS, "kv_lengths_ptr")),
                (torch.float8_e4m3fn, (*PARTS, "kv_lengths_ptr")),
                (torch.int8, (*PARTS, *FEATURES)),
                (torch.float8_e4m3fn, (*PARTS, *FEATURES, "sinks_ptr")),
                (dtype, (*PARTS, *NEW)),
                (dtype, (*PARTS, *NEW, *ROTATION)),
                (dtype, (*PARTS, *NEW, *ROTATION, "block_table_ptr")),
                (torch.int8, (*PARTS, *NEW, *ROTATION)),
                (torch.float8_e4m3fn, (*PARTS, *NEW, *ROTATION)),
                (torch.int8, (*PARTS, *NEW, *ROTATION, *FEATURES)),
                (torch.float8_e4m3fn, (*PARTS, *NEW, *ROTATION, *FEATURES, "sinks_ptr")),
            ):
                tile, constants = _constants(
                    head_dim, v_dim, dtype.itemsize, cache_dtype != dtype, few, "new_k_ptr" in given, "mask_ptr" in given
                )  # fmt: skip
                scales = () if cache_dtype == dtype else ("k_scale_ptr", "v_scale_ptr")
                constants = constants | {"SPLIT": tile.SPLIT, "IS_CAUSAL": True, "INTERLEAVED": False} | units_of(given, dtype)
                constants |= dependent_launch(arch >= 90)
                yield _attend_split, dtype, cache_dtype, constants, (*given, *scales)
