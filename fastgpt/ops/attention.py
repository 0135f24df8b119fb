"""The attention operation: contract, input checks, reference, and choice of implementation."""

import math
from typing import NamedTuple

import torch

from fastgpt.checks import (
    argument_error,
    require_broadcastable,
    require_device,
    require_dtype,
    require_flag,
    require_integer,
    require_last_dim_contiguous,
    require_number,
    require_shape,
    require_tensor,
)
from fastgpt.ops.derivatives import TRANSFORMED, transforms_active
from fastgpt.ops.dropout import keep_mask, seed_tensor
from fastgpt.ops.implementations import choose, explain_call, runs_elsewhere, triton_unusable
from fastgpt.ops.library import library, without_autograd
from fastgpt.ops.quantization import QUANTISED_DTYPES, dequantise

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 576  # of keys and of values, which may differ: MLA (arXiv 2405.04434) has 576 and 512, or 192 and 128
TRITON_MAX_DIFFERENTIABLE_DIM = 256
# Kernels compute in fp32: a scale fits, and neither a soft cap nor its inverse is subnormal.
LARGEST_SCALE = torch.finfo(torch.float32).max
SOFTCAPS = 2.0**-126, 2.0**126


class Call(NamedTuple):
    """The arguments of `attention` that decide what it computes."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: int | torch.Tensor | None = None


class Packing(NamedTuple):
    """Where packed sequences begin and end: the arguments that attention_varlen has beyond those of attention."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_q: int
    max_k: int


