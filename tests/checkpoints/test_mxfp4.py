"""Folders with experts in MXFP4, as OpenAI's."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastgpt import GPT
from fastgpt.ops.quantized_weight import GGUF_PACKINGS


def in_mxfp4(weight):
    """(E, N, C) -> blocks (E, N, C/32, 16) and scales (E, N, C/32), as OpenAI's checkpoints have them."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    groups = weight.unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil().clamp(-100, 100)
    scaled = groups / 2**exponents
    q = (scaled.abs()[..., None] - values).abs().argmin(-1) + 8 * (scaled < 0)
    return (q[..., 0::2] | q[..., 1::2] << 4).to(torch.uint8), (exponents.squeeze(-1) + 127).to(torch.uint8)


@torch.no_grad()
def test_experts_of_gpt_oss_stay_in_mxfp4(tmp_path):
    """And are the numbers that transformers dequantizes."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=3, num_experts_per_tok=2, sliding_window=16, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        weight = weights.pop(name).float().mT * 30  # (E, N, C)
        weights[f"{name}_blocks"], weights[f"{name}_scales"] = in_mxfp4(weight)
    save_file(weights, path, metadata={"format": "pt"})
    stored = json.loads((tmp_path / "config.json").read_text())
    entry = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}
    (tmp_path / "config.json").write_text(json.dumps(stored | {"quantization_config": entry}))

    model, plain = GPT.from_pretrained(tmp_path), GPT.from_pretrained(tmp_path, weights="dequantized")
    for block, numbers in zip(model.blocks, plain.blocks):
        for name in ("up", "down"):
            weight = getattr(block.mlp, name)
            assert weight.packing == GGUF_PACKINGS["MXFP4"]
            assert torch.equal(weight.dequantize().view_as(getattr(numbers.mlp, name)), getattr(numbers.mlp, name))
    quantization = transformers.Mxfp4Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "numbers")
    saved = load_file(tmp_path / "numbers" / "model.safetensors")
    for name, weight in theirs.state_dict().items():
        assert torch.equal(saved[name], weight), name
    ids = torch.randint(97, (1, 20))
    model.save_pretrained(tmp_path / "blocks")
    assert torch.equal(GPT.from_pretrained(tmp_path / "blocks")(ids), model(ids))

    for name, change, message in (
        ("gate_up_proj_scales", lambda x: x[:, :-1], "gate_up_proj_scales: expected shape .* of U8, got"),
        ("down_proj_blocks", lambda x: x[..., :8], "down_proj_blocks: expected shape .E, N, C/32, 16. of U8, got"),
    ):
        key = f"model.layers.1.mlp.experts.{name}"
        save_file(weights | {key: change(weights[key]).contiguous()}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path)
