"""A core that another process keeps busy, as on a machine that is shared."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SPIN = """
import os, sys
core, parent = map(int, sys.argv[1:])
os.sched_setaffinity(0, {core})
print("begins", flush=True)
while os.getppid() == parent:  # so that it ends with who started it, however that ends
    for _ in range(100_000):
        pass
"""


@contextmanager
def busy_core() -> Iterator[int]:
    """While it lasts, another process spins on one of the cores that this one may use. Gives its process id."""
    core = max(os.sched_getaffinity(0))
    command = [sys.executable, "-I", "-S", "-c", SPIN, str(core), str(os.getpid())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        if not process.stdout.readline():
            raise RuntimeError("the process that was to keep a core busy ended")
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
