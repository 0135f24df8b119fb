"""Folders that hold our blocks of quantized weights: what is refused, training, memory."""

import json
from unittest import mock

import pytest
import torch
from checkpoint_files import peak_of_loading, raises
from models import random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastgpt import GPT, GPTConfig
from fastgpt.checkpoints import transformers_format
from fastgpt.model.rope import Rope
from fastgpt.text.tokenizer import Tokenizer
from fastgpt.training.trainer import pretrained


def own(folder, **options):
    model = random_model(width=64, **options)
    model.save_pretrained(folder / "plain")
    GPT.from_pretrained(folder / "plain", weights="int4").save_pretrained(folder / "own")
    return folder / "own"


def with_metadata(folder, edit_packings):
    """Rewrites the file with other packings; None: without any."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        packings = json.loads(file.metadata()["fastgpt.packings"])
    edit_packings(packings)
    save_file(load_file(path), path, metadata={"format": "pt", "fastgpt.packings": json.dumps(packings)})


NAME = "transformer.h.1.mlp.c_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda packings: packings.pop(NAME), "c_proj.weight: expected dtype F64 or F32 or F16 or BF16, got U8, which no"),
        (
            lambda packings: packings.update({NAME: [3, 32, False, 0]}),
            r"c_proj.weight: expected rows of blocks .*\[3, 32, False, 0\]",
        ),
        (lambda packings: packings.update({NAME: [4, 0, False, 0]}), r"expected rows of blocks .*\[4, 0, False, 0\]"),
        (lambda packings: packings.update({NAME: [4, 32]}), r"expected rows of blocks .*\[4, 32\]"),
        (lambda packings: packings.update({NAME: {"bits": 4}}), "expected rows of blocks .*'bits'"),
        (
            lambda packings: packings.update({NAME: [8, 32, True, 0]}),
            r"got shape \(64, 144\) of U8 and \[8, 32, True, 0\]|misshapen",
        ),
        (lambda packings: packings.update({NAME: [8, 64, False, 0]}), r"got shape \(64, 144\) of U8 and \[8, 64, False, 0\]"),
        (lambda packings: packings.update({"x": [8, 32, False, 0]}), "lacks weights: x, whose packing its metadata have"),
        (
            lambda packings: packings.update({"transformer.ln_f.weight": [8, 32, False, 0]}),
            "ln_f.weight: expected rows of blocks",
        ),
    ],
)
def test_packings_that_are_wrong_are_named(change, message, tmp_path):
    folder = own(tmp_path)
    with_metadata(folder, change)
    with raises(message):
        GPT.from_pretrained(folder)


def test_blocks_that_are_wrong_are_named(tmp_path):
    folder = own(tmp_path)

    def edited(change):
        path = folder / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(load_file(path) | {NAME: change(load_file(path)[NAME])}, path, metadata=metadata)

    edited(lambda blocks: blocks[:-1].contiguous())
    with raises(r"misshapen weights: .*c_proj.weight: expected shape \(64, 256\), got \(63, 256\)"):
        GPT.from_pretrained(folder)
    edited(lambda blocks: torch.full((64, 144), 255, dtype=torch.uint8))
    with raises("c_proj.weight: expected finite scales, got NaN"):
        GPT.from_pretrained(folder)
    with raises("c_proj.weight: expected finite numbers"):
        GPT.from_pretrained(folder, weights="dequantized")


def test_training_starts_from_what_they_stand_for(tmp_path):
    folder = own(tmp_path)
    Tokenizer.from_corpus("".join(map(chr, range(65, 130)))).save(folder / "tokenizer.json")
    _, model, _ = pretrained(folder)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family, weights, layers", [("llama", "int4", 8), ("gpt2", "int8", 6)])  # about 80 MB each
@pytest.mark.slow
def test_peak_memory(family, weights, layers, tmp_path):
    """Of loading what is quantized on the way: little more than the result, whose matrices would take four times as much."""
    sizes = dict(vocab_size=2000, context_length=64, num_layers=layers, num_heads=16, hidden_size=1024)
    fields = {} if family == "gpt2" else dict(norm="rms", activation="silu", gated=True, position="rotary", rope=Rope(64))
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes, **fields))
    zeros = torch.zeros(model.config.intermediate_size * 2 * 1024, dtype=torch.bfloat16)
    for name, weight in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        view = zeros[: weight.numel()].view(weight.shape)
        setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(view, requires_grad=False))
    with mock.patch.object(transformers_format, "save_file", save_shared):
        model.save_pretrained(tmp_path / "model")
    before = own(tmp_path)
    assert peak_of_loading(tmp_path / "model", before.parent / "plain", weights) <= 1.15


def save_shared(weights, path, **options):
    """As safetensors' own, which refuses tensors in the same memory."""
    save_file({name: x.clone() for name, x in weights.items()}, path, **options)