def attention(
    q, k, v,
    *, causal=True, scale=None, window=None, softcap=None, alibi_slopes=None, sinks=None, mask=None, bias=None,
    kv_lengths=None, block_table=None, k_scale=None, v_scale=None, dropout_p=0.0, dropout_seed=None,
    return_lse=False, impl=None,
):  # fmt: skip
    """Softmax attention over keys and values, computed tile by tile.

        out[b,h,i] = sum_j softmax_j(score[b,h,i,j]) v[b,h//g,j],   g = H // H_kv
        score[b,h,i,j] = cap(scale * q[b,h,i]·k[b,h//g,j]) - alibi_slopes[h] |i + L - T - j| + bias[b,h,i,j]
        cap(x) = softcap * tanh(x / softcap),   L = kv_lengths[b] or S: query i is at position i + L - T

    over the keys j that causal, window, kv_lengths and mask leave to query i, and whose score is above -inf: a bias of -inf
    hides a key as a mask does. On a CPU and in the reference, what a query does not see does not reach its results, nor
    either's gradients, even where it is NaN; on CUDA that holds for keys past kv_lengths and pages that are not read.

    Args:
        q: (B, H, T, D) fp16|bf16|fp32, D <= 576, last dimension contiguous, other strides free. fp64 too, which only the
            reference serves.
        k: (B, H_kv, S, D), or with a block table a pool of pages (num_pages, H_kv, page, D); device of q, and its dtype, or
            int8 or float8_e4m3fn with scales; H must be a multiple of H_kv.
        v: (B, H_kv, S, D_v), or with a block table (num_pages, H_kv, page, D_v); as k, but for its head dim: D_v <= 576.
        causal: bottom-right aligned: query i sees key j when j <= i + L - T.
            T=2, L=5 attends  1 1 1 1 0
                              1 1 1 1 1
        scale: factor on q·k; default 1 / sqrt(D).
        window: query i sees only keys with j > i + L - T - window: if causal, the last `window` ones, that at its own
            position included. window=2 attends  0 0 1 1 0
                                                 0 0 0 1 1
        softcap: bound on the scaled scores, from 2^-126 to 2^126.
        alibi_slopes: (H,) fp32, a penalty on distance (arXiv 2108.12409).
        sinks: (H,), floating point: one more logit a head in the softmax's denominator, which attends to nothing. It
            counts in lse. Differentiable.
        mask: bool, broadcastable to (B, H, T, S); where it is False, a query does not see a key.
        bias: in the dtype of q or fp32, broadcastable to (B, H, T, S), added to the scores. Differentiable.
        kv_lengths: (B,) int32 on q's device, each in [0, S]; keys at and past it are never read. This is how a
            cache of capacity S is attended. A value outside [0, S] is clamped to that range.
        block_table: (B, pages) int32 on q's device. Key j of sequence b lies in row j % page of page
            block_table[b, j // page]; S is then pages · page. Entries past kv_lengths may be anything.
        k_scale, v_scale: (B, H_kv, S), or (num_pages, H_kv, page) with a block table, fp32: key j stands for
            k_scale[b,h,j] · k[b,h,j]. See `kv_cache_update`, which writes them.
        dropout_p: each weight of the softmax is dropped with this probability, the others divided by 1 - dropout_p.
            lse does not know of it. 0 <= dropout_p < 1.
        dropout_seed: an integer in [0, 2^63), or a (1,) int64 tensor, that decides which weights, on every device and in
            every implementation the same; None draws one from PyTorch's CPU generator.
        return_lse: also return the log-sum-exp of each row's scores. Differentiable.
        impl: "cpp" (CPU), "triton" (CUDA) or "reference"; None picks the first that can serve the call. A named
            one never falls back: it raises ValueError with the reason. `fastgpt.explain` tells without running.

    Returns:
        out (B, H, T, D_v) in q's dtype; with return_lse the pair (out, lse), lse (B, H, T) fp32, natural log.
        A row that sees no key gives zeros, lse = -inf and zero gradients.

    Gradients by q, k, v, bias and sinks come from the kernels; the reference, whose scores take memory in T · S, serves all
    other derivatives: by alibi_slopes and scales, through a block table, forward mode, transforms of torch.func, and
    gradients that are themselves differentiated (create_graph).

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
    # What PyTorch's dispatcher would take for something else: it has causal=None, and True for a number.
    if not (
        type(causal) is bool and type(dropout_p) is float and (scale is None or type(scale) is float)
        and (window is None or type(window) is int) and (softcap is None or type(softcap) is float)
        and dropout_seed is None and type(return_lse) is bool
    ):  # fmt: skip
        require_flag("return_lse", return_lse)
        call = _check(call)
        if call.dropout_p == 0:
            call = call._replace(dropout_seed=None)
        scale, dropout_p = call.scale, call.dropout_p
    try:
        chosen = choose("attention", IMPLEMENTATIONS, impl, call)
        if chosen == "reference" or dropout_p > 0:  # kernels check for themselves all but the seed
            call = _check(call)
        if dropout_p > 0:
            call = call._replace(dropout_seed=seed_tensor(dropout_seed, q.device))
        if chosen == "reference":
            _check_pages(k, block_table, kv_lengths)
            return _reference(call, return_lse)
        if scale is None:
            call = call._replace(scale=1.0 / math.sqrt(q.shape[-1]))
        out, lse = _Attention.apply(*_savable(call)) if _needs_gradients(call) else _attention_forward(*call)
    except Exception as error:
        _check(call)  # raises the error that names the argument
        _check_pages(k, block_table, kv_lengths)
        raise argument_error(error)
    return (out, lse) if return_lse else out


def attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k,
    *, causal=True, scale=None, window=None, softcap=None, alibi_slopes=None, sinks=None, dropout_p=0.0,
    dropout_seed=None, return_lse=False, impl=None,
):  # fmt: skip
    """`attention` of sequences of different lengths, packed one after the other without padding.

    Args:
        q: (total_q, H, D); k: (total_k, H_kv, D); v: (total_k, H_kv, D_v). Sequence b has rows cu_seqlens_q[b] to
            cu_seqlens_q[b+1] of q, and cu_seqlens_k[b] to cu_seqlens_k[b+1] of k and v.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 on q's device, ascending from 0 to total_q and total_k.
        max_q, max_k: at least the queries and keys of the longest sequence.
        The rest: as in `attention`, within each sequence.

    Returns: out (total_q, H, D_v); with return_lse the pair (out, lse), lse (H, total_q) fp32.
    Raises: TypeError, ValueError as `attention`; on CPU also for cu_seqlens that are not as above.
    """
    require_flag("return_lse", return_lse)
    call = _packed_call(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        dropout_p=dropout_p, dropout_seed=dropout_seed,
    )  # fmt: skip
    packing = _check_packing(call, Packing(cu_seqlens_q, cu_seqlens_k, max_q, max_k))
    chosen = choose("attention_varlen", VARLEN_IMPLEMENTATIONS, impl, call)
    call = call._replace(dropout_seed=seed_tensor(dropout_seed, q.device) if call.dropout_p > 0 else None)
    if scale is None:
        call = call._replace(scale=1.0 / math.sqrt(q.shape[-1]))
    if chosen == "reference":
        out, lse = _varlen_reference(call, packing)
    else:
        out, lse = (
            _VarlenAttention.apply(_savable(packing), *_savable(call)) if _needs_gradients(call)
            else _attention_varlen_forward(*packing, *_varlen_arguments(call))
        )  # fmt: skip
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)  # (total_q, H, D_v), (H, total_q)
    return (out, lse) if return_lse else out


def attention_varlen_reference(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k,
    *, causal=True, scale=None, window=None, softcap=None, alibi_slopes=None, sinks=None, dropout_p=0.0,
    dropout_seed=None, return_lse=False, impl=None,
):  # fmt: skip
    """The same function in plain PyTorch: `attention_reference` of one sequence after the other."""
    require_flag("return_lse", return_lse)
    call = _packed_call(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        dropout_p=dropout_p, dropout_seed=dropout_seed,
    )  # fmt: skip
    packing = _check_packing(call, Packing(cu_seqlens_q, cu_seqlens_k, max_q, max_k))
    if call.dropout_p > 0:
        call = call._replace(dropout_seed=seed_tensor(call.dropout_seed, q.device))
    out, lse = _varlen_reference(call, packing)
    out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def _packed_call(q, k, v, **options) -> Call:
    """Checked; q, k, v as (1, heads, total, head dim): one sequence whose batch dimension does not count."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x, 3)
    return _check(Call(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), **options))


