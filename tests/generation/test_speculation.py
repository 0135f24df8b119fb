"""Speculation changes no token and no bit of a log-probability; it only makes more than one token of a pass."""

import random

import pytest
import torch
from models import random_ids, random_model

import fastgpt
from fastgpt import generate
from fastgpt.model.rope import Rope

LLAMA = {"num_kv_heads": 2, "norm": "rms", "activation": "silu", "gated": True, "position": "rotary", "rope": Rope(dim=16)}
MODELS = {
    "gpt2": {},
    "llama": LLAMA,
    "windows": LLAMA | {"windows": (None, 7)},
    "softcap": {"attention_softcap": 5.0, "logit_softcap": 3.0, "num_kv_heads": 1},
}


class Repeating(torch.nn.Module):
    """A processor that makes rows repeat themselves, with state of its own: the number of tokens."""

    def forward(self, ids, logits):
        logits[:, 3] -= 0.1 * ids.shape[1]
        return logits.scatter_add(1, ids[:, -8:], torch.full((len(ids), min(8, ids.shape[1])), 2.0))


def random_case(rng, speculates=True):
    """A model, prompts and options of `generate`."""
    name = rng.choice(list(MODELS))
    vocabulary = rng.choice([5, 17, 65])  # few tokens repeat themselves
    model = random_model(vocabulary=vocabulary, context=80, seed=rng.randrange(4), **MODELS[name])
    model = model.to(rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    if rng.random() < 0.15:
        for module in model.blocks.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(fastgpt.quantize(module.weight, "int8"), requires_grad=False)
    period = rng.randrange(2, 9)
    prompts = [
        (random_ids(model, 1, period, seed=rng.randrange(99))[0].tolist() * 9)[: rng.randrange(1, 24)]
        for _ in range(rng.choice([1, 1, 1, 2, 3, 5]))
    ]
    cache = rng.choice(["contiguous", "contiguous", "paged", "sliding"])
    options = {
        "cache": cache, "cache_dtype": rng.choice([None, None, torch.int8, torch.float8_e4m3fn]),
        "window": rng.choice([3, 6, 20]) if cache == "sliding" else rng.choice([None, None, 9]),
        "page_size": rng.choice([1, 4, 16]), "eos": rng.choice([(), (), 1, (0, 2)]), "return_logprobs": True,
        "max_new_tokens": rng.choice([1, 2, 9, 30]), "num_samples": rng.choice([1, 1, 2]),
        "temperature": rng.choice([0, 0, 0.3, 1.0]), "seed": rng.randrange(9),
    }  # fmt: skip
    for rule, value in (
        ("top_k", 3), ("top_p", 0.8), ("min_p", 0.1), ("repetition_penalty", 1.2), ("no_repeat_ngram_size", 3),
        ("min_new_tokens", 5), ("logit_bias", {2: 1.5, 3: float("-inf")}), ("logits_processors", Repeating()),
    ):  # fmt: skip
        if rng.random() < 0.15:
            options[rule] = value
    draft = rng.choice(["prompt", "prompt", "prompt", "model"])
    if draft == "model":
        draft = random_model(layers=1, vocabulary=vocabulary, context=80, seed=0).to(model.first_weight.dtype)
    return model, prompts, options, {"speculate": draft, "speculate_tokens": rng.choice([None, 1, 2, 4, 7])}


def assert_same(model, prompts, options, speculation):
    expected, expected_logprobs = generate(model, prompts, **options)
    actual, logprobs = generate(model, prompts, **options, **speculation)
    for row in range(len(expected)):
        assert actual[row].tolist() == expected[row].tolist()
        assert torch.equal(logprobs[row], expected_logprobs[row])


@pytest.mark.parametrize("seed", range(30))
def test_tokens_and_logprobs_are_those_without_speculation(seed):
    rng = random.Random(seed)
    for _ in range(20):
        assert_same(*random_case(rng))
