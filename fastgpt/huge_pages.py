"""Huge pages for what a decode step reads from end to end: weights and caches.

A CPU looks up every 4 KB page that it reads; pages of 2 MB make a step of GPT-2 124M 6 to 9% faster. They are asked for
with madvise, where the system has it (Linux); elsewhere nothing happens.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterable, Sequence

import torch

PAGE, HUGE_PAGE = mmap.PAGESIZE, 2 << 20  # bytes; on Arm, pages of 4, 16 or 64 KiB are in use
HUGEPAGE, COLLAPSE = 14, 25  # advice: huge pages for what is first touched from now on; for what is there (Linux 6.1)


def empty(shape: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> torch.Tensor:
    """torch.empty, in huge pages where that is possible."""
    x = torch.empty(shape, dtype=dtype, device=device)
    _advise(x, HUGEPAGE)
    return x


def collapse(tensors: Iterable[torch.Tensor]) -> None:
    """Exchanges the memory of CPU tensors for huge pages, where it is. Takes 0.5 s for a gigabyte."""
    for x in tensors:
        _advise(x, COLLAPSE)


def _advise(x: torch.Tensor, advice: int) -> None:
    if x.device.type != "cpu" or x.nbytes < HUGE_PAGE or sys.platform != "linux" or not x.is_contiguous():
        return
    begin, end = x.data_ptr() // PAGE * PAGE, x.data_ptr() + x.nbytes
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)  # an error: no huge pages
