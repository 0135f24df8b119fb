"""Sampling: logits are processed as transformers does, and tokens are drawn by their probabilities, each row on its own."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from models import random_ids, random_model
from transformers.generation import logits_process as theirs

from fastgpt import generate
from fastgpt.generation import sampling
from fastgpt.generation.sampling import draw, most_likely, process, uniform_numbers
from fastgpt.generation.top_p import _threshold_by_radix, integer_weights, top_p_threshold, top_p_threshold_reference

RULES = [
    {"temperature": 0.7},
    {"top_k": 20},
    {"top_k": 1},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"repetition_penalty": 1.2, "temperature": 1.7, "top_k": 300, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.3, "top_k": 7, "top_p": 0.6},
]
EXTREME = [
    {"temperature": 1e-38},
    {"temperature": 5e-324},
    {"temperature": 1e38},
    {"temperature": 1.7e308},
    {"temperature": 1e-30, "top_p": 0.5, "min_p": 0.5},
    {"temperature": 1e38, "top_k": 3},
    {"repetition_penalty": 1e30},
    {"repetition_penalty": 1e-30},
    {"repetition_penalty": 1e100, "temperature": 1e-38},
    {"repetition_penalty": 1e-100, "temperature": 1e-3, "top_p": 0.3},
    {"top_p": 5e-324},
    {"top_p": 1 - 1e-16},
    {"min_p": 5e-324},
    {"min_p": 1.0, "temperature": 1e-20},
    {"top_k": 2**64},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_logits_rules_are_those_of_transformers(rules):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 2000, generator=generator)
    ids = torch.randint(2000, (5, 400), generator=generator)
    made = {
        "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
        "temperature": theirs.TemperatureLogitsWarper,
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
    }
    chain = theirs.LogitsProcessorList(made[name](rules[name]) for name in made if name in rules)
    expected = chain(ids, logits.clone())
    seen = torch.zeros(5, 2000, dtype=torch.bool).scatter_(1, ids, True)
    actual = process(logits, seen=seen, **rules)
    assert torch.equal(actual, expected)


def drawn_in_higher_precision(
    logits, uniform, *, seen, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0
):
    """Tokens after the rules, in a format that none of them leaves."""
    x = logits.numpy().astype(np.longdouble)
    x = np.where(seen.numpy(), np.where(x < 0, x * np.longdouble(repetition_penalty), x / np.longdouble(repetition_penalty)), x)
    x = (x - x.max(-1, keepdims=True)) / np.longdouble(temperature)
    order = np.sort(x)[:, ::-1][:, : min(top_k or x.shape[1], x.shape[1])]
    least = order[:, -1:]
    if top_p is not None:
        p = np.exp(order) / np.exp(order).sum(-1, keepdims=True)
        least = np.take_along_axis(order, np.maximum((p.cumsum(-1) - p < top_p).sum(-1, keepdims=True), 1) - 1, -1)
    least = least if min_p is None else np.maximum(least, np.log(np.longdouble(min_p)))
    cumulative = np.where(x < least, 0, np.exp(x)).cumsum(-1)
    return torch.from_numpy((cumulative <= uniform.numpy()[:, None] * cumulative[:, -1:]).sum(-1))


@pytest.mark.parametrize("rules", EXTREME, ids=str)
def test_extreme_rules_do_not_overflow(rules):
    """Tokens are those of arithmetic with a wider range."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(100, 300, generator=generator)
    logits[:, 7] = -math.inf
    seen = torch.rand(100, 300, generator=generator) < 0.3
    uniform = uniform_numbers(range(100), 1, 1)[0]
    expected = drawn_in_higher_precision(logits, uniform, seen=seen, **rules)
    assert torch.equal(draw(process(logits.clone(), seen=seen, **rules), uniform), expected)
    greedy = drawn_in_higher_precision(logits, uniform, seen=seen, **rules | {"temperature": 1e-38, "top_k": 1})
    assert torch.equal(most_likely(process(logits, seen=seen, **rules | {"temperature": 0})), greedy)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rules", [{}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1}], ids=str)
