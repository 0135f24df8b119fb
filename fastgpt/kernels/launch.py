"""Launching Triton kernels with less overhead in Python.

At each launch Triton decides, argument by argument and option by option, which of a function's compiled kernels to run: tens of
microseconds, where the kernels of a decode step run for a few. Here the first launch of a kind goes through Triton, and the
compiled kernel is cached by a shorter key, which holds everything that Triton specializes on. The compile-time constants and
options, which do not vary between launches, are one object that is created once, and hashed by identity.

What a launcher itself decides, it decides in a function of the layouts of its tensors and of numbers, and `plan` calls that once
for all calls that are alike: a later call allocates its outputs, and its `Launch` passes pointers on.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Constants(dict):
    """Compile-time arguments of a kernel and options of its launches: created once for all launches that share them, and never
    changed. Compared and hashed by identity."""

    __eq__, __ne__, __hash__ = object.__eq__, object.__ne__, object.__hash__


def kernel(**options) -> Callable:
    """A decorator like triton.jit, with its options, for kernels that are launched by NAME.launch(grid, constants, ...). Makes a
    `Kernel`, unless Triton's interpreter runs it.

    Pointers are named NAME_ptr and tensor descriptors NAME_desc; both may be None. Then come scalars, which may be None unless
    they are named stride_NAME or n_NAME, and last the compile-time constants.
    """

    def decorate(function):
        if triton.knobs.runtime.interpret:
            interpreted = triton.jit(**options)(function)
            interpreted.launch = lambda grid, constants, *args, **named: interpreted[grid](*args, **named, **constants)
            return interpreted
        return Kernel(function, **options)

    return decorate


class Kernel(JITFunction):
    """A JITFunction whose launches take less time.

    Changes of Triton's environment variables at run time, for example to compile with other checks, affect only kinds of
    launches that are new. While launch hooks are set, by Triton's profiler for example, launches go through Triton.
    """

    def __init__(self, function: Callable, **options):
        super().__init__(function, **options)
        self.bind, self.constant_names = binder(self)
        self.cached = {}  # (device, constants, key) -> a compiled kernel's launcher and its arguments

    def launch(self, grid: tuple[int, int, int], constants: Constants, *args, **named) -> tuple | None:
        """Launches the kernel with its arguments, positional or named, without the compile-time constants; on the device of the
        first one, a tensor. Returns what is cached for the next such launch, None if nothing is."""
        active = driver.active
        device = active.get_current_device()
        if args[0].get_device() != device:  # rare; and to enter a device takes Python longer than to look
            with torch.cuda.device_of(args[0]):
                return self.launch(grid, constants, *args, **named)
        key, arguments = self.bind(*args, **named)
        cached = self.cached.get((device, constants, key))
        if cached is None or self.is_hooked():
            compiled = self.run(*args, grid=grid, warmup=False, **named, **constants)
            if compiled is not None and not hasattr(compiled, "result"):  # else it is still being compiled
                values = tuple(constants[name] for name in self.constant_names)
                cached = compiled.run, compiled.function, compiled.packed_metadata, values
                self.cached[device, constants, key] = cached
            return cached
        run, function, metadata, values = cached
        run(*grid, active.get_current_stream(device), function, metadata, None, None, None, *arguments, *values)
        return cached

    def is_hooked(self) -> bool:
        """Whether Triton has something to do before or after a launch."""
        runtime = triton.knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        return bool(self.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Layout(NamedTuple):
    """What a launcher may know of a tensor when it decides: everything but its memory. Methods are those of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    address: int  # the remainder modulo 16
    device: torch.device

    def stride(self, dim: int | None = None) -> Any:
        return self.strides if dim is None else self.strides[dim]

    def data_ptr(self) -> int:
        return self.address

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides)):
            if size != 1 and stride != expected and self.numel():
                return False
            expected *= size
        return True

    def view(self, dtype: torch.dtype) -> "Layout":
        """One of elements of the same size."""
        return self._replace(dtype=dtype)

    def expand(self, *shape: int) -> "Layout":
        new = len(shape) - len(self.shape)
        of_old = (0 if size == 1 < n else stride for size, n, stride in zip(self.shape, shape[new:], self.strides))
        return self._replace(shape=shape, strides=(*(0,) * new, *of_old))


