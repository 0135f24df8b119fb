"""The KV-cache update, alone and fused with rotary embedding, in one launch; and rotation and 8-bit quantization of a row.

Results are those of csrc/kv_cache/kv_cache_update.cu, bit for bit: every fp32 operation is rounded, without fused multiply-adds
(enable_fp_fusion=False). So prefill needs no host sync without the CUDA library, either.

Rows may have any alignment, which is a compile-time argument: in most calls 16 bytes, for everything read and written.
"""

import functools
from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.dependent_launch import dependent_launch, has_dependent_launch, launch_dependents, wait_for_dependencies
from fastgpt.kernels.launch import Constants, Launch, Layout, dense, kernel, no_launch, plan
from fastgpt.kernels.limits import cdiv, check_count, check_sizes, grid
from fastgpt.kernels.tiles import WIDEST_ACCESS, update_tile


@triton.jit
def to_float32(x):
    """x in fp32, exactly. bf16 is converted bit by bit, as Triton's interpreter (3.6 to 3.9) flushes subnormals."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def from_float32(x, dtype: tl.constexpr):
    """x, in fp32, rounded to the nearest number of a dtype, ties to even. To bf16 bit by bit, as Triton's interpreter (3.6 to
    3.9) truncates."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        x = tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def rotated(x, other, cosine, sine, is_first):
    """Elements x of rotated pairs, with their partners in `other`, computed in fp32 and rounded once: the first of a pair (a, b)
    becomes a cos - b sin, the second b cos + a sin."""
    crossed = to_float32(other) * sine
    straight = to_float32(x) * cosine
    return from_float32(tl.where(is_first, straight - crossed, straight + crossed), x.dtype)


