"""The team of threads that a recorded step runs on: csrc/common/team.h by itself, with sanitizers, and under operations."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
from tests.models import random_ids, random_model

ROOT = Path(__file__).parents[2]
SOURCES = ("tests/ops/team.cpp", "csrc/common/team.cpp")
CASES = ["chained", "leaders", "errors", "forks", "environment", "late", "nested", "counts"]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks for Linux's CPU affinity")


@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def team(request, tmp_path_factory):
    """Runs a case of team.cpp, built with sanitizers."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path_factory.mktemp("team") / "team"
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-Wall", "-Werror", "-Icsrc", f"-fsanitize={request.param}"]
    build = subprocess.run([compiler, *flags, *SOURCES, "-o", program], cwd=ROOT, capture_output=True, text=True)
    if "cannot find" in build.stderr:
        pytest.skip(f"no library of -fsanitize={request.param}")
    assert build.returncode == 0, build.stderr

    def run(case):
        environment = {**os.environ, "TSAN_OPTIONS": "die_after_fork=0:halt_on_error=1"}
        return subprocess.run([program, case], env=environment, capture_output=True, text=True, timeout=240)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_team(team, case):
    result = team(case)
    if "unexpected memory mapping" in result.stderr:  # of GCC 12's ThreadSanitizer, where addresses have more random bits
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_steps_have_the_same_bits_for_any_number_of_threads(dtype, batch):
    """Of a step that is large enough to be shared out, eager and recorded."""
    model = random_model(width=512, heads=8, num_kv_heads=2, vocabulary=3000).to(dtype)
    prompt = random_ids(model, batch, 90)
    results = {}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(1)  # PyTorch's products of many rows depend on it
            cache = model.new_cache(batch)
            model.hidden(prompt[:, :-4], cache)
            torch.set_num_threads(threads)
            step = fastgpt.decoding(model, cache)
            # The first is not replayed.
            results[threads] = torch.stack([step(prompt[:, t]).clone() for t in range(-4, 0)])
    finally:
        torch.set_num_threads(before)
    for threads, logits in results.items():
        assert torch.equal(logits, results[1]), f"{threads} threads"
