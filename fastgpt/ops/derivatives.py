"""Derivatives: which of them a call is asked for, and errors in place of those that it does not have.

The kernels compute numbers, and autograd knows nothing of what happens in them. A call that is asked for a derivative is served
by the reference, which is plain PyTorch, or refused: a derivative is right or an error, never zero.
"""

import torch
from torch import is_grad_enabled
from torch._C import _are_functorch_transforms_active as functorch_active
from torch.autograd import forward_ad

TRANSFORMED = "it takes no part in forward-mode derivatives and transforms of torch.func, and one is active"


def transforms_active() -> bool:
    """Whether a level of forward-mode derivatives or a transform of torch.func is active."""
    return forward_ad._current_level >= 0 or functorch_active()


def derivatives_possible() -> bool:
    """Whether some call could be asked for a derivative now. Every call asks it, most of them from generation, where none can."""
    return is_grad_enabled() or forward_ad._current_level >= 0 or functorch_active()


def derivatives_refused(*tensors) -> str | None:
    """Why an implementation without derivatives cannot take these tensors (or None), or None. It is asked at each call."""
    if forward_ad._current_level >= 0 or functorch_active():
        return TRANSFORMED
    if is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return "it has no backward pass, and a gradient is asked for"
    return None


def asks_for_derivatives(arguments) -> bool:
    """Whether a derivative by one of an operator's arguments, or of a list of them, is asked for: a gradient, or that of a dual
    number."""
    dual, gradients = forward_ad._current_level >= 0, is_grad_enabled()
    if not (dual or gradients):
        return False
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            if gradients and argument.requires_grad or dual and forward_ad.unpack_dual(argument).tangent is not None:
                return True
        elif isinstance(argument, (list, tuple)) and asks_for_derivatives(argument):
            return True
    return False


_CACHE = (
    "cache: expected no derivatives through stored keys and values, which carry none. To differentiate a model, call it "
    "without a cache; to generate, call it under torch.no_grad()"
)


def refuse_transforms_of_cache(filled: bool = True) -> None:
    """Raises RuntimeError if forward-mode derivatives or a transform of torch.func would pass through a cache.

    filled: False where one is made: that is possible within a level of forward-mode derivatives.
    """
    if filled and forward_ad._current_level >= 0 and not torch.is_inference_mode_enabled():
        raise RuntimeError(_CACHE)
    if functorch_active():
        raise RuntimeError(_CACHE)


def through_cache(operation, *tensors):
    """operation(*tensors), which writes or reads stored keys and values: gradients end there.

    They are refused when somebody asks for them, not here: who forgot torch.no_grad() gets the same numbers.
    """
    if is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _ThroughCache.apply(operation, *tensors)
    return operation(*tensors)


class _ThroughCache(torch.autograd.Function):
    """operation(*tensors), computed without a graph, whose backward pass is an error."""

    @staticmethod
    def forward(ctx, operation, *tensors):
        return operation(*tensors)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(_CACHE)
