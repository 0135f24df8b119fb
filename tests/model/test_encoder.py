"""Encoder mode: every token sees every other, and no padding."""

import pytest
import torch
from models import random_ids, random_model

from fastgpt import generate
from fastgpt.generation.generate import stream
from fastgpt.model.rope import Rope
from fastgpt.testing import numerics

POSITIONS = [{"position": "learned"}, {"position": "sinusoidal"}, {"position": None}, {"position": "rotary", "rope": Rope(16)}]


def encoder(**fields):
    return random_model(causal=False, **fields)


@torch.no_grad()
def test_without_positions_tokens_are_a_set():
    """Permuted tokens give the states permuted; with positions they do not, nor if causal."""
    ids = random_ids(encoder(), 2, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    model = encoder(position=None)
    numerics.check(model.encode(ids[:, order]), lambda: model.double().encode(ids)[:, order])
    others = [encoder(**fields) for fields in POSITIONS if fields["position"]] + [random_model(position=None)]
    for model in others:
        assert (model.encode(ids[:, order]) - model.encode(ids)[:, order]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("fields", POSITIONS, ids=lambda fields: str(fields["position"]))
def test_each_token_sees_all_others(fields):
    """A change of any token reaches the state of every token; of a causal model, those from there on."""
    for model in (encoder(**fields), random_model(**fields)):
        ids = random_ids(model, 1, 6)
        before = model.encode(ids)
        for j in range(6):
            changed = ids.clone()
            changed[0, j] = (changed[0, j] + 1) % 65
            reached = ((model.encode(changed) - before).abs().amax(-1) > 1e-3)[0].tolist()
            assert reached == [not model.config.causal or i >= j for i in range(6)]


@torch.no_grad()
@pytest.mark.parametrize("fields", POSITIONS, ids=lambda fields: str(fields["position"]))
def test_a_window_is_on_both_sides(fields):
    """A change of a token reaches those within its window in one layer, and as far again in the next."""
    model = encoder(layers=2, windows=(3, 2), **fields)
    ids = random_ids(model, 1, 9)
    before = model.encode(ids)
    for j in range(9):
        changed = ids.clone()
        changed[0, j] = (changed[0, j] + 1) % 65
        reached = ((model.encode(changed) - before).abs().amax(-1) > 1e-3)[0].tolist()
        assert reached == [abs(i - j) <= 3 for i in range(9)]
    padded, last = model.encode(torch.cat([ids, ids], 1), [9])[:, :9], model.hidden(ids, last_only=True)
    numerics.check((padded, last), lambda: (model.double().encode(ids), model.double().hidden(ids)[:, -1:]))


@torch.no_grad()
@pytest.mark.parametrize("fields", POSITIONS, ids=lambda fields: str(fields["position"]))
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(causal, fields):
    """Sequences of a padded batch get the logits that each has alone, whatever the padding is."""
    model = random_model(causal=causal, **fields)
    ids, lengths = random_ids(model, 3, 20), [20, 1, 13]
    other = ids.clone()
    for row, length in zip(other, lengths):
        row[length:] = 7

    def alone(model):
        return torch.cat([model(ids[b : b + 1, :n])[0] for b, n in enumerate(lengths)])

    yardstick = numerics.simulate(lambda: alone(model.double()))
    model.float()
    for padded in (ids, other):
        logits = model(padded, lengths=lengths)
        of_tokens = torch.cat([row[:n] for row, n in zip(logits, lengths)])
        numerics.check(of_tokens, yardstick)
    assert torch.equal(model(ids, lengths=torch.tensor(lengths)), model(ids, lengths=lengths))
    if not causal:
        assert (model(ids) - model(other))[1, 0].abs().max() > 1e-3  # without lengths it is no padding


def test_gradients_do_not_reach_padding():
    model = encoder(position=None)
    ids = torch.tensor([[1, 2, 3, 60, 61]])
    model(ids, lengths=[3])[:, :3].square().sum().backward()
    # The output matrix is the embedding: what is left of the logits' gradient is not the tokens'.
    model.zero_grad()
    model.encode(ids, [3])[:, :3].square().sum().backward()
    reached = model.token_embedding.weight.grad.abs().amax(1) > 0
    assert reached.nonzero().squeeze(1).tolist() == [1, 2, 3]


def test_hidden_states_determine_the_logits():
    model = encoder(tie_embeddings=False)
    ids = random_ids(model, 2, 9)
    with torch.no_grad():
        logits, states = model(ids, lengths=[9, 4], output_hidden_states=True)
        assert torch.equal(states[-1], model.encode(ids, [9, 4]))
        torch.testing.assert_close(states[-1] @ model.output.weight.T, logits)


BAD = [
    (lambda model, ids: generate(model, ids, 3), "model: expected a causal model for generation .*, got one with causal=False"),
    (lambda model, ids: generate(model, ids, 3, use_cache=False), "model: expected a causal model for generation"),
    (lambda model, ids: stream(model, ids, 3), "model: expected a causal model for generation"),
    (lambda model, ids: model.new_cache(2), "model: expected a causal model for generation or a KV cache"),
    (lambda model, ids: model(ids, cache=random_model().new_cache(2)), "model: expected a causal model"),
    (lambda model, ids: model(ids, lengths=[3]), r"lengths: expected 2 lengths from 1 to 5 .*, got shape \(1,\)"),
    (lambda model, ids: model(ids, lengths=[0, 3]), r"lengths: expected 2 lengths from 1 to 5 .*, got \[0, 3\]"),
    (lambda model, ids: model(ids, lengths=[3, 6]), r"lengths: expected 2 lengths from 1 to 5 .*, got \[3, 6\]"),
    (lambda model, ids: random_model()(ids, random_model().new_cache(2), lengths=[1, 2]), "lengths.*: expected None with"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_errors(call, message):
    model = encoder()
    with pytest.raises(ValueError, match=message):
        call(model, random_ids(model, 2, 5))


@pytest.mark.parametrize("lengths", [3, [1.0, 2.0], torch.tensor([1.0, 2.0])])
def test_lengths_of_another_type(lengths):
    model = encoder()
    with pytest.raises(TypeError, match="lengths: expected .*integers, got"):
        model(random_ids(model, 2, 5), lengths=lengths)