def _varlen_reference(call: Call, packing: Packing):
    starts_q, starts_k = packing.cu_seqlens_q.tolist(), packing.cu_seqlens_k.tolist()
    outs, lses = [], []
    for b, (q0, q1, k0, k1) in enumerate(zip(starts_q, starts_q[1:], starts_k, starts_k[1:])):
        part = call._replace(q=call.q[:, :, q0:q1], k=call.k[:, :, k0:k1], v=call.v[:, :, k0:k1])
        out, lse = _reference(part, return_lse=True, dropout_batch=b)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _check_packing(call: Call, packing: Packing) -> Packing:
    """The packing with plain integers; raises TypeError or ValueError for what does not fit the call."""
    packing = packing._replace(
        max_q=require_integer("max_q", packing.max_q, 0, 2**63 - 1), max_k=require_integer("max_k", packing.max_k, 0, 2**63 - 1)
    )
    require_tensor("cu_seqlens_q", packing.cu_seqlens_q, 1)
    for name, total in (("cu_seqlens_q", call.q.shape[2]), ("cu_seqlens_k", call.k.shape[2])):
        x = getattr(packing, name)
        require_tensor(name, x, 1)
        require_dtype(name, x, (torch.int32,))
        require_device(name, x, call.q.device)
        if x.shape != packing.cu_seqlens_q.shape or len(x) < 2:
            raise ValueError(f"{name}: expected shape (B + 1,), B >= 1, as the other one, got {tuple(x.shape)}")
        longest = packing.max_q if name == "cu_seqlens_q" else packing.max_k
        if x.device.type == "cpu":
            lengths = x.diff()
            if x[0] != 0 or x[-1] != total or (lengths < 0).any():
                raise ValueError(f"{name}: expected numbers that ascend from 0 to {total}, got {x.tolist()}")
            if lengths.max() > longest:
                limit = "max_q" if name == "cu_seqlens_q" else "max_k"
                raise ValueError(f"{limit}: expected at least {lengths.max().item()}, the longest sequence, got {longest}")
    return packing


def attention_reference(
    q, k, v,
    *, causal=True, scale=None, window=None, softcap=None, alibi_slopes=None, sinks=None, mask=None, bias=None,
    kv_lengths=None, block_table=None, k_scale=None, v_scale=None, dropout_p=0.0, dropout_seed=None,
    return_lse=False, impl=None,
):  # fmt: skip
    """The same function in plain PyTorch: every device, every float dtype (float64 too), differentiable.

    Scores and softmax are computed in fp32 at least. Holds the (B, H, T, S) scores in memory.
    """
    require_flag("return_lse", return_lse)
    call = Call(
        q, k, v, causal, scale, window, softcap, alibi_slopes, sinks, mask, bias, kv_lengths, block_table, k_scale,
        v_scale, dropout_p, dropout_seed,
    )  # fmt: skip
    call = _check(call)
    _check_pages(k, block_table, kv_lengths)
    return _reference(call, return_lse)


def _reference(call: Call, return_lse: bool, dropout_batch: int = 0):
    """dropout_batch: what the first sequence counts as in dropout's random numbers."""
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
    own = query + lengths - T  # the query's position among the keys
    if call.causal:
        hidden = hidden | (key > own)
    if call.window is not None:
        hidden = hidden | (key - own <= -call.window)
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
        scores = scores - call.alibi_slopes.to(dtype).view(H, 1, 1) * (own - key).abs()
    if call.bias is not None:
        scores = scores + call.bias.to(dtype)
    hidden = hidden | (scores == -torch.inf)
    blind = hidden.all(-1, keepdim=True)  # rows that see no key
    # Softmax over a row of -inf is NaN; such a row is zeroed below.
    scores = scores.masked_fill(hidden, -torch.inf).masked_fill(blind, 0.0)
    if call.sinks is not None:
        sink = call.sinks.to(dtype).view(H, 1, 1).expand(B, H, T, 1).masked_fill(blind, 0.0)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., :S].masked_fill(hidden, 0.0)
    kept = ~hidden
    if call.dropout_p > 0:
        keep = keep_mask(seed_tensor(call.dropout_seed, q.device), call.dropout_p, B, H, T, S, q.device, dropout_batch)
        weights, kept = weights * keep / (1.0 - call.dropout_p), kept & keep
    out = _weighted(weights, kept, v).to(out_dtype)
    if not return_lse:
        return out
    return out, scores.logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf).to(dtype)


