"""Loads and stores of rows in the attention kernels: queries, outputs, and keys and values, also paged or in 8 bits."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.launch import Layout


class KeysValues(NamedTuple):
    """The keys and values of one head, of one sequence or of a pool of pages. Strides are in elements."""

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
    """Tensor descriptors for bulk copies of tiles (TMA), or None, and the coordinates of a program's head in them."""

    x: tl.tensor_descriptor | None  # keys, or queries
    x_rest: tl.tensor_descriptor | None  # their dimensions past the first block
    y: tl.tensor_descriptor | None  # values, or dout
    b: tl.tensor
    h: tl.tensor
    row: tl.tensor


@triton.jit
def sequence_of(b, n_queries, n_keys, kv_lengths_ptr, cu_q_ptr, cu_k_ptr):
    """(queries, keys, first query, first key) of sequence b; the last two are 0 unless sequences are packed."""
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
    """Stores rows of x (rows, BLOCK_D) where offs_row < n_rows. `stride` is a multiple of HEAD_DIM, as in any dense tensor, and
    so is the offset of the first row: from that the compiler infers how wide stores can be."""
    WIDTH: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    POWER: tl.constexpr = HEAD_DIM & -HEAD_DIM  # largest power of two that divides HEAD_DIM
    UNIT: tl.constexpr = POWER if POWER * WIDTH < 16 else 16 // WIDTH
    rows = tl.multiple_of(ptr + offs_row * tl.cast(stride, tl.int64), UNIT * WIDTH)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_row < n_rows)[:, None] & (offs_d[None, :] < HEAD_DIM)
    tl.store(rows[:, None] + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(ptr, rows, n_rows, other, MASKED: tl.constexpr):
    """One element per row; MASKED: `other` from n_rows on."""
    if MASKED:
        return tl.load(ptr + rows, mask=rows < n_rows, other=other)
    return tl.load(ptr + rows)


@triton.jit
def load_keys(
    ptr, stride_page, stride_row, pages, rows, end_mask,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of keys or values (rows, BLOCK_D) in their stored dtype: rows `rows` of pages `pages`."""
    ALIGN: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    offsets = pages * tl.multiple_of(tl.cast(stride_page, tl.int64), ALIGN)
    offsets += rows * tl.multiple_of(tl.cast(stride_row, tl.int64), ALIGN)
    return _load_tile(ptr, offsets, end_mask, HEAD_DIM, BLOCK_D, MASK_ROWS)


@triton.jit
def pages_of(kv, offs_n, end):
    """The pages of keys offs_n of a paged sequence of `KeysValues`; some valid page from `end` on."""
    entries = kv.block_table_ptr + offs_n // kv.page * tl.cast(kv.stride_tp, tl.int64)
    pages = tl.load(entries, mask=offs_n < end, other=0)
    return tl.maximum(tl.minimum(pages, kv.n_pages - 1), 0)


@triton.jit
def from_8_bits(x, dtype: tl.constexpr):
    """x in `dtype`. int8 and e4m3 (as uint8) are converted without applying their scale."""
    if x.dtype == tl.uint8:
        # e4m3 to fp16: the exponent biases differ by 8, for which the factor makes up, also for subnormals.
        bits = x.to(tl.int16)
        magnitude = bits & 0x7F
        half = ((bits & 0x80) << 8 | magnitude << 7).to(tl.float16, bitcast=True) * 256.0
        x = tl.where(magnitude == 0x7F, float("nan"), half.to(tl.float32)).to(dtype)
    return x.to(dtype)


@triton.jit
def values_from_8_bits(x, dtype: tl.constexpr):
    """`from_8_bits` of values x (N, BLOCK_D), even and odd columns apart: otherwise Triton loads x in the layout of a 16-bit dot
    operand, byte by byte from shared memory, and copies it there at most 8 bytes at a time."""
    if x.dtype.primitive_bitwidth == 8:
        even, odd = x.reshape(x.shape[0], x.shape[1] // 2, 2).split()
        return tl.join(from_8_bits(even, dtype), from_8_bits(odd, dtype)).reshape(x.shape[0], x.shape[1])
    return x.to(dtype)


def has_aligned_rows(x: Tensor | Layout) -> bool:
    """Whether the rows of x (B, H, N, D) start and end at multiples of 16 bytes, as vector loads need."""
    (B, H, N, D), (stride_b, stride_h, stride_n, _) = x.shape, x.stride()
    # The stride of a dimension of size 1 is not used, and may be anything.
    steps = D | (stride_b if B > 1 else 0) | (stride_h if H > 1 else 0) | (stride_n if N > 1 else 0)
    return (x.data_ptr() | steps * x.element_size()) % 16 == 0


def aligned_rows(x: Tensor) -> Tensor:
    """x (B, H, N, D) if it has aligned rows, else a copy that has."""
    if has_aligned_rows(x):
        return x
    size, D = x.element_size(), x.shape[-1]
    padded = torch.zeros((*x.shape[:-1], triton.cdiv(D * size, 16) * 16 // size), dtype=x.dtype, device=x.device)
    padded[..., :D] = x
    return padded
