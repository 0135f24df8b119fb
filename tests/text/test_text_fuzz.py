"""Damaged tokenizers and hostile chat templates: an error that says what is wrong, in bounded memory, or they work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "text_fuzz.py"
HELPERS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "seed, files, templates", [(0, 100, 100), pytest.param(1, 1000, 1000, marks=[pytest.mark.exhaustive, pytest.mark.slow])]
)
def test_damaged_files_and_templates(seed, files, templates):
    """In a process of its own: what would end it, or take all memory, is a failure of this test only."""
    command = [sys.executable, SCRIPT, *map(str, (seed, files, templates))]
    path = os.pathsep.join([str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    loaded, rendered = map(int, re.findall(r"(\d+) of", result.stdout))
    assert 0 < loaded < files and 0 < rendered < templates  # some are damaged, and some not noticeably
