"""Cross-attention: transformers' numbers, computed once for all steps, in every kind of cache; and what it is good for."""

from unittest import mock

import pytest
import torch
from models import random_ids, random_model

from fastgpt import GPT, GPTConfig, generate
from fastgpt.cache.create import CACHE_KINDS
from fastgpt.model.decoder import CrossAttention
from fastgpt.model.rope import Rope
from fastgpt.testing import numerics

LENGTHS = [7, 2, 5]
KINDS = [{"kind": kind, "window": 9 if kind == "sliding" else None} for kind in CACHE_KINDS]


def decoder(**fields):
    return random_model(cross_attention=True, **fields)


def random_states(batch=3, tokens=7, width=64, seed=5):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_cross_attention_is_that_of_transformers(lengths, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, states = decoder(), random_states()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)  # biases are no longer zero
    ids = random_ids(model, 3, 12)
    mask = torch.arange(7) < torch.tensor(lengths or [7] * 3).unsqueeze(1)
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    logits = model(ids, encoder_states=states, encoder_lengths=lengths)
    theirs.save_pretrained(tmp_path / "theirs")
    again = GPT.from_pretrained(tmp_path / "theirs")
    assert again.config == model.config and torch.equal(again(ids, encoder_states=states, encoder_lengths=lengths), logits)
    theirs.double()
    numerics.check(logits, lambda: theirs(ids, encoder_hidden_states=states.double(), encoder_attention_mask=mask).logits)


FAMILIES = {
    "gpt2": {},
    "grouped heads": {"num_kv_heads": 2, "qkv_bias": False},
    "llama's parts": {
        "norm": "rms", "gated": True, "activation": "silu", "position": "rotary", "rope": Rope(16), "num_kv_heads": 1,
        "qkv_bias": False, "post_norms": True, "attention_softcap": 5.0, "attention_scale": 0.2,
    },
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES)
def test_a_padded_context_is_the_contexts_one_by_one(fields):
    model, states = decoder(**fields), random_states()
    ids = random_ids(model, 3, 10)

    def alone(model, states):
        return torch.cat([model(ids[b : b + 1], encoder_states=states[b : b + 1, :n]) for b, n in enumerate(LENGTHS)])

    logits = model(ids, encoder_states=states, encoder_lengths=torch.tensor(LENGTHS))
    assert (model(ids, encoder_states=states) - logits)[1].abs().max() > 0.1  # without lengths it is no padding
    numerics.check(logits, lambda: alone(model.double(), states.double()))


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
@pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES)
def test_cached_logits_are_the_uncached_ones(fields, options):
    model, states = decoder(windows=(9, 9), **fields), random_states()
    ids = random_ids(model, 3, 20)
    cache = model.new_cache(3, encoder_states=states, encoder_lengths=LENGTHS, **options)
    logits = torch.cat([model(piece, cache=cache) for piece in ids.split([7, 1, 1, 11], dim=1)], dim=1)
    numerics.check(logits, lambda: model.double()(ids, encoder_states=states.double(), encoder_lengths=LENGTHS))


@pytest.mark.parametrize("kind", CACHE_KINDS)
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_cached_and_uncached_tokens_are_identical(lengths, kind):
    model, states = decoder(), random_states()
    prompts = [random_ids(model, 1, length)[0] for length in (4, 1, 9)]
    options = {"encoder_states": states, "encoder_lengths": lengths, "window": 30}
    cached, uncached = (generate(model, prompts, 40, **options, **way) for way in ({"cache": kind}, {"use_cache": False}))
    assert all(map(torch.equal, cached, uncached)) and len(cached[0].unique()) > 3
    other = generate(model, prompts, 40, **options | {"encoder_states": random_states(seed=6)})
    assert not any(map(torch.equal, cached, other))


@pytest.mark.parametrize("use_cache", [True, False])
def test_samples_share_a_context(use_cache):
    model, states = decoder(), random_states()
    ids = random_ids(model, 3, 4)
    options = {"temperature": 1.0, "use_cache": use_cache}
    samples = generate(model, ids, 12, num_samples=2, encoder_states=states, encoder_lengths=LENGTHS, seed=1, **options)
    assert samples.shape == (6, 16)
    # The likeliest continuation of each prompt is that of the prompt and its context alone.
    greedy = generate(model, ids, 12, num_samples=2, encoder_states=states, encoder_lengths=LENGTHS, use_cache=use_cache)
    for b, n in enumerate(LENGTHS):
        alone = generate(model, ids[b : b + 1], 12, encoder_states=states[b : b + 1, :n])
        assert torch.equal(greedy[2 * b : 2 * b + 2], alone.expand(2, -1))
    assert not torch.equal(samples[0], samples[1])


