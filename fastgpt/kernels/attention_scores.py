"""What becomes of a tile's scores in attention kernels: scale, soft cap, ALiBi, bias, masks, softmax and dropout.

Names: offs_m are tokens of the query, offs_n keys; q_pos is a query's own position, token + L - T. exp(x) is written
2^(x log2 e), the hardware's exponential.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention_rows import has_aligned_rows

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
def seen_keys(scores, counts):
    """Of scores (M, N): (N,), whether a key has one above -inf in a row that `counts` (M,), or in any if that is None."""
    if counts is not None:
        scores = tl.where(counts[:, None], scores, float("-inf"))
    return tl.max(scores, 0) > float("-inf")


@triton.jit
def key_ranges(past, n_rows, length, window, HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               IS_CAUSAL: tl.constexpr):  # fmt: skip
    """The keys that some query of a tile sees, in three ranges: (begins, stops, first, end).

    Range 0, of a window alone, are those before which it begins for some query, range 1, without a mask, those that every
    query sees, and range 2 the others. All begin and stop at multiples of BLOCK_N, though no query sees keys before `first`,
    nor from `end` on; but the last range stops at `end`. A range may stop before it begins.

    past: keys before the one at the position of the tile's first query; n_rows: queries from that one on.
    """
    end = tl.minimum(past + tl.minimum(BLOCK_M, n_rows), length) if IS_CAUSAL else length
    outer = (tl.maximum(past + 1, 0) if IS_CAUSAL else length) // BLOCK_N * BLOCK_N
    first = 0
    begin = 0
    inner = 0
    if window is not None:
        first = tl.maximum(past + 1 - window, 0)
        begin = first // BLOCK_N * BLOCK_N
        inner = tl.cdiv(tl.maximum(past + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
    if HAS_MASK:
        outer = begin
    return (begin, inner, tl.maximum(inner, outer)), (tl.minimum(inner, end), outer, end), first, end


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
        fully_masked = row_max == float("-inf")  # sees no key, so has no use for the sink either
        new_max = tl.where(fully_masked, row_max, tl.maximum(row_max, sink))
        shift = tl.where(fully_masked, 0.0, new_max)
        rescale = tl.exp2((row_max - shift) * LOG2_E)
        row_sum = row_sum * rescale + tl.where(fully_masked, 0.0, tl.exp2((sink - shift) * LOG2_E))
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
    """(M, BLOCK_N): which weights the dropout of `Features` keeps, see fastgpt/ops/dropout.py. start_n is a multiple of 4;
    heads, offs_m: (M,) head and token of each row. Every number of a counter is below 2^32."""
    zero = tl.zeros([1, BLOCK_N // 4], tl.int32) + tl.zeros_like(offs_m).to(tl.int32)[:, None]
    blocks = zero + (start_n // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.int32)[None, :]
    rows = zero + offs_m.to(tl.int32)[:, None]
    heads = zero + heads.to(tl.int32)[:, None]
    counters = blocks.to(tl.uint32), rows.to(tl.uint32), heads.to(tl.uint32), (zero + b).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(features.seed, *counters)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words >> 1).to(tl.int32) >= features.threshold


def unit_of(x: Tensor | None) -> int:
    """How a kernel may read rows of a mask or a bias x (B, H, T, S): 16 bytes of so many elements at once, as they begin and
    end at multiples of that; 1 if neighbors lie side by side in memory; else 0."""
    if x is None or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return 0
    return 16 // x.element_size() if has_aligned_rows(x) else 1