def _products(q, k):
    """q (..., T, D) · k (..., S, D), whose gradients do not meet what is not finite: of a score that nobody uses they are 0,
    and 0 times infinity or NaN would be NaN."""
    finite_q, finite_k = (torch.where(x.isfinite(), x, 0.0) for x in (q, k))
    true = q.detach() @ k.detach().transpose(-2, -1)
    return torch.where(true.isfinite(), finite_q @ finite_k.transpose(-2, -1), true)


def _weighted(weights, seen, v):
    """weights (..., T, S) · v (..., S, D_v), of what is not finite in v only what is seen (..., T, S)."""
    infinite = torch.cat([v.isnan() | (v == torch.inf), v.isnan() | (v == -torch.inf)], dim=-1)
    up, down = (seen.to(v.dtype) @ infinite.to(v.dtype) > 0).chunk(2, dim=-1)
    beyond = torch.where(up, torch.inf, 0.0) - torch.where(down, torch.inf, 0.0)  # both: NaN
    return weights @ torch.where(v.isfinite(), v, 0.0) + beyond.to(v.dtype)


def _keys(x, scale, block_table, dtype):
    """Keys or values as the numbers they stand for: (B, H_kv, S, head dim) in `dtype`."""
    if block_table is not None:
        index = block_table.clamp(0, x.shape[0] - 1).long()  # entries that are never read may be anything
        # (B, pages, H_kv, page, head dim) -> (B, H_kv, pages * page, head dim); float8 has no indexing
        x = x.view(torch.uint8)[index].view(x.dtype) if x.itemsize == 1 else x[index]
        x = x.transpose(1, 2).flatten(2, 3)
        scale = None if scale is None else scale[index].transpose(1, 2).flatten(2, 3)
    return x.to(dtype) if scale is None else dequantise(x, scale, dtype)


def _check(call: Call) -> Call:
    """The call with plain numbers; raises TypeError or ValueError, named after the argument, for what the contract excludes."""
    q, k, v, block_table = call.q, call.k, call.v, call.block_table
    require_tensor("q", q, 4)
    require_tensor("k", k, 4)
    require_tensor("v", v, 4)
    B, H, T, D = q.shape
    _, H_kv, S, _ = k.shape
    D_v = v.shape[3]
    require_dtype("q", q, (*KERNEL_DTYPES, torch.float64))
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            got = f"{x.shape[3]} in shape {tuple(x.shape)}"
            raise ValueError(f"{name}: expected a head dim from 1 to {MAX_HEAD_DIM}, got {got}")
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"k: expected a number of heads that divides q's {H}, got {H_kv}")
    require_dtype("k", k, (q.dtype, *QUANTISED_DTYPES))
    require_dtype("v", v, (k.dtype,))
    first, layout, keys = B, "(B, H_kv, S", S
    tensors = {"k": k, "v": v}
    if block_table is not None:
        require_tensor("block_table", block_table, 2)
        require_dtype("block_table", block_table, (torch.int32,))
        require_shape("block_table", block_table, (B, block_table.shape[1]), "(B, pages)")
        first, layout, keys = k.shape[0], "(num_pages, H_kv, page", S * block_table.shape[1]
        tensors["block_table"] = block_table
    require_shape("k", k, (first, H_kv, S, D), f"{layout}, D) to match q")
    require_shape("v", v, (first, H_kv, S, D_v), f"{layout}, D_v) to match k")
    for name in ("k_scale", "v_scale"):
        x = getattr(call, name)
        if (x is None) == (k.dtype in QUANTISED_DTYPES):
            wanted, got = ("a scale", "None") if x is None else ("None", "a scale")
            raise ValueError(f"{name}: expected {wanted} for k and v of {k.dtype}, got {got}")
        if x is not None:
            require_tensor(name, x, 3)
            require_dtype(name, x, (torch.float32,))
            require_shape(name, x, (first, H_kv, S), f"{layout}) to match k")
            tensors[name] = x
    for name, size, dtypes in (
        ("kv_lengths", B, (torch.int32,)),
        ("alibi_slopes", H, (torch.float32, q.dtype) if q.dtype == torch.float64 else (torch.float32,)),
        ("sinks", H, (*KERNEL_DTYPES, torch.float64)),
    ):
        x = getattr(call, name)
        if x is not None:
            require_tensor(name, x, 1)
            require_dtype(name, x, dtypes)
            require_shape(name, x, (size,), "(B,)" if name == "kv_lengths" else "(H,)")
            tensors[name] = x
    for name, dtypes in (("mask", (torch.bool,)), ("bias", (q.dtype, torch.float32))):
        x = getattr(call, name)
        if x is not None:
            require_tensor(name, x)
            require_dtype(name, x, dtypes)
            require_broadcastable(name, x, (B, H, T, keys), "(B, H, T, S)")
            tensors[name] = x
    for name, tensor in tensors.items():
        require_device(name, tensor, q.device)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_last_dim_contiguous(name, tensor)
    require_flag("causal", call.causal)
    if isinstance(call.dropout_seed, torch.Tensor):
        require_tensor("dropout_seed", call.dropout_seed)
        require_dtype("dropout_seed", call.dropout_seed, (torch.int64,))
        require_shape("dropout_seed", call.dropout_seed, (1,), "(1,)")
    else:
        require_integer("dropout_seed", call.dropout_seed, 0, 2**63 - 1, optional=True)
    return call._replace(
        scale=_float(require_number("scale", call.scale, -LARGEST_SCALE, LARGEST_SCALE, optional=True)),
        window=require_integer("window", call.window, 1, 2**63 - 1, optional=True),
        softcap=_float(require_number("softcap", call.softcap, *SOFTCAPS, optional=True)),
        dropout_p=_float(require_number("dropout_p", call.dropout_p, least=0, below=1)),
    )


