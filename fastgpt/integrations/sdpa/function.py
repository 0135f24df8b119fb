"""scaled_dot_product_attention with PyTorch's signature and results, by fastgpt's kernels."""

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F

from fastgpt.integrations.sdpa import refusals
from fastgpt.integrations.sdpa.refusals import Call, refuses, refuses_arguments, refuses_surroundings
from fastgpt.ops.attention import attention
from fastgpt.ops.attention.checks import KERNEL_DTYPES
from fastgpt.ops.derivatives import transforms_active
from fastgpt.ops.dropout import keep_mask
from fastgpt.ops.explain import OPERATIONS
from fastgpt.ops.implementations import runs_elsewhere
from fastgpt.ops.library import without_autograd

attention_forward = without_autograd(torch.ops.fastgpt.attention_forward.default)
attention_backward = without_autograd(torch.ops.fastgpt.attention_backward.default)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch.nn.functional.scaled_dot_product_attention, served by fastgpt's kernels if they support the call.

    Signature, results, strides and errors are PyTorch's. Calls that the kernels do not support are passed on to PyTorch.
    Dropout draws other random numbers, seeded by the generator of query's device.

    Args:
        query: (..., H, T, E), (N, T, E) or (T, E). fp16, bf16 and fp32 are served by the kernels.
        key: (..., H, S, E), dtype of query.
        value: (..., H, S, Ev), dtype of query.
        attn_mask: bool (True attends) or floating point (added to the scores; differentiable), broadcastable to
            (..., H, T, S); or a bias of torch.nn.attention.bias.
        dropout_p: probability of zeroing a weight of the softmax.
        is_causal: top-left aligned: query i sees key j when j <= i.
            T=2, S=3 attends  1 0 0
                              1 1 0
        scale: factor on query·key; default 1 / sqrt(E).
        enable_gqa: key and value may have fewer heads, whose number divides H.

    Returns: (..., H, T, Ev). A query that attends to no key gives zeros and zero gradients.
    Raises: the errors of PyTorch's function.
    """
    call = _prepared(Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa))
    out = serve(call)
    if out is None:
        return F.scaled_dot_product_attention(*call[:6], scale=call.scale, enable_gqa=call.enable_gqa)
    return out


def explain(*args: Any, **options: Any) -> dict[str, str]:
    """Implementation -> "chosen", "available", or why it refuses this call of scaled_dot_product_attention. "torch" is
    PyTorch's function."""
    call = _prepared(Call(*args, **options))
    reason, query = refuses(call), call.query
    if reason is not None:
        return {"cpp": reason, "triton": reason, "torch": "chosen"}
    if query.is_cpu:
        return {"cpp": "chosen", "triton": runs_elsewhere("CUDA", "query", query.device), "torch": "available"}
    return {"cpp": runs_elsewhere("CPU", "query", query.device), "triton": "chosen", "torch": "available"}


OPERATIONS[scaled_dot_product_attention] = explain


def _prepared(call):
    """The arguments in the dtype of autocast, with is_causal in place of an equivalent CausalBias."""
    compiling = torch.compiler.is_dynamo_compiling()
    attn_mask = call.attn_mask
    if attn_mask is not None and type(attn_mask) not in refusals.PLAIN_TENSORS and not compiling:
        bias = sys.modules.get("torch.nn.attention.bias")  # slow to import; without it there are no biases
        if bias is not None and isinstance(attn_mask, bias.CausalBias) and not call.is_causal:
            if attn_mask.variant == bias.CausalVariant.UPPER_LEFT or attn_mask.seq_len_q == attn_mask.seq_len_kv:
                call = call._replace(attn_mask=None, is_causal=True)
    if compiling or torch._C._is_any_autocast_enabled():
        call = Call(*_autocast(*call[:4]), *call[4:])
    return call


def _autocast(query, *others):
    if not isinstance(query, torch.Tensor) or not (query.is_cpu or query.is_cuda):
        return query, *others
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, *others
    dtype = torch.get_autocast_dtype(device)

    def cast(x):
        eligible = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype is not torch.float64
        return x.to(dtype) if eligible and x.device.type == device else x

    return tuple(cast(x) for x in (query, *others))


def serve(call: Call, differentiable: bool = True) -> torch.Tensor | None:
    """The result, or None if PyTorch's function must serve the call.

    differentiable: whether the result needs an autograd graph if gradients are enabled; False below autograd.
    """
    if refuses_surroundings(call) is not None:
        return None
    out = _serve_common(call, differentiable)
    if out is None and refuses_arguments(call) is None:
        out = _serve_any(call, differentiable)
    return out


def _serve_common(call, differentiable):
    """A fast path of `serve` for common calls on a CPU, in less than half the time: the operation checks its arguments itself.

    None if the call needs the general path.
    """
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = call
    if differentiable and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    if (
        torch.compiler.is_dynamo_compiling()
        or not query.is_cpu
        or query.dim() != 4
        or query.dtype not in KERNEL_DTYPES
        or dropout_p != 0
    ):
        return None
    _, H, T, E = query.shape
    keys = key.shape
    if E < 2 or keys[:3] != value.shape[:3] or not (T and keys[2]) or (keys[1] != H and not enable_gqa):
        return None
    options = {}
    if attn_mask is not None:
        if is_causal or attn_mask.dim() not in (2, 4) or attn_mask.requires_grad:
            return None
        options = {"mask" if attn_mask.dtype is torch.bool else "bias": attn_mask}
    elif is_causal and T != keys[2]:
        return None
    try:
        out, _ = attention_forward(query, key, value, is_causal, E**-0.5 if scale is None else scale, **options)
    except (RuntimeError, TypeError, ValueError):
        return None
    return in_order_of(query, out) if value.shape[3] == E else out.contiguous()  # as PyTorch's unfused function