def test_tokens_are_in_the_vocabulary_for_any_logits(rules, value):
    logits = torch.full((3, 11), value)
    logits[0] = torch.arange(11)
    if not math.isinf(value) or value > 0:
        logits[1, 1:] = 0.0
    scores = process(logits, seen=None, **({"temperature": 0.0} | rules))
    for tokens in (most_likely(scores), draw(scores, torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64))):
        assert ((0 <= tokens) & (tokens < 11)).all()


def test_ties_with_a_kept_token_are_kept():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert process(logits, top_k=2).isfinite().tolist() == [[True, True, True, True, False]]
    assert process(logits, top_p=0.6).isfinite().tolist() == [[True, True, True, True, False]]


# The nucleus

NUCLEUS_LOGITS = {
    "normal": lambda g: torch.randn(4, 3000, generator=g) * 3,
    "flat": lambda g: torch.randn(4, 3000, generator=g) * 1e-3,
    "peaked": lambda g: torch.randn(4, 3000, generator=g) * 30,
    "equal": lambda g: torch.full((3, 2048), -7.25),
    "ties": lambda g: torch.randint(-9, 3, (5, 3000), generator=g).float(),
    "zeros of both signs": lambda g: torch.where(torch.rand(3, 2000, generator=g) < 0.5, 0.0, -0.0),
    "one": lambda g: torch.randn(3, 1, generator=g),
    "few": lambda g: torch.randn(3, 7, generator=g),
    "forbidden": lambda g: torch.randn(4, 3000, generator=g).masked_fill(torch.rand(4, 3000, generator=g) < 0.9, -math.inf),
    "one allowed": lambda g: torch.full((2, 900), -math.inf).index_fill(1, torch.tensor([77]), 3.0),
    "large": lambda g: torch.randn(4, 2000, generator=g) * 1e37,
    "subnormal": lambda g: torch.randn(4, 2000, generator=g) * 1e-40,
    "sorted": lambda g: torch.linspace(-20, 20, 3000).repeat(2, 1),
    "reversed": lambda g: torch.linspace(20, -20, 3000).repeat(2, 1),
    "nothing allowed": lambda g: torch.full((2, 700), -math.inf),
}
TOP_P = [5e-324, 1e-9, 0.1, 0.25, 0.5, 0.9, 0.95, 0.999, 1 - 1e-16]


@pytest.mark.parametrize("kind", NUCLEUS_LOGITS)
def test_the_top_p_threshold_is_found_without_sorting(kind):
    """On a CPU and as on a GPU, exactly where the reference ends it, which puts all tokens in order."""
    logits = NUCLEUS_LOGITS[kind](torch.Generator().manual_seed(0))
    for top_p in TOP_P:
        expected = top_p_threshold_reference(logits, top_p)
        assert torch.equal(top_p_threshold(logits, top_p), expected) and torch.equal(by_digits(logits, top_p), expected)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["normal", "flat", "peaked", "ties"])
def test_the_nucleus_is_the_smallest_set_of_that_probability(kind, top_p):
    logits = NUCLEUS_LOGITS[kind](torch.Generator().manual_seed(1))
    probabilities = logits.double().softmax(-1)
    kept = logits >= top_p_threshold(logits, top_p)
    likelier = logits > logits.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
    assert ((probabilities * kept).sum(-1) >= top_p - 1e-6).all() and ((probabilities * likelier).sum(-1) < top_p + 1e-6).all()


def by_digits(logits, top_p):
    """As on a GPU."""
    mass = integer_weights(logits)
    return _threshold_by_radix(logits, mass, top_p * mass.sum(-1, keepdim=True).double())


