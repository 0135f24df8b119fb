"""Checkpoint folders: what they may say and hold, where it is read from, and that everything else is an error that names it."""

import contextlib
import json
import os
import re
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_fuzz import CONFIGS
from models import random_ids, random_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastgpt import GPT, GPTConfig, SequenceClassifier, generate
from fastgpt.checkpoints import transformers_format
from fastgpt.checkpoints.families import FAMILIES
from fastgpt.model.rope import Rope
from fastgpt.schema import REQUIRED
from fastgpt.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
VALID = {f"{i} {config['model_type']}": config for i, config in enumerate(CONFIGS)}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", LLAMA)


LLAMA = next(config for config in CONFIGS if config["model_type"] == "llama")
GPT2 = next(config for config in CONFIGS if config["model_type"] == "gpt2")


def write(folder: Path, config: dict) -> Path:
    """A checkpoint with that config.json and random weights."""
    GPT(GPTConfig(**FAMILIES[config["model_type"]].config_from(config))).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def shard(folder: Path, **changes) -> None:
    """Divides the weights into a.safetensors and b.safetensors; changes: of weight_map, by the name with _ for dots."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: ("a", "b")[i % 2] + ".safetensors" for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        save_file({name: x for name, x in weights.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map | changes}))


def raises(message: str, error=ValueError):
    return pytest.raises(error, match=message)


# config.json


@pytest.mark.parametrize("case", VALID)
def test_every_entry_is_checked_and_named(case):
    """Of every family, whatever an entry is: it is accepted, or named, it or one that it does not fit."""
    config = VALID[case]
    family = FAMILIES[config["model_type"]]
    partners = "layer_types|sliding_window|hidden_size|head_dim|n_embd|num_key_value_heads|embd_pdrop|rope_|max_position|fields"
    garbage = [
        {"a": 1}, [[]], [None], "x", "8", True, None, 0, -1, 2**80, -(10**300), 1e300, 1e-300, 0.0, -1.5, [], {}, "\ud800", [1e300] * 4,
    ]  # fmt: skip
    for name in family.schema:
        refused = 0
        for value in garbage:
            try:
                GPTConfig(**family.config_from(config | {name: value}))
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
    (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: expected null or no such entry, since it is not"),
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


# Rotations, as transformers computes them

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


def test_yarn_reaches_as_far_as_it_stretches():
    scaling = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}
    for context, expected in ((32, 128), (128, 128), (200, 200)):
        assert (
            FAMILIES["qwen2"].config_from(LLAMA | scaling | {"max_position_embeddings": context})["context_length"] == expected
        )


# Weights


def test_an_output_matrix_that_differs_is_used(tmp_path):
    """As transformers does, which warns as well."""
    for number, config in enumerate((LLAMA | {"tie_word_embeddings": True}, GPT2)):
        folder = write(tmp_path / str(number), config)
        tied = GPT.from_pretrained(folder)
        other = torch.randn(33, 16)
        edit_weights(folder, lambda weights: weights.update({"lm_head.weight": other}))
        with pytest.warns(UserWarning, match="lm_head.weight differs from the token embedding"):
            model = GPT.from_pretrained(folder)
        assert tied.config.tie_embeddings and not model.config.tie_embeddings and torch.equal(model.output.weight, other)
        model.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
        with warnings.catch_warnings(action="error"):
            assert torch.equal(GPT.from_pretrained(tmp_path / "again").output.weight, other)
            edit_weights(folder, lambda weights: weights.update({"lm_head.weight": tied.token_embedding.weight.detach()}))
            assert GPT.from_pretrained(folder).config.tie_embeddings


def test_a_tied_matrix_may_be_stored_under_either_name(tmp_path):
    folder = write(tmp_path, LLAMA | {"tie_word_embeddings": True})
    before = GPT.from_pretrained(folder)
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": weights.pop("model.embed_tokens.weight")}))
    after = GPT.from_pretrained(folder)
    assert after.output is None and torch.equal(after.token_embedding.weight, before.token_embedding.weight)


@torch.no_grad()
@pytest.mark.parametrize(
    "most, few", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float64)]
)
def test_weights_of_several_dtypes_become_what_most_numbers_are(most, few, folder):
    edit_weights(folder, lambda weights: weights.update({n: x.to(few if "norm" in n else most) for n, x in weights.items()}))
    model = GPT.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {most}
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all() and len(generate(model, [[1, 2]], 3)[0]) == 5
    assert GPT.from_pretrained(folder, dtype=torch.float32).norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64], ids=str
)
def test_other_dtypes_are_named(dtype, folder):
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"].to(dtype)}))
    for options in ({}, {"dtype": torch.float32}):
        with raises(
            "model.safetensors: model.norm.weight: expected dtype F64 or F32 or F16 or BF16, got .*: quantized weights"
        ):
            GPT.from_pretrained(folder, **options)


def test_numbers_that_are_not_finite_are_named(folder):
    edit_weights(folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"].view(-1)[77:78].fill_(torch.nan))
    with raises(
        "model.safetensors: model.layers.1.mlp.up_proj.weight: expected finite numbers in torch.float32, got NaN or infinity"
    ):
        GPT.from_pretrained(folder)
    edit_weights(folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"].view(-1)[77:78].fill_(1e30))
    with raises("up_proj.weight: expected finite numbers in torch.float16"):
        GPT.from_pretrained(folder, dtype=torch.float16)


def test_all_that_differs_is_named_at_once(folder):
    def edit(weights):
        for name in [name for name in weights if ".mlp." in name or "q_proj" in name]:
            del weights[name]
        weights |= {"extra": torch.ones(1), "model.norm.weight": torch.ones(5)}

    edit_weights(folder, edit)
    with raises(
        r"model.safetensors lacks weights: model.layers.0.mlp.down_proj.weight, .* and 3 more; "
        r"has unexpected weights: model.extra; has misshapen weights: model.norm.weight: expected shape \(16,\), got \(5,\)$"
    ):
        GPT.from_pretrained(folder)


def test_no_more_layers_are_built_than_are_stored(folder):
    """Whatever their numbers are."""
    edit_weights(folder, lambda weights: weights.update({"model.layers.59999.x": torch.ones(1)}))
    edit_config(folder, num_hidden_layers=60000)
    with raises(r"lacks weights: model.layers.2.input_layernorm.weight, .* more; has unexpected weights: model.layers.59999.x"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("shape", [(), (0,), (0, 16), (33,), (1, 33, 16)])
def test_matrices_of_any_shape_are_compared(shape, tmp_path):
    folder = write(tmp_path, LLAMA | {"tie_word_embeddings": True})
    wrong = {"model.embed_tokens.weight": torch.ones(shape), "lm_head.weight": torch.ones(shape)}
    edit_weights(folder, lambda weights: weights.update(wrong))
    with (
        warnings.catch_warnings(action="ignore"),
        raises(r"misshapen weights: .*model.embed_tokens.weight: expected shape \(33, 16\)"),
    ):
        GPT.from_pretrained(folder)


def test_a_weight_that_is_there_twice_is_named(folder):
    edit_weights(folder, lambda weights: weights.update({"norm.weight": weights["model.norm.weight"].clone()}))
    with raises("norm.weight: expected one weight of this name, got two"):
        GPT.from_pretrained(folder)


def header_with_a_name_twice(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    name = next(name for name in json.loads(header) if name != "__metadata__")
    header = header[:-1] + f", {json.dumps(name)}: {json.dumps(json.loads(header)[name])}}}".encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: b"", "is damaged"),
        (lambda data: data[:-1], "is damaged"),
        (lambda data: data + b"\0", "is damaged"),
        (lambda data: (2**63).to_bytes(8, "little") + data[8:], "is damaged"),
        (lambda data: data.replace(b'"F32"', b'"X32"', 1), "is damaged"),
        (lambda data: data[:100] + b"\xff" + data[101:], "is damaged"),
        (header_with_a_name_twice, r"\S+: expected one entry of this name, got two"),
    ],
)
def test_damaged_files_are_named(damage, message, folder):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with raises(f"^model: {path}:? {message}"):
        GPT.from_pretrained(folder)


def test_what_is_missing_is_said(folder):
    path = folder / "model.safetensors"
    path.rename(folder / "pytorch_model.bin")
    with raises("expected model.safetensors or .*found pytorch_model.bin: only safetensors are read", FileNotFoundError):
        GPT.from_pretrained(folder)
    (folder / "pytorch_model.bin").rename(folder / "training_state.pt")
    with raises("found training_state.pt: the training run there has saved no weights yet", FileNotFoundError):
        GPT.from_pretrained(folder)
    with raises("^model: expected a checkpoint folder, x+ is none: File name too long", FileNotFoundError):
        GPT.from_pretrained("x" * 5000)
    path.mkdir()
    with raises("expected model.safetensors or", FileNotFoundError):
        GPT.from_pretrained(folder)
    for wrong, error, message in (
        (folder / "config.json", FileNotFoundError, "does not exist or is not a folder"), (5, TypeError, "model: expected a path"),
        ("", ValueError, "model: expected a path, got an empty string"), ("a\0b", ValueError, "model: expected a path, got 'a"),
        ("\ud800", ValueError, "model: expected a path, got '"), (b"a", TypeError, "model: expected a path, got b'a'"),
    ):  # fmt: skip
        with raises(message, error):
            GPT.from_pretrained(wrong)


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_save_that_fails_leaves_the_folder_as_it_was(folder, tmp_path, monkeypatch):
    (folder / "generation_config.json").write_text('{"top_k": 7}')
    model, before = GPT.from_pretrained(folder), contents(folder)
    torch.nn.init.zeros_(model.norm.weight)

    def fails(error, message, **changed):
        with monkeypatch.context() as patch, raises(message, error):
            for name, value in changed.items():
                patch.setattr(*((transformers_format, name) if name == "save_file" else (model, name)), value)
            model.save_pretrained(folder)
        assert contents(folder) == before

    def full(weights, path, **options):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    fails(ValueError, "^generation_defaults.top_k: expected", generation_defaults={"top_k": np.array([5])})
    fails(
        ValueError, "^config.json: expected .*got object", checkpoint_config=model.checkpoint_config | {"x_token_id": object()}
    )
    fails(OSError, "^folder: expected a folder that can be written to, .* is none: I/O error: No space", save_file=full)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").mkdir()
    with raises("^folder: .* is none: generation_config.json in it is a folder", OSError):
        model.save_pretrained(folder)
    (folder / "generation_config.json").rmdir()
    del before["generation_config.json"]
    monkeypatch.setattr(model.norm, "weight", torch.nn.Parameter(model.norm.weight.to("meta")))
    fails(ValueError, "^model: expected weights, got model.norm.weight on the meta device")


def test_folders_that_cannot_be_written_to_are_named(folder, tmp_path):
    model = GPT.from_pretrained(folder)
    for wrong, error, message in (
        (folder / "config.json", OSError, "config.json is none: File exists"), ("/proc/nowhere", OSError, "nowhere is none: No such"),
        (folder / "config.json" / "x", OSError, "x is none: Not a directory"), ("x" * 5000, OSError, "is none: File name too long"),
        ("a\0b", ValueError, "expected a path, got 'a"), ("", ValueError, "expected a path"), (5, TypeError, "expected a path"),
    ):  # fmt: skip
        with raises("^folder: .*" + message, error):
            model.save_pretrained(wrong)
        with raises("^path: expected a (file|path)", (error, OSError)):
            Tokenizer.from_corpus("abc").save(folder if isinstance(wrong, Path) else wrong)


def test_numbers_of_numpy_are_saved(folder, tmp_path):
    model = GPT.from_pretrained(folder)
    given = {"temperature": np.float32(0.5), "top_k": np.int64(5), "top_p": np.float64(0.9), "eos": np.array([3, 4])}
    model.generation_defaults, model.checkpoint_config["pad_token_id"] = given, np.int64(1)
    model.save_pretrained(tmp_path / "again")
    again = GPT.from_pretrained(tmp_path / "again")
    assert again.generation_defaults == {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "eos": [3, 4]}
    assert again.checkpoint_config["pad_token_id"] == 1
    for eos in (np.int64(3), torch.tensor(3), [np.uint8(3)], (3,)):
        model.generation_defaults = {"eos": eos}
        model.save_pretrained(tmp_path / "again")
        assert GPT.from_pretrained(tmp_path / "again").generation_defaults == {"eos": [3]}


def test_arguments_are_named(folder):
    for dtype in ("float32", torch.int8, 5):
        with raises("^dtype: expected torch.float64 or .* or None, got", TypeError):
            GPT.from_pretrained(folder, dtype=dtype)
    for device in ("nowhere", [], "cpu:x"):
        with raises("^device: expected a device of this machine, got"):
            GPT.from_pretrained(folder, device=device)
    assert GPT.from_pretrained(folder, device="meta").norm.weight.is_meta


# Where files are


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/a.safetensors", "x/a.safetensors", "x\\a.safetensors", "C:a.safetensors", "a.safetensors\0", "a" * 300 + ".safetensors", "", "a.bin", 5, None]
)  # fmt: skip
def test_an_index_names_files_in_its_folder(name, folder):
    shard(folder, **{"model.norm.weight": name})
    (folder / "x").mkdir()
    for place in (folder.parent, folder / "x"):
        (place / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    with raises(
        r"index.json: weight_map.model.norm.weight: expected the plain name of a .safetensors file in this folder, got "
    ):
        GPT.from_pretrained(folder)


def test_shards_are_what_the_index_says(folder):
    weights = load_file(folder / "model.safetensors")
    shard(folder)
    assert torch.equal(GPT.from_pretrained(folder).norm.weight, weights["model.norm.weight"])
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[weight_map["model.norm.weight"]]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": other}}))
    with raises(f"{other} lacks weights: model.norm.weight, which model.safetensors.index.json says is in it"):
        GPT.from_pretrained(folder)
    for content, message in (
        ({}, "weight_map: expected a JSON object, got nothing"),
        ({"weight_map": {}}, "weight_map: expected at least"),
    ):
        index.write_text(json.dumps(content))
        with raises(f"index.json: {message}"):
            GPT.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_links_do_not_lead_out_of_the_folder(name, folder, tmp_path):
    (folder / "generation_config.json").write_text("{}")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with raises(f"{name}: expected a file in this folder, got a link to .*elsewhere"):
        GPT.from_pretrained(folder)
    (tmp_path / "elsewhere").rename(folder / "inside")
    (folder / name).unlink()
    (folder / name).symlink_to("inside")
    GPT.from_pretrained(folder)


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_hub_cache_are_followed(shared, folder, tmp_path):
    """CACHE/models--ID/snapshots/COMMIT/NAME leads to CACHE/models--ID/blobs/HASH, and that, maybe, to CACHE/blobs/HASH."""
    repository = tmp_path / "cache" / "models--someone--model"
    snapshot = repository / "snapshots" / "0123"
    for place in (snapshot, repository / "blobs", tmp_path / "cache" / "blobs"):
        place.mkdir(parents=True)
    for path in folder.iterdir():
        blob = repository / "blobs" / path.stem
        path.rename(tmp_path / "cache" / "blobs" / path.stem if shared else blob)
        if shared:
            blob.symlink_to(f"../../blobs/{path.stem}")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.stem}")
    assert GPT.from_pretrained(snapshot).config.vocab_size == 33


# Files that take another's place


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_saved_files_have_the_modes_of_files(umask, tmp_path):
    """Not those that safetensors gives its own; and one that is replaced keeps its mode, as when it is written into."""
    model = random_model()
    model.generation_defaults = {"temperature": 0.5}
    model.save_pretrained(tmp_path)
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert {path.name: mode_of(path) for path in tmp_path.iterdir()} == dict.fromkeys(names, 0o640)
    for name, mode in zip(names, (0o600, 0o444, 0o664)):
        (tmp_path / name).chmod(mode)
    model.save_pretrained(tmp_path)
    assert [mode_of(tmp_path / name) for name in names] == [0o600, 0o444, 0o664]
    assert GPT.from_pretrained(tmp_path).generation_defaults == {"temperature": 0.5}


def test_a_link_is_replaced_and_not_written_through(umask, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for name in ("new", "new.writing"):
        elsewhere.write_text("somebody's")
        elsewhere.chmod(0o600)
        (tmp_path / name).symlink_to(elsewhere)
        with transformers_format.replacing(tmp_path / "new") as temporary:
            temporary.write_text("mine")
        assert elsewhere.read_text() == "somebody's" and (tmp_path / "new").read_text() == "mine"
        assert not (tmp_path / "new").is_symlink() and mode_of(tmp_path / "new") == 0o640
        assert not os.path.lexists(tmp_path / "new.writing")
        (tmp_path / "new").unlink()


def test_where_there_are_no_modes(tmp_path, monkeypatch):
    def refuses(*args, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuses)
    monkeypatch.setattr(Path, "chmod", refuses)
    with transformers_format.replacing(tmp_path / "file") as temporary:
        temporary.write_text("mine")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_write_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "file"
    for content in (None, "before"):
        if content:
            path.write_text(content)
        with pytest.raises(OSError, match="No space"), transformers_format.replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")
        assert [file.read_text() for file in tmp_path.iterdir()] == ([content] if content else [])


@pytest.mark.parametrize("made_before", ["", "a", "a/b", "a/b/c"])
def test_a_save_that_fails_leaves_no_folder(made_before, tmp_path, monkeypatch):
    """But those that were there, empty or not."""

    def full(*args, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    (tmp_path / made_before).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(transformers_format, "save_file", full)
    with pytest.raises(OSError, match="folder: expected a folder that can be written to"):
        random_model().save_pretrained(tmp_path / "a" / "b" / "c")
    assert sorted(tmp_path.rglob("*")) == before


# The Hub


def test_hub(folder, monkeypatch, tmp_path):
    """An id that is no folder is downloaded, and what goes wrong is said in one sentence."""
    import huggingface_hub
    from huggingface_hub import errors

    asked = []

    def snapshot_download(name, allow_patterns, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert GPT.from_pretrained("someone/a-model.1").config.num_kv_heads == 2
    GPT.from_pretrained("someone/a-model.1", revision="v2")
    assert asked == [("someone/a-model.1", {"revision": None}), ("someone/a-model.1", {"revision": "v2"})]
    with raises("^revision: expected None for .*, which is a folder here", ValueError):
        GPT.from_pretrained(folder, revision="main")
    with raises("^revision: expected a string or None, got 5", TypeError):
        GPT.from_pretrained("someone/a-model.1", revision=5)

    def fail(error):
        def raise_it(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", raise_it)

    def of_kind(kind):
        return kind.__new__(kind)

    for error, reason in (
        (OSError("no route to host\nand much more"), "OSError: no route to host"),
        (of_kind(errors.GatedRepoError), "access must be asked for on its page, and then a login: hf auth login"),
        (of_kind(errors.RepositoryNotFoundError), "there is no such model, or it is private and needs a login: hf auth login"),
        (of_kind(errors.RevisionNotFoundError), "it has no revision 'v9'"),
        (errors.LocalEntryNotFoundError("x"), "it cannot be reached, and the model has not been downloaded before"),
        (errors.OfflineModeIsEnabled("x"), r"it is not asked in offline mode \(HF_HUB_OFFLINE\)"),
    ):
        fail(error)
        with raises(f"someone/a-model.1 is no folder, and the Hub did not give it: {reason}$", FileNotFoundError):
            GPT.from_pretrained("someone/a-model.1", revision="v9")
    with raises("expected a checkpoint folder, ./nowhere/else/at-all does not exist", FileNotFoundError):
        GPT.from_pretrained("./nowhere/else/at-all")


# generation_config.json


def test_generation_defaults_are_read_and_saved(folder, tmp_path):
    assert GPT.from_pretrained(folder).generation_defaults == {}
    stored = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 5, "eos_token_id": [2, 3], "bos_token_id": 1, "max_new_tokens": 7,
        "repetition_penalty": 1.1, "transformers_version": "4.40.0", "min_p": 0.05, "max_length": 20,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(stored))
    expected = {
        "temperature": 0.6, "top_p": 0.9, "top_k": 5, "min_p": 0.05, "eos": [2, 3], "max_new_tokens": 7, "repetition_penalty": 1.1,
    }  # fmt: skip
    model = GPT.from_pretrained(folder)
    assert model.generation_defaults == expected
    options = model.generation_defaults | {"seed": 1}
    assert len(generate(model, [[4, 5]], **options)) == 1  # they are names of its options
    model.save_pretrained(tmp_path / "again")
    again = GPT.from_pretrained(tmp_path / "again")
    assert again.generation_defaults == expected
    random_model().save_pretrained(tmp_path / "again")  # over it
    assert GPT.from_pretrained(tmp_path / "again").generation_defaults == {}


@pytest.mark.parametrize(
    "stored, expected",
    [
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"top_k": 0, "top_p": None, "eos_token_id": 2}, {"eos": [2]}),
        ({"eos_token_id": None, "_from_model_config": True}, {}),
    ],
)
def test_generation_defaults(stored, expected, folder, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps(stored))
    model = GPT.from_pretrained(folder)
    assert model.generation_defaults == expected
    model.save_pretrained(tmp_path / "again")
    assert GPT.from_pretrained(tmp_path / "again").generation_defaults == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"temperature": -1}', ": temperature: expected a finite number >= 0 or None, got -1$"),
        ('{"temperature": "hot"}', ": temperature: expected a finite number >= 0 or None, got 'hot'$"),
        ('{"repetition_penalty": 1e308}', ": repetition_penalty: expected a finite number >= 1e-100 .*, got 1e\\+308$"),
        ('{"top_k": 1.5}', ": top_k: expected an integer >= 0 .*, got 1.5$"),
        ('{"eos_token_id": [2, "x"]}', r": eos_token_id\[1\]: expected an integer .*, got 'x'$"),
        ('{"do_sample": 1}', ": do_sample: expected a bool, got 1$"),
        ('{"top_p": NaN}', ": top_p: expected a finite number, got nan$"),
        ("[1, 2", " is damaged: expected a JSON object"),
    ],
)
def test_a_wrong_generation_config_is_named(text, message, folder):
    (folder / "generation_config.json").write_text(text)
    with raises("model: .*generation_config.json" + message):
        GPT.from_pretrained(folder)


def test_wrong_defaults_are_not_saved(folder, tmp_path):
    model = GPT.from_pretrained(folder)
    for name, value in (("temperature", "hot"), ("nonsense", 1)):
        model.generation_defaults = {name: value}
        with raises(f"^generation_defaults.{name}: expected"):
            model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


# Heads


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id2label": {"x": "a"}}, "id2label: expected numbers with their names, got 'x': 'a'"),
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


# Progress


def test_progress_is_shown_where_someone_waits(folder, monkeypatch, capsys):
    GPT.from_pretrained(folder)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(transformers_format, "SHOW_PROGRESS", 1000)
    GPT.from_pretrained(folder)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    GPT.from_pretrained(folder)
    captured = capsys.readouterr()
    assert "loading: 100%" in captured.err and captured.out == ""


# All at once


def fuzz(folder, seed: int, configs: int, files: int) -> dict:
    command = [sys.executable, HERE / "checkpoint_fuzz.py", folder, seed, configs, files]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limiting memory needs Linux")
@pytest.mark.parametrize(
    "configs, files", [(1000, 250), pytest.param(10000, 2500, marks=pytest.mark.exhaustive)], ids=["short", "long"]
)
def test_damaged_checkpoints_load_or_say_what_is_wrong(configs, files, tmp_path):
    """Within a limit on memory: ValueError or OSError that names it, or a model whose logits are finite."""
    found = fuzz(tmp_path, configs, configs, files)
    assert not found["failures"], "\n".join(found["failures"][:5])
    assert found["configs"]["ValueError"] > configs / 2 and found["configs"]["loaded"] > configs / 20
    assert found["files"]["ValueError"] > files / 2 and found["files"]["loaded"] > files / 50


@torch.no_grad()
def test_what_is_saved_is_loaded(tmp_path):
    """Of an architecture of our own, with every field that its config.json can have."""
    model = GPT(GPTConfig(**FAMILIES["fastgpt"].config_from(CONFIGS[-1]))).eval()
    model.save_pretrained(tmp_path)
    again, ids = GPT.from_pretrained(tmp_path), random_ids(model, 2, 20)
    assert again.config == model.config and torch.equal(again(ids), model(ids))
