"""GGUF files: the logits and greedy tokens of the models that they were written from, whatever their weights are stored in."""

import copy
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import run

from fastgpt import GPT, SHIPPED_MODEL, QuantizedWeight, decoding, generate, pipeline
from fastgpt.checkpoints import adapters
from fastgpt.checkpoints.gguf_tensors import SERVED
from fastgpt.model import lora
from fastgpt.ops.quantized_weight import GGUF_PACKINGS as PACKINGS
from fastgpt.testing import numerics
from fastgpt.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

from checkpoint_files import peak_of_loading  # noqa: E402
from family_checkpoints import (  # noqa: E402
    GGUF_CONFIGS,
    PROMPTS,
    ids_of,
    logits_of,
    our_tokens,
    their_tokens,
    theirs,
    transformers_reads_gguf,
)
from gguf_files import write  # noqa: E402
from gguf_fuzz import File, text, u32, u64  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """case -> the GGUF file of family_checkpoints' model."""

    @functools.cache
    def written(case):
        return write(theirs(case), tmp_path_factory.mktemp("gguf") / "model.gguf")

    return written


@pytest.mark.parametrize("case", GGUF_CONFIGS)
def test_logits(case, files, tmp_path):
    theirs(case).save_pretrained(tmp_path / "folder")
    for actual, yardstick in logits_of(case, tmp_path / "folder", torch.float32, tmp_path / "rounded", files(case)):
        numerics.check(actual, yardstick)


@pytest.mark.slow
@pytest.mark.parametrize("case", GGUF_CONFIGS)
def test_greedy_tokens(case, files):
    model = GPT.from_pretrained(files(case))
    assert our_tokens(model, PROMPTS) == their_tokens(case, PROMPTS)


@torch.no_grad()
@pytest.mark.parametrize("case", filter(transformers_reads_gguf, GGUF_CONFIGS))
def test_transformers_reads_these_files(case, files):
    """What the tests write is what llama.cpp's converter does, as far as transformers knows its architectures."""
    path = files(case)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=theirs(case).config, dtype=torch.float32
    )
    ids = ids_of(2, 50)
    assert torch.equal(again(ids).logits, theirs(case)(ids).logits)


@pytest.mark.parametrize("case", ["llama, rope of llama 3", "phi3, longrope", "gemma2, scale of its heads", "gpt2"])
def test_saved_as_a_folder(case, files, tmp_path):
    model = GPT.from_pretrained(files(case))
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), model.parameters()))
    with torch.no_grad():
        ids = ids_of(1, 50)
        theirs_again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(theirs_again) is type(theirs(case))
        numerics.check(model(ids), theirs_again.double()(ids).logits, theirs_again.float()(ids).logits)


# Types of blocks


