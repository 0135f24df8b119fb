"""GGUF files of latent attention, which llama.cpp has in two forms: keys and values in one projection, or, for the absorbed form,
in two, of which keys' is transposed."""

import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

import gguf_files  # noqa: E402
from checkpoint_files import raises  # noqa: E402
from family_checkpoints import ids_of, theirs  # noqa: E402

from fastgpt import GPT, Quantization, QuantizedWeight  # noqa: E402
from fastgpt.checkpoints import gguf_file, gguf_writer  # noqa: E402
from fastgpt.testing import numerics  # noqa: E402

CASE = "deepseek_v2, no biases"


@pytest.fixture
def wide():
    """A model of transformers whose matrices have whole blocks in a row."""
    config = theirs(CASE).config.to_dict()
    config |= dict(kv_lora_rank=64, q_lora_rank=32, qk_nope_head_dim=32, v_head_dim=32, intermediate_size=128)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV2Config(**config)).eval()


def in_q8(name, weight):
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quantize(weight, kind), kind


def changed(monkeypatch, change):
    """Files are written with what `change` yields of each name and tensor."""
    original = gguf_files.each_matrix
    monkeypatch.setattr(gguf_files, "each_matrix", lambda model: (y for x in original(model) for y in change(*x)))


@torch.no_grad()
def test_keys_and_values_are_dequantized_and_other_blocks_stay(wide, tmp_path):
    path = gguf_files.write(wide, tmp_path / "model.gguf", in_q8)
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    keys, values = (torch.from_numpy(stored[f"blk.1.attn_{x}_b.weight"]) for x in "kv")
    model = GPT.from_pretrained(path)
    latent = model.blocks[1].attention.latent
    assert torch.equal(latent.kv_b.weight, torch.cat([keys.mT, values], 1).flatten(0, 1))
    assert all(isinstance(layer.weight, QuantizedWeight) for layer in (latent.q_a, latent.q_b, latent.kv_a))
    dequantized, ids = GPT.from_pretrained(path, weights="dequantized"), ids_of(2, 40)
    assert torch.equal(dequantized.blocks[1].attention.latent.kv_b.weight, latent.kv_b.weight)
    numerics.check(model(ids), lambda: dequantized.double()(ids))
    again = GPT.from_pretrained(path, weights="int8", dtype=torch.bfloat16)
    assert isinstance(again.blocks[1].attention.latent.kv_b.weight, QuantizedWeight)


@torch.no_grad()
@pytest.mark.parametrize("both", [False, True])
def test_one_projection_of_keys_and_values(both, tmp_path, monkeypatch):
    """As earlier files have it, alone or with the other form beside it."""
    weights = theirs(CASE).state_dict()

    def change(name, weight):
        if ".v_b_proj" in name:
            whole = name.replace("v_b_proj", "kv_b_proj")
            yield whole, weights[whole]
        if both or "_b_proj" not in name or ".q_b_proj" in name:
            yield name, weight

    expected = GPT.from_pretrained(gguf_files.write(theirs(CASE), tmp_path / "model.gguf"))
    changed(monkeypatch, change)
    model = GPT.from_pretrained(gguf_files.write(theirs(CASE), tmp_path / "earlier.gguf"))
    for (name, weight), again in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(weight, again), name


def without_a_column(name, weight):
    return weight[:, :-1] if ".k_b_proj" in name else weight


def with_one_more_key_than_value(name, weight):
    if ".k_b_proj" in name:
        return torch.cat([weight, weight[..., :1]], -1)
    return weight[:, :-1] if ".v_b_proj" in name else weight


@pytest.mark.parametrize("resized", [without_a_column, with_one_more_key_than_value])
def test_parts_that_do_not_fit_are_named(resized, tmp_path, monkeypatch):
    """Even if there are as many rows of both together as there should be."""
    changed(monkeypatch, lambda name, weight: [(name, resized(name, weight))])
    path = gguf_files.write(theirs(CASE), tmp_path / "model.gguf")
    with raises(f"model: {path} lacks weights: blk.0.attn_kv_b.weight.*has unexpected weights: blk.0.attn_k_b.weight"):
        GPT.from_pretrained(path)


@torch.no_grad()
def test_a_file_is_written_with_keys_and_values_in_one_projection(wide, tmp_path):
    """So that blocks stay as they are; what the metadata say belongs to it."""
    first = gguf_files.write(wide, tmp_path / "first.gguf", in_q8)
    model = GPT.from_pretrained(first, weights=Quantization("int8"))
    gguf_writer.write(tmp_path / "second.gguf", model, *gguf_writer.metadata_of(gguf_file.read(first)))
    gguf_writer.write(tmp_path / "third.gguf", model, *gguf_writer.metadata_from(model))
    for name in ("second.gguf", "third.gguf"):
        file, again = gguf_file.read(tmp_path / name), GPT.from_pretrained(tmp_path / name)
        assert file.tensors["blk.0.attn_kv_b.weight"].type == "Q8_0" and "blk.0.attn_k_b.weight" not in file.tensors
        said = {key.removeprefix("deepseek2.attention."): value for key, value in file.metadata.items()}
        assert (said["key_length"], said["value_length"], said["head_count_kv"]) == (40, 32, 4)
        assert not any(key.endswith("_mla") for key in said)
        assert torch.equal(again(ids_of(2, 40)), model(ids_of(2, 40)))


def test_what_a_file_says_of_heads_in_part_is_kept(tmp_path, monkeypatch):
    """Either length may be said of the heads, or of the absorbed form, in which it is not."""
    monkeypatch.setattr(gguf.GGUFWriter, "add_value_length_mla", lambda writer, length: writer.add_value_length(length))
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_value_length",
        lambda writer, length: None if length == 24 else writer.add_uint32("deepseek2.attention.value_length", length),
    )
    path = gguf_files.write(theirs(CASE), tmp_path / "first.gguf")
    model = GPT.from_pretrained(path)
    gguf_writer.write(tmp_path / "second.gguf", model, *gguf_writer.metadata_of(gguf_file.read(path)))
    again = GPT.from_pretrained(tmp_path / "second.gguf")
    assert again.config == model.config and model.config.v_head_dim == 12
