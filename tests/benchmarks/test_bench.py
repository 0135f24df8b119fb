"""`fastgpt bench`, and the timing that it shares with the suites in benchmarks/."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import run
from cpu_levels import lower_levels

from fastgpt.bench import limits, suite, timing
from fastgpt.bench.limits import Limit
from fastgpt.model.config import GPTConfig
from fastgpt.ops.library import build_info


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small model in the place of GPT-2, and little data to be cold."""
    monkeypatch.setattr(suite, "GPT2", GPTConfig(vocab_size=60, context_length=1024, num_layers=1, num_heads=2, hidden_size=32))
    monkeypatch.setattr(timing, "COLD", 1 << 20)


@pytest.mark.slow
def test_table(capsys):
    status, out, _ = run(capsys, "bench", "--seconds", 0, "--only", "128", "--device", "cpu")
    lines = out.splitlines()
    assert status == 0 and re.search(r"^cached against uncached +fastgpt +rate +compared with +ratio +% of roofline$", lines[0])
    for line, name in zip(lines[1:3], ("shipped model", "GPT-2 124M"), strict=True):
        assert re.search(rf"^  {name}, context 128 +[\d.]+ .s +[\d,]+ tok/s +uncached [\d.]+ .s +≈?[\d.]+x +≈?[\d.]+%$", line)
    assert re.search(r"threads, .*torch .*float32\.$", lines[4]) and re.search(r"reading [\d.]+ GB/s", lines[5])
    assert len({len(line) for line in lines[:3]}) == 1  # aligned


@pytest.mark.slow
def test_json(capsys):
    status, out, _ = run(capsys, "bench", "--seconds", 0, "--only", "512 tokens", "--device", "cpu", "--json")
    result = json.loads(out)
    (case,) = result["cases"]
    assert status == 0 and result["machine"]["torch"] == torch.__version__
    limit = limits.arithmetic("cpu", torch.float32).name
    assert (case["what"], case["compared_with"], case["limit"]) == ("attention", "SDPA", limit)
    assert case["flops"] == 2 * 12 * 512 * 512 * 64
    assert all(low <= middle <= high for low, middle, high in case["microseconds"].values())
    assert set(case["microseconds"]) == {"ours", "SDPA", limit} and case["times_ours"]["ours"] == [1, 1, 1]


def test_the_table_explains_its_ratios(monkeypatch):
    """Where the machine's speed changes, a ratio of paired times is not that of their medians."""
    place = suite.DeviceLimits(torch.device("cpu"))
    case = next(case for case in suite.cases(place, "nowhere") if case.name.startswith("512 tokens"))
    for others, ratio, noisy in (([2.0] * 7, "2.00x", False), ([0.5, 0.5, 2, 2, 2, 3, 3], "≈2.00x", True)):
        speeds = [1, 1, 1, 10, 10, 10, 10]
        rounds = [{place.arithmetic.name: s, "ours": s, "SDPA": s * other} for s, other in zip(speeds, others)]
        monkeypatch.setattr(suite, "in_rounds", lambda *_, rounds=rounds, **__: iter(rounds))
        result = suite.measure(case, place, 0)
        assert result["noisy"] == ["SDPA"] * noisy
        lines = suite.table(suite.machine(place), [result]).splitlines()
        assert lines[1].split()[-2] == ratio
        assert any(line.startswith("each round, so they do not drift") for line in lines)
        assert (lines[-1] == "≈: noisy; the 95% confidence interval of this median is wider than ±10%.") == noisy


@pytest.mark.slow
def test_every_section_is_measured(capsys):
    names = [(case.section, case.name) for case in suite.cases(suite.DeviceLimits(torch.device("cpu")), "nowhere")]
    assert names[0][0] == "cached against uncached" and len(set(names)) == len(names)
    for only in ("1,024 keys", "one token, batch 1"):
        assert run(capsys, "bench", "--seconds", 0, "--only", only, "--device", "cpu")[0] == 0


def test_different_results_are_not_timed(capsys, monkeypatch):
    right = suite.attention
    monkeypatch.setattr(suite, "attention", lambda q, k, v: right(q, k, v) + 1e-2)
    status, out, _ = run(capsys, "bench", "--seconds", 0, "--only", "512 tokens", "--device", "cpu")
    assert status == 1 and re.search(r"512 tokens, batch 1 +differs from SDPA by \d.\de-0\d of the largest number", out)


def test_interrupted(capsys, monkeypatch):
    measured = itertools.count()

    def measure(case, place, seconds):
        if next(measured):
            raise KeyboardInterrupt
        return {"what": case.section, "case": case.name, "problem": "what there is so far"}

    monkeypatch.setattr(suite, "measure", measure)
    status, out, error = run(capsys, "bench", "--device", "cpu")
    assert status == 130 and error.endswith("fastgpt: interrupted\n") and "what there is so far" in out


@pytest.fixture
def work(monkeypatch):
    """work(name, seconds) -> a function that takes as long by the clock, and is counted in work.calls."""
    now, calls = [0.0], Counter()

    def work(name, seconds):
        def function(**turn):
            now[0] += seconds
            calls.update([name, *turn.items()])

        return function

    work.calls = calls
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return work


