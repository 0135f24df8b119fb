"""config.json: every entry is checked, and an error names it; rotations are those of transformers."""

import contextlib
import json
import re

import pytest
import torch
from checkpoint_files import GPT2, LLAMA, edit_config, raises, write
from checkpoint_fuzz import CONFIGS
from models import random_model

from fastgpt import GPT, EncoderConfig, EncoderDecoderConfig, GPTConfig, SequenceClassifier
from fastgpt.checkpoints.families import FAMILIES
from fastgpt.model.rope import Rope
from fastgpt.schema import REQUIRED

VALID = {f"{i} {config['model_type']}": config for i, config in enumerate(CONFIGS)}


@pytest.mark.parametrize("case", VALID)
def test_every_entry_is_checked_and_named(case):
    """Of every family, whatever an entry is: it is accepted, or named, it or one that it does not fit."""
    config = VALID[case]
    family = FAMILIES[config["model_type"]]
    partners = "layer_types|sliding_window|hidden_size|head_dim|n_embd|dim|num_key_value_heads|embd_pdrop|rope_|max_position|fields|embedding_dropout|no_rope_layers"
    garbage = [
        {"a": 1}, [[]], [None], "x", "8", True, None, 0, -1, 2**80, -(10**300), 1e300, 1e-300, 0.0, -1.5, [], {}, "\ud800", [1e300] * 4,
    ]  # fmt: skip
    classes = {"encoder": EncoderConfig, "decoder": GPTConfig}
    for name in family.schema:
        refused = 0
        for value in garbage:
            try:
                fields = family.config_from(config | {name: value})
                for part, of_part in family.parts(fields):
                    (EncoderConfig if family.encoder or part == "encoder." else GPTConfig)(**of_part)
                if family.stacks:
                    EncoderDecoderConfig(**fields | {stack: classes[stack](**fields[stack]) for stack in classes})
            except ValueError as error:
                refused += 1
                assert re.match(f"({name}|{partners})[^:]*: expected ", str(error)) and len(str(error)) < 400
        assert refused > 5
    for name in config:
        if name in family.schema and family.schema[name].default is REQUIRED:
            with raises(f"^{name}: expected .*, got nothing$"):
                family.config_from({key: value for key, value in config.items() if key != name})


BAD_CONFIGS = [
    (LLAMA, {"num_attention_heads": 0}, "num_attention_heads: expected an integer >= 1 and .*, got 0$"),
    (LLAMA, {"num_attention_heads": "4"}, "num_attention_heads: expected an integer .*, got '4'"),
    (LLAMA, {"num_attention_heads": True}, "num_attention_heads: expected an integer .*, got True"),
    (LLAMA, {"hidden_size": None}, "hidden_size: expected an integer .*, got None"),
    (LLAMA, {"num_hidden_layers": 2147483648}, "num_hidden_layers: expected an integer .*, got 2147483648"),
    (LLAMA, {"vocab_size": 2147483648}, "vocab_size: expected an integer .*, got 2147483648"),
    (LLAMA, {"num_hidden_layers": 60000}, r"lacks weights: model.layers.2.input_layernorm.weight, .* and 539,977 more$"),
    (LLAMA, {"vocab_size": 2**31 - 1}, r"misshapen weights: lm_head.weight: expected shape \(2147483647, 16\), got \(33, 16\)"),
    (LLAMA, {"head_dim": 7}, "head_dim: expected an even number of rotated dimensions, 2 or more, got 7"),
    (LLAMA, {"rope_theta": 0}, "rope_theta: expected a finite number >= 1e-10 .*, got 0"),
    (LLAMA, {"rms_norm_eps": -1}, "rms_norm_eps: expected a finite number >= 1e-30 .*, got -1"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor: expected a finite number .*, got 0"),
    (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a value, which 'linear' needs, got None"),
    (LLAMA, {"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_scaling.rope_type: expected one of .*, got \['yarn'\]"),
    (LLAMA, {"rope_scaling": {"rope_type": "default", "mrope_section": [2]}}, "rope_scaling.mrope_section: expected one of the entries"),
    (
        LLAMA, {"rope_scaling": {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}},
        "rope_scaling: expected one rotation for all layers, got one for each of full_attention, sliding_attention",
    ),
    (
        LLAMA, {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        "rope_scaling.high_freq_factor: expected a number > low_frequency_factor=4, got 4",
    ),
    (LLAMA, {"layer_types": ["full_attention"]}, "layer_types: expected 2 of them, as many as num_hidden_layers"),
    (LLAMA, {"layer_types": ["full_attention", {}]}, r"layer_types\[1\]: expected one of .*, got {}"),
    (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config\.quant_method: expected one of .*, got 'fp8'"),
    (LLAMA, {"architectures": ["LlamaForQuestionAnswering"]}, "architectures: expected the architecture LlamaForCausalLM, got Llama"),
    (LLAMA, {"architectures": [["LlamaForCausalLM"]]}, r"architectures\[0\]: expected a string"),
    (LLAMA, {"model_type": ["llama"]}, "model_type: expected one of 'gpt2', 'llama', .*, got .'llama'.$"),
    (GPT2, {"n_embd": 17}, "n_embd: expected a multiple of n_head=2, got 17"),
    (GPT2, {"n_positions": 64}, r"misshapen weights: transformer.wpe.weight: expected shape \(64, 16\), got \(32, 16\)"),
]  # fmt: skip


@pytest.mark.parametrize("config, change, message", BAD_CONFIGS, ids=[message[:40] for _, _, message in BAD_CONFIGS])
def test_a_wrong_config_is_named(config, change, message, tmp_path):
    edit_config(write(tmp_path, config), **change)
    with raises(message) as caught:
        GPT.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"model: {tmp_path}")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"model_type": "llama", "head_dim": Infinity}', "config.json: head_dim: expected a finite number, got inf$"),
        (
            '{"rope_scaling": {"factor": [1, NaN]}}',
            r"config.json: rope_scaling.factor\[1\]: expected a finite number, got nan$",
        ),
        ('{"a": {"hidden_size": 1, "hidden_size": 2}}', "config.json: hidden_size: expected one entry of this name, got two$"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "config.json: vocab_size: expected a finite number, got inf$"),
        ("[" * 100000, "config.json is damaged: .* nested too deeply"),
        ("[]", "config.json is damaged: expected a JSON object .got a list"),
        ("", "config.json is damaged: expected a JSON object"),
        ("{}", "config.json: model_type: expected one of .*, got nothing"),
        ('{"model_type": "é"}', "config.json is damaged: .*utf-8"),
    ],
)
def test_json_is_read_strictly(text, message, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with raises(message):
        GPT.from_pretrained(tmp_path)


FIELDS = {"vocab_size": 9, "context_length": 9, "num_layers": 2, "num_heads": 2, "hidden_size": 16}

GARBAGE = [float("nan"), float("inf"), -1, "x", [], {}, object(), torch.ones(2), 2**80]


@pytest.mark.parametrize("fields", [{}, {"norm": "rms", "position": "rotary", "rope": Rope(8)}])
def test_a_configuration_is_checked_when_it_is_made(fields):
    for name in GPTConfig.__dataclass_fields__:
        for value in GARBAGE:
            if name == "norm_offset" and type(value) is int and value == -1:
                continue
            with pytest.raises((TypeError, ValueError), match=f"^{name}"):
                GPTConfig(**FIELDS | fields | {name: value})


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
def test_a_rotation_is_checked_when_it_is_made(kind):
    valid = {"dim": 4, "kind": kind, "original_context": 8, "short_factors": (1.0, 2.0), "long_factors": [2.0, 4.0]}
    rope = Rope(**valid)
    assert rope.long_factors == (2.0, 4.0) and hash(rope)
    for name in Rope.__dataclass_fields__:
        for value in GARBAGE:
            if name in ("short_factors", "long_factors") and value == [] and kind != "longrope":
                continue
            with pytest.raises((TypeError, ValueError), match=rf"^rope\.{name}"):
                Rope(**valid | {name: value})


SCALED = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"short_factor": [1.0 + i / 4 for i in range(8)], "long_factor": [2.0 + i for i in range(8)], "factor": 2.0},
}