def _serve_any(call, differentiable):
    """The result of a call that no check has refused."""
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = call
    E, Ev = query.shape[-1], value.shape[-1]
    # Whether PyTorch's fused kernel would have served the call, since its results have other strides.
    fused = (
        query.dim() == 4
        and E == Ev
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and (key.shape[1] == query.shape[1] or enable_gqa)
        and (dropout_p == 0 or query.is_cuda)
        and (attn_mask is None or (attn_mask.dim() != 3 and not attn_mask.requires_grad))
    )
    q, k, v, mask = query, key, value, attn_mask
    if query.dim() != 4:
        q, k, v, mask = _in_four_dimensions(query, key, value, attn_mask)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    T = q.shape[2]
    if is_causal and T < k.shape[2]:  # no query attends to the other keys
        k, v = k[:, :, :T], v[:, :, :T]
    bias = None
    if mask is not None and mask.dtype is not torch.bool:
        mask, bias = None, mask
    scale = E**-0.5 if scale is None else scale
    out = _attention(q, k, v, bias, mask, is_causal, scale, dropout_p, differentiable)
    if fused:
        return in_order_of(query, out)
    out = out.reshape(*query.shape[:-1], Ev)
    # PyTorch's unfused function does not save its result for the backward pass, so callers may write to it; ours does.
    return out.clone(memory_format=torch.contiguous_format) if out.requires_grad else out.contiguous()


def _in_four_dimensions(query, key, value, attn_mask):
    """The arguments with four dimensions: (B, H, T, E), (B, H_kv, S, E), (B, H_kv, S, Ev), and the mask likewise."""
    if query.dim() > 4:
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*query.shape[:-3], *attn_mask.shape[-3:]).flatten(0, -4)
        return query.flatten(0, -4), key.flatten(0, -4), value.flatten(0, -4), attn_mask
    if query.dim() == 2:
        return query[None, None], key[None, None], value[None, None], attn_mask
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unsqueeze(1)
    return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), attn_mask


def in_order_of(query: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out, which is (B, T, H, E) in memory, with the strides that PyTorch's fused kernel gives it: in the order of query's."""
    batch, heads, tokens, _ = query.stride()
    if batch >= tokens >= heads or not (torch.compiler.is_dynamo_compiling() or _fused_follows_query()):
        return out
    like = torch.empty_like(query)
    return out if like.stride() == out.stride() else like.copy_(out)


@functools.cache
def _fused_follows_query() -> bool:
    """False for older versions of PyTorch, whose fused kernel always returns (B, T, H, E) in memory."""
    x = torch.zeros(1, 2, 2, 8, dtype=torch.float64, device="cpu")  # float64, which fastgpt never serves
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0].is_contiguous()


def _attention(q, k, v, bias, mask, causal, scale, dropout_p, differentiable):
    """`fastgpt.attention` of checked arguments."""
    if torch.compiler.is_dynamo_compiling():
        return attention(q, k, v, causal=causal, scale=scale, mask=mask, bias=bias, dropout_p=dropout_p)
    seed = torch.randint(2**62, (1,), device=q.device) if dropout_p > 0 else None
    arguments = (q, k, v, bias, mask, seed, causal, scale, dropout_p)
    if differentiable and torch.is_grad_enabled():
        return _Attention.apply(*arguments)
    return _forward(*arguments)[0]


def _forward(q, k, v, bias, mask, seed, causal, scale, dropout_p):
    return attention_forward(q, k, v, causal, scale, mask=mask, bias=bias, dropout_p=dropout_p, dropout_seed=seed)


class _Attention(torch.autograd.Function):
    """The operation with its gradients. Double backward goes through PyTorch's unfused function."""

    @staticmethod
    def forward(ctx, q, k, v, bias, mask, seed, *options):
        out, lse = _forward(q, k, v, bias, mask, seed, *options)
        ctx.save_for_backward(q, k, v, bias, mask, seed, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, bias, mask, seed, out, lse = ctx.saved_tensors
        causal, scale, dropout_p = ctx.options
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or transforms_active():  # create_graph, forward mode, a vmap over dout
            grads = _differentiable_gradients(dout, (q, k, v, bias), needed, mask, seed, causal, scale, dropout_p)
        else:
            dout = dout if dout.stride(-1) == 1 else dout.contiguous()
            *grads, _ = attention_backward(
                dout, None, out, lse, needed[3], q, k, v, causal, scale,
                mask=mask, bias=bias, dropout_p=dropout_p, dropout_seed=seed,
            )  # fmt: skip
        return *(grad if need else None for grad, need in zip(grads, needed)), None, None, None, None, None


def _differentiable_gradients(dout, inputs, needed, mask, seed, causal, scale, dropout_p):
    with torch.enable_grad():
        # Aliases, so that each input has its own gradient if two of them are the same tensor.
        q, k, v, bias = aliases = [None if x is None else x.view_as(x) for x in inputs]
        kept = None if seed is None else keep_mask(seed, dropout_p, *q.shape[:3], k.shape[2], q.device)
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(
            q, k, v, mask if bias is None else bias, dropout_p, causal, kept, scale=scale, enable_gqa=True
        )
    wanted = [x for x, need in zip(aliases, needed) if need]
    grads = iter(torch.autograd.grad(out, wanted, dout, create_graph=torch.is_grad_enabled()))
    return [next(grads) if need else None for need in needed]
