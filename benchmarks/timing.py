"""Shared by the suites: device, amount of work, and fastgpt.bench.timing's rounds as results of pytest-benchmark."""

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable

import torch

from fastgpt.bench import limits
from fastgpt.bench.timing import in_rounds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # unless a benchmark is about another

_now = 0.0


def full() -> bool:
    """Whether to run all cases, and for longer, rather than what takes minutes."""
    return os.environ.get("FASTGPT_BENCH_FULL") == "1"


def tiny() -> bool:
    """Whether this is a dry run: with models of a few thousand weights, for a short time."""
    return os.environ.get("FASTGPT_BENCH_TINY") == "1"


def time_left() -> float:
    """Seconds until the suite will be interrupted, if it has a time limit (benchmarks/gpu.py)."""
    return float(os.environ.get("FASTGPT_BENCH_UNTIL", "inf")) - time.time()


@contextlib.contextmanager
def at_most(seconds: float):
    """A context manager that raises TimeoutError after this many seconds, for peers that might compile for minutes."""

    def stop(*_):
        raise TimeoutError(f"it took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured_time() -> float:
    """The clock that pytest-benchmark reads: it advances by the measured time of our calls only."""
    return _now


def time_interleaved(benchmark, ours: Callable, others: dict[str, Callable], *, limit=None, info: dict, **options) -> None:
    """Times `ours` and all others in interleaved rounds: see `fastgpt.bench.timing.in_rounds`, which gets limit and options.

    pytest-benchmark's figures are those of ours; extra_info gets `info`, the seconds of all, and the limit's name and amount.
    """
    if benchmark.disabled:
        options |= {"rounds": 1, "calls": 1}
    seconds = 0.1 if tiny() else (10.0 if full() else 2.5) if DEVICE == "cpu" else (3.0 if full() else 0.7)
    options = {"seconds": seconds} | options
    rounds = list(in_rounds({"ours": ours, **others}, device=DEVICE, limit=limit, **options))
    record(benchmark, rounds, limit=limit, info=info)


def record(benchmark, rounds: list[dict[str, float]], *, limit=None, info: dict) -> None:
    """Passes the seconds of each round to pytest-benchmark: see `time_interleaved`."""

    def next_of_ours(left=iter(rounds)):
        global _now
        _now += next(left)["ours"]

    benchmark.pedantic(next_of_ours, rounds=len(rounds))
    if limit is not None:
        info = info | {"limit": limit.name, f"limit_{limit.unit}": limit.amount}
    benchmark.extra_info.update(info, seconds={name: [seconds[name] for seconds in rounds] for name in rounds[0]})


@functools.cache
def reading() -> limits.Limit:
    return limits.reading(DEVICE)


@functools.cache
def copying() -> limits.Limit:
    return limits.copying(DEVICE)


@functools.cache
def arithmetic(dtype: torch.dtype) -> limits.Limit:
    return limits.arithmetic(DEVICE, dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
