"""Decoders whose matrices have 8 or 4 bits: loading, logits, recorded steps, saving."""

import pytest
import torch
from models import random_ids, random_model

from fastgpt import GPT, Quantization, QuantizedWeight, decoding, generate, pipeline, quantize
from fastgpt.checkpoints import loading
from fastgpt.cli.main import main
from fastgpt.model.rope import Rope
from fastgpt.testing import numerics

LLAMA = {
    "norm": "rms", "activation": "silu", "gated": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False,
    "position": "rotary", "rope": Rope(16), "num_kv_heads": 2, "tie_embeddings": False,
}  # fmt: skip
FAMILIES = pytest.mark.parametrize("fields", [{}, LLAMA], ids=["gpt2", "llama"])
VOCABULARY = ("token_embedding.weight", "output.weight")  # never below 8 bits
BITS = pytest.mark.parametrize("bits", ["int8", "int4"])


@pytest.fixture
def saved(tmp_path, fields):
    model = random_model(**fields)
    model.save_pretrained(tmp_path)
    return tmp_path


def dequantized(model):
    """A model of plain weights that are what the quantized ones stand for."""
    plain = GPT(model.config).eval()
    plain.load_state_dict(
        {
            name: weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
            for name, weight in model.state_dict().items()
        }
    )
    return plain


@BITS
@FAMILIES
@torch.inference_mode()
def test_logits_and_tokens_are_those_of_the_dequantized_weights(saved, bits):
    model = GPT.from_pretrained(saved, weights=bits)
    matrices = [name for name, weight in model.named_parameters() if isinstance(weight, QuantizedWeight)]
    others = [name for name, weight in model.named_parameters() if weight.dim() == 2 and name not in matrices]
    assert "token_embedding.weight" in matrices and others in ([], ["position_embedding.weight"])
    plain, ids = dequantized(model), random_ids(model, 3, 20)
    numerics.check(model(ids), lambda: plain.double()(ids).float())
    plain = dequantized(model)
    tokens = generate(model, ids, 40)
    assert torch.equal(tokens, generate(plain, ids, 40)) and torch.equal(tokens, generate(model, ids, 40, use_cache=False))


@BITS
@FAMILIES
@torch.inference_mode()
def test_steps_are_recorded_until_a_weight_is_replaced(saved, bits):
    model = GPT.from_pretrained(saved, weights=bits)
    ids, caches = random_ids(model, 2, 12), [model.new_cache(2) for _ in range(2)]
    for cache in caches:
        model(ids[:, :4], cache=cache)
    step = decoding(model, caches[0])
    for i in range(4, 12):
        if i == 8:
            layer = model.blocks[1].mlp.down
            layer.weight = torch.nn.Parameter(quantize(torch.randn(layer.weight.shape), bits), requires_grad=False)
        expected = model.logits(model.hidden(ids[:, i : i + 1], caches[1])[:, -1])
        assert torch.equal(step(ids[:, i]), expected)
        assert step.recording.is_recorded


@BITS
@FAMILIES
def test_what_is_saved_is_the_same_model(saved, bits, tmp_path):
    model = GPT.from_pretrained(saved, weights=bits, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "copy")
    copy = GPT.from_pretrained(tmp_path / "copy")
    for (name, weight), again in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert type(weight) is type(again) and weight.dtype == again.dtype, name
        if isinstance(weight, QuantizedWeight):
            assert weight.packing == again.packing and torch.equal(weight.blocks, again.blocks), name
        else:
            assert torch.equal(weight, again), name
    ids = random_ids(model, 2, 9)
    assert torch.equal(model(ids), copy(ids)) and copy.config == model.config
    copy = GPT.from_pretrained(tmp_path / "copy", weights="dequantized")
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), dequantized(model).bfloat16().parameters(), strict=True))


@BITS
@FAMILIES
def test_saved_dequantized(saved, bits, tmp_path):
    model = GPT.from_pretrained(saved, weights=bits, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "copy", weights="dequantized")
    copy = GPT.from_pretrained(tmp_path / "copy")
    ids = random_ids(model, 2, 9)
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), dequantized(model).bfloat16().parameters(), strict=True))
    numerics.check(model(ids), lambda: copy.double()(ids), arithmetic=torch.bfloat16)
    with pytest.raises(ValueError, match="weights: expected one of None, 'dequantized', got 'int8'"):
        model.save_pretrained(tmp_path, weights="int8")


@FAMILIES
def test_loaded_in_chunks_is_quantized_whole(saved, monkeypatch):
    """Whatever the chunks are, also of matrices that are stored transposed."""
    monkeypatch.setattr(loading, "QUANTIZED_CHUNK", 1000)
    plain = GPT.from_pretrained(saved)
    for chosen in (Quantization("int4"), Quantization("int4", 64, minima=True), Quantization("int8", None)):
        model = GPT.from_pretrained(saved, weights=chosen)
        for name, weight in model.named_parameters():
            if isinstance(weight, QuantizedWeight):
                exact = Quantization("int8", chosen.group_size) if name in VOCABULARY else chosen
                expected = quantize(plain.get_parameter(name), exact.dtype, exact.group_size, minima=exact.minima)
                assert torch.equal(weight.blocks, expected.blocks)


@FAMILIES
def test_gradients_reach_what_is_trained_in_front_of_them(saved):
    model = GPT.from_pretrained(saved, weights="int8")
    plain, ids = dequantized(model).double(), random_ids(model, 2, 9)

    def gradient(model):
        first_norm = next(weight for weight in model.blocks[0].parameters() if weight.dim() == 1)
        return torch.autograd.grad(model(ids).logsumexp(-1).sum(), first_norm)[0]

    numerics.check(gradient(model), lambda: gradient(plain))


@pytest.mark.parametrize("fields", [{"width": 40}])
def test_matrices_that_do_not_fit_are_named(saved):
    with pytest.raises(
        ValueError, match=r"weights: token_embedding\.weight cannot be quantized to int8: .* multiple of 32 columns"
    ):
        GPT.from_pretrained(saved, weights="int8")


@pytest.mark.parametrize("value", ["int2", 8, True, ["int8"]], ids=str)
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="weights: expected one of 'int8', 'int4', 'dequantized', got"):
        pipeline(weights=value)


def test_float64_is_refused():
    with pytest.raises(TypeError, match="dtype: expected fp32, fp16 or bf16 with weights='int8', got torch.float64"):
        pipeline(weights="int8", dtype=torch.float64)


def test_the_shipped_model_in_four_bits(capsys):
    pipe = pipeline(weights="int4")
    assert len(pipe("ROMEO:", max_new_tokens=9)) > 3
    main(["generate", "ROMEO:", "--weights", "int4", "--max-new-tokens", "9", "--json"])
    assert '"new_tokens": 9' in capsys.readouterr().out
