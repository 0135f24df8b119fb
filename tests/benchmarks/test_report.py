"""The report condenses what was timed as it says, names what is missing, and does not take noise for knowledge."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as driver
from benchmarks import pages, plots, report

ROOT = Path(__file__).parents[2]
MACHINE = {
    "cpu": "Some(R) CPU", "cpu_level": "avx2", "threads": 2, "python": "3.11", "torch": "2.13",
    "peers": {"transformers": "5.1"}, "fastgpt": "0.1", "commit": "abc1234",
}  # fmt: skip


def prefill(T, ours=(0.001,) * 9, **others):
    """Attention with 1e9 FLOPs, and a matrix product of 4e9 FLOPs in twice the time."""
    seconds = {"ours": ours, "matrix product": [2 * x for x in ours], **others}
    return {
        "what": "prefill", "dtype": "float32", "batch": 1, "heads": 12, "head_dim": 64, "T": T, "seconds": seconds,
        "flops": 1e9, "limit": "matrix product", "limit_flops": 4e9,
    }  # fmt: skip


def step(context, batch=1, cached=1e-3, uncached=0.1):
    """Decoding whose cached token takes 1 ms + 2 µs for each token of context, and an uncached one 0.1 ms of them."""
    seconds = {"ours": [batch * (cached + 2e-6 * context)] * 9, "uncached": [batch * uncached * 1e-3 * context] * 9}
    what = {"what": "cached against uncached", "model": "shipped", "dtype": "float32"}
    return what | {"batch": batch, "context": context, "seconds": seconds}


def output(*infos, suite="attention", left_out=(), **machine):
    """pytest-benchmark's, of one suite."""
    name = f"benchmarks/test_{suite}.py::"
    return {
        "machine": MACHINE | machine, "left_out": {f"{name}{test}": why for test, why in dict(left_out).items()},
        "benchmarks": [{"fullname": f"{name}test[{i}]", "extra_info": info} for i, info in enumerate(infos)],
    }  # fmt: skip


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """Stores an output; returns the results of its only machine, by suite."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def stored(output):
        (folder,) = report.store_suites(output)
        return folder, pages.results_in(folder)

    return stored


def test_known_seconds():
    _, result = report.condense([prefill(128, ours=[0.001, 0.002, 0.004], SDPA=[0.002, 0.006, 0.004])])
    (case,) = result["prefill"]
    assert case["microseconds"]["ours"] == [1500, 2000, 3000]
    assert case["times_ours"] == {"matrix product": [2, 2, 2], "SDPA": [1.5, 2, 2.5]}  # by rounds: 2, 3 and 1
    assert case["of_limit"] == [0.5, 0.5, 0.5]
    assert case["noisy"] == ["SDPA"]
    assert "what" not in case and "seconds" not in case


def test_unpaired_times_are_refused():
    with pytest.raises(ValueError, match="as many"):
        report.condense([prefill(128, SDPA=[0.001] * 8)])


def test_speed_beside_a_busy_core_is_relative_to_one_thread_alone(stored):
    """By rounds, and for each library relative to itself; on the page of a machine in a table of its own."""
    alone = {"ours": [0.01, 0.02, 0.04], "other": [0.03] * 3}
    busy = {"ours": [0.02, 0.02, 0.02], "other": [0.015] * 3}
    cases = [
        {"what": "busy core", "threads": threads, "busy": busy, "seconds": seconds, "alone": alone}
        for threads, busy, seconds in ((1, False, alone), (2, True, busy))
    ]
    info = {"model": "smollm2-135m", "dtype": "bfloat16", "batch": 1, "context": 128, "cases": cases}
    folder, results = stored(output(info, suite="generate"))
    first, second = results["generate"]["busy core"]
    assert first["times_alone"] == {"ours": [1, 1, 1], "other": [1, 1, 1]}
    assert second["times_alone"] == {"ours": [0.75, 1, 1.5], "other": [2, 2, 2]}
    text = pages.page(folder, results)
    assert "| SmolLM2 135M, bfloat16 | 1 thread, all cores idle | 2 threads, one core busy |" in text
    assert "| fastgpt | 50.0 (1.00x) | 50.0 (1.00x) |" in text and "| other | 33.3 (1.00x) | 66.7 (2.00x) |" in text


def test_tables_name_their_limits(stored):
    """Those of earlier results, too, which are others; with the dtypes where there are several."""
    new = prefill(512) | {"limit": "fp32 fma"}
    new["seconds"] = {"ours": [0.001] * 9, "fp32 fma": [0.002] * 9}
    folder, results = stored(output(prefill(128), new))
    assert "Roofline: matrix product; fp32 fma." in pages.attention(results["attention"])
    assert "Roofline: matrix product; fp32 fma." in pages.page(folder, results)
    folder, results = stored(output(prefill(128) | {"dtype": "float16"}, new))
    assert "Roofline: matrix product (float16); fp32 fma (float32)." in pages.page(folder, results)


def test_peers_are_compared_on_the_first_model():
    """Others are on the page of the machine."""
    times = {"microseconds": {"ours": [1, 1, 1]}, "times_ours": {}, "noisy": [], "dtype": "float32", "batch": 1}
    steps = [times | {"model": model, "context": 32} for model in ("gpt2-124m", "smollm2-135m")]
    text = pages.against_peers({"decode": steps, "left_out": {}})
    assert text.splitlines()[0] == "| GPT-2 124M | decode at 32 |"


def test_cases_of_one_benchmark_share_its_parameters():
    cases = [{"what": "memory", "bytes": 1}, {"what": "memory", "bytes": 2}]
    _, result = report.condense([{"model": "shipped", "cases": cases}])
    assert result == {"memory": [{"model": "shipped", "bytes": 1}, {"model": "shipped", "bytes": 2}]}


def test_noise_is_of_the_ratio_and_falls_with_rounds():
    def noisy(ours, other):
        return report.condense_case({"seconds": {"ours": ours, "other": other}})["noisy"]

    rng = np.random.default_rng(0)
    drift = rng.uniform(1, 3, 400)
    assert noisy(drift, 2 * drift) == []  # the machine is slower at times, and both with it
    assert noisy(np.ones(8), rng.permutation([1, 1.5] * 4)) == ["other"]
    scattered = rng.normal(1, 0.3, 400)
    assert noisy(np.ones(12), scattered[:12]) == ["other"]
    assert noisy(np.ones(400), scattered) == []


def test_growth_of_known_lines():
    cases = [step(context, batch) for batch in (1, 4) for context in (32, 128, 512)] + [step(64, 16), step(128, 16)]
    _, result = report.condense(cases)
    one, four = result["growth"]  # two contexts make no line
    assert one == {
        "model": "shipped", "dtype": "float32", "batch": 1, "contexts": [32, 512], "cached": {"start": 1000, "slope": 2},
        "uncached": {"start": pytest.approx(0, abs=1e-6), "slope": 100},
    }  # fmt: skip
    assert (four["batch"], four["cached"]) == (4, one["cached"])  # of a token, not of a step


def test_an_interrupted_run_is_reported_and_keeps_no_earlier_results(stored):
    stored(output(prefill(128), prefill(512)))
    folder, results = stored(output(prefill(128), left_out={"test_prefill[512]": "not finished"}))
    assert [case["T"] for case in results["attention"]["prefill"]] == [128]
    assert results["attention"]["left_out"] == {"test_prefill[512]": "not finished"}
    assert "Incomplete: 1 benchmark" in pages.attention(results["attention"])
    assert "test_prefill[512] (not finished)" in pages.page(folder, results)


def test_unsupported_cases_are_named_and_results_count_as_complete(stored):
    folder, results = stored(output(prefill(128), left_out={"test_graph": "needs a CUDA GPU"}))
    assert "Incomplete" not in pages.attention(results["attention"])
    assert "test_graph (needs a CUDA GPU)" in pages.page(folder, results)


def test_suites_are_stored_separately_and_skipped_ones_are_unchanged(stored):
    stored(output(prefill(128), commit="earlier"))
    both = output(step(32), suite="generate", left_out={"test_decode": "not finished"})
    both["left_out"]["benchmarks/test_attention.py::test_prefill[128]"] = "not finished"
    _, results = stored(both)
    assert results["generate"]["left_out"] == {"test_decode": "not finished"}
    assert results["attention"]["machine"]["commit"] == "earlier"


def test_absent_peers(stored):
    """One that was nowhere timed is named once; one that could not serve some cases, below those."""
    cases = [
        prefill(128, SDPA=[0.002] * 9) | {"absent": {"flex": "not installed"}},
        prefill(512) | {"absent": {"flex": "not installed", "SDPA": "too long"}},
    ]
    folder, results = stored(output(*cases))
    assert results["attention"]["machine"]["absent"] == {"flex": "not installed"}
    text = pages.page(folder, results)
    assert "Absent: flex (not installed)." in text and "–: SDPA (too long)." in text
    assert "| causal, 512 tokens | 1.00 ms | 1.00 TFLOP/s | 50% | – | – |" in pages.attention(results["attention"])


def test_noisy_figures_are_marked_and_explained(stored):
    scattered = [0.001, 0.002] * 5
    folder, results = stored(output(prefill(128, ours=[0.001] * 10, SDPA=scattered)))
    for text in (pages.attention(results["attention"]), pages.page(folder, results)):
        assert "≈1.50x" in text and pages.NOISY in text and "≈50%" not in text
    _, results = stored(output(prefill(128, SDPA=[0.002] * 9)))
    assert "≈" not in pages.attention(results["attention"])


def test_versions_of_peers_that_ran_are_shown(stored):
    _, results = stored(output(prefill(128) | {"peers": {"ctranslate2": "4.8"}}))
    assert results["attention"]["machine"]["peers"] == {"transformers": "5.1", "ctranslate2": "4.8"}
    assert "transformers 5.1, ctranslate2 4.8" in pages.about(results["attention"])


def test_results_of_a_machine_have_a_folder_of_its_name():
    assert report.folder_of(MACHINE | {"gpu": "NVIDIA H200"}).name == "h200"
    assert report.folder_of(MACHINE).name == "some-cpu-avx2-2-threads"
    assert report.folder_of(MACHINE | {"cpu_level": "avx512"}).name == "some-cpu-avx512-2-threads"


def test_readme_says_which_results_it_misses(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "STORED", tmp_path)
    with pytest.raises(FileNotFoundError, match="attention, attention over caches"):
        report.sections(report.ROOT / "README.md")


GPU = {"gpu": "NVIDIA H200", "cuda": "13.0"}
SIZES = {"gpt2-124m": 0.25e9, "gpt2-xl": 3.1e9, "llama-1b": 2.5e9, "llama-8b": 15e9}  # bytes that a step reads


def decoding(model, batch, T, targets, share=0.5, **others):
    """Whole steps that take their share of 4 TB/s, and others so many times as long."""
    size = SIZES[model] + (batch > 1) * 3e10 * batch / 64
    took = [size / 4e12 / share] * 9
    seconds = {"reading": [0.25e-3] * 9, "ours": took, **{name: [times * x for x in took] for name, times in others.items()}}
    return {
        "what": "decoding", "model": model, "device": "cuda", "dtype": "bfloat16", "batch": batch, "context": T,
        "implementation": "triton", "bytes": round(size), "limit": "reading", "limit_bytes": 10**9, "targets": targets,
        "absent": {"transformers, flash_attention_2": "ImportError: not installed"}, "seconds": seconds,
    }  # fmt: skip


def attention_over(keys, kind="bfloat16", **others):
    took = [1e-5 + keys * 4e-10] * 9
    seconds = {"reading": [0.25e-3] * 9, "ours": took, **{name: [times * x for x in took] for name, times in others.items()}}
    return {
        "what": "decode", "kind": kind, "keys": keys, "batch": 1, "heads": 12, "kv_heads": 12, "head_dim": 64, "device": "cuda",
        "dtype": "bfloat16", "implementation": "triton", "bytes": 2 * 2 * 12 * 64 * keys, "limit": "reading",
        "limit_bytes": 10**9, "absent": {}, "seconds": seconds,
    }  # fmt: skip


@pytest.fixture
def of_a_gpu(stored):
    """The folder of results of a GPU that nobody ever had."""
    dynamic, compiled = "transformers, dynamic cache", "transformers, static cache, compiled"
    aims = {"tokens_per_second": 5000, "on": "H200", "times": {dynamic: 10, compiled: 2}}
    larger = {"times": {dynamic: 3}}
    cases = [
        decoding("gpt2-124m", 1, 128, aims, 0.4, **{"ours, sampled": 1.1, dynamic: 40, compiled: 3}),
        decoding("llama-8b", 1, 128, {"of_limit": 0.85}, 0.8, **{"ours, sampled": 1.02, dynamic: 4}),
        decoding("gpt2-xl", 1, 128, {"of_limit": 0.65}, 0.6, **{"ours, sampled": 1.05, dynamic: 12}),
        decoding("llama-1b", 1, 128, {"of_limit": 0.75}, 0.7, **{"ours, sampled": 1.05, dynamic: 6}),
        decoding("llama-1b", 64, 4096, larger, 0.5, **{"ours, sampled": 1.1, dynamic: 3.2}),
        decoding("llama-8b", 64, 4096, larger, 0.5, **{"ours, sampled": 1.1, dynamic: 2.5}),
    ]
    uncached = [
        step(T, cached=1e-3, uncached=0.02) | {"model": "gpt2-124m, 16k positions"} for T in (128, 1024, 4096, 8192, 16384)
    ]
    folder, _ = stored(output(*cases, *uncached, suite="generate", **GPU))
    names = ["SDPA, flash", "SDPA, cudnn", "SDPA, efficient", "SDPA, math", "FlexAttention"]
    rates = [
        prefill(T, **{name: [(1.5 + i) * 1e-3] * 9 for i, name in enumerate(names)}) | {"flops": 4e11, "limit_flops": 16e11}
        for T in (1024, 2048, 4096, 8192, 16384)
    ]
    stored(output(*rates, **GPU))
    over = [attention_over(keys, **{"SDPA, flash": 4, "FlexAttention": 2}) for keys in (1024, 8192, 65536)]
    stored(output(*over, attention_over(8192, "int8"), suite="decode", **GPU))
    return folder


def test_targets_follow_measurements(of_a_gpu):
    text = pages.decoding(pages.results_in(of_a_gpu)["generate"])
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    others = "fastgpt, sampled | transformers, dynamic cache | transformers, static cache, compiled"
    assert header == f"| decoding | tokens/s | % of roofline | {others} |"
    cells = "**6,402** (5,000 on an H200) | 40% | 1.10x | 40.0x (10x) | 3.00x (2x)"
    assert rows[0] == f"| GPT-2 124M, batch 1, 128 tokens | {cells} |"
    assert rows[1] == "| Llama 8B, batch 1, 128 tokens | **213** | 80% (85%) | 1.02x | 4.00x | – |"
    assert "–: transformers, flash_attention_2 (ImportError: not installed)." in text


def test_readme_shows_each_gpu_or_that_there_is_none(of_a_gpu, monkeypatch, tmp_path):
    """With its plots, of all that was timed there: attention, caches, decoding, cached against uncached and their growth."""
    shutil.copytree(report.STORED / report.SHOWN, tmp_path / report.SHOWN)
    monkeypatch.setattr(report, "STORED", tmp_path)
    pytest.importorskip("matplotlib")
    plots.draw(of_a_gpu)
    assert plots.stale(of_a_gpu) == []
    shown = ("decoding", "cached_against_uncached", "attention", "attention_over_caches")
    document = report.ROOT / "docs" / "performance.md"
    assert report.sections(document)["GPU status"] == "Timed on NVIDIA H200."
    text = report.sections(document)["on a GPU"]
    assert text.startswith("### NVIDIA H200\n")
    assert [text.index(f"{name}.svg") for name in shown] == sorted(text.index(f"{name}.svg") for name in shown)
    assert "| 16,384 |" in text and "adds 2.00 µs cached and 20.0 µs uncached to GPT-2 124M, 16k positions." in text
    assert "| causal, 8,192 tokens |" in text and "SDPA, flash | 1.50x |" in text
    shutil.rmtree(of_a_gpu)
    assert report.sections(document)["on a GPU"] == report.NO_GPU and "\n" not in report.NO_GPU


@pytest.mark.parametrize(
    "text", ["<!-- attention -->", "<!-- a name that nothing has --><!-- end of a name that nothing has -->"]
)
def test_markers_without_an_end_or_a_meaning_are_refused(text, tmp_path):
    document = tmp_path / "page.md"
    document.write_text(text)
    with pytest.raises(ValueError, match="expected"):
        report.rendered(document)


@pytest.fixture
def drawn(stored):
    pytest.importorskip("matplotlib")
    folder, _ = stored(output(prefill(128, SDPA=[0.002] * 9), prefill(512)))
    plots.draw(folder)
    return folder


def test_equal_results_give_equal_plots(drawn):
    images = {path: path.read_bytes() for path in drawn.glob("attention.*g")}
    assert len(images) == 2
    plots.draw(drawn)
    assert images == {path: path.read_bytes() for path in images}


def test_stale_plots_are_found(drawn, stored):
    assert plots.stale(drawn) == []
    stored(output(prefill(128, SDPA=[0.003] * 9), prefill(512)))
    assert plots.stale(drawn) == ["attention.svg", "attention.png"]
    stored(output({**prefill(128), "what": "window"}))  # which none shows
    assert plots.stale(drawn) == ["attention.svg", "attention.png"]
    plots.draw(drawn)
    assert plots.stale(drawn) == [] and not list(drawn.glob("attention.*g"))


SUITE = """
import pathlib, time
def test_quick(benchmark):
    benchmark.pedantic(lambda: None, rounds=1)
