"""route and moe: references against plain loops and the blocks of transformers, gradients, and what they say to bad input."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fastgpt
from fastgpt import QuantizedWeight, moe, moe_reference, quantize, route, route_reference
from fastgpt.ops import moe as moe_module
from fastgpt.ops import moe_grouped as moe_grouped_module
from fastgpt.ops.experts import ACTIVATION_NUMBERS, CLAMPED
from fastgpt.testing import numerics

E, K, C, I = 8, 3, 32, 64


def call_of(rows=(2, 5), dtype=torch.float64, activation="silu", gated=True, biases=False, residual=False, E=E, K=K, C=C, I=I):
    """Random arguments of moe."""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    experts, weights = route(torch.randn(*rows, E, dtype=torch.promote_types(dtype, torch.float32)), K)
    call = {"x": random(*rows, C), "experts": experts, "weights": weights, "activation": activation, "gated": gated}
    call |= {"up": random(E, 2 * I if gated else I, C) / C**0.5, "down": random(E, C, I) / I**0.5}
    if biases:
        call |= {"up_bias": random(*call["up"].shape[:2]), "down_bias": random(E, C)}
    return call | ({"residual": random(*rows, C)} if residual else {})


def in_float64(call):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()}


def a_loop(x, experts, weights, up, down, up_bias=None, down_bias=None, activation="silu", gated=True, residual=None):
    """moe of one token after the other."""
    out = torch.zeros_like(x) if residual is None else residual.clone()
    for at in torch.cartesian_prod(*map(torch.arange, experts.shape)):
        token = tuple(at[:-1])
        e = experts[tuple(at)]
        y = up[e] @ x[token] + (0 if up_bias is None else up_bias[e])
        if activation == CLAMPED:
            gate, y = y[: len(y) // 2].clamp(max=7), y[len(y) // 2 :].clamp(-7, 7) + 1
            h = gate * torch.sigmoid(1.702 * gate) * y
        else:
            act = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
            act[None] = lambda x: x
            h = act[activation](y[: len(y) // 2]) * y[len(y) // 2 :] if gated else act[activation](y)
        out[token] += weights[tuple(at)] * (down[e] @ h + (0 if down_bias is None else down_bias[e]))
    return out


@pytest.mark.parametrize("biases, residual", [(False, False), (True, True)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATION_NUMBERS)
def test_against_a_loop(activation, gated, biases, residual):
    if activation == CLAMPED and not gated:
        return
    call = call_of(activation=activation, gated=gated, biases=biases, residual=residual)
    call["x"][0, 0] *= 20  # beyond what is clamped
    expected = a_loop(**call)
    for operation in (moe, moe_reference):
        torch.testing.assert_close(operation(**call), expected)


@pytest.mark.parametrize("rows", [(1,), (3,), (100,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_contract(rows, dtype):
    for call in (call_of(rows, dtype), call_of(rows, dtype, CLAMPED, biases=True, residual=True)):
        for impl in (None, "reference"):
            actual = moe(**call, impl=impl)
            assert actual.dtype == dtype and actual.is_contiguous()
            numerics.check(actual, lambda call=call: moe_reference(**in_float64(call)), arithmetic=dtype)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 200])
def test_quantized_weights(weights, rows):
    call = call_of((rows,), torch.float32, biases=True)
    quantized, dequantized = dict(call), dict(call)
    for name in ("up", "down"):
        quantized[name] = quantize(call[name].flatten(0, 1), weights)
        dequantized[name] = quantized[name].dequantize().view_as(call[name])
    for impl in (None, "reference"):
        numerics.check(moe(**quantized, impl=impl), lambda: moe_reference(**in_float64(dequantized)))


@pytest.mark.parametrize("operation", [moe, moe_reference])
@pytest.mark.parametrize("activation, gated", [("silu", True), ("gelu", False), (CLAMPED, True)])
def test_gradients(operation, activation, gated):
    call = call_of((2, 3), activation=activation, gated=gated, biases=True, residual=True, E=4, K=2, C=3, I=2)
    names = [name for name, value in call.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    tensors = [call[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *values: operation(**call | dict(zip(names, values))), tensors)


def test_an_expert_without_tokens_has_no_gradient():
    call = call_of((4,), E=8, K=1)
    call["experts"].fill_(2)
    call["up"].requires_grad_()
    (gradient,) = torch.autograd.grad(moe(**call).sum(), call["up"])
    assert gradient.flatten(1).any(1).nonzero().tolist() == [[2]]


def test_no_tokens():
    for rows in ((0,), (2, 0)):
        call = call_of(rows, torch.float32, residual=True)
        for impl in (None, "reference"):
            assert moe(**call, impl=impl).shape == (*rows, C)


@pytest.mark.parametrize("operation", [moe, moe_reference])
def test_no_tokens_have_zero_gradients(operation):
    """As of PyTorch's operations on tensors without numbers."""
    for quantized in (False, True):
        call = call_of((2, 0), torch.float32, biases=True, residual=True)
        if quantized:
            call |= {name: quantize(call[name].flatten(0, 1)) for name in ("up", "down")}
        leaves = [
            y.requires_grad_()
            for y in call.values()
            if isinstance(y, torch.Tensor) and y.dtype == torch.float32 and not isinstance(y, QuantizedWeight)
        ]
        gradients = torch.autograd.grad(operation(**call).sum(), leaves)
        assert all(gradient.shape == y.shape and not gradient.any() for gradient, y in zip(gradients, leaves))


