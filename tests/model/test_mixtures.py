"""Decoders with mixtures of experts: what a layer computes, caches, quantized weights, saving, gradients, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import random_ids, random_model
from torch import nn

from fastgpt import GPT, GPTConfig, QuantizedWeight, decoding, generate, quantize
from fastgpt.model.lora import Adapter, add_adapters, apply_adapters, attach
from fastgpt.model.moe import MoE, load_balancing_loss, recorded_router_logits
from fastgpt.model.rope import Rope
from fastgpt.parallel import tensor_parallel
from fastgpt.testing import numerics

EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_size": 32}
SHARED = EXPERTS | {"shared_expert_size": 64, "shared_expert_gate": True, "router_normalize": True}
LLAMA = {
    "norm": "rms", "activation": "silu", "gated": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False,
    "position": "rotary", "rope": Rope(16), "num_kv_heads": 2, "tie_embeddings": False,
}  # fmt: skip
CASES = {
    "gpt2": EXPERTS,
    "llama": LLAMA | EXPERTS,
    "shared": LLAMA | SHARED,
    "shared, no gate, biases": LLAMA | SHARED | {"shared_expert_gate": False, "mlp_bias": True, "router_bias": True},
    "some layers": LLAMA | EXPERTS | {"moe_layers": (False, True)},
    "post norms": LLAMA | SHARED | {"post_norms": True, "pre_norms": 0},
    "parallel": LLAMA | EXPERTS | {"parallel": True, "pre_norms": 1},
    "clamped, sinks": LLAMA | EXPERTS | {"activation": "swiglu_clamped", "attention_sinks": True, "mlp_bias": True},
}
ALL = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


def mixed(layer, x):
    """What a layer adds to the residual stream, of normalized x (C,) of one token."""
    scores = layer.router(x).softmax(-1)
    weights, experts = scores.topk(layer.top_k)
    weights = weights / weights.sum() if layer.routing["normalize"] else weights

    def mlp(up, up_bias, down, down_bias):
        y = F.linear(x, up, up_bias)
        gate, y = y.chunk(2) if layer.gated else (y, 1)
        act = F.silu if layer.activation == "silu" else lambda y: F.gelu(y, approximate="tanh")
        return F.linear(act(gate) * y, down, down_bias)

    biases = [(None,) * len(layer.up) if bias is None else bias for bias in (layer.up_bias, layer.down_bias)]
    out = sum(w * mlp(layer.up[e], biases[0][e], layer.down[e], biases[1][e]) for w, e in zip(weights, experts))
    if layer.shared is not None:
        y = mlp(layer.shared.up.weight, layer.shared.up.bias, layer.shared.down.weight, layer.shared.down.bias)
        out = out + (y if layer.shared_gate is None else torch.sigmoid(layer.shared_gate(x)) * y)
    return out


@pytest.mark.parametrize("case", ["gpt2", "llama", "shared", "shared, no gate, biases"])
@torch.no_grad()
def test_a_layer_against_one_token_after_the_other(case):
    block = random_model(**CASES[case]).double().blocks[0]
    for name, bias in block.mlp.named_parameters():
        if name.endswith("bias"):
            bias.normal_()
    x, residual = torch.randn(2, 2, 3, 64, dtype=torch.float64)
    y = block.mlp_norm(x)
    expected = torch.stack([mixed(block.mlp, row) for row in y.flatten(0, 1)]).view_as(x) + residual
    torch.testing.assert_close(block.mlp(x, block.mlp_norm, residual), expected)
    handle = block.mlp.shared.register_forward_hook(lambda *call: None) if block.mlp.shared is not None else None
    torch.testing.assert_close(block.mlp(x, block.mlp_norm, residual), expected)  # called as a module
    if handle is not None:
        handle.remove()


@ALL
def test_tokens_are_the_same_with_every_cache(fields):
    model = random_model(**fields)
    prompts = [random_ids(model, 1, length)[0].tolist() for length in (20, 3, 11)]
    expected = generate(model, prompts, 30, use_cache=False)
    for options in ({}, {"cache": "paged", "page_size": 4}, {"cache": "sliding", "window": 96}):
        assert all(torch.equal(*pair) for pair in zip(generate(model, prompts, 30, **options), expected)), options


@ALL
@torch.inference_mode()
def test_steps_give_the_bits_of_the_model(fields):
    """Recorded where kernels serve a mixture of experts, else called."""
    model = random_model(**fields)
    ids, eager, captured = random_ids(model, 2, 30), model.new_cache(2), model.new_cache(2)
    for cache in (eager, captured):
        model(ids[:, :20], cache=cache)
    step = decoding(model, captured)
    for token in ids[:, 20:].T:
        assert torch.equal(step(token), model(token.unsqueeze(1), cache=eager)[:, -1])


@ALL
def test_saved_as_our_own(fields, tmp_path):
    model = random_model(**fields)
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), model.parameters()))


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("case", ["gpt2", "shared", "clamped, sinks"])
@torch.no_grad()
def test_quantized_experts(case, weights, tmp_path):
    random_model(**CASES[case]).save_pretrained(tmp_path / "plain")
    model = GPT.from_pretrained(tmp_path / "plain", weights=weights)
    assert isinstance(model.blocks[0].mlp.up, QuantizedWeight) and isinstance(model.blocks[0].mlp.down, QuantizedWeight)
    plain, ids = GPT(model.config).eval(), random_ids(model, 2, 20)
    for (name, weight), target in zip(model.named_parameters(), plain.parameters()):
        numbers = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        target.copy_(numbers.view_as(target)), name
    numerics.check(model(ids), lambda: copy.deepcopy(plain).double()(ids))
    assert torch.equal(generate(model, ids, 20), generate(model, ids, 20, use_cache=False))
    model.save_pretrained(tmp_path / "blocks")
    assert torch.equal(GPT.from_pretrained(tmp_path / "blocks")(ids), model(ids))
    model.save_pretrained(tmp_path / "numbers", weights="dequantized")
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "numbers")(ids), plain(ids))


@ALL
def test_all_weights_have_gradients(fields):
    model = random_model(**fields).train()
    model(random_ids(model, 2, 40)).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(65, 32, num_layers=2, num_heads=4, hidden_size=64, **SHARED, mlp_bias=True, router_bias=True))
    layer = model.blocks[0].mlp
    for weight, expected in (
        (layer.up, 0.02),
        (layer.down, 0.01),
        (layer.shared.down.weight, 0.01),
        (layer.router.weight, 0.02),
    ):
        assert abs(weight.std().item() / expected - 1) < 0.2
    assert not any(bias.any() for name, bias in model.named_parameters() if name.endswith("bias"))


def test_dropout_is_applied_once():
    model = random_model(**LLAMA | SHARED, dropout=0.5).train()
    layer, x = model.blocks[0].mlp, torch.randn(1, 200, 64)
    out = layer(x, None, torch.zeros_like(x))
    expected = 2 * layer.eval()(x, None, torch.zeros_like(x))
    kept = out != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(out[kept], expected[kept])


# Balanced loads


def test_the_load_balancing_loss_is_that_of_transformers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = tuple(torch.randn(50, 8) for _ in range(3))
    for top_k in (1, 2, 8):
        torch.testing.assert_close(
            load_balancing_loss([x.view(2, 25, 8) for x in logits], top_k), mixtral.load_balancing_loss_func(logits, 8, top_k)
        )
    balanced = torch.zeros(8, 8).fill_diagonal_(20)
    assert load_balancing_loss([balanced], 1) < load_balancing_loss([balanced[:1].expand(8, 8)], 1)


def test_router_logits_are_recorded_and_nothing_stays():
    model = random_model(**LLAMA | EXPERTS | {"moe_layers": (False, True)})
    ids = random_ids(model, 2, 10)
    with torch.no_grad():
        expected = model(ids)
        with recorded_router_logits(model) as logits:
            torch.testing.assert_close(model(ids), expected)
        assert [x.shape for x in logits] == [(2, 10, 4)]
        assert torch.equal(model(ids), expected) and len(logits) == 1


@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_adapters_of_a_gated_shared_expert(quantized):
    """As PEFT's on shared_expert and shared_expert_gate are applied: beside the weights, the result is that of merged ones."""
    model, adapters = random_model(**LLAMA | SHARED), {}
    if quantized:
        for layer in (block.mlp.shared for block in model.blocks):
            for part in (layer.up, layer.down):
                part.weight = nn.Parameter(quantize(part.weight), requires_grad=False)
    merged = copy.deepcopy(model)
    for name, layer in merged.named_modules():
        if name.rpartition(".")[2] in ("shared_gate", "router") or ".shared." in name and isinstance(layer, nn.Linear):
            N, width = layer.weight.shape
            adapters[name] = Adapter(torch.randn(3, width), 0.1 * torch.randn(N, 3), 0.5)
            layer.weight = nn.Parameter(
                layer.weight.dequantize() if isinstance(layer.weight, QuantizedWeight) else layer.weight
            )
    apply_adapters(merged, adapters)
    assert len(adapters) == 4 * len(model.blocks)
    plain = model(ids := random_ids(model, 2, 9))
    for name, adapter in adapters.items():
        attach(model.get_submodule(name), adapter)
    expected, found = merged(ids), model(ids)
    torch.testing.assert_close(found, expected)
    assert (found - plain).abs().max() > 0.01


