"""GGUF files that we write: read again as the same model, by us and by transformers."""

import copy

import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

from checkpoint_files import raises  # noqa: E402
from family_checkpoints import CONFIGS, GGUF_CONFIGS, NOT_IN_GGUF, ids_of, theirs, transformers_reads_gguf  # noqa: E402
from models import random_model  # noqa: E402

from fastgpt import GPT, Quantization, QuantizedWeight  # noqa: E402
from fastgpt.checkpoints import gguf_file, gguf_writer  # noqa: E402
from fastgpt.testing import numerics  # noqa: E402

TYPES = {"Q8_0": Quantization("int8"), "Q4_0": Quantization("int4"), "Q4_1": Quantization("int4", minima=True)}


def written(model, path):
    gguf_writer.write(path, model, *gguf_writer.metadata_from(model))
    return path


def same(ours, theirs):
    for (name, weight), again in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert again[0] == name
        if isinstance(weight, QuantizedWeight):
            assert weight.packing == again[1].packing and torch.equal(weight.blocks, again[1].blocks), name
        else:  # Gemma's norms are stored plus one
            torch.testing.assert_close(weight, again[1], rtol=0, atol=1e-6 if ours.config.norm_offset else 0, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("case", GGUF_CONFIGS)
def test_unquantized_models_of_every_family(case, tmp_path):
    """The same weights and logits, by our reader and, where it knows the architecture, by transformers' own."""
    theirs(case).save_pretrained(tmp_path / "folder")
    model = GPT.from_pretrained(tmp_path / "folder")
    path = written(model, tmp_path / "model.gguf")
    again, ids = GPT.from_pretrained(path), ids_of(2, 50)
    same(model, again)
    numerics.check(again(ids), lambda: copy.deepcopy(model).double()(ids))
    if transformers_reads_gguf(case):
        read = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=path.name, config=theirs(case).config, dtype=torch.float32
        )
        assert torch.equal(read(ids).logits, theirs(case)(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", ["llama, biases, tied", "gpt2", "gemma", "qwen3, yarn", "qwen2_moe, all layers"])
def test_blocks_stay_as_they_are(case, kind, tmp_path):
    config = theirs(case).config
    wide = type(config)(**config.to_dict() | ({} if case == "gpt2" else {"intermediate_size": 128}))
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "folder")
    model = GPT.from_pretrained(tmp_path / "folder", weights=TYPES[kind])
    path = written(model, tmp_path / "model.gguf")
    same(model, GPT.from_pretrained(path))
    tensors = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["token_embd.weight"] == "Q8_0" and tensors["blk.0.attn_output.weight"] == kind
    assert gguf_file.read(path).metadata["general.file_type"] == gguf_writer.FILE_TYPES[kind]


def test_a_file_is_written_again_with_all_that_it_says(tmp_path):
    case = "llama, rope of llama 3"
    theirs(case).save_pretrained(tmp_path / "folder")
    model = GPT.from_pretrained(tmp_path / "folder", dtype=torch.bfloat16)
    metadata, rotation = gguf_writer.metadata_from(model)
    metadata |= {
        "general.name": "a name", "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [0.5, -1.25],
        "tokenizer.ggml.token_type": [1, 3], "tokenizer.ggml.add_bos_token": False, "x.negative": -1, "x.large": 1 << 40,
    }  # fmt: skip
    gguf_writer.write(tmp_path / "first.gguf", model, metadata, rotation)
    first = gguf_file.read(tmp_path / "first.gguf")
    assert all(first.metadata[key] == value for key, value in metadata.items())
    again = GPT.from_pretrained(tmp_path / "first.gguf")
    gguf_writer.write(tmp_path / "second.gguf", again, *gguf_writer.metadata_of(first))
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()
    fields = gguf.GGUFReader(tmp_path / "first.gguf").fields
    kinds = {name: fields[name].types for name in fields}
    value = gguf.GGUFValueType
    assert kinds["tokenizer.ggml.scores"] == [value.ARRAY, value.FLOAT32]
    assert kinds["tokenizer.ggml.token_type"] == [value.ARRAY, value.INT32]
    assert kinds["llama.block_count"] == [value.UINT32] and kinds["llama.rope.freq_base"] == [value.FLOAT32]


def test_what_a_file_cannot_say_is_named(tmp_path):
    with raises("expected one of gpt2, llama, .*, which GGUF files can hold, got fastgpt"):
        written(random_model(activation="relu", norm="rms"), tmp_path / "model.gguf")
    for case, field in (
        ("qwen2, windows", "windows"),
        ("gemma2", "attention_scale"),
        ("gemma3", "windows"),
        ("smollm3, windows", "rope_layers|windows"),
    ):
        torch.manual_seed(0)
        theirs(case).save_pretrained(tmp_path / case)
        with raises(f"model: expected {field}=.*, which a GGUF file can say, got"):
            written(GPT.from_pretrained(tmp_path / case), tmp_path / "model.gguf")
    random_model().save_pretrained(tmp_path / "wide")
    with raises("expected a packing of Q8_0, Q4_0, Q4_1, .*, got QuantizedWeight"):
        written(GPT.from_pretrained(tmp_path / "wide", weights=Quantization("int8", 64)), tmp_path / "model.gguf")
    assert CONFIGS.keys() - GGUF_CONFIGS.keys() == NOT_IN_GGUF