def test_rounds_are_paired(work):
    """In every round the limit is timed once, and every function, after a call that is not; each gets the next turn."""
    functions = {"ours": work("ours", 0.002), "other": work("other", 0.004)}
    limit, inputs = Limit("limit", "bytes", 1, work("limit", 1.0)), [{"turn": i} for i in range(5)]
    rounds = list(timing.in_rounds(functions, inputs=inputs, rounds=8, calls=3, limit=limit))
    assert len(rounds) == 8 and all(taken == pytest.approx({"limit": 1.0, "ours": 0.002, "other": 0.004}) for taken in rounds)
    assert (work.calls["limit"], work.calls["ours"], work.calls["other"]) == (8, 2 + 8 * 4, 2 + 8 * 4)
    assert all(work.calls["turn", i] > 0 for i in range(5)) and sum(work.calls["turn", i] for i in range(5)) == 2 * (2 + 8 * 4)


def test_prepared_before_each_timing(work):
    list(timing.in_rounds({"ours": work("ours", 1.0)}, rounds=3, prepare={"ours": work("prepare", 5.0)}))
    assert work.calls == {"ours": 2 + 3, "prepare": 2 + 3}


def test_as_many_calls_and_rounds_as_time_allows(work):
    functions = {"short": work("short", 0.004), "long": work("long", 0.06)}
    assert len(list(timing.in_rounds(functions, seconds=0))) == timing.LEAST_ROUNDS
    assert work.calls == {"short": 2 + 4 * timing.LEAST_ROUNDS, "long": 2 + timing.LEAST_ROUNDS}
    assert len(list(timing.in_rounds(functions, seconds=1.0))) == 14  # of 0.076 seconds each


def test_cold_data():
    """Equal tensors that share no memory, together more than the caches hold."""
    x, y = torch.randn(64, 1000).t(), torch.ones(10).to(torch.float8_e4m3fn)
    copies = timing.cold(x=x, y=y)
    assert sum(copy["x"].nbytes + copy["y"].nbytes for copy in copies) >= 1 << 20
    assert all(torch.equal(copy["x"], x) and copy["y"].dtype == y.dtype for copy in copies)
    assert len({copy[name].data_ptr() for copy in copies for name in copy}) == 2 * len(copies)


def test_confidence_intervals_are_from_order_statistics():
    """Of 21 values, the 6th and the 16th are the ends of the 95% confidence interval of the median."""
    values = np.arange(1, 22) + 10.0
    assert timing.uncertainty(np.random.default_rng(0).permutation(values)) == pytest.approx(5 / 21)
    assert timing.uncertainty([1.0, 1.0, 1.3]) == pytest.approx(0.3)  # too few: all of them


UNITS = {"fp32 fma": "flops", "fp32 multiply and add": "flops", "bf16 dot": "flops", "int8 dot": "ops"}
UNITS |= {"AMX bf16 tiles": "flops", "AMX int8 tiles": "ops"}


def test_peaks_of_instructions():
    """Each has a name, a unit and work that takes time; those of the CPU level in use are there."""
    peaks = limits.instruction_peaks()
    first = "fp32 multiply and add" if build_info()["cpu_level"] == "baseline" else "fp32 fma"
    assert next(iter(peaks)) == first and peaks.keys() <= UNITS.keys()
    assert ("AMX bf16 tiles" in peaks) == (build_info()["cpu_level"] == "amx")
    for name, limit in peaks.items():
        assert (limit.name, limit.unit) == (name, UNITS[name])
        assert limit.amount > 0 and timing.clock(limit.run, [{}], "cpu") > 0


@pytest.mark.slow
@pytest.mark.parametrize("level", lower_levels())
def test_peaks_of_lower_levels(level):
    """They run, and name nothing that the level has not."""
    code = "from fastgpt.bench import limits; print(*limits.instruction_peaks(), sep='\\n')"
    environment = os.environ | {"FASTGPT_CPU_LEVEL": level}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    names = result.stdout.splitlines()
    assert result.returncode == 0 and names, result.stderr
    assert names[0] == ("fp32 multiply and add" if level == "baseline" else "fp32 fma")
    assert not [name for name in names if name.startswith("AMX")]


class FakePeak(SimpleNamespace):
    """An instruction whose iteration takes so many seconds by the clock of `work`."""

    @classmethod
    def make(cls, now, name, operations, seconds):
        def run(iterations):
            now[0] += iterations * seconds

        return cls(name=name, operations=operations, run=run)


@pytest.mark.parametrize(
    "tiles, expected",
    [
        (
            1600,
            {"float32": "AMX bf16 tiles, 6 products", "float16": "AMX bf16 tiles, 4 products", "bfloat16": "AMX bf16 tiles"},
        ),
        (200, {"float32": "fp32 fma", "float16": "fp32 fma", "bfloat16": "AMX bf16 tiles"}),
        (50, dict.fromkeys(("float32", "float16", "bfloat16"), "fp32 fma")),
    ],
)
def test_limit_is_the_fastest_instruction(monkeypatch, tiles, expected):
    """Where several products of bfloat16 make one of the dtype, by their number; never one of integers."""
    now = [0.0]
    fakes = [("fp32 fma", 100), ("AMX bf16 tiles", tiles), ("AMX int8 tiles", 10**6)]
    monkeypatch.setattr(limits._C, "peaks", lambda: [FakePeak.make(now, name, work, 1e-6) for name, work in fakes])
    monkeypatch.setattr(limits, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for dtype, name in expected.items():
        limit = limits.arithmetic("cpu", getattr(torch, dtype))
        assert (limit.name, limit.unit) == (name, "flops")
        start = now[0]
        limit.run()
        products = limits.PRODUCTS[getattr(torch, dtype)] if "products" in name else 1
        per_second = (100 if name == "fp32 fma" else tiles) / products * 1e6
        assert limit.amount == pytest.approx(per_second * (now[0] - start), rel=1e-3)
