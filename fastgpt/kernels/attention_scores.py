"""A tile of scores in the attention kernels: scale, soft cap, ALiBi, bias, masks, softmax and dropout.

Names: offs_m are query tokens, offs_n keys; q_pos is a query's position among the keys, token + L - T. exp(x) is computed as
2^(x log2 e), since the hardware has 2^x.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention_rows import has_aligned_rows
from fastgpt.kernels.launch import Layout

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


class Features(NamedTuple):
    """The scale and the optional features of attention, for the tiles of a program. Absent features are None."""

    scale: tl.tensor
    softcap: tl.tensor | None
    slope: tl.tensor | None  # ALiBi's, of the program's head or of each row
    window: tl.tensor | None
    mask_ptr: tl.tensor | None  # at the program's first row, like bias_ptr
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
    """Pointers to rows (M, 1), or (1, M), of a mask or a bias. UNIT: see `unit_of`."""
    ALIGN: tl.constexpr = UNIT * ptr.dtype.scalar.element_ty.primitive_bitwidth // 8 if UNIT > 1 else 1
    return tl.multiple_of(ptr + rows * tl.cast(stride_row, tl.int64), (ALIGN, ALIGN))


@triton.jit
def load_scores(row_ptrs, cols, stride_col, row_mask, n_cols, UNIT: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of a mask or a bias, given `score_rows` (M, 1) and columns (1, N), or transposed; 0 out of bounds.

    WHOLE: all columns are before n_cols.
    """
    offsets = cols.to(tl.int64)
    if UNIT == 0:
        offsets *= stride_col
    mask = row_mask
    if not WHOLE:
        STEP: tl.constexpr = UNIT if UNIT > 1 else 1
        mask = mask & (cols < n_cols // STEP * STEP)  # n_cols, in a form that shows that no vector is partly masked
    return tl.load(row_ptrs + offsets, mask=mask, other=0)


@triton.jit
def load_bias(features, rows, cols, n_rows, UNIT: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of the bias in fp32: rows (M, 1), of which the first n_rows exist, and columns (1, N), or transposed."""
    row_ptrs = score_rows(features.bias_ptr, rows, features.stride_bias_m, UNIT)
    return load_scores(row_ptrs, cols, features.stride_bias_n, rows < n_rows, features.n_keys, UNIT, WHOLE).to(tl.float32)


@triton.jit
def load_mask(features, rows, cols, n_rows, UNIT: tl.constexpr):
    """A tile of the mask, likewise; False out of bounds."""
    row_ptrs = score_rows(features.mask_ptr, rows, features.stride_mask_m, UNIT)
    return load_scores(row_ptrs, cols, features.stride_mask_n, rows < n_rows, features.n_keys, UNIT, WHOLE=False) != 0


# With fp16, weights times v_scale could underflow in the product with v. So a program divides them by a unit, a power of two
# such that they stay below 2^(HEADROOM + 1). It follows from the biased fp32 exponent of the largest scale so far, at least
# MIN_EXPONENT, so that the unit and its inverse are normal fp32 numbers.
HEADROOM, MIN_EXPONENT = tl.constexpr(12), tl.constexpr(13)


@triton.jit
def exponents_of(scales):
    """Biased exponents of fp32 numbers; that of the largest finite number for infinity and NaN."""
    return tl.minimum(scales.to(tl.int32, bitcast=True) >> 23 & 0xFF, 254)


@triton.jit
def power_of_two(exponent):
    """2^(exponent - 127) in fp32; 0 if exponent <= 0."""
    return (tl.maximum(exponent, 0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def tanh(x):
    """Within 2 ulp: a polynomial (Cephes, tanhf.c) where the exponential formula would cancel."""
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
    """Scores from q·k (M, N): scale, soft cap, ALiBi and bias, in this order; each but the scale may be None. slope (M,): that of
    each row's head."""
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
    """The mask of keys that each query sees: causal, window and, unless None, `end`. q_pos (M, 1), offs_n (1, N), or
    transposed."""
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
    """(N,): whether a key has a score above -inf in any row of scores (M, N), or in any row where `counts` (M,), if not None."""
    if counts is not None:
        scores = tl.where(counts[:, None], scores, float("-inf"))
    return tl.max(scores, 0) > float("-inf")


@triton.jit
def key_ranges(past, n_rows, length, window, HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               IS_CAUSAL: tl.constexpr):  # fmt: skip
    """The keys that some query of a tile sees, in three ranges: (begins, stops, first, end).

    Range 0 (window): keys that are outside some query's window. Range 1 (no mask): keys that every query sees. Range 2: the
    others. Ranges begin and stop at multiples of BLOCK_N, except that the last one stops at `end`; no query sees keys before
    `first` or from `end` on. A range may be empty: stop <= begin.

    past: position of the tile's first query; n_rows: queries from that one on.
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
    """Accumulates a tile of scores (M, N) into each row's maximum m and sum l of exp(score - m), (M,) each.

    `factor` scales x to base 2. EXACT, for weights in fp32, keeps row_max in the units of x and scales after the subtraction,
    which is exact where it matters; else row_max is in base 2, and scaling and subtraction are one fused multiply-add.
    Returns the weights exp(score - m), the factor that rescales earlier sums, l and m.
    """
    new_max = tl.maximum(row_max, tl.max(x, 1) if EXACT else tl.max(x, 1) * factor)
    # The maximum of a row that has seen no key yet is -inf, and -inf - -inf would be NaN.
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
    """(out, lse) of rows in fp32 given the sums over all keys: acc (M, BLOCK_D), the others (M,), row_max in base e."""
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + heads).to(tl.float32)
        fully_masked = row_max == float("-inf")  # then the sink does not count either
        new_max = tl.where(fully_masked, row_max, tl.maximum(row_max, sink))
        shift = tl.where(fully_masked, 0.0, new_max)
        rescale = tl.exp2((row_max - shift) * LOG2_E)
        row_sum = row_sum * rescale + tl.where(fully_masked, 0.0, tl.exp2((sink - shift) * LOG2_E))
        row_max = new_max
        acc *= rescale[:, None]
    fully_masked = row_sum == 0.0  # out is then 0, even if a value is NaN, and lse -inf
    row_sum = tl.where(fully_masked, 1.0, row_sum)
    out = tl.where(fully_masked[:, None], 0.0, acc * (1.0 / row_sum)[:, None])
    return out, row_max + tl.log2(row_sum) * LN_2


@triton.jit
def recomputed_weights(
    qk, shift, features, rows, n_rows, offs_n, q_pos, end, MASK_UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The softmax weights before dropout, and d score / d (scale q·k). MASKED: zero where a query does not see a key, and from
    `end` on unless that is None.

    qk is (M, N) with shift, rows, q_pos (M, 1) and offs_n (1, N), or all of them transposed. shift is the log-sum-exp, in
    base e if EXACT (as in online_softmax), else in base 2. The slope of `Features` is a scalar.
    """
    slope_of_cap = 1.0
    factor = features.scale * LOG2_E  # scales qk to base 2
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
        if features.slope is not None:  # p of rows past the last must be finite, as it meets zeros; ALiBi may overflow it
            visible = visible & (rows < n_rows)
        if features.mask_ptr is not None:
            visible = visible & load_mask(features, rows, offs_n, n_rows, MASK_UNIT)
        p = tl.where(visible, p, 0.0)
    return p, slope_of_cap


@triton.jit
def kept_weights(features, b, heads, offs_m, start_n, BLOCK_N: tl.constexpr):
    """(M, BLOCK_N): the dropout mask, True where a weight is kept; see fastgpt/ops/dropout.py. start_n is a multiple of 4;
    heads, offs_m: (M,) head and token of each row. Each word of a counter is below 2^32."""
    zero = tl.zeros([1, BLOCK_N // 4], tl.int32) + tl.zeros_like(offs_m).to(tl.int32)[:, None]
    blocks = zero + (start_n // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.int32)[None, :]
    rows = zero + offs_m.to(tl.int32)[:, None]
    heads = zero + heads.to(tl.int32)[:, None]
    counters = blocks.to(tl.uint32), rows.to(tl.uint32), heads.to(tl.uint32), (zero + b).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(features.seed, *counters)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words >> 1).to(tl.int32) >= features.threshold


def unit_of(x: Tensor | Layout | None) -> int:
    """How a kernel may load rows of a mask or a bias x (B, H, T, S): the number of elements in 16 bytes if rows start and end at
    multiples of these; 1 if the last dimension is contiguous; else 0."""
    if x is None or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return 0
    return 16 // x.element_size() if has_aligned_rows(x) else 1
