"""Timing several ways of doing the same work in turns: the speed of a shared machine drifts, ratios do not."""

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

TIMING, MOST_CALLS = 0.01, 50  # seconds that one timing should take, and calls for which it may be repeated
LONG = 0.05  # seconds from which on a call's own first microseconds no longer matter
LEAST_ROUNDS = 7
COLD = 512 << 20  # bytes: more than a CPU's caches hold
FLUSHED = 512 << 20  # bytes written to flush a GPU's cache: 0.1 ms, in which the host gets ahead with its launches


def in_rounds(
    functions: dict[str, Callable],
    *, turns: Sequence[dict] = ({},), device="cpu", seconds: float = 3.0, rounds: int | None = None, calls: int | None = None,
    limit: Limit | None = None, prepare: dict[str, Callable] | None = None, flush: bool = False,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Yields, for each round, the seconds of one call of each function, measured one after the other.

    Before the first round each is called twice, to warm up and to see how long it takes. In a round, the limit is timed
    first; then each function is called untimed, unless that takes long, and timed: it does not matter which comes first.

    Args:
        turns: the arguments of one call after the other, of whichever function, over and over: `cold` data, say. Every
            round starts anywhere, so that none gets the same ones in all rounds: copies differ, by where they lie.
        seconds: for which rounds are made; at least seven are.
        rounds: exactly so many instead.
        calls: in one timing; default as many as 10 ms take, at most 50.
        limit: a rate of the machine, timed once a round under its own name.
        prepare: name -> what to run, untimed, before that function is timed; it is called at most 51 times then.
        flush: on CUDA, time every call alone, by events, after the L2 cache was flushed: for single operations. By
            default the clock times all calls together, what the host does for them included.
    """
    prepare = prepare or {}
    timer = events if flush and torch.device(device).type == "cuda" else clock
    start, anywhere = itertools.count(), random.Random(0)

    def next_turns(count):
        return [turns[next(start) % len(turns)] for _ in range(count)]

    def timed(name, calls, warm_up):
        prepare.get(name, _nothing)()
        if warm_up:
            functions[name](**next_turns(1)[0])
        return timer(functions[name], next_turns(calls), device)

    first = {}
    for name in functions:
        timed(name, 1, False)  # compiles, and touches memory for the first time
        first[name] = timed(name, 1, False)
    repeats = {name: calls or max(1, min(MOST_CALLS, math.ceil(TIMING / taken))) for name, taken in first.items()}
    until = time.perf_counter() + seconds
    for done in itertools.count():
        if done == rounds or rounds is None and done >= LEAST_ROUNDS and time.perf_counter() > until:
            return
        start = itertools.count(anywhere.randrange(len(turns)))
        result = {} if limit is None else {limit.name: timer(limit.run, [{}], device)}
        yield result | {name: timed(name, repeats[name], first[name] < LONG) for name in functions}


def clock(function: Callable, turns: list[dict], device) -> float:
    """Seconds of one call by the clock, until the device has done its work."""
    synchronize(device)
    start = time.perf_counter()
    for turn in turns:
        function(**turn)
    synchronize(device)
    return (time.perf_counter() - start) / len(turns)


def events(function: Callable, turns: list[dict], device) -> float:
    """Seconds of one call on a GPU whose L2 cache was flushed: the median of several."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in turns]
    for turn, (start, end) in zip(turns, pairs):
        _scratch(device).zero_()
        start.record()
        function(**turn)
        end.record()
    synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1000


def synchronize(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
@torch.inference_mode(False)
def _scratch(device) -> torch.Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device=device)


def uncertainty(values: Sequence[float]) -> float:
    """How far the 95% confidence interval of the median reaches from it, as a share of it.

    The interval is between the k-th smallest and the k-th largest value: that a median lies below k of n values has the
    probability of fewer than k heads in n tosses. Fewer than six values have no such interval; all of them are taken.
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
    """Copies of the tensors, together more than a CPU's caches hold: what takes the next ones at each call finds them in
    memory. They lie one after the other in huge pages, as a cache's layers do. On CUDA, where `flush` does it, there is one.
    """
    if any(x.is_cuda for x in tensors.values()):
        return [tensors]
    copies = max(2, math.ceil(COLD / sum(x.nbytes for x in tensors.values())))
    held = {name: huge_pages.empty((copies, *x.shape), dtype=x.dtype).copy_(x) for name, x in tensors.items()}
    return [{name: x[i] for name, x in held.items()} for i in range(copies)]


def implementation(reasons: dict[str, str]) -> str:
    """The one that serves a call, of what `fastgpt.explain` says about it."""
    return next(name for name, reason in reasons.items() if reason == "chosen")
