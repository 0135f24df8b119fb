"""Many requests at once, offline: 64 prompts of 16 to 512 tokens with answers of 16 to 256, of given lengths and without an end
token. Ours with max_batch, beside static batches of 16 of our own, in which rows wait for the longest answer, continuous
batching of transformers (`ContinuousBatchingManager`, which `generate_batch` uses; here each request has its own max_new_tokens),
and vLLM with its own attention and with ours, where `make vllm` has installed it.
"""

import contextlib
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.test_generate import about, model_of
from benchmarks.timing import DEVICE, DTYPE, at_most, full, measured_time, name_of, record, tiny
from fastgpt import GPT, generate
from fastgpt.bench.timing import synchronize
from fastgpt.generation.config import GenerationConfig
from fastgpt.generation.many import Many

STATIC = 16  # rows of a static batch
REQUESTS, PROMPT, ANSWER = (6, (4, 20), (2, 12)) if tiny() else (64, (16, 512), (16, 256))
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cpu" else [DTYPE]
VLLM = Path("build/vllm/bin/python").absolute()
PREFILL = 32 if tiny() else 512
PATIENCE = 60 if tiny() else 1800 if full() else 240  # seconds for transformers, which may take ten times as long as ours


def requests(model: GPT) -> tuple[list[list[int]], list[int]]:
    """Prompts, and the lengths of their answers."""
    draw = random.Random(0)
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(draw.randint(*PROMPT))] for _ in range(REQUESTS)]
    return prompts, [draw.randint(*ANSWER) for _ in prompts]


def scheduled(model: GPT, prompts: list[list[int]], new: list[int]) -> list[list[int]]:
    """The new tokens of each prompt, whose rows join and leave a batch of the default size."""
    return [row[len(prompt) :].tolist() for row, prompt in zip(generate(model, prompts, new), prompts)]


def static(model: GPT, prompts: list[list[int]], new: list[int]) -> list[list[int]]:
    """The same in batches, whose rows begin and end together; what exceeds an answer is cut."""
    answers = []
    for begin in range(0, len(prompts), STATIC):
        batch, lengths = prompts[begin : begin + STATIC], new[begin : begin + STATIC]
        rows = generate(model, batch, max(lengths))
        answers += [row[len(prompt) :][:n].tolist() for row, prompt, n in zip(rows, batch, lengths)]
    return answers


def continuous(theirs, prompts: list[list[int]], new: list[int]) -> tuple[list[list[int]], float]:
    """Those of transformers, joining and leaving its batch, and the seconds once its cache was made."""
    answers, deadline = {}, time.monotonic() + PATIENCE
    with theirs.continuous_batching_context_manager(generation_config=theirs.generation_config, timeout=5) as manager:
        begin = time.perf_counter()
        ids = [manager.add_request(prompt, max_new_tokens=n, eos_token_id=-1) for prompt, n in zip(prompts, new)]
        while len(answers) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("its thread has ended")
            if time.monotonic() > deadline:
                raise TimeoutError(f"it took longer than {PATIENCE} s")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                answers[result.request_id] = result.generated_tokens
        seconds = time.perf_counter() - begin
    return [answers[number] for number in ids], seconds


def timed(way: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float]:
    begin = time.perf_counter()
    answers = way()
    synchronize(torch.device(DEVICE))
    return answers, time.perf_counter() - begin


