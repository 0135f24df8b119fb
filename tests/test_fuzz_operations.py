"""Random calls of every operation, in a process of their own: a crash is a failure like any other. See fuzz_operations.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fuzz_operations.py"
SOURCES = Path(__file__).parents[1]


def fuzz(folder, seed, calls):
    now = folder / "call"
    command = [sys.executable, SCRIPT, "--seed", str(seed), "--calls", str(calls), "--now", now]
    path = os.pathsep.join([str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    made = now.read_text() if now.exists() else "none"
    assert result.returncode == 0, f"{result.stdout}{result.stderr[-3000:]}\nexit status {result.returncode}, last call: {made}"
    assert f"{calls} calls" in result.stdout


@pytest.mark.slow
def test_calls_are_right_or_refused(tmp_path):
    fuzz(tmp_path, seed=1, calls=3000)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(2, 12))
def test_more_calls_are_right_or_refused(seed, tmp_path):
    fuzz(tmp_path, seed, calls=3000)
