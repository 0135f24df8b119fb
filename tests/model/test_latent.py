"""Decoders with multi-head latent attention: the formula, caches, recorded steps, routers in fp32, saving, gradients, refusals."""

import copy

import pytest
import torch
from models import random_ids, random_model

from fastgpt import GPT, GPTConfig, QuantizedWeight, decoding, generate, run_with_cache
from fastgpt.cache.uncached import Uncached
from fastgpt.generation.batch_size import affordable_pages
from fastgpt.model.lora import add_adapters
from fastgpt.model.rope import Rope
from fastgpt.parallel import tensor_parallel
from fastgpt.testing import numerics

LATENT = {
    "norm": "rms", "activation": "silu", "gated": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False,
    "position": "rotary", "rope": Rope(8), "head_dim": 24, "v_head_dim": 12, "kv_rank": 32, "tie_embeddings": False,
}  # fmt: skip
EXPERTS = {
    "num_experts": 8, "experts_per_token": 3, "expert_size": 32, "shared_expert_size": 64, "router_fp32": True,
    "router_scoring": "sigmoid", "router_groups": 4, "router_top_groups": 2, "router_group_score": "top2",
    "router_normalize": True, "router_scale": 2.5, "router_selection_bias": True,
}  # fmt: skip
CASES = {
    "queries from x": LATENT,
    "queries from a latent": LATENT | {"q_rank": 64, "latent_norm_eps": 0.1, "qkv_bias": True, "attention_scale": 0.3},
    "experts": LATENT | EXPERTS | {"moe_layers": (False, True)},
    "windows, values larger than keys": LATENT | {"windows": (8, None), "v_head_dim": 40, "norm": "layer"},
    "not all layers rotate": LATENT | {"rope_layers": (True, False), "post_norms": True},
}
ALL = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


def model_of(fields):
    model = random_model(**fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def normalized(x, norm):
    x = x - x.mean() if norm.kind == "layer" else x
    y = x / (x.square().mean() + norm.eps).sqrt() * norm.weight
    return y if norm.bias is None else y + norm.bias


def rotated(x, position):
    """x (D,), whose first 8 dimensions are rotated, by PyTorch's complex numbers."""
    angles = position * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    pairs = torch.complex(x[:4], x[4:8]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag, x[8:]])


@pytest.mark.parametrize("case", ["queries from x", "queries from a latent", "not all layers rotate"])
@torch.no_grad()
def test_attention_of_one_head_and_token_after_the_other(case):
    fields = CASES[case]
    for layer, block in enumerate(model_of(fields).double().blocks):
        attention, latent, norm = block.attention, block.attention.latent, block.attention_norm
        states = torch.randn(5, 64, dtype=torch.float64)
        turns = "rope_layers" not in fields or fields["rope_layers"][layer]
        turn = rotated if turns else lambda x, position: x
        queries, keys, values = [], [], []
        for t, state in enumerate(states):
            x = normalized(state, norm)
            q = latent.q(x) if latent.q_b is None else latent.q_b(normalized(latent.q_a(x), latent.q_a_norm))
            a = latent.kv_a(x)
            kv = latent.kv_b(normalized(a[:32], latent.kv_a_norm)).view(4, 16 + 12)
            queries.append([turn(head, t) for head in q.view(4, 24)])
            keys.append([turn(torch.cat([a[32:], head[:16]]), t) for head in kv])
            values.append([head[16:] for head in kv])
        expected = []
        for t in range(5):
            heads = []
            for h in range(4):
                scores = torch.stack([queries[t][h] @ keys[s][h] for s in range(t + 1)])
                weights = (scores * fields.get("attention_scale", 24**-0.5)).softmax(0)
                heads.append(sum(weights[s] * values[s][h] for s in range(t + 1)))
            y = attention.out(torch.cat(heads))
            expected.append(states[t] + (y if attention.post_norm is None else normalized(y, attention.post_norm)))
        cache = Uncached()
        cache.extend(5)
        actual = attention(states[None], norm, cache, Rope(8).rotation(5), False)[0]
        torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-6, atol=1e-6)  # tables are of fp32 angles


