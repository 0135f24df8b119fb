"""Checkpoints of encoder-decoders that transformers writes: the same logits and tokens, and what we write, transformers reads."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastgpt
from fastgpt import GPT, Encoder, EncoderDecoder, SequenceClassifier
from fastgpt.testing import numerics

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

COMMON = dict(
    vocab_size=97, d_model=64, d_kv=12, d_ff=112, num_layers=3, num_decoder_layers=2, num_heads=4, decoder_start_token_id=0,
    relative_attention_num_buckets=10, relative_attention_max_distance=24, eos_token_id=None,
)  # fmt: skip
UNTIED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=5)
CONFIGS = {
    "t5": ("T5", COMMON),
    "t5, version 1.1": ("T5", COMMON | UNTIED),
    "t5, gated, tied, not scaled": (
        "T5", COMMON | dict(feed_forward_proj="gated-silu", tie_word_embeddings=False, num_layers=2)
    ),
    "mt5": ("MT5", COMMON | UNTIED),
}  # fmt: skip
LENGTHS = [70, 1, 40, 18]
IDS = torch.randint(3, 97, (4, 70), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(70) < torch.tensor(LENGTHS)[:, None]
TARGET = torch.randint(3, 97, (4, 60), generator=torch.Generator().manual_seed(1))
PROMPTS = [row[:n].tolist() for row, n in zip(IDS, LENGTHS)]


@functools.cache
@torch.inference_mode(False)  # whichever test asks first
def theirs(case):
    """A tiny model with random weights that are not what weights start from: norms count, and tokens vary."""
    family, settings = CONFIGS[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**json.loads(json.dumps(settings)))
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    if "1.1" in case or family == "MT5":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(97, 64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            in_a_block = parameter.dim() >= 2 and ".block." in name
            parameter.add_(torch.randn_like(parameter), alpha=1.0 if "relative" in name else 0.4 if in_a_block else 0.1)
        model.shared.weight.mul_(0.3)  # so that tokens vary
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """case -> the folder that transformers wrote."""

    @functools.cache
    def write(case):
        folder = tmp_path_factory.mktemp("checkpoint")
        theirs(case).save_pretrained(folder)
        return folder

    return write


def of_both(model):
    """What a model of transformers returns for IDS and TARGET: logits, and states without padding."""
    out = model(torch.where(MASK, IDS, 0), attention_mask=MASK.long(), decoder_input_ids=TARGET, use_cache=False)
    return out.logits, out.encoder_last_hidden_state[MASK]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CONFIGS)
def test_logits_and_states(case, dtype, folders, tmp_path):
    """Also where the decoder's tokens pass through a cache, all at once, and one at a time."""
    type_ = type(theirs(case))
    type_.from_pretrained(folders(case), dtype=dtype).save_pretrained(tmp_path)  # weights rounded to the dtype
    oracle, model = type_.from_pretrained(tmp_path, dtype=torch.float64), EncoderDecoder.from_pretrained(tmp_path)
    assert model.first_weight.dtype == dtype and not model.training
    with numerics.only_double_precision():
        logits, states = numerics.simulate(lambda: of_both(oracle), arithmetic=dtype)
    found = model.encode(IDS, LENGTHS)
    numerics.check((model(IDS, TARGET, LENGTHS), found[MASK]), (logits, states))
    given = {"encoder_states": found, "encoder_lengths": LENGTHS}
    numerics.check(model.decoder(TARGET, model.decoder.new_cache(4, **given)), logits)
    cache = model.decoder.new_cache(4, 60, kind="paged", page_size=4, **given)
    numerics.check(torch.cat([model.decoder(ids, cache) for ids in TARGET.split(1, 1)], 1), logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["t5", "t5, version 1.1", "mt5"])
def test_the_encoder_alone(case, dtype, folders, tmp_path):
    """Of a folder that has only that, and of one that has both."""
    family = CONFIGS[case][0]
    type_ = getattr(transformers, f"{family}EncoderModel")
    type_.from_pretrained(folders(case), dtype=dtype).save_pretrained(tmp_path / "alone")
    oracle, model = type_.from_pretrained(tmp_path / "alone", dtype=torch.float64), Encoder.from_pretrained(tmp_path / "alone")
    with numerics.only_double_precision():
        yardstick = numerics.simulate(
            lambda: oracle(torch.where(MASK, IDS, 0), attention_mask=MASK.long()).last_hidden_state[MASK], arithmetic=dtype
        )
    found = model.encode(IDS, LENGTHS)
    numerics.check(found[MASK], yardstick)
    assert torch.equal(Encoder.from_pretrained(folders(case), dtype=dtype).encode(IDS, LENGTHS), found)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["model_type"] == family.lower() and config["architectures"] == [f"{family}EncoderModel"]
    again = type_.from_pretrained(tmp_path / "again", dtype=dtype)
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), type_.from_pretrained(tmp_path / "alone").parameters()))
    assert Encoder.from_pretrained(tmp_path / "again").config == model.config


