"""Which derivatives a call must support, and errors for those that it cannot.

Autograd does not see into the kernels. A call that needs a derivative which a kernel does not have is served by the reference,
or raises: a derivative is right or an error, never silently zero.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import is_grad_enabled
from torch._C import _are_functorch_transforms_active as functorch_active
from torch.autograd import forward_ad

TRANSFORMED = "it supports neither forward-mode derivatives nor transforms of torch.func, and one is active"


def transforms_active() -> bool:
    """Whether a level of forward-mode derivatives or a transform of torch.func is active."""
    return forward_ad._current_level >= 0 or functorch_active()


def derivatives_possible() -> bool:
    """Whether any call could need a derivative now. A fast check for every call: in generation the answer is no."""
    return is_grad_enabled() or forward_ad._current_level >= 0 or functorch_active()


def derivatives_refused(*tensors) -> str | None:
    """Why an implementation without derivatives cannot serve these tensors (some may be None), or None. Runs at each call."""
    if forward_ad._current_level >= 0 or functorch_active():
        return TRANSFORMED
    if is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return "it has no backward pass, and a gradient is required"
    return None


def needs_derivatives(arguments: Iterable) -> bool:
    """Whether an argument of an operator, or a tensor in a list among them, requires a gradient or is a dual tensor."""
    dual, gradients = forward_ad._current_level >= 0, is_grad_enabled()
    if not (dual or gradients):
        return False
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            if gradients and argument.requires_grad or dual and forward_ad.unpack_dual(argument).tangent is not None:
                return True
        elif isinstance(argument, (list, tuple)) and needs_derivatives(argument):
            return True
    return False


_CACHE = (
    "cache: expected no derivatives through stored keys and values, which have none. To differentiate a model, call it "
    "without a cache; to generate, call it under torch.no_grad()"
)


def refuse_transforms_of_cache(filled: bool = True) -> None:
    """Raises RuntimeError if forward-mode derivatives or a transform of torch.func would pass through a cache.

    filled: False when an empty cache is made, which forward-mode derivatives allow.
    """
    if filled and forward_ad._current_level >= 0 and not torch.is_inference_mode_enabled():
        raise RuntimeError(_CACHE)
    if functorch_active():
        raise RuntimeError(_CACHE)


def through_cache(operation: Callable, *tensors) -> Any:
    """operation(*tensors), which writes or reads a cache and has no gradients.

    Only the backward pass raises: without torch.no_grad() the forward pass gives the same numbers.
    """
    if is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _ThroughCache.apply(operation, *tensors)
    return operation(*tensors)


class _ThroughCache(torch.autograd.Function):
    """operation(*tensors) with a backward pass that raises."""

    @staticmethod
    def forward(ctx, operation, *tensors):
        return operation(*tensors)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(_CACHE)
