"""Encoders: each sequence gets the states that it has alone, whatever it is packed with; gradients; errors."""

import pickle

import pytest
import torch
import torch.nn as nn
from models import random_encoder, random_ids
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt import Encoder, EncoderConfig, SequenceClassifier
from fastgpt.model.rope import Rope
from fastgpt.testing import numerics

BERT, ROBERTA = {}, {"first_position": 2}
MODERNBERT = {
    "norm_first": True, "norm_bias": False, "position": "rotary", "rope": Rope(16, theta=1e4), "local_rope": Rope(16, theta=100.0),
    "windows": (None, 4), "gated": True, "pooler_activation": None, "token_types": 0, "qkv_bias": False,
}  # fmt: skip
OTHERS = {"position": None, "embedding_norm": False, "num_kv_heads": 2, "qk_norm": True, "norm": "rms", "tie_embeddings": False}
FIELDS = pytest.mark.parametrize("fields", [BERT, ROBERTA, MODERNBERT, OTHERS], ids=["bert", "roberta", "modernbert", "others"])
LENGTHS = [20, 1, 13]


@FIELDS
def test_shapes_without_data(fields):
    """On the meta device and of FakeTensorMode, with gradients, packed and padded; on the meta device of classes, too."""

    def require_shapes(model, ids):
        for lengths in (None, LENGTHS):
            assert model(ids, lengths).shape == (3, 20, model.config.vocab_size)
        states = model.encode_packed(ids.flatten()[:34], LENGTHS)
        states.sum().backward()
        assert states.shape == (34, 64) and model.token_embedding.weight.grad.shape == model.token_embedding.weight.shape
        assert states.device == ids.device

    model = random_encoder(**fields).to("meta")
    require_shapes(model, torch.zeros(3, 20, dtype=torch.long, device="meta"))
    assert SequenceClassifier(model, 3)(torch.zeros(3, 20, dtype=torch.long, device="meta")).shape == (3, 3)
    with pytest.raises(ValueError, match="lengths: expected a list of integers for a model on the meta device, got a tensor"):
        model.encode(torch.zeros(3, 20, dtype=torch.long, device="meta"), torch.tensor(LENGTHS))
    with FakeTensorMode():
        require_shapes(Encoder(model.config), torch.zeros(3, 20, dtype=torch.long))


@pytest.mark.slow
@torch.no_grad()
@FIELDS
def test_compiled_as_a_whole(fields):
    model = random_encoder(**fields)
    ids = random_ids(model, 3, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in (None, LENGTHS):
        torch.testing.assert_close(compiled(ids, lengths), model(ids, lengths))


@torch.no_grad()
@FIELDS
def test_each_sequence_has_the_states_that_it_has_alone(fields):
    """Whatever the padding of a tensor is, and whatever comes before and after it."""
    model = random_encoder(**fields)
    ids = random_ids(model, 3, 20)
    other = ids.clone()
    for row, length in zip(other, LENGTHS):
        row[length:] = 7
    real = [row[:length] for row, length in zip(ids, LENGTHS)]
    actual = [
        torch.cat([row[:n] for row, n in zip(model.encode(x, LENGTHS), LENGTHS)]) for x in (ids, other)
    ]  # fmt: skip
    actual.append(model.encode_packed(torch.cat(real), LENGTHS))
    assert torch.equal(actual[0], actual[1]) and torch.equal(actual[1], actual[2])
    assert torch.equal(model.encode(ids, torch.tensor(LENGTHS)), model.encode(ids, LENGTHS))
    assert (model.encode(ids, LENGTHS)[1, 1:] == 0).all()
    logits, whole = model.logits(actual[0]), model.encode(ids)
    yardstick = numerics.simulate(
        lambda: (
            torch.cat([model.double().encode(row[None])[0] for row in real]),
            torch.cat([model(row[None])[0] for row in real]),
        )
    )
    numerics.check((actual[0], logits), yardstick)
    model.float()
    numerics.check(whole, lambda: torch.cat([model.double().encode(row[None]) for row in ids]))


@torch.no_grad()
@FIELDS
def test_each_token_sees_all_others(fields):
    model = random_encoder(**fields | {"windows": None, "local_rope": None})
    ids = random_ids(model, 1, 6)
    before = model.encode(ids)
    for j in range(6):
        changed = ids.clone()
        changed[0, j] = (changed[0, j] + 1) % 65
        assert ((model.encode(changed) - before).abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_types_and_first_positions():
    """Types shift the states; positions begin where first_position says, whose rows before are not read."""
    model = random_encoder(first_position=3)
    ids = random_ids(model, 2, 9)
    assert torch.equal(model(ids), model(ids, token_types=torch.zeros(2, 9, dtype=torch.int32)))
    assert (model(ids) - model(ids, token_types=torch.ones(2, 9).long())).abs().max() > 0.01
    before = model(ids)
    assert model.position_embedding.weight.shape[0] == 3 + 96
    model.position_embedding.weight[:3] = torch.nan
    model.position_embedding.weight[12:] = torch.nan
    assert torch.equal(model(ids), before)


@FIELDS
def test_gradients(fields):
    """Of packed sequences as of each alone."""
    model = random_encoder(**fields).double()
    ids = random_ids(model, 3, 20)
    weights = list(model.parameters())
    alone = sum(model(row[None, :n]).square().sum() for row, n in zip(ids, LENGTHS))
    expected = torch.autograd.grad(alone, weights)
    packed = model(ids, LENGTHS)[torch.arange(20) < torch.tensor(LENGTHS)[:, None]].square().sum()
    for name, found, wanted in zip(dict(model.named_parameters()), torch.autograd.grad(packed, weights), expected):
        torch.testing.assert_close(found, wanted, msg=name)
        assert found.abs().max() > 0, name


def test_dropout_is_of_training_only():
    model = random_encoder(dropout=0.5).train()
    ids = random_ids(model, 2, 9)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_modules_are_called():
    """Hooks and other classes of modules have their effect."""

    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = random_encoder(pooler=True)
    ids = random_ids(model, 1, 5)
    with torch.no_grad():
        before = model(ids)
        for module in (model.blocks[0].mlp_norm, model.blocks[1].attention.out, model.head.transform, model.token_embedding):
            handle = module.register_forward_hook(lambda module, inputs, output: output + 1)
            assert not torch.equal(model(ids), before), module
            handle.remove()
            assert torch.equal(model(ids), before)
        up = Shifted(64, 256)
        up.load_state_dict(model.blocks[0].mlp.up.state_dict())
        model.blocks[0].mlp.up = up
        assert not torch.equal(model(ids), before)


@torch.no_grad()
def test_copies_and_dtypes():
    model = random_encoder(**MODERNBERT)
    ids = random_ids(model, 2, 9)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), model(ids))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).dtype == torch.bfloat16
    assert model.to(torch.float16)(ids).dtype == torch.float16


