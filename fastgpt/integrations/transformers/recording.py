"""`record`: which implementations serve the calls of a model."""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from fastgpt.ops.explain import explain

_recordings: list[Counter] = []
_lock = threading.Lock()


@contextlib.contextmanager
def record() -> Iterator[Counter]:
    """Counts calls of `attention`, in all threads, by the implementation that serves them: "cpp", "triton", "reference"; or
    "sdpa" and "plain PyTorch" with the reason. Calls from compiled code are not counted.

    In a model that `optimize` has changed, it counts those of its linear layers and norms, too: "linear: cpp", "norm: cpp" and so
    on. "linear: PyTorch" and "norm: PyTorch" are calls that the module's own class has computed; "linear: reference" are those
    with gradients, as in `fastgpt.linear`.

    >>> with record() as calls:
    ...     model(ids)
    >>> calls
    Counter({'cpp': 12})
    """
    calls = Counter()
    with _lock:
        _recordings.append(calls)
    try:
        yield calls
    finally:
        with _lock:
            _recordings[:] = [other for other in _recordings if other is not calls]


def note(served: str | Callable, *args, prefix: str = "", **options) -> None:
    """Counts a call by a name, or by the implementation that serves an operation with these arguments."""
    if not _recordings or torch.compiler.is_compiling():
        return
    if not isinstance(served, str):
        served = next(name for name, why in explain(served, *args, **options).items() if why == "chosen")
    with _lock:
        for calls in _recordings:
            calls[prefix + served] += 1
