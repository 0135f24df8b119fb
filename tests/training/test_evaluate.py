"""The held-out loss: that of plain PyTorch, window by window."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import random_ids, random_model

from fastgpt.testing import numerics
from fastgpt.training.evaluation import evaluate, split
from fastgpt.training.processes import Processes


def expected(model, tokens, starts, context):
    """In float64, in nats per token."""
    losses = []
    for start in starts:
        window = tokens[start : start + context + 1]
        losses.append(F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none"))
    return torch.cat(losses).mean(dim=0, keepdim=True)


@pytest.mark.parametrize("count, context", [(2, 8), (9, 8), (10, 8), (25, 8), (26, 8), (7, 96), (200, None)])
@torch.inference_mode()
def test_each_token_but_the_first_is_predicted_once(count, context):
    """Also of a last window that is shorter, of one token at least."""
    model, oracle = random_model(layers=1), random_model(layers=1).double()
    tokens = random_ids(model, 1, count)[0]
    whole = context or model.config.context_length
    actual = evaluate(model, tokens, context=context)
    numerics.check(
        torch.tensor([actual], dtype=torch.float64), lambda: expected(oracle, tokens, range(0, count - 1, whole), whole),
        dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize(
    "count, context, overlap", [(40, 8, 4), (41, 8, 4), (43, 8, 4), (9, 8, 7), (10, 8, 7), (6, 8, 4), (30, 8, 0)]
)
@torch.inference_mode()
def test_windows_that_overlap(count, context, overlap):
    """A token is predicted once, from at least `overlap` tokens where there are as many."""
    model, oracle = random_model(layers=1), random_model(layers=1).double()
    tokens, shown = random_ids(model, 1, count)[0], []
    actual = evaluate(model, tokens, context=context, overlap=overlap, shown=shown.append)
    assert sum(shown) == count - 1

    def exact():
        losses = []
        for target in range(1, count):
            windows = max(0, -(-(target - context) // (context - overlap)))  # before the one that it is in
            begin = windows * (context - overlap)
            logits = oracle(tokens[None, begin:target])[0, -1]
            losses.append(F.cross_entropy(logits[None], tokens[target : target + 1]))
        return torch.stack(losses).mean(dim=0, keepdim=True)

    numerics.check(torch.tensor([actual], dtype=torch.float64), exact, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"overlap: expected an integer >= 0 and <= {context - 1}, got {context}"):
        evaluate(model, tokens, context=context, overlap=context)


def test_windows_are_spread_evenly():
    model = random_model(layers=1)
    tokens = random_ids(model, 1, 81)[0]
    alone = [evaluate(model, tokens[start : start + 9], context=8) for start in range(0, 80, 8)]
    some = evaluate(model, tokens, 3, context=8)
    assert some == pytest.approx(sum(alone[i] for i in (0, 3, 6)) / 3, rel=8 * torch.finfo(torch.float64).eps)
    assert len({evaluate(model, tokens, most, context=8) for most in (10, 99, None)}) == 1


def test_the_mode_of_a_model_is_kept_and_counts_for_nothing():
    model = random_model(layers=1, dropout=0.5)
    tokens = random_ids(model, 1, 30)[0]
    loss = evaluate(model, tokens)
    model.train()
    assert evaluate(model, tokens) == loss and all(module.training for module in model.modules())


def test_only_8_bit_caches_change_results():
    model = random_model(layers=1)
    tokens = random_ids(model, 1, 60)[0]
    assert evaluate(model, tokens, cache_dtype=torch.float32) == evaluate(model, tokens)
    rounded = evaluate(model, tokens, cache_dtype=torch.int8)
    assert rounded != evaluate(model, tokens) and math.isfinite(rounded)


@pytest.mark.parametrize(
    "tokens, options, message",
    [
        (1, {}, "tokens: expected at least two"), (9, {"max_windows": 0}, "max_windows: expected an integer >= 1"),
        (9, {"context": 0}, "context: expected an integer >= 1"),
        (9, {"max_windows": True}, "max_windows: expected an integer"),
        (9, {"context": 1.5}, "context: expected an integer"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(tokens, options, message):
    model = random_model(layers=1)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        evaluate(model, random_ids(model, 1, tokens)[0], **options)


@pytest.mark.parametrize("context", [1, 8, 96])
def test_a_text_is_split_where_both_parts_are_long_enough(context):
    needed = max(20, context + 1 + context // 9)
    train, held_out = split(torch.arange(needed), context)
    assert len(train) > context and len(held_out) >= 2 and torch.equal(torch.cat([train, held_out]), torch.arange(needed))
    message = f"text: expected at least {needed} tokens for a context of {context}, got {needed - 1}"
    with pytest.raises(ValueError, match=message):
        split(torch.arange(needed - 1), context)


def test_a_process_alone_has_all_windows():
    model = random_model(layers=1)
    tokens = random_ids(model, 1, 30)[0]
    assert evaluate(model, tokens, processes=Processes()) == evaluate(model, tokens)
