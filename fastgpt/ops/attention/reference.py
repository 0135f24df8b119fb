"""Attention in plain PyTorch."""

import math

import torch

from fastgpt.checks import require_flag
from fastgpt.ops.attention.call import Call, Packing
from fastgpt.ops.attention.checks import check_call, check_packing, check_pages, packed_call
from fastgpt.ops.dropout import keep_mask, seed_tensor
from fastgpt.ops.quantization import dequantize


def attention_reference(
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
    """The reference for `fastgpt.attention` in plain PyTorch: on every device, in every float dtype, float64 too, differentiable.

        out[b,h,i] = sum_j softmax_j(cap(scale * q[b,h,i]·k[b,h//g,j]) + ...) v[b,h//g,j],   g = H // H_kv

    It takes the same arguments and ignores impl. Scores and softmax are computed in at least fp32, and the (B, H, T, S) scores
    are materialized.

    Returns: out (B, H, T, D_v) in q's dtype; with return_lse the pair (out, lse), lse (B, H, T) in at least fp32.
    Raises: TypeError, ValueError as `fastgpt.attention`.
    """
    require_flag("return_lse", return_lse)
    call = Call(
        q, k, v, causal, scale, window, softcap, alibi_slopes, sinks, mask, bias, kv_lengths, block_table, k_scale,
        v_scale, dropout_p, dropout_seed,
    )  # fmt: skip
    call = check_call(call)
    check_pages(k, block_table, kv_lengths)
    return reference_of(call, return_lse)


def reference_of(call: Call, return_lse: bool, dropout_batch: int = 0) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """attention_reference of a checked call; dropout_batch: index of its first sequence, for the random numbers of dropout."""
    q, k, v, block_table = call.q, call.k, call.v, call.block_table
    out_dtype, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype), _keys(k, call.k_scale, block_table, dtype), _keys(v, call.v_scale, block_table, dtype)
    B, H, T, D = q.shape
    H_kv, S = k.shape[1], k.shape[2]
    scale = 1.0 / math.sqrt(D) if call.scale is None else call.scale

    key = torch.arange(S, device=q.device)
    query = torch.arange(T, device=q.device).unsqueeze(1)
    if call.kv_lengths is None:
        lengths = S
        hidden = torch.zeros(T, S, dtype=torch.bool, device=q.device)
    else:
        lengths = call.kv_lengths.clamp(0, S).view(B, 1, 1, 1)
        hidden = (key >= lengths).expand(B, 1, T, S)
    q_pos = query + lengths - T  # the query's position among the keys
    if call.causal:
        hidden = hidden | (key > q_pos)
    if call.window is not None:
        hidden = hidden | (key - q_pos <= -call.window)
    if call.mask is not None:
        hidden = hidden | ~call.mask
    if call.bias is not None:
        hidden = hidden | (call.bias == -torch.inf)

    if H != H_kv:
        k = k.repeat_interleave(H // H_kv, dim=1)  # (B, H, S, D)
        v = v.repeat_interleave(H // H_kv, dim=1)
    scores = _products(q * scale, k)  # (B, H, T, S)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.alibi_slopes is not None:
        scores = scores - call.alibi_slopes.to(dtype).view(H, 1, 1) * (q_pos - key).abs()
    if call.bias is not None:
        scores = scores + call.bias.to(dtype)
    hidden = hidden | (scores == -torch.inf)
    fully_masked = hidden.all(-1, keepdim=True)  # rows that see no key
    # Softmax over a row of -inf is NaN; such a row is zeroed below.
    scores = scores.masked_fill(hidden, -torch.inf).masked_fill(fully_masked, 0.0)
    if call.sinks is not None:
        sink = call.sinks.to(dtype).view(H, 1, 1).expand(B, H, T, 1).masked_fill(fully_masked, 0.0)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., :S].masked_fill(hidden, 0.0)
    kept = ~hidden
    if call.dropout_p > 0:
        keep = keep_mask(seed_tensor(call.dropout_seed, q.device), call.dropout_p, B, H, T, S, q.device, dropout_batch)
        weights, kept = weights * keep / (1.0 - call.dropout_p), kept & keep
    out = _weighted(weights, kept, v).to(out_dtype)
    if not return_lse:
        return out
    return out, scores.logsumexp(-1).masked_fill(fully_masked.squeeze(-1), -torch.inf).to(dtype)


def _products(q, k):
    """q (..., T, D) @ k (..., S, D)^T, with gradients that are not NaN for masked keys: their scores have gradient 0, and 0
    times infinity or NaN would be NaN."""
    finite_q, finite_k = (torch.where(x.isfinite(), x, 0.0) for x in (q, k))
    true = q.detach() @ k.detach().transpose(-2, -1)
    return torch.where(true.isfinite(), finite_q @ finite_k.transpose(-2, -1), true)


def _weighted(weights, seen, v):
    """weights (..., T, S) @ v (..., S, D_v), where infinities and NaN in v count only for queries that see them (..., T, S)."""
    infinite = torch.cat([v.isnan() | (v == torch.inf), v.isnan() | (v == -torch.inf)], dim=-1)
    up, down = (seen.to(v.dtype) @ infinite.to(v.dtype) > 0).chunk(2, dim=-1)
    beyond = torch.where(up, torch.inf, 0.0) - torch.where(down, torch.inf, 0.0)  # both: NaN
    return weights @ torch.where(v.isfinite(), v, 0.0) + beyond.to(v.dtype)


def _keys(x, scale, block_table, dtype):
    """Keys or values, gathered from pages and dequantized: (B, H_kv, S, head dim) in `dtype`."""
    if block_table is not None:
        index = block_table.clamp(0, x.shape[0] - 1).long()  # unused entries may be out of range
        # (B, pages, H_kv, page, head dim) -> (B, H_kv, pages * page, head dim); PyTorch cannot index float8
        x = x.view(torch.uint8)[index].view(x.dtype) if x.itemsize == 1 else x[index]
        x = x.transpose(1, 2).flatten(2, 3)
        scale = None if scale is None else scale[index].transpose(1, 2).flatten(2, 3)
    return x.to(dtype) if scale is None else dequantize(x, scale, dtype)


def attention_varlen_reference(
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
    """The reference for `fastgpt.attention_varlen` in plain PyTorch: `attention_reference` of each sequence in turn. On every
    device, in every float dtype, differentiable. It takes the same arguments and ignores impl.

    Returns: out (total_q, H, D_v) in q's dtype; with return_lse the pair (out, lse), lse (H, total_q) in at least fp32.
    Raises: TypeError, ValueError as `fastgpt.attention_varlen`.
    """
    require_flag("return_lse", return_lse)
    call = packed_call(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        dropout_p=dropout_p, dropout_seed=dropout_seed,
    )  # fmt: skip
    packing = check_packing(call, Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
    if call.dropout_p > 0:
        call = call._replace(dropout_seed=seed_tensor(call.dropout_seed, q.device))
    out, lse = varlen_reference_of(call, packing)
    out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def varlen_reference_of(call: Call, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    starts_q, starts_k = packing.cu_seqlens_q.tolist(), packing.cu_seqlens_k.tolist()
    outs, lses = [], []
    for b, (q0, q1, k0, k1) in enumerate(zip(starts_q, starts_q[1:], starts_k, starts_k[1:])):
        part = call._replace(q=call.q[:, :, q0:q1], k=call.k[:, :, k0:k1], v=call.v[:, :, k0:k1])
        out, lse = reference_of(part, return_lse=True, dropout_batch=b)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
