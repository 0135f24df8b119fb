"""Compares results with earlier ones: is anything slower?

python -m benchmarks.compare BASE [NEW]

BASE and NEW are files results/<machine>/<suite>.json, or folders of them; NEW is by default the folder of this machine.

Each case shows its speed-up by its own time, and by its ratio to the roofline, which was timed in the same rounds. The latter
decides, since a shared machine that is slower today slows both. For a case without a roofline, the median of its ratios to its
peers decides, and without peers its own time. A case is slower if it takes more than 10% longer by that measure; if the report
called the ratio noisy, or it is only a time, the quartiles must not overlap, either.

Exits with 0; with 1 if a case is slower; with 2 if there is nothing to compare.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.table import aligned

SLOWER = 1.10  # times as long
COLORS = {"slower": "\033[31m", "faster": "\033[32m"}


class Change(NamedTuple):
    """The change of a case from BASE to NEW."""

    time: float  # speed-up: base time / new time
    relative: float  # speed-up by the ratio to `against`
    against: str
    significant: bool  # the difference exceeds the noise

    @property
    def verdict(self) -> str:
        if 1 / SLOWER <= self.relative <= SLOWER:
            return ""
        return "noisy" if not self.significant else "slower" if self.relative < 1 else "faster"


def change(base: dict, new: dict) -> Change:
    both = base.get("times_ours", {}).keys() & new.get("times_ours", {})
    noisy = {*base.get("noisy", ()), *new.get("noisy", ())}
    if "of_limit" in base and "of_limit" in new and base["limit"] == new["limit"]:
        names = {base["limit"]}
    else:
        names = both - noisy or both or {"time"}
    speeds = {name: (speed(base, name), speed(new, name)) for name in sorted(names)}  # quartiles of base and new
    relative = statistics.median(now[1] / then[1] for then, now in speeds.values())
    disjoint = all(now[2] < then[0] or now[0] > then[2] for then, now in speeds.values())
    time = base["microseconds"]["ours"][1] / new["microseconds"]["ours"][1]
    against = min(names) if len(names) == 1 else f"{len(names)} others"
    return Change(time, relative, against, disjoint or not names <= noisy | {"time"})


def speed(case: dict, name: str) -> list[float]:
    """Quartiles of our speed relative to `name`."""
    if name == "time":
        return [1 / x for x in reversed(case["microseconds"]["ours"])]
    if name != case.get("limit"):
        return case["times_ours"][name]
    work = case.get("bytes") or case.get("flops")  # doing less work is not slower
    return [share / work for share in case["of_limit"]]


def cases(result: dict) -> dict[str, dict]:
    """The timed cases by their parameters: strings and numbers that are not amounts of work."""
    found = {}
    for what, listed in result.items():
        for case in listed if isinstance(listed, list) else ():
            if "microseconds" not in case:
                continue
            parameters = [
                value if isinstance(value, str) else f"{name}={value}"
                for name, value in case.items()
                if isinstance(value, str | int | float) and name != "limit" and not name.endswith(("bytes", "flops"))
            ]
            found[", ".join([what, *parameters])] = case
    return found


def facts(machine: dict) -> dict:
    """The facts about the machine of a result, versions of peers included."""
    flat = {}
    for name, value in machine.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def compare(file: str, base: dict, new: dict, colors: bool) -> bool:
    """Prints how the cases of one suite changed. Returns whether any is slower."""
    about = [facts(result["machine"]) for result in (base, new)]
    print(f"{file}: then {about[0].pop('commit', 'unknown')}, now {about[1].pop('commit', 'unknown')}")
    for name in dict.fromkeys([*about[0], *about[1]]):
        then, now = (facts.get(name, "unknown") for facts in about)
        if then != now:
            print(f"changed: {name} was {then}, is {now}")
    then, now = cases(base), cases(new)
    changes = {name: change(then[name], now[name]) for name in then if name in now}
    rows = [["", "then", "now", "by time", "by ratio", "to", ""]]
    for name, (time, relative, against, _) in changes.items():
        shown = [duration(case["microseconds"]["ours"][1]) for case in (then[name], now[name])]
        rows.append([name, *shown, f"{time:.2f}x", f"{relative:.2f}x", against, changes[name].verdict])
    for row, line in zip(rows, aligned(rows, "lrrrrll").splitlines()):
        print(f"{COLORS[row[-1]]}{line}\033[0m" if colors and row[-1] in COLORS else line)
    only("then", then.keys() - now)
    only("now", now.keys() - then)
    print()
    return any(change.verdict == "slower" for change in changes.values())


def duration(microseconds: float) -> str:
    unit, scale = ("µs", 1) if microseconds < 1e3 else ("ms", 1e3) if microseconds < 1e6 else ("s", 1e6)
    return f"{microseconds / scale:.4g} {unit}"


def fail(sentence: str):
    print(f"benchmarks.compare: {sentence}", file=sys.stderr)
    sys.exit(2)


def read(path: Path) -> dict:
    try:
        result = json.loads(path.read_text())
        for case in cases(result).values():
            change(case, case)
            facts(result["machine"])
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        fail(f"{path}: expected what benchmarks.report writes, got {type(error).__name__}: {error}")
    return result


def suites(path: Path) -> dict[str, dict]:
    """File name -> result, of a file or a folder, where there are times in it."""
    results = {file.name: read(file) for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])}
    results = {name: result for name, result in results.items() if cases(result)}
    return results or fail(f"{path}: expected results with times, got none")


def only(when: str, names) -> None:
    for name in sorted(names):
        print(f"only {when}: {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="BASE")
    parser.add_argument("new", type=Path, metavar="NEW", nargs="?")
    args = parser.parse_args()
    base, new = args.base, args.new
    if new is None:
        from benchmarks.report import folder_of, machine

        new = folder_of(machine())
    if new.is_dir() and not base.is_dir():
        new = new / base.name
    then, now = suites(base), suites(new)
    if base.samefile(new):
        fail(f"{base}: is compared with itself; keep a copy of earlier results")
    if not base.is_dir():
        now = dict(zip(then, now.values()))  # under the same name
    if not then.keys() & now:
        fail(f"{new}: expected one of {', '.join(then)}, got {', '.join(now)}")
    colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    slower = [compare(name, then[name], now[name], colors) for name in then if name in now]
    only("then", then.keys() - now)
    only("now", now.keys() - then)
    sys.exit(1 if any(slower) else 0)


if __name__ == "__main__":
    main()
