"""What the attention kernels share: how a tile of keys is read, what becomes of its scores, which of them count.

Names: offs_m are tokens of the query, offs_n keys; own is a query's own position, token + L - T. exp(x) is
written 2^(x log2 e), the hardware's exponential.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def load_rows(ptr, stride, offs_row, n_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """A tile (rows, BLOCK_D), zero from n_rows on and past HEAD_DIM. Rows start and end at multiples of 16 bytes."""
    ALIGN: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth  # elements in 16 bytes
    offsets = offs_row * tl.multiple_of(tl.cast(stride, tl.int64), ALIGN)
    return _load_tile(ptr, offsets, offs_row < n_rows, HEAD_DIM, BLOCK_D, MASK_ROWS)


@triton.jit
def _load_tile(ptr, offsets, row_mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    ALIGN: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    ROW: tl.constexpr = (HEAD_DIM + ALIGN - 1) // ALIGN * ALIGN
    offs_d = tl.arange(0, BLOCK_D)
    mask = tl.full([1, 1], True, tl.int1)
    if MASK_ROWS:
        mask = mask & row_mask[:, None]
    if ROW < BLOCK_D:
        mask = mask & (offs_d[None, :] < ROW)
    return tl.load(ptr + offsets[:, None] + offs_d[None, :], mask=mask, other=0)


@triton.jit
def store_rows(ptr, stride, offs_row, n_rows, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores rows of x (rows, BLOCK_D) where offs_row < n_rows. `stride` is a multiple of HEAD_DIM, as of any dense tensor,
    and the first row starts at a multiple of that: which is what tells how wide stores can be."""
    WIDTH: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    POWER: tl.constexpr = HEAD_DIM & -HEAD_DIM  # of two that divides HEAD_DIM
    UNIT: tl.constexpr = POWER if POWER * WIDTH < 16 else 16 // WIDTH
    rows = tl.multiple_of(ptr + offs_row * tl.cast(stride, tl.int64), UNIT * WIDTH)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_row < n_rows)[:, None] & (offs_d[None, :] < HEAD_DIM)
    tl.store(rows[:, None] + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def tile_pointers(ptr, rows, cols, stride_row, stride_col):
    """Pointers to a tile, from its rows (M, 1) and columns (1, N), or transposed."""
    return ptr + rows * tl.cast(stride_row, tl.int64) + cols * tl.cast(stride_col, tl.int64)


@triton.jit
def page_rows(block_table_ptr, stride_tp, offs_n, end, page, n_pages):
    """Keys offs_n of a paged sequence: their pages, int64, and their rows in them. From `end` on anything valid."""
    entries = block_table_ptr + offs_n // page * tl.cast(stride_tp, tl.int64)
    pages = tl.load(entries, mask=offs_n < end, other=0)
    return tl.cast(tl.maximum(tl.minimum(pages, n_pages - 1), 0), tl.int64), offs_n % page


@triton.jit
def load_keys(
    ptr, stride_page, stride_row, pages, rows, end_mask, dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of keys or values (rows, BLOCK_D) in `dtype`: rows `rows` of pages `pages`. int8 and e4m3 (as uint8) are
    what their bits say, without their scale."""
    ALIGN: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    offsets = pages * tl.multiple_of(tl.cast(stride_page, tl.int64), ALIGN)
    offsets += rows * tl.multiple_of(tl.cast(stride_row, tl.int64), ALIGN)
    x = _load_tile(ptr, offsets, end_mask, HEAD_DIM, BLOCK_D, MASK_ROWS)
    return from_8_bits(x, dtype)


@triton.jit
def from_8_bits(x, dtype: tl.constexpr):
    if x.dtype == tl.uint8:
        # e4m3 to fp16: exponents differ by 8, which the multiplication adds, for subnormal numbers too.
        bits = x.to(tl.int16)
        magnitude = bits & 0x7F
        half = ((bits & 0x80) << 8 | magnitude << 7).to(tl.float16, bitcast=True) * 256.0
        x = tl.where(magnitude == 0x7F, float("nan"), half.to(tl.float32)).to(dtype)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """Within 2 units of the last place: a polynomial where exp would cancel (Cephes, tanhf.c)."""
    z = x * x
    y = -5.70498872745e-3 * z + 2.06390887954e-2
    y = y * z - 5.37397155531e-2
    y = y * z + 1.33314422036e-1
    y = y * z - 3.33332819422e-1
    small = y * z * x + x
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def modified_scores(
    qk, scale, softcap, slope, own, offs_n, bias,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Scores from q·k (M, N): scale, soft cap, ALiBi and bias, in this order. slope (M,) of each row's head."""
    x = qk * scale
    if HAS_SOFTCAP:
        x = softcap * tanh(x / softcap)
    if HAS_ALIBI:
        x -= slope[:, None] * tl.abs(own[:, None] - offs_n[None, :]).to(tl.float32)
    if HAS_BIAS:
        x = tl.where(bias == float("-inf"), float("-inf"), x + bias)  # also where x is infinite or NaN
    return x


@triton.jit
def visible_keys(own, offs_n, end, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Which keys before `end`, or all if it is None, the mask and the window leave to each query: own (M, 1), offs_n (1, N),
    or transposed."""
    visible = tl.full([1, 1], True, tl.int1)
    if end is not None:
        visible = visible & (offs_n < end)
    if IS_CAUSAL:
        visible = visible & (offs_n <= own)
    if HAS_WINDOW:
        visible = visible & (offs_n > own - window)
    return visible


@triton.jit
def key_ranges(
    past, n_rows, length, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """(begin, inner, outer, end): no query of a tile sees the keys before begin and from end on, and every one sees those
    from inner to outer. All but `end` are multiples of BLOCK_N; outer may be less than inner.

    past: keys before the one at the position of the tile's first query; n_rows: queries from that one on.
    """
    end = tl.minimum(past + tl.minimum(BLOCK_M, n_rows), length) if IS_CAUSAL else length
    outer = (tl.maximum(past + 1, 0) if IS_CAUSAL else length) // BLOCK_N * BLOCK_N
    begin = 0
    inner = 0
    if HAS_WINDOW:
        begin = tl.maximum(past + 1 - window, 0) // BLOCK_N * BLOCK_N
        inner = tl.cdiv(tl.maximum(past + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
    return begin, inner, outer, end


@triton.jit
def online_softmax(x, row_sum, row_max, factor, MASKED: tl.constexpr, EXACT: tl.constexpr):
    """Folds a tile of scores (M, N) into each row's maximum m and sum l of exp(score - m), (M,) each.

    `factor` makes scores in base 2 of x. MASKED: some of x may be -inf. EXACT, for weights in fp32, keeps row_max in the
    units of x and rounds after the subtraction, which itself rounds nothing where it matters; else row_max is in base 2,
    and the subtraction one with the scaling.
    Returns the weights exp(score - m), what to multiply with that was summed so far, l and m.
    """
    new_max = tl.maximum(row_max, tl.max(x, 1) if EXACT else tl.max(x, 1) * factor)
    # A row that has seen no key yet has maximum -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    if EXACT:
        p = tl.exp2((x - shift[:, None]) * factor)
        rescale = tl.exp2((row_max - shift) * factor)
    else:
        p = tl.exp2(x * factor - shift[:, None])
        rescale = tl.exp2(row_max - shift)
    return p, rescale, row_sum * rescale + tl.sum(p, 1), new_max


@triton.jit
def finish_softmax(acc, row_sum, row_max, sinks_ptr, heads):
    """Rows of (out, lse) in fp32 from the sums over all their keys: acc (M, BLOCK_D), the others (M,), row_max in base e."""
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + heads).to(tl.float32)
        blind = row_max == float("-inf")  # sees no key, so has no use for the sink either
        new_max = tl.where(blind, row_max, tl.maximum(row_max, sink))
        shift = tl.where(blind, 0.0, new_max)
        rescale = tl.exp2((row_max - shift) * LOG2_E)
        row_sum = row_sum * rescale + tl.where(blind, 0.0, tl.exp2((sink - shift) * LOG2_E))
        row_max = new_max
        acc *= rescale[:, None]
    fully_masked = row_sum == 0.0  # out is 0 then, though a value may be NaN, and lse -inf
    row_sum = tl.where(fully_masked, 1.0, row_sum)
    out = tl.where(fully_masked[:, None], 0.0, acc * (1.0 / row_sum)[:, None])
    return out, row_max + tl.log2(row_sum) * LN_2


@triton.jit
def kept_weights(seed, threshold, b, heads, offs_m, start_n, BLOCK_N: tl.constexpr):
    """(M, BLOCK_N): which weights dropout keeps, see fastgpt/ops/dropout.py. start_n is a multiple of 4; heads, offs_m:
    (M,) head and token of each row. Every number of a counter is below 2^32."""
    zero = tl.zeros([1, BLOCK_N // 4], tl.int32) + tl.zeros_like(offs_m).to(tl.int32)[:, None]
    blocks = zero + (start_n // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.int32)[None, :]
    rows = zero + offs_m.to(tl.int32)[:, None]
    heads = zero + heads.to(tl.int32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, blocks.to(tl.uint32), rows.to(tl.uint32), heads.to(tl.uint32), (zero + b).to(tl.uint32))
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words >> 1).to(tl.int32) >= threshold


def has_aligned_rows(x: Tensor) -> bool:
    """Whether the rows of x (B, H, N, D) start and end at multiples of 16 bytes, as vector loads need."""
    steps = x.shape[-1]
    for size, step in zip(x.shape[:-1], x.stride()):
        if size > 1:  # else the stride is never taken, and may be any
            steps |= step
    return (x.data_ptr() | steps * x.element_size()) % 16 == 0


def aligned_rows(x: Tensor) -> Tensor:
    """x (B, H, N, D), or a copy that has aligned rows."""
    if has_aligned_rows(x):
        return x
    size, D = x.element_size(), x.shape[-1]
    padded = torch.zeros((*x.shape[:-1], triton.cdiv(D * size, 16) * 16 // size), dtype=x.dtype, device=x.device)
    padded[..., :D] = x
    return padded
