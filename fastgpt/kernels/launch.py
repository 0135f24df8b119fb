"""Kernels that are launched with less Python in front than Triton's own way takes.

At each launch Triton decides, argument by argument and option by option, which of a function's compiled kernels serves it: tens
of microseconds, where the kernels of a decode step run for a few. Here the first launch of a kind goes Triton's way, and what
it compiled is kept by a shorter key, which holds all that Triton specializes by. What does not vary from launch to launch, the
compile-time constants and options, is an object that is made once, and counts as itself.
"""

from collections.abc import Callable

import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Constants(dict):
    """Compile-time arguments of a kernel, and options of its launches: made once for all launches that have them, and not
    changed any more. No other object is equal to it."""

    __eq__, __ne__, __hash__ = object.__eq__, object.__ne__, object.__hash__


def kernel(**options) -> Callable:
    """Decorates a function that launchers launch, NAME.launch(grid, constants, ...): triton.jit with its options, and a
    `Kernel`, unless Triton's interpreter runs it.

    Pointers are named NAME_ptr and tensor descriptors NAME_desc; both may be None. Then come numbers, which may be None if they
    are not named stride_NAME or n_NAME, and last the compile-time constants.
    """

    def decorate(function):
        if triton.knobs.runtime.interpret:
            interpreted = triton.jit(**options)(function)
            interpreted.launch = lambda grid, constants, *args, **named: interpreted[grid](*args, **named, **constants)
            return interpreted
        return Kernel(function, **options)

    return decorate


class Kernel(JITFunction):
    """A function of Triton's whose launches take less time; all else is Triton's.

    What Triton is told by environment variables while it runs, to compile with other checks say, counts for kinds of launches
    that are new. Launches that somebody has hooks for, such as a profiler of Triton's, go Triton's way.
    """

    def __init__(self, function: Callable, **options):
        super().__init__(function, **options)
        self.bind, self.of_constants = binder(self)
        self.kept = {}  # by device, constants and key: what launches a compiled kernel, and what it takes

    def launch(self, grid: tuple[int, int, int], constants: Constants, *args, **named) -> None:
        """Launches the kernel with its arguments, by their places or names, but the compile-time constants."""
        key, arguments = self.bind(*args, **named)
        active, runtime = driver.active, triton.knobs.runtime
        device = active.get_current_device()
        kept = self.kept.get((device, constants, key))
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if kept is None or self.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            compiled = self.run(*args, grid=grid, warmup=False, **named, **constants)
            if compiled is not None and not hasattr(compiled, "result"):  # else nothing is compiled yet
                values = tuple(constants[name] for name in self.of_constants)
                self.kept[device, constants, key] = compiled.run, compiled.function, compiled.packed_metadata, values
            return
        run, function, metadata, values = kept
        run(*grid, active.get_current_stream(device), function, metadata, None, None, None, *arguments, *values)


def binder(of: JITFunction) -> tuple[Callable, list[str]]:
    """A function of a kernel's arguments but the compile-time constants, and the constants' names. It returns a key, which is
    another one wherever Triton would compile another kernel, and a tuple of the arguments in their order."""
    key, sizes, names, of_constants = [], [], [], []
    for p in of.params:
        x = p.name
        if p.is_constexpr:
            of_constants.append(x)
            continue
        if of_constants:
            raise TypeError(f"{x}: expected before all compile-time constants, got after {of_constants[-1]}")
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
    if sizes:  # together, for most are small
        key.append(f"None if 0 <= {' | '.join(sizes)} < {2**31} else (*map(kind_of, ({', '.join(sizes)},)),)")
    source = f"lambda {', '.join(names)}: (({', '.join(key)},), ({', '.join(names)},))"
    return eval(source, {"kind_of": kind_of}), of_constants


def kind_of(number: int | float | None) -> str | type:
    """What decides the type of a number that is not specialized."""
    if number.__class__ is not int:
        return number.__class__
    return "i32" if -(2**31) <= number < 2**31 else "i64" if number < 2**63 else "u64"
