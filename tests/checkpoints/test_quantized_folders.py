"""Folders that other libraries have quantized: the numbers that these dequantize them to, tokens, and what is refused."""

import json
import shutil

import pytest
import torch
from checkpoint_files import LLAMA, edit_config, edit_weights, raises
from models import random_ids, random_model
from quantized_folders import quantize_folder
from safetensors.torch import load_file

from fastgpt import GPT, GPTConfig, QuantizedWeight, generate
from fastgpt.checkpoints.families import FAMILIES
from fastgpt.testing import numerics

DOWN = "model.layers.1.mlp.down_proj."
WIDE = LLAMA | {
    "vocab_size": 65, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "head_dim": 32, "tie_word_embeddings": False,
}  # fmt: skip
LAYOUTS = {
    "gptq, 4 bits": ("gptq", 4, 128, True, {}),
    "gptq, 4 bits, groups of 32, zero points": ("gptq", 4, 32, False, {}),
    "gptq, 8 bits, rows": ("gptq", 8, None, True, {}),
    "gptq, 8 bits, zero points": ("gptq", 8, 64, False, {}),
    "gptq_v2": ("gptq", 4, 64, False, {"newer": True}),
    "awq, groups of 128": ("awq", 4, 128, False, {}),
    "awq, groups of 32": ("awq", 4, 32, False, {}),
    "pack-quantized, 4 bits": ("compressed-tensors", 4, 128, True, {}),
    "pack-quantized, 4 bits, zero points": ("compressed-tensors", 4, 32, False, {}),
    "pack-quantized, 4 bits, zero points in bytes": ("compressed-tensors", 4, 64, False, {"packed_zeros": False}),
    "pack-quantized, 8 bits, rows": ("compressed-tensors", 8, None, True, {}),
    "pack-quantized, 8 bits, zero points": ("compressed-tensors", 8, None, False, {}),
    "naive-quantized": ("compressed-tensors", 8, None, True, {"naive": True}),
    "naive-quantized, zero points": ("compressed-tensors", 8, 64, False, {"naive": True}),
}


def saved(folder, config=WIDE, dtype=torch.float16):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**FAMILIES[config["model_type"]].config_from(config)))
    for weight in model.blocks.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, 0.01, 0.2)  # zero points that are not in the middle
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def quantized(plain, tmp_path):
    """Layout, or arguments of `quantize_folder` -> a folder, and what its matrices stand for."""

    def make(layout, name="model", **options):
        method, bits, group_size, symmetric, more = LAYOUTS[layout]
        folder = tmp_path / name
        shutil.copytree(plain, folder)
        return folder, quantize_folder(folder, method, bits, group_size, symmetric, **more, **options)

    return make