TYPES = torch.zeros(2, 5, dtype=torch.long)
BAD = [
    (lambda model, ids: model([[1, 2]]), TypeError, "ids: expected a torch.Tensor, got list"),
    (lambda model, ids: model(ids[0]), ValueError, r"ids: expected shape \(B, T\)"),
    (lambda model, ids: model(ids.float()), TypeError, "ids: expected dtype torch.int64"),
    (lambda model, ids: model(ids + 61), ValueError, "ids: expected token ids from 0 to 64, got"),
    (lambda model, ids: model(ids.repeat(1, 20)), ValueError, r"ids: expected at most 96 tokens .*\(the context\), got 100"),
    (lambda model, ids: model(ids, [3]), ValueError, r"lengths: expected 2 lengths from 1 to 5 .*, got shape \(1,\)"),
    (lambda model, ids: model(ids, [0, 5]), ValueError, r"lengths: expected 2 lengths from 1 to 5 .*, got \[0, 5\]"),
    (lambda model, ids: model(ids, token_types=TYPES[:1]), ValueError, r"token_types: expected shape .*\(2, 5\)"),
    (lambda model, ids: model(ids, token_types=TYPES + 2), ValueError, "token_types: expected types from 0 to 1, got 2 to 2"),
    (lambda model, ids: model(ids, token_types=TYPES.float()), TypeError, "token_types: expected dtype torch.int64"),
    (lambda model, ids: random_encoder(token_types=0)(ids, token_types=TYPES), ValueError, "token_types: expected None for"),
    (lambda model, ids: random_encoder(masked_head=False)(ids), ValueError, "model: expected one with a masked-language head"),
    (lambda model, ids: model.encode_packed(ids[0], [2, 2]), ValueError, "lengths: expected integers >= 1 whose sum is 5"),
    (lambda model, ids: model.encode_packed(ids[0], [5, 0]), ValueError, "lengths: expected integers >= 1 whose sum is 5"),
    (lambda model, ids: model.encode_packed(ids[0], []), ValueError, "lengths: expected integers >= 1 whose sum is 5"),
    (lambda model, ids: model.encode_packed(ids[0], "5"), TypeError, "lengths: expected a list of integers, got '5'"),
    (lambda model, ids: Encoder(EncoderConfig(9, 9, 1, 1, 8, causal=True)), ValueError, "causal: expected False for an encoder"),
    (lambda model, ids: EncoderConfig(9, 9, 1, 1, 8, post_norms=True), ValueError, "post_norms: expected False for an encoder"),
    (lambda model, ids: EncoderConfig(9, 9, 1, 1, 8, position="absolute"), ValueError, "position: expected one of 'learned'"),
    (lambda model, ids: EncoderConfig(9, 9, 1, 1, 8, position=None, first_position=1), ValueError, "first_position: expected 0"),
    (lambda model, ids: EncoderConfig(9, 9, 1, 1, 8, pooling="max"), ValueError, "pooling: expected one of 'first', 'mean'"),
    (lambda model, ids: EncoderConfig(9, 9, 1, 1, 8, token_types=-1), ValueError, "token_types: expected an integer >= 0"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD, ids=[f"{i} {message[:40]}" for i, (*_, message) in enumerate(BAD)])
def test_errors(call, error, message):
    model = random_encoder()
    with pytest.raises(error, match=message):
        call(model, random_ids(model, 2, 5) % 60)
