"""When a decoder may fuse its modules: whether they are plain (unmodified).

A fused operation replaces the calls of several modules, and a replayed decode step those of all. That gives the same result
only if no hook, subclass or adapter has changed what a module computes. `is_plain` checks this; other modules are called.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules import module as hooked

from fastgpt.ops.quantized_weight import QuantizedWeight

# Module types that may be fused: their forward, and their number of parameters, counting a bias that is None. Not subclasses.
PLAIN = {
    nn.Linear: (nn.Linear.forward, 2), nn.Embedding: (nn.Embedding.forward, 1), nn.ModuleList: (nn.ModuleList.forward, 0)
}  # fmt: skip
PLAIN_WEIGHTS = {nn.Parameter, torch.Tensor, QuantizedWeight, type(None)}  # no others, which may override operations
MATRICES = {nn.Linear, nn.Embedding}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = [getattr(hooked, f"_global{name}") for name in HOOKS]
# Called with a decoder before its weights move, such as to another device: recorded steps and graphs release their memory.
BEFORE_WEIGHTS_MOVE = []


def plain(weights: int) -> Callable:
    """Decorates a module class that may be fused; weights: its number of parameters, counting a bias that is None."""

    def decorate(cls: type[nn.Module]) -> type[nn.Module]:
        PLAIN[cls] = cls.forward, weights
        return cls

    return decorate


def is_plain_matrix(weight: torch.Tensor | None) -> bool:
    """Whether operations take this weight: a plain tensor with contiguous rows, not a transposed view."""
    if type(weight) is QuantizedWeight:  # whose attributes take microseconds
        return True
    return weight is not None and type(weight) in PLAIN_WEIGHTS and weight.stride(-1) == 1


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module computes exactly the forward of its class.

    It does not if the module has hooks, or global hooks are registered, if its forward was replaced, or if a weight is not a
    plain tensor (sharded, transposed, quantized by others). Subclasses and parametrized modules are not plain.
    """
    kind, state = type(module), module.__dict__
    known, weights = PLAIN.get(kind), state["_parameters"]
    return (
        known is not None
        and kind.forward is known[0]
        and "forward" not in state
        and not (state["_forward_hooks"] or state["_forward_pre_hooks"])
        and not (state["_backward_hooks"] or state["_backward_pre_hooks"])
        and len(weights) == known[1]
        and PLAIN_WEIGHTS.issuperset(map(type, weights.values()))
        and (kind not in MATRICES or is_plain_matrix(weights.get("weight")))
        and not any(GLOBAL_HOOKS)
    )


def have_own_forwards(kinds: set[Any]) -> bool:
    """Whether the forward methods of these plain types are their original ones: nobody has patched them."""
    for kind in kinds:
        if kind.forward is not PLAIN[kind][0]:
            return False
    return True


def computes(module: nn.Module, forward: Callable) -> bool:
    """Whether a module is plain and its forward is this one."""
    return type(module).forward is forward and is_plain(module)
