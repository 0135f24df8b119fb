"""`fastgpt info`."""

import re

import torch
from command_line import run

import fastgpt
from fastgpt.cli import info
from fastgpt.ops import explain


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert f"fastgpt {fastgpt.__version__}" in out and f"torch {torch.__version__}" in out
    assert "attention on cpu: cpp" in out and "not triton: it runs on CUDA tensors" in out
    assert "attention_with_kv_cache on cpu: unfused" in out


def test_info_tells_of_all_that_can_be_explained(capsys):
    """And what each name of an implementation means."""
    assert info.OPERATIONS.keys() == explain.OPERATIONS.keys()
    _, out, _ = run(capsys, "info")
    for operation, meaning in info.OPERATIONS.items():
        assert re.search(rf"^{operation.__qualname__} on cpu: \w+\n    {meaning}\n    not \w+: ", out, re.MULTILINE)
    calls, _, meanings = out.partition("\n\n")[2].rpartition("\n\n")
    named = re.findall(r"^(?:\S+ on cpu: |    not )(\w+)", calls, re.MULTILINE)
    assert set(named) == {line.partition(": ")[0] for line in meanings.splitlines()}
