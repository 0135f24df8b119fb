"""The roofline of a machine: its memory bandwidth and matrix-product rate, timed in the same rounds as what is compared."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastgpt import huge_pages
from fastgpt.ops.linear import linear


class Limit(NamedTuple):
    """A rate that the roofline is made of: `run()` moves or computes `amount` of `unit`."""

    name: str
    unit: str  # "bytes" or "flops"
    amount: int
    run: Callable[[], object]


def reading(device: torch.device | str = "cpu") -> Limit:
    """Read bandwidth, of more data than fits into caches. On a CPU by `linear` of one vector, on huge pages, the fastest way
    known: up to 1.3 times as fast as a sum; on a GPU by a sum."""
    x = huge_pages.empty((_num_elements(device) // 1024, 1024), device=device).fill_(1)
    if x.device.type == "cpu":
        vector = torch.ones(1, 1024)
        return Limit("reading", "bytes", x.nbytes, lambda: linear(vector, x, impl="cpp"))
    return Limit("reading", "bytes", x.nbytes, x.sum)


def copying(device: torch.device | str = "cpu") -> Limit:
    """Copy bandwidth (read and written), of more data than fits into caches."""
    source = torch.ones(_num_elements(device), device=device)
    target = torch.empty_like(source)
    return Limit("copying", "bytes", 2 * source.nbytes, lambda: target.copy_(source))


def matrix_product(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Limit:
    """FLOP rate of PyTorch's product of two square matrices. For a 16-bit dtype on a CPU without such arithmetic, that of
    float32, if it is faster: converting would take little time."""
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and dtype in (torch.float16, torch.bfloat16):
        dtype = min((dtype, torch.float32), key=_product_time)
    n = 1536 if on_cpu else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=torch.float32).to(dtype)
    return Limit("matrix product", "flops", 2 * n**3, lambda: a @ b)


def _product_time(dtype: torch.dtype, n: int = 384) -> float:
    a, b = torch.randn(2, n, n).to(dtype)
    a @ b
    start = time.perf_counter()
    a @ b
    return time.perf_counter() - start


def _num_elements(device) -> int:
    """Number of float32 elements: 0.5 GB on a CPU, 1 GB on a GPU."""
    return (128 << 20) if torch.device(device).type == "cpu" else (256 << 20)
