"""Results, and the parts of README that show them.

python -m benchmarks.report [BENCHMARK.json]
    condenses pytest-benchmark's output, if given, to results/<machine>/generate.json, and writes README's marked parts
    from the files under results/ of the machine that README shows.
"""

import json
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import fastgpt

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
SHOWN = "intel-xeon-processor-2-threads"  # the machine whose results README shows


def machine() -> dict:
    """What a result depends on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    return {
        "cpu": name,
        "cpu_level": fastgpt.build_info()["cpu_level"],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastgpt": fastgpt.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def store(name: str, result: dict) -> None:
    """Writes results/<machine>/<name>.json."""
    about = machine()
    cpu = re.sub(r"[^a-z0-9]+", "-", about["cpu"].lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    path = RESULTS / f"{cpu}-{about['threads']}-threads" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": about, **result}, indent=2) + "\n")
    print(f"wrote {path}")


def condense(output: dict) -> dict:
    """pytest-benchmark's output to one row for each context: quartiles of milliseconds a step, and of the ratio."""

    def quartiles(values):
        return [round(value, 4) for value in statistics.quantiles(values, n=4)]

    rows = []
    for benchmark in output["benchmarks"]:
        uncached, cached = benchmark["stats"]["data"], benchmark["extra_info"]["cached_seconds"]
        rows.append(
            {
                "context": benchmark["extra_info"]["context"],
                "cached_ms": quartiles([1000 * seconds for seconds in cached]),
                "uncached_ms": quartiles([1000 * seconds for seconds in uncached]),
                "speed_up": quartiles([u / c for u, c in zip(uncached, cached, strict=True)]),
            }
        )
    return {"decode_step": rows}


def sections() -> dict[str, str]:
    """Marker -> the text that README shows there."""
    folder = RESULTS / SHOWN
    generate, training = (json.loads((folder / f"{name}.json").read_text()) for name in ("generate", "training"))
    rows = ["| context (tokens) | cached | uncached | speed-up |", "|---:|---:|---:|---:|"]
    for step in generate["decode_step"]:
        cached, uncached = step["cached_ms"][1], step["uncached_ms"][1]
        rows.append(
            f"| {step['context']} | {cached:.2f} ms, {1000 / cached:,.0f} tok/s "
            f"| {uncached:.2f} ms, {1000 / uncached:,.0f} tok/s | {step['speed_up'][1]:.1f}x |"
        )
    about = generate["machine"]
    caption = (
        f"One decode step of the shipped model, batch 1, fp32, medians; {about['cpu']}, {about['threads']} threads, "
        f"{about['cpu_level']}, torch {about['torch']}."
    )
    return {
        "demo": "```\n" + (folder / "demo.txt").read_text().strip() + "\n```",
        "cached against uncached": "\n".join(rows) + "\n\n" + caption,
        "shipped model": f"{training['parameters'] / 1e6:.2f} million parameters, validation loss "
        f"**{training['validation_loss']:.4f} nats per character** on the last 10% "
        f"({training['validation_characters']:,} characters)",
    }


def rendered(readme: str) -> str:
    """README with its marked parts brought up to date. Raises ValueError when a marker is missing."""
    for name, text in sections().items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in readme or end not in readme:
            raise ValueError(f"README.md: expected the markers {begin} and {end}")
        before, rest = readme.split(begin)
        inline = "" if name == "shipped model" else "\n"
        readme = before + begin + inline + text + inline + end + rest.split(end)[1]
    return readme


def main() -> None:
    if len(sys.argv) > 1:
        store("generate", condense(json.loads(Path(sys.argv[1]).read_text())))
    README.write_text(rendered(README.read_text()))
    print(f"wrote {README}")


if __name__ == "__main__":
    main()
