"""Evaluation mode for one thread: generation and evaluation without dropout, whatever `module.training` is."""

import threading

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fastgpt.model.fusion import PLAIN


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