@ALL
def test_tokens_are_the_same_with_every_cache(fields):
    model = model_of(fields)
    prompts = [random_ids(model, 1, length)[0].tolist() for length in (20, 3, 11)]
    expected = generate(model, prompts, 30, use_cache=False)
    for options in ({}, {"cache": "paged", "page_size": 4}, {"cache": "sliding", "window": 96}, {"prefill_chunk": 7}):
        assert all(torch.equal(*pair) for pair in zip(generate(model, prompts, 30, **options), expected)), options
    assert all(torch.equal(*pair) for pair in zip(generate(model, prompts, 30, speculate="prompt"), expected))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@torch.no_grad()
def test_8_bit_caches(cache_dtype):
    model = model_of(LATENT)
    ids, cache = random_ids(model, 2, 20), model.new_cache(2, cache_dtype=cache_dtype)
    error = (model(ids, cache=cache) - model(ids)).norm() / model(ids).norm()
    assert 0 < error < 0.1 and cache.storage.v.shape[-1] == 12


@ALL
@torch.inference_mode()
def test_steps_are_recorded(fields):
    model = model_of(fields)
    for batch in (1, 2):
        ids, eager, captured = random_ids(model, batch, 30), model.new_cache(batch), model.new_cache(batch)
        for cache in (eager, captured):
            model(ids[:, :20], cache=cache)
        step = decoding(model, captured)
        for token in ids[:, 20:].T:
            assert torch.equal(step(token), model(token.unsqueeze(1), cache=eager)[:, -1])


@ALL
def test_saved_as_our_own(fields, tmp_path):
    model = model_of(fields)
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), model.parameters()))


@pytest.mark.parametrize("weights", ["int8", "int4"])
@torch.no_grad()
def test_quantized_weights(weights, tmp_path):
    fields = CASES["queries from a latent"] | EXPERTS | {"v_head_dim": 16}
    model_of(fields).save_pretrained(tmp_path / "plain")
    model = GPT.from_pretrained(tmp_path / "plain", weights=weights)
    latent = model.blocks[0].attention.latent
    assert all(isinstance(getattr(latent, name).weight, QuantizedWeight) for name in ("q_a", "q_b", "kv_a", "kv_b"))
    plain, ids = GPT(model.config).eval(), random_ids(model, 2, 20)
    for weight, target in zip(model.parameters(), plain.parameters()):
        numbers = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        target.copy_(numbers.view_as(target))
    numerics.check(model(ids), lambda: copy.deepcopy(plain).double()(ids))
    assert torch.equal(generate(model, ids, 20), generate(model, ids, 20, use_cache=False))
    model.save_pretrained(tmp_path / "blocks")
    assert torch.equal(GPT.from_pretrained(tmp_path / "blocks")(ids), model(ids))


def test_a_router_stays_in_fp32(tmp_path):
    """With weights in bf16: of 64 products, a logit's error is a thousandth of what it would be in bf16."""
    model = model_of(LATENT | EXPERTS)
    model.blocks[0].mlp.selection_bias.data.normal_()
    model.save_pretrained(tmp_path / "plain")
    low = GPT.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    kept = {name for name, parameter in low.named_parameters() if parameter.dtype is torch.float32}
    assert kept == {f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in ("router.weight", "selection_bias")}
    layer, exact = low.blocks[0].mlp, model.blocks[0].mlp
    assert torch.equal(layer.selection_bias, exact.selection_bias) and not layer.selection_bias.requires_grad
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        numerics.check(layer.router_logits(x), lambda: x.double() @ exact.router.weight.double().t())
    low.save_pretrained(tmp_path / "low")
    again, ids = GPT.from_pretrained(tmp_path / "low"), random_ids(model, 2, 10)
    assert again.token_embedding.weight.dtype is torch.bfloat16
    assert torch.equal(generate(again, ids, 20), generate(low, ids, 20))
    assert GPT.from_pretrained(tmp_path / "plain", dtype=torch.float64).blocks[0].mlp.router.weight.dtype is torch.float64
    assert generate(model.bfloat16(), ids, 3).shape == (2, 13)  # all of it