@contextlib.contextmanager
def in_vllm(model: GPT, requests: dict, **environment: str) -> Iterator[Callable[[str], tuple[list[list[int]], float]]]:
    """A function that answers the requests of a name in vLLM, in a process of its own: see benchmarks/in_vllm.py."""
    if not VLLM.exists():
        raise FileNotFoundError("make vllm installs it")
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": "",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=peers.BUILD) as folder, open(Path(folder, "messages.txt"), "w") as messages:
        peers.in_transformers(model).save_pretrained(folder)
        Path(folder, "requests.json").write_text(json.dumps(requests))
        dtype = name_of(model.token_embedding.weight.dtype)
        command = [VLLM, Path(__file__).with_name("in_vllm.py"), folder, f"{folder}/requests.json", dtype]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True, cwd=VLLM.parents[1],
            env=os.environ | settings | environment,
        )  # fmt: skip

        def answer(name: str) -> tuple[list[list[int]], float]:
            print(name, file=process.stdin, flush=True)
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(Path(folder, "messages.txt").read_text().strip().rpartition("\n")[2])
            result = json.loads(line)
            return result["answers"], result["seconds"]

        try:
            yield answer
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module", params=DTYPES if full() else DTYPES[:1], ids=name_of)
def served(request):
    """The model, its dtype, requests, name of vLLM -> what answers in it, and what is absent with the reasons."""
    model = model_of("smollm2-135m", request.param)
    prompts, new = requests(model)
    several = {
        "many": {"prompts": prompts, "new": new}, "few": {"prompts": prompts[:2], "new": [2, 2]},
        "one": {"prompts": [sum(prompts, [])[:PREFILL]], "new": [1]},
    }  # fmt: skip
    running, absent = {}, {}
    with contextlib.ExitStack() as stack:
        for name, environment in {"vLLM": {}, "vLLM, our attention": {"FASTGPT_VLLM": "1"}}.items():
            try:
                running[name] = stack.enter_context(in_vllm(model, several, **environment))
                running[name]("few")
            except Exception as reason:  # whatever it is, the others are timed
                running.pop(name, None)
                absent[name] = f"{type(reason).__name__}: {reason}".splitlines()[0]
        yield model, request.param, prompts, new, running, absent


@pytest.mark.benchmark(timer=measured_time)
def test_many_requests(benchmark, served):
    model, dtype, prompts, new, running, absent = served
    ways, absent = (
        {
            "ours": lambda: timed(lambda: scheduled(model, prompts, new)),
            "ours, static batches": lambda: timed(lambda: static(model, prompts, new)),
            **{name: lambda answer=answer: answer("many") for name, answer in running.items()},
        },
        dict(absent),
    )
    try:
        theirs = peers.in_transformers(model)
        with at_most(PATIENCE):
            few, _ = continuous(theirs, prompts[:2], [2, 2])  # whether it runs here
        assert all(map(len, few))
        ways["transformers, continuous batching"] = lambda: continuous(theirs, prompts, new)
    except Exception as reason:  # whatever it is, ours is timed
        absent["transformers, continuous batching"] = f"{type(reason).__name__}: {reason}".splitlines()[0]
    rounds, answers = [], {}
    for _ in range(3 if full() else 1):
        rounds.append({})
        for name, way in ways.items():
            answers[name], rounds[-1][name] = way()
    for name, of_all in answers.items():
        assert [len(answer) for answer in of_all] == new, name
    if dtype is torch.float32:
        assert answers["ours"] == answers["ours, static batches"]
    info = {
        "what": "many requests", **about("smollm2-135m", dtype, STATIC), "requests": len(new),
        "prompt_tokens": sum(map(len, prompts)), "new_tokens": sum(new), "absent": absent,
    }  # fmt: skip
    record(benchmark, rounds, info=info)


@pytest.mark.benchmark(timer=measured_time)
def test_prefill_in_vllm(benchmark, served):
    """The first token after a prompt in vLLM, with our attention and its own."""
    _, dtype, prompts, _, running, absent = served
    if absent:
        pytest.skip("; ".join(f"{name}: {reason}" for name, reason in absent.items()))
    rounds = []
    for _ in range(20):
        rounds.append({name: running[theirs]("one")[1] for name, theirs in (("ours", "vLLM, our attention"), ("vLLM", "vLLM"))})
    info = {"what": "prefill in vLLM", **about("smollm2-135m", dtype, 1), "T": PREFILL, "absent": {}}
    record(benchmark, rounds[1:], info=info)


@pytest.mark.benchmark(timer=measured_time)
def test_an_equal_beginning(benchmark):
    """Two prompts that begin with the same 512 tokens: the first new token of the second, beside that of the first."""
    model = model_of("smollm2-135m", DTYPE)
    length = 32 if tiny() else 512
    begin, *ends = (
        [random.Random(i).randrange(model.config.vocab_size) for _ in range(n)] for i, n in enumerate([length, 8, 8])
    )
    rounds = []
    options = GenerationConfig.of(model, {"max_batch": 1})
    for _ in range(5 if full() else 3):
        times = [time.perf_counter()]
        many = Many(
            model, [begin + end for end in ends], 1, options, ends=lambda row, token: bool(times.append(time.perf_counter()))
        )
        many.finish()
        rounds.append({"ours": times[2] - times[1], "the first of both": times[1] - times[0]})
    info = {"what": "an equal beginning", **about("smollm2-135m", DTYPE, 1), "T": length, "absent": {}}
    record(benchmark, rounds, info=info)
