"""Rules for logits (penalties, biases, n-grams, processors): those of transformers, in every batch and in a graph."""

import numpy as np
import pytest
import torch
import transformers
from generation_cases import generated_by_transformers, prompts_of
from models import random_ids, random_model
from tape import graphs_on_cpu
from transformers.generation import logits_process

from fastgpt import generate
from fastgpt.generation.generate import stream

RULES = [
    {"min_new_tokens": 9},
    {"logit_bias": {3: 4.0, 8: -2.5, 11: float("-inf")}},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 4, "repetition_penalty": 0.7, "min_new_tokens": 5, "logit_bias": {5: 1.5}},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_rules_are_those_of_transformers(twins, rules):
    """Alone, where they pad nothing: a batch is what each prompt is alone."""
    ours, theirs = twins
    prompts = [[7, 7, 7, 7], *prompts_of(30, 1, 12)]
    eos = generate(ours, prompts[1:2], 5)[0][32].item()
    bias = rules.get("logit_bias")
    given = rules | ({"sequence_bias": {(token,): value for token, value in bias.items()}} if bias else {})
    given.pop("logit_bias", None)
    expected = [generated_by_transformers(theirs, [prompt], 34, eos_token_id=eos, **given)[0].tolist() for prompt in prompts]
    for options in ({}, {"use_cache": False}, {"cache": "paged", "page_size": 4}, {"cache": "sliding", "window": 128}):
        actual = generate(ours, prompts, 34, eos=eos, **rules, **options)
        for row, prompt, new in zip(actual, prompts, expected, strict=True):
            assert row.tolist() == prompt + new


@pytest.mark.parametrize("bias", [{3: 40}, {np.int64(3): np.float16(40)}, {3: 40, 4: -(10**30)}, {3: 10**38}])
def test_numbers_of_every_kind_are_biases(bias):
    model = random_model()
    assert generate(model, [[1, 2]], 4, logit_bias=bias)[0].tolist() == [1, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 40, 2**64])
def test_no_ngram_is_there_twice(n):
    """Of tokens of an alphabet that is small beside them, also with what prompts have already."""
    model = random_model(vocabulary=65, seed=3)
    prompts = [[1, 2, 1, 2, 1], [4] * 9, [5]]
    biased = {"logit_bias": dict.fromkeys(range(12), 40.0)}
    rows = generate(model, prompts, 50, no_repeat_ngram_size=n, repetition_penalty=0.5, **biased)
    free = generate(model, prompts, 50, repetition_penalty=0.5, **biased)
    for row, prompt, other in zip(rows, prompts, free):
        grams = [tuple(row[i : i + n].tolist()) for i in range(len(row) - n + 1)]
        assert all(gram not in grams[:i] for i, gram in enumerate(grams) if i + n > len(prompt))
        assert n < 2**64 or torch.equal(row, other)


def test_rules_in_a_graph_and_in_every_batch():
    model = random_model()
    prompts = prompts_of(5, 14, 9, 14)
    options = {"no_repeat_ngram_size": 2, "min_new_tokens": 6, "logit_bias": {9: 1.0}, "eos": list(range(20)), "cache": "paged"}
    for sampling in ({}, {"temperature": 1.0, "seed": 4, "num_samples": 2}):
        rows = generate(model, prompts, 40, **options, **sampling)
        alone = [row for prompt in prompts for row in generate(model, [prompt], 40, **options, **sampling)]
        assert all(map(torch.equal, rows, alone))
        assert min(map(len, rows)) - 5 >= 6 and len({len(row) for row in rows}) > 1
        with graphs_on_cpu() as graphs:
            again = generate(model, prompts, 40, **options, **sampling)
        assert len(graphs) == 1 and all(map(torch.equal, again, rows))


def test_logits_processors_receive_the_tokens_of_each_row():
    """Without padding, rows of one length together, beside their own logits; and what they return is what counts."""
    model = random_model()
    prompts, given = prompts_of(5, 3, 5, 8), []

    def watches(tokens, logits):
        assert tokens.dtype == torch.int64 and logits.dtype == torch.float32 and logits.shape == (len(tokens), 65)
        given.append((tokens.clone(), logits.clone()))
        return logits

    for options in ({}, {"use_cache": False}, {"cache": "paged", "page_size": 4}):
        given.clear()
        rows = generate(model, prompts, 6, logits_processors=watches, **options)
        assert all(map(torch.equal, rows, generate(model, prompts, 6)))
        for step in range(6):
            calls = given[3 * step : 3 * step + 3]
            for (tokens, logits), group in zip(calls, ([0, 2], [1], [3]), strict=True):
                assert tokens.tolist() == [rows[row][: len(prompts[row]) + step].tolist() for row in group]
                assert logits.argmax(-1).tolist() == [rows[row][len(prompts[row]) + step].item() for row in group]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": [1, 2, 3], "num_samples": 2, "top_k": 9}], ids=str)
