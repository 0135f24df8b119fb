"""Random calls of every operation, in a process of their own: a crash is a failure like any other. See fuzz_operations.py."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import fuzz_operations
import fuzz_valid_calls
import pytest

import fastgpt

SCRIPT = Path(__file__).parent / "fuzz_operations.py"
SOURCES = Path(__file__).parents[2]


def fuzz(folder, seed, calls, first_path=SOURCES):
    now = folder / "call"
    command = [sys.executable, SCRIPT, "--seed", str(seed), "--calls", str(calls), "--now", now]
    path = os.pathsep.join([str(first_path), str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
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


# Faults that it finds


def window_of_one_more(attention, **call):
    if call.get("window") is not None and call["window"].__class__ is int:
        call["window"] += 1
    return attention(**call)


def a_check_missing(norm, **call):
    try:
        return norm(**call)
    except ValueError as error:
        raise RuntimeError(str(error)) from None


def a_name_missing(linear, **call):
    try:
        return linear(**call)
    except TypeError as error:
        raise TypeError(str(error).partition(": ")[2]) from None


def written_before_it_raises(kv_cache_update, **call):
    try:
        return kv_cache_update(**call)
    except (TypeError, ValueError):
        call["v_cache"].zero_()
        raise


def another_slot(rope_kv_cache_update, **call):
    rope_kv_cache_update(**call | {"positions": call["positions"].flip(-1)})
    return rope_kv_cache_update(**call)


def a_valid_call_refused(attention_varlen, **call):
    if call.get("softcap") is not None:
        raise ValueError("softcap: expected None")
    return attention_varlen(**call)


def an_invalid_call_served(attention_with_kv_cache, **call):
    try:
        return attention_with_kv_cache(**call)
    except ValueError:
        return call["q"]


FAULTS = [
    window_of_one_more, a_check_missing, a_name_missing, written_before_it_raises, another_slot, a_valid_call_refused,
    an_invalid_call_served,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    name = fault.__code__.co_varnames[0]
    operation = getattr(fastgpt, name)
    monkeypatch.setattr(fastgpt, name, functools.wraps(operation)(functools.partial(fault, operation)))
    monkeypatch.setattr(fuzz_operations, "OPERATIONS", [getattr(fuzz_valid_calls, name)])
    with pytest.raises(fuzz_operations.Wrong):
        for number in range(300):
            fuzz_operations.run(1, number, lambda call: None)


@pytest.mark.slow
def test_a_crash_is_found_and_its_call_named(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes, functools, fastgpt\n"
        "linear = fastgpt.linear\n"
        "@functools.wraps(linear)\n"
        "def crashes(*args, **call):\n"
        "    return ctypes.string_at(0) if call.get('gated') else linear(*args, **call)\n"
        "fastgpt.linear = crashes\n"
    )
    with pytest.raises(AssertionError, match=r"exit status -?\d+, last call: seed 1, call \d+: linear\(") as failed:
        fuzz(tmp_path, seed=1, calls=300, first_path=tmp_path)
    assert "Segmentation fault" in str(failed.value)
