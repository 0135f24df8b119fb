"""Captured functions: a decode step that runs again without Python.

A step of a small model is over before Python and PyTorch's dispatcher have called its hundred operations. So the step's
operations are recorded once. From then on they run one after the other: on the CPU in C++ (`Captured`), on a GPU as a CUDA
graph (`Graphed`).
"""

import functools
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.checks import is_autocasting
from fastgpt.fusion import GLOBAL_HOOKS, HOOKS, have_own_forwards, is_plain
from fastgpt.ops.library import Plan, Unchanged, library, without_autograd


class Captured:
    """`function`, a function of one tensor, recorded at its first call and replayed at later ones.

    Whatever else the function reads must be updated in place: other tensors at the same addresses are not seen. Only
    fastgpt's operations on the CPU and views of their results can be recorded. `refused` says why a function cannot be;
    it is then called each time.

    Returns the same tensor at each call, with new contents.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        self.function = function
        self.plan, self.refused = None, None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.refused is not None:
            return self.function(x)
        if self.plan is None:
            return self._record(x)
        self.input.copy_(x)
        self.plan.run()
        return self.output

    def _record(self, x):
        self.input, plan, calls = x.clone(), Plan(), Calls()
        plan.record()
        try:
            with calls:
                self.output = self.function(self.input)
        finally:
            plan.finish()
        if calls.refused is None and len(plan) != calls.operations:
            calls.refused = "an operation of fastgpt's cannot be recorded"
        self.refused = calls.refused
        if self.refused is None:
            self.plan, self.tensors = plan, calls.tensors
        return self.output


class Calls(TorchDispatchMode):
    """Sees every operation that PyTorch dispatches.

    operations: how many of fastgpt's.
    tensors: what they take and return, so that it lives as long as this does.
    refused: why they cannot be recorded, or None.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.tensors, self.refused = 0, [], None

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else torch 2.13 loads all of torch.compile at the first step, which takes seconds

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "fastgpt":
            self.operations += 1
        elif not function.is_view:
            self.refused = f"{function} is not one of fastgpt's operations"
        self.tensors.append((args, kwargs, result))
        return result


class Graphed:
    """`function`, a function of one tensor on a GPU, captured in a CUDA graph at its second call and replayed from then on.

    The first call just runs, and so compiles and loads what a capture must not. Whatever else the function reads and writes
    must be updated in place: other tensors are not seen, and its Python runs no more. It must not wait for the GPU. `refused`
    says why it could not be captured; it is then called each time.

    Returns the same tensor at each call, with new contents. If the result is like the argument, as the next token is like
    the last, it is the argument of the graph as well, and passing it to the next call copies nothing.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        self.function = function
        self.input = self.output = self.replay = self.refused = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.input is None:
            self.input = x.clone()
            return warm_up(self._run, x.device)
        if x is not self.input:
            self.input.copy_(x)
        if self.replay is None and self.refused is None:
            try:
                self.replay, self.output = cuda_graph(self._run, x.device)
            except RuntimeError as error:  # what CUDA does not capture
                self.refused = str(error)
        if self.refused is not None:
            return self._run()
        self.replay()
        return self.output

    def _run(self):
        result = self.function(self.input)
        if (result.shape, result.dtype) == (self.input.shape, self.input.dtype):
            result = self.input.copy_(result)
        return result


class Recording:
    """A step of a model, `function` of one tensor, that is recorded or captured as long as that changes nothing.

    It is where all the model's modules are plain (fastgpt/fusion.py): a call of another one is not for us to leave out. When
    a module is replaced or gets a hook, another forward, its class's included, or another value of an attribute such as a
    norm's eps, or when a weight is replaced or moves, it is recorded anew, or called each time from then on if a module is no
    longer plain. Weights that change in place are seen.

    Args:
        record: Captured or Graphed.
    """

    def __init__(self, model: torch.nn.Module, function: Callable[..., torch.Tensor], record: type):
        self.model, self.function, self.record = model, function, record
        self.step = self.unchanged = self.tables = None
        self.refused = False

    def __call__(self, x: torch.Tensor, tables=None) -> torch.Tensor:
        """function(x, tables). tables: what else it reads, the very objects each time, or it is recorded anew."""
        if self.refused or torch.is_grad_enabled() or is_autocasting(x.device):
            return self.function(x, tables)
        if self.step is None or tables is not self.tables or not self.unchanged.holds() or not have_own_forwards(self.kinds):
            self.step = self.unchanged = None  # first: what it held may be large
            modules = list(self.model.modules())
            if not all(map(is_plain, modules)):
                self.refused = True
                return self.function(x, tables)
            self.unchanged, self.weights = watch(modules)
            self.kinds = set(map(type, modules))
            self.tables, self.step = tables, self.record(lambda x: self.function(x, tables))
        return self.step(x)


def watch(modules: list[torch.nn.Module]) -> tuple[Unchanged, list[torch.Tensor]]:
    """What says whether modules are still the same, with the same weights; and these, whose memory it takes to be theirs."""
    entries = [entries for module in modules for entries in (module._modules, module._parameters, module._buffers)]
    counts = [getattr(module, name) for module in modules for name in HOOKS] + [vars(module) for module in modules]
    weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
    # What a forward pass reads besides. PyTorch's own hold what follows from their weights.
    attributes = [
        (vars(module), name)
        for module in modules
        if not isinstance(module, (torch.nn.Linear, torch.nn.ModuleList))
        for name in vars(module)
        if not name.startswith("_") and name != "training"
    ]
    entries += [owner[name] for owner, name in attributes if isinstance(owner[name], dict)]
    unchanged = Unchanged(entries, counts + GLOBAL_HOOKS, attributes)
    unchanged.watch()
    try:
        _watch(weights)
    finally:
        unchanged.finish()
    return unchanged, [weight.detach() for weight in weights]  # held, so that no new weight can take the old one's place


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are captured: one stream of each device, since a matrix product's workspace is kept for every stream."""
    return torch.cuda.Stream(device)


def warm_up(function: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """function() on the stream where it will be captured, between what the current stream has to do."""
    side, current = side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result = function()
    current.wait_stream(side)
    return result


def cuda_graph(function: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    """Captures what function() launches, without running it. Returns what runs it, and where its result then is."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        # Errors of this thread only: another one may be using the GPU.
        with torch.cuda.graph(graph, stream=side_stream(device), capture_error_mode="thread_local"):
            result = function()
    return graph.replay, result


library.define("watch(Tensor[] tensors) -> ()")
_watch = without_autograd(torch.ops.fastgpt.watch.default)


@torch.library.register_fake("fastgpt::watch", lib=library)
def _watch_fake(tensors):
    pass