@torch.no_grad()
def their_tokens(case, prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    out = theirs(case).generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None)
    return out.tolist()


KINDS = [
    {},
    {"cache": "paged", "page_size": 4},
    {"use_cache": False},
    {"speculate": "prompt"},
    {"num_samples": 1, "window": 200},
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CONFIGS)
def test_greedy_tokens(case, folders):
    """Of a single input and of a ragged batch, in every kind of cache that has keys in order, and without one."""
    model = EncoderDecoder.from_pretrained(folders(case))
    for prompts in (PROMPTS[:1], PROMPTS):
        expected = their_tokens(case, prompts)
        assert len({tuple(row) for row in expected}) == len(prompts) and len(set(expected[0])) > 5  # that depends on something
        for options in KINDS:
            found = fastgpt.generate(model, prompts, 64, eos=None, **options)
            assert [row.tolist() for row in found] == expected, options


@torch.no_grad()
@pytest.mark.parametrize("case", CONFIGS)
def test_transformers_reads_our_checkpoints(case, folders, tmp_path):
    model = EncoderDecoder.from_pretrained(folders(case))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(again) is type(theirs(case))
    assert all(torch.equal(*pair) for pair in zip(of_both(again), of_both(theirs(case))))
    ours = EncoderDecoder.from_pretrained(tmp_path)
    assert ours.config == model.config
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), model.parameters(), strict=True))


def test_files_with_copies(folders, tmp_path):
    """Of the token embedding, and the output matrix where it is tied; and a bias of cross-attention, which nothing reads."""
    weights = load_file(folders("t5") / "model.safetensors")
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        weights[f"{name}.weight"] = weights["shared.weight"].clone()
    weights["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(10, 4)
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((folders("t5") / "config.json").read_text()) | {"n_positions": 512}
    del config["scale_decoder_outputs"], config["decoder_start_token_id"]  # as earlier versions wrote it
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, expected = EncoderDecoder.from_pretrained(tmp_path), EncoderDecoder.from_pretrained(folders("t5"))
    assert model.config == expected.config and model.config.decoder.logit_scale == 0.125
    assert torch.equal(model(IDS, TARGET), expected(IDS, TARGET))


def test_quantized(folders, tmp_path):
    config = transformers.T5Config(**COMMON | dict(d_ff=128, d_kv=16))
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "plain")
    model, plain = (EncoderDecoder.from_pretrained(tmp_path / "plain", weights=weights) for weights in ("int8", None))
    found, expected = model(IDS, TARGET), plain(IDS, TARGET)
    assert 1e-4 < (found - expected).abs().mean() / expected.abs().mean() < 0.05
    model.save_pretrained(tmp_path)
    assert torch.equal(EncoderDecoder.from_pretrained(tmp_path)(IDS, TARGET), found)


BAD = [
    (GPT, {}, "model_type: expected a decoder, got 't5', which fastgpt.EncoderDecoder loads"),
    (EncoderDecoder, {"model_type": "gpt2"}, "model_type: expected an encoder-decoder, got 'gpt2', which fastgpt.GPT loads"),
    (
        EncoderDecoder,
        {"architectures": ["T5EncoderModel"]},
        "expected an encoder-decoder, got 't5', which fastgpt.Encoder loads",
    ),
    (
        EncoderDecoder,
        {"architectures": ["T5ForQuestionAnswering"]},
        "expected the architecture T5ForConditionalGeneration, got T5ForQuestionAnswering$",
    ),
    (SequenceClassifier, {}, "model_type: expected a decoder or an encoder, got 't5', an encoder-decoder"),
    (EncoderDecoder, {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj: expected one of 'silu', .*, got 'gated-tanh'"),
    (EncoderDecoder, {"num_layers": 4}, "lacks weights: encoder.block.3.layer.0.SelfAttention.k.weight"),
    (EncoderDecoder, {"num_decoder_layers": 70}, "lacks weights: decoder.block.2.* and 879 more"),
    (EncoderDecoder, {"relative_attention_num_buckets": 3}, "relative_attention_num_buckets: expected at least 4, .*, got 3"),
    (
        EncoderDecoder,
        {"relative_attention_max_distance": 5},
        "relative_attention_max_distance: expected more than 5, .*, got 5",
    ),
    (EncoderDecoder, {"decoder_start_token_id": 97}, "decoder_start_token_id: expected a token below vocab_size=97, got 97"),
    (Encoder, {"d_kv": 600}, "head_dim: expected at most 576, got 600"),
]


@pytest.mark.parametrize("loader, change, message", BAD, ids=[message[:40] for *_, message in BAD])
def test_what_cannot_be_loaded_is_named(loader, change, message, folders, tmp_path):
    save_file(load_file(folders("t5") / "model.safetensors"), tmp_path / "model.safetensors")
    config = json.loads((folders("t5") / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        loader.from_pretrained(tmp_path)