@triton.jit
def to_e4m3(x):
    """fp32, not NaN -> the nearest e4m3 as uint8, ties to even, saturated to 448; on every architecture."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude - (120 << 23) + 0x7FFFF + (magnitude >> 20 & 1)) >> 20
    # Below 2^-6: adding 2^14 leaves the rounded multiple of 2^-9 in the low bits.
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    rounded = tl.where(magnitude < (121 << 23), subnormal, normal)
    capped = tl.where(magnitude >= 0x43E00000, 0x7E, rounded)
    return ((bits >> 24 & 0x80) | capped).to(tl.uint8)


@triton.jit
def largest_of(x, KEEP: tl.constexpr):
    """The largest magnitude of each row x (..., BLOCK_D), as the bits of fp32, which compare as integers, NaN above all. With
    KEEP (..., 1), else a scalar, for one row."""
    return tl.max(to_float32(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1, keep_dims=KEEP)


@triton.jit
def quantized(x, largest_bits, element: tl.constexpr):
    """Rows x (..., BLOCK_D) as int8, or e4m3 in uint8, and their scales, given `largest_of` of the whole rows: bit for bit as in
    csrc/common/elements.h, in a kernel with enable_fp_fusion=False."""
    LIMIT: tl.constexpr = 127.0 if element == tl.int8 else 448.0
    x = to_float32(x)
    largest = largest_bits.to(tl.float32, bitcast=True)
    finite = largest_bits < 0x7F800000
    counts = finite & (largest >= 1e-30)
    divisor = tl.where(counts, largest, LIMIT)
    scale = tl.where(finite, tl.where(counts, tl.div_rn(divisor, LIMIT), 0.0), float("nan"))
    scaled = tl.where(counts, x * tl.div_rn(tl.full([], LIMIT, tl.float32), divisor), 0.0)
    if element == tl.int8:
        # Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, in the low bits.
        stored = ((scaled + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)
    else:
        stored = to_e4m3(scaled)
    return stored, scale


@triton.jit
def _read(ptr, start, stride, tokens, mask_t, offs_d, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers (M,) to the rows at start + tokens * stride, and their elements at offs_d. ALIGN (bytes) divides the pointers."""
    rows = tl.multiple_of(ptr + (start + tokens * stride), [ALIGN])
    mask = mask_t[:, None] & (offs_d < HEAD_DIM)[None, :]
    return rows, tl.load(rows[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def _angles(ptr, positions, stride, pair, is_rotated, other, PAIRS: tl.constexpr, ALIGN: tl.constexpr):
    """cos or sin of each position at pair (N,), or `other` where it is not rotated: (M, N)."""
    rows = tl.multiple_of(ptr + tl.where(is_rotated, positions, 0) * stride, [ALIGN])
    return tl.load(rows[:, None] + pair[None, :], mask=is_rotated[:, None] & (pair < PAIRS)[None, :], other=other)


@triton.jit
def _interleave(a, b, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns of a and b (BLOCK_T, BLOCK_D / 2), interleaved: (BLOCK_T, BLOCK_D)."""
    return tl.join(a, b).reshape([BLOCK_T, BLOCK_D])


@triton.jit
def _rotate(
    x, rows, cos_ptr, sin_ptr, stride_cos, stride_sin, positions, is_rotated,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows x (BLOCK_T, BLOCK_D), loaded from the pointers `rows`, rotated by their positions where is_rotated."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = is_rotated[:, None] & (offs_d < 2 * PAIRS)[None, :]
    if INTERLEAVED:
        is_first = offs_d % 2 == 0
        pair = tl.arange(0, BLOCK_D // 2)
        a, b = tl.split(x.reshape([BLOCK_T, BLOCK_D // 2, 2]))
        other = _interleave(b, a, BLOCK_T, BLOCK_D)
        cosine = _angles(cos_ptr, positions, stride_cos, pair, is_rotated, 1.0, PAIRS, ALIGN)
        sine = _angles(sin_ptr, positions, stride_sin, pair, is_rotated, 0.0, PAIRS, ALIGN)
        cosine, sine = _interleave(cosine, cosine, BLOCK_T, BLOCK_D), _interleave(sine, sine, BLOCK_T, BLOCK_D)
    else:
        is_first = offs_d < PAIRS
        pair = tl.where(is_first, offs_d, offs_d - PAIRS)
        partner = tl.where(is_first, offs_d + PAIRS, offs_d - PAIRS)
        other = tl.load(rows[:, None] + partner[None, :], mask=mask, other=0.0)
        cosine = _angles(cos_ptr, positions, stride_cos, pair, is_rotated, 1.0, PAIRS, ALIGN)
        sine = _angles(sin_ptr, positions, stride_sin, pair, is_rotated, 0.0, PAIRS, ALIGN)
    return tl.where(mask, rotated(x, other, cosine, sine, is_first[None, :]), x)


@triton.jit
def _store(
    x, ptr, scale_ptr, first, h, row, stride_b, stride_h, stride_n, stride_sb, stride_sh, stride_sn, stored, offs_d,
    HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Stores rows x (M, BLOCK_D) of head h to the rows `row` (M,) of the sequences or pages `first`, where `stored` (M,)."""
    if scale_ptr is not None:
        x, scale = quantized(x, largest_of(x, KEEP=True), ptr.dtype.element_ty)
        scales = scale_ptr + (first * stride_sb + h * stride_sh + row * stride_sn)
        tl.store(scales[:, None], scale, mask=stored[:, None])
    rows = tl.multiple_of(ptr + (first * stride_b + h * stride_h + row * stride_n), [ALIGN])
    tl.store(rows[:, None] + offs_d[None, :], x, mask=stored[:, None] & (offs_d < HEAD_DIM)[None, :])


# Not specialized: integers that vary between calls, and the alignment of pointers, must not recompile the kernel.
@kernel(
    do_not_specialize=[
        "new_k_ptr", "new_v_ptr", "k_ptr", "v_ptr", "slots_ptr", "block_table_ptr", "k_scale_ptr", "v_scale_ptr",
        "new_q_ptr", "rotated_q_ptr", "positions_ptr", "cos_ptr", "sin_ptr",
        "stride_nkb", "stride_nkh", "stride_nkt",
        "stride_nvb", "stride_nvh", "stride_nvt",
        "stride_kb", "stride_kh", "stride_kn",
        "stride_vb", "stride_vh", "stride_vn",
        "stride_ksb", "stride_ksh", "stride_ksn",
        "stride_vsb", "stride_vsh", "stride_vsn",
        "stride_sb", "stride_st", "stride_tb", "stride_tp",
        "stride_qb", "stride_qh", "stride_qt", "stride_pb", "stride_pt", "stride_cos", "stride_sin",
        "n_heads", "n_heads_kv", "n_tokens", "capacity", "page", "n_pages", "n_angles",
    ]
)  # fmt: skip
def update_cache_kernel(
    new_k_ptr, new_v_ptr, k_ptr, v_ptr, slots_ptr, block_table_ptr, k_scale_ptr, v_scale_ptr,
    new_q_ptr, rotated_q_ptr, positions_ptr, cos_ptr, sin_ptr,
    stride_nkb, stride_nkh, stride_nkt,
    stride_nvb, stride_nvh, stride_nvt,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ksb, stride_ksh, stride_ksn,
    stride_vsb, stride_vsh, stride_vsn,
    stride_sb, stride_st, stride_tb, stride_tp,
    stride_qb, stride_qh, stride_qt, stride_pb, stride_pt, stride_cos, stride_sin,
    n_heads, n_heads_kv, n_tokens, capacity, page, n_pages, n_angles,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    NEW_ALIGN: tl.constexpr, CACHE_ALIGN: tl.constexpr, ANGLE_ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens of one head of k and v, or of q.

    Strides are in elements; the last dimension of all is contiguous. k_ptr and v_ptr are the cache, (B, H_kv, capacity, D), or
    with a block table the pool of pages; then stride_kb and the like are those of a page. rotated_q is (B, H, T, D), contiguous.
    Without rotation, n_heads and PAIRS are 0. Optional tensors are None if absent.
    """
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    pid = tl.program_id(0)
    n_rows = n_heads_kv + n_heads
    head = pid % n_rows  # neighboring programs have the heads of the same tokens
    n_tiles = tl.cdiv(n_tokens, BLOCK_T)
    b = tl.cast(pid // n_rows // n_tiles, tl.int64)
    tokens = (pid // n_rows % n_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = tokens < n_tokens

    positions, is_rotated = tokens, mask_t
    if cos_ptr is not None:
        positions = tl.load(positions_ptr + (b * stride_pb + tokens * stride_pt), mask=mask_t, other=-1).to(tl.int64)
        is_rotated = (positions >= 0) & (positions < n_angles)

    if head < n_heads_kv:
        h = tl.cast(head, tl.int64)
        slots = tl.load(slots_ptr + (b * stride_sb + tokens * stride_st), mask=mask_t, other=-1).to(tl.int64)
        stored = (slots >= 0) & (slots < capacity)
        if cos_ptr is not None:
            stored = stored & (positions < n_angles)
        row = tl.where(stored, slots, 0)
        first = b + tl.zeros_like(row)
        if block_table_ptr is not None:
            entries = block_table_ptr + (b * stride_tb + row // page * stride_tp)
            first = tl.load(entries, mask=stored, other=-1).to(tl.int64)
            stored = stored & (first >= 0) & (first < n_pages)
            row = row % page
        # Rows that are rotated or quantized are loaded as a whole: one iteration.
        for start_d in range(0, HEAD_DIM, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            start = b * stride_nkb + h * stride_nkh
            rows, k = _read(new_k_ptr, start, stride_nkt, tokens, mask_t, offs_d, HEAD_DIM, NEW_ALIGN)
            if cos_ptr is not None:
                k = _rotate(
                    k, rows, cos_ptr, sin_ptr, stride_cos, stride_sin, positions, is_rotated,
                    PAIRS, INTERLEAVED, BLOCK_T, BLOCK_D, ANGLE_ALIGN,
                )  # fmt: skip
            _store(
                k, k_ptr, k_scale_ptr, first, h, row, stride_kb, stride_kh, stride_kn, stride_ksb, stride_ksh, stride_ksn,
                stored, offs_d, HEAD_DIM, CACHE_ALIGN,
            )  # fmt: skip
        for start_d in range(0, V_DIM, BLOCK_DV):
            offs_d = start_d + tl.arange(0, BLOCK_DV)
            start = b * stride_nvb + h * stride_nvh
            _, v = _read(new_v_ptr, start, stride_nvt, tokens, mask_t, offs_d, V_DIM, NEW_ALIGN)
            _store(
                v, v_ptr, v_scale_ptr, first, h, row, stride_vb, stride_vh, stride_vn, stride_vsb, stride_vsh, stride_vsn,
                stored, offs_d, V_DIM, CACHE_ALIGN,
            )  # fmt: skip
    elif new_q_ptr is not None:
        h = tl.cast(head - n_heads_kv, tl.int64)
        offs_d = tl.arange(0, BLOCK_D)
        start = b * stride_qb + h * stride_qh
        rows, q = _read(new_q_ptr, start, stride_qt, tokens, mask_t, offs_d, HEAD_DIM, NEW_ALIGN)
        q = _rotate(
            q, rows, cos_ptr, sin_ptr, stride_cos, stride_sin, positions, is_rotated,
            PAIRS, INTERLEAVED, BLOCK_T, BLOCK_D, ANGLE_ALIGN,
        )  # fmt: skip
        BITS: tl.constexpr = HEAD_DIM * (rotated_q_ptr.dtype.element_ty.primitive_bitwidth // 8) | 16  # lowest bit: alignment
        out_rows = tl.multiple_of(rotated_q_ptr + ((b * n_heads + h) * n_tokens + tokens) * HEAD_DIM, [BITS & -BITS])
        tl.store(out_rows[:, None] + offs_d[None, :], q, mask=mask_t[:, None] & (offs_d < HEAD_DIM)[None, :])


def kv_cache_update(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor,
    block_table: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Launches the kernel; no host sync. See `fastgpt.kv_cache_update`; v and its cache may have another head dim than k."""
    _launch(None, k, v, k_cache, v_cache, positions, None, None, None, False, block_table, k_scale, v_scale)


def rope_kv_cache_update(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, cos: Tensor, sin: Tensor,
    slots: Tensor | None = None, interleaved: bool = False,
    block_table: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launches the kernel; no host sync. See `fastgpt.rope_kv_cache_update`; v and its cache may have another head dim than k.
    Returns the rotated q (B, H, T, D), contiguous."""
    slots = positions if slots is None else slots
    return _launch(q, k, v, k_cache, v_cache, slots, positions, cos, sin, interleaved, block_table, k_scale, v_scale)


def _launch(q, k, v, k_cache, v_cache, slots, positions, cos, sin, interleaved, block_table, k_scale, v_scale):
    tensors = k, v, k_cache, v_cache, slots, block_table, k_scale, v_scale, q
    rotation = positions, cos, sin
    launch, of_out = plan(decide, (*tensors, *rotation), interleaved)
    out = None if q is None else q.new_empty_strided(*of_out)
    launch(*tensors, out, *rotation)
    return out


def decide(layouts: tuple, interleaved: bool) -> tuple[Callable, tuple | None]:
    """The launch for tensors with these layouts, and the shape and strides of the rotated q."""
    k, v, k_cache, v_cache, slots, block_table, k_scale, v_scale, q, positions, cos, sin = layouts
    B, H_kv, T, D = k.shape
    H = 0 if q is None else q.shape[1]
    n_pages, _, page = k_cache.shape[:3]
    capacity = page if block_table is None else page * block_table.shape[1]
    check_sizes(k=k, v=v, k_cache=k_cache, v_cache=v_cache, q=q)
    check_count("block_table", "keys in a sequence's pages", capacity)
    of_out = None if q is None else dense(B, H, T, D)
    if k.numel() == v.numel() == 0 and (q is None or q.numel() == 0):
        return no_launch, of_out
    constants = kernel_constants(
        D, v.shape[3], 0 if cos is None else cos.shape[1], interleaved, T > 1, k.element_size(),
        alignment(k, v, *(() if q is None else (q,))), alignment(k_cache, v_cache),
        WIDEST_ACCESS if cos is None else alignment(cos, sin), has_dependent_launch(k.device),
    )  # fmt: skip
    launch = Launch(
        update_cache_kernel, grid("k", cdiv(T, constants["BLOCK_T"]), B, H_kv + H), constants,
        *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        *((0, 0, 0, 0, 0, 0) if k_scale is None else (*k_scale.stride(), *v_scale.stride())),
        *slots.stride(), *((0, 0) if block_table is None else block_table.stride()),
        *((0,) * 7 if q is None else (*q.stride()[:3], *positions.stride(), cos.stride(0), sin.stride(0))),
        H, H_kv, T, capacity, max(page, 1), n_pages, 0 if cos is None else cos.shape[0],
    )  # fmt: skip
    return launch, of_out


def alignment(*tensors: Layout) -> int:
    """The widest access in bytes, a power of two up to WIDEST_ACCESS, that rows of all tensors are aligned for. The stride of a
    dimension of size 1 is never used and may be anything."""
    bits = WIDEST_ACCESS
    for x in tensors:
        bits |= x.data_ptr()
        for size, stride in zip(x.shape[:-1], x.stride()):
            if size > 1:
                bits |= stride * x.element_size()
    return bits & -bits


@functools.cache
def kernel_constants(
    head_dim: int, v_dim: int, pairs: int, interleaved: bool, several: bool, element_size: int,
    new_align: int, cache_align: int, angle_align: int, pdl: bool,
) -> Constants:  # fmt: skip
    """The compile-time arguments and options of `update_cache_kernel`; alignments are in bytes."""
    return Constants(
        HEAD_DIM=head_dim, V_DIM=v_dim, PAIRS=pairs, INTERLEAVED=interleaved, NEW_ALIGN=new_align, CACHE_ALIGN=cache_align,
        ANGLE_ALIGN=angle_align, **update_tile(head_dim, v_dim, several, element_size),
        maxnreg=255,  # without a limit of its own, ptxas spills some registers for higher occupancy
        enable_fp_fusion=False, **dependent_launch(pdl),
    )  # fmt: skip
