"""Replay of a decode step without Python.

A step of a small model is over before Python and PyTorch's dispatcher have called its hundred operations. So the step's
operations are recorded once. From then on they run one after the other: on the CPU in C++ (`CpuReplay`), on a GPU as a CUDA
graph (`CudaGraphReplay`).
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt.checks import is_autocasting
from fastgpt.model.fusion import GLOBAL_HOOKS, HOOKS, PLAIN, have_own_forwards, is_plain
from fastgpt.ops.library import Plan, Unchanged, library, without_autograd
from fastgpt.ops.quantized_weight import QuantizedWeight


class CpuReplay:
    """Records `function`, of one tensor, at its first call, and replays it at later ones.

    All other tensors that the function reads must be updated in place. Only fastgpt's operations on the CPU and views of
    their results can be recorded. If a function cannot be recorded, `refused` says why, and it is called each time.

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
        self.input, plan, calls = x.clone(), Plan(), DispatchRecorder()
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
            self.plan, self.owned, self.function = plan, calls.owned, None
        return self.output


class DispatchRecorder(TorchDispatchMode):
    """Observes every operation that PyTorch dispatches, and keeps the memory alive that they read and write.

    Args:
        results: whether to own what they return, too. A CUDA graph has a pool of memory for what is made within it, which
            can then serve one operation after the other.

    operations: how many of fastgpt's.
    owned: by storage, a tensor of it. Nothing that is assigned to, or becomes of, the tensors that were passed frees it.
    refused: why they cannot be recorded on a CPU, or None.
    """

    def __init__(self, results: bool = True):
        super().__init__()
        self.operations, self.refused, self.results = 0, None, results
        self.owned: dict[int, torch.Tensor] = {}
        self.made: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else torch 2.13 loads all of torch.compile at the first step, which takes seconds

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for storage, x in storages((args, kwargs)):
            if storage not in self.made and storage not in self.owned:
                self.owned[storage] = x.detach()
        result = function(*args, **kwargs)
        if function.namespace == "fastgpt":
            self.operations += 1
        elif not function.is_view:
            self.refused = f"{function} is not one of fastgpt's operations"
        for storage, x in storages(result):
            if storage in self.owned:
                continue
            if self.results:
                self.owned[storage] = x.detach()
            else:
                self.made.add(storage)
        return result


def storages(values: Any) -> list[tuple[int, torch.Tensor]]:
    """The strided tensors in a nested structure, each with the identity of its storage."""
    tensors = (x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and x.layout is torch.strided)
    return [(x.untyped_storage()._cdata, x) for x in tensors]