@pytest.mark.parametrize("rules", [{"top_p": 0.9}, {"top_p": 0.4, "temperature": 1.3}, {"top_p": 0.7, "min_p": 0.01}], ids=str)
def test_tokens_are_those_of_the_reference_for_the_same_numbers(rules):
    logits = torch.cat([torch.randn(300, 400), torch.randint(-4, 4, (300, 400)).float()])
    uniform = uniform_numbers([3], 600, 1)[0]
    tokens = draw(process(logits, **rules), uniform)
    for way in (top_p_threshold_reference, by_digits):
        with mock.patch.object(sampling, "top_p_threshold", way):
            assert torch.equal(tokens, draw(process(logits, **rules), uniform))


def test_the_most_likely_token_is_the_first_of_equals():
    logits = torch.randint(0, 9, (20, 50), generator=torch.Generator().manual_seed(0)).float()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(most_likely(logits.to(dtype)), (logits == logits.amax(-1, keepdim=True)).int().argmax(-1))


# Draws

PROBABILITIES = [0.1, 0.4, 0.05, 0.3, 0.15]
LOGITS = torch.log(torch.tensor([PROBABILITIES]))


def chi_square(tokens, probabilities) -> float:
    """A statistic that exceeds its degrees of freedom + 4 √(2 · degrees) once in thousands of times."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = torch.tensor(probabilities, dtype=torch.float64) * len(tokens)
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() / (degrees + 4 * math.sqrt(2 * degrees))).item()


@pytest.mark.parametrize("along", ["seeds", "samples", "steps"])
def test_samples_follow_the_probabilities(along):
    """Of rows with seeds one after the other, of samples, and of steps."""
    uniform = {
        "seeds": lambda: uniform_numbers(range(4000), 1, 1),
        "samples": lambda: uniform_numbers([5], 4000, 1),
        "steps": lambda: uniform_numbers([5], 1, 4000),
    }[along]().flatten()
    assert chi_square(draw(LOGITS.expand(4000, 5), uniform), PROBABILITIES) < 1


@pytest.mark.parametrize(
    "rules, kept",
    [
        ({"temperature": 0.5}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 4}),
        ({"min_p": 0.3}, {1, 3, 4}),
        ({"temperature": 2.0, "top_k": 3, "top_p": 0.7}, {1, 3}),
    ],
    ids=str,
)
def test_samples_follow_the_rules(rules, kept):
    weights = [p ** (1 / rules.get("temperature", 1)) if i in kept else 0.0 for i, p in enumerate(PROBABILITIES)]
    logits = process(LOGITS, **rules).expand(4000, 5)
    tokens = draw(logits, uniform_numbers([7], 1, 4000).flatten())
    assert chi_square(tokens, [weight / sum(weights) for weight in weights]) < 1


def test_the_statistic_tells_a_slight_bias():
    tokens = draw(LOGITS.expand(4000, 5) * 1.2, uniform_numbers([7], 1, 4000).flatten())
    assert chi_square(tokens, PROBABILITIES) > 1


def test_a_token_of_probability_zero_is_never_sampled():
    """Not at the ends of the unit interval, and not with all the probability before it or behind it."""
    uniform = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for finite in (0, 3, 6):
        logits = torch.full((3, 7), -math.inf)
        logits[:, finite] = 5.0
        assert draw(logits, uniform).tolist() == [finite] * 3
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, -200.0, 0.0, -math.inf]]).expand(3, 6)
    assert draw(logits, uniform).tolist() == [1, 1, 4]


def test_numbers_depend_on_seed_sample_and_step_only():
    table = uniform_numbers([3, 2**64 - 1, 3], 4, 10)
    assert table.shape == (10, 12) and table.dtype == torch.float64 and ((0 <= table) & (table < 1)).all()
    assert torch.equal(table[:, :4], table[:, 8:]) and len(table[:, :8].unique()) == 80
    assert torch.equal(uniform_numbers([3], 2, 6), table[:6, :2])


def test_a_model_is_sampled_by_its_probabilities():
    model = random_model(layers=1)
    ids = random_ids(model, 1, 6)
    with torch.no_grad():
        probabilities = model(ids)[0, -1].double().softmax(-1).tolist()
    tokens = generate(model, ids, 1, temperature=1.0, num_samples=5000, seed=1)[:, -1]
    assert chi_square(tokens, probabilities) < 1
