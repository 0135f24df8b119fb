"""Condenses the results of the suites, stores them by machine, and updates plots, tables and documentation.

python -m benchmarks.report [BENCHMARK.json ...]
    condenses pytest-benchmark's output, if given, to results/<machine>/<suite>.json; draws the plots and writes the page of
    that machine, or without arguments of all machines; and updates the parts of README and docs/ between markers. If the
    environment variable FASTGPT_RESULTS is set, results are in that folder, and README and docs/ are not changed.

The file of a suite holds one run: it replaces an earlier one, and names what the run left out.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import fastgpt
from benchmarks import families_table, numerics_table, pages, perplexity_table, plots, speculation_table
from fastgpt.bench.timing import uncertainty

STORED = Path(__file__).parent / "results"
RESULTS = Path(os.environ.get("FASTGPT_RESULTS") or STORED)
ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]  # with parts between markers
SHOWN = "amd-epyc-avx512-2-threads"  # the machine whose results they show
PEERS = ("transformers", "ctranslate2", "llama-cpp-python", "openvino", "zentorch", "triton", "flash-attn", "flashinfer-python")


def machine() -> dict:
    """The hardware and software that results are measured with."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():  # without a model name on Arm
        name = next(iter(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())), name)
    git = ["git", "-C", str(STORED.parent), "describe", "--always", "--dirty"]
    return {
        **({"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}),
        "cpu": name,
        "cpu_level": fastgpt.build_info()["cpu_level"],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": {name: version for name in PEERS if (version := version_of(name))},
        "fastgpt": fastgpt.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def folder_of(about: dict) -> Path:
    """results/<GPU>, or where there is none results/<CPU>-<level>-<n>-threads: CPUs of several generations have one name."""
    name = about.get("gpu", "").removeprefix("NVIDIA ") or "{cpu} {cpu_level} {threads} threads".format_map(about)
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def store(name: str, result: dict, about: dict | None = None) -> Path:
    """Writes results/<machine>/<name>.json; `about` describes the machine, if it is not this one."""
    about = about or machine()
    path = folder_of(about) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": about, **result}, indent=2) + "\n")
    print(f"wrote {path}")
    return path


def store_suites(output: dict) -> set[Path]:
    """Condenses pytest-benchmark's output and stores a file for each suite, test_<suite>.py. Returns their folders."""
    infos, left_out, folders = {}, {}, set()
    for benchmark in output["benchmarks"]:
        infos.setdefault(suite_of(benchmark["fullname"]), []).append(benchmark["extra_info"])
    for nodeid, reason in output["left_out"].items():
        left_out.setdefault(suite_of(nodeid), {})[nodeid.partition("::")[2]] = reason
    for suite, of_suite in infos.items():
        named, result = condense(of_suite)
        absent, about = named["absent"], output["machine"]
        about = about | {"peers": about["peers"] | named["peers"], "absent": absent}
        folders.add(store(suite, {"left_out": left_out.get(suite, {}), **result}, about).parent)
        noisy = [case["noisy"] for cases in result.values() for case in cases if case.get("noisy")]
        if noisy:
            print(f"{suite}: {sum(map(len, noisy))} ratios of {len(noisy)} cases are too noisy to be known to 10%: marked ≈")
        if absent:
            print(f"{suite}: absent: {pages.listed(absent.items())}")
    for suite, reasons in left_out.items():
        print(f"{suite}: left out: {pages.listed(reasons.items())}")
    return folders


def suite_of(nodeid: str) -> str:
    return re.search(r"test_(\w+)\.py", nodeid)[1]


def condense(infos: list[dict]) -> tuple[dict, dict]:
    """extra_info of benchmarks -> versions of peers and which were absent everywhere; and the cases by name."""
    result, versions, absent, timed = {}, {}, {}, set()
    for info in infos:
        info = dict(info)
        versions |= info.pop("peers", {})
        for case in info.pop("cases", [{}]):
            case = info | case
            absent |= case.get("absent", {})
            timed |= case.get("seconds", {}).keys()
            result.setdefault(case.pop("what"), []).append(condense_case(case) if "seconds" in case else case)
    if "cached against uncached" in result:
        result["growth"] = growth(result["cached against uncached"])
    return {"peers": versions, "absent": {name: why for name, why in absent.items() if name not in timed}}, result


def condense_case(case: dict) -> dict:
    """Turns the seconds of each round into quartiles: of microseconds, of ratios to ours, of the share of the roofline; and where
    there are those of one thread alone, of each name's speed relative to its own then."""
    seconds, alone = case.pop("seconds"), case.pop("alone", {})
    if {len(values) for values in (*seconds.values(), *alone.values())} != {len(seconds["ours"])}:
        raise ValueError(f"seconds of {case}: expected as many of each, got {[len(values) for values in seconds.values()]}")
    seconds = {name: np.array(values) for name, values in seconds.items()}
    ratios = {name: values / seconds["ours"] for name, values in seconds.items() if name != "ours"}
    case["microseconds"] = {name: quartiles(1e6 * values) for name, values in seconds.items()}
    case["times_ours"] = {name: quartiles(values) for name, values in ratios.items()}
    if alone:
        case["times_alone"] = {name: quartiles(np.array(alone[name]) / values) for name, values in seconds.items()}
    if "limit" in case:
        work = "flops" if "limit_flops" in case else "bytes"
        case["of_limit"] = quartiles(ratios[case["limit"]] * (case[work] / case[f"limit_{work}"]))
    case["noisy"] = [name for name, values in ratios.items() if uncertainty(values) > 0.1]
    return case


def quartiles(values) -> list[float]:
    return [float(f"{value:.4g}") for value in np.percentile(values, (25, 50, 75))]


def growth(cases: list[dict]) -> list[dict]:
    """Least-squares fits of the microseconds per token over context, for each model, dtype and batch."""
    series = {}
    for case in cases:
        series.setdefault((case["model"], case["dtype"], case["batch"]), []).append(case)
    lines = []
    for (model, dtype, batch), points in series.items():
        contexts = [case["context"] for case in points]
        if len(set(contexts)) < 3:
            continue
        line = {"model": model, "dtype": dtype, "batch": batch, "contexts": [min(contexts), max(contexts)]}
        for name, key in (("cached", "ours"), ("uncached", "uncached")):
            slope, start = np.polyfit(contexts, [case["microseconds"][key][1] / batch for case in points], 1)
            line[name] = {"start": float(f"{start:.4g}"), "slope": float(f"{slope:.4g}")}
        lines.append(line)
    return lines


def update(outputs: list[Path]) -> None:
    """Stores pytest-benchmark's outputs and updates the pages of their machines, or without outputs of all machines."""
    folders = set().union(*(store_suites(json.loads(path.read_text())) for path in outputs))
    for folder in sorted(folders) if outputs else machines():
        try:
            plots.draw(folder)
        except ImportError as error:
            print(f"no plots: {error}")
        write(folder / "README.md", pages.page(folder, pages.results_in(folder)))
    if RESULTS == STORED:
        for path in DOCUMENTS:
            try:
                text = rendered(path)
            except FileNotFoundError as error:  # a run that was cut short
                print(f"{path} stays as it is: {error}")
                continue
            if text != path.read_text():
                write(path, text)


def write(path: Path, text: str) -> None:
    path.write_text(text)
    print(f"wrote {path}")


def machines() -> list[Path]:
    return sorted(path for path in RESULTS.iterdir() if pages.SUITES.keys() & {file.stem for file in path.glob("*.json")})


def sections(document: Path) -> dict[str, str]:
    """Marker -> the text between its markers. Links are relative to the document."""
    folder = STORED / SHOWN
    results = pages.results_in(folder)
    parts = pages.parts(folder, results, within(folder, document))
    expected = {*pages.PARTS, "architectures", "models of transformers", "training", "perplexity"}
    if missing := expected - parts.keys() - results.keys():
        raise FileNotFoundError(f"{folder}: README and docs show {', '.join(sorted(missing))}, of which there are no results")
    training = results["training"]
    gpus, names = [], []
    for path in machines():
        others = pages.results_in(path)
        if "gpu" in (about := next(iter(others.values()))["machine"]):
            gpus.append(on_a_gpu(path, others, document))
            names.append(about["gpu"])
    page = f"{within(folder, document)}README.md"
    return {
        "demo": "```\n" + (folder / "demo.txt").read_text().strip() + "\n```",
        "kinds of cache": pages.plot(folder, "kinds_of_cache", within(folder, document)),
        "plot against peers": pages.plot(folder, "against_peers", within(folder, document)),
        "machine": f"Measured on {pages.about(results['generate'])}.",
        "every case": f"[Every case on this machine]({page}).",
        **parts,
        "against peers, table": pages.against_peers(results["generate"]),
        "GPU status": f"Timed on {', '.join(names)}." if names else NO_GPU,
        "on a GPU": "\n\n".join(gpus) or NO_GPU,
        "numerics": numerics_table.markdown(numerics_of_all()),
        "architectures": f"{pages.architectures(results['architectures'])} "
        f"[Each of them]({page}#architectures-of-transformers).",
        "families": families_of_all(),
        "perplexity": perplexity_table.markdown(results["perplexity"]["perplexity"]),
        "speculation": speculation_of_all(),
        "8-bit caches": eight_bit_caches(training),
        "shipped model": f"{training['parameters'] / 1e6:.2f} million parameters, validation loss "
        f"**{training['validation_loss']:.4f} nats per character** on the last 10% "
        f"({training['validation_characters']:,} characters)",
    }


INLINE = {"machine", "every case", "GPU status", "shipped model", "8-bit caches"}  # inside a sentence
NO_GPU = (
    "**No GPU has run any of this yet.** The GPU kernels are compiled and checked for sm_80, sm_90 and sm_100 by the tests, "
    "which also run the Triton kernels in Triton's interpreter and the CUDA kernels as C++."
)
MARKER = re.compile(r"<!-- (?!end of |not run: )(.*?) -->")


def within(folder: Path, document: Path) -> str:
    return f"{os.path.relpath(folder, document.parent)}/"


def on_a_gpu(folder: Path, results: dict[str, dict], document: Path) -> str:
    about = next(results[suite] for suite in pages.SUITES if suite in results)
    lines = [f"### {about['machine']['gpu']}", f"{pages.about(about)}. [Every case]({within(folder, document)}README.md)."]
    return "\n\n".join([*lines, *pages.parts(folder, results, within(folder, document), pages.GPU_PARTS).values()])


def numerics_of_all() -> dict[str, list[dict]]:
    """The cases of benchmarks.numerics, by operation: bounds are the same on every machine, CPU levels differ."""
    found: dict[str, list[dict]] = {}
    for folder in machines():
        for operation, cases in pages.results_in(folder).get("numerics", {}).items():
            if isinstance(cases, list):
                found.setdefault(operation, []).extend(cases)
    return found


def families_of_all() -> str:
    """The table of the machine that has compared most checkpoints: tokens are the same on all."""
    found = [json.loads(path.read_text())["families"] for path in sorted(STORED.glob("*/families.json"))]
    return families_table.markdown(max(found, key=len, default=[]))


def speculation_of_all() -> str:
    """What `speculation_table` shows of each machine that has results."""
    found = [json.loads(path.read_text()) for path in sorted(STORED.glob("*/speculation.json"))]
    return "\n\n".join(f"{speculation_table.markdown(each['speculation'])}\n\n{pages.about(each)}." for each in found)


def eight_bit_caches(training: dict) -> str:
    exact = training["validation_loss"]
    changes = [
        f"{100 * (loss / exact - 1):+.3f}% in {name.replace('float8_e4m3fn', 'fp8')}"
        for name, loss in training["validation_loss_by_cache_dtype"].items()
    ]
    return f"the validation loss of the shipped model changes by {' and '.join(changes)}"


def rendered(document: Path) -> str:
    """A document with its generated parts updated. Raises ValueError for an unknown marker, or one without an end."""
    text = document.read_text()
    if not MARKER.search(text):
        return text
    known = sections(document)
    for name in MARKER.findall(text):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if name not in known or end not in text:
            raise ValueError(f"{document}: expected {end} after {begin}, and a name of {', '.join(known)}")
        before, rest = text.split(begin)
        inline = "" if name in INLINE else "\n"
        text = before + begin + inline + known[name] + inline + end + rest.split(end)[1]
    return text


def main() -> None:
    update([Path(argument) for argument in sys.argv[1:]])


if __name__ == "__main__":
    main()
