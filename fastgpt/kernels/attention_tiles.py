"""What the attention kernels share: how a tile of keys is read, what becomes of its scores, which of them count.

Names: offs_m are tokens of the query, offs_n keys; q_pos is a query's own position, token + L - T. exp(x) is
written 2^(x log2 e), the hardware's exponential.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


class Features(NamedTuple):
    """What attention has beyond softmax(scale q·k) v, for the tiles of a program. What is None has no part in it."""

    scale: tl.tensor
    softcap: tl.tensor | None
    slope: tl.tensor | None  # ALiBi's, of the program's head or of each row's
    window: tl.tensor | None
    mask_ptr: tl.tensor | None  # at the program's first row, as bias_ptr
    stride_mask_m: tl.tensor
    stride_mask_n: tl.tensor
    bias_ptr: tl.tensor | None
    stride_bias_m: tl.tensor
    stride_bias_n: tl.tensor
    n_keys: tl.tensor  # columns of the mask and the bias
    seed: tl.tensor | None  # dropout's
    threshold: tl.tensor
    keep_scale: tl.tensor


class KeysValues(NamedTuple):
    """Where the keys and values of one head are: rows of one sequence, or of pages. Strides are in elements."""

    k_ptr: tl.tensor
    stride_kb: tl.tensor  # of a page
    stride_kn: tl.tensor
    v_ptr: tl.tensor
    stride_vb: tl.tensor
    stride_vn: tl.tensor
    k_scale_ptr: tl.tensor | None  # with 8-bit keys and values
    stride_ksb: tl.tensor
    stride_ksn: tl.tensor
    v_scale_ptr: tl.tensor | None
    stride_vsb: tl.tensor
    stride_vsn: tl.tensor
    block_table_ptr: tl.tensor | None  # None without pages
    stride_tp: tl.tensor
    page: tl.tensor  # keys
    n_pages: tl.tensor


class Descriptors(NamedTuple):
    """Tensor descriptors of tiles that are copied in bulk, or None, and where in them a program's head begins."""

    x: tl.tensor_descriptor | None  # keys, or queries
    x_rest: tl.tensor_descriptor | None  # of their dimensions past the first block
    y: tl.tensor_descriptor | None  # values, or dout
    b: tl.tensor
    h: tl.tensor
    row: tl.tensor


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
def score_rows(ptr, rows, stride_row, UNIT: tl.constexpr):
    """Where rows (M, 1), or (1, M), of a mask or a bias begin. UNIT: see `unit_of`."""
    ALIGN: tl.constexpr = UNIT * ptr.dtype.scalar.element_ty.primitive_bitwidth // 8 if UNIT > 1 else 1
    return tl.multiple_of(ptr + rows * tl.cast(stride_row, tl.int64), (ALIGN, ALIGN))


