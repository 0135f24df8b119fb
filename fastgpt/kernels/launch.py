"""Kernels that are launched with less Python in front than Triton's own way takes.

At each launch Triton decides, argument by argument and option by option, which of a function's compiled kernels serves it: tens
of microseconds, where the kernels of a decode step run for a few. Here the first launch of a kind goes Triton's way, and what
it compiled is kept by a shorter key, which holds all that Triton specializes by.
"""

import functools
from collections.abc import Callable

import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction


def kernel(**options) -> Callable:
    """Decorates a function that launchers launch, NAME[grid](...): triton.jit with its options, and a `Kernel`, unless Triton's
    interpreter runs it.

    Pointers are named NAME_ptr and tensor descriptors NAME_desc; both may be None. Other arguments are compile-time constants,
    or numbers, which may be None if they are not named stride_NAME or n_NAME.
    """

    def decorate(function):
        if triton.knobs.runtime.interpret:
            return triton.jit(**options)(function)
        return Kernel(function, **options)

    return decorate


class Kernel(JITFunction):
    """A function of Triton's whose launches take less time; all else is Triton's.

    What Triton is told by environment variables while it runs, to compile with other checks say, counts for kinds of launches
    that are new. Launches that somebody has hooks for, such as a profiler of Triton's, go Triton's way.
    """

    def __init__(self, function: Callable, **options):
        super().__init__(function, **options)
        self.bind = binder(self)
        self.kept = {}  # by device and key: what launches a compiled kernel, and what it takes

    def __getitem__(self, grid: tuple[int, ...]):
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args, **options) -> None:
        key, arguments = self.bind(*args, **options)
        active, runtime = driver.active, triton.knobs.runtime
        device = active.get_current_device()
        kept = self.kept.get((device, key))
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if kept is None or self.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            compiled = self.run(*args, grid=grid, warmup=False, **options)
            if compiled is not None and not hasattr(compiled, "result"):  # else nothing is compiled yet
                self.kept[device, key] = compiled.run, compiled.function, compiled.packed_metadata
            return
        run, function, metadata = kept
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        run(x, y, z, active.get_current_stream(device), function, metadata, None, None, None, *arguments)


def binder(of: JITFunction) -> Callable:
    """A function of a kernel's arguments and options. Returns a key, which is another one wherever Triton would compile another
    kernel, and a tuple of all arguments in their order."""
    key, sizes, defaults = [], [], {}
    for p in of.params:
        x = p.name
        if p.has_default:
            defaults[x] = p.default
        if x.endswith("_desc"):
            key.append(f"None if {x} is None else ({x}.base.dtype, *{x}.block_shape)")
        elif p.is_constexpr:
            key.append(x)
        elif p.annotation_type:
            raise TypeError(f"{x}: expected an argument without an annotated type, got {p.annotation_type}")
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
    names = [p.name for p in of.params]
    signature = ", ".join(name + f"=defaults['{name}']" * (name in defaults) for name in names)
    source = f"lambda {signature}, **options: (({', '.join(key)}, *options, *options.values()), ({', '.join(names)},))"
    return eval(source, {"defaults": defaults, "kind_of": kind_of})


def kind_of(number: int | float | None) -> str | type:
    """What decides the type of a number that is not specialized."""
    if number.__class__ is not int:
        return number.__class__
    return "i32" if -(2**31) <= number < 2**31 else "i64" if number < 2**63 else "u64"
