"""Everything that a GPU machine can tell, within a time: build, tests, benchmarks, numerics. This is `make gpu`.

python -m benchmarks.gpu [--out FOLDER] [--minutes N] [--part N] [--only PART ...] [--dry-run]

Each part is a process of its own with a log in FOLDER. Each is granted a share of the time, and may use what earlier parts
left of theirs. A part that fails, crashes or hangs does not keep the next from running; one that is out of time is
interrupted, so that pytest writes what it has, and then killed with all it started. So is the part that runs at Ctrl-C,
which ends the run. The table at the end is also in FOLDER/summary.txt, and results are in FOLDER/results and, unless it is
a dry run, under benchmarks/results. After every part all of FOLDER is in FOLDER.tar.gz, too: one file to take along. Where
its results/ are unpacked to benchmarks/results, `python -m benchmarks.report` puts them into docs/performance.md.

The most telling come first: whether it builds and imports, one kernel of each kind, parity of attention and caches, cached
generation against uncached, how fast GPT-2 is. Tests run in as many processes as there are cores, since they compile 1,500
kernels; what the benchmarks launch is compiled on all cores before (benchmarks/compile_ahead.py), as they are to time and not
to compile. Of sm_90, these are 139 kernels, of which a sample of 16, compiled on a busy core of an AMD EPYC, took 1.9 s of CPU
each, and one of 24 on another day 1.4 s: with 16 such cores, 70% of their time in use, 17 to 24 s, of which 27 are granted, and
190 to 250 s for the tests, which are granted 167 and what the build leaves of 81. So some tests may be cut, which are left to
part 2: of each file the same share, as files take turns (benchmarks/gpu_tests.py). What a part needs beyond
torch, triton, NumPy, nvcc and pytest it does without: xdist, hypothesis, matplotlib.

--part 2 goes on where a run ended: parts that were well are left out, and tests that have run, by what is in FOLDER, or in
FOLDER.tar.gz if only that is there: so the archive of the first run is what to bring to the machine of the second, beside
where FOLDER is to be. What the machine itself needs is done again: build, device, info, compile. Logs are PART.2.log then.

--only runs these parts again, with all of the time: build, sanitizer, "GPU tests" or gpu-tests, "benchmark generate" or
generate, ... Logs and results of others stay; `report` makes results of what all benchmarks left. A dry run needs no GPU:
the same parts, with a few tests and benchmarks of each, and with models of a few thousand weights.

Needs the standard library only: the build may fail.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import sanitizer
from benchmarks.table import aligned

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9
GRACE = 20  # seconds from the interrupt to the kill, if there are as many
OUTCOMES = "outcomes.json"  # of all parts so far, by their names
POLL = 0.05  # seconds between two looks at a part
SKIPPED = sanitizer.SKIPPED  # the exit status of a part that cannot do here what it is for; its last line says why
SUITES = {  # shares of the whole time, the most telling first; 0.02 for others
    "generate": 0.18, "attention": 0.05, "decode": 0.04, "linear": 0.03, "kv_cache": 0.02, "integrations": 0.02,
    "throughput": 0.01,
}  # fmt: skip
AGAIN = ("build", "device", "info", "compile")  # on each machine
TESTS = {  # of a GPU: parts, most telling first: their share, their files, and which tests
    "first tests": (
        0.05, ["tests/kernels/test_gpu.py"], "each_kind or float_masks or identical or few_launches or uses_the_kernels or trains",
    ),
    "parity tests": (0.15, [
        "tests/kernels/test_triton_attention.py", "tests/kernels/test_triton_decode.py", "tests/ops/test_attention_with_kv_cache.py",
        "tests/kernels/test_triton_linear.py", "tests/kernels/test_triton_linear_quantized.py", "tests/kernels/test_triton_moe.py", "tests/kernels/test_triton_moe_quantized.py", "tests/ops/test_decode_step.py",
    ], ""),
    "cache tests": (0.07, ["tests/kernels/test_gpu.py", "tests/kernels/test_triton_kv_cache_update.py"], ""),
    "other tests": (0.04, [
        "tests/integrations/test_sdpa.py", "tests/kernels/test_gpu_families.py", "tests/integrations/test_flash_provider.py", "tests/integrations/test_flash_attn.py",
    ], ""),
}  # fmt: skip


class Part(NamedTuple):
    name: str
    command: list
    share: float  # of the whole time, granted
    environment: dict[str, str] = {}
    missing: str = ""  # why it cannot run here


class Result(NamedTuple):
    part: str
    outcome: str  # ok, failed, timed out, interrupted, skipped
    seconds: float
    log: Path | None
    last_line: str


def parts(out: Path, dry_run: bool) -> list[Part]:
    """The most telling first, and last what other machines can tell as well."""
    python = sys.executable
    test = [python, "-m", "pytest", "-v", "-rfE", "--durations=15", "--continue-on-collection-errors"]
    test += ["-p", "no:cacheprovider", "-o", "faulthandler_timeout=100"]
    tiny = {"FASTGPT_BENCH_TINY": "1"} if dry_run else {}
    stores = {"FASTGPT_RESULTS": str(out / "results")}
    untimed = "" if importlib.util.find_spec("pytest_benchmark") else "pytest-benchmark is not installed"
    bench = [*test, "--benchmark-only", "--benchmark-quiet", "-rs"]
    little = {"generate": ["-k", "gpt2-124m"], "integrations": ["-k", "adapter"]}  # of a suite in a dry run
    last = 0.05 if dry_run else 0.02
    few = (
        ["tests/testing/test_numerics.py", "tests/ops/test_page_allocator.py", "tests/test_imports.py"]
        if dry_run
        else ["tests"]
    )
    device = "import torch; assert torch.cuda.is_available(), 'torch finds no GPU'; print(torch.cuda.get_device_name())"
    condense = 'exec "$0" -m benchmarks.report "$1"/benchmark_*.json'
    build = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    compiling = [python, "-m", "benchmarks.compile_ahead", *["decode", "--arch", "90", "--share", "1/40"] * dry_run]
    of_tests = {
        name: Part(name, gpu_tests(out, name, *["--workers", "2"] * dry_run), 0.05 if dry_run else TESTS[name][0])
        for name in TESTS
    }
    of_suites = {
        suite: Part(
            f"benchmark {suite}",
            [
                *bench, *little.get(suite, ["-p", "benchmarks.first_only"]) * dry_run, f"benchmarks/test_{suite}.py",
                f"--benchmark-json={out}/benchmark_{suite}.json",
            ],
            0.04 if dry_run else SUITES.get(suite, 0.02), tiny, missing=untimed,
        )
        for suite in suites()
    }  # fmt: skip
    return [
        Part("build", build, 0.2 if dry_run else 0.15),
        Part("device", [python, "-c", device], 0.02, missing="needs a GPU" if dry_run else ""),
        Part("info", [python, "-m", "fastgpt", "info"], 0.01),
        *(of_tests[name] for name in ("first tests", "parity tests", "cache tests")),
        Part("compile", compiling, 0.05),
        of_suites.pop("generate"),
        of_tests["other tests"],
        Part("sanitizer", [python, "-m", "benchmarks.sanitizer"], 0.04, missing=sanitizer.missing()),
        *of_suites.values(),
        Part("report", ["sh", "-c", condense, python, out], last, stores, missing=untimed),
        Part("numerics", [python, "-m", "benchmarks.numerics", *["--operation", "kv_cache_update"] * dry_run], last, stores),
        Part("CPU tests", gpu_tests(out, "CPU tests", "-m", f"not gpu{' and not slow' * dry_run}", *few), last / 2),
    ]


def gpu_tests(out: Path, name: str, *arguments: str) -> list:
    """The command of a part that consists of tests: those of TESTS, or of other arguments of pytest."""
    command = [sys.executable, "-m", "benchmarks.gpu_tests", out / f"{name.lower().replace(' ', '_')}.done", "-v", "-rfE"]
    command += ["--durations=15", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=100"]
    if name in TESTS:
        _, files, which = TESTS[name]
        command += ["-m", "gpu", *files, *["-k", which] * bool(which)]
    return [*command, *arguments]


def suites() -> list[str]:
    found = [path.stem.removeprefix("test_") for path in (ROOT / "benchmarks").glob("test_*.py")]
    order = list(SUITES)
    return sorted(found, key=lambda suite: (order.index(suite) if suite in order else len(order), suite))


def chosen(parts: list[Part], names: list[str]) -> list[Part]:
    """Those of these names, in their order, with all of the time among them. Raises ValueError."""
    asked = {name.lower().replace("-", " ").removeprefix("benchmark ") for name in names}
    known = {part.name.lower().removeprefix("benchmark "): part for part in parts}
    if unknown := asked - known.keys():
        raise ValueError(f"--only: expected {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return with_all_time([part for name, part in known.items() if name in asked])


def log_of(part: Part, run: int = 1) -> str:
    return f"{part.name.lower().replace(' ', '_')}{f'.{run}' if run > 1 else ''}.log"


def left_over(parts: list[Part], out: Path) -> list[Part]:
    """Those that were not well in the runs before, by what these left in `out` or in its archive, and those that each machine
    needs. Raises ValueError if there is neither."""
    archive = archive_of(out)
    if not out.exists() and archive.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(out.parent, filter="data")
    if not (out / OUTCOMES).exists():
        raise ValueError(f"--part: expected {out} of an earlier run, or {archive}, and there is none")
    outcomes = json.loads((out / OUTCOMES).read_text())
    return with_all_time([part for part in parts if part.name in AGAIN or outcomes.get(part.name) != "ok"])


def with_all_time(parts: list[Part]) -> list[Part]:
    whole = sum(part.share for part in parts)
    return [part._replace(share=part.share / whole) for part in parts]


@contextlib.contextmanager
def signals():
    """Within it, signals that end a program come into the list that it yields, and do nothing else.

    So none comes amidst what must not be left half done, the start of a process say, which nothing would end then. A shell
    that runs this in the background has it ignore interrupts, which parts would inherit: they do not inherit handlers.
    """
    arrived, before = [], {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, lambda number, _: arrived.append(number))
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ends(process: subprocess.Popen, seconds: float, arrived: Sequence[int], seen: int) -> bool:
    """Whether a process ends within so many seconds, and before more signals have arrived than were seen."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() >= end or len(arrived) > seen:
            return False
        time.sleep(POLL)
    return True