class CudaGraphReplay:
    """Captures `function`, of one tensor on a GPU, in a CUDA graph at its second call, and replays it from then on.

    The first call runs eagerly, to compile and load what must not be compiled or loaded during capture. All other tensors
    that the function reads and writes must be updated in place; they live as long as the graph. The function must not
    synchronize with the GPU. The caller has to know that beforehand, since PyTorch does not recover from a failed capture.

    Returns the same tensor at each call, with new contents. If the result is like the argument, as the next token is like
    the last, it is the argument of the graph as well, and passing it to the next call copies nothing.

    Raises: RuntimeError if the capture fails.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        self.function: Any = function
        self.input: torch.Tensor | None = None
        self.output: Any = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.input is None:
            self.input = x.clone()
            return warm_up(self._run, x.device)
        if x is not self.input:
            self.input.copy_(x)
        if self.replay is None:
            calls = DispatchRecorder(results=False)

            def run():
                with calls:
                    return self._run()

            try:
                self.replay, self.output = cuda_graph(run, x.device)
            except RuntimeError as error:
                raise RuntimeError(
                    f"a step could not be captured in a CUDA graph ({error}), after which PyTorch's state on {x.device} is "
                    "not to be relied on"
                ) from error
            self.owned, self.function = calls.owned, None
        self.replay()
        return self.output

    def _run(self):
        result = self.function(self.input)
        if (result.shape, result.dtype) == (self.input.shape, self.input.dtype):
            result = self.input.copy_(result)
        return result


class Recording:
    """A step of a model, `function` of one tensor, that is recorded or captured where results stay the same.

    They do if all modules of the model are plain (fastgpt/model/fusion.py); other modules must be called. The step is recorded
    again, or called each time if that is refused, when a module is replaced or gets a hook, another class, another forward
    (its class's included) or another value of an attribute such as a norm's eps, and when a weight is replaced or moves.
    In-place changes of weights take effect without that.

    Args:
        record: CpuReplay or CudaGraphReplay.
        refuses: returns why the step cannot be recorded or captured, or None; called before each attempt.

    refused: its last result.
    """

    def __init__(
        self, model: torch.nn.Module, function: Callable[..., torch.Tensor], record: type,
        refuses: Callable[[], str | None] | None = None,
    ):  # fmt: skip
        self.record = record
        self.model: Any
        self.function: Any
        self.refuses: Any
        self.resume(model, function, refuses)
        self.step: Any = None
        self.unchanged: Any = None
        self.tables: Any = None
        self.refused: str | None = None

    def __call__(self, x: torch.Tensor, tables: Any = None) -> torch.Tensor:
        """function(x, tables). tables: what else it reads, the very objects each time, or it is recorded anew."""
        if self.refused is not None or torch.is_grad_enabled() or is_autocasting(x.device):
            return self.function(x, tables)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # the caller's capture
            return self.function(x, tables)
        if self.step is None or tables is not self.tables or not self.holds():
            self.step = self.unchanged = None  # first: what it held may be large
            self.refused = self.refuses()
            if self.refused is not None:
                return self.function(x, tables)
            modules = list(self.model.modules())
            self.unchanged, self.weights = watch(modules)
            self.kinds, self.kind = set(map(type, modules)), type(self.model)
            function = self.function
            self.tables, self.step = tables, self.record(lambda x: function(x, tables))
        return self.step(x)

    def holds(self) -> bool:
        """Whether what was recorded may run again: modules and weights are what they were."""
        return (
            self.is_recorded
            and self.unchanged.holds()
            and (self.model is None or type(self.model) is self.kind)
            and have_own_forwards(self.kinds)
        )

    @property
    def is_recorded(self) -> bool:
        """Whether the next call replays, if what was recorded still holds."""
        return self.step is not None and getattr(self.step, "refused", None) is None

    def let_go(self) -> None:
        """Lets go of the model, which what was recorded does not need, until `resume`."""
        self.model = self.function = self.refuses = None

    def resume(
        self, model: torch.nn.Module, function: Callable[..., torch.Tensor], refuses: Callable[[], str | None] | None = None
    ) -> None:
        """With the arguments that this one was made with, or others that do the same."""
        self.model, self.function = model, function
        self.refuses = functools.partial(modules_refuse, model) if refuses is None else refuses


def modules_refuse(model: torch.nn.Module) -> str | None:
    """Why calls of a model's modules cannot be left out, by the first that does not let them; or None."""
    for name, module in model.named_modules():
        if not is_plain(module):
            return f"{name or 'the model'} {_what_is_not_plain(module)}"
    return None


def _what_is_not_plain(module: torch.nn.Module) -> str:
    if type(module) not in PLAIN:
        return f"is of a class that only itself knows, {type(module).__name__}"
    if any(getattr(module, name) for name in HOOKS) or any(GLOBAL_HOOKS):
        return "has hooks, or all modules have"
    return "has another forward than its class, or weights that are no plain tensors"


def watch(modules: list[torch.nn.Module]) -> tuple[Any, list[torch.Tensor]]:
    """What says whether modules are still the same, with the same weights; and these, whose memory it takes to be theirs."""
    entries = [entries for module in modules for entries in (module._modules, module._parameters, module._buffers)]
    counts = [getattr(module, name) for module in modules for name in HOOKS] + [vars(module) for module in modules]
    weights = [
        weight.blocks if isinstance(weight, QuantizedWeight) else weight
        for module in modules
        for weight in module._parameters.values()
        if weight is not None
    ]
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
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph, which waits for the device and gives back the memory that the next step will ask for again.
    with torch.cuda.stream(side_stream(device)):
        graph.capture_begin(capture_error_mode="thread_local")  # errors of this thread only: another one may be using the GPU
        try:
            result = function()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # which says only that the capture has failed
                graph.capture_end()
            raise
        graph.capture_end()
    return graph.replay, result


library.define("watch(Tensor[] tensors) -> ()")
_watch = without_autograd(torch.ops.fastgpt.watch.default)


@torch.library.register_fake("fastgpt::watch", lib=library)
def _watch_fake(tensors):
    pass
