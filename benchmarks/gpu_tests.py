"""Tests in as many processes as there are cores, without plugins of pytest; what has run is written down as it does.

python -m benchmarks.gpu_tests DONE [--workers N] [PYTEST ARGUMENT ...]

DONE is a file of lines, an outcome and a test each. Those that are in it are left out: a later run goes on where one before it
was cut. Each process takes every N-th of the others, with its output in DONE.I.log. Files take turns, so that a run that is
cut has seen as much of each. Exits with 1 if a test failed, now or before.

As a plugin, `-p benchmarks.gpu_tests`, with FASTGPT_SHARD="I/N" and FASTGPT_DONE: what one of the processes does. All of them
leave out what is in DONE.before, which does not change while they run, so that each test is one process's.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

SHARD, DONE = "FASTGPT_SHARD", "FASTGPT_DONE"


def before(done: Path) -> Path:
    return done.with_name(f"{done.name}.before")


def done_in(path: Path) -> dict[str, str]:
    """Test -> passed, failed or skipped; of a line that was cut, nothing."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {test.rstrip("\n"): outcome for outcome, _, test in (line.partition(" ") for line in lines if line.endswith("\n"))}


def by_turns(items: list) -> list:
    """Items in the order of their files, but of each file as large a share as of the others up to any place."""
    counts, seen = Counter(item.nodeid.partition("::")[0] for item in items), Counter()
    places = []
    for item in items:
        file = item.nodeid.partition("::")[0]
        places.append(seen[file] / counts[file])
        seen[file] += 1
    return [items[i] for i in sorted(range(len(items)), key=places.__getitem__)]


def pytest_collection_modifyitems(config, items):
    index, count = map(int, os.environ[SHARD].split("/"))
    done = done_in(before(Path(os.environ[DONE])))
    left = by_turns([item for item in items if item.nodeid not in done])
    kept = left[index - 1 :: count]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed" and report.when == "setup":
        with open(os.environ[DONE], "a") as file:
            file.write(f"{report.outcome} {report.nodeid}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("done", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args, rest = parser.parse_known_args()
    if args.done.exists():
        shutil.copyfile(args.done, before(args.done))
    else:
        before(args.done).unlink(missing_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    processes, threads = [], str(max(1, os.cpu_count() // args.workers))
    for i in range(1, args.workers + 1):
        environment = (
            {"OMP_NUM_THREADS": threads} | os.environ | {SHARD: f"{i}/{args.workers}", DONE: str(args.done.absolute())}
        )
        with args.done.with_name(f"{args.done.name}.{i}.log").open("ab") as log:
            command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_tests", *rest]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        statuses = {process.wait() for process in processes}
    except KeyboardInterrupt:  # of all in the group: each ends by itself
        statuses = {process.wait() for process in processes}
    done = done_in(args.done)
    for test, outcome in done.items():
        if outcome == "failed":
            print("failed", test)
    counts = Counter(done.values())
    # 5: of those that are left, a process had none.
    cut = "" if statuses <= {0, 1, 5} else f", and not all ended well: statuses {sorted(statuses)}"
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")) + cut)
    sys.exit(bool(counts["failed"]) or bool(cut))


if __name__ == "__main__":
    main()