def run(part: Part, log: Path, seconds: float, grace: float = GRACE, arrived: Sequence[int] = ()) -> Result:
    """Runs a part for at most so many seconds, the grace included, or until a signal arrives: see `signals`."""
    start, grace = time.monotonic(), min(grace, seconds / 4)
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"} | part.environment
    environment["FASTGPT_BENCH_UNTIL"] = str(time.time() + seconds - grace)  # see benchmarks/timing.py
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                list(map(str, part.command)), cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Result(part.name, "failed", 0.0, log, str(error))
        ended = ends(process, seconds - grace, arrived, seen=0)
        if ended:
            outcome = {0: "ok", SKIPPED: "skipped"}.get(process.returncode, "failed")
        else:
            outcome = "interrupted" if arrived else "timed out"
            os.killpg(process.pid, signal.SIGINT)
            ends(process, grace, arrived, len(arrived))
        with contextlib.suppress(ProcessLookupError):  # also of what it left behind
            os.killpg(process.pid, signal.SIGKILL)
        ends(process, 5, arrived, len(arrived))  # a driver that hangs keeps it for longer
    last = last_line(log)
    if ended and process.returncode < 0:
        last = f"{signal.Signals(-process.returncode).name}: {last}"
    return Result(part.name, outcome, time.monotonic() - start, log, last)


