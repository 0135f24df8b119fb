"""Which modules a decoder may compute without calling them, and the mode in which it generates.

A decoder calls its modules. One operation in place of several calls, or a recorded step in place of all of them, is right only
where the modules compute what they were written to compute: `is_plain`.
"""

import threading
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules import module as hooked
from torch.overrides import TorchFunctionMode

# Types whose calls may be replaced by what they compute: the forward that says so, and how many weights it has, counting a
# bias that is None. Types that derive from them are others.
PLAIN = {
    nn.Linear: (nn.Linear.forward, 2), nn.Embedding: (nn.Embedding.forward, 1), nn.ModuleList: (nn.ModuleList.forward, 0)
}  # fmt: skip
PLAIN_WEIGHTS = {nn.Parameter, torch.Tensor, type(None)}  # no type that derives from them, whose operations may be its own
MATRICES = {nn.Linear, nn.Embedding}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = [getattr(hooked, f"_global{name}") for name in HOOKS]
# Functions that are called with a decoder before its weights move, as to another device: what holds their memory lets go of it.
BEFORE_WEIGHTS_MOVE = []


def plain(weights: int):
    """A decorator of a module's class with so many weights: its calls may be replaced by what its forward computes."""

    def decorate(cls: type[nn.Module]) -> type[nn.Module]:
        PLAIN[cls] = cls.forward, weights
        return cls

    return decorate


def is_plain_matrix(weight) -> bool:
    """Whether operations take a matrix as it is: a plain tensor whose rows are contiguous, not a transposed one say."""
    return weight is not None and type(weight) in PLAIN_WEIGHTS and weight.stride(-1) == 1


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module does what its class says, and nothing else.

    It does not with hooks, its own or global ones, with another forward, or where weights are not plain tensors: sharded,
    quantized, computed or transposed ones. A class that derives from a plain one is not plain, nor is one that was parametrized.
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
    """Whether plain types compute what they were written to compute: nobody has put another function in its place."""
    for kind in kinds:
        if kind.forward is not PLAIN[kind][0]:
            return False
    return True


def computes(module: nn.Module, forward) -> bool:
    """Whether calling a module is this forward, of a plain class, and nothing else."""
    return type(module).forward is forward and is_plain(module)


# Generation


class State(threading.local):
    evaluating = False


state = State()


def is_training(module: nn.Module) -> bool:
    """Whether a module drops numbers at random: in training mode, and not within `evaluating`."""
    return module.training and not state.evaluating


def others(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that are not of the decoder's own types."""
    return [module for module in model.modules() if type(module) not in PLAIN]


class evaluating:
    """Within it, in this thread, models in training mode compute as in evaluation mode, with these modules of `others`. No
    module's own state changes: another thread, or who asks in between, finds it as it was."""

    def __init__(self, others: list[nn.Module]):  # a class: generation enters one at each step, and generators take longer
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
    """Dropout of PyTorch's changes nothing: that of modules which are not the decoder's own."""

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
