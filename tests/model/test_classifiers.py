"""Classification heads: transformers' logits, whatever way a batch comes; what we write, transformers reads; they learn."""

import functools
import json

import pytest
import torch
from models import random_encoder, random_ids, random_model

from fastgpt import GPT, Encoder, SequenceClassifier, TokenClassifier
from fastgpt.testing import numerics

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PAD = 96
COMMON = dict(
    vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=PAD,
)  # fmt: skip
ONE_KIND_OF_HEADS = {name: size for name, size in COMMON.items() if name != "num_key_value_heads"}
GPT2 = dict(
    vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None, pad_token_id=PAD
)  # fmt: skip
CONFIGS = {
    "GPT2": GPT2 | dict(num_labels=5),
    "Phi3": COMMON | dict(id2label={0: "bad", 1: "so so", 2: "good"}, label2id={"bad": 0, "so so": 1, "good": 2}),
    "Llama": COMMON,  # two labels, which config.json does not mention
    "Mistral": COMMON | dict(num_labels=1, sliding_window=8),
    "Qwen2": COMMON | dict(num_labels=3),
    "Qwen3": COMMON | dict(num_labels=3, head_dim=16, tie_word_embeddings=True),
    "Gemma": COMMON | dict(num_labels=3, head_dim=16),
    "Gemma2": COMMON | dict(num_labels=3, head_dim=16, sliding_window=8),
    "Phi": COMMON | dict(num_labels=3),
    "GPTNeoX": ONE_KIND_OF_HEADS | dict(num_labels=3),
    "Bert": ONE_KIND_OF_HEADS | dict(num_labels=3),
    "Roberta": ONE_KIND_OF_HEADS | dict(num_labels=3, max_position_embeddings=PAD + 1 + 64),
    "DistilBert": dict(
        vocab_size=97, dim=64, hidden_dim=112, n_layers=2, n_heads=4, max_position_embeddings=64, pad_token_id=PAD, num_labels=3
    ),
    "ModernBert": ONE_KIND_OF_HEADS | dict(num_labels=3, local_attention=8, cls_token_id=None, sep_token_id=None),
}
ENCODERS = ("Bert", "Roberta", "DistilBert", "ModernBert")
HEADS = {"ForSequenceClassification": SequenceClassifier, "ForTokenClassification": TokenClassifier}
SEQUENCES = [random_ids(random_model(layers=1), 1, length, seed=length)[0].tolist() for length in (7, 30, 1, 19)]
PADDED = torch.tensor([sequence + [PAD] * (30 - len(sequence)) for sequence in SEQUENCES])


