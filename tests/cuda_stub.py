"""What of torch.cuda a CUDA graph takes, on the CPU: calls are recorded, and a wait under capture is refused.

And CUDA tensors that are not there: fake ones, of which everything but their numbers is known.
"""

import contextlib
from unittest import mock

import torch
from tape import Tape, taped_operations
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from fastgpt.generation import replay
from fastgpt.model import fusion


class StubGraph:
    """In place of torch.cuda.CUDAGraph. A replay runs what was captured again, with none of its Python.

    reads: of what the capture took that was there before it, and of what it made, references that keep nothing alive.
    """

    log: list[str]
    plays = True

    def __init__(self):
        self.tape, self.reads = Tape(), []
        self.log.append("CUDAGraph")

    def capture_begin(self, pool=None, capture_error_mode="global"):
        self.log.append("capture_begin")
        self.tape.__enter__()

    def capture_end(self):
        self.tape.__exit__(None, None, None)
        self.tape.undo()
        self.log.append("capture_end")
        if not self.plays:
            tensors = tree_leaves([(args, kwargs) for _, args, kwargs, _ in self.tape.calls])
            self.reads = [StorageWeakRef(x.untyped_storage()) for x in tensors if isinstance(x, torch.Tensor)]
            self.tape = None

    def replay(self):
        self.log.append("replay")
        if self.plays:
            self.tape.play()


@contextlib.contextmanager
def torch_cuda(graph, wait, wait_stream=lambda: None):
    """Within it, what of torch.cuda capturing takes is there without a GPU.

    graph: in place of CUDAGraph. wait: called with the name of what would wait for the device. wait_stream: when a stream is
        to wait for another one, which the host does not.
    """

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, other):
            wait_stream()

    with (
        mock.patch.object(torch.cuda, "CUDAGraph", graph),
        mock.patch.object(torch.cuda, "Stream", Stream),
        mock.patch.object(torch.cuda, "current_stream", lambda device=None: Stream(device)),
        mock.patch.object(torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "synchronize", lambda device=None: wait("synchronize")),
        mock.patch.object(torch.cuda, "empty_cache", lambda: wait("empty_cache")),
    ):
        replay.side_stream.cache_clear()
        yield
    replay.side_stream.cache_clear()


@contextlib.contextmanager
def stubbed_cuda(plays: bool = True):
    """Within it, decoding on the CPU goes the GPU's way, through a stub of torch.cuda. Yields the names of its calls.

    plays: False for graphs that forget what they captured, but whether it is still there (`StubGraph.reads`).
    """
    log, graphs = [], []

    class Graph(StubGraph):
        def __init__(self):
            super().__init__()
            graphs.append(self)

    with (
        mock.patch.object(StubGraph, "log", log, create=True),
        mock.patch.object(StubGraph, "plays", plays),
        torch_cuda(Graph, log.append, lambda: log.append("wait_stream")),
        mock.patch.object(replay, "has_graphs", lambda device: True),
        taped_operations(),
    ):
        yield Log(log, graphs)


class Log:
    """calls: names of what was called, in order. graphs: that were made."""

    def __init__(self, calls: list[str], graphs: list[StubGraph]):
        self.calls, self.graphs = calls, graphs


@contextlib.contextmanager
def fake_cuda(model, dtype=None):
    """Within it a decoder, for good, and all that is made for it, lies on a GPU that is not there."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda:0"), torch.no_grad(),
        mock.patch.object(fusion, "PLAIN_WEIGHTS", fusion.PLAIN_WEIGHTS | {FakeTensor}),
    ):  # fmt: skip
        yield on_fake_cuda(model, dtype)


def on_fake_cuda(model, dtype=None):
    """The model itself, within a FakeTensorMode, with fake weights on a GPU."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                made = torch.empty(weight.shape, dtype=dtype or weight.dtype, device="cuda:0")
                module._parameters[name] = torch.nn.Parameter(made)
    return model
