"""Huge pages change where memory is, not what is in it."""

import re
from pathlib import Path

import pytest
import torch

from fastgpt import huge_pages

SMAPS = Path("/proc/self/smaps")
OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address: proc_pid_smaps(5), VmFlags."""
    for begin, end, flags in re.findall(r"^(\w+)-(\w+) .*?^VmFlags:(.*?)$", SMAPS.read_text(), re.DOTALL | re.MULTILINE):
        if int(begin, 16) <= address < int(end, 16):
            return flags.split()
    raise AssertionError(f"{address:x} is not mapped")


@pytest.mark.skipif(
    not SMAPS.exists() or not OFFERED.exists() or "[never]" in OFFERED.read_text(), reason="no huge pages on this system"
)
def test_huge_pages_are_asked_for():
    """Whether there are any free ones is the kernel's matter."""
    x = huge_pages.empty((32 << 20,), dtype=torch.uint8).fill_(7)
    assert "hg" in flags_at(x.data_ptr()) and "hg" in flags_at(x.data_ptr() + x.nbytes - 1)
    assert (x == 7).all()
    y = torch.empty(64 << 20, dtype=torch.uint8)
    assert "hg" not in flags_at(y.data_ptr() + y.nbytes // 2)


def test_collapsing_keeps_contents_and_addresses():
    tensors = [torch.randn(1 << 20), torch.randn(3), torch.randn(1024, 1024).t(), torch.zeros(0)]
    copies, addresses = [x.clone() for x in tensors], [x.data_ptr() for x in tensors]
    huge_pages.collapse(tensors)
    assert addresses == [x.data_ptr() for x in tensors]
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies))


def test_other_devices_are_left_alone():
    assert huge_pages.empty((1 << 21, 4), device="meta").device.type == "meta"
