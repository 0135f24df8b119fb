"""Timing several ways of doing the same work in turns: the speed of a shared machine drifts, ratios do not."""

import time
from collections.abc import Callable

import torch


def in_turns(
    benchmark, ours: Callable, others: dict[str, Callable],
    *, rounds: int, calls: int = 1, prepare: dict[str, Callable] | None = None, limits: dict[str, Callable] | None = None,
    **info,
) -> None:  # fmt: skip
    """Runs pytest-benchmark on `ours`, and every other before each of its rounds.

    Args:
        others: name -> what to time beside it. Their seconds, and those of ours, go to extra_info["seconds"].
        calls: in one timing, after as many that are not timed; seconds are those of one call.
        prepare: name -> what to run, untimed, before that other. If it returns something, that other gets it and is
            called once.
        limits: name -> what shows a limit of the machine, timed first in each round. Everything else is called once
            after them, untimed: nothing finds the caches as they left them.
        info: goes to extra_info.
    """
    prepare, limits = prepare or {}, limits or {}
    seconds = {name: [] for name in ("ours", *others, *limits)}

    def time_calls(name, function, calls):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        seconds[name].append((time.perf_counter() - start) / calls)

    def repeat(function):
        for _ in range(calls if calls > 1 else 0):
            function()

    def time_others():
        for name, limit in limits.items():
            time_calls(name, limit, calls)
        for function in (ours, *others.values()) if limits else ():
            function()
        for name, other in others.items():
            prepared = prepare[name]() if name in prepare else None
            if prepared is not None:
                time_calls(name, lambda: other(prepared), 1)
            else:
                repeat(other)
                time_calls(name, other, calls)
        repeat(ours)

    benchmark.pedantic(lambda: time_calls("ours", ours, calls), setup=time_others, rounds=rounds, warmup_rounds=2)
    benchmark.extra_info.update(seconds={name: values[-rounds:] for name, values in seconds.items()}, **info)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
