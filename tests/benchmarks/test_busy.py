"""The process that keeps a core busy does so, and is gone afterwards."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.busy import busy_core

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until(true) -> bool:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.02)
    return False


def test_busy_process_spins_on_one_core_and_ends():
    with busy_core() as pid:
        assert os.sched_getaffinity(pid) == {max(os.sched_getaffinity(0))}
        assert wait_until(lambda: cpu_seconds(pid) > 0.1)
    assert not is_running(pid)


def test_busy_process_ends_after_a_failure():
    with pytest.raises(KeyboardInterrupt), busy_core() as pid:
        raise KeyboardInterrupt
    assert not is_running(pid)


@pytest.mark.slow
def test_busy_process_ends_with_its_parent():
    """Also where that was killed, and could not end it."""
    code = "from benchmarks.busy import busy_core\nwith busy_core() as pid: print(pid, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        assert is_running(pid)
        process.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not is_running(pid))