def test_a_context_is_read_once():
    """Its keys and values are computed before the first step, not at each."""
    model, states = decoder(), random_states()
    with mock.patch.object(CrossAttention, "read", autospec=True, side_effect=CrossAttention.read) as read:
        generate(model, random_ids(model, 3, 4), 20, encoder_states=states)
        assert read.call_count == model.config.num_layers
        generate(model, random_ids(model, 3, 4), 5, encoder_states=states, use_cache=False)
        assert read.call_count == 2 * model.config.num_layers


def test_gradients_reach_the_context():
    model, states = decoder().train(), random_states().requires_grad_()
    model(random_ids(model, 3, 4), encoder_states=states, encoder_lengths=LENGTHS).square().sum().backward()
    reached = states.grad.abs().amax(-1) > 0
    assert torch.equal(reached, torch.arange(7) < torch.tensor(LENGTHS).unsqueeze(1))
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.blocks.parameters())


def test_another_mixture_is_saved_as_our_own(tmp_path):
    model, states = decoder(norm="rms", position="sinusoidal"), random_states()
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    ids = random_ids(model, 3, 9)
    assert again.config == model.config and torch.equal(again(ids, encoder_states=states), model(ids, encoder_states=states))


@pytest.mark.slow
def test_an_encoder_and_a_decoder_learn_to_reverse_strings():
    """Strings of 4 to 6 of 8 letters: the decoder sees nothing of them but what it attends to."""
    torch.manual_seed(0)
    letters, longest, start = 8, 6, 8
    sizes = {"num_layers": 1, "num_heads": 4, "hidden_size": 48}
    encoder = GPT(GPTConfig(letters, longest, causal=False, **sizes))
    decoder = GPT(GPTConfig(letters + 1, longest + 1, cross_attention=True, **sizes))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()])

    def examples(n):
        """Strings, padded, their lengths, and the same reversed; padding there is -100."""
        strings, lengths = torch.randint(letters, (n, longest)), torch.randint(4, longest + 1, (n,))
        from_end = lengths.unsqueeze(1) - 1 - torch.arange(longest)
        reverses = strings.gather(1, from_end.clamp(min=0)).masked_fill(from_end < 0, -100)
        return strings, lengths, reverses

    steps, peak = 600, 6e-3
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * (1 - step / steps)
        strings, lengths, reverses = examples(64)
        inputs = torch.cat([torch.full((64, 1), start), reverses[:, :-1].clamp(min=0)], dim=1)
        logits = decoder(inputs, encoder_states=encoder.encode(strings, lengths), encoder_lengths=lengths)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), reverses.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    strings, lengths, reverses = examples(200)
    begin, context = torch.full((200, 1), start), encoder.eval().encode(strings, lengths)
    outputs = generate(decoder, begin, longest, encoder_states=context, encoder_lengths=lengths)[:, 1:]
    right = (outputs == reverses) | (reverses < 0)
    assert right.all(1).float().mean() > 0.95


BAD = [
    (lambda model, ids, states: model(ids), ValueError, r"encoder_states: expected a tensor \(B, S, C\) .*, got None"),
    (lambda model, ids, states: generate(model, ids, 3), ValueError, "encoder_states: expected a tensor"),
    (lambda model, ids, states: model(ids, cache=model.new_cache(3)), ValueError, "encoder_states: expected a tensor"),
    (
        lambda model, ids, states: model(ids, encoder_states=states[:2]),
        ValueError,
        "encoder_states: expected batch size 3, as ids has, got",
    ),
    (
        lambda model, ids, states: generate(model, ids, 3, encoder_states=states[:2]),
        ValueError,
        "encoder_states: expected batch size",
    ),
    (
        lambda model, ids, states: model(ids, encoder_states=states[..., :8]),
        ValueError,
        r"encoder_states: expected shape \(3, 7, 64\) ",
    ),
    (lambda model, ids, states: model(ids, encoder_states=states[0]), ValueError, "encoder_states: expected 3 dimensions"),
    (
        lambda model, ids, states: model(ids, encoder_states=states.double()),
        TypeError,
        "encoder_states: expected dtype torch.float32, got",
    ),
    (lambda model, ids, states: model(ids, encoder_states=[1]), TypeError, "encoder_states: expected a torch.Tensor, got list"),
    (
        lambda model, ids, states: model(ids, encoder_states=states, encoder_lengths=[1, 8, 2]),
        ValueError,
        "encoder_lengths: expected 3",
    ),
    (lambda model, ids, states: model(ids, encoder_lengths=[1, 2, 3]), ValueError, "encoder_lengths: expected None without"),
    (
        lambda model, ids, states: random_model()(ids, encoder_states=states),
        ValueError,
        "encoder_states: expected None for a model",
    ),
    (
        lambda model, ids, states: model(ids, model.new_cache(3, encoder_states=states), encoder_states=states),
        ValueError,
        "expected None with",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_errors(call, error, message):
    model = decoder()
    with pytest.raises(error, match=message):
        call(model, random_ids(model, 3, 5), random_states())