@functools.cache
def theirs(family, head):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**CONFIGS[family])
    model = getattr(transformers, family + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family, head -> the folder that transformers wrote."""

    @functools.cache
    def write(family, head):
        folder = tmp_path_factory.mktemp("checkpoint")
        theirs(family, head).save_pretrained(folder)
        return folder

    return write


def their_logits(model, ids=PADDED):
    return model(ids, attention_mask=(ids != PAD).long()).logits


def of_tokens(logits):
    """Without those of padding, if they are of tokens: (tokens, num_labels)."""
    if logits.dim() == 2:
        return logits
    return torch.cat([row[: len(sequence)] for row, sequence in zip(logits, SEQUENCES)])


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", CONFIGS)
def test_logits(family, head, folders):
    model = HEADS[head].from_pretrained(folders(family, head))
    low = theirs(family, head)
    oracle = type(low).from_pretrained(folders(family, head), dtype=torch.float64)
    with numerics.only_double_precision():
        yardstick = numerics.simulate(lambda: of_tokens(their_logits(oracle)))
    lengths = [len(sequence) for sequence in SEQUENCES]
    for logits in (model(SEQUENCES), model(PADDED), model(PADDED, lengths), model(PADDED, torch.tensor(lengths))):
        numerics.check(of_tokens(logits), yardstick)
    assert logits.shape == ((4, model.num_labels) if logits.dim() == 2 else (4, 30, model.num_labels))
    assert model.id2label == low.config.id2label and model.pad_token_id == PAD and not model.training
    whole = torch.tensor(SEQUENCES[1:2])  # the one without padding
    with numerics.only_double_precision():
        yardstick = numerics.simulate(lambda: their_logits(oracle, whole))
    numerics.check(model(whole), yardstick)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["Phi3", *ENCODERS])
def test_logits_in_bfloat16(family, head, folders, tmp_path):
    low = type(theirs(family, head)).from_pretrained(folders(family, head), dtype=torch.bfloat16)
    low.save_pretrained(tmp_path)  # weights rounded to the dtype
    actual = of_tokens(HEADS[head].from_pretrained(tmp_path)(PADDED))
    assert actual.dtype == torch.bfloat16
    oracle = type(low).from_pretrained(tmp_path, dtype=torch.float64)
    with numerics.only_double_precision():
        yardstick = numerics.simulate(lambda: of_tokens(their_logits(oracle)), arithmetic=torch.bfloat16)
    numerics.check(actual, yardstick)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_reads_our_checkpoints(family, head, folders, tmp_path):
    model = HEADS[head].from_pretrained(folders(family, head))
    model.save_pretrained(tmp_path)
    again, before = type(theirs(family, head)).from_pretrained(tmp_path), theirs(family, head)
    assert torch.equal(their_logits(again), their_logits(before))
    for name in ("id2label", "label2id", "pad_token_id", "num_labels", "problem_type", "tie_word_embeddings"):
        assert getattr(again.config, name) == getattr(before.config, name), name
    ours = HEADS[head].from_pretrained(tmp_path)
    assert ours.config == model.config and ours.id2label == model.id2label
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), model.parameters(), strict=True))


def test_dropout_of_a_token_head_is_kept(folders, tmp_path):
    model = TokenClassifier.from_pretrained(folders("GPT2", "ForTokenClassification"))
    assert model.dropout == 0.1  # transformers' default
    TokenClassifier(model.model, 5, dropout=0.4).save_pretrained(tmp_path)
    assert TokenClassifier.from_pretrained(tmp_path).dropout == 0.4
    assert transformers.GPT2ForTokenClassification.from_pretrained(tmp_path).dropout.p == 0.4
    model.train()
    assert not torch.equal(model(PADDED), model(PADDED))


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_states_that_an_encoder_pools(head, tmp_path):
    """ModernBERT by the mean of all tokens, and types of tokens of BERT."""
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(**CONFIGS["ModernBert"], classifier_pooling="mean")
    by_mean, types, mask = getattr(transformers, f"ModernBert{head}")(config), PADDED % 2, (PADDED != PAD).long()
    for model, their_types, our_types in (
        (by_mean, {}, {}),
        (theirs("Bert", head), {"token_type_ids": types}, {"token_types": types}),
    ):
        model.eval().save_pretrained(tmp_path)
        oracle = type(model).from_pretrained(tmp_path, dtype=torch.float64)
        with numerics.only_double_precision():
            yardstick = numerics.simulate(lambda: of_tokens(oracle(PADDED, attention_mask=mask, **their_types).logits))
        numerics.check(of_tokens(HEADS[head].from_pretrained(tmp_path)(PADDED, **our_types)), yardstick)


def test_a_classifier_begins_with_the_pooler(tmp_path):
    encoder = random_encoder(pooler=True)
    model = SequenceClassifier(encoder, 3)
    assert torch.equal(model.transform.dense.weight, encoder.pooler.dense.weight)
    model.save_pretrained(tmp_path)  # as BERT, which has it once
    again = SequenceClassifier.from_pretrained(tmp_path)
    assert again.model.pooler is None and torch.equal(again(SEQUENCES), model.eval()(SEQUENCES))
    assert type(encoder) is Encoder and encoder(torch.ones(1, 3).long()).shape == (1, 3, 65)


@pytest.mark.parametrize("name", ["Bert", "DistilBert"])
def test_dropout_of_a_sequence_head_is_kept(name, folders, tmp_path):
    model = SequenceClassifier.from_pretrained(folders(name, "ForSequenceClassification"))
    assert model.dropout == (0.2 if name == "DistilBert" else 0.1)  # transformers' defaults
    model.dropout = 0.4
    model.save_pretrained(tmp_path)
    assert SequenceClassifier.from_pretrained(tmp_path).dropout == 0.4
    assert getattr(transformers, f"{name}ForSequenceClassification").from_pretrained(tmp_path).dropout.p == 0.4
    model.train()
    assert not torch.equal(model(PADDED), model(PADDED))


# On a model of one's own


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_a_language_model_gets_a_head(head, tied, tmp_path):
    language_model = random_model(tie_embeddings=tied)
    model = HEADS[head](language_model, 2, id2label={0: "no", 1: "yes"}, pad_token_id=64)
    model.save_pretrained(tmp_path)
    again = HEADS[head].from_pretrained(tmp_path)
    assert again.id2label == {0: "no", 1: "yes"} and again.pad_token_id == 64
    assert torch.equal(again(SEQUENCES), model.eval()(SEQUENCES))
    assert language_model(PADDED[:, :1] % 65).shape == (4, 1, 65)  # which is one as before


BODIES = [
    lambda: random_model(), lambda: random_model(causal=False), lambda: random_encoder(token_types=0, masked_head=False),
    lambda: random_encoder(token_types=0, masked_head=False, norm_first=True, pooler_activation=None),
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=["causal", "not causal", "bert", "modernbert"])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_every_weight(head, body):
    model = HEADS[head](body(), 3).train()
    logits = model(SEQUENCES)
    targets = torch.randint(3, logits.shape[:-1], generator=torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_a_classifier_learns(causal):
    """Whether a 1 stands anywhere in a sequence of other digits."""
    torch.manual_seed(0)
    model = SequenceClassifier(GPT(random_model(width=32, vocabulary=10, layers=1, causal=causal).config), 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        ids = torch.randint(10, (64, 8))
        loss = torch.nn.functional.cross_entropy(model(ids), (ids == 1).any(1).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = torch.randint(10, (200, 8))
    assert (model(ids).argmax(-1) == (ids == 1).any(1)).float().mean() > 0.95


@torch.no_grad()
def test_an_encoder_is_classified_by_the_mean_of_its_tokens(tmp_path):
    encoder = random_model(causal=False, position=None)
    model = SequenceClassifier(encoder, 3, pad_token_id=64)
    sequences = [[7, 8, 9, 10], [8, 1, 8]]
    expected = torch.stack([encoder.encode(torch.tensor([x]))[0].mean(0) for x in sequences]) @ model.score.weight.T
    torch.testing.assert_close(model(sequences), expected)
    torch.testing.assert_close(model([x[::-1] for x in sequences]), expected)  # without positions, in any order
    torch.testing.assert_close(model(torch.tensor([[7, 8, 9, 10], [8, 1, 8, 64]])), expected)
    model.save_pretrained(tmp_path)
    again = SequenceClassifier.from_pretrained(tmp_path)
    assert again.config == model.config and torch.equal(again(sequences), model(sequences))


# Errors


@pytest.mark.parametrize(
    "load, head, message",
    [
        (
            GPT,
            "ForSequenceClassification",
            "GPT2LMHeadModel, got GPT2ForSequenceClassification, which .*SequenceClassifier.from_pretrained loads",
        ),
        (
            TokenClassifier,
            "ForSequenceClassification",
            "expected the architecture GPT2ForTokenClassification, got GPT2ForSequence",
        ),
        (
            SequenceClassifier,
            "ForTokenClassification",
            "got GPT2ForTokenClassification, which fastgpt.TokenClassifier.from_pretrained loads",
        ),
    ],
)
def test_another_head(load, head, message, folders):
    with pytest.raises(ValueError, match=message):
        load.from_pretrained(folders("GPT2", head))


def test_a_language_model_is_no_classifier(tmp_path):
    random_model().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="ForSequenceClassification, got GPT2LMHeadModel, which fastgpt.GPT.from_pretrained loads"
    ):
        SequenceClassifier.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for architectures, message in ((None, "lacks weights: score.weight$"), (["GPT2Odd"], "Classification, got GPT2Odd$")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        with pytest.raises(ValueError, match=message):
            SequenceClassifier.from_pretrained(tmp_path)


def test_another_number_of_labels(folders, tmp_path):
    SequenceClassifier.from_pretrained(folders("GPT2", "ForSequenceClassification")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(ValueError, match=r"score.weight: expected shape \(2, 64\), got \(5, 64\)"):
        SequenceClassifier.from_pretrained(tmp_path)


BAD = [
    (lambda: SequenceClassifier(random_model(), 0), ValueError, "num_labels: expected an integer >= 1 and .*, got 0"),
    (lambda: SequenceClassifier(random_model(), 2, id2label={1: "a"}), ValueError, "id2label: expected a name for each of 0"),
    (
        lambda: TokenClassifier(random_model(), 2, dropout=1.0),
        ValueError,
        "dropout: expected a finite number >= 0 and < 1, got 1.0",
    ),
    (lambda: TokenClassifier(random_model(), 2)([[1], []]), ValueError, "ids: expected .* each of at least one token"),
    (lambda: TokenClassifier(random_model(), 2)([[1, 65]]), ValueError, "ids: expected token ids from 0 to 64, got 65"),
    (lambda: TokenClassifier(random_model(), 2)([[1] * 97]), ValueError, "ids: expected at most 96 tokens"),
    (
        lambda: SequenceClassifier(random_model(), 2)(torch.ones(1, 2).long(), token_types=torch.ones(1, 2).long()),
        ValueError,
        "token_types: expected None, or",
    ),
    (
        lambda: TokenClassifier(random_encoder(), 2)([[1, 2]], token_types=torch.ones(1, 2).long()),
        ValueError,
        "token_types: expected None, or ids",
    ),
    (lambda: SequenceClassifier(random_model(), 2)([[1]], [1]), ValueError, "lengths: expected None for a list of sequences"),
    (lambda: SequenceClassifier(random_model(), 2)(torch.ones(2, 3).long(), [0, 3]), ValueError, "lengths: expected 2 lengths"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message[:40] for _, _, message in BAD])
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
