"""Attention, backward: two passes that recompute the weights from the saved log-sum-exp. Each program writes its own rows.

    p = exp(score - lse),   dp = dout · v^T,   ds = p (dp - delta),   delta = sum_j p dp - dlse
    dv = p^T · dout,   dk = scale ds^T · q,   dq = scale ds · k,   dbias = ds,   dsinks = sum exp(sink - lse) (-delta)

where ds is also multiplied by the soft cap's derivative on its way to dq and dk. A program of the first pass owns
BLOCK_M queries and walks over their keys; one of the second owns BLOCK_N keys of one key/value head and walks over the
queries that see them, head by head of its group. There are no atomic additions, so gradients are the same bits on every run.

The saved tensors are rounded: lse to fp32, which scales all weights of a row by the same error, and out, from which delta is
computed, to its dtype. The first pass, which sees whole rows, starts from them, but also sums p and p dp. From these sums it
stores a more accurate lse (in fp32, the factor 1 / sum p) and delta for the passes after it; in fp32 it also corrects dq.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2.
"""

import functools

import torch
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.architecture import architecture
from fastgpt.kernels.attention_arguments import (
    STRIDES,
    Extras,
    TileDescriptor,
    have_bulk_copies,
    strides,
    tile_of,
)
from fastgpt.kernels.attention_backward_bias import backward_bias
from fastgpt.kernels.attention_backward_keys import backward_keys
from fastgpt.kernels.attention_backward_queries import backward_queries
from fastgpt.kernels.attention_forward import INTERPRETED
from fastgpt.kernels.attention_rows import aligned_rows, load_rows
from fastgpt.kernels.launch import Constants, contiguous, kernel
from fastgpt.kernels.limits import cdiv, grid
from fastgpt.kernels.tiles import DELTA_ROWS, attention_tile, keys_table, padded_dim

WIDEST = 256  # head dim
# With wider heads, or with a feature beyond scale q·k, the pass over queries has no registers left for bulk copies (TMA).
BULK_HEAD_DIM = 128


DELTA_ARGUMENTS = [
    "dlse_ptr", "stride_ob", "stride_oh", "stride_om", "stride_gb", "stride_gh", "stride_gm", "stride_lb", "stride_lh",
    "n_heads", "n_queries",
]  # fmt: skip


