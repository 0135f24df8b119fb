"""Many requests at once, offline: 64 prompts of 16 to 512 tokens with answers of 16 to 256, of given lengths and without an end
token. Ours with max_batch, beside static batches of 16 of our own, in which rows wait for the longest answer, and continuous
batching of transformers (`ContinuousBatchingManager`, which `generate_batch` uses; here each request has its own max_new_tokens).
"""

import random
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks import peers
from benchmarks.test_generate import about, model_of
from benchmarks.timing import DEVICE, DTYPE, at_most, full, measured_time, record, tiny
from fastgpt import GPT, generate
from fastgpt.bench.timing import synchronize
from fastgpt.generation.config import GenerationConfig
from fastgpt.generation.many import Many

STATIC = 16  # rows of a static batch
REQUESTS, PROMPT, ANSWER = (6, (4, 20), (2, 12)) if tiny() else (64, (16, 512), (16, 256))
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


@pytest.mark.benchmark(timer=measured_time)
def test_many_requests(benchmark):
    model = model_of("smollm2-135m", DTYPE)
    prompts, new = requests(model)
    ways, absent = (
        {
            "ours": lambda: timed(lambda: scheduled(model, prompts, new)),
            "ours, static batches": lambda: timed(lambda: static(model, prompts, new)),
        },
        {},
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
    assert [len(answer) for answer in answers["ours"]] == new
    if DTYPE is torch.float32:
        assert answers["ours"] == answers["ours, static batches"]
    tokens = sum(new)
    info = {
        "what": "many requests", **about("smollm2-135m", DTYPE, STATIC), "requests": len(new), "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": tokens, "absent": absent,
    }  # fmt: skip
    record(benchmark, rounds, info=info)


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
