"""Checkpoints of encoders that transformers writes: the same states and logits, and what we write, transformers reads."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import GPT, Encoder, EncoderConfig, SequenceClassifier, TokenClassifier
from fastgpt.model.rope import Rope
from fastgpt.testing import numerics

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

COMMON = dict(
    vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=160,
)  # fmt: skip
DISTILBERT = dict(vocab_size=97, dim=64, hidden_dim=112, n_layers=3, n_heads=4, max_position_embeddings=160)
MODERNBERT = COMMON | dict(
    local_attention=32, num_hidden_layers=4, pad_token_id=0, bos_token_id=None, eos_token_id=None, cls_token_id=None,
    sep_token_id=None,
)  # fmt: skip
CONFIGS = {
    "bert": ("Bert", COMMON),
    "bert, tanh, untied": ("Bert", COMMON | dict(hidden_act="gelu_new", tie_word_embeddings=False, type_vocab_size=3)),
    "roberta": ("Roberta", COMMON | dict(type_vocab_size=1, layer_norm_eps=1e-5, hidden_act="relu")),
    "roberta, padding in the middle": ("Roberta", COMMON | dict(pad_token_id=5)),
    "xlm-roberta": ("XLMRoberta", COMMON),
    "distilbert": ("DistilBert", DISTILBERT),
    "distilbert, sinusoidal": ("DistilBert", DISTILBERT | dict(sinusoidal_pos_embds=True, activation="relu")),
    "modernbert": ("ModernBert", MODERNBERT),
    "modernbert, biases, narrow": (
        "ModernBert",
        MODERNBERT
        | dict(norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True, decoder_bias=False, local_attention=2)
        | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]),
    ),
    "modernbert, no windows": ("ModernBert", MODERNBERT | dict(layer_types=["full_attention"] * 4, tie_word_embeddings=False)),
}
CLASSES = ("Model", "ForMaskedLM")
LENGTHS = [150, 1, 40, 18]
IDS = torch.randint(6, 97, (4, 150), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(150) < torch.tensor(LENGTHS)[:, None]


@functools.cache
@torch.inference_mode(False)  # whichever test asks first
def theirs(case, kind):
    """A tiny model with random weights that are not what weights start from: biases and norms count."""
    family, settings = CONFIGS[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**json.loads(json.dumps(settings)))
    model = getattr(transformers, family + kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """case, class -> the folder that transformers wrote."""

    @functools.cache
    def write(case, kind):
        folder = tmp_path_factory.mktemp("checkpoint")
        theirs(case, kind).save_pretrained(folder)
        return folder

    return write


def of_tokens(model, types=None):
    """What a model of transformers returns for the tokens of IDS, (tokens, C or V), and its pooled states (4, C)."""
    pad = model.config.pad_token_id
    options = {} if types is None else {"token_type_ids": types}
    out = model(torch.where(MASK, IDS, pad), attention_mask=MASK.long(), **options)
    result = (out.logits if hasattr(out, "logits") else out.last_hidden_state)[MASK]
    pooled = getattr(out, "pooler_output", None)
    return (result,) if pooled is None else (result, pooled)


def ours(model, types=None):
    states = model.encode(IDS, LENGTHS, types)
    result = model.logits(states[MASK]) if model.config.masked_head else states[MASK]
    return (result,) if model.pooler is None else (result, model.pooler(states[:, 0]))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("case", CONFIGS)
def test_logits_and_states(case, kind, dtype, folders, tmp_path):
    type_ = type(theirs(case, kind))
    type_.from_pretrained(folders(case, kind), dtype=dtype).save_pretrained(tmp_path)  # weights rounded to the dtype
    oracle, model = type_.from_pretrained(tmp_path, dtype=torch.float64), Encoder.from_pretrained(tmp_path)
    assert model.first_weight.dtype == dtype and not model.training
    assert model.config.masked_head == (kind == "ForMaskedLM")
    assert model.config.pooler == (
        kind == "Model" and CONFIGS[case][0].endswith(("Bert", "Roberta")) and hasattr(oracle, "pooler")
    )
    with numerics.only_double_precision():
        yardstick = numerics.simulate(lambda: of_tokens(oracle), arithmetic=dtype)
    numerics.check(ours(model), yardstick)


@torch.no_grad()
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("case", ["bert", "bert, tanh, untied", "roberta, padding in the middle"])
def test_types_of_tokens(case, kind, folders):
    types = (torch.arange(150) > 70).long().expand(4, -1)
    oracle = type(theirs(case, kind)).from_pretrained(folders(case, kind), dtype=torch.float64)
    with numerics.only_double_precision():
        yardstick = numerics.simulate(lambda: of_tokens(oracle, types))
    model = Encoder.from_pretrained(folders(case, kind))
    numerics.check(ours(model, types), yardstick)
    assert (ours(model)[0] - ours(model, types)[0]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("case", CONFIGS)
def test_transformers_reads_our_checkpoints(case, kind, folders, tmp_path):
    model = Encoder.from_pretrained(folders(case, kind))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(theirs(case, kind)).__name__]
    automatic = transformers.AutoModelForMaskedLM if kind == "ForMaskedLM" else transformers.AutoModel
    again = automatic.from_pretrained(tmp_path)
    assert type(again) is type(theirs(case, kind))
    assert all(torch.equal(*pair) for pair in zip(of_tokens(again), of_tokens(theirs(case, kind)), strict=True))
    mine = Encoder.from_pretrained(tmp_path)
    assert mine.config == model.config
    assert all(torch.equal(*pair) for pair in zip(mine.parameters(), model.parameters(), strict=True))


@torch.no_grad()
def test_names_of_the_first_checkpoints(folders, tmp_path):
    """gamma and beta of norms, buffers, the head of the next sentence, and the output matrix and its bias a second time."""
    model, folder = Encoder.from_pretrained(folders("bert", "ForMaskedLM")), folders("bert", "ForMaskedLM")
    weights = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in weights.items()
    }
    old |= {
        "bert.embeddings.position_ids": torch.arange(160)[None],
        "cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": weights["cls.predictions.bias"].clone(),
        "cls.seq_relationship.weight": torch.ones(2, 64), "cls.seq_relationship.bias": torch.ones(2),
        "bert.pooler.dense.weight": torch.ones(64, 64), "bert.pooler.dense.bias": torch.ones(64),
    }  # fmt: skip
    save_file(old, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertForPreTraining"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = Encoder.from_pretrained(tmp_path)
    assert again.config.pooler and again.config.masked_head
    assert torch.equal(again(IDS, LENGTHS), model(IDS, LENGTHS))


def test_a_classifier_ignores_what_it_does_not_read(folders, tmp_path):
    """The masked-language head and, of classified tokens, the pooler, which are in many files."""
    folder = folders("bert", "ForMaskedLM")
    weights = load_file(folder / "model.safetensors")
    weights |= {"classifier.weight": torch.ones(2, 64), "classifier.bias": torch.ones(2)}
    pooler = {"bert.pooler.dense.weight": torch.ones(64, 64), "bert.pooler.dense.bias": torch.ones(64)}
    save_file(weights | pooler, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for head, loader in (("ForSequenceClassification", SequenceClassifier), ("ForTokenClassification", TokenClassifier)):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [f"Bert{head}"]}))
        model = loader.from_pretrained(tmp_path)
        assert model(IDS, LENGTHS).shape[-1] == 2
        assert model.transform is None or (model.transform.dense.bias == 1).all()


def test_quantized(tmp_path):
    """Matrices of 8 bits, but for positions and types; they are written and read again."""
    config = transformers.BertConfig(**COMMON | dict(intermediate_size=128))
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "plain")
    model, plain = (Encoder.from_pretrained(tmp_path / "plain", weights=weights) for weights in ("int8", None))
    found, expected = model(IDS, LENGTHS)[MASK], plain(IDS, LENGTHS)[MASK]
    assert 1e-4 < (found - expected).abs().mean() / expected.abs().mean() < 0.05
    model.save_pretrained(tmp_path)
    assert torch.equal(Encoder.from_pretrained(tmp_path)(IDS, LENGTHS)[MASK], found)


def test_other_mixtures_are_stored_as_our_own(tmp_path):
    config = EncoderConfig(
        97, 64, 2, 4, 32, norm="rms", position="rotary", rope=Rope(8), norm_first=True, windows=(8, None), num_kv_heads=2,
        masked_head=True, pooler=True, token_types=3, qk_norm=True,
    )  # fmt: skip
    model = Encoder(config).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fastgpt_encoder"
    again = Encoder.from_pretrained(tmp_path)
    assert again.config == config
    assert torch.equal(again(IDS[:, :60]), model(IDS[:, :60]))


BAD = [
    (GPT, "bert", {}, "model_type: expected a decoder, got 'bert', which fastgpt.Encoder loads"),
    (Encoder, "bert", {"model_type": "gpt2"}, "model_type: expected an encoder, got 'gpt2', which fastgpt.GPT loads"),
    (
        SequenceClassifier,
        "bert",
        {},
        "expected the architecture BertForSequenceClassification, got BertForMaskedLM, which fastgpt.Encoder",
    ),
    (
        Encoder,
        "bert",
        {"architectures": ["BertForTokenClassification"]},
        "BertForMaskedLM, got .* which fastgpt.TokenClassifier.from_pretrained loads",
    ),
    (Encoder, "bert", {"architectures": ["BertForQuestionAnswering"]}, "BertForMaskedLM, got BertForQuestionAnswering$"),
    (
        Encoder,
        "bert",
        {"position_embedding_type": "relative_key"},
        "position_embedding_type: expected 'absolute', got 'relative_key'",
    ),
    (Encoder, "bert", {"is_decoder": True}, "is_decoder: expected null .*, got True"),
    (Encoder, "bert", {"hidden_size": 62}, "hidden_size: expected a multiple of num_attention_heads=4, got 62"),
    (Encoder, "bert", {"num_hidden_layers": 4}, "lacks weights: bert.encoder.layer.3.attention.output.LayerNorm.bias"),
    (Encoder, "roberta", {"pad_token_id": 200}, r"max_position_embeddings: expected more than pad_token_id \+ 1, 201, got 160"),
    (Encoder, "roberta", {"pad_token_id": None}, "pad_token_id: expected an integer >= 0 .*, got None"),
    (Encoder, "distilbert", {"dim": 63}, "dim: expected a multiple of n_heads=4, got 63"),
    (Encoder, "modernbert", {"layer_types": ["full_attention"]}, "layer_types: expected 4 of them"),
    (Encoder, "modernbert", {"local_attention": 1}, "local_attention: expected an integer >= 2 .*, got 1"),
]


@pytest.mark.parametrize("loader, case, change, message", BAD, ids=[message[:40] for *_, message in BAD])
def test_what_cannot_be_loaded_is_named(loader, case, change, message, folders, tmp_path):
    folder = folders(case, "ForMaskedLM")
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        loader.from_pretrained(tmp_path)
