"""Cached against uncached decoding: the time of one more token, by context length.

Uncached, a step computes the whole context again; cached, one token that looks back at it.
"""

import pytest
import torch

from fastgpt import GPT
from fastgpt.cli import SHIPPED_MODEL

CONTEXTS = [64, 128, 200, 400]  # tokens, the new one included


@pytest.fixture(scope="module")
def model():
    return GPT.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", ["cached", "uncached"])
def test_decode_step(benchmark, model, kind, context):
    ids = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(1)
    with torch.inference_mode():
        model(ids[:, :-1], cache=cache)
        past = cache.length

        def forget():
            cache.length = past
            cache.lengths.fill_(past)

        def cached():
            return model.logits(model.hidden(ids[:, -1:], cache)[:, -1]).argmax(-1)

        def uncached():
            return model.logits(model.hidden(ids)[:, -1]).argmax(-1)

        assert torch.equal(cached(), uncached())
        step = {"cached": cached, "uncached": uncached}[kind]
        benchmark.pedantic(step, setup=forget, rounds=200, warmup_rounds=20)
    benchmark.extra_info.update(kind=kind, context=context)
