"""benchmarks.compare finds what became slower, and does not take a slower machine or noise for it."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls it with results or paths of files; returns the exit status and what it printed."""

    def run(*paths):
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, paths)])
        with pytest.raises(SystemExit) as exit:
            compare.main()
        return exit.value.code, "".join(capsys.readouterr())

    return run


@pytest.fixture
def compared(run, tmp_path):
    """The same of two results."""

    def compared(base, new):
        for name, result in (("base", base), ("new", new)):
            (tmp_path / f"{name}.json").write_text(json.dumps(result))
        return run(tmp_path / "base.json", tmp_path / "new.json")

    return compared


def around(median, spread=0.02):
    return [median * (1 - spread), median, median * (1 + spread)]


def case(ours=100.0, against=None, limit=None, spread=0.02, **parameters):
    """A condensed case. against: name -> its time over ours; limit: its time over ours, doing twice the bytes of ours."""
    result = parameters | {"microseconds": {"ours": around(ours, spread)}, "times_ours": {}, "noisy": [], "bytes": 1000}
    if limit is not None:
        against = (against or {}) | {"reading": limit}
        result |= {"limit": "reading", "limit_bytes": 2000, "of_limit": around(limit / 2, spread)}
    for name, ratio in (against or {}).items():
        result["microseconds"][name] = around(ours * ratio, spread)
        result["times_ours"][name] = around(ratio, spread)
    return result


def suite(*cases, **machine):
    return {"machine": {"cpu": "a", "threads": 2, "commit": "1234"} | machine, "decode": list(cases)}


PLANTED = {
    "nothing": (case(limit=1.8), case(limit=1.8), ""),
    "a slower machine": (case(limit=1.8), case(ours=150.0, limit=1.8), ""),
    "8% slower": (case(limit=1.8), case(ours=108.0, limit=1.8 / 1.08), ""),
    "20% slower": (case(limit=1.8), case(ours=120.0, limit=1.8 / 1.2), "slower"),
    "20% slower on a faster machine": (case(limit=1.8), case(ours=90.0, limit=1.8 / 1.2), "slower"),
    "faster": (case(limit=1.2), case(ours=80.0, limit=1.5), "faster"),
    "a faster peer": (case(limit=1.8, against={"SDPA": 2.0}), case(limit=1.8, against={"SDPA": 1.0}), ""),
    "less work in the same time": (case(limit=1.8), case(limit=1.8) | {"bytes": 500, "of_limit": around(0.45)}, ""),
    "20% slower than the peers": (
        case(against={"a": 2.0, "b": 3.0, "c": 1.0}),
        case(ours=70.0, against={"a": 2.0 / 1.2, "b": 3.0 / 1.2, "c": 1.0}),
        "slower",
    ),
    "one of three peers is faster": (case(against={"a": 2.0, "b": 3.0, "c": 1.0}), case(against={"a": 1.0, "b": 3.0, "c": 1.0}), ""),
    "20% slower and alone": (case(), case(ours=120.0), "slower"),
    "20% slower and alone, within the spread": (case(spread=0.2), case(ours=120.0, spread=0.2), "noisy"),
    "20% slower and noisy": (case(limit=1.8, spread=0.2), case(limit=1.5, spread=0.2) | {"noisy": ["reading"]}, "noisy"),
    "a third slower and noisy": (case(limit=1.8), case(limit=1.2) | {"noisy": ["reading"]}, "slower"),
    "a noisy peer": (case(against={"a": 2.0, "b": 3.0}), case(against={"a": 1.0, "b": 3.0}) | {"noisy": ["a"]}, ""),
}  # fmt: skip


@pytest.mark.parametrize("base, new, verdict", PLANTED.values(), ids=PLANTED)
def test_planted_changes(base, new, verdict, compared):
    status, printed = compared(suite(base), suite(new))
    row = next(line for line in printed.splitlines() if line.startswith("decode"))
    assert re.search(r"(slower|faster|noisy|)$", row)[0] == verdict
    assert status == (1 if verdict == "slower" else 0)


def test_both_ratios_are_shown(compared):
    _, printed = compared(suite(case(limit=1.8)), suite(case(ours=200.0, limit=1.5)))
    assert re.search(r"decode +100 µs +200 µs +0\.50x +0\.83x +reading +slower\n", printed)