def _float(number):
    return float(number) if isinstance(number, int) else number


def _check_pages(k, block_table, kv_lengths):
    """On CPU, raises ValueError if a page that would be read is not in the pool."""
    if block_table is None or block_table.device.type != "cpu":
        return
    num_pages, page = k.shape[0], k.shape[2]
    pages = torch.arange(block_table.shape[1])
    outside = (block_table < 0) | (block_table >= num_pages)
    if kv_lengths is not None:
        outside = outside & (pages * page < kv_lengths.unsqueeze(1))
    if outside.any():
        got = block_table[outside][0].item()
        raise ValueError(f"block_table: expected pages from 0 to {num_pages - 1}, got {got}")


def explain(q, k, v, *, return_lse=False, impl=None, **options):
    """Implementation -> "chosen", "available", or why it refuses this call."""
    require_flag("return_lse", return_lse)
    return explain_call(IMPLEMENTATIONS, _check(Call(q, k, v, **options)), impl=impl)


def explain_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *, return_lse=False, impl=None, **options):
    """The same for attention_varlen."""
    require_flag("return_lse", return_lse)
    call = _packed_call(q, k, v, **options)
    _check_packing(call, Packing(cu_seqlens_q, cu_seqlens_k, max_q, max_k))
    return explain_call(VARLEN_IMPLEMENTATIONS, call, impl=impl)


