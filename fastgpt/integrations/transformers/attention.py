"""The attention function, which the layers of transformers models call with their queries, keys and values."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastgpt.checks import is_autocasting
from fastgpt.integrations.transformers.deferred import EightBit
from fastgpt.integrations.transformers.masks import Mask
from fastgpt.integrations.transformers.recording import note
from fastgpt.ops import attention as operation
from fastgpt.ops.attention.checks import KERNEL_DTYPES, MAX_HEAD_DIM, triton_refuses_head_dims
from fastgpt.ops.derivatives import transforms_active
from fastgpt.ops.library import without_autograd

_attention_forward = without_autograd(torch.ops.fastgpt.attention_forward.default)

DTYPES = (*KERNEL_DTYPES, torch.float64)


def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | Mask | None, dropout: float = 0.0, scaling: float | None = None,
    is_causal: bool | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None, cache: Any = None, output_attentions: bool = False, **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`fastgpt.attention` as a function of transformers' AttentionInterface.

    Args:
        module: the layer, whose `is_causal` applies if the argument is None.
        query: (B, H, T, D).
        key: (B, H_kv, S, D); may be 8-bit, from a `Cache`. H must be a multiple of H_kv.
        value: (B, H_kv, S, D_v), likewise.
        attention_mask: the result of `mask`; or a mask that broadcasts to (B, H, T, S), boolean or additive. None: all keys, or
            for T > 1 in a causal layer keys 0 to i for query i.
        dropout, scaling, softcap, s_aux, position_bias: dropout_p, scale, softcap, sinks and bias of `fastgpt.attention`.
        is_causal: whether the layer is causal.
        cache: a PagedAttentionCache, which stores key and value and returns all keys and values.
        output_attentions: also return the weights.
        kwargs: cu_seq_lens_q and cu_seq_lens_k of packed sequences, and sliding_window, which applies to those only: otherwise
            masks contain it; what a cache for continuous batching has added. Others are ignored.

    Returns: (B, T, H, D_v), and None or the weights (B, H, T, S).

    Calls that the kernels do not support go to transformers' function for PyTorch's attention, or are computed in plain
    PyTorch; `record` shows which. Those of continuous batching raise ValueError instead.
    """
    if attention_mask is position_bias is softcap is s_aux is cache is None and not dropout and not output_attentions:
        is_causal_layer = getattr(module, "is_causal", True) if is_causal is None else is_causal
        out = _served_simply(query, key, value, scaling, is_causal_layer, kwargs)
        if out is not None:
            return out, None
    if cache is not None:
        key, value = _stored(cache, key, value, module, kwargs)
    if is_autocasting(query.device):  # as PyTorch's function does
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    T, S = query.shape[2], key.shape[2]
    mask, short = attention_mask, None
    if type(mask) is Mask:
        short, mask = (mask, None) if mask.untouched and mask.shape[2:] == (T, S) else (None, mask.value())
    causal = T > 1 and attention_mask is None and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options = {"causal": causal, "scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout}

    reason = "output_attentions" if output_attentions else _why_not(query, key, value, dropout, scaling)
    if "write_index" in kwargs and mask is None:  # continuous batching
        if reason is not None or position_bias is not None:
            raise ValueError(f"continuous batching with fastgpt's attention: {reason or 'position_bias'}")
        options = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "window": kwargs.get("sliding_window")}
        if (pages := kwargs.get("pages")) is None:
            return _packed(query, key, value, *_packing(None, kwargs), **options), None
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        return pages.step.attend(query, key, value, pages.k, pages.v, note=note, **options).unsqueeze(0), None
    if reason is None and mask is None and position_bias is None:
        packing = _packing(short, kwargs)
        if packing is not None:
            if short is not None:
                options |= {"causal": True, "window": short.options["window"]}
            elif causal:
                options["window"] = kwargs.get("sliding_window")
            return _packed(query, key, value, *packing, **options), None
    if reason is not None and not output_attentions and softcap is None and s_aux is None:
        note(f"sdpa: {reason}")
        bias = {} if position_bias is None else {"position_bias": position_bias}
        mask = mask if short is None else short.value()
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal, **bias)

    keys = S
    if short is not None and short.segments is None:
        options |= short.options
        keys = short.keys
    elif short is not None:
        options["mask"] = short.value()
    elif causal and S < T:
        options |= {"causal": False, "mask": torch.ones(T, S, dtype=torch.bool, device=query.device).tril()}
    elif causal:
        keys = T
    if mask is not None and mask.dtype == torch.bool:
        options["mask"] = mask
    elif mask is not None:
        position_bias = mask if position_bias is None else position_bias + mask
    if keys < S:
        key, value = key[:, :, :keys], value[:, :, :keys]
    if position_bias is not None:
        options["bias"] = position_bias[..., :keys]
    if reason is not None:
        note(f"plain PyTorch: {reason}")
        out, weights = _with_weights(query, key, value, **options)
    else:
        out, weights = _fused(query, key, value, options), None
    return out.transpose(1, 2).contiguous(), weights if output_attentions else None


