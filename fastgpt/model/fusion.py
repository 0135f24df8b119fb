"""When a decoder may fuse its modules: whether they are plain (unmodified), and evaluation mode for generation.

A fused operation replaces the calls of several modules, and a replayed decode step those of all. That gives the same result
only if no hook, subclass or adapter has changed what a module computes. `is_plain` checks this; other modules are called.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules import module as hooked
from torch.overrides import TorchFunctionMode

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


# Generation


class State(threading.local):
    evaluating = False


state = State()


def is_training(module: nn.Module) -> bool:
    """Whether a module applies dropout: in training mode, outside of `evaluating`."""
    return module.training and not state.evaluating


def others(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that are of other types than the decoder's."""
    return [module for module in model.modules() if type(module) not in PLAIN]


class evaluating:
    """A context manager: in this thread, a model in training mode computes as in evaluation mode. `module.training` does not
    change, so other threads are not affected.

    others: those modules of the model that `others` returns.
    """

    def __init__(self, others: list[nn.Module]):  # not @contextmanager, which is slower: each step enters one
        self.others = others

    def __enter__(self) -> None:
        self.before, state.evaluating, self.mode = state.evaluating, True, None
        if any(module.training for module in self.others):
            self.mode = NoDropout()
            self.mode.__enter__()

    def __exit__(self, *exception) -> None:
        state.evaluating = self.before
        if self.mode is not None:
            self.mode.__exit__(*exception)


class NoDropout(TorchFunctionMode):
    """Turns PyTorch's dropout functions into the identity, for modules that are not the decoder's."""

    FUNCTIONS = {
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
        torch.dropout_, torch.feature_dropout, torch.feature_dropout_, torch.alpha_dropout, torch.alpha_dropout_,
        torch.feature_alpha_dropout, torch.feature_alpha_dropout_,
    }  # fmt: skip

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.FUNCTIONS:
            return args[0] if args else kwargs["input"]
        return function(*args, **kwargs)
