"""Peers that could not be compared with are named at the end, with the reason."""

import pytest

ABSENT = {}  # "peer: reason" -> in how many benchmarks


@pytest.fixture(autouse=True)
def absent(benchmark):
    yield
    for name, reason in benchmark.extra_info.get("absent", {}).items():
        ABSENT[f"{name}: {reason}"] = ABSENT.get(f"{name}: {reason}", 0) + 1


def pytest_terminal_summary(terminalreporter):
    for line, count in ABSENT.items():
        terminalreporter.write_line(f"absent from {count} benchmarks: {line}")
