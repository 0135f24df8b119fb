"""Generation end to end, compared with other libraries, and with and without a KV cache.

The models are GPT-2 124M, one of the shape of SmolLM2-135M and a Llama of 160M with random weights, and the shipped one; on a GPU
also larger ones.
"""

import contextlib
import functools
import gc
import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastgpt
from benchmarks import decoding, peers
from benchmarks.busy import busy_core
from benchmarks.timing import (
    DEVICE,
    arithmetic,
    at_most,
    full,
    measured_time,
    name_of,
    reading,
    record,
    time_interleaved,
    time_left,
    tiny,
)
from fastgpt import GPT, SHIPPED_MODEL, generate
from fastgpt.bench.timing import clock, implementation
from fastgpt.cli.example_calls import example_calls

ROOT = Path(__file__).parents[1]
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.bfloat16, torch.float32][: 2 if full() else 1]
SECONDS = (30 if full() else 10) if DEVICE == "cpu" else (15 if full() else 3)  # of rounds of generation, about
LEAST_ROUNDS = 5
LONGEST_CALL = 30 if DEVICE == "cpu" else 120  # seconds; peers that take longer are left out
TAKE_BATCHES = ("ours", "transformers, dynamic cache", "CTranslate2")  # how their names begin


LONG = "gpt2-124m, 16k positions"
SHAPES = {"gpt2-124m": peers.gpt2, "smollm2-135m": peers.smollm2, "llama-160m": peers.llama}


@functools.lru_cache(maxsize=1)
def model_of(name: str, dtype: torch.dtype) -> GPT:
    if name == LONG:
        return decoding.made(decoding.shape("gpt2-124m"), dtype) if tiny() else peers.gpt2(DEVICE, dtype, context_length=16384)
    if name in SHAPES:
        return SHAPES[name](DEVICE, dtype)
    return GPT.from_pretrained(SHIPPED_MODEL, dtype=dtype, device=DEVICE)


def prompts(model: GPT, batch: int, T: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, T), generator=torch.Generator().manual_seed(T)).to(DEVICE)


def about(name: str, dtype: torch.dtype, batch: int) -> dict:
    chosen = implementation(fastgpt.explain(fastgpt.attention, *example_calls(torch.device(DEVICE))[fastgpt.attention]))
    return {"model": name, "device": DEVICE, "dtype": name_of(dtype), "batch": batch, "implementation": chosen}


