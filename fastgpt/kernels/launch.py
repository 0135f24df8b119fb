"""Launching Triton kernels with less overhead in Python.

At each launch Triton decides, argument by argument and option by option, which of a function's compiled kernels to run: tens of
microseconds, where the kernels of a decode step run for a few. Here the first launch of a kind goes through Triton, and the
compiled kernel is cached by a shorter key, which holds everything that Triton specializes on. The compile-time constants and
options, which do not vary between launches, are one object that is created once, and hashed by identity.
"""

from collections.abc import Callable

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

    def launch(self, grid: tuple[int, int, int], constants: Constants, *args, **named) -> None:
        """Launches the kernel with its arguments, positional or named, without the compile-time constants; on the device of the
        first one, a tensor."""
        active, runtime = driver.active, triton.knobs.runtime
        device = active.get_current_device()
        if args[0].get_device() != device:  # rare; and to enter a device takes Python longer than to look
            with torch.cuda.device_of(args[0]):
                return self.launch(grid, constants, *args, **named)
        key, arguments = self.bind(*args, **named)
        cached = self.cached.get((device, constants, key))
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if cached is None or self.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            compiled = self.run(*args, grid=grid, warmup=False, **named, **constants)
            if compiled is not None and not hasattr(compiled, "result"):  # else it is still being compiled
                values = tuple(constants[name] for name in self.constant_names)
                self.cached[device, constants, key] = compiled.run, compiled.function, compiled.packed_metadata, values
            return
        run, function, metadata, values = cached
        run(*grid, active.get_current_stream(device), function, metadata, None, None, None, *arguments, *values)


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