def _savable(arguments):
    """Autograd saves no tensor that was made in inference mode; since such ones take no part in derivatives, a copy will do."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return arguments
    copies = {name: x.clone() for name, x in arguments._asdict().items() if isinstance(x, torch.Tensor) and x.is_inference()}
    return arguments._replace(**copies) if copies else arguments


def _needs_gradients(call: Call) -> bool:
    if not torch.is_grad_enabled():
        return False
    for x in (call.q, call.k, call.v, call.bias, call.sinks, call.alibi_slopes, call.k_scale, call.v_scale):
        if x is not None and x.requires_grad:
            return True
    return False


def _triton_refuses(call: Call):
    if not call.q.is_cuda:
        return runs_elsewhere("CUDA", "q", call.q.device)
    if (reason := triton_unusable(call.q.device)) is not None:
        return reason
    if call.q.dtype not in KERNEL_DTYPES:
        return f"it takes fp32, fp16 and bf16, and q is {call.q.dtype}"
    if isinstance(call.v, torch.Tensor) and call.v.dim() == call.q.dim():  # else the check of the call says what is wrong
        if (reason := triton_refuses_head_dims(call.q, call.v, _needs_gradients(call))) is not None:
            return reason
    return _cannot_differentiate(call)


def triton_refuses_head_dims(q: torch.Tensor, v: torch.Tensor, gradients: bool) -> str | None:
    """Why the Triton kernels cannot take q and v of these head dims, with gradients if they are asked for; or None."""
    D, D_v = q.shape[-1], v.shape[-1]
    if D_v > 512 and q.dtype is torch.float32:
        return f"it takes values of head dims up to 512 in fp32, and v has {D_v}"
    if gradients and max(D, D_v) > TRITON_MAX_DIFFERENTIABLE_DIM:
        return f"it has no backward for head dims above {TRITON_MAX_DIFFERENTIABLE_DIM}, and those are {D} and {D_v}"
    return None


def _cpp_refuses(call: Call):
    if not call.q.is_cpu:
        return runs_elsewhere("CPU", "q", call.q.device)
    if call.q.dtype not in KERNEL_DTYPES:
        return f"it takes fp32, fp16 and bf16, and q is {call.q.dtype}"
    return _cannot_differentiate(call)


def _cannot_differentiate(call: Call):
    """Why the kernels cannot give the derivatives that are asked for, or None."""
    if transforms_active():
        return TRANSFORMED
    if not _needs_gradients(call):
        return None
    if call.block_table is not None or call.k_scale is not None:
        return "it has no backward through a block table or 8-bit keys, and a gradient is asked for"
    if call.alibi_slopes is not None and call.alibi_slopes.requires_grad:
        return "it has no gradient by alibi_slopes, and that is asked for"
    return None


# In order of preference: the first that does not refuse serves the call.
IMPLEMENTATIONS = {"cpp": _cpp_refuses, "triton": _triton_refuses, "reference": lambda call: None}
VARLEN_IMPLEMENTATIONS = {
    "cpp": _cpp_refuses,
    "triton": _triton_refuses,
    "reference": lambda call: None,
}


library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale, SymInt? window=None, float? softcap=None, "
    "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? mask=None, Tensor? bias=None, Tensor? kv_lengths=None, "
    "Tensor? block_table=None, Tensor? k_scale=None, Tensor? v_scale=None, float dropout_p=0.0, "
    "Tensor? dropout_seed=None) -> (Tensor, Tensor)",
    "fastgpt.attention",
)
library.define(
    "attention_check(Tensor q, Tensor k, Tensor v, bool causal, float scale, SymInt? window=None, float? softcap=None, "
    "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? kv_lengths=None, Tensor? block_table=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    "fastgpt.attention",
)
library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool needs_dbias, Tensor q, Tensor k, "
    "Tensor v, bool causal, float scale, SymInt? window=None, float? softcap=None, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None, Tensor? mask=None, Tensor? bias=None, Tensor? kv_lengths=None, float dropout_p=0.0, "
    "Tensor? dropout_seed=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fastgpt.attention",
)
_PACKING = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k"
library.define(
    f"attention_varlen_forward({_PACKING}, Tensor q, Tensor k, Tensor v, bool causal, float scale, SymInt? window=None, "
    "float? softcap=None, Tensor? alibi_slopes=None, Tensor? sinks=None, float dropout_p=0.0, "
    "Tensor? dropout_seed=None) -> (Tensor, Tensor)",
    "fastgpt.attention_varlen",
)
library.define(
    f"attention_varlen_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_PACKING}, Tensor q, Tensor k, "
    "Tensor v, bool causal, float scale, SymInt? window=None, float? softcap=None, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None, float dropout_p=0.0, Tensor? dropout_seed=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "fastgpt.attention_varlen",
)
_attention_forward = without_autograd(torch.ops.fastgpt.attention_forward.default)
_attention_backward = without_autograd(torch.ops.fastgpt.attention_backward.default)
_attention_check = without_autograd(torch.ops.fastgpt.attention_check.default)


@torch.library.register_fake("fastgpt::attention_check", lib=library)
def _attention_check_fake(*arguments):
    pass


@torch.library.register_fake("fastgpt::attention_forward", lib=library)
def _attention_forward_fake(*arguments):
    call = Call(*arguments)
    _check(call)
    B, H, T, _ = call.q.shape
    # Token-major storage: the model reads the result as (B, T, H * D_v) without a copy.
    out = call.q.new_empty(B, T, H, call.v.shape[3]).transpose(1, 2)
    return out, call.q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.register_fake("fastgpt::attention_backward", lib=library)
def _attention_backward_fake(dout, dlse, out, lse, needs_dbias, q, k, v, *arguments):
    call = Call(q, k, v, *arguments[:9])
    dbias = call.bias.new_empty(call.bias.shape) if needs_dbias else q.new_empty(0)
    dsinks = q.new_empty(0) if call.sinks is None else torch.empty_like(call.sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias, dsinks


DECODE_QUERIES = 16  # up to so many a sequence, the keys are split among programs


def _attention_forward_triton(*arguments):
    # Triton is imported only when a CUDA tensor needs it.
    from fastgpt.kernels.attention_decode import attention_decode
    from fastgpt.kernels.attention_forward import attention_forward

    call = Call(*arguments)
    _check_triton(call)
    call = call._asdict()
    q, k, v = call.pop("q"), call.pop("k"), call.pop("v")
    if q.shape[2] > DECODE_QUERIES or call["dropout_p"] > 0:
        return attention_forward(q, k, v, **call)
    for name in ("dropout_p", "dropout_seed"):
        del call[name]
    return attention_decode(q, k, v, **call)


def _check_triton(call: Call, gradients: bool = False) -> Call:
    """`_check`; raises ValueError also for head dims that the Triton kernels do not take."""
    checked = _check(call)
    if (reason := triton_refuses_head_dims(call.q, call.v, gradients)) is not None:
        raise ValueError(f"v: expected a head dim that Triton's kernels serve, got shape {tuple(call.v.shape)}: {reason}")
    return checked


def _attention_backward_triton(dout, dlse, out, lse, needs_dbias, q, k, v, *arguments):
    from fastgpt.kernels.attention_backward import attention_backward

    names = (*Call._fields[3:12], "dropout_p", "dropout_seed")
    options = dict(zip(names, arguments))
    _check_backward(Call(q, k, v, **options), dout, dlse, out, lse)
    if needs_dbias and options.get("bias") is None:
        raise ValueError("bias: expected a tensor, whose gradient is asked for, got None")
    dq, dk, dv, dbias, dsinks = attention_backward(dout, dlse, q, k, v, out, lse, needs_dbias=needs_dbias, **options)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias, q.new_empty(0) if dsinks is None else dsinks


def _check_backward(call: Call, dout, dlse, out, lse) -> None:
    """A call that is checked as a forward one, and what the backward pass takes beyond it."""
    _check_triton(call, gradients=True)
    q, outputs = call.q, (*call.q.shape[:3], call.v.shape[3])
    for name, x, shape, meaning, dtype in (
        ("dout", dout, outputs, "(B, H, T, D_v) to match q and v", q.dtype),
        ("out", out, outputs, "(B, H, T, D_v)", q.dtype),
        ("lse", lse, tuple(q.shape[:3]), "(B, H, T)", torch.float32), ("dlse", dlse, tuple(q.shape[:3]), "(B, H, T)", None),
    ):  # fmt: skip
        if x is not None or name != "dlse":
            require_tensor(name, x)
            require_shape(name, x, shape, meaning)
            require_device(name, x, q.device)
            if dtype is not None:
                require_dtype(name, x, (dtype,))
            if x.dim() == 4:
                require_last_dim_contiguous(name, x)


library.impl("attention_forward", _attention_forward_triton, "CUDA")
library.impl("attention_backward", _attention_backward_triton, "CUDA")


class _Attention(torch.autograd.Function):
    """attention_forward with attention_backward as its gradient, by q, k, v, sinks and bias."""

    @staticmethod
    def forward(ctx, *arguments):
        call = Call(*arguments)
        out, lse = _attention_forward(*call)
        tensors = {name: x for name, x in call._asdict().items() if isinstance(x, torch.Tensor)}
        ctx.options = call._replace(**dict.fromkeys(tensors))
        ctx.names = list(tensors)
        ctx.save_for_backward(out, lse, *tensors.values())
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        out, lse, *tensors = ctx.saved_tensors
        call = ctx.options._replace(**dict(zip(ctx.names, tensors)))
        needed = dict(zip(Call._fields, ctx.needs_input_grad))
        if _is_differentiated():
            gradients = _reference_gradients(call, None, needed, dout, dlse)
        else:
            *grads, dbias, dsinks = _attention_backward(
                _kernel_dout(dout, out), dlse, out, lse, needed["bias"], *call[:12], call.dropout_p, call.dropout_seed
            )
            gradients = dict(zip(("q", "k", "v"), grads)) | {"bias": dbias, "sinks": dsinks}
        return tuple(gradients[name] if need else None for name, need in needed.items())


def _is_differentiated() -> bool:
    """Whether derivatives are taken of a backward pass: create_graph, forward mode, a vmap over the incoming gradients."""
    return torch.is_grad_enabled() or transforms_active()


def _reference_gradients(call: Call, packing: Packing | None, needed: dict[str, bool], dout, dlse) -> dict:
    """The gradients by the arguments that are needed, from the reference: unlike those of the kernels, they can be
    differentiated themselves. The kernels' out and lse, which are constants to autograd, take no part."""
    with torch.enable_grad():
        # Aliases: where two arguments are one tensor, each has a gradient of its own.
        leaves = {name: x.view_as(x) for name, x in call._asdict().items() if needed[name]}
        call = call._replace(**leaves)
        if packing is None:
            results = attention_reference(**call._asdict(), return_lse=True)
        else:
            results = _varlen_reference(call, packing)
    # Those that there are of results which depend on the leaves: lse does not on v.
    pairs = [(x, gradient) for x, gradient in zip(results, (dout, dlse)) if gradient is not None and x.requires_grad]
    outputs, douts = zip(*pairs) if pairs else ((), ())
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), douts, create_graph=torch.is_grad_enabled(), materialize_grads=True
    )
    return dict(zip(leaves, gradients))