@pytest.mark.parametrize("fields", [CASES["queries from a latent"] | EXPERTS, LATENT], ids=["queries from a latent", "from x"])
def test_gradients(fields):
    """Those in fp32 against those in fp64, by the contract."""
    model = model_of(fields)
    ids = random_ids(model, 2, 20)

    def gradients(model):
        model.zero_grad()
        model(ids).logsumexp(-1).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    found, double = gradients(model), copy.deepcopy(model).double()
    left_out = {name for name, parameter in model.named_parameters() if name not in found}
    assert all(name.endswith("selection_bias") for name in left_out) and all(grad.any() for grad in found.values())
    numerics.check(found, numerics.simulate(lambda: gradients(double)))


@torch.no_grad()
def test_activations():
    model = model_of(LATENT)
    ids = random_ids(model, 1, 9)
    logits, activations = run_with_cache(model, ids)
    assert torch.equal(logits, model(ids))
    attention = {name: activations[f"blocks.1.attention.{name}"] for name in ("q", "k", "v", "pattern", "output")}
    shapes = {name: tuple(x.shape) for name, x in attention.items()}
    assert shapes == dict(q=(1, 4, 9, 24), k=(1, 4, 9, 24), v=(1, 4, 9, 12), pattern=(1, 4, 9, 9), output=(1, 4, 9, 12))
    torch.testing.assert_close(attention["pattern"] @ attention["v"], attention["output"])


def test_sizes_of_a_cache():
    model, other = model_of(LATENT), model_of(LATENT | {"v_head_dim": 16})
    cache = model.new_cache(1, 10)
    assert cache.nbytes == 2 * 10 * 4 * (24 + 12) * 4
    with pytest.raises(
        ValueError, match=r"cache: expected 2 layers of 4 KV heads of head dim 24 \(values: 16\), .* head dim 24 \(values: 12\)"
    ):
        other(random_ids(other, 1, 3), cache=cache)
    pages = [affordable_pages(m, 16, None) for m in (model, random_model(head_dim=24, num_kv_heads=4))]
    assert pages[0] / pages[1] == pytest.approx(49 / 37, rel=0.2)  # 24 + 24 and 24 + 12 numbers, and two scales


# Refusals


def test_adapters(tmp_path):
    model = model_of(LATENT | EXPERTS)
    with pytest.raises(ValueError, match="lora_targets: expected qkv,out for a model with experts"):
        add_adapters(model, 4, 16.0)
    add_adapters(model, 4, 16.0, ("qkv", "out"))
    trained = {name.split(".", 2)[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"attention.{x}.lora_{m}" for x in ("latent.q", "latent.kv_a", "latent.kv_b", "out") for m in "AB"}


def test_tensor_parallelism_is_refused():
    class OneProcess:
        def size(self):
            return 1

    with pytest.raises(ValueError, match="model: expected attention without latents, got kv_rank=32, which are not sharded"):
        tensor_parallel(random_model(**LATENT), OneProcess())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"q_rank": 4}, "q_rank: expected None without kv_rank, got 4"),
        ({"v_head_dim": 4}, "v_head_dim: expected head_dim=16 without kv_rank, got 4"),
        ({"kv_rank": 4}, "rope.dim: expected less than head_dim=16 with kv_rank, got None"),
        (LATENT | {"rope": Rope(24)}, "rope.dim: expected less than head_dim=24 with kv_rank, got Rope"),
        (LATENT | {"num_kv_heads": 2}, "num_kv_heads: expected num_heads=4 with kv_rank, got 2"),
        (LATENT | {"qk_norm": True}, "qk_norm: expected False with kv_rank, got True"),
        (LATENT | {"v_head_dim": 577}, "v_head_dim: expected at most 576, got 577"),
        (LATENT | {"kv_rank": 0}, "kv_rank: expected an integer >= 1"),
    ],
    ids=str,
)
def test_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(65, 32, num_layers=2, num_heads=4, hidden_size=64, **fields)
