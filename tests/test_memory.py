"""Huge pages change where memory is, not what is in it."""

import re
from pathlib import Path

import pytest
import torch

from fastgpt import memory

SMAPS = Path("/proc/self/smaps_rollup")
OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes() -> int:
    return int(re.search(r"AnonHugePages: +(\d+) kB", SMAPS.read_text())[1]) * 1024


@pytest.mark.skipif(
    not SMAPS.exists() or not OFFERED.exists() or "[never]" in OFFERED.read_text(), reason="no huge pages on this system"
)
def test_new_memory_is_in_huge_pages():
    before = huge_bytes()
    x = memory.empty((32 << 20,), dtype=torch.uint8).fill_(7)
    assert huge_bytes() - before >= 24 << 20
    assert (x == 7).all()


def test_collapsing_keeps_contents_and_addresses():
    tensors = [torch.randn(1 << 20), torch.randn(3), torch.randn(1024, 1024).t(), torch.zeros(0)]
    copies, addresses = [x.clone() for x in tensors], [x.data_ptr() for x in tensors]
    memory.collapse(tensors)
    assert addresses == [x.data_ptr() for x in tensors]
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies))


def test_other_devices_are_left_alone():
    assert memory.empty((1 << 21, 4), device="meta").device.type == "meta"
