"""Huge pages for weights and caches, which a decode step reads from end to end.

A CPU translates the address of every 4 KB page that it reads; with 2 MB pages, a decode step of GPT-2 124M is 6 to 9% faster.
They are requested with madvise on Linux; on other systems nothing happens.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterable, Sequence

import torch

from fastgpt.checks import is_fake

PAGE, HUGE_PAGE = mmap.PAGESIZE, 2 << 20  # bytes; on Arm, pages of 4, 16 or 64 KiB are in use
HUGEPAGE, COLLAPSE = 14, 25  # advice of madvise: for memory that is not touched yet; for memory in use (Linux 6.1)


def empty(shape: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> torch.Tensor:
    """torch.empty, in huge pages if possible."""
    x = torch.empty(shape, dtype=dtype, device=device)
    _advise(x, HUGEPAGE)
    return x


def collapse(tensors: Iterable[torch.Tensor]) -> None:
    """Moves the memory of CPU tensors to huge pages, in place. Takes 0.5 s per gigabyte."""
    for x in tensors:
        _advise(x, COLLAPSE)


def _advise(x: torch.Tensor, advice: int) -> None:
    if x.device.type != "cpu" or x.nbytes < HUGE_PAGE or sys.platform != "linux" or not x.is_contiguous() or is_fake(x):
        return
    begin, end = x.data_ptr() // PAGE * PAGE, x.data_ptr() + x.nbytes
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)  # an error means no huge pages
