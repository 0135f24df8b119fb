"""The CUDA kernels, run on the host: compiled as C++ with a stand-in for the launch, and held to the CPU's tests."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler on Linux"),
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not a source checkout"),
]

# Loaded after fastgpt, the library replaces the CPU kernels of its operations.
RUN = """
import sys, pytest, torch, fastgpt
torch.ops.load_library(sys.argv[1])
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", sys.argv[2], sys.argv[3]]))
"""


@pytest.mark.parametrize(
    "source, tests, selected", [("kv_cache/kv_cache_update", "ops/test_kv_cache_update.py", "exact or rows_that")]
)
def test_kernels_of(source, tests, selected, tmp_path):
    folder, library = tmp_path / "csrc", tmp_path / "cuda_on_cpu.so"
    shutil.copytree(ROOT / "csrc", folder)
    shutil.copy(ROOT / "tests" / "cuda_on_cpu" / "cuda_launch.h", folder / "common")
    command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-x", "c++"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-isystem", TORCH / "include"]
    command += [f"-I{folder}", folder / f"{source}.cu", "-o", library, f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    command = [sys.executable, "-c", RUN, library, selected, ROOT / "tests" / tests]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout + result.stderr