def last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip("= \r")[:100] for line in reversed(lines) if line.strip("= \r")), "")


def run_all(
    parts: list[Part], out: Path, seconds: float, grace: float = GRACE, arrived: Sequence[int] = (), number: int = 1
) -> list[Result]:
    """Runs one part after the other, all within so many seconds, or until a signal arrives: see `signals`. number: which run
    it is that the folder is from."""
    end, results = time.monotonic() + seconds, []
    for i, part in enumerate(parts):
        granted_later = seconds * sum(later.share for later in parts[i + 1 :] if not later.missing)
        left = end - time.monotonic() - granted_later
        why = part.missing or ("interrupted" if arrived else "no time is left" if left < 0.5 else "")
        if why:
            results.append(Result(part.name, "skipped", 0.0, None, why))
        else:
            print(f"{part.name}: at most {left:.0f} s", flush=True)
            results.append(run(part, out / log_of(part, number), left, grace, arrived))
        print(f"{part.name}: {results[-1].outcome}, {results[-1].seconds:.0f} s: {results[-1].last_line}", flush=True)
        finish(out, results)
    return results


def table(results: list[Result]) -> str:
    rows = [["part", "result", "seconds", "log", "last line"]]
    rows += [[name, outcome, f"{seconds:.1f}", log.name if log else "", last] for name, outcome, seconds, log, last in results]
    return aligned(rows, "llrll")


