"""Damaged checkpoints, by the hundred."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def fuzz(folder, seed: int, configs: int, files: int) -> dict:
    command = [sys.executable, HERE / "checkpoint_fuzz.py", folder, seed, configs, files]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limiting memory needs Linux")
@pytest.mark.parametrize(
    "configs, files", [(1000, 250), pytest.param(10000, 2500, marks=pytest.mark.exhaustive)], ids=["short", "long"]
)
def test_damaged_checkpoints_load_or_say_what_is_wrong(configs, files, tmp_path):
    """Within a limit on memory: ValueError or OSError that names it, or a model whose logits are finite."""
    found = fuzz(tmp_path, configs, configs, files)
    assert not found["failures"], "\n".join(found["failures"][:5])
    assert found["configs"]["ValueError"] > configs / 2 and found["configs"]["loaded"] > configs / 20
    assert found["files"]["ValueError"] > files / 2 and found["files"]["loaded"] > files / 50
