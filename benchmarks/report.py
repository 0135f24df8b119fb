"""Results, and the parts of README that show them.

python -m benchmarks.report [BENCHMARK.json]
    condenses pytest-benchmark's output, if given, to results/<machine>/<suite>.json and draws its plots there; then
    writes README's marked parts from the files under results/ of the machine that README shows.
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
from benchmarks import plots

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


def store_suites(output: dict) -> None:
    """Condenses pytest-benchmark's output and stores a file for each suite, benchmarks/test_<suite>.py."""
    suites = {}
    for benchmark in output["benchmarks"]:
        suites.setdefault(re.search(r"test_(\w+)\.py", benchmark["fullname"])[1], []).append(benchmark)
    for suite, benchmarks in suites.items():
        store(suite, CONDENSE[suite](benchmarks))


def quartiles(values) -> list[float]:
    return [float(f"{value:.4g}") for value in statistics.quantiles(values, n=4)]


def condense_generate(benchmarks: list[dict]) -> dict:
    """One row for each context: quartiles of milliseconds a step, and of the ratio."""
    rows = []
    for benchmark in benchmarks:
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


def condense_in_turns(benchmarks: list[dict]) -> dict:
    """By what was measured, a row for each case: quartiles of microseconds, and of the others' times over ours."""
    result = {}
    for benchmark in benchmarks:
        info = dict(benchmark["extra_info"])
        seconds, what = info.pop("seconds"), info.pop("what")
        info["microseconds"] = {name: quartiles([1e6 * value for value in values]) for name, values in seconds.items()}
        info["times_ours"] = {
            name: quartiles([other / ours for other, ours in zip(values, seconds["ours"], strict=True)])
            for name, values in seconds.items()
            if name != "ours"
        }
        result.setdefault(what, []).append(info)
    return result


CONDENSE = {
    "generate": condense_generate,
    "kv_cache": condense_in_turns,
    "attention": condense_in_turns,
    "attention_cpu": condense_in_turns,
}


def sections() -> dict[str, str]:
    """Marker -> the text that README shows there."""
    folder = RESULTS / SHOWN
    generate, kv_cache, attention, parity, training = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("generate", "kv_cache", "attention_cpu", "parity", "training")
    )
    return {
        "demo": "```\n" + (folder / "demo.txt").read_text().strip() + "\n```",
        "cached against uncached": cached_against_uncached(generate),
        "cache update": cache_update(kv_cache),
        "attention on the CPU": attention_on_the_cpu(attention),
        "parity": parity_table(parity),
        "8-bit caches": eight_bit_caches(training),
        "shipped model": f"{training['parameters'] / 1e6:.2f} million parameters, validation loss "
        f"**{training['validation_loss']:.4f} nats per character** on the last 10% "
        f"({training['validation_characters']:,} characters)",
    }


INLINE = {"shipped model", "8-bit caches"}  # within a sentence


def caption(result: dict, what: str) -> str:
    about = result["machine"]
    return f"{what}; {about['cpu']}, {about['threads']} threads, {about['cpu_level']}, torch {about['torch']}."


def cached_against_uncached(generate: dict) -> str:
    rows = ["| context (tokens) | cached | uncached | speed-up |", "|---:|---:|---:|---:|"]
    for step in generate["decode_step"]:
        cached, uncached = step["cached_ms"][1], step["uncached_ms"][1]
        rows.append(
            f"| {step['context']} | {cached:.2f} ms, {1000 / cached:,.0f} tok/s "
            f"| {uncached:.2f} ms, {1000 / uncached:,.0f} tok/s | {step['speed_up'][1]:.1f}x |"
        )
    return "\n".join(rows) + "\n\n" + caption(generate, "One decode step of the shipped model, batch 1, fp32, medians")


def cache_update(kv_cache: dict) -> str:
    rows = ["| storing | ours | compared with | ratio |", "|---|---:|---|---:|"]

    def row(what, case, names):
        for name, shown in names.items():
            ratio, ours = case["times_ours"][name][1], case["microseconds"]["ours"][1]
            time = f"{ours:,.1f} µs" if ours < 1000 else f"{ours / 1000:,.1f} ms"
            rows.append(f"| {what} | {time} | {shown} | {ratio:,.{1 if ratio < 100 else 0}f}x |")
            what = ""

    for case in kv_cache["one token"]:
        names = {
            "transformers dynamic": "transformers' DynamicCache, 1,000 tokens in it",
            "transformers static": "transformers' StaticCache",
            "index_copy_": "`index_copy_`, one position for the batch",
            "reference": "the reference, in PyTorch",
        }
        row(f"one token, batch {case['B']}", case, names)
    for case in kv_cache["prompt"]:
        if case["layout"] == "token-major":
            what = f"{case['bytes'] / 1e6:.0f} MB of prompts, {case['kind'].replace('float8_e4m3fn', 'fp8')}"
            row(what, case, {"copy": "copying as many bytes", "reference": "the reference"})
    for case in kv_cache["rope"]:
        tokens = "one token" if case["T"] == 1 else f"{case['T']:,} tokens"
        row(f"with rotary embedding, {tokens}, batch {case['B']}", case, {"rope, then update": "rotating in PyTorch first"})
    what = "One layer of 12 heads of 64, fp32, medians of the times and of the ratios: how many times as long the other takes"
    return "\n".join(rows) + "\n\n" + caption(kv_cache, what)