@pytest.mark.parametrize("rows", [(0,), (3,), (600,)], ids=str)
@pytest.mark.parametrize("quantized", [False, True])
def test_shapes_without_data(rows, quantized):
    """On the meta device and of FakeTensorMode, with gradients and without."""

    def shapes(device):
        call = {name: y.to(device) if isinstance(y, torch.Tensor) else y for name, y in shaped().items()}
        if quantized:
            call |= {name: quantize(call[name].flatten(0, 1)) for name in ("up", "down")}
        with torch.no_grad():
            assert moe(**call).shape == moe(**call, impl="reference").shape == moe_reference(**call).shape == (*rows, C)
        leaves = [
            call[name].requires_grad_() for name in ("x", "weights", "up_bias", *[n for n in ("up", "down") if not quantized])
        ]
        out = moe(**call)
        gradients = torch.autograd.grad(out.sum(), leaves)
        assert out.shape == (*rows, C) and all(g.shape == y.shape and g.device == y.device for g, y in zip(gradients, leaves))

    def shaped():
        experts = torch.zeros(*rows, K, dtype=torch.int32)
        call = {"x": torch.ones(*rows, C), "experts": experts, "weights": torch.ones(*rows, K), "up_bias": torch.ones(E, 2 * I)}
        return call | {"up": torch.ones(E, 2 * I, C), "down": torch.ones(E, C, I), "activation": CLAMPED}

    shapes("meta")
    with FakeTensorMode():
        shapes("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("rows", [3, 600])
def test_compiled_with_gradients(rows, quantized):
    """As a whole: how many rows each expert gets is not traced."""
    call = call_of((rows,), torch.float32, biases=True, residual=True)
    names = ["x", "weights", "up_bias", "down_bias", "residual", *[name for name in ("up", "down") if not quantized]]
    exact = in_float64(call)
    if quantized:
        for name in ("up", "down"):
            shape, call[name] = call[name].shape, quantize(call[name].flatten(0, 1))
            exact[name] = call[name].dequantize(torch.float64).view(shape)
    compiled = torch.compile(lambda **call: moe(**call), fullgraph=True, backend="aot_eager")
    leaves, twins = ([values[name].requires_grad_() for name in names] for values in (call, exact))
    out = compiled(**call)
    numerics.check(out.detach(), lambda: moe_reference(**exact).detach())
    for gradient, name in zip(torch.autograd.grad(out.sum(), leaves), names):
        numerics.check(gradient, lambda name=name: torch.autograd.grad(moe_reference(**exact).sum(), exact[name])[0])


@pytest.mark.slow
def test_compiled_with_forward_mode_derivatives():
    """Never silently zero: not as a whole, but with a graph break."""
    call = call_of((3,))
    x, rest = call.pop("x"), call

    def tangent(operation):
        return torch.func.jvp(lambda x: operation(x, **rest), (x,), (x.cos(),))[1]

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="moe: expected no forward-mode derivatives"):
        torch.compile(tangent, backend="eager", fullgraph=True)(moe)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(tangent, backend="eager")(moe), tangent(moe_reference))