def of_blocks(model, expected, layer=0):
    """(our matrix, what it should be, and how far from it it may be) of a layer."""
    attention, mlp, prefix = model.blocks[layer].attention, model.blocks[layer].mlp, f"model.layers.{layer}."
    for weight, names in (
        (attention.qkv.weight, [f"self_attn.{x}_proj" for x in "qkv"]), (attention.out.weight, ["self_attn.o_proj"]),
        (mlp.up.weight, ["mlp.gate_proj", "mlp.up_proj"]), (mlp.down.weight, ["mlp.down_proj"]),
    ):  # fmt: skip
        yield weight, *(torch.cat([expected[f"{prefix}{name}.weight"][i] for name in names]) for i in (0, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_and_tokens(layout, quantized):
    """Symmetric ones are exact; else only a minimum is rounded."""
    folder, expected = quantized(layout)
    model = GPT.from_pretrained(folder)
    _, bits, group_size, symmetric, _ = LAYOUTS[layout]
    for weight, exact, bound in of_blocks(model, expected):
        assert isinstance(weight, QuantizedWeight) and weight.dtype == torch.float16
        assert weight.packing == (bits, group_size or weight.shape[1], not symmetric, 0)
        assert ((weight.dequantize(torch.float32).double() - exact).abs() <= bound + 1e-6 * exact.abs()).all()
    assert not isinstance(model.token_embedding.weight, QuantizedWeight) and model.output.weight.dtype == torch.float16

    model = GPT.from_pretrained(folder, dtype=torch.float32)
    dequantized = GPT.from_pretrained(folder, dtype=torch.float32, weights="dequantized")
    for weight, exact, _ in of_blocks(dequantized, expected):
        assert torch.equal(weight.detach(), exact.float()) and weight.requires_grad
    exact_model = GPT(model.config).eval()
    exact_model.load_state_dict(
        {name: x.dequantize() if isinstance(x, QuantizedWeight) else x for name, x in model.state_dict().items()}
    )
    ids = random_ids(model, 2, 20)
    with torch.no_grad():
        numerics.check(model(ids), lambda: exact_model.double()(ids))
    assert torch.equal(generate(model, ids, 12), generate(exact_model.float(), ids, 12))


@pytest.mark.parametrize("layout", ["gptq, 4 bits", "pack-quantized, 8 bits, rows"])
def test_scales_of_bf16_and_quantizing_again(layout, plain, quantized):
    """bf16 scales are fp16's, too; int4 of it is int4 of what it stands for."""
    folder, expected = quantized(layout, scale_dtype=torch.bfloat16)
    edit_config(folder, dtype="bfloat16")
    model = GPT.from_pretrained(folder)
    for weight, exact, _ in of_blocks(model, expected):
        assert weight.dtype == torch.bfloat16 and torch.equal(weight.dequantize(torch.float32).double(), exact)
    again = GPT.from_pretrained(folder, weights="int4")
    assert {type(block.mlp.down.weight) for block in again.blocks} == {QuantizedWeight}
    assert again.blocks[0].mlp.down.weight.packing == (4, 32, False, 0)


def test_transposed_matrices(tmp_path):
    """GPT-2's own are (C, N); quantized ones are as in a linear layer."""
    model = random_model()
    model.save_pretrained(tmp_path)
    expected = quantize_folder(tmp_path, "gptq", 8, 32, True, transposed=True, scale_dtype=torch.float32)
    again = GPT.from_pretrained(tmp_path)
    for weight, name in (
        (again.blocks[1].attention.qkv.weight, "attn.c_attn"),
        (again.blocks[1].mlp.down.weight, "mlp.c_proj"),
    ):
        exact, _ = expected[f"transformer.h.1.{name}.weight"]
        assert isinstance(weight, QuantizedWeight) and weight.shape == exact.shape
        assert (weight.dequantize(torch.float32).double() - exact).abs().amax() < 1e-3 * exact.abs().amax()
    dequantized = GPT.from_pretrained(tmp_path, weights="dequantized").blocks[1].mlp.down.weight
    assert torch.equal(dequantized.detach(), expected["transformer.h.1.mlp.c_proj.weight"][0].float())


def test_groups_that_do_not_fit_kernels_are_dequantized(tmp_path):
    saved(tmp_path, WIDE | {"hidden_size": 80, "head_dim": 20, "num_attention_heads": 4})
    expected = quantize_folder(tmp_path, "compressed-tensors", 8, None, True)
    model = GPT.from_pretrained(tmp_path, dtype=torch.float32)
    weight = model.blocks[0].attention.out.weight
    assert not isinstance(weight, QuantizedWeight)
    assert torch.equal(weight.detach(), expected["model.layers.0.self_attn.o_proj.weight"][0].float())
    assert isinstance(model.blocks[0].mlp.down.weight, QuantizedWeight)


def test_biases_that_a_model_does_not_have(quantized):
    """AutoGPTQ's, of zeros; any other is an error."""
    folder, _ = quantized("gptq, 4 bits")
    edit_weights(folder, lambda weights: weights.update({DOWN + "bias": torch.zeros(128, dtype=torch.float16)}))
    assert GPT.from_pretrained(folder).blocks[1].mlp.down.bias is None
    edit_weights(folder, lambda weights: weights[DOWN + "bias"].fill_(1e-3))
    with raises("has unexpected weights: model.layers.1.mlp.down_proj.bias"):
        GPT.from_pretrained(folder)


# As the libraries write them


@pytest.mark.parametrize(
    "bits, group_size, symmetric, naive",
    [(4, 32, True, False), (4, 64, False, False), (8, None, True, False), (8, 128, False, False), (8, None, True, True)],
)
def test_as_compressed_tensors_dequantizes_it(bits, group_size, symmetric, naive, plain, quantized, tmp_path):
    """The library decompresses what the tests write, bit for bit as it compresses it, to what we load."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    quantize_folder(folder, "compressed-tensors", bits, group_size, symmetric, naive=naive)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    QuantizationConfig(**config)
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    kind = compressors.NaiveQuantizationCompressor if naive else compressors.PackedQuantizationCompressor
    weights, module = load_file(folder / "model.safetensors"), "model.layers.0.mlp.down_proj."
    stored = {name.removeprefix(module): x for name, x in weights.items() if name.startswith(module)}
    theirs = kind.decompress({name: x.float() if name == "weight_scale" else x for name, x in stored.items()}, scheme)
    again = kind.compress(theirs, scheme)
    assert all(torch.equal(again[name], x) for name, x in stored.items() if name != "weight_scale")
    ours = GPT.from_pretrained(folder).blocks[0].mlp.down.weight.dequantize(torch.float32)
    if symmetric:
        assert torch.equal(ours, theirs["weight"])
    else:
        assert (ours - theirs["weight"]).abs().amax() <= stored["weight_scale"].amax() / (64 if bits == 4 else 8)


@pytest.mark.parametrize("group_size", [None, 32])
def test_as_torchao_writes_it(group_size, plain, tmp_path):
    pytest.importorskip("torchao.quantization")
    transformers = pytest.importorskip("transformers")
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow

    config = Int8WeightOnlyConfig(granularity=PerGroup(group_size) if group_size else PerRow(), version=2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=transformers.TorchAoConfig(config), dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    expected = {name: x.dequantize() for name, x in theirs.state_dict().items() if "_proj" in name}
    for weight, exact, _ in of_blocks(model, {name: (x, x) for name, x in expected.items()}):
        assert isinstance(weight, QuantizedWeight) and weight.packing == (8, group_size or weight.shape[1], False, 0)
        # Scales in fp32 are rounded.
        assert ((weight.dequantize() - exact).abs() <= 2**-11 * exact.abs()).all()


# What is wrong


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, quantization_config=config["quantization_config"] | changes)


@pytest.mark.parametrize(
    "layout, changes, message",
    [
        ("gptq, 4 bits", {"bits": 3}, r"quantization_config\.bits: expected 4 or 8, got 3"),
        ("gptq, 4 bits", {"group_size": 16}, r"quantization_config\.group_size: expected 32 or 64 or 128 or -1, got 16"),
        ("gptq, 4 bits", {"checkpoint_format": "marlin"}, r"checkpoint_format: expected .*got 'marlin'"),
        ("gptq, 4 bits", {"is_marlin_format": True}, "is_marlin_format: expected null or no such entry"),
        ("gptq, 4 bits", {"dynamic": {"-:lm_head": {}}}, r"quantization_config\.dynamic: expected no rules"),
        ("awq, groups of 32", {"version": "gemv"}, r"quantization_config\.version: expected 'gemm', got 'gemv'"),
        ("awq, groups of 32", {"zero_point": False}, r"quantization_config\.zero_point: expected True, got False"),
        ("awq, groups of 32", {"bits": 8}, r"quantization_config\.bits: expected 4, got 8"),
        ("naive-quantized", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: expected null"),
        ("naive-quantized", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config: expected none"),
        ("naive-quantized", {"format": "float-quantized"}, r"quantization_config\.format: expected one of"),
        ("naive-quantized", {"config_groups": {"a": {}, "b": {}}}, "config_groups: expected one group of modules, got a, b"),
        ("naive-quantized", {"quant_method": "bitsandbytes"}, "quant_method: expected one of 'gptq', .*got 'bitsandbytes'"),
        ("naive-quantized", {"quant_method": "fp8"}, "quant_method: expected one of .*got 'fp8'"),
        (
            "naive-quantized",
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}},
            r"quant_type\.default\._type: expected 'Int8WeightOnlyConfig', got 'Int4WeightOnlyConfig'",
        ),
    ],
)
def test_what_is_not_served_is_named(layout, changes, message, quantized):
    folder, _ = quantized(layout)
    edited(folder, **changes)
    with raises(f"config.json: .*{message}"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": {"num_bits": 3}}, r"weights\.num_bits: expected 4 or 8, got 3"),
        ({"weights": {"type": "float"}}, r"weights\.type: expected 'int', got 'float'"),
        ({"weights": {"strategy": "tensor"}}, r"weights\.strategy: expected one of 'group', 'channel', got 'tensor'"),
        ({"weights": {"strategy": "group", "group_size": 16}}, r"weights\.group_size: expected 32 or 64 or 128"),
        ({"weights": {"strategy": "group", "group_size": None}}, r"weights\.group_size: expected 32, 64 or 128, got None"),
        ({"weights": {"actorder": "group"}}, r"weights\.actorder: expected one of None, 'weight', 'static', got 'group'"),
        ({"input_activations": {"num_bits": 8}}, r"group_0\.input_activations: expected null"),
    ],
)
def test_groups_of_compressed_tensors(changes, message, quantized):
    folder, _ = quantized("naive-quantized")
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    group |= changes if "weights" not in changes else {"weights": group["weights"] | changes["weights"]}
    edited(folder, config_groups={"group_0": group})
    with raises(rf"config_groups\.group_0\.(?<=group_0\.).*{message}" if "weights" in changes else f"config_groups.{message}"):
        GPT.from_pretrained(folder)


def lacking(name):
    return lambda weights: weights.pop(name)


def changed(name, change):
    return lambda weights: weights.update({name: change(weights[name]).contiguous()})


def set_nan(x):
    x[0, 0] = torch.nan
    return x


@pytest.mark.parametrize(
    "layout, edit, message",
    [
        ("gptq, 4 bits", lacking(DOWN + "scales"), r"lacks weights: one that ends with \.scales beside .*down_proj\.qweight"),
        ("gptq, 4 bits", lacking(DOWN + "qzeros"), r"lacks weights: one that ends with \.qzeros"),
        (
            "gptq, 4 bits",
            lacking(DOWN + "qweight"),
            r"lacks weights: .*1\.mlp\.down_proj\.qweight, of which",
        ),
        ("gptq, 4 bits", changed(DOWN + "scales", lambda x: x[:1]), r"misshapen weights: .*scales: expected shape \(2, 128\)"),
        (
            "gptq, 4 bits",
            changed(DOWN + "qweight", lambda x: x[:16]),
            r"misshapen weights: .*scales: expected shape \(1, 128\)",
        ),
        ("gptq, 4 bits", changed(DOWN + "qweight", lambda x: x.float()), "qweight: expected a matrix of I32"),
        (
            "gptq, 4 bits",
            changed(DOWN + "qweight", lambda x: x[:10]),
            "expected a multiple of 128 columns, the group_size, got 80",
        ),
        ("gptq, 4 bits", changed(DOWN + "g_idx", lambda x: x.flip(0)), r"g_idx: .*desc_act \(act-order\)"),
        ("gptq, 4 bits", changed(DOWN + "qzeros", lambda x: x + 1), "expected zero points in the middle"),
        ("gptq, 4 bits", changed(DOWN + "scales", set_nan), "down_proj.weight: expected finite scales, got NaN"),
        ("gptq, 4 bits", changed(DOWN + "scales", lambda x: x.float() * 1e9), "down_proj.weight: expected finite scales"),
        ("gptq, 4 bits", changed(DOWN + "scales", lambda x: x.int()), "scales: expected dtype F64 or F32"),
        ("awq, groups of 32", lacking(DOWN + "qzeros"), r"lacks weights: one that ends with \.qzeros"),
        ("awq, groups of 32", changed(DOWN + "qzeros", lambda x: x[:, :3]), r"qzeros: expected shape \(8, 16\), got \(8, 3\)"),
        ("pack-quantized, 4 bits, zero points", lacking(DOWN + "weight_scale"), r"one that ends with \.weight_scale"),
        ("pack-quantized, 4 bits, zero points", lacking(DOWN + "weight_zero_point"), r"one that ends with \.weight_zero_point"),
        ("pack-quantized, 4 bits", changed(DOWN + "weight_shape", lambda x: x - 1), r"weight_shape: expected \[128, 256\]"),
        ("naive-quantized", lacking(DOWN + "weight_scale"), r"one that ends with \.weight_scale beside"),
        ("naive-quantized", changed(DOWN + "weight_scale", set_nan), "expected finite scales, got NaN"),
        (
            "naive-quantized",
            changed(DOWN + "weight", lambda x: x[:, :64]),
            r"misshapen weights: .*down_proj\.weight: expected shape",
        ),
        (
            "naive-quantized",
            changed(DOWN + "weight", lambda x: x.short()),
            "weight: expected a matrix of I8, got shape .* of I16",
        ),
    ],
)
def test_damaged_matrices_are_named(layout, edit, message, quantized):
    folder, _ = quantized(layout)
    edit_weights(folder, edit)
    with raises(f"model.safetensors.*{message}"):
        GPT.from_pretrained(folder)
    if "finite" in message:
        with raises("down_proj.weight: expected finite numbers"):
            GPT.from_pretrained(folder, weights="dequantized", dtype=torch.float16)


def test_integers_that_do_not_fit_their_bits(quantized):
    folder, _ = quantized("naive-quantized")
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    edited(folder, config_groups={"group_0": group | {"weights": group["weights"] | {"num_bits": 4}}})
    with raises(r"_proj\.weight: expected integers from -8 to 7"):
        GPT.from_pretrained(folder)


def test_integers_without_a_quantization(quantized):
    folder, _ = quantized("naive-quantized")
    edit_config(folder, quantization_config=None)
    with raises("expected dtype F64 or F32 or F16 or BF16, got I8, which no quantization_config in config.json explains"):
        GPT.from_pretrained(folder)
