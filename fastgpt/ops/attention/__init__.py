"""The attention operations: their contracts, and the choice of implementation."""

import math

import torch

from fastgpt.checks import argument_error, is_fake, require_flag
from fastgpt.ops.attention import operators
from fastgpt.ops.attention.autograd import FusedAttention, savable
from fastgpt.ops.attention.call import Call, Packing, varlen_arguments
from fastgpt.ops.attention.checks import check_call, check_packing, check_pages, packed_call
from fastgpt.ops.attention.reference import (
    attention_reference,
    attention_varlen_reference,
    reference_of,
    varlen_reference_of,
)
from fastgpt.ops.attention.refusals import IMPLEMENTATIONS, VARLEN_IMPLEMENTATIONS, needs_gradients
from fastgpt.ops.dropout import seed_tensor
from fastgpt.ops.implementations import choose, explain_call

__all__ = ["attention", "attention_reference", "attention_varlen", "attention_varlen_reference", "explain", "explain_varlen"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over keys and values, computed tile by tile.

        out[b,h,i] = sum_j softmax_j(score[b,h,i,j]) v[b,h//g,j],   g = H // H_kv
        score[b,h,i,j] = cap(scale * q[b,h,i]·k[b,h//g,j])
                         - alibi_slopes[h] |i + L - T - j| + bias[b,h,i,j]
        cap(x) = softcap * tanh(x / softcap),   L = kv_lengths[b] or S
        query i is at position i + L - T

    over the keys j that causal, window, kv_lengths and mask allow for query i; a bias of -inf masks a key, too. On a CPU and in
    the reference, masked keys and values do not affect results or gradients even if they are NaN. On CUDA, infinities and NaN in
    v may reach the results of queries that do not attend to them, if another query of a head that shares v does; and gradients
    are protected from keys past kv_lengths only.

    Args:
        q: (B, H, T, D) fp16|bf16|fp32, D <= 576, last dimension contiguous, other strides free. fp64 too, which only the
            reference serves.
        k: (B, H_kv, S, D), or with a block table a pool of pages (num_pages, H_kv, page, D); dtype of q, or int8 or
            float8_e4m3fn with scales; last dimension contiguous. H must be a multiple of H_kv.
        v: (B, H_kv, S, D_v), or with a block table (num_pages, H_kv, page, D_v); dtype of k, D_v <= 576.
        causal: bottom-right aligned: query i sees key j when j <= i + L - T.
            T=2, L=5 attends  1 1 1 1 0
                              1 1 1 1 1
        scale: factor on q·k; default 1 / sqrt(D).
        window: query i sees only keys with j > i + L - T - window: if causal, the last `window` keys, its own position
            included.
            T=2, L=5, window=2 attends  0 0 1 1 0
                                        0 0 0 1 1
        softcap: bound on the scaled scores, from 2^-126 to 2^126.
        alibi_slopes: (H,) fp32, penalty for each token of distance (ALiBi, arXiv 2108.12409).
        sinks: (H,), floating point: for each head one more logit in the denominator of the softmax, without a value. Included
            in lse. Differentiable.
        mask: bool, broadcastable to (B, H, T, S); True attends.
        bias: in the dtype of q or fp32, broadcastable to (B, H, T, S), added to the scores. Differentiable.
        kv_lengths: (B,) int32 on q's device: the number of keys of each sequence, for a cache with capacity S. Keys from there
            on are never read. A value outside [0, S] is clamped to that range.
        block_table: (B, pages) int32 on q's device. Key j of sequence b is in row j % page of page
            block_table[b, j // page]; S is then pages · page. Entries past kv_lengths are not read.
        k_scale, v_scale: (B, H_kv, S), or (num_pages, H_kv, page) with a block table, fp32: the key at j is
            k_scale[b,h,j] · k[b,h,j]. `kv_cache_update` writes them.
        dropout_p: probability, 0 <= dropout_p < 1, with which each weight of the softmax is zeroed; the others are divided by
            1 - dropout_p. lse does not depend on it.
        dropout_seed: an integer in [0, 2^63), or a (1,) int64 tensor, which determines the dropout mask, the same on every
            device and in every implementation; None draws one from PyTorch's CPU generator.
        return_lse: also return the log-sum-exp of the scores of each query. Differentiable.
        impl: "cpp" (CPU), "triton" (CUDA) or "reference"; None picks the first that can serve the call. A named
            implementation never falls back: it raises ValueError with the reason. `fastgpt.explain` shows the choice.

    Returns:
        out (B, H, T, D_v) in q's dtype; with return_lse the pair (out, lse), lse (B, H, T) fp32, natural log.
        A query that attends to no key gives zeros, lse = -inf and zero gradients.

    Gradients with respect to q, k, v, bias and sinks come from the kernels. The reference, which materializes the (B, H, T, S)
    scores, computes all others: with respect to alibi_slopes and scales, through a block table, in forward mode, under
    transforms of torch.func, and double backward (create_graph).

    Raises: TypeError (not a tensor, dtype), ValueError (shape, stride, device, range, impl; on CPU a page outside the
        pool): argument, expected, got.
    Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.

    >>> q, k, v = torch.randn(1, 8, 3, 64), torch.randn(1, 2, 5, 64), torch.randn(1, 2, 5, 64)
    >>> attention(q, k, v, window=4).shape
    torch.Size([1, 8, 3, 64])
    """
    call = Call(
        q, k, v, causal, scale, window, softcap, alibi_slopes, sinks, mask, bias, kv_lengths, block_table, k_scale,
        v_scale, dropout_p, dropout_seed,
    )  # fmt: skip
    # PyTorch's dispatcher would accept causal=None, and True for a number.
    if not (
        type(causal) is bool and type(dropout_p) is float and (scale is None or type(scale) is float)
        and (window is None or type(window) is int) and (softcap is None or type(softcap) is float)
        and dropout_seed is None and type(return_lse) is bool
    ):  # fmt: skip
        require_flag("return_lse", return_lse)
        call = check_call(call)
        if call.dropout_p == 0:
            call = call._replace(dropout_seed=None)
        scale, dropout_p = call.scale, call.dropout_p
    try:
        chosen = choose("attention", IMPLEMENTATIONS, impl, call)
        if chosen == "reference" or dropout_p > 0:  # kernels check everything but the seed themselves
            call = check_call(call)
        if dropout_p > 0:
            call = call._replace(dropout_seed=seed_tensor(dropout_seed, q.device))
        if chosen == "reference":
            check_pages(k, block_table, kv_lengths)
            return reference_of(call, return_lse)
        if scale is None:
            call = call._replace(scale=1.0 / math.sqrt(q.shape[-1]))
        out, lse = FusedAttention.apply(*savable(call), None) if needs_gradients(call) else operators.attention_forward(*call)
    except Exception as error:
        check_call(call)  # raises the error that names the argument
        check_pages(k, block_table, kv_lengths)
        raise argument_error(error)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention within sequences of different lengths, packed one after the other without padding.

    Each sequence b is computed as `attention` computes q[cu_seqlens_q[b] : cu_seqlens_q[b+1]] and
    k, v[cu_seqlens_k[b] : cu_seqlens_k[b+1]], with dimensions 0 and 1 exchanged.

    Args:
        q: (total_q, H, D) fp16|bf16|fp32, D <= 576, last dimension contiguous, other strides free. fp64 too, which only the
            reference serves.
        k: (total_k, H_kv, D), dtype of q. H must be a multiple of H_kv.
        v: (total_k, H_kv, D_v), dtype of q, D_v <= 576.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 on q's device, ascending from 0 to total_q and total_k.
        max_seqlen_q, max_seqlen_k: at least the number of queries and keys of the longest sequence.
        causal, scale, window, softcap, alibi_slopes, sinks, dropout_p, dropout_seed: as in `attention`; causal masks and windows
            are aligned to the last key of each sequence.
        return_lse: also return the log-sum-exp of the scores of each query. Differentiable.
        impl: "cpp" (CPU), "triton" (CUDA) or "reference"; None picks the first that can serve the call.

    Returns: out (total_q, H, D_v) in q's dtype; with return_lse the pair (out, lse), lse (H, total_q) fp32, natural log.
    Raises: TypeError (not a tensor, dtype), ValueError (shape, stride, device, range, impl; on CPU also cu_seqlens that do not
        ascend from 0 to the total, or a longer sequence than max_seqlen): argument, expected, got.

    >>> q, k, v = torch.randn(3, 12, 4, 64)  # sequences of 5 and 7 tokens
    >>> bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    >>> attention_varlen(q, k, v, bounds, bounds, 7, 7).shape
    torch.Size([12, 4, 64])
    """
    require_flag("return_lse", return_lse)
    call = packed_call(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        dropout_p=dropout_p, dropout_seed=dropout_seed,
    )  # fmt: skip
    packing = check_packing(call, Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
    chosen = choose("attention_varlen", VARLEN_IMPLEMENTATIONS, impl, call)
    call = call._replace(dropout_seed=seed_tensor(dropout_seed, q.device) if call.dropout_p > 0 else None)
    if scale is None:
        call = call._replace(scale=1.0 / math.sqrt(q.shape[-1]))
    if chosen == "reference" and not cu_seqlens_q.is_meta and not is_fake(cu_seqlens_q):  # of which it would read the data
        out, lse = varlen_reference_of(call, packing)
    elif needs_gradients(call):
        out, lse = FusedAttention.apply(*savable(call), savable(packing))
    else:
        out, lse = operators.attention_varlen_forward(*packing, *varlen_arguments(call))
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)  # (total_q, H, D_v), (H, total_q)
    return (out, lse) if return_lse else out


def explain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool = False, impl: str | None = None, **options
) -> dict[str, str]:
    """Implementation -> "chosen", "available", or why it refuses this call."""
    require_flag("return_lse", return_lse)
    return explain_call(IMPLEMENTATIONS, check_call(Call(q, k, v, **options)), impl=impl)


def explain_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool = False,
    impl: str | None = None,
    **options,
) -> dict[str, str]:
    """`explain` for attention_varlen."""
    require_flag("return_lse", return_lse)
    call = packed_call(q, k, v, **options)
    check_packing(call, Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
    return explain_call(VARLEN_IMPLEMENTATIONS, call, impl=impl)
