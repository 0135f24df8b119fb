"""Partial results of the splits of a sequence's keys, and how the program that finishes last combines them; see
attention_decode.py."""

import triton
import triton.language as tl

from fastgpt.kernels.attention_scores import LOG2_E, finish_softmax

# Partial results that one program combines. Larger groups are fewer, and the last program combines all of these: 16 is the
# square root of the number of splits of 64 Ki keys. Not tuned on a GPU yet.
GROUP = tl.constexpr(16)


@triton.jit
def _is_last(counter_ptr, expected):
    """Whether this is the last of `expected` programs to get here. The stores of the others are then visible to it.

    The counter must be zero before, and is zero again afterwards, for the next launch.
    """
    tl.debug_barrier()  # all threads' stores come before the atomic add of one, which releases them
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    tl.debug_barrier()  # and all threads' loads after it
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _store_part(softmax_ptr, acc_ptr, parts, acc, row_sum, row_max, stored, V_DIM: tl.constexpr):
    """Stores each row's partial result at index parts (M,)."""
    offs_d = tl.arange(0, acc.shape[1])
    tl.store(softmax_ptr + 2 * parts, row_max, mask=stored)
    tl.store(softmax_ptr + 2 * parts + 1, row_sum, mask=stored)
    mask = stored[:, None] & (offs_d[None, :] < V_DIM)
    tl.store(acc_ptr + parts[:, None] * V_DIM + offs_d[None, :], acc, mask=mask)


@triton.jit
def _add_parts(
    softmax_ptr, acc_ptr, parts, count, stored,
    V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Combines the `count` partial results from `parts` (M,) on, in order, to (acc, row_sum, row_max)."""
    offs_d = tl.arange(0, BLOCK_V)
    maxima = tl.full([BLOCK_M, GROUP], float("-inf"), tl.float32)  # reduced after the loop: in it, Triton 3.6 fails
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
def finish(out_rows, lse_rows, acc, row_sum, row_max, sinks_ptr, heads, stored, V_DIM: tl.constexpr):
    """Stores rows of out and lse, at the pointers (M,), given the sums over all keys."""
    out, lse = finish_softmax(acc, row_sum, row_max, sinks_ptr, heads)
    tl.store(lse_rows, lse, mask=stored)
    offs_d = tl.arange(0, acc.shape[1])
    mask = stored[:, None] & (offs_d[None, :] < V_DIM)
    tl.store(out_rows[:, None] + offs_d[None, :], out.to(out_rows.dtype.element_ty), mask=mask)


@triton.jit
def combine(
    out_rows, lse_rows, acc, row_sum, row_max, softmax_ptr, acc_ptr, counters_ptr, parts, split, n_splits, n_written,
    sinks_ptr, heads, stored, V_DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Stores a split's partial result. The last split of a group combines the group's, and the last group finishes.

    Args: acc (M, BLOCK_V), row_sum and row_max (M,) of the split; parts (M,): index of each row's first partial result;
        counters_ptr: these rows' counters, one of groups, then one of splits for each group; n_written: splits of this
        sequence, of n_splits.
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_V: tl.constexpr = acc.shape[1]
    group = split // GROUP
    n_parts = tl.minimum(n_written - group * GROUP, GROUP)
    _store_part(softmax_ptr, acc_ptr, parts + split, acc, row_sum, row_max, stored, V_DIM)
    if _is_last(counters_ptr + 1 + group, n_parts):
        first = parts + group * GROUP
        acc, row_sum, row_max = _add_parts(softmax_ptr, acc_ptr, first, n_parts, stored, V_DIM, BLOCK_M, BLOCK_V, AT_ONCE)
        is_last = n_written <= GROUP
        if n_written > GROUP:
            sums = parts + n_splits  # of groups
            _store_part(softmax_ptr, acc_ptr, sums + group, acc, row_sum, row_max, stored, V_DIM)
            n_sums = tl.cdiv(n_written, GROUP)
            is_last = _is_last(counters_ptr, n_sums)
            if is_last:
                acc, row_sum, row_max = _add_parts(softmax_ptr, acc_ptr, sums, n_sums, stored, V_DIM, BLOCK_M, BLOCK_V, AT_ONCE)
        if is_last:
            finish(out_rows, lse_rows, acc, row_sum, row_max, sinks_ptr, heads, stored, V_DIM)