def test_the_operator_with_derivatives():
    call = call_of((5,), torch.float32, biases=True)
    tensors = [call[name] for name in ("x", "experts", "weights", "up", "down", "up_bias", "down_bias")]
    x, experts, weights, up, down, *biases = (y.requires_grad_() if y.is_floating_point() else y for y in tensors)
    arguments = x, experts, weights, up, [], down, [], E, *biases, ACTIVATION_NUMBERS["silu"], True
    torch.library.opcheck(torch.ops.fastgpt.moe_grouped.default, arguments)


def test_one_expert_twice():
    """For one token: both weights count."""
    call = call_of((5,), torch.float32)
    call["experts"][:] = call["experts"][:, :1]
    for impl in (None, "reference"):
        numerics.check(moe(**call, impl=impl), lambda: a_loop(**in_float64(call)))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("implementation", [moe_module._moe_reference, moe_grouped_module.moe_grouped])
def test_experts_that_do_not_exist_add_nothing_on_a_gpu(implementation, quantized, monkeypatch):
    """Where nobody waits for their numbers to refuse them, as on a CPU."""
    for module in (moe_module, moe_grouped_module):
        monkeypatch.setattr(module, "require_experts", lambda experts, E: None)
    call = call_of((6,), torch.float32, biases=True, residual=True)
    call["experts"][0, 1], call["weights"][0, 1] = 0, 0
    exact = in_float64(call)
    if quantized:
        for name in ("up", "down"):
            call[name] = quantize(call[name].flatten(0, 1))
            exact[name] = call[name].dequantize(torch.float64).view_as(exact[name])
    call["weights"][0, 1] = torch.nan

    def run():
        names = "x", "experts", "weights", "up", "down", "up_bias", "down_bias", "residual", "activation", "gated"
        return implementation(*(call[name] for name in names))

    for index in (-1, E, 2**31 - 1, -(2**31)):
        call["experts"][0, 1] = index
        numerics.check(run(), lambda: moe_reference(**exact), arithmetic=torch.float32)
    call["experts"][:] = E
    assert torch.equal(run(), call["residual"])


def test_autocast():
    call = call_of((4,), torch.float32, residual=True)
    with torch.autocast("cpu", torch.bfloat16):
        for impl in (None, "reference"):
            out = moe(**call, impl=impl)
            assert out.dtype == torch.float32
            with torch.autocast("cpu", enabled=False):
                numerics.check(out, lambda: a_loop(**in_float64(call)), arithmetic=torch.bfloat16)


def plain_route(logits, k, sigmoid=False, bias=None, groups=1, top_groups=1, top2=False, normalize=False, scale=1.0):
    """route of one token, in Python's numbers."""
    scores = (logits.sigmoid() if sigmoid else logits.softmax(-1)).tolist()
    choice = [s + b for s, b in zip(scores, [0.0] * len(scores) if bias is None else bias.tolist())]
    size = len(scores) // groups
    parts = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(groups)]
    value = [sum(part[:2]) if top2 else part[0] for part in parts]
    best = sorted(range(groups), key=lambda g: -value[g])[:top_groups]
    experts = sorted((e for g in best for e in range(g * size, (g + 1) * size)), key=lambda e: (-choice[e], e))[:k]
    weights = [scores[e] for e in experts]
    return experts, [w / (sum(weights) if normalize else 1) * scale for w in weights]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_groups, top_groups", [(1, 1), (4, 2), (4, 4), (2, 1)])