def test_logits_processors_do_not_couple_rows_of_a_batch(options):
    model = random_model()
    prompts = prompts_of(5, 3, 9)

    def even_after_odd(tokens, logits):
        logits[:, 0::2] += torch.where(tokens[:, -1:] % 2 == 1, 3.0, tokens.sum(1, keepdim=True) % 3)
        return logits

    rows = generate(model, prompts, 20, logits_processors=even_after_odd, **options)
    seeds = options.get("seed", [None] * 3)
    alone = [
        row
        for prompt, seed in zip(prompts, seeds)
        for row in generate(model, [prompt], 20, logits_processors=[even_after_odd], **options | {"seed": seed})
    ]
    assert all(map(torch.equal, rows, alone))
    steps = torch.stack(list(stream(model, prompts, 20, logits_processors=even_after_odd, **options)), dim=1)
    assert [row[-20:].tolist() for row in rows] == steps.tolist()
    with graphs_on_cpu() as graphs:  # the logits in a graph, the processor in Python
        again = generate(model, prompts, 20, logits_processors=even_after_odd, **options)
    assert len(graphs) == 1 and all(map(torch.equal, again, rows))


def test_processors_of_transformers(twins):
    """As they are, several in their order, among rules of the same kind; and log-probabilities are still the model's."""
    ours, theirs = twins
    ids = random_ids(ours, 2, 9)

    def processors():
        return transformers.LogitsProcessorList(
            [
                logits_process.RepetitionPenaltyLogitsProcessor(1.4),
                logits_process.NoRepeatNGramLogitsProcessor(2),
                logits_process.SuppressTokensLogitsProcessor([3, 4, 5]),
                logits_process.InfNanRemoveLogitsProcessor(),
            ]
        )

    expected = theirs.generate(
        ids, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0, logits_processor=processors()
    )
    tokens, logprobs = generate(ours, ids, 30, logits_processors=processors(), return_logprobs=True)
    assert torch.equal(tokens, expected)
    rules = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "logit_bias": dict.fromkeys((3, 4, 5), float("-inf"))}
    same, same_logprobs = generate(ours, ids, 30, return_logprobs=True, **rules)
    assert torch.equal(tokens, same) and torch.equal(logprobs, same_logprobs)


def test_logits_processors_run_before_temperature_and_after_the_other_rules():
    model, given = random_model(), []
    bias = {3: 1.0}
    prompt = prompts_of(5)
    generate(model,
        prompt, 1, logits_processors=[lambda t, x: given.append(x.clone()) or x * 2, lambda t, x: given.append(x) or x.half()],
        logit_bias=bias, repetition_penalty=2.0, temperature=0.5, seed=1,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(torch.tensor(prompt))[:, -1]
    logits[:, 3] += 1.0
    seen = logits[:, prompt[0]]
    logits[:, prompt[0]] = torch.where(seen < 0, seen * 2, seen / 2)
    assert torch.equal(given[0], logits) and torch.equal(given[1], 2 * given[0])


def test_results_of_logits_processors_are_checked():
    model = random_model()
    for result, error, message in (
        (None, TypeError, "logits_processors: expected a torch.Tensor, got NoneType"),
        (torch.zeros(1, 64), ValueError, r"logits_processors: expected shape \(1, 65\) .*, got \(1, 64\)"),
        (torch.zeros(65), ValueError, r"logits_processors: expected shape \(1, 65\) .*, got \(65,\)"),
        (torch.zeros(1, 65, dtype=torch.int64), TypeError, "logits_processors: expected floating-point logits .* torch.int64"),
        (torch.zeros(1, 65, device="meta"), ValueError, "logits_processors: expected device cpu, got meta"),
    ):
        with pytest.raises(error, match=message):
            generate(model, [[1]], 3, logits_processors=lambda tokens, logits: result)
    with pytest.raises(TypeError, match=r"logits_processors\[1\]: expected a torch.Tensor, got NoneType"):
        generate(model, [[1]], 3, logits_processors=[lambda tokens, logits: logits, lambda tokens, logits: None])
