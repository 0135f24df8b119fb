"""`make gpu` runs to its end within its time, and tells what became of each part."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu, gpu_tests, sanitizer

ROOT = Path(__file__).parents[2]


def python(code):
    return [sys.executable, "-S", "-c", code]


FINE = python("print('all is fine')")
HANGS = python("import time; print('begins'); time.sleep(1000)")
DEAF = python("import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf'); time.sleep(1000)")
WITH_CHILD = python(
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']); "
    "print(child.pid); time.sleep(1000)"
)


class Clock:
    """Stands for the module `time`: hours pass while a part waits to be ended, and none while it works."""

    def __init__(self, waits):
        self.now, self.waits = 0.0, waits

    def monotonic(self):
        return self.now

    def time(self):
        return self.now

    def sleep(self, seconds):
        time.sleep(0.01)
        if self.waits():
            self.now += seconds


def printed(log):
    return log.exists() and log.read_text() != ""


def gone(process):
    """Waits until a process has ended, which the test's time limit guards."""
    stat = Path("/proc", process, "stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":
        time.sleep(0.01)
    return True


def run(tmp_path, parts, seconds=600.0, grace=0.5):
    results = gpu.run_all([gpu.Part(name, *of_part) for name, of_part in parts.items()], tmp_path, seconds, grace)
    return {result.part: result for result in results}


def test_whatever_a_part_does_the_others_run(tmp_path):
    parts = {
        "fails": (python("print('ouch'); raise SystemExit(3)"), 0.1),
        "crashes": (python("import os; print('near the end', flush=True); os.abort()"), 0.1),
        "is not there": (["/no/such/program"], 0.1),
        "prints noise": (python("import sys; sys.stdout.buffer.write(b'\\xff\\xfe\\n=== 3 passed ===\\n\\n')"), 0.1),
        "works": (FINE, 0.1),
    }
    results = run(tmp_path, parts)
    assert [result.outcome for result in results.values()] == ["failed", "failed", "failed", "ok", "ok"]
    assert [result.last_line for result in results.values()][-2:] == ["3 passed", "all is fine"]
    assert results["fails"].last_line == "ouch" and "No such file" in results["is not there"].last_line
    assert results["crashes"].last_line.startswith("SIGABRT: ")
    assert results["fails"].log.read_text() == "ouch\n"
    rows = gpu.table(list(results.values())).splitlines()
    assert len(rows) == 6 and rows[-1].split() == ["works", "ok", *rows[-1].split()[2:4], "all", "is", "fine"]


@pytest.mark.parametrize(
    "code, deaf, said", [(HANGS, False, "KeyboardInterrupt"), (DEAF, True, "deaf"), (WITH_CHILD, False, "KeyboardInterrupt")],
    ids=["hangs", "is deaf", "has a child"],
)  # fmt: skip
def test_a_hanging_part_is_killed_with_its_children_and_its_output_is_kept(code, deaf, said, tmp_path, monkeypatch):
    log, sent, send = tmp_path / "hangs.log", [], os.killpg
    monkeypatch.setattr(gpu.os, "killpg", lambda group, number: (sent.append(number), send(group, number)))
    # It has printed, and what heeds the interrupt has all the time to end by it.
    clock = Clock(lambda: printed(log) and (not sent or deaf and signal.SIGKILL not in sent))
    monkeypatch.setattr(gpu, "time", clock)
    results = run(tmp_path, {"hangs": (code, 0.1), "works": (FINE, 0.3)}, seconds=4.0)
    assert [result.outcome for result in results.values()] == ["timed out", "ok"]
    assert sent[:2] == [signal.SIGINT, signal.SIGKILL] and clock.now <= 4.0
    assert said in log.read_text()
    first = log.read_text().split()[0]
    assert first in ("begins", "deaf") or gone(first)


def test_a_child_that_outlives_its_part_is_ended(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']).pid)"
    result = run(tmp_path, {"leaves a child": (python(code), 0.5)})["leaves a child"]
    assert result.outcome == "ok" and gone(result.last_line)


@pytest.mark.slow
def test_a_part_may_use_all_time_not_reserved_for_later_parts(tmp_path, monkeypatch):
    parts = {"first": (HANGS, 0.1), "second": (HANGS, 0.3), "cannot run": (FINE, 0.5, {}, "needs a GPU"), "third": (FINE, 0.2)}
    clock = Clock(lambda: not (tmp_path / "third.log").exists() and not sent)
    sent, send = [], os.killpg

    def killpg(group, number):
        sent[:] = [number] if number == signal.SIGINT else []  # no time passes from the interrupt to the end
        send(group, number)

    monkeypatch.setattr(gpu.os, "killpg", killpg)
    monkeypatch.setattr(gpu, "time", clock)
    results = run(tmp_path, parts, seconds=5.0)
    # Of 5 s all but the 1.5 and 1 of others and the grace; then what it was granted, and what the first left.
    assert results["first"].seconds == pytest.approx(5 - 1.5 - 1 - 0.5, abs=2 * gpu.POLL)
    assert results["second"].seconds == pytest.approx(5 - 1 - results["first"].seconds - 0.5, abs=2 * gpu.POLL)
    assert results["third"].outcome == "ok"
    assert results["cannot run"].outcome == "skipped" and results["cannot run"].last_line == "needs a GPU"


@pytest.mark.slow
def test_without_time_parts_are_skipped(tmp_path):
    results = run(tmp_path, {"is deaf": (DEAF, 0.0), "late": (FINE, 0.0), "later": (FINE, 0.0)}, seconds=1.0)
    assert [result.outcome for result in results.values()] == ["timed out", "skipped", "skipped"]
    assert results["late"].last_line == "no time is left"


def test_environment(tmp_path):
    code = "import os; print(os.environ['FASTGPT_RESULTS'], os.environ['PATH'] != '')"
    results = run(tmp_path, {"part": (python(code), 0.5, {"FASTGPT_RESULTS": "there"})})
    assert results["part"].last_line == "there True"


DRIVER = """
import sys
from pathlib import Path
from benchmarks import gpu, gpu_tests, sanitizer
python = [sys.executable, "-S", "-c"]
fine, hangs = [*python, "print('fine')"], [*python, "import time; print('begins'); time.sleep(1000)"]
gpu.parts = lambda out, dry_run: [gpu.Part("works", fine, 0.1), gpu.Part("hangs", hangs, 0.1), gpu.Part("late", fine, 0.1)]
gpu.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ignored", [False, True], ids=["", "started in the background"])
def test_an_interrupted_run_reports_partial_results(number, ignored, tmp_path):
    start = (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None
    command = [sys.executable, "-c", DRIVER, "--out", tmp_path, "--dry-run"]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=start)
    while not printed(tmp_path / "hangs.log") and driver.poll() is None:
        time.sleep(0.01)
    driver.send_signal(number)
    shown, _ = driver.communicate()
    assert driver.returncode == 130
    rows = [line.split() for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert [row[:2] for row in rows] == [["part", "result"], ["works", "ok"], ["hangs", "interrupted"], ["late", "skipped"]]
    assert (tmp_path / "summary.txt").read_text() in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_part_is_started(number, tmp_path, monkeypatch):
    """The part is ended, and none is started after it."""

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(gpu.subprocess, "Popen", Popen)
    parts = [gpu.Part("hangs", HANGS, 0.5), gpu.Part("late", FINE, 0.1)]
    with gpu.signals() as arrived:
        results = gpu.run_all(parts, tmp_path, 600, arrived=arrived)
    assert arrived == [number] and [result.outcome for result in results] == ["interrupted", "skipped"]


@pytest.mark.parametrize("code, status", [("print()", 0), ("raise SystemExit(1)", 1)])
def test_exit_status(code, status, tmp_path):
    driver = DRIVER.replace("time.sleep(1000)", code.replace("print()", "pass"))
    run = subprocess.run(
        [sys.executable, "-c", driver, "--out", tmp_path, "--dry-run"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == status, run.stdout + run.stderr


@pytest.mark.slow
def test_an_interrupted_part_has_time_to_write_its_results(tmp_path, monkeypatch):
    code = (
        "import time, pathlib\ntry:\n    print('measures')\n    time.sleep(1000)\n"
        f"except KeyboardInterrupt:\n    time.sleep(0.3)\n    pathlib.Path({str(tmp_path / 'result')!r}).write_text('measured')"
    )
    sent, send = [], os.killpg
    monkeypatch.setattr(gpu.os, "killpg", lambda group, number: (sent.append(number), send(group, number)))
    monkeypatch.setattr(gpu, "time", Clock(lambda: printed(tmp_path / "measures.log") and not sent))
    results = run(tmp_path, {"measures": (python(code), 0.5), "works": (FINE, 0.1)}, seconds=4.0, grace=0.8)
    assert results["measures"].outcome == "timed out" and results["works"].outcome == "ok"
    assert (tmp_path / "result").read_text() == "measured"


def test_a_part_that_cannot_run_here_says_why(tmp_path):
    results = run(tmp_path, {"cannot": (python("print('no such device'); raise SystemExit(77)"), 0.5), "works": (FINE, 0.1)})
    assert (results["cannot"].outcome, results["cannot"].last_line) == ("skipped", "no such device")
    assert results["works"].outcome == "ok"


def test_a_part_knows_until_when_it_may_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "time", Clock(lambda: False))
    code = "import os; print(os.environ['FASTGPT_BENCH_UNTIL'])"
    until = float(run(tmp_path, {"part": (python(code), 0.5)}, seconds=6.0, grace=1.0)["part"].last_line)
    assert until == 5.0  # of 6 s all but the grace


def test_after_every_part_one_file_has_all_that_there_is(tmp_path):
    out = tmp_path / "gpu"
    out.mkdir()
    listing = python(f"import tarfile; print(tarfile.open({str(out) + '.tar.gz'!r}).getnames())")
    results = run(out, {"first": (FINE, 0.2), "second": (listing, 0.2)})
    assert "gpu/first.log" in results["second"].last_line and "gpu/second.log" not in results["second"].last_line
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        assert {"gpu/first.log", "gpu/second.log", "gpu/summary.txt"} <= set(archive.getnames())
        assert b"all is fine" in archive.extractfile("gpu/summary.txt").read()


def test_parts_by_name(tmp_path):
    parts = gpu.parts(tmp_path, False)
    chosen = gpu.chosen(parts, ["report", "parity-tests", "Generate", "benchmark decode"])
    assert [part.name for part in chosen] == ["parity tests", "benchmark generate", "benchmark decode", "report"]
    assert sum(part.share for part in chosen) == pytest.approx(1)
    with pytest.raises(ValueError, match="expected build, device, .* got speed"):
        gpu.chosen(parts, ["build", "speed"])


def test_parts_again_leave_the_logs_of_others(tmp_path):
    kept, anew = tmp_path / "build.log", tmp_path / "benchmark_generate.json"
    for path in kept, anew:
        path.write_text("of an earlier run")
    driver = "from benchmarks import gpu; gpu.run_all = lambda *_, **__: []; gpu.main()"
    command = [sys.executable, "-c", driver, "--out", tmp_path, "--dry-run", "--only", "generate", "report"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert kept.exists() and not anew.exists()


def outcomes(out):
    return json.loads((out / gpu.OUTCOMES).read_text())


def test_a_later_run_continues_where_the_previous_one_ended(tmp_path):
    """By the folder that the first left, or its archive: what was well is left out, but for what each machine needs."""
    out = tmp_path / "gpu"
    out.mkdir()
    parts = [
        gpu.Part("build", FINE, 0.2), gpu.Part("first tests", FINE, 0.2),
        gpu.Part("numerics", python("raise SystemExit(1)"), 0.2), gpu.Part("report", FINE, 0.1, missing="cannot run here"),
    ]  # fmt: skip
    gpu.run_all(parts, out, 60.0)
    assert outcomes(out) == {"build": "ok", "first tests": "ok", "numerics": "failed", "report": "skipped"}
    for path in out.iterdir():
        path.unlink()
    out.rmdir()
    left = gpu.left_over(parts, out)
    assert [part.name for part in left] == ["build", "numerics", "report"] and (out / "first_tests.log").exists()
    assert sum(part.share for part in left) == pytest.approx(1)
    first = (out / "numerics.log").read_text()
    gpu.run_all([part._replace(command=FINE) for part in left], out, 60.0, number=2)
    assert outcomes(out)["numerics"] == "ok" and outcomes(out)["first tests"] == "ok"
    assert (out / "numerics.log").read_text() == first and "fine" in (out / "numerics.2.log").read_text()
    with pytest.raises(ValueError, match="--part: expected .*another of an earlier run, or .*another.tar.gz"):
        gpu.left_over(parts, tmp_path / "another")


TESTS = """
import os, time, pytest
@pytest.mark.parametrize("i", range(7))
def test_each(i):
    if i == 3 and "CUT" in os.environ:
        time.sleep(1000)
    assert i != 5
def test_skipped():
    pytest.skip("here")
"""


def run_tests(tmp_path, seconds=100.0, workers=2, **environment):
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "benchmarks.gpu_tests", tmp_path / "tests.done", "--workers", str(workers), "-p",
               "no:cacheprovider", "-c", "/dev/null", "--rootdir", tmp_path, tmp_path / "test_some.py"]  # fmt: skip
    return gpu.run(gpu.Part("tests", command, 1, environment), tmp_path / "log", seconds)


@pytest.mark.slow
def test_tests_run_once_in_several_processes(tmp_path):
    result = run_tests(tmp_path, workers=3)
    assert (result.outcome, result.last_line) == ("failed", "6 passed, 1 failed, 1 skipped")
    assert "failed test_some.py::test_each[5]" in result.log.read_text()
    lines = (tmp_path / "tests.done").read_text().splitlines()
    assert len(lines) == len({line.split()[1] for line in lines}) == 8


@pytest.mark.slow
def test_tests_that_were_cut_go_on_with_the_others(tmp_path, monkeypatch):
    done = tmp_path / "tests.done"
    waits = lambda: done.exists() and len(done.read_text().splitlines()) == 5  # noqa: E731  of one process: the other hangs
    monkeypatch.setattr(gpu, "time", Clock(waits))
    cut = run_tests(tmp_path, seconds=8.0, CUT="1")
    assert cut.outcome == "timed out"
    before = done.read_text()
    assert "test_each[3]" not in before and "passed test_some.py::test_each[1]" in before
    monkeypatch.undo()
    result = run_tests(tmp_path)
    assert result.last_line == "6 passed, 1 failed, 1 skipped"
    assert done.read_text().startswith(before) and len(done.read_text().splitlines()) == 8


def test_files_take_turns():
    """A run that is cut in the middle has half of each file's tests."""
    names = [f"{file}::test[{i}]" for file, count in (("a.py", 6), ("b.py", 2), ("c.py", 4)) for i in range(count)]
    order = [item.nodeid for item in gpu_tests.by_turns([SimpleNamespace(nodeid=name) for name in names])]
    assert sorted(order) == sorted(names)
    assert [sum(name.startswith(file) for name in order[:6]) for file in "abc"] == [3, 1, 2]
    assert [name for name in order if name[0] == "a"] == names[:6]


def test_every_test_of_a_gpu_belongs_to_a_part():
    files = {file for _, files, _ in gpu.TESTS.values() for file in files}
    marks = re.compile(r"mark\.gpu\b|^@runs_kernel", re.MULTILINE)
    marked = {path for path in Path(ROOT, "tests").rglob("test_*.py") if marks.search(path.read_text())}
    assert {str(path.relative_to(ROOT)) for path in marked} == files


SUMMARY = "========= ERROR SUMMARY: {} errors"
CLEAN = f"echo '1 passed'; echo '{SUMMARY.format(0)}'"
TOOL = """#!/bin/sh
echo "$@" >>{log}
case "$2" in memcheck) {memcheck};; *) {others};; esac
"""


@pytest.mark.parametrize(
    "memcheck, others, outcome, last_line",
    [
        (CLEAN, CLEAN, "ok", "memcheck: clean, racecheck: clean, synccheck: clean"),
        (f"echo '1 passed'; echo '{SUMMARY.format(1)}'; exit 86", CLEAN, "failed", "memcheck: found, racecheck: clean"),
        ("echo '1 failed'; exit 1", CLEAN, "failed", "memcheck: failed, "),
        ("echo '1 passed'; exit 0", CLEAN, "failed", "memcheck: failed, "),
        (f"echo '1 skipped'; echo '{SUMMARY.format(0)}'", CLEAN, "failed", "memcheck: failed, "),
        (*["echo '========= Error: Device not supported'; exit 1"] * 2, "skipped", "memcheck: refused, racecheck: refused"),
    ],
    ids=["clean", "a find", "a failure", "nothing seen", "nothing launched", "no such device"],
)
def test_outcome_of_the_sanitizer(memcheck, others, outcome, last_line, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(log=tmp_path / "calls", memcheck=memcheck, others=others))
    tool.chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    result = run(tmp_path, {"sanitizer": ([sys.executable, "-m", "benchmarks.sanitizer"], 0.9, path)})["sanitizer"]
    assert result.outcome == outcome and result.last_line.startswith(last_line)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3 and all("--error-exitcode 86" in call and "one_by_one" in call for call in calls)


def test_without_the_sanitizer_its_part_is_skipped_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if sanitizer.find():
        pytest.skip("it is in /usr/local/cuda")
    (part,) = [part for part in gpu.parts(tmp_path, False) if part.name == "sanitizer"]
    assert part.missing == "compute-sanitizer is neither on the PATH nor in CUDA's folder"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").touch(0o755)
    assert sanitizer.find() == str(tmp_path / "bin" / "compute-sanitizer")


def test_every_suite_is_a_part(tmp_path):
    names = [part.name for part in gpu.parts(tmp_path, False)]
    assert {f"benchmark {path.stem.removeprefix('test_')}" for path in (ROOT / "benchmarks").glob("test_*.py")} <= set(names)
    telling = ["build", "device", "info", *list(gpu.TESTS)[:3], "compile", "benchmark generate", "report"]
    assert sorted(telling, key=names.index) == telling


def test_at_most_raises_after_its_time():
    from benchmarks.timing import at_most

    with pytest.raises(TimeoutError, match="longer than 0 s"), at_most(0.05):
        time.sleep(60)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)  # no alarm is left
    with at_most(600):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.slow
def test_a_dry_run_covers_decoding_up_to_the_report(tmp_path, monkeypatch):
    """With models of a few thousand weights: the suite, its case's share of the limit, its growth, the page and the plot."""
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("transformers")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parts = gpu.chosen(gpu.parts(tmp_path, True), ["generate", "report"])
    results = gpu.run_all(parts, tmp_path, 300)
    assert [result.outcome for result in results] == ["ok", "ok"], "\n".join(result.log.read_text() for result in results)
    (path,) = tmp_path.glob("results/*/generate.json")
    result = json.loads(path.read_text())
    (case,) = result["decoding"]
    assert (case["model"], case["batch"], case["context"]) == ("gpt2-124m", 1, 16) and len(case["of_limit"]) == 3
    theirs = {"transformers, dynamic cache", "transformers, static cache, compiled"}
    assert theirs | {"ours, sampled"} <= case["times_ours"].keys() and theirs <= case["targets"]["times"].keys()
    assert [case["context"] for case in result["cached against uncached"]] == [16, 32, 64, 128] and len(result["growth"]) == 1
    assert "### Decoding" in (path.parent / "README.md").read_text()


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_parts_fit_into_the_time(dry_run, tmp_path):
    parts = gpu.parts(tmp_path, dry_run)
    assert math.fsum(part.share for part in parts) <= 1 and len({part.name for part in parts}) == len(parts)
    assert any(part.missing == "needs a GPU" for part in parts) == dry_run


def test_driver_starts_without_torch_and_fastgpt(tmp_path):
    """No torch, no fastgpt: isolated from site-packages."""
    run = subprocess.run([sys.executable, "-S", "-m", "benchmarks.gpu", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "--dry-run" in run.stdout, run.stderr
