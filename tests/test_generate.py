"""Generation: the cache changes no token; sampling does what its arguments say."""

import itertools
import statistics
import time

import pytest
import torch
from models import random_ids, random_model

from fastgpt import GPT
from fastgpt.cli import SHIPPED_MODEL
from fastgpt.generate import stream
from fastgpt.text import Tokenizer

SETTINGS = [
    # layers, heads, width, batch, prompt
    (1, 1, 16, 1, 1),
    (2, 2, 32, 3, 5),
    (3, 4, 64, 2, 17),
    (2, 8, 128, 4, 1),
    (4, 3, 96, 1, 40),
    (2, 1, 80, 2, 64),
]


@pytest.mark.parametrize("layers, heads, width, batch, prompt", SETTINGS)
def test_cached_and_uncached_tokens_are_identical(layers, heads, width, batch, prompt):
    for seed in range(3):
        model = random_model(layers=layers, heads=heads, width=width, context=128, seed=seed)
        ids = random_ids(model, batch, prompt, seed)
        cached, uncached = (model.generate(ids, 64, use_cache=use_cache) for use_cache in (True, False))
        assert torch.equal(cached, uncached)
        assert cached.shape == (batch, prompt + 64) and torch.equal(cached[:, :prompt], ids)
        assert len(cached[:, prompt:].unique()) > 3  # a model stuck on a token or two would prove little


def test_sampling_with_a_seed_is_the_same_with_and_without_the_cache():
    model = random_model()
    ids = random_ids(model, 2, 5)
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    first, again, uncached, other = (
        model.generate(ids, 40, seed=seed, use_cache=use_cache, **options)
        for seed, use_cache in ((7, True), (7, True), (7, False), (8, True))
    )
    assert torch.equal(first, again) and torch.equal(first, uncached) and not torch.equal(first, other)


def test_without_a_seed_samples_differ():
    model = random_model()
    ids = random_ids(model, 1, 5)
    assert not torch.equal(model.generate(ids, 40, temperature=1.0), model.generate(ids, 40, temperature=1.0))


