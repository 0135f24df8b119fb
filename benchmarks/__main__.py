"""Runs the suites, each in a process of its own, and writes the report. This is `make bench`.

python -m benchmarks [SUITE ...] [--full] [--minutes N] [--out FOLDER]

Ctrl-C, or the end of the time, stops the suite that runs; the report is made from what there is and names what is not.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import report

HERE = Path(__file__).parent
SUITES = {  # shares of the time
    "generate": 0.5, "attention": 0.15, "decode": 0.15, "kv_cache": 0.15, "linear": 0.05, "integrations": 1.0,
    "throughput": 1.0, "embed": 1.0,
}  # fmt: skip
ON_REQUEST = {"integrations", "throughput", "embed"}  # only with --full or by name, since each takes all of the time
MINUTES = 9.5  # of ten, since the report takes a while
GRACE = 60  # seconds for the current call to return after an interrupt


def run(suite: str, output: Path, seconds: float | None) -> str | None:
    """Runs a suite, with pytest-benchmark's JSON in `output`. Returns the problem, if there was one."""
    output.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", str(HERE / f"test_{suite}.py"), "-v", "-rs", "--tb=short", "--no-header",
        "--show-capture=no", "--disable-warnings", "--benchmark-only", "--benchmark-quiet", f"--benchmark-json={output.absolute()}",
    ]  # fmt: skip
    # In a new session, so that pytest gets Ctrl-C only once, from here.
    process = subprocess.Popen(command, cwd=HERE.parent, start_new_session=True)
    try:
        status = process.wait(seconds)
        return f"pytest ended with status {status}" if status else None
    except subprocess.TimeoutExpired:
        problem = "out of time"
    except KeyboardInterrupt:
        problem = "interrupted"
    try:
        os.killpg(process.pid, signal.SIGINT)  # pytest writes its results so far
        process.wait(GRACE)
        return problem
    except subprocess.TimeoutExpired:
        return f"{problem}, and did not end"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all but the last three")
    parser.add_argument(
        "--full", action="store_true", help="run every case, instead of as many as fit into ten minutes on two cores"
    )
    parser.add_argument("--minutes", type=float, help=f"when to stop; default: {MINUTES}, or with --full never")
    parser.add_argument("--out", type=Path, default="build/benchmarks", help="for what was timed; default: %(default)s")
    args = parser.parse_args()
    if unknown := [suite for suite in args.suites if suite not in SUITES]:
        parser.error(f"SUITE: expected {', '.join(SUITES)}, got {', '.join(unknown)}")
    if args.minutes is None and not args.full:
        args.minutes = MINUTES
    os.environ["FASTGPT_BENCH_FULL"] = "1" if args.full else "0"
    for number in (signal.SIGINT, signal.SIGTERM):  # background jobs of a shell ignore SIGINT
        signal.signal(number, signal.default_int_handler)

    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    suites = args.suites or [suite for suite in SUITES if args.full or suite not in ON_REQUEST]
    problems, outputs, interrupted = {}, [], False
    for i, suite in enumerate(suites):
        if interrupted:
            problems[suite] = "not started"
            continue
        seconds = None
        if args.minutes is not None:
            kept = sum(SUITES[later] for later in suites[i + 1 :]) / sum(SUITES[suite] for suite in suites)
            seconds = max(0.0, start + 60 * args.minutes * (1 - kept) - time.monotonic())
        output = args.out / f"{suite}.json"
        problems[suite] = run(suite, output, seconds) or ""
        interrupted = problems[suite].startswith("interrupted")
        if output.exists():
            outputs.append(output)
    if outputs:
        report.update(outputs)
    for suite, problem in problems.items():
        if problem:
            print(f"{suite}: {problem}")
    sys.exit(130 if interrupted else any(problem.startswith("pytest") for problem in problems.values()))


if __name__ == "__main__":
    main()