def _served_simply(query, key, value, scaling, is_causal, kwargs: dict) -> torch.Tensor | None:
    """A fast path for common calls on a CPU, in half the time: causal or unmasked attention, which checks its arguments
    itself. None if the call needs the general path."""
    if type(key) is not torch.Tensor or not query.is_cpu or kwargs.get("cu_seq_lens_q") is not None:
        return None
    T, S = query.shape[2], key.shape[2]
    if (
        (is_causal and T > 1 and T != S)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._is_any_autocast_enabled()
        or transforms_active()
        or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
    ):
        return None
    try:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        out, _ = _attention_forward(query, key, value, bool(is_causal) and T > 1, scale)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    note("cpp")
    return out.transpose(1, 2)


def _why_not(query, key, value, dropout, scaling) -> str | None:
    """Why `fastgpt.attention` does not support these arguments, or None."""
    (B, H, _, D), (B_kv, H_kv, _, D_k), D_v, dtype = query.shape, key.shape, value.shape[3], query.dtype
    if D_k != D or max(D, D_v) > MAX_HEAD_DIM:
        most = MAX_HEAD_DIM
        return f"head dims {D}, {D_k}, {D_v} of queries, keys, values: expected the same of queries and keys, and up to {most}"
    if query.is_cuda:
        gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if (reason := triton_refuses_head_dims(query, value, gradients)) is not None:
            return reason
    if B_kv != B or H % H_kv:
        return f"{B} x {H} heads of queries, {B_kv} x {H_kv} of keys: expected as many sequences, and heads that divide"
    if not dtype == key.dtype == value.dtype or dtype not in DTYPES:
        return f"{dtype}, {key.dtype}, {value.dtype} of queries, keys, values: expected one of {', '.join(map(str, DTYPES))}"
    if query.device.type not in ("cpu", "cuda"):
        return f"queries on {query.device}"
    if not 0 <= dropout < 1 or not (scaling is None or isinstance(scaling, (int, float, torch.SymFloat))):
        return f"dropout {dropout}, scaling {scaling}"
    if not torch.compiler.is_compiling() and (
        # Under torch.func, PyTorch's attention needs less memory than our reference, but it has no forward-mode derivatives.
        torch.jit.is_tracing() or (torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0)
    ):
        return "within torch.jit or torch.func"
    return None


def _packing(short: Mask | None, kwargs: dict) -> tuple | None:
    """(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) if the tokens are packed sequences, else None."""
    if short is not None and short.segments is not None:
        bounds, longest = short.packing
        return bounds, bounds, longest, longest
    starts = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if None in starts or short is not None and short.options["mask"] is not None:
        return None
    lengths = kwargs.get("max_length_q"), kwargs.get("max_length_k")
    return *(x.int() for x in starts), *(n or int(x.diff().max()) for x, n in zip(starts, lengths))


def _packed(query, key, value, *packing, **options) -> torch.Tensor:
    B, H, T, _ = query.shape
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B · T, H, head dim)
    note(operation.attention_varlen, query, key, value, *packing, **options)
    return operation.attention_varlen(query, key, value, *packing, **options).view(B, T, H, value.shape[2])


def _fused(query, key, value, options) -> torch.Tensor:
    if type(key) is EightBit and key.untouched and value.untouched:
        options |= {"k_scale": key.scale, "v_scale": value.scale}
        key, value = key.codes, value.codes
    elif type(key) is EightBit:
        key, value = key.value(), value.value()
    elif key.stride(3) != 1 or value.stride(3) != 1:
        key, value = key.contiguous(), value.contiguous()
    query = query if query.stride(3) == 1 else query.contiguous()
    if (bias := options.get("bias")) is not None and bias.dtype != torch.float32:
        options["bias"] = bias.to(query.dtype)
    note(operation.attention, query, key, value, **options)
    return operation.attention(query, key, value, **options)  # type: ignore[return-value]  # without return_lse


def _with_weights(
    query, key, value, *, causal, scale, softcap, sinks, dropout_p, window=None, mask=None, bias=None
):  # fmt: skip
    """(out, weights) in plain PyTorch, for any head dims. A query that attends to no key has equal weights."""
    B, H, T, D = query.shape
    S, groups = key.shape[2], H // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    distance = torch.arange(S - T, S, device=query.device).unsqueeze(1) - torch.arange(S, device=query.device)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden = hidden | (distance < 0)
    if window is not None:
        hidden = hidden | (distance >= window)
    if mask is not None:
        hidden = hidden | ~mask
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, H, 1, 1).expand(B, H, T, 1)], dim=-1)
    weights = F.dropout(
        scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)[..., :S], dropout_p
    )
    return weights @ value, weights


def _stored(cache, key, value, module, kwargs: dict):
    """Stores keys and values (1, H_kv, T, D) of packed sequences in a PagedAttentionCache; returns all of their keys and values."""
    indices = {name: kwargs[name] for name in ("read_index", "write_index")}
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, **indices)  # (S, H_kv, D)
    for name in ("cu_seq_lens_k", "max_seqlen_k"):
        if isinstance(kwargs.get(name), dict):
            kwargs[name] = kwargs[name]["sliding_attention" if getattr(module, "sliding_window", None) else "full_attention"]
    return key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0)