def test_wrong(benchmark):
    assert False, "differs from the reference"
def test_long(benchmark):
    pathlib.Path(__file__).with_name("reached").touch()
    benchmark.pedantic(lambda: time.sleep(600), rounds=1)
def test_after(benchmark):
    benchmark.pedantic(lambda: None, rounds=1)
"""


@pytest.mark.slow
def test_ctrl_c_keeps_finished_results(monkeypatch, tmp_path):
    monkeypatch.setattr(driver, "HERE", tmp_path / "suites")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    driver.HERE.mkdir()
    (driver.HERE / "test_tiny.py").write_text(SUITE)
    shutil.copy(ROOT / "benchmarks" / "conftest.py", driver.HERE)

    def interrupt():
        while not (driver.HERE / "reached").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    path = tmp_path / "tiny.json"
    assert driver.run("tiny", path, seconds=600) == "interrupted"
    result = json.loads(path.read_text())
    assert [benchmark["name"] for benchmark in result["benchmarks"]] == ["test_quick"]
    assert {name.partition("::")[2]: why for name, why in result["left_out"].items()} == {
        "test_wrong": "failed: AssertionError: differs from the reference", "test_long": "not finished",
        "test_after": "not finished",
    }  # fmt: skip
    assert result["machine"]["cpu"] == report.machine()["cpu"]


def test_speculation_is_shown_of_every_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "STORED", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    case = {"model": "small", "text": "copying", "plain": 50.0, "speculative": 152.0, "tokens_per_pass": 4.0}
    for level in ("avx2", "avx512"):
        report.store("speculation", {"speculation": [case]}, MACHINE | {"cpu_level": level})
    shown = report.speculation_of_all()
    assert shown.count("| small | copying | 50.0 | 152.0 | 3.04 | 4.00 |") == 2
    assert "2 threads, avx2" in shown and "2 threads, avx512" in shown
