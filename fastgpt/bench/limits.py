"""What a machine can do: the rates that operations are measured against, each timed in the same run as they are."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastgpt import huge_pages
from fastgpt.ops.linear import linear


class Limit(NamedTuple):
    """A rate of the machine: `run()` moves or does `amount` of `unit`."""

    name: str
    unit: str  # "bytes" or "flops"
    amount: int
    run: Callable[[], object]


def reading(device="cpu") -> Limit:
    """Memory read: more numbers than caches hold, in the fastest way known. On a CPU that is `linear` of one vector, on
    huge pages: up to 1.3 times as fast as their sum, which does it on a GPU."""
    x = huge_pages.empty((_numbers(device) // 1024, 1024), device=device).fill_(1)
    if x.device.type == "cpu":
        vector = torch.ones(1, 1024)
        return Limit("reading", "bytes", x.nbytes, lambda: linear(vector, x, impl="cpp"))
    return Limit("reading", "bytes", x.nbytes, x.sum)


def copying(device="cpu") -> Limit:
    """Memory read and written: a copy of more numbers than caches hold."""
    source = torch.ones(_numbers(device), device=device)
    target = torch.empty_like(source)
    return Limit("copying", "bytes", 2 * source.nbytes, lambda: target.copy_(source))


def matrix_product(device="cpu", dtype=torch.float32) -> Limit:
    """Arithmetic: the product of two square matrices, PyTorch's. On a CPU that of float32 where it is faster than that of a
    16-bit dtype, which many CPUs have no arithmetic for: to convert numbers takes little."""
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and dtype in (torch.float16, torch.bfloat16):
        dtype = min((dtype, torch.float32), key=_time_of_a_product)
    n = 1536 if on_cpu else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=torch.float32).to(dtype)
    return Limit("matrix product", "flops", 2 * n**3, lambda: a @ b)


def _time_of_a_product(dtype: torch.dtype, n: int = 384) -> float:
    a, b = torch.randn(2, n, n).to(dtype)
    a @ b
    start = time.perf_counter()
    a @ b
    return time.perf_counter() - start


def _numbers(device) -> int:
    """Float32 numbers: 0.5 GB on a CPU, 1 GB on a GPU."""
    return (128 << 20) if torch.device(device).type == "cpu" else (256 << 20)
