"""Appending a token to the cache in the launch that attends to it: it is rotated, stored, and starts the softmax; see
attention_decode.py."""

from typing import NamedTuple

import triton
import triton.language as tl

from fastgpt.kernels.attention_rows import from_8_bits
from fastgpt.kernels.attention_scores import HEADROOM, LOG2_E, exponents_of, modified_scores, online_softmax, power_of_two
from fastgpt.kernels.kv_cache_update import largest_of, quantized, rotated


class Rotation(NamedTuple):
    """The rotation at one position."""

    cos_ptr: tl.tensor  # the position's row, fp32
    sin_ptr: tl.tensor
    pairs: tl.tensor  # elements of each row
    end: tl.tensor  # of the rotated dimensions: 2 * pairs, or 0 for a position without a row
    joins: tl.tensor  # whether a token at this position is appended


@triton.jit
def rotated_rows(x, rows, rotation, FIRST_D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """x (M, N), the dimensions from FIRST_D on of the rows at the pointers `rows` (M,), rotated as by `rope_kv_cache_update`: in
    fp32 without fused multiply-adds (enable_fp_fusion=False), then rounded to x's dtype."""
    offs_d = FIRST_D + tl.arange(0, x.shape[1])
    if INTERLEAVED:
        is_first = offs_d % 2 == 0
        partner = tl.where(is_first, offs_d + 1, offs_d - 1)
        pair = offs_d // 2
    else:
        is_first = offs_d < rotation.pairs
        partner = tl.where(is_first, offs_d + rotation.pairs, offs_d - rotation.pairs)
        pair = tl.where(is_first, offs_d, offs_d - rotation.pairs)
    mask = offs_d < rotation.end
    cosine = tl.load(rotation.cos_ptr + pair, mask=mask, other=1.0)
    sine = tl.load(rotation.sin_ptr + pair, mask=mask, other=0.0)
    other = tl.load(rows[:, None] + partner[None, :], mask=mask[None, :], other=0.0)
    rotated_x = rotated(x, other, cosine[None, :], sine[None, :], is_first[None, :])
    return tl.where(mask[None, :], rotated_x, x)


@triton.jit
def _new_row(row_ptr, rotation, DIM: tl.constexpr, FIRST_D: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The dimensions from FIRST_D on (BLOCK_D,) of a new key of DIM elements, rotated unless rotation is None."""
    offs_d = FIRST_D + tl.arange(0, BLOCK_D)
    x = tl.load(row_ptr + offs_d, mask=offs_d < DIM, other=0.0)
    if rotation is not None:
        x = rotated_rows(x[None, :], row_ptr + tl.zeros([1], tl.int64), rotation, FIRST_D, INTERLEAVED).reshape([BLOCK_D])
    return x


@triton.jit
def _slot_of(wanted, rotation, kv, b, n_keys):
    """Where to store a token for slot `wanted`: (whether it is stored, its slot or -1, page or sequence, row there)."""
    joins = (wanted >= 0) & (wanted < n_keys)
    if rotation is not None:
        joins = joins & rotation.joins
    slot = tl.where(joins, wanted, 0).to(tl.int32)
    page = b
    row = slot.to(tl.int64)
    if kv.block_table_ptr is not None:
        entry = kv.block_table_ptr + slot // kv.page * tl.cast(kv.stride_tp, tl.int64)
        page = tl.load(entry, mask=joins, other=-1).to(tl.int64)
        joins = joins & (page >= 0) & (page < kv.n_pages)
        row = row % kv.page
    return joins, tl.where(joins, slot, -1), page, row


@triton.jit
def append_token(
    acc, row_sum, row_max, exponent, q, q_rest, k_row, v_row, wanted, rotation, kv, features, b, q_pos, begin, stop, writes,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Stores a token's key and value if this program `writes`, and starts the softmax with it if its slot is among this
    program's keys, begin..stop-1. Returns (acc, row_sum, row_max, exponent, slot); slot is -1 if the token is not stored.

    Args: q and q_rest (M, ...), or None, rotated; k_row, v_row: pointers to the key and value; wanted: the slot, valid or not;
        rotation: `Rotation`, or None; kv and features: `KeysValues` of sequence b, and `Features`; q_pos (M,): each query's
        position among the keys.
    """
    dtype: tl.constexpr = q.dtype
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_V: tl.constexpr = acc.shape[1]
    offs_d, offs_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    k = _new_row(k_row, rotation, HEAD_DIM, 0, BLOCK_D, INTERLEAVED)
    if q_rest is not None:
        offs_rest = BLOCK_D + tl.arange(0, q_rest.shape[1])
        k_rest = _new_row(k_row, rotation, HEAD_DIM, BLOCK_D, q_rest.shape[1], INTERLEAVED)
    v = tl.load(v_row + offs_v, mask=offs_v < V_DIM, other=0.0)
    joins, slot, page, row = _slot_of(wanted, rotation, kv, b, features.n_keys)
    in_split = (slot >= begin) & (slot < stop)
    stores = joins & writes
    end_k = tl.where(stores, HEAD_DIM, 0)
    end_v = tl.where(stores, V_DIM, 0)

    k_scale = 1.0
    v_scale = 1.0
    if kv.k_scale_ptr is not None:
        largest = largest_of(k, KEEP=False)
        if q_rest is not None:
            largest = tl.maximum(largest, largest_of(k_rest, KEEP=False))
            k_rest, _ = quantized(k_rest, largest, kv.k_ptr.dtype.element_ty)
        k, k_scale = quantized(k, largest, kv.k_ptr.dtype.element_ty)
        v, v_scale = quantized(v, largest_of(v, KEEP=False), kv.v_ptr.dtype.element_ty)
        tl.store(kv.k_scale_ptr + (page * kv.stride_ksb + row * kv.stride_ksn), k_scale, mask=stores)
        tl.store(kv.v_scale_ptr + (page * kv.stride_vsb + row * kv.stride_vsn), v_scale, mask=stores)
    k_slot = kv.k_ptr + page * kv.stride_kb + row * kv.stride_kn
    tl.store(k_slot + offs_d, k, mask=offs_d < end_k)
    if q_rest is not None:
        tl.store(k_slot + offs_rest, k_rest, mask=offs_rest < end_k)
    tl.store(kv.v_ptr + page * kv.stride_vb + row * kv.stride_vn + offs_v, v, mask=offs_v < end_v)

    # As they would be read back from the cache.
    k = from_8_bits(k, dtype).to(tl.float32)
    v = tl.where(in_split, from_8_bits(v, dtype).to(tl.float32), 0.0)
    product = tl.sum(q.to(tl.float32) * k[None, :], 1)
    if q_rest is not None:
        product += tl.sum(q_rest.to(tl.float32) * from_8_bits(k_rest, dtype).to(tl.float32)[None, :], 1)
    score = modified_scores(
        product[:, None] * k_scale,
        features.scale,
        features.softcap,
        features.slope,
        q_pos,
        slot + tl.zeros([1], tl.int32),
        None,
    )
    score = tl.where(in_split, score, float("-inf"))
    weight, _, row_sum, row_max = online_softmax(score, row_sum, row_max, LOG2_E, EXACT=dtype == tl.float32)
    if kv.v_scale_ptr is not None:
        factor = tl.where(in_split, v_scale, 0.0)
        if dtype == tl.float16:
            exponent = tl.maximum(exponent, exponents_of(factor))
            factor *= power_of_two(254 + HEADROOM - exponent)
        weight *= factor
    return weight.to(dtype).to(tl.float32) * v[None, :], row_sum, row_max, exponent, slot
