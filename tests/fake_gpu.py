"""A driver without a GPU: launches of Triton kernels go through the real specialisation, and end before anything is compiled
or run. Tensors on the meta device do, which have sizes and strides and no memory."""

import contextlib
from typing import NamedTuple
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Driver:
    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self):
        return -self.target.arch  # what is cached for it is no real device's

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("meta")


class Launch(NamedTuple):
    kernel: str
    variant: str  # what a kernel that is compiled is found by again
    signature: dict[str, str]  # argument -> type
    arguments: dict  # argument -> what was passed
    grid: tuple[int, ...]


@contextlib.contextmanager
def launches(arch: int = 90):
    """Within it, launches are only added to the list that it gives."""
    found: list[Launch] = []
    pending: list[tuple] = []
    run = JITFunction.run

    def would_compile(*, key, compile, **_):
        pending.append((key, compile["signature"]))
        return True  # do not

    def record(self, *args, grid, warmup, **kwargs):
        run(self, *args, grid=grid, warmup=True, **kwargs)
        variant, signature = pending.pop()
        passed = dict(zip(self.arg_names, args)) | kwargs
        found.append(Launch(self.fn.__name__, variant, signature, passed, grid))

    with (
        mock.patch.object(driver, "_active", Driver(arch)),
        mock.patch.object(knobs.runtime, "jit_cache_hook", would_compile),
        mock.patch.object(JITFunction, "run", record),
    ):
        yield found


def meta(*shape, strides=None, offset=0, dtype=torch.float16):
    """A tensor without memory: any size, any strides."""
    if strides is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