def attention_on_the_cpu(attention: dict) -> str:
    rows = ["| fp32 unless said | ours | compared with | ratio | of the limit |", "|---|---:|---|---:|---:|"]

    def row(what, case, other, shown):
        kind = "flops" if "flops" in case else "bytes"
        limit = "matrix product" if kind == "flops" else "reading"
        speed = case[kind] / case["microseconds"]["ours"][1] / 1000
        share = case["times_ours"][limit][1] * case[kind] / case[f"limit_{kind}"]
        unit = "GFLOP/s" if kind == "flops" else "GB/s"
        rows.append(f"| {what} | {speed:.1f} {unit} | {shown} | {case['times_ours'][other][1]:.2f}x | {share:.0%} |")

    for case in attention["prefill"]:
        row(f"causal, {case['T']:,} tokens", case, "SDPA", "SDPA")
    for case in attention["prefill of 16 bits"]:
        row(f"causal, {case['T']:,} tokens, {case['dtype']}", case, "SDPA", "SDPA")
    for case in attention["forward and backward"]:
        row(f"causal, forward and backward, {case['T']:,} tokens", case, "SDPA", "SDPA")
    for case in attention["window"]:
        row(f"window of {case['window']:,}, {case['T']:,} tokens", case, "SDPA", "SDPA with a mask")
    for case in attention["decode"]:
        shown = "SDPA" if "share" not in case["heads"] else "SDPA, `enable_gqa`"
        row(f"one token, {case['heads']}, {case['keys']:,} keys", case, "SDPA", shown)
    for case in attention["cache"]:
        row(f"one token, {case['keys']:,} keys, {case['kind'].replace('float8_e4m3fn', 'fp8')}", case, "fp32", "ours, fp32")
    what = (
        "Batch 1, 12 heads of 64; medians. Limits, timed in the same rounds: the rate of a matrix product of 1,536 by "
        "1,536 for prefill, reading 0.5 GB for one token"
    )
    return "\n".join(rows) + "\n\n" + caption(attention, what)


def parity_table(parity: dict) -> str:
    implementations = [name for name in parity if name != "machine"]
    triton = implementations[-1]
    dtypes = list(parity[triton]["plain"])
    header = [f"C++, {dtype}" for dtype in dtypes] + [f"Triton, {dtype}" for dtype in dtypes]
    rows = [f"| feature | {' | '.join(header)} |", "|---|" + "---:|" * len(header)]

    def cell(shares):
        if shares is None:
            return "–"
        forward = max(share for name, share in shares.items() if not name.startswith("d"))
        backward = [share for name, share in shares.items() if name.startswith("d")]
        return f"{forward:.2f}" + (f" / {max(backward):.2f}" if backward else "")

    for feature in parity[triton]:
        cells = [
            cell(parity[name].get(feature, {}).get(dtype)) for name in implementations for dtype in dtypes
        ]
        rows.append(f"| {feature} | {' | '.join(cells)} |")
    how = triton.partition(", ")[2]
    return "\n".join(rows) + (
        "\n\nWorst error of out and lse / of the gradients, as a share of the bound: at most 1 passes. "
        f"The Triton kernels ran {how}; `python tests/parity.py` measures it. Gradients of fewer than 16 numbers are "
        "judged over several draws of dout."
    )


def eight_bit_caches(training: dict) -> str:
    exact = training["validation_loss"]
    changes = [
        f"{100 * (loss / exact - 1):+.3f}% in {name.replace('float8_e4m3fn', 'fp8')}"
        for name, loss in training["validation_loss_by_cache_dtype"].items()
    ]
    return f"the validation loss of the shipped model changes by {' and '.join(changes)}"


def rendered(readme: str) -> str:
    """README with its marked parts brought up to date. Raises ValueError when a marker is missing."""
    for name, text in sections().items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in readme or end not in readme:
            raise ValueError(f"README.md: expected the markers {begin} and {end}")
        before, rest = readme.split(begin)
        inline = "" if name in INLINE else "\n"
        readme = before + begin + inline + text + inline + end + rest.split(end)[1]
    return readme


def main() -> None:
    if len(sys.argv) > 1:
        store_suites(json.loads(Path(sys.argv[1]).read_text()))
        plots.draw(RESULTS)
    README.write_text(rendered(README.read_text()))
    print(f"wrote {README}")


if __name__ == "__main__":
    main()
