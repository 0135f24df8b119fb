"""A CUDA graph played on the CPU: what a step's Python may not do when it is captured shows in its results here too."""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt.generation import replay, sampling

WAITS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class Tape(TorchDispatchMode):
    """Records what PyTorch dispatches, and what it changed, so that it can be undone; `play` does it again.

    As in a CUDA graph, played operations read and write the tensors of the recording: no Python runs, nothing is allocated
    that outlives an operation, and a wait for results, which a capture forbids, raises RuntimeError.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._schema.name in WAITS:
            raise RuntimeError(f"{function} waits for the device, which a capture does not allow")
        for x in self.written(function, args, kwargs):
            self.before.setdefault(x.untyped_storage().data_ptr(), (x, x.untyped_storage().clone()))
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result

    @staticmethod
    def written(function, args, kwargs):
        arguments = function._schema.arguments
        given = {**dict(zip((argument.name for argument in arguments), args)), **kwargs}
        writes = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write and a.name in given]
        return [x for name in writes for x in tree_leaves(given[name]) if isinstance(x, torch.Tensor)]

    def undo(self):
        for x, storage in self.before.values():
            x.untyped_storage().copy_(storage)

    def play(self):
        for function, args, kwargs, result in self.calls:
            if function.is_view:
                continue
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():  # not what it wrote to in place
                    old.copy_(new)


def graph(function, device):
    """In place of `capture.cuda_graph`."""
    tape = Tape()
    with tape:
        result = function()
    tape.undo()
    return tape.play, result


@contextlib.contextmanager
def graphs_on_cpu():
    """Within it, decoding goes the GPU's way, with tapes for graphs. Yields a list of the plays' functions."""
    tapes = []

    def taped(function, device):
        tapes.append(graph(function, device))
        return tapes[-1]

    with (
        mock.patch.object(replay, "has_graphs", lambda device: True),
        mock.patch.object(replay, "warm_up", lambda function, device: function()),
        mock.patch.object(replay, "cuda_graph", taped),
        taped_operations(),
    ):
        yield tapes


@contextlib.contextmanager
def taped_operations():
    """Within it, what is not PyTorch's on a CPU, and so not on the tape, is as on a GPU."""
    with mock.patch.object(sampling, "most_likely", lambda logits: logits.argmax(-1)):
        yield
