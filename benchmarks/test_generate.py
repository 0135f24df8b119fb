"""Cached against uncached decoding: the time of one more token, by context length.

Uncached, a step computes the whole context again; cached, one token that looks back at it.
"""

import time

import pytest
import torch

from fastgpt import GPT
from fastgpt.cli import SHIPPED_MODEL

CONTEXTS = [64, 128, 200, 400]  # tokens, the new one included
ROUNDS = 150


@pytest.fixture(scope="module")
def model():
    return GPT.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)


@pytest.mark.parametrize("context", CONTEXTS)
def test_uncached_against_cached_step(benchmark, model, context):
    """Both in every round, one after the other: the speed of a shared machine drifts, and the ratio does not."""
    ids = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(1)
    cached_seconds = []
    with torch.inference_mode():
        model(ids[:, :-1], cache=cache)
        def cached():
            cache.truncate([context - 1])  # forget the token of the step before
            return model.logits(model.hidden(ids[:, -1:], cache)[:, -1]).argmax(-1)

        def uncached():
            return model.logits(model.hidden(ids)[:, -1]).argmax(-1)

        def time_cached():
            cached()  # as in a decode loop, the step before was a cached one
            start = time.perf_counter()
            cached()
            cached_seconds.append(time.perf_counter() - start)

        assert torch.equal(cached(), uncached())
        benchmark.pedantic(uncached, setup=time_cached, rounds=ROUNDS, warmup_rounds=10)
    benchmark.extra_info.update(context=context, cached_seconds=cached_seconds[-ROUNDS:])
