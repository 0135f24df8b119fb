"""Seeds, and log-probabilities of what is sampled."""

import pytest
import torch
from generation_cases import SAMPLED, cut, prompts_of, scored
from models import random_ids, random_model

from fastgpt import generate
from fastgpt.generation.generate import stream
from fastgpt.testing import numerics


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache": "paged", "page_size": 4}, {"cache": "sliding", "window": 96}], ids=str
)
def test_the_same_seed_gives_the_same_tokens_without_cache_and_in_any_cache(options):
    model = random_model()
    prompts = prompts_of(5, 11)
    expected = generate(model, prompts, 40, seed=7, **SAMPLED)
    assert all(map(torch.equal, generate(model, prompts, 40, seed=7, **SAMPLED, **options), expected))
    assert not any(map(torch.equal, generate(model, prompts, 40, seed=8, **SAMPLED, **options), expected))


def test_the_same_seed_gives_the_same_tokens_in_every_batch_and_row():
    model = random_model()
    prompts = prompts_of(5, 11, 3, 1)
    alone = [generate(model, [prompt], 30, seed=seed, **SAMPLED)[0] for prompt, seed in zip(prompts, (7, 7, 8, 9))]
    assert all(map(torch.equal, generate(model, prompts, 30, seed=[7, 7, 8, 9], **SAMPLED), alone))
    assert all(map(torch.equal, generate(model, prompts[::-1], 30, seed=(9, 8, 7, 7), **SAMPLED), alone[::-1]))
    assert all(map(torch.equal, generate(model, prompts[:2], 30, seed=7, **SAMPLED), alone[:2]))
    longer = generate(model, prompts, 50, seed=[7, 7, 8, 9], num_samples=2, **SAMPLED)
    assert all(torch.equal(row[: len(short)], short) for row, short in zip(longer[::2], alone))
    assert not any(torch.equal(row[: len(short)], short) for row, short in zip(longer[1::2], alone))


def test_without_a_seed_rows_and_calls_differ():
    model = random_model()
    prompt = prompts_of(5)
    rows = [*generate(model, prompt * 3, 40, temperature=1.0), *generate(model, prompt, 40, temperature=1.0, num_samples=2)]
    assert len({tuple(row.tolist()) for row in rows}) == 5


def test_without_a_seed_the_seed_of_pytorch_is_used():
    model, prompts, rows = random_model(), prompts_of(5), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rows.append(generate(model, prompts, 20, temperature=1.0)[0])
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("options", [{}, SAMPLED | {"seed": 3}, SAMPLED | {"seed": 3, "use_cache": False}], ids=str)
def test_logprobs_are_those_of_the_model(options):
    """Before penalty, temperature and all else: the tokens are scored again in one pass."""
    model = random_model()
    prompts = prompts_of(5, 12)
    rows, logprobs = generate(model, prompts, 20, num_samples=2, return_logprobs=True, **options)

    for prompt, row, actual in zip([prompts[0]] * 2 + [prompts[1]] * 2, rows, logprobs, strict=True):
        numerics.check(actual, lambda: scored(model.double(), prompt, row))
        assert actual.dtype == torch.float32


def test_logprobs_end_with_their_rows(ending):
    model, prompts, free, eos = ending
    options = {"eos": eos, "return_logprobs": True}
    rows, logprobs = generate(model, prompts, 30, **options)
    assert [len(row) for row in logprobs] == [len(cut(new, eos)) for new in free]
    longest = max(map(len, logprobs))
    ids = torch.tensor([prompt[-2:] for prompt in prompts])
    tokens, table = generate(model, ids, 30, **options)
    assert table.shape == (4, tokens.shape[1] - 2)
    for row, new in zip(table, tokens[:, 2:].tolist()):
        assert (row[: len(cut(new, eos))] < 0).all() and (row[len(cut(new, eos)) :] == 0).all()
    steps = list(stream(model, prompts, 30, **options))
    assert len(steps) == longest and all(torch.equal(steps[0][1][i], row[0]) for i, row in enumerate(logprobs))


def test_no_tokens_and_their_logprobs():
    model = random_model()
    ids = random_ids(model, 2, 4)
    tokens, logprobs = generate(model, ids, 0, return_logprobs=True)
    assert torch.equal(tokens, ids) and logprobs.shape == (2, 0)
    rows, logprobs = generate(model, ids.tolist(), 0, return_logprobs=True)
    assert [len(row) for row in (*rows, *logprobs)] == [4, 4, 0, 0]
