"""Logits that are NaN or infinite are an error, wherever they come from; extreme options are none."""

import pytest
import torch
from generation_cases import prompts_of
from models import random_ids, random_model

from fastgpt import generate
from fastgpt.generation import request
from fastgpt.generation.generate import stream

WRONG = {"nan": float("nan"), "inf": float("inf"), "inf, or -inf for every token": float("-inf")}

WAYS = [
    {},
    {"use_cache": False},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 1, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 3, "logit_bias": {3: 1.0}},
    {"logits_processors": lambda tokens, logits: logits, "num_samples": 2},
]


def wrong_from(model, monkeypatch, step, row, value):
    """Lets the logits of a row be `value`, one of them or for -inf all, at a step; counted through both ways of a decoder."""
    capped, calls = model.softcap_logits, []

    def logits(scores):
        result = capped(scores).clone()
        if len(calls) == step:
            result[row, slice(None) if value == float("-inf") else 5] = value
        calls.append(1)
        return result

    monkeypatch.setattr(model, "softcap_logits", logits)


@pytest.mark.parametrize("got", WRONG)
@pytest.mark.parametrize("options", WAYS, ids=" ".join)
def test_logits_that_are_not_finite_are_an_error(options, got, monkeypatch):
    """With the row and the step; no token that comes of them is seen before."""
    for step, row in ((0, 0), (4, 1)):
        model = random_model()
        prompts = prompts_of(5, 9)
        wrong_from(model, monkeypatch, step, row, WRONG[got])
        row *= options.get("num_samples", 1) if step == 0 else 1  # rows of the prefill are prompts
        tokens = stream(model, prompts, 12, **options)
        for _ in range(step):
            assert (next(tokens) >= 0).all()
        with pytest.raises(ValueError, match=rf"logits: expected finite ones .*, got {got}.* in row {row} at step {step}"):
            next(tokens)


def test_logits_of_rows_that_have_ended_may_be_anything(ending, monkeypatch):
    model, prompts, free, eos = ending
    row = next(row for row, new in enumerate(free) if eos in new)
    expected = generate(model, prompts, 30, eos=eos)
    wrong_from(model, monkeypatch, free[row].index(eos) + 1, row, float("nan"))
    assert all(map(torch.equal, generate(model, prompts, 30, eos=eos), expected))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}], ids=str)
def test_nonfinite_logits_are_detected_late_on_a_gpu(options, monkeypatch):
    """When one looks, and at the end; until then tokens are of the vocabulary."""
    model = random_model()
    prompts = prompts_of(5, 9)
    monkeypatch.setitem(request.EOS_POLL_INTERVAL, "cpu", 16)
    for new, at, seen in ((40, 1, 15), (40, 16, 31), (9, 8, 8)):
        with monkeypatch.context() as patch:
            wrong_from(model, patch, at, 1, float("nan"))
            tokens = stream(model, prompts, new, **options)
            steps = torch.stack([next(tokens) for _ in range(seen)])
            assert ((0 <= steps) & (steps < 65)).all()
            with pytest.raises(ValueError, match=f"logits: .*, got nan in row 1 at one of steps {at - at % 16} to {seen}"):
                next(tokens)


def test_excluding_every_token_names_the_rules():
    model = random_model()
    with pytest.raises(ValueError, match="-inf for every token, in row 0 at step 0, after logit_bias"):
        generate(model, random_ids(model, 1, 5), 5, logit_bias={token: float("-inf") for token in range(65)})
    with pytest.raises(ValueError, match="-inf for every token, in row 0 at step 61, after no_repeat_ngram_size"):
        generate(model, [[1, 2, 1, 3, 4]], 70, no_repeat_ngram_size=1)
    with pytest.raises(ValueError, match="got nan in row 0 at step 2, after logits_processors"):
        generate(model, [[1, 2]], 5, logits_processors=lambda tokens, logits: logits / (tokens.shape[1] != 4) * 0)


def test_a_model_of_nan_weights():
    model = random_model()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    for options in WAYS:
        with pytest.raises(ValueError, match="logits: expected finite ones to choose a token by, got nan in row 0 at step 0"):
            generate(model, [[1, 2]], 3, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-38}, {"temperature": 2**64}, {"repetition_penalty": 1e30}, {"repetition_penalty": 1e-30},
        {"top_p": 1e-45},
    ],
    ids=str,
)  # fmt: skip
def test_extreme_options_give_tokens(options):
    model = random_model()
    ids = random_ids(model, 2, 5)
    tokens = generate(model, ids, 20, **{"temperature": 1.0, "seed": 3} | options)
    assert ((0 <= tokens) & (tokens < 65)).all()
    if options.get("temperature") == 1e-38:
        assert torch.equal(tokens, generate(model, ids, 20))