YARN = [
    {"factor": 4.0}, {"factor": None, "original_max_position_embeddings": 64}, {"beta_fast": 4, "beta_slow": 2},
    {"mscale": 1.0, "mscale_all_dim": 0.5}, {"attention_factor": 1.5}, {"truncate": False}, {"beta_fast": 1e-3, "beta_slow": 1e-4},
    {"original_max_position_embeddings": 2**20}, {"beta_fast": 1, "beta_slow": 1, "truncate": False},
]  # fmt: skip


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    "kind, change", [*((kind, {}) for kind in SCALED), *(("yarn", change) for change in YARN)], ids=lambda x: str(x)
)
def test_rotations_are_those_of_transformers(kind, change, version):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALED[kind] | change
    config = {key: value for key, value in LLAMA.items() if not key.startswith("rope_")} | {
        "head_dim": 16,
        "max_position_embeddings": 128,
    }
    if version == 5:
        config["rope_parameters"] = {"rope_type": kind, "rope_theta": 5e4} | scaling
    else:
        config |= {"rope_scaling": {"type": kind} | scaling, "rope_theta": 5e4}
    rope = FAMILIES["llama"].config_from(json.loads(json.dumps(config)))["rope"]
    with contextlib.redirect_stderr(None):
        theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**json.loads(json.dumps(config))))
    torch.testing.assert_close(rope.frequencies(), theirs.inv_freq)
    assert rope.attention_factor == pytest.approx(theirs.attention_scaling)
    if kind == "longrope":
        theirs(torch.zeros(1), torch.arange(200)[None])
        torch.testing.assert_close(rope.frequencies(long=True), theirs.inv_freq)


def test_context_length_of_yarn_is_at_least_the_scaled_one():
    scaling = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}
    for context, expected in ((32, 128), (128, 128), (200, 200)):
        assert (
            FAMILIES["qwen2"].config_from(LLAMA | scaling | {"max_position_embeddings": context})["context_length"] == expected
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id2label": {"x": "a"}}, "id2label: expected label ids as keys and names as values, got 'x': 'a'"),
        ({"id2label": ["a"]}, "id2label: expected a JSON object or null, got"),
        ({"id2label": {"0": "a", "5": "b"}}, "id2label: expected a name for each of 0 to 1"),
        ({"id2label": None, "num_labels": 2**31}, "num_labels: expected an integer .*, got 2147483648"),
        ({"id2label": None, "num_labels": 2**16}, r"score.weight: expected shape \(65536, 64\), got \(2, 64\)"),
        ({"pad_token_id": "x"}, "pad_token_id: expected an integer"),
    ],
)
def test_a_wrong_head_is_named(change, message, tmp_path):
    SequenceClassifier(random_model(), 2).save_pretrained(tmp_path)
    edit_config(tmp_path, **change)
    with raises("model: .*" + message):
        SequenceClassifier.from_pretrained(tmp_path)
