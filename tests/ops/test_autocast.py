"""Under autocast: generation with every kind of cache, and training."""

import pytest
import torch
from models import random_ids, random_model

from fastgpt import generate
from fastgpt.generation.generate import stream
from fastgpt.model.rope import Rope

RICH = dict(
    norm="rms", gated=True, activation="silu", qk_norm=True, post_norms=True, position="rotary", rope=Rope(16), num_kv_heads=2,
    tie_embeddings=False,
)  # fmt: skip
KINDS = [
    {},
    {"cache": "sliding", "window": 9},
    {"cache": "paged", "page_size": 4, "num_samples": 2},
    {"cache_dtype": torch.int8},
    {"cache_dtype": torch.float8_e4m3fn, "cache": "paged"},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("fields", [{}, RICH], ids=["gpt2", "rich"])
def test_generation(fields, options, dtype):
    model = random_model(**fields)
    ids = random_ids(model, 2, 12)
    with torch.autocast("cpu", dtype):
        tokens = generate(model, ids, 12, **options)
        cache = model.new_cache(2)
        logits = torch.cat([model(ids[:, :5], cache=cache), model(ids[:, 5:], cache=cache)], 1)
    assert cache.storage.k.dtype == dtype and tokens.shape == (2 * options.get("num_samples", 1), 24)
    error = (logits - model(ids)).abs().max()
    assert (
        error
        <= 2 * (model.to(dtype)(ids).float() - model.float()(ids)).abs().max() + torch.finfo(dtype).eps * logits.abs().max()
    )


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_stream_that_enters_and_leaves_it(options):
    """The cache keeps the dtype that it began with."""
    model = random_model(**RICH)
    for begin in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=begin):
            tokens = stream(model, random_ids(model, 2, 12), 12, **options)
        for i in range(12):
            with torch.autocast("cpu", torch.bfloat16, enabled=begin == (i not in (3, 4, 7))):
                assert next(tokens).shape[0] == 2 * options.get("num_samples", 1)


def test_cross_attention():
    model, states = random_model(cross_attention=True), torch.randn(2, 5, 64)
    ids = random_ids(model, 2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, ids, 6, encoder_states=states).shape == (2, 12)
        assert generate(model, ids, 6, encoder_states=states.bfloat16(), use_cache=False).shape == (2, 12)
    cache = model.new_cache(2, encoder_states=states)  # in fp32, as are its keys and values
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(ids, cache=cache).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training(dtype):
    model = random_model(layers=1, dropout=0.1, **RICH).train()
    with torch.autocast("cpu", dtype):
        loss = torch.nn.functional.cross_entropy(model(random_ids(model, 2, 9)).flatten(0, 1).float(), torch.arange(18))
    loss.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters())


@pytest.mark.parametrize("kind", ["contiguous", "sliding", "paged"])
def test_a_model_of_another_dtype_than_its_cache(kind):
    model = random_model()
    cache = model.new_cache(1, kind=kind, window=9)
    with torch.no_grad():
        model(random_ids(model, 1, 3), cache=cache)
        model.bfloat16()
        for tokens in (1, 2):
            with pytest.raises(TypeError, match="cache: expected dtype torch.bfloat16, as the model's weights"):
                model(random_ids(model, 1, tokens), cache=cache)
