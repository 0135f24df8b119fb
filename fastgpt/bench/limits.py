"""The roofline of a machine: its memory bandwidth and the rate of its arithmetic, timed in the same rounds as what is compared.

A limit is what the machine can do, not what a library reaches on it: a matrix product of PyTorch may take several times as long
as its instructions."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastgpt import _C, huge_pages
from fastgpt.ops.linear import linear

PEAK_SECONDS = 0.02  # of a run of an instruction, at least: threads that wait for a core take some of them


class Limit(NamedTuple):
    """A rate that the roofline is made of: `run()` moves or computes `amount` of `unit`."""

    name: str
    unit: str  # "bytes", "flops", or "ops" of integers
    amount: int
    run: Callable[[], object]


def reading(device: torch.device | str = "cpu") -> Limit:
    """Read bandwidth, of more data than fits into caches. On a CPU on huge pages, in the faster of two ways: one number after the
    other, or by `linear` of one vector, which reads several rows side by side; on a GPU by a sum."""
    x = huge_pages.empty((_num_elements(device) // 1024, 1024), device=device).fill_(1)
    if x.device.type == "cpu":
        vector = torch.ones(1, 1024)
        ways = (lambda: _C.read_memory(x.data_ptr(), x.numel())), (lambda: linear(vector, x, impl="cpp"))
        return max((Limit("reading", "bytes", x.nbytes, way) for way in ways), key=_rate)
    return Limit("reading", "bytes", x.nbytes, x.sum)


def copying(device: torch.device | str = "cpu") -> Limit:
    """Copy bandwidth (read and written), of more data than fits into caches."""
    source = torch.ones(_num_elements(device), device=device)
    target = torch.empty_like(source)
    return Limit("copying", "bytes", 2 * source.nbytes, lambda: target.copy_(source))


def arithmetic(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Limit:
    """Rate of multiplying and adding numbers of a dtype, summed in float32. On a CPU that of its fastest instruction, on
    registers and on all threads; on a GPU that of PyTorch's product of two large matrices.

    Tiles and dot products of bfloat16 serve other dtypes, too: a number of float16 is the sum of 2 in bfloat16, one of float32
    that of 3, and a product is then that of 4 or 6 pairs of them. Instructions that sum float16 in float16 are not counted:
    their error grows with the length of the sum. The instructions are those of the CPU level in use.
    """
    if torch.device(device).type == "cpu":
        return max(_candidates(dtype), key=_rate)
    n = 8192
    a, b = torch.randn(2, n, n, device=device, dtype=torch.float32).to(dtype)
    return Limit("matrix product", "flops", 2 * n**3, lambda: a @ b)


def instruction_peaks() -> dict[str, Limit]:
    """The instructions of this CPU that multiply and add: "fp32 fma", "bf16 dot", "int8 dot", "AMX bf16 tiles", "AMX int8 tiles",
    as far as it has them, by name. They run in registers, on all of torch's threads together."""
    return {peak.name: _limit(peak) for peak in _C.peaks()}


PRODUCTS = {torch.bfloat16: 1, torch.float16: 4, torch.float32: 6}  # of bfloat16 in one of two numbers


def _candidates(dtype: torch.dtype) -> list[Limit]:
    first, *others = _C.peaks()
    products = PRODUCTS[dtype]
    return [_limit(first), *(_limit(peak, products) for peak in others if "bf16" in peak.name)]


def _limit(peak: "_C.Peak", products: int = 1) -> Limit:
    """An instruction of which every multiplication takes so many."""
    iterations, seconds = 4096, 0.0
    while seconds < PEAK_SECONDS:
        iterations *= 2
        seconds = _least_seconds(lambda: peak.run(iterations))
    name = peak.name if products == 1 else f"{peak.name}, {products} products"
    unit = "ops" if "int8" in peak.name else "flops"
    return Limit(name, unit, iterations * peak.operations // products, lambda: peak.run(iterations))


def _rate(limit: Limit) -> float:
    return limit.amount / _least_seconds(limit.run)


def _least_seconds(run: Callable[[], object]) -> float:
    """Of a few runs: others may have had the cores in some of them."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _num_elements(device) -> int:
    """Number of float32 elements: 0.5 GB on a CPU, 1 GB on a GPU."""
    return (128 << 20) if torch.device(device).type == "cpu" else (256 << 20)
