"""Runs the kernels of cache updates and decoding under compute-sanitizer on a GPU: a part of `make gpu`.

python -m benchmarks.sanitizer

Those tests in tests/kernels/test_gpu.py whose names end in `one_by_one` launch them. All run under memcheck (accesses outside of
memory, or not aligned): every kernel of cache updates, in every width of access, and attention over caches of several kinds.
Updates, which are C++, also run under racecheck (hazards in shared memory) and synccheck (lanes that a shuffle waits for in
vain); the tools run at the same time. PyTorch's allocator is off: every tensor is an allocation of its own, and one byte
beside it is found. The exit status is 1 where a tool finds something or a test fails, and 77 where the tool refuses the
device.

Needs the standard library only.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOOLS = {"memcheck": "one_by_one", "racecheck": "update_kernels_one_by_one", "synccheck": "update_kernels_one_by_one"}
FOUND, SKIPPED = 86, 77  # exit statuses: of compute-sanitizer that found something, and of this where it cannot run
REFUSED = "Device not supported"  # what it says of a GPU in a sandbox


def find() -> str | None:
    """compute-sanitizer, on the PATH or in CUDA's folder."""
    nvcc = shutil.which("nvcc")
    cuda = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    folders = [Path(folder, inner) for folder in cuda if folder for inner in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(map(str, folders)))


def missing() -> str:
    return "" if find() else "compute-sanitizer is neither on the PATH nor in CUDA's folder"


def command(tool: str) -> list[str]:
    test = ["-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "tests/kernels/test_gpu.py", "-k", TOOLS[tool]]
    # Errors that calls of CUDA return are PyTorch's to judge, which asks for some.
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all", "--report-api-errors", "no"]
    return [find(), *options, sys.executable, *test]


def outcome(status: int, output: str) -> str:
    """ "clean", or what is wrong: found, failed (the tests did), refused."""
    if REFUSED in output:
        return "refused"
    if status == FOUND:
        return "found"
    # A tool that saw nothing of the program has no summary; where nothing passed, nothing was launched.
    return "clean" if status == 0 and "SUMMARY: 0 " in output and " passed" in output else "failed"


def main() -> None:
    if missing():
        print(missing())
        sys.exit(SKIPPED)
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for tool in TOOLS:
            log = Path(folder, tool)
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command(tool), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
                )
            running[tool] = process, log
        for tool, (process, log) in running.items():
            try:
                status = process.wait()
            except KeyboardInterrupt:
                process.terminate()
                status = process.wait()
            output = log.read_text(errors="replace")
            outcomes[tool] = outcome(status, output)
            print(f"== {tool}: exit status {status}\n{output}", flush=True)
    print(", ".join(f"{tool}: {result}" for tool, result in outcomes.items()))
    found = set(outcomes.values())
    sys.exit(0 if found == {"clean"} else SKIPPED if found <= {"clean", "refused"} else 1)


if __name__ == "__main__":
    main()