def test_shipped_model_generates_300_identical_tokens():
    model = GPT.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    tokenizer = Tokenizer.load(SHIPPED_MODEL / "tokenizer.json")
    ids = torch.tensor([tokenizer.encode("ROMEO:\n")])
    cached, uncached = (model.generate(ids, 300, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the bound is for a CPU")
def test_cached_decoding_is_five_times_as_fast_at_200_tokens():
    model = GPT.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    ids = random_ids(model, 1, 190)

    def seconds_per_token(use_cache):
        """The median step of those around a context of 200 tokens."""
        times = []
        for _ in stream(model, ids, 21, use_cache=use_cache):
            times.append(time.perf_counter())
        return statistics.median(after - before for before, after in itertools.pairwise(times))

    seconds_per_token(True), seconds_per_token(False)  # warm up
    # In turns, so that a busy machine slows both.
    ratios = [seconds_per_token(False) / seconds_per_token(True) for _ in range(5)]
    assert statistics.median(ratios) >= 5, ratios


def test_shipped_model_writes_like_a_play():
    """Sampled text has lines of a play's length and speakers' names before their speeches."""
    model = GPT.from_pretrained(SHIPPED_MODEL)
    tokenizer = Tokenizer.load(SHIPPED_MODEL / "tokenizer.json")
    ids = torch.tensor([tokenizer.encode("\n")] * 8)
    texts = [tokenizer.decode(row) for row in model.generate(ids, 400, temperature=0.8, seed=range(8)).tolist()]
    lines = "\n".join(texts).splitlines()
    speakers = [line for line in lines if line.endswith(":") and line[0].isupper() and len(line) < 30]
    assert len(speakers) >= 8  # about one in 100 to 400 characters of the corpus
    spoken = [len(line) for line in lines if line and line not in speakers]
    assert 20 < sum(spoken) / len(spoken) < 60


def test_stream_yields_what_generate_returns_and_leaves_the_mode():
    model = random_model(dropout=0.3).train()
    ids = random_ids(model, 2, 4)
    new = torch.stack(list(stream(model, ids, 10)), dim=1)
    assert torch.equal(torch.cat([ids, new], dim=1), model.generate(ids, 10)) and model.training
    abandoned = stream(model, ids, 10)
    next(abandoned)
    abandoned.close()
    assert model.training


def test_no_new_tokens():
    model = random_model()
    ids = random_ids(model, 2, 4)
    assert torch.equal(model.generate(ids, 0), ids)


def test_the_context_can_be_filled():
    model = random_model(context=16)
    assert model.generate(random_ids(model, 1, 4), 12).shape == (1, 16)


# Errors

BAD = [
    ({"ids": "ROMEO"}, TypeError, "ids: expected a torch.Tensor or a list of prompts, got str"),
    ({"ids": [1, 2]}, TypeError, "ids: expected each prompt to be a list of integers or a 1-d tensor, got 1"),
    ({"ids": [[1, 2], "ROMEO"]}, TypeError, "ids: expected each prompt to be a list of integers .*, got 'ROMEO'"),
    ({"ids": [[1, 2.5]]}, TypeError, r"ids: expected each prompt to be a list of integers .*, got \[1, 2.5\]"),
    ({"ids": [[[1], [2]]]}, TypeError, r"ids: expected each prompt to be a list of integers .*, got \[\[1\], \[2\]\]"),
    ({"ids": [[2**70] * 90]}, TypeError, "ids: expected each prompt to be a list of integers .*, got a list"),
    ({"ids": [[1] * 97, [1]]}, ValueError, r"ids: expected prompts of at most 96 tokens \(the context\), got one of 97"),
    ({"ids": []}, ValueError, r"ids: expected at least one sequence, .* got shapes \[\]"),
    ({"ids": [[1], []]}, ValueError, r"ids: .* each of at least one token, got shapes \[\(1,\), \(0,\)\]"),
    ({"ids": [[1], [65]]}, ValueError, "ids: expected token ids from 0 to 64, got 65"),
    ({"ids": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, r"ids: .* each of at least one token, got shapes \[\(0,\)\]"),
    ({"ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"ids: expected shape \(B, T\).*, got shape \(3,\)"),
    ({"ids": torch.zeros(1, 3)}, TypeError, "ids: expected dtype torch.int64, got torch.float32"),
    ({"ids": torch.tensor([[1, 65]])}, ValueError, "ids: expected token ids from 0 to 64, got 65"),
    ({"ids": torch.tensor([[-1, 5]])}, ValueError, "ids: expected token ids from 0 to 64, got -1"),
    ({"max_new_tokens": -1}, ValueError, "max_new_tokens: expected an integer >= 0, got -1"),
    ({"max_new_tokens": 92}, ValueError, "max_new_tokens: expected .* context of 96 tokens, got 5 . 92"),
    ({"temperature": -0.1}, ValueError, "temperature: expected a number >= 0, got -0.1"),
    ({"temperature": float("nan")}, ValueError, "temperature: expected a number >= 0, got nan"),
    ({"window": 0}, ValueError, "window: expected an integer >= 1 or None, got 0"),
    ({"cache": "sliding"}, ValueError, "window: expected a number of tokens for a sliding cache, got None"),
    ({"cache": "ring"}, ValueError, "cache: expected one of 'contiguous', 'sliding', 'paged', got 'ring'"),
    ({"cache_dtype": torch.int32}, TypeError, "cache_dtype: expected torch.float32 .* got torch.int32"),
    ({"page_size": 0.5}, ValueError, "page_size: expected an integer >= 1, got 0.5"),
    ({"num_samples": 0}, ValueError, "num_samples: expected an integer >= 1, got 0"),
    ({"beams": 3}, TypeError, "unexpected keyword argument 'beams'"),
    ({"top_k": 0}, ValueError, "top_k: expected an integer >= 1 or None, got 0"),
    ({"top_p": 0.0}, ValueError, "top_p: expected 0 < top_p <= 1 or None, got 0.0"),
    ({"top_p": 1.5}, ValueError, "top_p: expected 0 < top_p <= 1 or None, got 1.5"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[message[:40] for _, _, message in BAD])
def test_errors(change, error, message):
    model = random_model()
    arguments = {"ids": random_ids(model, 1, 5), "max_new_tokens": 4} | change
    with pytest.raises(error, match=message):
        model.generate(**arguments)