WIDE = transformers.LlamaConfig(  # rows of 256, the longest blocks
    vocab_size=40, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip


def random_blocks(name, weight, kind):
    """Blocks of a matrix's shape with random bits, whose numbers are finite."""
    block, block_bytes = gguf.constants.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(len(name))
    if kind == gguf.GGMLQuantizationType.F64:  # which the package does not dequantize
        return draw.standard_normal(weight.shape), kind
    stored = np.zeros((weight.size // block, block_bytes), np.uint8)
    damaged = np.ones(len(stored), bool)
    while damaged.any():
        stored[damaged] = draw.integers(0, 256, (damaged.sum(), block_bytes), np.uint8)
        with np.errstate(all="ignore"):
            numbers = gguf.dequantize(stored, kind)
            damaged = ~(np.abs(numbers) < 1e6).all(-1)
    return stored.reshape(len(weight), -1), kind


@pytest.mark.parametrize("type_name", SERVED)
def test_blocks(type_name, tmp_path):
    """Of every type, the loaded numbers are those of the package gguf, bit for bit, and rotary pairs are where they belong."""
    kind = gguf.GGMLQuantizationType[type_name]
    path = tmp_path / "model.gguf"
    write(transformers.LlamaForCausalLM(WIDE), path, lambda name, weight: random_blocks(name, weight, kind))
    stored = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = tensor.data
        if tensor.tensor_type != gguf.GGMLQuantizationType.F64:
            values = gguf.dequantize(values, tensor.tensor_type)
        stored[tensor.name] = torch.from_numpy(np.array(values))
    model = GPT.from_pretrained(path)
    expected_dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}.get(type_name, torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {expected_dtype}
    attention, mlp = model.blocks[0].attention, model.blocks[0].mlp
    q, k = (
        stored[f"blk.0.attn_{x}.weight"].unflatten(0, (heads, 32, 2)).transpose(1, 2).flatten(0, 2)
        for x, heads in (("q", 4), ("k", 2))
    )
    for weight, expected in (
        (model.token_embedding.weight, stored["token_embd.weight"]),
        (attention.qkv.weight, torch.cat([q, k, stored["blk.0.attn_v.weight"]])),
        (attention.out.weight, stored["blk.0.attn_output.weight"]),
        (mlp.up.weight, torch.cat([stored["blk.0.ffn_gate.weight"], stored["blk.0.ffn_up.weight"]])),
        (mlp.down.weight, stored["blk.0.ffn_down.weight"]),
        (model.output.weight, stored["output.weight"]),
    ):
        assert isinstance(weight, QuantizedWeight) == (type_name in PACKINGS)
        actual = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        assert torch.equal(actual, expected.to(expected_dtype))
    half = GPT.from_pretrained(path, dtype=torch.bfloat16)
    down = half.blocks[0].mlp.down.weight
    assert torch.equal(
        down.dequantize() if isinstance(down, QuantizedWeight) else down, stored["blk.0.ffn_down.weight"].bfloat16()
    )
    model.save_pretrained(tmp_path / "folder")  # as it is, whatever it is stored in
    for weight, again in zip(model.parameters(), GPT.from_pretrained(tmp_path / "folder").parameters(), strict=True):
        if isinstance(weight, QuantizedWeight):
            assert weight.packing == again.packing and torch.equal(weight.blocks, again.blocks)
        else:
            assert torch.equal(weight, again)


PACKED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]  # that the package gguf can write


@pytest.mark.parametrize("type_name", PACKED)
def test_blocks_that_linear_takes_stay_as_they_are(type_name, tmp_path):
    """The same tokens as of the dequantized weights, from the bytes in the file; gradients need them dequantized."""
    kind = gguf.GGMLQuantizationType[type_name]
    path = write(theirs_quantizable(), tmp_path / "model.gguf", lambda name, weight: (gguf.quantize(weight, kind), kind))
    model, plain = GPT.from_pretrained(path), GPT.from_pretrained(path, weights="dequantized")
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    assert all(isinstance(weight, QuantizedWeight) for weight in matrices)
    assert {weight.packing for weight in matrices} == {PACKINGS[type_name]}
    for weight, expected in zip(model.parameters(), plain.parameters()):
        assert torch.equal(weight.dequantize() if isinstance(weight, QuantizedWeight) else weight, expected)
    down = gguf.GGUFReader(path).tensors[
        [tensor.name for tensor in gguf.GGUFReader(path).tensors].index("blk.0.ffn_down.weight")
    ]
    assert torch.equal(model.blocks[0].mlp.down.weight.blocks, torch.from_numpy(np.array(down.data)))
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(generate(model, ids, 40), generate(plain, ids, 40))
    half = GPT.from_pretrained(path, dtype=torch.bfloat16)
    assert half.blocks[0].mlp.down.weight.dtype == torch.bfloat16 and isinstance(
        half.blocks[0].mlp.down.weight, QuantizedWeight
    )
    assert not isinstance(GPT.from_pretrained(path, dtype=torch.float64).blocks[0].mlp.down.weight, QuantizedWeight)
    again = GPT.from_pretrained(path, weights="int4").blocks[0].mlp.down.weight
    assert again.packing == PACKINGS["Q4_0"]


def theirs_quantizable():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(WIDE)


MIXED = {  # tensors in other types than Q4_0
    "values, as in Q4_K_M": {"attn_v": "Q8_0"},
    "values that are not quantized": {"attn_v": "F32"},
    "queries, keys and values": {"attn_q": "Q5_0", "attn_k": "Q8_0"},
    "gate and up": {"ffn_gate": "Q8_0"},
}


@pytest.mark.parametrize("architecture", [transformers.LlamaForCausalLM, transformers.Qwen2ForCausalLM])  # without biases, with
@pytest.mark.parametrize("types", MIXED.values(), ids=MIXED)
def test_parts_of_different_types_stay_as_they_are(types, architecture, tmp_path):
    """What is one matrix in the decoder: it computes the same, is saved as it is, and can be trained with adapters."""

    def blocks(name, weight):
        kind = gguf.GGMLQuantizationType[next((types[part] for part in types if part in name), "Q4_0")]
        return gguf.quantize(weight, kind), kind

    torch.manual_seed(0)
    config = {name: value for name, value in WIDE.to_dict().items() if name not in ("model_type", "architectures")}
    path = write(architecture(architecture.config_class(**config)), tmp_path / "model.gguf", blocks)
    model, plain = GPT.from_pretrained(path), GPT.from_pretrained(path, weights="dequantized")
    matrices = [
        name for name, weight in model.named_parameters() if weight.dim() == 2 and not isinstance(weight, QuantizedWeight)
    ]
    assert len(matrices) == ("F32" in types.values())
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = plain.double()(ids)
    numerics.check(model(ids), expected, plain.float()(ids))
    assert torch.equal(generate(model, ids, 40), generate(plain, ids, 40))

    model.save_pretrained(tmp_path / "folder")
    again = GPT.from_pretrained(tmp_path / "folder")
    assert torch.equal(again(ids), model(ids)) and again.state_dict().keys() == model.state_dict().keys()

    lora.add_adapters(model, 2, 4.0)
    adapted = [layer for _, layer in lora.adapted_layers(model)]
    assert len(adapted) == sum(isinstance(layer, torch.nn.Linear) for layer in model.blocks.modules())
    for layer in adapted:
        torch.nn.init.normal_(layer.lora_B, 0.0, 0.02)
    (tmp_path / "adapter").mkdir()
    adapters.write(model, tmp_path / "adapter", 4.0, base=None)
    again = GPT.from_pretrained(path, lora=tmp_path / "adapter")
    assert torch.equal(generate(again, ids, 40), generate(model, ids, 40))


@torch.inference_mode()
def test_steps_with_values_of_another_type_are_recorded(tmp_path):
    def blocks(name, weight):
        kind = gguf.GGMLQuantizationType["Q8_0" if "attn_v" in name else "Q4_0"]
        return gguf.quantize(weight, kind), kind

    model = GPT.from_pretrained(write(theirs_quantizable(), tmp_path / "model.gguf", blocks))
    step = decoding(model, model.new_cache(2))
    for token in range(3):
        step(torch.tensor([token, 5]))
    assert step.recording.is_recorded


def test_scales_that_are_not_finite_are_refused(tmp_path):
    def blocks(name, weight):
        stored, kind = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
        if name == "blk.0.ffn_down.weight":
            stored[3, 34:36] = [0xFF, 0x7F]
        return stored, kind

    path = write(theirs_quantizable(), tmp_path / "model.gguf", blocks)
    with pytest.raises(ValueError, match=f"^model: {path}: blk.0.ffn_down.weight: expected finite scales, got NaN or infinity"):
        GPT.from_pretrained(path)


@pytest.mark.parametrize("type_name", ["Q8_1", "Q8_K", "I8", "Q1_0"])
def test_types_that_are_not_served_are_named(type_name, tmp_path):
    kind = gguf.GGMLQuantizationType[type_name]
    block, block_bytes = gguf.constants.GGML_QUANT_SIZES[kind]

    def blocks(name, weight):
        return np.zeros((len(weight), weight.shape[1] // block * block_bytes), np.int8 if type_name == "I8" else np.uint8), kind

    path = write(transformers.LlamaForCausalLM(WIDE), tmp_path / "model.gguf", blocks)
    with pytest.raises(
        ValueError, match=rf"^model: {path}: \S+: expected the type F64, .*, got {type_name}, which is not served"
    ):
        GPT.from_pretrained(path)


def test_output_that_equals_the_embedding_is_tied(tmp_path):
    model = copy.deepcopy(theirs("qwen2"))
    path = write(model, tmp_path / "model.gguf")
    assert not GPT.from_pretrained(path).config.tie_embeddings
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    assert GPT.from_pretrained(write(model, path)).config.tie_embeddings


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measuring peak memory needs Linux's /proc")
def test_peak_memory_of_loading(tmp_path):
    """Of 76 MB of blocks, which stay as they are, so that the 2 to 5 MB of code that runs for the first time count little."""
    kind = gguf.GGMLQuantizationType.Q4_0
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    zeros = {name: torch.zeros(1).expand(weight.shape) for name, weight in model.state_dict().items()}
    model.state_dict = lambda: zeros

    def blocks(name, weight):
        return np.zeros((len(weight), weight.shape[1] // 32 * 18), np.uint8), kind

    path = write(model, tmp_path / "model.gguf", blocks)
    small = write(theirs_quantizable(), tmp_path / "small.gguf", lambda name, weight: (gguf.quantize(weight, kind), kind))
    assert peak_of_loading(path, small) <= 1.15


# Metadata


@pytest.mark.parametrize(
    "key, add, message",
    [
        ("llama.attention.causal", False, "expected True, got False"),
        ("llama.attention.value_length", 8, "expected 16, as of keys, got 8"),
        ("llama.rope.scaling.type", "dynamic", "expected one of 'none', 'linear', 'yarn', 'longrope', got 'dynamic'"),
        ("llama.rope.scaling.type", "longrope", "expected the tensor rope_factors_short.weight for longrope, got none"),
        ("llama.rope.scaling.type", "yarn", "factor: expected a number > 0 for yarn, got None"),
        ("llama.rope.scaling.attn_factor", 2.0, "expected 1.0 for this rotation, got 2.0"),
        ("llama.attention.scale", 0.25, "since it is not supported, got 0.25"),
        ("tokenizer.ggml.eos_token_id", "x", "expected an integer"),
        ("split.count", 3.0, "expected an integer, got 3.0"),
    ],
)
def test_what_is_not_served_is_named(key, add, message, tmp_path):
    def metadata(writer):
        name = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}[type(add)]
        getattr(writer, name)(key, add)

    path = write(theirs("llama"), tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(ValueError, match=f"^model: {path}: {key.rpartition('.')[0]}.*{re.escape(message)}"):
        GPT.from_pretrained(path)


def test_a_number_of_experts_without_how_many_are_used_is_named(tmp_path):
    path = write(theirs("llama"), tmp_path / "model.gguf", metadata=lambda writer: writer.add_uint32("llama.expert_count", 8))
    with pytest.raises(ValueError, match=f"^model: {path}: num_experts_per_tok: expected an integer >= 1 .*, got None"):
        GPT.from_pretrained(path)


@pytest.mark.parametrize("name", ["mamba", "deepseek"])
def test_architectures_that_are_not_served_are_named(name, tmp_path, capsys):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, name)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(
        ValueError, match=f"^model: {path}: general.architecture: expected gpt2, llama.*, got '{name}', which is not"
    ):
        GPT.from_pretrained(path)
    _, out, _ = run(capsys, "info", path)
    assert f"{name}, which is not served" in out


def test_end_of_sequence_tokens(tmp_path):
    def metadata(writer):
        writer.add_eos_token_id(7)
        writer.add_eot_token_id(3)
        writer.add_pad_token_id(5000)

    model = GPT.from_pretrained(write(theirs("llama"), tmp_path / "model.gguf", metadata=metadata))
    assert model.generation_defaults == {"eos": [3, 7]}
    assert model.checkpoint_config["eos_token_id"] == [3, 7] and model.checkpoint_config["pad_token_id"] is None


def test_gemma_2_of_46_layers_scales_queries_by_their_share_of_the_width(tmp_path):
    settings = dict(vocab_size=9, hidden_size=32, intermediate_size=8, num_hidden_layers=46, num_attention_heads=2)
    config = transformers.Gemma2Config(**settings, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=16)
    model = GPT.from_pretrained(write(transformers.Gemma2ForCausalLM(config), tmp_path / "model.gguf"))
    assert model.config.attention_scale == 0.25


# Files


def test_pipeline_and_commands(tmp_path, monkeypatch, capsys):
    """Text goes through the tokenizer that is made of the file's metadata."""
    shipped, seen = Tokenizer.from_folder(SHIPPED_MODEL), []
    made = SimpleNamespace(tokenizer_from_gguf=lambda metadata: seen.append(metadata) or shipped)
    monkeypatch.setitem(sys.modules, "fastgpt.text.gguf_tokenizer", made)
    path = write(theirs("llama"), tmp_path / "model.gguf", metadata=lambda writer: writer.add_token_list(["é", "b"]))
    model, pipe = GPT.from_pretrained(path), pipeline(path)
    prompt = shipped.encode("ROMEO:")
    text = shipped.decode(our_tokens(model, [prompt])[0])
    assert pipe("ROMEO:", max_new_tokens=64) == text
    assert seen[0]["tokenizer.ggml.tokens"] == ["é", "b"] and seen[0]["general.architecture"] == "llama"
    status, out, _ = run(capsys, "generate", "ROMEO:", "--model", path, "--max-new-tokens", 64, "--json")
    assert status == 0 and json.loads(out)["text"] == "ROMEO:" + text
    status, out, _ = run(capsys, "inspect", "ROMEO:", "--model", path, "--json")
    assert status == 0 and json.loads(out)["greedy"]["id"] == our_tokens(model, [prompt])[0][0]

    def wrong(metadata):
        raise ValueError("tokenizer.ggml.model: expected gpt2, got 'x'")

    made.tokenizer_from_gguf = wrong
    with pytest.raises(ValueError, match=f"^model: {path}: tokenizer.ggml.model: expected gpt2"):
        pipeline(path)


@pytest.fixture
def parts(files, tmp_path):
    write(theirs("llama"), tmp_path / "model.gguf", split_max_tensors=12)
    found = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in found] == [f"model-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_parts(parts, files, capsys):
    """Given any of them, all are read."""
    whole = GPT.from_pretrained(files("llama"))
    for part in parts:
        model = GPT.from_pretrained(part)
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), whole.parameters()))
    _, out, _ = run(capsys, "info", parts[1])
    assert "in 3 files" in out and f"{sum(x.numel() for x in whole.parameters()):,}" in out


def test_missing_and_wrong_parts_are_named(parts):
    content = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"^model: expected {parts[1].name} beside {parts[2]}, one of 3 files"):
        GPT.from_pretrained(parts[2])
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ValueError, match=f"^model: {parts[1]}: split.no: expected 1, by its name, got 2"):
        GPT.from_pretrained(parts[0])
    parts[1].write_bytes(content)
    renamed = parts[0].rename(parts[0].with_name("first.gguf"))
    with pytest.raises(ValueError, match=f"^model: {renamed}: split.count: expected a file named NAME-00001-of-00003.gguf"):
        GPT.from_pretrained(renamed)