def archive_of(out: Path) -> Path:
    return out.with_name(out.name + ".tar.gz")


def finish(out: Path, results: list[Result]) -> None:
    """What there is so far, in the table and in the one file to take along."""
    (out / "summary.txt").write_text(table(results) + "\n")
    outcomes = json.loads((out / OUTCOMES).read_text()) if (out / OUTCOMES).exists() else {}
    outcomes |= {result.part: result.outcome for result in results}
    (out / OUTCOMES).write_text(json.dumps(outcomes, indent=1) + "\n")
    archive = archive_of(out)
    partial = archive.with_name(archive.name + ".writing")
    with tarfile.open(partial, "w:gz") as tar:
        tar.add(out, out.name)
    partial.replace(archive)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="build/gpu", help="for logs and results; default: %(default)s")
    parser.add_argument("--minutes", type=float, help=f"for all of it; default: {MINUTES}, or 4 for a dry run")
    parser.add_argument("--part", type=int, default=1, help="2, 3, ...: go on where the run before ended; default: anew")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts only")
    parser.add_argument("--dry-run", action="store_true", help="on a machine without a GPU, a little of each part")
    args = parser.parse_args()
    out = args.out.absolute()
    todo = parts(out, args.dry_run)
    try:
        if args.part > 1:
            todo = left_over(todo, out)
        if args.only:
            todo = chosen(todo, args.only)
    except ValueError as error:
        parser.error(str(error))
    out.mkdir(parents=True, exist_ok=True)
    for part in todo:
        log = out / log_of(part)
        of_part = [log, log.with_suffix(".done"), *out.glob(f"{log.stem}.done.*.log")] if args.part == 1 else []
        for stale in (*of_part, log.with_suffix(".json")):
            stale.unlink(missing_ok=True)
    if args.part == 1 and not args.only:
        (out / OUTCOMES).unlink(missing_ok=True)

    with signals() as arrived:
        results = run_all(todo, out, 60 * (args.minutes or (4 if args.dry_run else MINUTES)), arrived=arrived, number=args.part)
        if (out / "results").exists() and not args.dry_run:
            shutil.copytree(out / "results", ROOT / "benchmarks" / "results", dirs_exist_ok=True)
        print(f"\n{table(results)}\n\nlogs and results are in {out} and {out.name}.tar.gz beside it")
    outcomes = {result.outcome for result in results}
    sys.exit(130 if arrived else 0 if outcomes <= {"ok", "skipped"} else 1)


if __name__ == "__main__":
    main()