def plan(decide: Callable, tensors: tuple, *numbers) -> Any:
    """decide(layouts, *numbers), the layouts being those of the tensors, some of which may be None, but not the first. The answer
    is kept for all calls that are alike in these, and so may depend on nothing else, but on the device. Numbers that are equal
    count as the same, whatever their types are."""
    x = tensors[0]
    layouts = [None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() & 15) for x in tensors]
    return decided(decide, x.device, tuple(layouts), *numbers)


@functools.lru_cache(4096)  # the steps of a generation are alike; but each length of a cache that grows is another call
def decided(decide: Callable, device: torch.device, layouts: tuple, *numbers) -> Any:
    """What `plan` keeps."""
    return decide(tuple(None if x is None else Layout(*x, device) for x in layouts), *numbers)


class Launch:
    """A launch, but for the tensors that are its kernel's first arguments, and descriptors among them. It is part of what `plan`
    keeps: tensors that it is called with differ in their memory only. Outputs are aligned to 16 bytes, as PyTorch allocates them.
    """

    BYTES = torch.bool, torch.float8_e4m3fn  # which not every architecture supports: kernels take them as bytes

    def __init__(self, kernel: Kernel, grid: tuple[int, int, int], constants: Constants, *numbers):
        self.kernel, self.grid, self.constants, self.numbers = kernel, grid, constants, numbers
        self.cached: tuple | None = None
        self.device = -1

    def __call__(self, *tensors) -> None:
        if self.cached is not None:
            active = driver.active
            if active.get_current_device() == self.device and not self.kernel.is_hooked():
                run, function, metadata, rest = self.cached
                run(*self.grid, active.get_current_stream(self.device), function, metadata, None, None, None, *tensors, *rest)
                return
        self.anew(*tensors)

    def anew(self, *tensors) -> None:
        """Launches the kernel as it launches any other, and keeps what is cached for that."""
        views = [x.view(torch.uint8) if getattr(x, "dtype", None) in self.BYTES else x for x in tensors]
        cached = self.kernel.launch(self.grid, self.constants, *views, *self.numbers)
        if cached is not None:
            *compiled, values = cached
            self.cached, self.device = (*compiled, self.numbers + values), tensors[0].get_device()


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor of those that `plan` takes, for a decision that it has to be copied."""
    return None if x is None else x.contiguous()


def dense(*shape: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape and strides of a contiguous tensor, for new_empty_strided: new_empty takes Python a microsecond longer."""
    following = (math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))
    return shape, tuple(following)


def no_launch(*tensors) -> None:
    """In place of a `Launch` that would have no programs."""


def binder(of: JITFunction) -> tuple[Callable, list[str]]:
    """A function that binds a kernel's arguments, without the compile-time constants, and the constants' names. It returns a
    key, which differs wherever Triton would compile another kernel, and the tuple of arguments in order."""
    key, sizes, names, constant_names = [], [], [], []
    for p in of.params:
        x = p.name
        if p.is_constexpr:
            constant_names.append(x)
            continue
        if constant_names:
            raise TypeError(f"{x}: expected before all compile-time constants, got after {constant_names[-1]}")
        if p.annotation_type:
            raise TypeError(f"{x}: expected an argument without an annotated type, got {p.annotation_type}")
        names.append(x)
        if x.endswith("_desc"):
            key.append(f"None if {x} is None else ({x}.base.dtype, *{x}.block_shape)")
        elif x.endswith("_ptr"):
            key.append(f"None if {x} is None else {x}.dtype")
            if not p.do_not_specialize and not p.do_not_specialize_on_alignment:
                key.append(f"{x} is not None and {x}.data_ptr() % 16 == 0")
        elif x.startswith(("stride_", "n_")) and p.do_not_specialize:
            sizes.append(x)
        else:
            key.append(f"kind_of({x})" if p.do_not_specialize else f"{x} if {x}.__class__ is int else {x}.__class__")
    if sizes:  # checked together, as nearly all fit into 31 bits
        key.append(f"None if 0 <= {' | '.join(sizes)} < {2**31} else (*map(kind_of, ({', '.join(sizes)},)),)")
    source = f"lambda {', '.join(names)}: (({', '.join(key)},), ({', '.join(names)},))"
    return eval(source, {"kind_of": kind_of}), constant_names


def kind_of(number: int | float | None) -> str | type:
    """The type that Triton gives a scalar that is not specialized."""
    if number.__class__ is not int:
        return number.__class__
    return "i32" if -(2**31) <= number < 2**31 else "i64" if number < 2**63 else "u64"