def test_paths(files, tmp_path):
    with pytest.raises(FileNotFoundError, match="^model: expected a GGUF file, .*none.gguf does not exist or is not a file"):
        GPT.from_pretrained(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="^revision: expected None for .*, which is a file here"):
        GPT.from_pretrained(files("llama"), revision="main")
    with pytest.raises(
        FileNotFoundError, match="expected config.json in .*, found model.gguf: a GGUF file is loaded by its own path"
    ):
        GPT.from_pretrained(files("llama").parent)
    blob = tmp_path / "blob"  # by what it begins with
    blob.symlink_to(files("llama"))
    assert GPT.from_pretrained(str(blob)).config == GPT.from_pretrained(files("llama")).config


def test_the_package_may_be_missing(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="^model: expected the package gguf, .*: pip install gguf$"):
        GPT.from_pretrained(files("llama"))
    status, _, err = run(capsys, "info", files("llama"))
    assert status == 2 and err.count("\n") == 1 and "pip install gguf" in err


def test_info(tmp_path, capsys):
    def metadata(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b", "c"])
        writer.add_chat_template("{{ messages }}")

    def blocks(name, weight):
        return gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0

    path = write(transformers.LlamaForCausalLM(WIDE), tmp_path / "model.gguf", blocks, metadata)
    status, out, _ = run(capsys, "info", path)
    assert status == 0
    lines = dict(re.findall(r"^([\w ]+): +(.*)$", out, re.MULTILINE))
    numbers = sum(parameter.numel() for parameter in GPT.from_pretrained(path).parameters())
    assert lines == {
        "architecture": "llama", "name": "a tiny llama", "parameters": f"{numbers:,}", "size": "0.7 MB", "context": "64",
        "vocabulary": "3 tokens", "tokenizer": "gpt2", "chat template": "yes",
    }  # fmt: skip
    assert re.search(r"^Q8_0 +9 +0.6 MB$", out, re.MULTILINE) and re.search(r"^F32 +3 +0.0 MB$", out, re.MULTILINE)
    facts = json.loads(run(capsys, "info", path, "--json")[1])
    assert facts["parameters"] == numbers and facts["bytes"] == path.stat().st_size and facts["tokenizer"] == ["gpt2"]
    assert [(name, facts["types"][name]["tensors"]) for name in facts["types"]] == [("Q8_0", 9), ("F32", 3)]
    path.write_bytes(path.read_bytes()[:1000])
    status, out, err = run(capsys, "info", path)
    assert status == 2 and not out and err.startswith(f"fastgpt: error: model: {path}") and err.count("\n") == 1


def overlap(file):
    file.tensors[4][5] = file.tensors[3][5]


def unaligned(file):
    file.tensors[4][5] = u64(int.from_bytes(file.tensors[4][5], "little") + 4)


def beyond(file):
    file.tensors[4][5] = u64(len(file.data))


def dimension(file):
    file.tensors[0][3] = u64(2**63)[:8] + file.tensors[0][3][8:]


def transposed(file):
    (found,) = (tensor for tensor in file.tensors if tensor[1] == b"blk.0.attn_k.weight")
    found[3] = found[3][8:] + found[3][:8]


def unknown_type(file):
    file.tensors[0][4] = u32(31)


def long_string(file):
    file.entries[1][3] = u64(2**63)


def many_entries(file):
    file.begin[3] = u64(2**40)


def many_elements(file):
    file.entries[1][2:] = [u32(9), u32(0), u64(2**40)]


def big_endian(file):
    file.begin[1] = file.begin[1][::-1]


def no_block_count(file):
    file.entries = [entry for entry in file.entries if entry[1] != b"llama.block_count"]
    file.begin[3] = u64(len(file.entries))


def no_architecture(file):
    del file.entries[0]
    file.begin[3] = u64(len(file.entries))


def odd_name(file):
    file.tensors[0][:2] = [text(b"\x1b[31m")]


@pytest.mark.parametrize(
    "damage, message",
    [
        (overlap, r"is damaged: \S+: expected data of its own, it overlaps that of \S+$"),
        (unaligned, r"\S+: expected an offset that is a multiple of 32, got [\d,]+$"),
        (beyond, r"is damaged: \S+: expected [\d,]+ bytes from byte [\d,]+ on, the file has [\d,]+$"),
        (dimension, r"is damaged: \S+: expected [\d,]+ bytes from byte"),
        (transposed, r"has misshapen weights: blk.0.attn_k.weight: expected shape \(32, 64\), got \(64, 32\)$"),
        (unknown_type, r"\S+: expected one of the types of tensors 0, 1, 2, .*, got 31$"),
        (long_string, r"is damaged: expected 9,223,372,036,854,775,808 bytes for general.name, got [\d,]+ up to the end"),
        (many_entries, r"is damaged: expected no more entries than [\d,]+ bytes have room for, got 1,099,511,627,776$"),
        (many_elements, r"general.name: expected at most 8,388,608 elements, got 1,099,511,627,776$"),
        (big_endian, r"expected GGUF version 2 or 3 in little-endian byte order, got version 3 in big-endian byte order$"),
        (no_block_count, r"llama.block_count: expected an integer >= 0 and <= 65536, got nothing$"),
        (no_architecture, r"general.architecture: expected a string, got None$"),
        (odd_name, r"is damaged: expected the name of a tensor of at most 255 printable characters, got '\\x1b\[31m'$"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named(damage, message, files, tmp_path):
    file, path = File(files("llama")), tmp_path / "model.gguf"
    damage(file)
    path.write_bytes(file.bytes())
    with pytest.raises(ValueError, match=f"^model: {path}:? {message}"):
        GPT.from_pretrained(path)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limiting memory needs Linux")
@pytest.mark.parametrize("count", [810, pytest.param(8100, marks=pytest.mark.exhaustive)])
def test_damaged_files_load_or_say_what_is_wrong(count, tmp_path):
    """Within limits on memory and time: ValueError or OSError that names the file, or a model."""

    def blocks(name, weight):
        return gguf.quantize(weight, gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0

    def metadata(writer):
        writer.add_token_list([f"token {i}" for i in range(97)])
        writer.add_token_scores([0.5] * 97)
        writer.add_eos_token_id(2)

    write(theirs("llama, rope of llama 3"), tmp_path / "llama.gguf", metadata=metadata)
    write(theirs("gpt2"), tmp_path / "gpt2.gguf")
    write(transformers.LlamaForCausalLM(WIDE), tmp_path / "quantized.gguf", blocks, metadata)
    write(theirs("phi3, longrope"), tmp_path / "phi3.gguf")
    write(theirs("mixtral"), tmp_path / "experts.gguf", metadata=metadata)
    write(theirs("deepseek_v2, no biases"), tmp_path / "latent.gguf", metadata=metadata)
    command = [sys.executable, Path(__file__).with_name("gguf_fuzz.py"), tmp_path, count, count]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert not found["failures"], "\n".join(found["failures"][:5])
    assert found["outcomes"]["ValueError"] > count / 2 and found["outcomes"]["loaded"] > count / 50