@kernel(do_not_specialize=DELTA_ARGUMENTS)
def delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm, stride_lb, stride_lh, n_heads, n_queries,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (B, H, T): sum over the head dim of out · dout, minus the gradient of lse."""
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    pid = tl.program_id(0)
    start_m = pid % n_tiles * BLOCK_M
    b = tl.cast(pid // n_tiles // n_heads, tl.int64)
    h = tl.cast(pid // n_tiles % n_heads, tl.int64)
    rows = tl.arange(0, BLOCK_M)
    n_rows = n_queries - start_m
    start = tl.cast(start_m, tl.int64)
    out_ptr = tl.multiple_of(out_ptr + b * stride_ob + h * stride_oh + start * stride_om, 16)
    dout_ptr = tl.multiple_of(dout_ptr + b * stride_gb + h * stride_gh + start * stride_gm, 16)
    out = load_rows(out_ptr, stride_om, rows, n_rows, V_DIM, BLOCK_V, MASK_ROWS=True).to(tl.float32)
    dout = load_rows(dout_ptr, stride_gm, rows, n_rows, V_DIM, BLOCK_V, MASK_ROWS=True).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    at = b * stride_lb + h * stride_lh + start + rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=rows < n_rows, other=0.0)
    tl.store(delta_ptr + at, delta, mask=rows < n_rows)


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool = True,
    scale: float, window: int | None = None, softcap: float | None = None, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, mask: Tensor | None = None, bias: Tensor | None = None, kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    needs_dbias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Launches the passes: dq, dk, dv in the dtypes and shapes of q, k, v; dbias in that of bias, or None; dsinks or None.

    Args: dout (B, H, T, D_v) and dlse (B, H, T) or None, the gradients of out and lse that `attention_forward` returned;
        the rest as it took them, with D and D_v up to 256. No host sync.
    Raises: ValueError for wider heads.
    """
    if INTERPRETED and q.dtype is torch.bfloat16:  # as in attention_forward
        options = {name: value for name, value in locals().items() if name not in ("dout", "dlse", "q", "k", "v", "out", "lse")}
        grads = attention_backward(dout.float(), dlse, q.float(), k.float(), v.float(), out.float(), lse, **options)
        return (*(grad.bfloat16() for grad in grads[:3]), *grads[3:])

    B, H, T, D = q.shape
    H_kv, S, D_v = v.shape[1:]
    if max(D, D_v) > WIDEST:
        raise ValueError(f"q: expected head dims up to {WIDEST} of q, k and v, got {D} and {D_v}")
    packed = cu_seqlens_q is not None
    # No program writes the rows past the last of packed sequences.
    dq, dk, dv = (torch.zeros_like(x) if packed else torch.empty_like(x) for x in (q, k, v))
    dbias = torch.zeros_like(bias, memory_format=torch.contiguous_format) if needs_dbias else None
    if dq.numel() == 0 or dk.numel() == 0:
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias, dsinks
    q, k, v, dout, out = (aligned_rows(x) for x in (q, k, v, dout, out))
    lse = lse.contiguous()
    sinks, dlse, alibi_slopes, kv_lengths = map(contiguous, (sinks, dlse, alibi_slopes, kv_lengths))
    cu_seqlens_q, cu_seqlens_k = contiguous(cu_seqlens_q), contiguous(cu_seqlens_k)
    delta, norm, shift = (torch.empty_like(lse) for _ in range(3))

    extras = Extras(q, k, window, softcap, alibi_slopes, None, mask, bias, kv_lengths, None, None, None, dropout_p,
                    dropout_seed, cu_seqlens_q, cu_seqlens_k)  # fmt: skip
    with_extras = "with_extras " if extras.with_extras else ""
    flags = D, D_v, q.element_size(), causal, window is not None, softcap is not None, *extras.units
    bulk = have_bulk_copies(q, k, v, dout)
    of_keys = kernel_constants(keys_table(causal, extras.with_extras, packed), architecture(q.device) if bulk else 80, *flags)
    bulk_of_keys = bulk_tiles(of_keys, q, dout) if bulk else dict.fromkeys(("q_desc", "dout_desc"))
    bulk = bulk and not with_extras and max(D, D_v) <= BULK_HEAD_DIM
    table, arch = with_extras + "queries", architecture(q.device) if bulk else 80
    of_queries = kernel_constants(table, arch, *flags)
    bulk_of_queries = dict.fromkeys(("q_desc", "dout_desc", "k_desc", "v_desc"))
    if bulk:
        block_n, block_d, block_v = (of_queries[name] for name in ("BLOCK_N", "BLOCK_D", "BLOCK_V"))
        bulk_of_queries = bulk_tiles(of_queries, q, dout)
        bulk_of_queries["k_desc"] = TileDescriptor(k, tile_of(k, block_n, block_d, D))
        bulk_of_queries["v_desc"] = TileDescriptor(v, tile_of(v, block_n, block_v, D_v))
    n_queries, n_keys = (T, S) if not packed else (min(max_seqlen_q, T), min(max_seqlen_k, S))
    batch = cu_seqlens_q.shape[0] - 1 if packed else B
    m_tiles = cdiv(n_queries, of_queries["BLOCK_M"])
    names = ("kv_lengths_ptr", "cu_q_ptr", "cu_k_ptr", "alibi_ptr", "mask_ptr", "bias_ptr", "seed_ptr")
    skipped = ("stride_t", "stride_ks", "stride_vs", "page", "n_pages", "n_keys")
    common = {name: extras.tensors[name] for name in names}
    numbers = dict(zip(STRIDES, extras.strides)) | extras.numbers
    common |= {name: value for name, value in numbers.items() if not name.startswith(skipped)}
    common |= {**strides(q, "q", "bhm", packed), **strides(k, "k", "bhn", packed), **strides(v, "v", "bhn", packed)}
    common |= {**strides(dout, "g", "bhm", packed), **strides(lse, "l", "bh", packed)}
    common |= {"n_heads": H, "group": H // H_kv, "n_queries": n_queries, "n_keys": n_keys, "scale": float(scale)}
    delta_kernel.launch(
        grid("q", cdiv(T, DELTA_ROWS), B, H), delta_constants(D_v),
        out, dout, dlse, delta, **strides(out, "o", "bhm"), **strides(dout, "g", "bhm"), **strides(lse, "l", "bh"),
        n_heads=H, n_queries=T,
    )  # fmt: skip
    backward_queries.launch(
        grid("q", m_tiles, batch, H), of_queries,
        q, k, v, dout, lse, dlse, shift, delta, norm, dq, sinks_ptr=sinks, **strides(dq, "dq", "bhm", packed), **common,
        **bulk_of_queries,
    )  # fmt: skip
    backward_keys.launch(
        grid("k", cdiv(n_keys, of_keys["BLOCK_N"]), batch, H_kv), of_keys,
        q, k, v, dout, shift, delta, norm, dk, dv, **strides(dk, "dk", "bhn", packed),
        **strides(dv, "dv", "bhn", packed), **common, **bulk_of_keys,
    )  # fmt: skip
    if needs_dbias:
        shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        one_row, one_column = shape[2] == 1, shape[3] == 1
        n_tiles = cdiv(n_keys, of_queries["BLOCK_N"])
        tiles = shape[0], shape[1], 1 if one_row else m_tiles, 1 if one_column else n_tiles
        backward_bias.launch(
            grid("bias", *tiles), bias_constants(one_row, one_column, table, arch, *flags),
            q, k, v, dout, shift, delta, norm, dbias, **strides(dbias.view(shape), "db", "bhmn"),
            n_batch=B, bias_batch=shape[0], bias_heads=shape[1], m_tiles=m_tiles, n_tiles=n_tiles,
            **{name: value for name, value in common.items() if not name.startswith("cu_")},
        )  # fmt: skip
    dsinks = None
    if sinks is not None:
        # A fully masked row contributes nothing; for rows past the last sequence no program writes a norm.
        weight = (sinks.double().view(-1, 1) - lse).exp()  # (B, H, T)
        dsinks = -(weight * norm * delta).masked_fill(lse == -torch.inf, 0.0).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks


def bulk_tiles(constants: Constants, q: Tensor, dout: Tensor) -> dict[str, TileDescriptor]:
    """Descriptors of the tiles of q and dout that a kernel with these constants copies in bulk."""
    rows = constants["BLOCK_M"]
    return {
        "q_desc": TileDescriptor(q, tile_of(q, rows, constants["BLOCK_D"], constants["HEAD_DIM"])),
        "dout_desc": TileDescriptor(dout, tile_of(dout, rows, constants["BLOCK_V"], constants["V_DIM"])),
    }


@functools.cache
def delta_constants(v_dim: int) -> Constants:
    """The compile-time arguments and options of `delta_kernel`."""
    return Constants(V_DIM=v_dim, BLOCK_V=padded_dim(v_dim), BLOCK_M=DELTA_ROWS, enable_fp_fusion=True)


@functools.cache
def kernel_constants(
    tiles: str,
    arch: int,
    head_dim: int,
    v_dim: int,
    element_size: int,
    causal: bool,
    has_window: bool = False,
    has_softcap: bool = False,
    mask_unit: int = 0,
    bias_unit: int = 0,
) -> Constants:
    """The compile-time arguments and options of the pass whose tiles are in this table of `tiles.ATTENTION`."""
    tile = attention_tile(tiles, head_dim, v_dim, element_size, arch)
    return Constants(
        HEAD_DIM=head_dim, BLOCK_D=padded_dim(head_dim), V_DIM=v_dim, BLOCK_V=padded_dim(v_dim),
        IS_CAUSAL=causal, HAS_WINDOW=has_window, HAS_SOFTCAP=has_softcap, MASK_UNIT=mask_unit, BIAS_UNIT=bias_unit,
        # Without a limit of its own, ptxas spills some registers for higher occupancy.
        **tile._asdict(), enable_fp_fusion=True, maxnreg=255,
    )  # fmt: skip


@functools.cache
def bias_constants(one_row: bool, one_column: bool, *of_queries) -> Constants:
    """The compile-time arguments and options of `backward_bias`, whose tiles are those of the pass over the queries."""
    return Constants(**kernel_constants(*of_queries), ONE_ROW=one_row, ONE_COLUMN=one_column)
