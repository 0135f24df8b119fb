"""GPUs that are not there. Launches of Triton kernels go Triton's own way, through its specialization, tensor descriptors and
compile keys, for any architecture; only the launch itself does not take place.

`launches` takes tensors on the meta device, which have sizes and strides and no memory, and launchers that are called
directly. Within `gpu`, tensors are on cuda:0, and all of the package and PyTorch above the launchers runs as on a GPU.
"""

import ast
import contextlib
import ctypes
import functools
import inspect
import itertools
import pkgutil
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from cuda_stub import torch_cuda
from tape import WAITS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastgpt import kernels
from fastgpt.integrations.sdpa import refusals as sdpa_refusals
from fastgpt.kernels.architecture import architecture
from fastgpt.kernels.dependent_launch import has_dependent_launch
from fastgpt.kernels.launch import decided
from fastgpt.model import fusion
from fastgpt.model.rope import Tables
from fastgpt.ops import implementations
from fastgpt.ops.kv_cache_update import refusals as updating

ARCHITECTURES = (80, 89, 90, 100, 120)


class Driver:
    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)
        self.device = next(DEVICES)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("meta")


DEVICES = itertools.count(-1, -1)  # what Triton keeps for one is no real device's, nor an earlier driver's


class Launch(NamedTuple):
    kernel: str
    variant: str  # what a kernel that is compiled is found by again
    signature: dict[str, str]  # argument -> type
    arguments: dict  # argument -> what was passed
    grid: tuple[int, ...]
    source: tuple  # module, name, signature, constants and attributes: what the compiler takes
    options: dict  # of the compiler
    compiled: CompiledKernel | None


class Kernel:
    """In place of Triton's CompiledKernel."""

    function, packed_metadata = None, ()

    def __init__(self, of, key, source, options, compiled, found):
        self.of, self.key, self.source, self.options = of, key, source, options
        self.compiled, self.found = compiled, found

    def launch_metadata(self, grid, stream, *args):
        return None

    def run(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *args):
        arguments = dict(zip(self.of.arg_names, args, strict=True))
        signature, grid = self.source[2], (x, y, z)
        name = self.of.fn.__name__
        self.found.append(Launch(name, self.key, signature, arguments, grid, self.source, self.options, self.compiled))


