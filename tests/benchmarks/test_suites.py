"""The suites in benchmarks/ run, and say what the report needs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import pages, report

ROOT = Path(__file__).parents[2]
COMMON = {"what", "device", "dtype", "implementation", "limit", "seconds", "absent"}
# Whichever instruction is the fastest in that process: where several are nearly as fast, another one than in this process.
ARITHMETIC = "matrix product" if torch.cuda.is_available() else r"fp32 \S.*|(bf16 dot|AMX bf16 tiles), 6 products"
CASES = {
    "attention.py::test_prefill": (
        "128tokens",
        {"T", "batch", "heads", "head_dim", "flops", "limit_flops"},
        ARITHMETIC,
    ),
    "decode.py": (
        "1024keys and float32 and not batch16",
        {"keys", "kind", "batch", "heads", "kv_heads", "head_dim", "bytes", "limit_bytes"},
        "reading",
    ),
    "kv_cache.py::test_one_token": ("batch1", {"batch", "heads", "head_dim", "bytes", "limit_bytes"}, "copying"),
    "linear.py::test_few_rows": ("qkv and 1row", {"product", "rows", "weight", "bytes", "limit_bytes"}, "reading"),
    "linear.py::test_experts": ("1row and float32", {"experts", "rows", "bytes", "limit_bytes"}, "reading"),
    "linear.py::test_many_rows": ("float32", {"product", "rows", "weight", "flops", "limit_flops"}, ARITHMETIC),
}


@pytest.mark.slow
@pytest.mark.parametrize("suite", CASES)
def test_a_case_of_each_suite(suite, tmp_path):
    chosen, parameters, limit = CASES[suite]
    path = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", f"benchmarks/test_{suite}", "-k", chosen, f"--benchmark-json={path}"]
    environment = os.environ | {"FASTGPT_BENCH_TINY": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    benchmark = json.loads(path.read_text())["benchmarks"][0]
    case = benchmark["extra_info"]
    assert set(case) == COMMON | parameters and re.fullmatch(limit, case["limit"])
    assert {"ours", "reference", case["limit"]} < set(case["seconds"])
    assert len({len(values) for values in case["seconds"].values()}) == 1  # paired
    assert benchmark["stats"]["data"] == pytest.approx(case["seconds"]["ours"])
    for name, reason in case["absent"].items():
        assert re.search(rf"^absent from \d+ benchmarks: {name}: {re.escape(reason)}$", result.stdout, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or torch.cuda.is_available(), reason="needs Linux, and is for CPUs")
def test_a_busy_core(tmp_path):
    """Each library decodes with one thread and with all, while a core is busy and while none is; the report tells each from it."""
    path = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_generate.py", "-k", "busy", f"--benchmark-json={path}"]
    environment = os.environ | {"FASTGPT_BENCH_TINY": "1", "OMP_NUM_THREADS": "2"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    output = json.loads(path.read_text())
    (info,) = [benchmark["extra_info"] for benchmark in output["benchmarks"]]
    assert info["model"] == "smollm2-135m" and info["dtype"] == "float32"
    settings = [(case["threads"], case["busy"]) for case in info["cases"]]
    assert settings == [(1, False), (2, False), (1, True), (2, True)]
    for case in info["cases"]:
        assert {"ours", "transformers, dynamic cache"} <= case["seconds"].keys() == case["alone"].keys()
        assert all(taken > 0 for values in case["seconds"].values() for taken in values)
    _, condensed = report.condense([info])
    assert "| fastgpt |" in pages.busy_core(condensed["busy core"])