@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("biased, normalize, scale", [(False, False, 1.0), (True, True, 2.5)])
def test_route_against_python(scoring, num_groups, top_groups, group_score, biased, normalize, scale):
    logits, bias = torch.randn(20, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64) if biased else None
    options = {"scoring": scoring, "selection_bias": bias, "num_groups": num_groups, "top_groups": top_groups}
    options |= {"group_score": group_score, "normalize": normalize, "scale": scale}
    plain = scoring == "sigmoid", bias, num_groups, top_groups, group_score == "top2", normalize, scale
    for operation in (route, route_reference):
        experts, weights = operation(logits, 4, **options)
        assert experts.dtype == torch.int32 and weights.dtype == torch.float64
        for token in range(20):
            chosen, values = plain_route(logits[token], 4, *plain)
            assert experts[token].tolist() == chosen
            torch.testing.assert_close(weights[token], torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_of_equal_logits_the_first_experts_are_chosen(dtype):
    logits = torch.zeros(3, 2, 9, dtype=dtype)
    logits[..., 7] = 1
    experts, weights = route(logits, 3)
    assert experts.eq(torch.tensor([7, 0, 1])).all() and weights.dtype == torch.float32
    assert route(logits[..., :8], 3, num_groups=4, top_groups=2)[0].eq(torch.tensor([7, 0, 1])).all()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_nan_and_infinities_choose_experts_that_exist(scoring):
    logits = torch.randn(6, 8)
    logits[0, 3], logits[1], logits[2, 5], logits[3], logits[4, :4] = torch.nan, torch.nan, torch.inf, -torch.inf, -torch.inf
    for options in ({}, {"num_groups": 4, "top_groups": 2, "group_score": "top2", "normalize": True}):
        experts, weights = route(logits, 4, scoring=scoring, **options)
        assert experts.ge(0).all() and experts.lt(8).all() and all(len(row.unique()) == 4 for row in experts)
        assert weights[0].isnan().any() and torch.isfinite(weights[5]).all()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_no_expert_of_a_group_that_is_left_out(scoring, group_score):
    """Not even where a selection_bias of -inf bans those of the chosen groups."""
    logits, bias = torch.randn(50, 16), torch.randn(16)
    bias[torch.tensor([0, 1, 2, 5, 8, 12, 13, 14])] = -torch.inf
    options = {"scoring": scoring, "selection_bias": bias, "num_groups": 4, "top_groups": 2, "group_score": group_score}
    found = [route(logits, 7, impl=impl, **options)[0] for impl in (None, "reference")]
    assert torch.equal(*found) and all(len((row // 4).unique()) == 2 for row in found[0])
    for token in range(50):
        plain = plain_route(logits[token], 7, scoring == "sigmoid", bias, 4, 2, group_score == "top2")
        assert found[0][token].tolist() == plain[0]


def test_gradients_of_route():
    logits = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    options = {"num_groups": 2, "top_groups": 1, "group_score": "top2", "scale": 2.0}
    for operation in (route, route_reference):
        for scoring in ("softmax", "sigmoid"):
            for normalize in (True, False):

                def weights_of(logits, operation=operation, scoring=scoring, normalize=normalize):
                    return operation(logits, 3, scoring=scoring, normalize=normalize, **options)[1]

                assert torch.autograd.gradcheck(weights_of, logits)


def blocks():
    """Name -> a MoE block of transformers in float64, and what this package computes for it."""
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
    from transformers.models.mixtral import modeling_mixtral as mixtral
    from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

    def experts_of(block, x, router_bias=None, **options):
        router = getattr(block, "gate", None) or block.router
        logits = F.linear(x, router.weight, router_bias)
        return moe(x, *route(logits, K, **options), block.experts.gate_up_proj, block.experts.down_proj)

    def qwen2(block, x):
        return experts_of(block, x) + F.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)

    def v2(block, x):
        routed = experts_of(block, x, num_groups=4, top_groups=2, scale=1.5)
        return routed + block.shared_experts(x)

    def v3(block, x):
        bias = block.gate.e_score_correction_bias
        groups = {"num_groups": 4, "top_groups": 2, "group_score": "top2"}
        routed = experts_of(block, x, scoring="sigmoid", selection_bias=bias, normalize=True, scale=2.5, **groups)
        return routed + block.shared_experts(x)

    def oss(block, x):
        own, router = block.experts, block.router
        chosen = route(F.linear(x, router.weight, router.bias), K, normalize=True)
        up, up_bias = own.gate_up_proj.mT.unflatten(1, (-1, 2)), own.gate_up_proj_bias.unflatten(1, (-1, 2))  # interleaved
        up, up_bias = up.transpose(1, 2).flatten(1, 2).contiguous(), up_bias.mT.flatten(1)
        down = own.down_proj.mT.contiguous()
        return moe(x, *chosen, up, down, up_bias=up_bias, down_bias=own.down_proj_bias, activation=CLAMPED)

    sizes = {"hidden_size": C, "intermediate_size": I, "moe_intermediate_size": I, "num_experts_per_tok": K}
    sizes |= {"num_local_experts": E, "num_experts": E, "n_routed_experts": E, "hidden_act": "silu"}
    groups = {"n_group": 4, "topk_group": 2, "n_shared_experts": 1}
    return {
        "mixtral": (mixtral.MixtralSparseMoeBlock, sizes, lambda block, x: experts_of(block, x, normalize=True)),
        "qwen2_moe": (qwen2_moe.Qwen2MoeSparseMoeBlock, sizes | {"shared_expert_intermediate_size": 24}, qwen2),
        "qwen3_moe": (
            qwen3_moe.Qwen3MoeSparseMoeBlock,
            sizes | {"norm_topk_prob": True},
            lambda block, x: experts_of(block, x, normalize=True),
        ),
        "gpt_oss": (gpt_oss.GptOssMLP, sizes, oss),
        "deepseek_v2": (
            deepseek_v2.DeepseekV2Moe,
            sizes | groups | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
            v2,
        ),
        "deepseek_v3": (deepseek_v3.DeepseekV3MoE, sizes | groups | {"routed_scaling_factor": 2.5, "norm_topk_prob": True}, v3),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"])
def test_against_transformers(name):
    transformers = pytest.importorskip("transformers")
    cls, options, ours = blocks()[name]
    config = transformers.AutoConfig.for_model(name, **options)
    block = cls(config).double().eval()
    with torch.no_grad():
        for parameter in (*block.parameters(), *block.buffers()):
            nn.init.normal_(parameter, 0, 0.3)
        x = torch.randn(2, 7, C, dtype=torch.float64)
        expected = block(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        numerics.check(expected, lambda: ours(block, x), dtype=torch.float32)  # some of them compute scores in fp32


call = call_of((2, 5), torch.float32)
x, up, down = call["x"], call["up"], call["down"]


def named(value) -> str:
    """Of a parameter: not by numbers that are drawn."""
    return ", ".join(value) if isinstance(value, dict) else getattr(value, "__name__", value)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
        ({"x": x.int()}, TypeError, "x: expected dtype .*, got torch.int32"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \(..., C\), got a scalar"),
        ({"experts": call["experts"].float()}, TypeError, "experts: expected dtype torch.int32 or torch.int64, got"),
        ({"experts": call["experts"][0]}, ValueError, r"experts: expected shape \(2, 5, K\) .*, got \(5, 3\)"),
        ({"experts": call["experts"][..., :0]}, ValueError, r"experts: expected shape \(2, 5, K\) .*, got \(2, 5, 0\)"),
        ({"experts": call["experts"] + E}, ValueError, "experts: expected indices from 0 to 7, got 8 to 15"),
        ({"experts": call["experts"] - E}, ValueError, "experts: expected indices from 0 to 7, got -8 to -1"),
        ({"weights": call["weights"][..., :1]}, ValueError, r"weights: expected shape \(2, 5, 3\) \(..., K\), got"),
        ({"weights": call["weights"].half()}, TypeError, "weights: expected dtype torch.float32, got torch.float16"),
        ({"up": up[0]}, ValueError, r"up: expected 3 dimensions, got shape \(128, 32\)"),
        ({"up": up[:7]}, ValueError, r"up: expected shape \(8, 128, 32\) \(E, 2I, C\), got \(7, 128, 32\)"),
        ({"gated": False}, ValueError, r"up: expected shape \(8, 64, 32\) \(E, I, C\), got \(8, 128, 32\)"),
        ({"up": up.half()}, TypeError, "up: expected dtype torch.float32, got torch.float16"),
        ({"up": up.to("meta")}, ValueError, "up: expected device cpu, got meta"),
        ({"up": up.mT.contiguous().mT}, ValueError, "up: expected a contiguous last dimension"),
        ({"up": quantize(up[1:].flatten(0, 1), "int8")}, ValueError, r"up: expected shape \(1024, 32\) \(E · 2I, C\), got"),
        ({"down": down[:0], "up": up[:0]}, ValueError, r"down: expected shape \(E, 32, I\) with an expert at least, got"),
        ({"down": down[:, :30]}, ValueError, r"down: expected shape \(8, 32, 64\) \(E, C, I\), got \(8, 30, 64\)"),
        ({"up_bias": torch.zeros(8, 64)}, ValueError, r"up_bias: expected shape \(8, 128\) \(E, 2I\), got \(8, 64\)"),
        ({"down_bias": torch.zeros(32)}, ValueError, r"down_bias: expected shape \(8, 32\) \(E, C\), got \(32,\)"),
        ({"residual": torch.zeros(32)}, ValueError, r"residual: expected shape \(2, 5, 32\) \(..., C\), got \(32,\)"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of None, .*'swiglu_clamped', got 'tanh'"),
        (
            {"activation": CLAMPED, "gated": False},
            ValueError,
            "gated: expected True for activation='swiglu_clamped', got False",
        ),
        ({"gated": 1}, TypeError, "gated: expected a bool, got 1"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of .* or None, got 'cuda'"),
    ],
    ids=named,
)
def test_errors(change, error, message):
    for impl in (None, "reference") if "impl" not in change else (change["impl"],):
        with pytest.raises(error, match=message):
            moe(**(call | change | {"impl": impl}))


logits = torch.zeros(2, 8)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logits": 1.0}, TypeError, "logits: expected a torch.Tensor, got float"),
        ({"logits": logits.int()}, TypeError, "logits: expected dtype .*, got torch.int32"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits: expected shape \(..., E\), got a scalar"),
        ({"top_k": 0}, ValueError, "top_k: expected an integer >= 1 and <= 8, got 0"),
        ({"top_k": 9}, ValueError, "top_k: expected an integer >= 1 and <= 8, got 9"),
        ({"top_k": 2.0}, TypeError, "top_k: expected an integer >= 1 and <= 8, got 2.0"),
        ({"top_k": 3, "num_groups": 4}, ValueError, "top_k: expected an integer >= 1 and <= 2, got 3"),
        ({"scoring": "relu"}, ValueError, "scoring: expected one of 'softmax', 'sigmoid', got 'relu'"),
        ({"selection_bias": torch.zeros(7)}, ValueError, r"selection_bias: expected shape \(8,\) \(E,\), got \(7,\)"),
        (
            {"selection_bias": torch.zeros(8).half()},
            TypeError,
            "selection_bias: expected dtype torch.float32, got torch.float16",
        ),
        ({"num_groups": 3}, ValueError, "num_groups: expected a divisor of 8, the number of experts, got 3"),
        ({"num_groups": 2, "top_groups": 3}, ValueError, "top_groups: expected an integer >= 1 and <= 2, got 3"),
        ({"num_groups": 8, "group_score": "top2"}, ValueError, "num_groups: expected groups of at least 2 experts"),
        ({"group_score": "mean"}, ValueError, "group_score: expected one of 'max', 'top2', got 'mean'"),
        ({"normalize": None}, TypeError, "normalize: expected a bool, got None"),
        ({"scale": "1"}, TypeError, "scale: expected a finite number .*, got '1'"),
        ({"scale": 1e300}, ValueError, r"scale: expected a finite number >= -3.40\d+e\+38 and <= 3.40\d+e\+38, got 1e\+300"),
        ({"scale": -(10**39)}, ValueError, "scale: expected a finite number .*, got -1000000"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number .*, got inf"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number .*, got nan"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of .* or None, got 'cuda'"),
    ],
    ids=named,
)
def test_errors_of_route(change, error, message):
    for impl in (None, "reference") if "impl" not in change else (change["impl"],):
        with pytest.raises(error, match=message):
            route(**({"logits": logits, "top_k": 2} | change | {"impl": impl}))


def test_a_scale_of_fp64():
    """For logits of fp64, whose weights are so, too."""
    weights = route(logits.double(), 2, scale=1e300)[1]
    assert weights.dtype == torch.float64 and torch.equal(weights, torch.full((2, 2), 1.25e299, dtype=torch.float64))


def test_explain():
    assert fastgpt.explain(route, logits, 2)["reference"] in ("chosen", "available")
    assert fastgpt.explain(moe, **call)["reference"] in ("chosen", "available")
    with pytest.raises(ValueError, match="top_k"):
        fastgpt.explain(route, logits, 9)
