"""fastgpt's kernels in PyTorch's dispatcher, where every call of scaled_dot_product_attention passes."""

import contextlib
import functools
import math
import threading
import warnings

import torch

from fastgpt.integrations.sdpa import function
from fastgpt.integrations.sdpa.function import in_order_of, serve
from fastgpt.integrations.sdpa.refusals import Call, refuses


class enabled(contextlib.ContextDecorator):
    """A context manager and decorator: inside, fastgpt serves PyTorch's scaled_dot_product_attention in the whole process, on
    CPU and CUDA.

        with fastgpt.integrations.sdpa.enabled():
            model.generate(...)

    It covers all callers, in Python under any imported name, TorchScript and C++, in all threads and in processes forked
    inside. It may be nested and entered by several threads, and ends when the last of them has left. On CPU it also covers
    graphs of torch.compile that run inside, except for calls with dropout, which PyTorch has decomposed. On CUDA, compiled
    graphs keep the kernels they were compiled with; see fastgpt.integrations.flash_provider for those.

    If a forward pass with activation checkpointing runs inside, its backward pass must run inside, too, since it repeats the
    forward pass.

    The first `enabled` registers kernels with PyTorch's dispatcher, below autocast and above autograd. That adds about a
    microsecond to a call of attention inside, and nothing to other operators. They stay registered afterwards, since removing
    them would crash a thread that is in a call, and pass calls on to PyTorch's function, which costs 6 to 8 microseconds each,
    until `remove_hook` is called.
    """

    _lock = threading.Lock()
    _open = 0
    _library = None

    def __enter__(self) -> "enabled":
        with enabled._lock:
            if enabled._library is None:
                enabled._library = _hook()
            enabled._open += 1
        return self

    def __exit__(self, *exception) -> None:
        with enabled._lock:
            enabled._open -= 1


def remove_hook() -> None:
    """Removes the kernels that `enabled` has registered with PyTorch's dispatcher. No other thread may be in a call of
    scaled_dot_product_attention meanwhile.

    Raises: RuntimeError inside an `enabled`.
    """
    with enabled._lock:
        if enabled._open:
            raise RuntimeError("remove_hook: expected no active `enabled`, got one")
        enabled._library = None  # the only reference


def _hook():
    fused = "_scaled_dot_product_flash_attention_for_cpu"  # graphs and transforms decompose the function to it
    hooks = [(fused, "CPU", _serve_fused), (f"{fused}_backward", "CPU", _serve_fused_backward)]
    for device in ("CPU", "CUDA"):
        # Inference tensors, and callers that handle gradients themselves, have no autograd key.
        hooks.append(("scaled_dot_product_attention", device, functools.partial(_serve_function, False)))
        hooks.append(("scaled_dot_product_attention", f"Autograd{device}", functools.partial(_serve_function, True)))
    originals = [torch.library.get_kernel(f"aten::{operator}", key) for operator, key, _ in hooks]
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that kernels are overridden
        for (operator, key, kernel), original in zip(hooks, originals):
            library.impl(operator, functools.partial(_hooked, kernel, original), key, with_keyset=True)
    return library


def _hooked(kernel, original, keyset, *args, **options):
    """What the dispatcher calls: the kernel inside an `enabled`, unless it returns None; else PyTorch's original one."""
    if enabled._open:
        results = kernel(*args, **options)
        if results is not None:
            return results
    return original.call_boxed(keyset, *args, **options)


def _serve_function(differentiable, *args, **options):
    return serve(Call(*args, **options), differentiable)


def _serve_fused(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    call = Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa=True)
    if _refuses_fused(call):
        return None
    out, lse = function.attention_forward(query, key, value, is_causal, _scale(call), bias=attn_mask)
    if attn_mask is not None:  # PyTorch's backward, which may follow, expects 0 for queries without keys
        lse.masked_fill_(lse == -math.inf, 0.0)
    return in_order_of(query, out), _token_major(lse)


def _serve_fused_backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None):
    call = Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa=True)
    if _refuses_fused(call):
        return None
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    grads = function.attention_backward(
        grad_out, None, out, logsumexp, False, query, key, value, is_causal, _scale(call), bias=attn_mask
    )
    return tuple(_token_major(x) for x in grads[:3])


def _refuses_fused(call):
    """Whether PyTorch must serve the fused operator, whose arguments `function.serve` has not prepared."""
    query, key, value, attn_mask = call[:4]
    return (
        refuses(call)
        or query.dim() != 4
        or value.shape[-1] != query.shape[-1]
        or call.dropout_p > 0
        or (call.is_causal and query.shape[2] != key.shape[2])
        or (attn_mask is not None and attn_mask.dtype is torch.bool)
        or not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    )


def _scale(call):
    return call.query.shape[-1] ** -0.5 if call.scale is None else call.scale


def _token_major(x):
    """x (B, H, T, ...), stored with T before H."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
