"""Weights: what may be stored in which form, and what is missing, unexpected, misshapen or damaged is named."""

import json
import sys
import warnings

import pytest
import torch
from checkpoint_files import GPT2, LLAMA, edit_config, edit_weights, raises, write

from fastgpt import GPT, generate
from fastgpt.checkpoints import loading


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
def test_mixed_dtypes_load_as_the_most_frequent_one(most, few, folder):
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
            "model.safetensors: model.norm.weight: expected dtype F64 or F32 or F16 or BF16, got .*, which no quantization_config"
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


def test_all_differences_are_named_at_once(folder):
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


def test_duplicate_weights_are_named(folder):
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


def test_arguments_are_named(folder):
    for dtype in ("float32", torch.int8, 5):
        with raises("^dtype: expected torch.float64 or .* or None, got", TypeError):
            GPT.from_pretrained(folder, dtype=dtype)
    for device in ("nowhere", [], "cpu:x"):
        with raises("^device: expected a device of this machine, got"):
            GPT.from_pretrained(folder, device=device)
    assert GPT.from_pretrained(folder, device="meta").norm.weight.is_meta


def test_progress_is_shown_where_someone_waits(folder, monkeypatch, capsys):
    GPT.from_pretrained(folder)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(loading, "SHOW_PROGRESS", 1000)
    GPT.from_pretrained(folder)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    GPT.from_pretrained(folder)
    captured = capsys.readouterr()
    assert "loading: 100%" in captured.err and captured.out == ""
