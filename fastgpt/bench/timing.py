"""Interleaved timing of several functions: the speed of a shared machine drifts, ratios within a round do not."""

import functools
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from fastgpt import huge_pages
from fastgpt.bench.limits import Limit

TIMING, MOST_CALLS = 0.01, 50  # seconds that one timing should take, and the most calls in it
LONG = 0.05  # seconds; longer calls need no warm-up call
LEAST_ROUNDS = 7
COLD = 512 << 20  # bytes, more than a CPU's caches
FLUSHED = 512 << 20  # bytes written to flush a GPU's L2 cache: 0.1 ms, in which the host queues the next launches


def in_rounds(
    functions: dict[str, Callable], *, inputs: Sequence[dict] = ({},), device: torch.device | str = "cpu", seconds: float = 3.0,
    rounds: int | None = None, calls: int | None = None, limit: Limit | None = None, prepare: dict[str, Callable] | None = None,
    flush: bool = False,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Yields for each round the seconds per call of each function, all timed one after the other.

    Before the first round each function is called twice, to warm up and to estimate its time. In a round, the limit is timed
    first; then each function gets a warm-up call, unless it takes long, and is timed, so that their order does not matter.

    Args:
        functions: name -> function of the arguments in `inputs`.
        inputs: the arguments of successive calls, of whichever function, repeated as needed, such as `cold` copies. Each round
            starts at a random one, since the speed of copies depends on where they are in memory.
        device: of the tensors.
        seconds: time for all rounds; there are at least seven.
        rounds: the exact number of rounds instead.
        calls: calls in one timing; default: as many as take 10 ms, at most 50.
        limit: a rate of the roofline, timed once per round under its own name.
        prepare: name -> function that runs, untimed, before that function is timed, which is then called at most 51 times.
        flush: on CUDA, time each call separately with events, after flushing the L2 cache: for single operations. By default
            the wall-clock time of all calls is taken, work on the host included.
    """
    prepare = prepare or {}
    timer = events if flush and torch.device(device).type == "cuda" else clock
    start, generator = itertools.count(), random.Random(0)

    def next_inputs(count):
        return [inputs[next(start) % len(inputs)] for _ in range(count)]

    def timed(name, calls, warm_up):
        prepare.get(name, _nothing)()
        if warm_up:
            functions[name](**next_inputs(1)[0])
        return timer(functions[name], next_inputs(calls), device)

    first = {}
    for name in functions:
        timed(name, 1, False)  # compiles, and touches memory for the first time
        first[name] = timed(name, 1, False)
    repeats = {name: calls or max(1, min(MOST_CALLS, math.ceil(TIMING / taken))) for name, taken in first.items()}
    until = time.perf_counter() + seconds
    for done in itertools.count():
        if done == rounds or rounds is None and done >= LEAST_ROUNDS and time.perf_counter() > until:
            return
        start = itertools.count(generator.randrange(len(inputs)))
        result = {} if limit is None else {limit.name: timer(limit.run, [{}], device)}
        yield result | {name: timed(name, repeats[name], first[name] < LONG) for name in functions}


def clock(function: Callable, inputs: list[dict], device: torch.device | str) -> float:
    """Wall-clock seconds per call, including the work of the device."""
    synchronize(device)
    start = time.perf_counter()
    for arguments in inputs:
        function(**arguments)
    synchronize(device)
    return (time.perf_counter() - start) / len(inputs)


def events(function: Callable, inputs: list[dict], device: torch.device | str) -> float:
    """Median seconds of a call on a GPU, each after flushing the L2 cache."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in inputs]
    for arguments, (start, end) in zip(inputs, pairs):
        _scratch(device).zero_()
        start.record()
        function(**arguments)
        end.record()
    synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1000


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
@torch.inference_mode(False)
def _scratch(device) -> torch.Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device=device)


def uncertainty(values: Sequence[float]) -> float:
    """Half-width of the 95% confidence interval of the median, relative to the median.

    The interval is from the k-th smallest to the k-th largest value: the true median is below k of n values with the
    probability of fewer than k heads in n coin tosses. For fewer than six values it is their whole range.
    """
    values, n = sorted(values), len(values)
    k, below = 0, 1 / 2**n
    while below <= 0.025:
        k += 1
        below += math.comb(n, k) / 2**n
    k, median = max(k, 1), statistics.median(values)
    return max(values[-k] - median, median - values[k - 1]) / median


def _nothing() -> None: ...


def cold(**tensors: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Copies of the tensors, together larger than a CPU's caches: if each call takes the next copy, its data are in memory.
    The copies are contiguous in huge pages, as the layers of a KV cache are. On CUDA, where `flush` has this effect, one copy.
    """
    if any(x.is_cuda for x in tensors.values()):
        return [tensors]
    copies = max(2, math.ceil(COLD / sum(x.nbytes for x in tensors.values())))
    stacked = {name: huge_pages.empty((copies, *x.shape), dtype=x.dtype).copy_(x) for name, x in tensors.items()}
    return [{name: x[i] for name, x in stacked.items()} for i in range(copies)]


def implementation(reasons: dict[str, str]) -> str:
    """The chosen implementation, from the result of `fastgpt.explain`."""
    return next(name for name, reason in reasons.items() if reason == "chosen")