def test_cases_are_distinguished_by_their_parameters(compared):
    """And one that is slower is enough."""
    base = suite(*(case(limit=1.8, keys=keys, dtype="float32") for keys in (32, 900, 1000)))
    new = suite(*(case(limit=limit, keys=keys, dtype="float32") for keys, limit in ((900, 1.3), (32, 1.8), (2000, 1.8))))
    status, printed = compared(base, new)
    assert status == 1
    assert re.search(r"keys=32, float32 .*reading\n", printed) and re.search(r"keys=900, float32 .*slower\n", printed)
    assert "only then: decode, keys=1000, float32\n" in printed and "only now: decode, keys=2000, float32\n" in printed


def test_other_machines_and_versions_are_reported(compared):
    base = suite(case(), peers={"ctranslate2": "4.8", "transformers": "5.1"})
    new = suite(case(), threads=1, gpu="H200", commit="5678", peers={"transformers": "5.2"})
    _, printed = compared(base, new)
    assert "then 1234, now 5678" in printed
    differences = re.findall(r"changed: (.*)", printed)
    assert differences == [
        "threads was 2, is 1", "ctranslate2 was 4.8, is unknown", "transformers was 5.1, is 5.2", "gpu was unknown, is H200",
    ]  # fmt: skip


@pytest.mark.parametrize("terminal, no_color, colored", [(True, "", True), (True, "1", False), (False, "", False)])
def test_colors(terminal, no_color, colored, compared, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    _, printed = compared(suite(case(limit=1.8)), suite(case(limit=1.2)))
    assert ("\033[31mdecode" in printed) == colored and ("\033[" in printed) == colored


def test_folders(run, tmp_path):
    then, now = tmp_path / "then", tmp_path / "now"
    for folder, suites in ((then, ("decode", "generate")), (now, ("decode", "kv_cache"))):
        folder.mkdir()
        for name in suites:
            (folder / f"{name}.json").write_text(json.dumps(suite(case())))
        (folder / "training.json").write_text('{"validation_loss": 1.6}')  # nothing of which was timed
    status, printed = run(then, now)
    assert status == 0 and "decode.json: then" in printed
    assert "only then: generate.json\n" in printed and "only now: kv_cache.json\n" in printed
    assert run(then / "decode.json", now)[0] == 0  # of a folder, the file of that name


@pytest.mark.slow
def test_new_defaults_to_the_results_of_this_machine(tmp_path):
    (tmp_path / "nothing.json").write_text(json.dumps(suite(case())))
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", tmp_path / "nothing.json"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert re.search(r"benchmarks/results/[\w-]+(/nothing\.json)?: No such file or directory\n$", run.stderr), run.stderr


def damaged(result, change):
    result = copy.deepcopy(result)
    change(result)
    return json.dumps(result)


GOOD = suite(case(limit=1.8))
DAMAGED = {
    "missing": (None, "No such file or directory"),
    "not JSON": (json.dumps(GOOD)[:-30], "expected what benchmarks.report writes, got JSONDecodeError"),
    "a list": ("[]", "expected what benchmarks.report writes, got AttributeError"),
    "another object": ('{"validation_loss": 1.6}', "expected results with times, got none"),
    "no machine": (damaged(GOOD, lambda x: x.pop("machine")), "expected what benchmarks.report writes, got KeyError: 'machine'"),
    "no time of ours": (damaged(GOOD, lambda x: x["decode"][0]["microseconds"].pop("ours")), "got KeyError: 'ours'"),
    "a time of zero": (damaged(GOOD, lambda x: x["decode"][0]["microseconds"].update(ours=[0, 0, 0])), "got ZeroDivisionError"),
    "no quartiles": (damaged(GOOD, lambda x: x["decode"][0].update(of_limit=[0.9])), "got IndexError"),
}  # fmt: skip


@pytest.mark.parametrize("content, message", DAMAGED.values(), ids=DAMAGED)
def test_incomparable_results_are_one_sentence(content, message, run, tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(GOOD))
    if content is not None:
        bad.write_text(content)
    for paths in ((good, bad), (bad, good)):
        status, printed = run(*paths)
        assert status == 2 and printed.count("\n") == 1
        assert printed.startswith(f"benchmarks.compare: {bad}: ") and message in printed


def test_a_file_is_not_compared_with_itself(run, tmp_path):
    (tmp_path / "base.json").write_text(json.dumps(GOOD))
    status, printed = run(tmp_path / "base.json", tmp_path)
    assert status == 2 and "is compared with itself" in printed
