"""benchmarks.numerics finds planted faults, tells of a process that fails, and shows the worst."""

import pytest
import torch

import fastgpt
from benchmarks import numerics, numerics_table

SMALL = {
    numerics.attention: (["plain", "everything"], [(2, 4, 2, 9, 21, 16)]),
    numerics.attention_varlen: (["plain"], [(1, 2, 1, 9, 21, 16)]),
    numerics.decode: (["contiguous", "int8, pages of 16"], [(3, 4, 2, 1, 70, 16)]),
    numerics.kv_cache_update: (["contiguous", "fp8"], [(3, 4, 5, 9, 16)]),
    numerics.rope_kv_cache_update: (["pages of 16", "interleaved"], [(3, 4, 5, 9, 16)]),
    numerics.linear: (["everything"], [(40, 65)]),
    numerics.norm: (["everything"], [(3, 50, 40)]),
}


@pytest.fixture
def measured(monkeypatch):
    """The cases of the C++ kernels, few of each operation."""
    monkeypatch.setattr(numerics, "OPERATIONS", {"cpp": SMALL})
    return lambda *chosen: list(numerics.cases("cpp", list(chosen)))


@pytest.mark.slow
def test_every_operation_passes(measured):
    cases = measured()
    assert len(cases) == 3 * sum(len(features) for features, _ in SMALL.values())
    assert all(map(numerics.passes, cases))
    for case in cases:
        assert "exact" in case or case["shares"]
        assert case.get("shares", {}).keys() == case.get("errors", {}).keys()
    names = {name for case in cases if case["feature"] == "everything" for name in case["shares"]}
    assert names == {"out", "lse", "dq", "dk", "dv", "dbias", "dsinks"}


def scaled(function, name):
    """Results that are 3% off."""

    def faulty(*args, **kwargs):
        results = function(*args, **kwargs)
        return results | {name: 1.03 * results[name]}

    return faulty


FAULTS = {
    "attention": (numerics.parity, "run_cpp", lambda run: scaled(run, "out")),
    "attention, a gradient": (numerics.parity, "run_cpp", lambda run: scaled(run, "dk")),
    "attention_varlen": (numerics.parity, "run_cpp_packed", lambda run: scaled(run, "dv")),
    "decode": (torch.ops.fastgpt, "attention_forward", lambda run: lambda *call: run(*call[:4], 1.1 * call[4], *call[5:])),
    "kv_cache_update": (fastgpt, "kv_cache_update", lambda run: lambda k, v, **rest: run(v, k, **rest)),
    "rope_kv_cache_update": (fastgpt, "rope_kv_cache_update", lambda run: lambda q, **rest: run(q, **rest | {"interleaved": False})),
    "linear": (fastgpt, "linear", lambda run: lambda **call: 1.03 * run(**call)),
    "norm": (fastgpt, "norm", lambda run: lambda **call: 1.03 * run(**call)),
    "linear, NaN": (fastgpt, "linear", lambda run: lambda **call: run(**call) / 0),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault, measured, monkeypatch):
    where, name, faulty = FAULTS[fault]
    monkeypatch.setattr(where, name, faulty(getattr(where, name)))
    operation = fault.partition(",")[0]
    assert not all(map(numerics.passes, measured(operation)))


@pytest.mark.slow
def test_a_failed_process_is_reported():
    cases, why = numerics.measure("cpp", ["linear"], {"FASTGPT_CPU_LEVEL": "none of them"})
    assert cases == [] and why == "its process ended with 1"


def test_the_worst_is_shown():
    def case(feature, implementation="cpp", dtype="float32", **found):
        return {"feature": feature, "dtype": dtype, "implementation": implementation, "on": "here"} | found

    result = {
        "machine": {"cpu": "some"},
        "attention": [
            case("plain", shares={"out": 0.25, "lse": 0.5, "dq": 0.75}),
            case("window", shares={"out": 0.6, "dq": 0.1}),
            case("plain", "triton", "float16", shares={"out": 0.3}),
        ],
        "kv_cache_update": [case("int8", exact=True), case("fp8", exact=True), case("int8", dtype="float16", exact=False)],
        "rope_kv_cache_update": [case("plain", exact=True, shares={"q": 0.4})],
        "left_out": {"cuda": "its process ended with 1"},
    }
    assert numerics_table.rows(result, by_feature=False) == [
        ["operation", "implementation", "float32", "float16"],
        ["attention", "C++, here", "0.60 / 0.75", "–"],
        ["attention", "Triton, here", "–", "0.30"],
        ["kv_cache_update", "C++, here", "exact", "differs"],
        ["rope_kv_cache_update", "C++, here", "exact, 0.40", "–"],
    ]
    assert [row[:2] for row in numerics_table.rows(result, by_feature=True)[1:4]] == [
        ["attention", "plain"], ["attention", "plain"], ["attention", "window"],
    ]  # fmt: skip
