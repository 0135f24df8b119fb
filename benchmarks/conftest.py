"""Adds the machine, and what a run left out with the reasons, to the output of pytest-benchmark."""

import pytest

LEFT_OUT = {}  # "test_suite.py::test[parameters]" -> the reason, in one line
ABSENT = {}  # "peer: reason" -> in how many benchmarks
ENOUGH = 5  # seconds that must be left to begin a benchmark


def name_of(nodeid: str) -> str:
    return nodeid.rpartition("/")[2]


def pytest_collection_finish(session):
    LEFT_OUT.update({name_of(item.nodeid): "not finished" for item in session.items})


def pytest_runtest_logreport(report):
    if report.skipped:
        LEFT_OUT[name_of(report.nodeid)] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        LEFT_OUT[name_of(report.nodeid)] = f"failed: {crash.message.splitlines()[0] if crash else report.when}"
    elif report.when == "call":
        del LEFT_OUT[name_of(report.nodeid)]


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_json(benchmarks):
    """Removes benchmarks that did not pass: pytest-benchmark 5.3 fails on the statistics of an interrupted one."""
    benchmarks[:] = [benchmark for benchmark in benchmarks if name_of(benchmark.fullname) not in LEFT_OUT]


def pytest_benchmark_update_json(output_json):
    from benchmarks.report import machine

    output_json.update(machine=machine(), left_out=LEFT_OUT)


def pytest_runtest_setup(item):
    from benchmarks.timing import time_left

    if time_left() < ENOUGH:
        pytest.skip("no time is left")


@pytest.fixture(autouse=True)
def absent(benchmark):
    yield
    for name, reason in benchmark.extra_info.get("absent", {}).items():
        ABSENT[f"{name}: {reason}"] = ABSENT.get(f"{name}: {reason}", 0) + 1


def pytest_terminal_summary(terminalreporter):
    for line, count in ABSENT.items():
        terminalreporter.write_line(f"absent from {count} benchmarks: {line}")