def _kernel_dout(dout, out):
    """The gradient of `out` as the kernels take it; None stands for zeros."""
    if dout is None:
        return torch.zeros_like(out)
    return dout if dout.stride(-1) == 1 else dout.contiguous()


# Packed sequences: the same, without what only a batch has.
_VARLEN_FIELDS = (*Call._fields[:9], "dropout_p", "dropout_seed")


def _varlen_arguments(call: Call) -> list:
    return [getattr(call, name) for name in _VARLEN_FIELDS]


@torch.library.register_fake("fastgpt::attention_varlen_forward", lib=library)
def _attention_varlen_forward_fake(cu_seqlens_q, cu_seqlens_k, max_q, max_k, q, k, v, *arguments):
    _, H, total, _ = q.shape
    out = q.new_empty(1, total, H, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(1, H, total, dtype=torch.float32)


@torch.library.register_fake("fastgpt::attention_varlen_backward", lib=library)
def _attention_varlen_backward_fake(dout, dlse, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, q, k, v, *arguments):
    sinks = dict(zip(_VARLEN_FIELDS[3:], arguments)).get("sinks")
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsinks


def _attention_varlen_forward_triton(cu_seqlens_q, cu_seqlens_k, max_q, max_k, *arguments):
    from fastgpt.kernels.attention_forward import attention_forward

    options = dict(zip(_VARLEN_FIELDS, arguments))
    _check_packing(_check_triton(Call(**options)), Packing(cu_seqlens_q, cu_seqlens_k, max_q, max_k))
    q, k, v = options.pop("q"), options.pop("k"), options.pop("v")
    return attention_forward(q, k, v, **options, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_q=max_q)


def _attention_varlen_backward_triton(dout, dlse, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, q, k, v, *arguments):
    from fastgpt.kernels.attention_backward import attention_backward

    options = dict(zip(_VARLEN_FIELDS[3:], arguments))
    packing, call = Packing(cu_seqlens_q, cu_seqlens_k, max_q, max_k), Call(q, k, v, **options)
    _check_backward(call, dout, dlse, out, lse)
    packing = _check_packing(call, packing)._asdict()
    dq, dk, dv, _, dsinks = attention_backward(dout, dlse, q, k, v, out, lse, **options, **packing)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


library.impl("attention_varlen_forward", _attention_varlen_forward_triton, "CUDA")
library.impl("attention_varlen_backward", _attention_varlen_backward_triton, "CUDA")
_attention_varlen_forward = without_autograd(torch.ops.fastgpt.attention_varlen_forward.default)
_attention_varlen_backward = without_autograd(torch.ops.fastgpt.attention_varlen_backward.default)


class _VarlenAttention(torch.autograd.Function):
    """attention_varlen_forward with attention_varlen_backward as its gradient, by q, k, v and sinks."""

    @staticmethod
    def forward(ctx, packing, *arguments):
        call = Call(*arguments)
        out, lse = _attention_varlen_forward(*packing, *_varlen_arguments(call))
        ctx.max_q, ctx.max_k = packing.max_q, packing.max_k
        ctx.options = call._replace(q=None, k=None, v=None, alibi_slopes=None, sinks=None, dropout_seed=None)
        ctx.save_for_backward(
            out, lse, packing.cu_seqlens_q, packing.cu_seqlens_k, call.q, call.k, call.v, call.alibi_slopes, call.sinks,
            call.dropout_seed,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        out, lse, cu_q, cu_k, q, k, v, slopes, sinks, seed = ctx.saved_tensors
        call = ctx.options._replace(q=q, k=k, v=v, alibi_slopes=slopes, sinks=sinks, dropout_seed=seed)
        packing = Packing(cu_q, cu_k, ctx.max_q, ctx.max_k)
        needed = dict(zip(Call._fields, ctx.needs_input_grad[1:]))
        if _is_differentiated():
            gradients = _reference_gradients(call, packing, needed, dout, dlse)
        else:
            *grads, dsinks = _attention_varlen_backward(
                _kernel_dout(dout, out), dlse, out, lse, *packing, *_varlen_arguments(call)
            )
            gradients = dict(zip(("q", "k", "v"), grads)) | {"sinks": dsinks}
        return None, *(gradients[name] if need else None for name, need in needed.items())