# Refusals


def test_adapters_of_experts_are_refused():
    model = random_model(**LLAMA | EXPERTS)
    with pytest.raises(ValueError, match="lora_targets: .* got qkv,out,up,down: lora_targets='qkv,out' adapts"):
        add_adapters(model, 4, 16.0)
    add_adapters(model, 4, 16.0, ("qkv", "out"))


def test_tensor_parallelism_is_refused():
    class OneProcess:
        def size(self):
            return 1

    with pytest.raises(ValueError, match="model: expected an MLP in each layer, got num_experts=4, which are not sharded"):
        tensor_parallel(random_model(**LLAMA | EXPERTS), OneProcess())
    with pytest.raises(ValueError, match="model: expected attention without sinks, got attention_sinks=True"):
        tensor_parallel(random_model(**LLAMA, attention_sinks=True), OneProcess())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_experts": 4}, "experts_per_token: expected an integer from 1 to num_experts=4, got None"),
        (EXPERTS | {"experts_per_token": 5}, "experts_per_token: expected an integer from 1 to num_experts=4, got 5"),
        ({"experts_per_token": 2}, "experts_per_token: expected None without num_experts, got 2"),
        ({"router_normalize": True}, "router_normalize: expected False without num_experts, got True"),
        ({"router_scoring": "sigmoid"}, "router_scoring: expected 'softmax' without num_experts, got 'sigmoid'"),
        (EXPERTS | {"router_groups": 3}, "router_groups: expected a divisor of num_experts=4, got 3"),
        (EXPERTS | {"router_top_groups": 2}, "router_top_groups: expected as many of router_groups=1 groups of 4 .*, got 2"),
        (EXPERTS | {"router_groups": 4}, "router_top_groups: expected as many .* as experts_per_token=2 needs, got 1"),
        (
            EXPERTS | {"router_groups": 4, "router_top_groups": 2, "router_group_score": "top2"},
            "router_groups: expected groups of 2 experts or more for 'top2', got 4",
        ),
        (EXPERTS | {"moe_layers": (True,)}, r"moe_layers: expected 2 entries, one for each layer, got \(True,\)"),
        (EXPERTS | {"shared_expert_gate": True}, "shared_expert_gate: expected False without shared_expert_size"),
        ({"activation": "swiglu_clamped", "gated": True}, "activation: expected one of None, 'gelu_tanh', .* for an MLP"),
        (EXPERTS | {"activation": "swiglu_clamped"}, "activation: expected one of .* got 'swiglu_clamped'"),
        (SHARED | {"activation": "swiglu_clamped", "gated": True}, "activation: expected one of .* got 'swiglu_clamped'"),
    ],
    ids=str,
)
def test_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(65, 32, num_layers=2, num_heads=4, hidden_size=64, **fields)


def test_sizes_by_default():
    config = GPTConfig(65, 32, num_layers=2, num_heads=4, hidden_size=64, num_experts=4, experts_per_token=1)
    assert config.expert_size == 256 and config.has_experts(1)
    model = GPT(config)
    assert all(isinstance(block.mlp, MoE) for block in model.blocks)
    assert isinstance(copy.deepcopy(model).blocks[0].mlp.router, nn.Linear)