@pytest.mark.skipif(DEVICE == "cpu" and not tiny(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name, batch, T", decoding.CASES, ids=[f"{name}-batch{B}-{T}tokens" for name, B, T in decoding.CASES])
@pytest.mark.benchmark(timer=measured_time)
def test_decoding(benchmark, name, batch, T):
    """Decode steps of popular models, sampling included, compared with the memory roofline and with transformers."""
    aims, dtype = decoding.CASES[name, batch, T], torch.bfloat16 if DEVICE == "cuda" else torch.float32
    batch, T = (min(batch, 4), 16) if tiny() else (batch, T)
    model = decoding.made(decoding.shape(name), dtype)
    prompt, read = prompts(model, 1, T), reading()

    def check(tokens):
        assert all(len(set(step)) == 1 for step in tokens), f"sequences with the same prompt differ: {tokens}"
        regret = peers.regret(model, prompt, [step[:1] for step in tokens])
        assert regret <= 2 * peers.rounding(model), f"tokens {regret:.2g} standard deviations below the best: {tokens}"

    seconds_of_a_step, tokens = decoding.ours(model, prompt, batch)
    check(tokens)
    seconds = {read.name: [], "ours": []}
    for _ in range(decoding.ROUNDS):
        seconds[read.name].append(clock(read.run, [{}] * 3, DEVICE))
        seconds["ours"].append(seconds_of_a_step())
    del seconds_of_a_step  # and with it the cache, which may be half of the memory
    release()
    sampled, _ = decoding.ours(model, prompt, batch, temperature=1.0, seed=0)
    seconds["ours, sampled"] = [sampled() for _ in range(decoding.ROUNDS)]
    del sampled
    release()

    absent, theirs = {}, None
    wanted = {decoding.DYNAMIC: {}, decoding.FLASH: {"implementation": "flash_attention_2"}}
    if batch == 1:
        wanted[decoding.COMPILED] = {"cache_implementation": "static"}
    for peer, options in wanted.items():
        if peer == decoding.COMPILED and peer not in aims.get("times", {}) and not full():
            absent[peer] = "it compiles for a minute: in the full set"
        elif time_left() < 10:
            absent[peer] = "no time was left"
        else:
            try:
                theirs = peers.in_transformers(model) if theirs is None else theirs
                with at_most(min(600 if full() else 60, time_left() - 5)):
                    of_rounds, tokens = decoding.theirs(theirs, prompt, batch, **options)
                check(tokens)
                seconds[peer] = of_rounds
            except Exception as reason:  # whatever it is, ours was timed
                absent[peer] = f"{type(reason).__name__}: {reason}".splitlines()[0]
            release()
    keys = T + decoding.FIRST + decoding.STEPS * decoding.ROUNDS // 2  # in the median step
    info = {
        "what": "decoding", **about(name, dtype, batch), "context": T, "absent": absent, "targets": aims,
        "bytes": peers.step_bytes(model.config, keys, peers.ours(model), batch),
    }  # fmt: skip
    rounds = [dict(zip(seconds, of_round)) for of_round in zip(*seconds.values(), strict=True)]
    record(benchmark, rounds, limit=read, info=info)


def release() -> None:
    """Gives back the memory of what nobody refers to any more, and of what torch.compile made."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # which takes seconds to load
        torch.compiler.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def steps():
    """(model, batch, tokens of context, the new one included)."""
    contexts = [32, 64, 128, 256, 512, 900, 1000] if full() else [32, 128, 512, 900]
    of_model = {"gpt2-124m": contexts, "shipped": [T for T in contexts if T <= 512]} if DEVICE == "cpu" or full() else {}
    if DEVICE == "cuda" or tiny():
        longer = [16, 32, 64, 128] if tiny() else [128, 1024, 4096, 8192, 16384]
        of_model = {LONG: longer} | ({} if tiny() else of_model)
    chosen = [(name, B, T) for name in of_model for B in ((1, 4, 16) if full() else (1,)) for T in of_model[name]]
    return pytest.mark.parametrize("name, batch, T", chosen, ids=[f"{name}-batch{B}-{T}tokens" for name, B, T in chosen])


@steps()
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.benchmark(timer=measured_time)
@torch.inference_mode()
def test_cached_against_uncached(benchmark, dtype, name, batch, T):
    """The next token after T tokens, with T - 1 of them in the cache, and without a cache."""
    model = model_of(name, dtype)
    ids = prompts(model, batch, T)
    cache = model.new_cache(batch)
    model.hidden(ids[:, :-1], cache)
    step = fastgpt.decoding(model, cache)

    def cached():
        cache.counts, _ = [T - 1] * batch, cache.lengths.fill_(T - 1)  # forget the last token, without waiting for a GPU
        return step(ids[:, -1]).argmax(-1)

    def uncached():
        return model.logits(model.hidden(ids, last_only=True)[:, -1]).argmax(-1)

    assert peers.regret(model, ids, [cached().tolist()]) <= 2 * peers.rounding(model)
    info = {"what": "cached against uncached", **about(name, dtype, batch), "context": T}
    time_interleaved(benchmark, cached, {"uncached": uncached}, info=info)


@pytest.mark.skipif(not full(), reason="takes minutes: FULL=1")
@pytest.mark.parametrize("T", [32, 512, 900], ids="{}tokens".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.benchmark(timer=measured_time)
def test_whole_calls(benchmark, name, dtype, T, new=64):
    """Complete calls of `generate`, prefill included, compared with transformers and its default cache."""
    pytest.importorskip("transformers", exc_type=ImportError)
    model = model_of(name, dtype)
    ids = prompts(model, 1, T)
    theirs = peers.in_transformers(model)
    mask = torch.ones_like(ids)

    def ours():
        return generate(model, ids, new)

    def transformers():
        return theirs.generate(ids, attention_mask=mask, max_new_tokens=new)

    for run in ours, transformers:
        assert peers.regret(model, ids, run()[:, T:].T.tolist()) <= 2 * peers.rounding(model)
    info = {"what": "whole calls", **about(name, dtype, 1), "T": T, "new_tokens": new}
    time_interleaved(benchmark, ours, {"transformers": transformers}, info=info, rounds=5, calls=1)


@pytest.mark.skipif(tiny(), reason="takes models of more than a few thousand weights")
@pytest.mark.parametrize("batch", [1, 16] if full() else [1], ids="batch{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_memory(benchmark, dtype, batch, T=900):
    """Peak memory of generation beyond the model: on a CPU of a separate process, on CUDA of PyTorch's allocator."""
    if DEVICE == "cpu" and not Path("/proc/self/clear_refs").exists():
        pytest.skip("measuring peak memory needs Linux's /proc/self/clear_refs")
    peaks = {}

    def measure():
        for mode in "cached", "uncached":
            arguments = name_of(dtype), batch, T, mode == "cached"
            if DEVICE == "cuda":
                peaks[mode] = peak_bytes(*arguments)
                continue
            code = f"from benchmarks.test_generate import peak_bytes; print(peak_bytes{arguments})"
            output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            peaks[mode] = int(output.stdout)

    benchmark.pedantic(measure)
    cases = [{"what": "memory", "context": T, "mode": mode, "bytes": peak} for mode, peak in peaks.items()]
    benchmark.extra_info.update(about("gpt2-124m", dtype, batch), cases=cases)


def peak_bytes(dtype: str, batch: int, T: int, use_cache: bool) -> int:
    model = model_of("gpt2-124m", getattr(torch, dtype))
    ids = prompts(model, batch, T)
    generate(model, ids[:, :2], 2, use_cache=use_cache)  # what is loaded and started once is not counted
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        generate(model, ids, 2, use_cache=use_cache)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_bytes("VmRSS")
    generate(model, ids, 2, use_cache=use_cache)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def compared() -> list[tuple[str, torch.dtype]]:
    """The models that are compared with those of other libraries, and their dtypes; the first is the one that README shows."""
    if DEVICE == "cuda" or not full():
        return [("gpt2-124m", dtype) for dtype in DTYPES]
    return list(itertools.product(("gpt2-124m", "smollm2-135m"), (torch.float32, torch.bfloat16, torch.float16)))


def id_of(model_and_dtype: tuple[str, torch.dtype]) -> str:
    return f"{model_and_dtype[0]}-{name_of(model_and_dtype[1])}"


def with_oracle(name: str, dtype: torch.dtype) -> tuple[GPT, GPT]:
    """A model in a dtype, and the same computing in float32."""
    return SHAPES[name](DEVICE, dtype), SHAPES[name](DEVICE, dtype).float()


@pytest.fixture(scope="module")
def opened(request):
    """The name of a model, it in one dtype, the same computing in float32, and what `peers.opened` gives for them."""
    name, dtype = request.param
    model, oracle = with_oracle(name, dtype)
    with peers.opened(model, oracle) as libraries:
        yield name, model, oracle, *libraries


def requests():
    """(what is opened, batch, tokens of a prompt)."""
    first, *others = compared()
    quick = [(1, 32), (1, 512), (1, 900), (16, 32)]
    every = sorted([*quick, (1, 128), (1, 1000), (4, 512), (16, 512)])
    few = [(1, 32), (1, 512), (1, 900)] if full() else [(1, 512)]
    chosen = [(first, *request) for request in (every if full() else quick)]
    chosen += [(other, *request) for other in others for request in few]
    ids = [f"{id_of(which)}-batch{batch}-{T}tokens" for which, batch, T in chosen]
    return pytest.mark.parametrize("opened, batch, T", chosen, ids=ids, indirect=["opened"])


@pytest.mark.skipif(DEVICE == "cuda" and not full(), reason="compiles for minutes: in the full set")
@pytest.mark.skipif(tiny(), reason="takes models of more than a few thousand weights")
@requests()
def test_generation(benchmark, opened, batch, T):
    """In a round, each library generates once. The time of its first token is that of prefill; the median time between later
    tokens, for which caches are in the state of generation, that of a decode step."""
    name_of_model, model, oracle, libraries, versions, absent = *opened[:-1], dict(opened[-1])
    libraries = {name: peer for name, peer in libraries.items() if batch == 1 or name.startswith(TAKE_BATCHES)}
    ids, dtype = prompts(model, batch, T), model.token_embedding.weight.dtype
    calls = {}
    for _ in range(1 if DEVICE == "cpu" else 2):  # there, the first run compiles
        for name, peer in libraries.items():
            try:
                with contextlib.nullcontext() if name == "ours" else at_most(LONGEST_CALL):
                    tokens, seconds = peers.timed(peer, ids)
            except TimeoutError as reason:
                absent[name] = f"{reason} with {T} tokens"
                continue
            regret = peers.regret(oracle, ids, tokens)
            assert regret <= 2 * peer.tolerance, f"{name}: tokens {regret:.2g} standard deviations below the best: {tokens}"
            calls[name] = seconds[-1]
    libraries = {name: libraries[name] for name in calls}
    rounds = max(LEAST_ROUNDS, round(SECONDS / sum(calls.values())))
    product, read = arithmetic(dtype), reading()
    prefill, decode = ({name: [] for name in ("ours", *libraries, limit.name)} for limit in (product, read))

    def generate(name):
        _, seconds = peers.timed(libraries[name], ids)
        prefill[name].append(seconds[0])
        decode[name].append(statistics.median(after - before for before, after in zip(seconds, seconds[1:])))

    def others():
        prefill[product.name].append(clock(product.run, [{}] * 3, DEVICE))
        decode[read.name].append(clock(read.run, [{}] * 3, DEVICE))
        for name in libraries:
            if name != "ours":
                generate(name)

    benchmark.pedantic(generate, args=("ours",), setup=others, rounds=rounds)
    keys = T + peers.NEW // 2  # in the median step
    read_by = {name: peers.step_bytes(model.config, keys, peer, batch) for name, peer in libraries.items()}
    cases = [
        {
            "what": "prefill", "T": T, "flops": peers.prefill_flops(model.config, T, batch),
            "limit": product.name, "limit_flops": product.amount, "seconds": prefill,
        },
        {
            "what": "decode", "context": T, "bytes": read_by["ours"], "peer_bytes": read_by,
            "limit": read.name, "limit_bytes": read.amount, "seconds": decode,
        },
    ]  # fmt: skip
    benchmark.extra_info.update(about(name_of_model, dtype, batch), peers=versions, absent=absent, cases=cases)


def busy_cases():
    return compared() if full() else [("smollm2-135m", torch.float32)]


@pytest.mark.skipif(not (full() or tiny()), reason="takes minutes: FULL=1")
@pytest.mark.skipif(
    DEVICE == "cuda" or not hasattr(os, "sched_setaffinity"), reason="needs a CPU, and Linux to keep a core busy"
)
@pytest.mark.parametrize("name, dtype", busy_cases(), ids=map(id_of, busy_cases()))
def test_busy_core(benchmark, name, dtype):
    """Decode steps while another process keeps one of the cores busy, and while none does, with one thread and with all. A
    round has all of these, one after the other."""
    model, oracle = with_oracle(name, dtype)
    T = 16 if tiny() else 128
    ids, every = prompts(model, 1, T), torch.get_num_threads()
    counts = sorted({1, every})
    settings = [(threads, busy) for busy in (False, True) for threads in counts]
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, every)
        libraries, versions, absent = {}, {}, {}
        for threads in counts:
            torch.set_num_threads(threads)
            libraries[threads], *others = stack.enter_context(peers.opened(model, oracle))
            versions, absent = versions | others[0], absent | others[1]
        names = [name for name in libraries[1] if name in libraries[every] and "no cache" not in name]
        seconds = {setting: {name: [] for name in names} for setting in settings}

        def measure():
            for threads, busy in settings:
                torch.set_num_threads(threads)
                with busy_core() if busy else contextlib.nullcontext():
                    for name in names:
                        tokens, at = peers.timed(libraries[threads][name], ids)
                        regret = peers.regret(oracle, ids, tokens)
                        assert regret <= 2 * libraries[threads][name].tolerance, f"{name}: off by {regret:.2g}: {tokens}"
                        steps = [after - before for before, after in zip(at, at[1:])]
                        seconds[threads, busy][name].append(statistics.median(steps))

        start = time.perf_counter()
        measure()
        rounds = 1 if tiny() else max(LEAST_ROUNDS, round(SECONDS / (time.perf_counter() - start)))
        for of_setting in seconds.values():
            for values in of_setting.values():
                values.clear()  # of the round that warmed up
        benchmark.pedantic(measure, rounds=rounds)
    cases = [
        {"what": "busy core", "threads": threads, "busy": busy, "seconds": taken, "alone": seconds[1, False]}
        for (threads, busy), taken in seconds.items()
    ]
    benchmark.extra_info.update(about(name, dtype, 1), context=T, peers=versions, absent=absent, cases=cases)