@triton.jit
def load_scores(row_ptrs, cols, stride_col, row_mask, n_cols, UNIT: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of a mask or a bias, from `score_rows` (M, 1) and columns (1, N), or transposed; 0 beyond what there is.

    WHOLE: all columns are before n_cols.
    """
    offsets = cols.to(tl.int64)
    if UNIT == 0:
        offsets *= stride_col
    mask = row_mask
    if not WHOLE:
        STEP: tl.constexpr = UNIT if UNIT > 1 else 1
        mask = mask & (cols < n_cols // STEP * STEP)  # which is n_cols, and tells that vectors are in or out as a whole
    return tl.load(row_ptrs + offsets, mask=mask, other=0)


@triton.jit
def load_bias(features, rows, cols, n_rows, UNIT: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of `Features`' bias in fp32: its rows (M, 1), of which there are n_rows, and columns (1, N), or transposed."""
    row_ptrs = score_rows(features.bias_ptr, rows, features.stride_bias_m, UNIT)
    return load_scores(row_ptrs, cols, features.stride_bias_n, rows < n_rows, features.n_keys, UNIT, WHOLE).to(tl.float32)


@triton.jit
def load_mask(features, rows, cols, n_rows, UNIT: tl.constexpr):
    """Which scores of a tile `Features`' mask keeps, likewise; none beyond what there is."""
    row_ptrs = score_rows(features.mask_ptr, rows, features.stride_mask_m, UNIT)
    return load_scores(row_ptrs, cols, features.stride_mask_n, rows < n_rows, features.n_keys, UNIT, WHOLE=False) != 0


@triton.jit
def pages_of(kv, offs_n, end):
    """The pages of keys offs_n of a paged sequence of `KeysValues`. From `end` on any that there are."""
    entries = kv.block_table_ptr + offs_n // kv.page * tl.cast(kv.stride_tp, tl.int64)
    pages = tl.load(entries, mask=offs_n < end, other=0)
    return tl.maximum(tl.minimum(pages, kv.n_pages - 1), 0)


@triton.jit
def load_keys(
    ptr, stride_page, stride_row, pages, rows, end_mask,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of keys or values (rows, BLOCK_D) as it is stored: rows `rows` of pages `pages`."""
    ALIGN: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    offsets = pages * tl.multiple_of(tl.cast(stride_page, tl.int64), ALIGN)
    offsets += rows * tl.multiple_of(tl.cast(stride_row, tl.int64), ALIGN)
    return _load_tile(ptr, offsets, end_mask, HEAD_DIM, BLOCK_D, MASK_ROWS)


@triton.jit
def values_from_8_bits(x, dtype: tl.constexpr):
    """`from_8_bits` of values x (N, BLOCK_D), by halves: what splits numbers that lie side by side in a register keeps the
    compiler from reading 8 bits as the matrix units want 16 of them, one by one, and from copying no more than 8 bytes at once
    to where it does."""
    if x.dtype.primitive_bitwidth == 8:
        even, odd = x.reshape(x.shape[0], x.shape[1] // 2, 2).split()
        return tl.join(from_8_bits(even, dtype), from_8_bits(odd, dtype)).reshape(x.shape[0], x.shape[1])
    return x.to(dtype)


@triton.jit
def from_8_bits(x, dtype: tl.constexpr):
    """x in `dtype`. int8 and e4m3 (as uint8) are what their bits say, without their scale."""
    if x.dtype == tl.uint8:
        # e4m3 to fp16: exponents differ by 8, which the multiplication adds, for subnormal numbers too.
        bits = x.to(tl.int16)
        magnitude = bits & 0x7F
        half = ((bits & 0x80) << 8 | magnitude << 7).to(tl.float16, bitcast=True) * 256.0
        x = tl.where(magnitude == 0x7F, float("nan"), half.to(tl.float32)).to(dtype)
    return x.to(dtype)


# Weights times v_scale are multiplied in fp16, which has no small numbers: a program computes them in a unit of its own, a
# power of two with which they are below 2^(HEADROOM + 1). It follows from the exponent, as fp32 stores it, of the largest
# scale so far, no less than FIRST, so that both the unit and its inverse are fp32's.
HEADROOM, FIRST = tl.constexpr(12), tl.constexpr(13)


@triton.jit
def exponents_of(scales):
    """Of fp32 numbers, as stored; the largest finite one for infinity and NaN."""
    return tl.minimum(scales.to(tl.int32, bitcast=True) >> 23 & 0xFF, 254)


@triton.jit
def power_of_two(exponent):
    """2^(exponent - 127) in fp32; 0 if exponent <= 0."""
    return (tl.maximum(exponent, 0) << 23).to(tl.float32, bitcast=True)


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
def modified_scores(qk, scale, softcap, slope, q_pos, offs_n, bias):
    """Scores from q·k (M, N): scale, soft cap, ALiBi and bias, in this order, but those that are None. slope (M,) of each row's
    head."""
    x = qk * scale
    if softcap is not None:
        x = softcap * tanh(x / softcap)
    if slope is not None:
        x -= slope[:, None] * tl.abs(q_pos[:, None] - offs_n[None, :]).to(tl.float32)
    if bias is not None:
        x = tl.where(bias == float("-inf"), float("-inf"), x + bias)  # also where x is infinite or NaN
    return x


@triton.jit
def visible_keys(q_pos, offs_n, end, window, IS_CAUSAL: tl.constexpr):
    """Which keys before `end`, or all if it is None, the causal mask and the window, if any, leave to each query: q_pos (M, 1),
    offs_n (1, N), or transposed."""
    visible = tl.full([1, 1], True, tl.int1)
    if end is not None:
        visible = visible & (offs_n < end)
    if IS_CAUSAL:
        visible = visible & (offs_n <= q_pos)
    if window is not None:
        visible = visible & (offs_n > q_pos - window)
    return visible


@triton.jit
def sequence_of(b, n_queries, n_keys, kv_lengths_ptr, cu_q_ptr, cu_k_ptr):
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


@triton.jit
def load_vector(ptr, rows, n_rows, other, MASKED: tl.constexpr):
    """A number of each row; MASKED: `other` from n_rows on."""
    if MASKED:
        return tl.load(ptr + rows, mask=rows < n_rows, other=other)
    return tl.load(ptr + rows)


@triton.jit
def key_ranges(past, n_rows, length, window, HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               IS_CAUSAL: tl.constexpr):  # fmt: skip
    """The keys that some query of a tile sees, in three ranges: (begins, stops, end).

    Range 0, of a window alone, are those before which it begins for some query, range 1, without a mask, those that every
    query sees, and range 2 the others, up to `end`. All but `end` are multiples of BLOCK_N; a range may stop before it begins.

    past: keys before the one at the position of the tile's first query; n_rows: queries from that one on.
    """
    end = tl.minimum(past + tl.minimum(BLOCK_M, n_rows), length) if IS_CAUSAL else length
    outer = (tl.maximum(past + 1, 0) if IS_CAUSAL else length) // BLOCK_N * BLOCK_N
    begin = 0
    inner = 0
    if window is not None:
        begin = tl.maximum(past + 1 - window, 0) // BLOCK_N * BLOCK_N
        inner = tl.cdiv(tl.maximum(past + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
    if HAS_MASK:
        outer = begin
    return (begin, inner, tl.maximum(inner, outer)), (tl.minimum(inner, end), outer, end), end


@triton.jit
def online_softmax(x, row_sum, row_max, factor, EXACT: tl.constexpr):
    """Folds a tile of scores (M, N) into each row's maximum m and sum l of exp(score - m), (M,) each.

    `factor` makes scores in base 2 of x. EXACT, for weights in fp32, keeps row_max in the
    units of x and rounds after the subtraction, which itself rounds nothing where it matters; else row_max is in base 2,
    and the subtraction one with the scaling.
    Returns the weights exp(score - m), what to multiply with that was summed so far, l and m.
    """
    new_max = tl.maximum(row_max, tl.max(x, 1) if EXACT else tl.max(x, 1) * factor)
    # A row that has seen no key yet has maximum -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
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
def recomputed_weights(
    qk, shift, features, rows, n_rows, offs_n, q_pos, end, MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The softmax's weights before dropout; and d score / d (scale q·k). MASKED: zero where a query does not see a key, for
    keys before `end`, or all if it is None.

    qk is (M, N) with shift, rows, q_pos (M, 1) and offs_n (1, N), or all of them transposed. shift is the log-sum-exp, in
    base e if EXACT (as in online_softmax), else in base 2. The slope of `Features` is a scalar.
    """
    slope_of_cap = 1.0
    factor = features.scale * LOG2_E  # what is left to multiply qk with for scores in base 2
    if EXACT or features.softcap is not None or features.slope is not None or features.bias_ptr is not None:
        qk *= features.scale
        factor = LOG2_E
    if features.softcap is not None:
        capped = tanh(qk / features.softcap)
        qk = features.softcap * capped
        slope_of_cap = 1.0 - capped * capped
    if features.slope is not None:
        qk -= features.slope * tl.abs(q_pos - offs_n).to(tl.float32)
    if features.bias_ptr is not None:
        bias = load_bias(features, rows, offs_n, n_rows, BIAS_UNIT, WHOLE=False)
        qk = tl.where(bias == float("-inf"), float("-inf"), qk + bias)
    if EXACT:
        p = tl.exp2((qk - shift) * factor)
    else:
        p = tl.exp2(qk * factor - shift)
    if MASKED:
        visible = visible_keys(q_pos, offs_n, end, features.window, IS_CAUSAL)
        if features.slope is not None:  # no row past the last may make an infinity; else its p is finite, and met by zeros
            visible = visible & (rows < n_rows)
        if features.mask_ptr is not None:
            visible = visible & load_mask(features, rows, offs_n, n_rows, MASK_UNIT)
        p = tl.where(visible, p, 0.0)
    return p, slope_of_cap


@triton.jit
def kept_weights(features, b, heads, offs_m, start_n, BLOCK_N: tl.constexpr):
    """(M, BLOCK_N): which weights the dropout of `Features` keeps, see fastgpt/ops/dropout.py. start_n is a multiple of 4; heads, offs_m:
    (M,) head and token of each row. Every number of a counter is below 2^32."""
    zero = tl.zeros([1, BLOCK_N // 4], tl.int32) + tl.zeros_like(offs_m).to(tl.int32)[:, None]
    blocks = zero + (start_n // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.int32)[None, :]
    rows = zero + offs_m.to(tl.int32)[:, None]
    heads = zero + heads.to(tl.int32)[:, None]
    counters = blocks.to(tl.uint32), rows.to(tl.uint32), heads.to(tl.uint32), (zero + b).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(features.seed, *counters)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words >> 1).to(tl.int32) >= features.threshold


def head_blocks(head_dim: int) -> tuple[int, int]:
    """(main, rest): the powers of two in which a kernel holds a head of q and k. 192 = 128 + 64 and 576 = 512 + 64 rather than
    the next power of two, where that is wide and the rest is less than half of it; else the rest is 0."""
    padded = padded_dim(head_dim)
    rest = padded_dim(head_dim - padded // 2)
    return (padded // 2, rest) if head_dim > 128 and rest < padded // 2 else (padded, 0)


def padded_dim(head_dim: int) -> int:
    """The power of two in which a kernel holds a head of v."""
    return max(16, triton.next_power_of_2(head_dim))


def tile_key(head_dim: int, v_dim: int, element_size: int) -> tuple[int, int]:
    """What tables of tiles are keyed by: a power of two for the head dims of k and v, 512 with a rest included, and bytes."""
    return max(min(padded_dim(head_dim), 512), padded_dim(v_dim)), element_size


def head_dims(tiles: dict, element_size: int):
    """Yields (head dim of k, of v) of kernels to compile ahead of time: of each tile those that fill it, and those that do not;
    of the widest, and of different ones, what models have."""
    for block, size in tiles:
        if size == element_size and block <= 256:
            yield from ((block, block), (block * 5 // 8, block * 5 // 8))
    yield from ((192, 128), (576, 512))


def unit_of(x: Tensor | None) -> int:
    """How a kernel may read rows of a mask or a bias x (B, H, T, S): 16 bytes of so many elements at once, as they begin and
    end at multiples of that; 1 if neighbors lie side by side in memory; else 0."""
    if x is None or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return 0
    return 16 // x.element_size() if has_aligned_rows(x) else 1


def units_of(given, dtype: torch.dtype) -> dict[str, int]:
    """The constants that are `unit_of` a mask and a bias, of those arguments that are given, with aligned rows."""
    sizes = {"MASK_UNIT": ("mask_ptr", 1), "BIAS_UNIT": ("bias_ptr", dtype.itemsize)}
    return {name: 16 // size if pointer in given else 0 for name, (pointer, size) in sizes.items()}


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