def names_of_launched(module) -> set[str]:
    """The names of the functions that a module's launchers launch: NAME.launch(...) or Launch(NAME, ...)."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        match node:
            case ast.Call(ast.Attribute(ast.Name(name), "launch")) | ast.Call(ast.Name("Launch"), [ast.Name(name), *_]):
                names.add(name)
    return names - {"self"}


@functools.cache
def launched_kernels() -> dict[str, JITFunction]:
    """The functions that the package's launchers launch, by their names."""
    modules = [import_module(f"fastgpt.kernels.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)]
    return {name: getattr(module, name) for module in modules for name in names_of_launched(module)}


def variants(launched) -> Counter:
    """Kernel -> how many of it were compiled, of launches among events."""
    return Counter(kernel for kernel, _ in {(x.kernel, x.variant) for x in launched if isinstance(x, Launch)})


@contextlib.contextmanager
def launches(arch: int = 90, compiles: bool = False, found: list | None = None):
    """Within it, launches are only added to a list, which it gives. compiles: kernels are compiled, as before a launch."""
    found = [] if found is None else found
    compile_kernel = JITFunction._do_compile

    def stand_in(self, key, signature, device, constexprs, options, attrs, warmup):
        compiled = compile_kernel(self, key, signature, device, constexprs, options, attrs, warmup) if compiles else None
        source = self.module, self.fn.__name__, signature, constexprs, attrs
        kernel = Kernel(self, key, source, vars(options), compiled, found)
        self.device_caches[device][0][key] = kernel
        return kernel

    active = Driver(arch)
    decided.cache_clear()
    with (
        mock.patch.object(driver, "_active", active),
        mock.patch.object(JITFunction, "_do_compile", stand_in),
        mock.patch.object(torch.Tensor, "get_device", lambda x: active.device),
    ):
        yield found


def meta(*shape, strides=None, offset=0, dtype=torch.float16):
    """A tensor without memory: any size, any strides."""
    if strides is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


# All of the package


class Wait(NamedTuple):
    """What the host waits for the device by."""

    operation: str


class Operation(NamedTuple):
    """What PyTorch, or the package's CUDA library, launches."""

    name: str


COPIES, SCALARS = {"aten::_to_copy", "aten::copy_"}, {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero"}
LAUNCH_NOTHING = {  # of operations that are no views
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided", "aten::detach",
    "aten::is_same_size", "aten::lift_fresh", "fastgpt::watch",
}  # fmt: skip
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def has_mask(indices) -> bool:
    """Whether an index has as many numbers as a mask has ones, which the host has to know."""
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(indices))


def devices_of(values) -> set[str]:
    return {x.device.type for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


class Gpu(TorchDispatchMode):
    """Has operations do what they do on a GPU, up to the launch.

    events: in order, each Launch, Operation and Wait. A Wait during a capture raises RuntimeError, as PyTorch does; at other
        times it is answered by zeros.
    captures: of each graph, its events.
    """

    def __init__(self):
        super().__init__()
        self.events, self.captures, self.is_capturing = [], [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        if function.namespace in ("prim", "profiler"):
            return function(*args, **kwargs)
        with self:
            ours = function.namespace == "fastgpt" or name == "aten::scaled_dot_product_attention"  # if that is hooked
            if ours and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
                return function.redispatch(CUDA, *args, **kwargs)
            if name not in WAITS and (result := function.decompose(*args, **kwargs)) is not NotImplemented:
                return result  # of others, which it consists of; inference mode leaves that to us
        given = devices_of((args, kwargs))
        if "cuda" in given and (name in WAITS or name.startswith("aten::index") and has_mask(args[1])):
            self.wait(name)
            if name in SCALARS:
                return 0.0 if args[0].dtype.is_floating_point else False if args[0].dtype is torch.bool else 0
        result = function(*args, **kwargs)
        devices = given | devices_of(result)
        if "cuda" not in devices or function.is_view or name in LAUNCH_NOTHING:
            pass
        elif name in COPIES and len(devices) > 1 and not is_pinned(args[0]):
            self.wait(f"{name} to another device")
        else:
            self.events.append(Operation(name))
        return result

    def wait(self, operation: str) -> None:
        if self.is_capturing:
            raise RuntimeError(f"{operation} waits for the device, which a capture does not allow")
        self.events.append(Wait(operation))

    def graph(gpu):
        """In place of torch.cuda.CUDAGraph."""

        class Graph:
            def capture_begin(self, pool=None, capture_error_mode="global"):
                self.begin, gpu.is_capturing = len(gpu.events), True

            def capture_end(self):
                gpu.captures.append(gpu.events[self.begin :])
                del gpu.events[self.begin :]
                gpu.is_capturing = False

            def replay(self):
                gpu.events.append(Operation("replay"))

        return Graph


@contextlib.contextmanager
def device_guard():
    """Within it, PyTorch's C++ finds that CUDA devices can be entered, which a build without CUDA denies, as in a build with it
    and without a GPU: as the meta device, which takes nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")  # by c10::DeviceType
    cuda, meta = 1, 14
    before, guards[cuda] = guards[cuda], guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


def tables(self: Tables, positions: int, x: torch.Tensor, *keys) -> tuple[torch.Tensor, ...]:
    """As for real tensors, in which a table that is kept is made in another thread, outside of all modes."""
    rows = min(max(self.LEAST, positions), self.most)
    if (x.device, *keys) not in self.held or len(self.held[(x.device, *keys)][0]) < rows:
        self.held[(x.device, *keys)] = self._made(rows, x.device, *keys)
    return self.held[(x.device, *keys)]


def pinned(x: torch.Tensor) -> torch.Tensor:
    x._is_pinned = True
    return x


def is_pinned(x: torch.Tensor) -> bool:
    return getattr(x, "_is_pinned", False)


def backward(loss: torch.Tensor) -> None:
    """loss.backward(), node by node: PyTorch's own has a thread for each device, and none for one that is not there."""
    waiting, seen, todo = Counter(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            following = [after for after, _ in node.next_functions if after is not None]
            waiting.update(following)
            todo += following
    gradients, ready = {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = gradients.pop(node, {})
            inputs = [
                given[i].sum_to_size(expected.shape).to(expected.dtype) if i in given else None
                for i, expected in enumerate(node._input_metadata)
            ]
            if hasattr(node, "variable"):
                x = node.variable
                x.grad = inputs[0] if x.grad is None else x.grad + inputs[0]
                continue
            outputs = node.apply(*inputs) if isinstance(node, torch._C._FunctionBase) else node(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for (after, i), gradient in zip(node.next_functions, outputs):
                if after is None:
                    continue
                if gradient is not None:
                    into = gradients.setdefault(after, {})
                    into[i] = into[i] + gradient if i in into else gradient
                waiting[after] -= 1
                if not waiting[after]:
                    ready.append(after)


def data_ptr(tensor: FakeTensor) -> int:
    """As if PyTorch's allocator, which aligns to 512 bytes, had made it."""
    return 2**32 + tensor.storage_offset() * tensor.element_size()


@contextlib.contextmanager
def gpu(arch: int = 90, compiles: bool = False, cuda_library: bool = True):
    """Within it, tensors on cuda:0 can be made and worked with, and nothing of it happens but what the `Gpu` it gives notes.

    cuda_library: whether the package's own is there.
    """
    device, tensor = Gpu(), torch.tensor

    def maybe_pinned(*args, pin_memory=False, **kwargs):
        return pinned(tensor(*args, **kwargs)) if pin_memory else tensor(*args, **kwargs)

    tensors = contextlib.nullcontext() if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) else FakeTensorMode()
    architecture.cache_clear(), implementations._capability.cache_clear(), has_dependent_launch.cache_clear()
    _device_constructors()  # which it remembers, and which would else be those patched here
    with (
        mock.patch.object(FakeTensor, "data_ptr", data_ptr),
        mock.patch.object(torch.Tensor, "backward", backward),
        mock.patch.object(torch.Tensor, "pin_memory", pinned),
        mock.patch.object(torch, "tensor", maybe_pinned),
        mock.patch.object(Tables, "__call__", tables),
        device_guard(),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(multi_processor_count=132)),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: device.is_capturing),
        mock.patch.object(updating, "CUDA_MISSING", None if cuda_library else "the CUDA library is not there"),
        mock.patch.object(fusion, "PLAIN_WEIGHTS", fusion.PLAIN_WEIGHTS | {FakeTensor}),
        mock.patch.object(sdpa_refusals, "PLAIN_TENSORS", {*sdpa_refusals.PLAIN_TENSORS, FakeTensor}),
        mock.patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0),  # this one is no mode of the caller's
        torch_cuda(device.graph(), device.wait),
        tensors, launches(arch, compiles, device.events), device,
    ):  # fmt: skip
        yield device
    architecture.cache_clear(), implementations._capability.cache_clear(), has_dependent_launch.cache_clear()
