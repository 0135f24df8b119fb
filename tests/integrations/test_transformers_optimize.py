"""`optimize` and `restore`: models of transformers whose attention, linear layers and norms fastgpt serves."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from architectures import ALONE, ARCHITECTURES, build, cache_of, check_model, generated, gradients, inputs, outputs, shares
from torch.nn.utils import parametrize, prune
from transformers.pytorch_utils import Conv1D

import fastgpt
import fastgpt.integrations.transformers as ft
from fastgpt.integrations.transformers import layers
from fastgpt.testing import numerics

KERNELS = {"cpp", "linear: cpp", "norm: cpp"}
WITH_GRADIENTS = {"cpp", "linear: reference", "norm: PyTorch"}
BROAD = ("gpt2", "llama", "gemma2", "t5")  # Conv1D and a tied output; RMS norms; an offset; encoder and decoder


@pytest.fixture(autouse=True)
def unregistered():
    yield
    ft.unregister()


def check(calls, found, expected):
    assert calls.keys() == expected
    # Written so that a NaN fails.
    assert not {part: share for part, share in found.items() if not share <= 1}


def expected_calls(name, names):
    return names - {"cpp"} if name in ALONE else names


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs(name):
    ft.register()
    for padding in (None, *ARCHITECTURES[name].padding[:1]):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(*optimized_shares(name, padding, outputs), expected_calls(name, KERNELS))


@pytest.mark.slow
@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients(name):
    check(*optimized_shares(name, None, gradients), expected_calls(name, WITH_GRADIENTS))


def optimized_shares(name, padding, function):
    return shares(name, padding, function, prepared=ft.optimize, implementation="eager")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ALONE])
def test_every_linear_layer_and_norm_of_the_table_is_served(name):
    model = ft.optimize(build(name))
    with ft.record() as calls:
        outputs(model, inputs(name))
    own = [type(x).__name__ for x in model.modules() if not isinstance(x, layers.Served) and x._parameters]
    assert not [kind for kind in own if "Norm" in kind or kind in ("Linear", "Conv1D")]
    assert calls["linear: cpp"] >= 6 and calls["norm: cpp"] >= 2


@pytest.mark.parametrize(
    "name, kind",
    [("gemma", layers.Kind("rms", "eps")), ("llama", layers.Kind("layer", "variance_epsilon")), ("cohere", layers.Kind("rms", "variance_epsilon"))],
)  # fmt: skip
def test_faulty_norms_are_found(name, kind):
    layers.served_class.cache_clear()
    with mock.patch.object(layers, "kind_of_norm", lambda cls: kind), torch.no_grad():
        _, found = optimized_shares(name, None, outputs)
    layers.served_class.cache_clear()
    assert max(found.values()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("padding", (None, "left"))
@pytest.mark.parametrize("name", BROAD)
def test_greedy_tokens(name, padding):
    arguments = inputs(name, padding)
    model = build(name)
    expected = generated(model, arguments)
    ft.optimize(model)
    for options in ({}, {"cache_implementation": "static"}, {"cache": cache_of(model)}):
        assert torch.equal(generated(model, arguments, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3, "min_new_tokens": 1},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"use_cache": False, "max_new_tokens": 5, "min_new_tokens": 5},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_forms_of_generation(options):
    arguments = inputs("gpt2", "left")
    if "prompt_lookup_num_tokens" in options:
        arguments = {name: x[:1] for name, x in inputs("gpt2").items()}
    model, results = build("gpt2"), []
    for prepare in (lambda model: model, ft.optimize):
        torch.manual_seed(0)
        results.append(generated(prepare(model), arguments, **options))
    assert torch.equal(*results)


# Undone


def state_of(model):
    return [
        (name, type(module), sorted(vars(module)), {key: (id(x), None if x is None else x.stride()) for key, x in module._parameters.items()})
        for name, module in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("name", (*BROAD, "clip", "whisper"))
def test_restore_gives_the_same_bits(name):
    model, arguments = build(name, "eager"), inputs(name)
    if name != "clip":
        model.set_attn_implementation("sdpa" if name in ("gpt2", "llama", "whisper") else "eager")
    else:
        model.vision_model.config._attn_implementation = "sdpa"  # another one than that of the text
    configs = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    before, state = gradients(model, arguments), state_of(model)
    model.zero_grad()
    assert ft.optimize(model) is model
    assert state_of(model) != state
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"fastgpt"}
    gradients(model, arguments)
    model.zero_grad()
    assert ft.restore(model) is model
    assert state_of(model) == state
    assert [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")] == configs
    after = gradients(model, arguments)
    assert all(torch.equal(before[key], after[key]) for key in before)
    ft.restore(ft.optimize(model))  # as often as one likes


def test_attention_that_was_switched_since_stays():
    model = ft.optimize(build("llama", "sdpa"))
    model.set_attn_implementation("eager")
    assert ft.restore(model).config._attn_implementation == "eager"


def test_part_of_a_model():
    """Its attention stays as it is: that is a setting of the whole model."""
    model = build("llama", "sdpa")
    ft.optimize(model.model.layers[0].mlp)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad(), ft.record() as calls:
        outputs(model, inputs("llama"))
    assert calls == {"linear: cpp": 3}
    ft.restore(model)


# What users do to modules


@torch.no_grad()
def test_forward_hooks():
    model, arguments, seen = build("gpt2"), inputs("gpt2"), []
    model.transformer.h[0].mlp.c_fc.register_forward_hook(
        lambda module, args, out: seen.append(type(module).__name__) or 2 * out
    )
    original = copy.deepcopy(model)
    ft.optimize(model)
    model.transformer.h[1].ln_1.register_forward_pre_hook(lambda module, args: seen.append(type(module).__name__))
    found = outputs(model, arguments)
    assert seen == ["Conv1D", "LayerNorm"]
    check_model(found, original, arguments)


def test_backward_hooks():
    model, seen = ft.optimize(build("llama")), []
    model.lm_head.register_full_backward_hook(lambda module, dx, dy: seen.append("head"))
    model.model.norm.register_full_backward_hook(lambda module, dx, dy: seen.append("norm"))
    gradients(model, inputs("llama"))
    assert seen == ["head", "norm"]


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Owned(nn.LayerNorm):
    pass


def test_what_is_left_alone():
    """Subclasses, parametrized modules, and those whose forward was replaced."""
    parametrized = parametrize.register_parametrization(nn.Linear(32, 32), "weight", nn.Identity())
    replaced = nn.Linear(32, 32)
    replaced.forward = lambda x: x
    pruned = prune.l1_unstructured(nn.Linear(32, 32), "weight", 3)
    modules = nn.Sequential(Scaled(32, 32), Owned(32), parametrized, replaced, pruned, nn.Embedding(3, 32), nn.GELU())
    classes = [type(module) for module in modules]
    ft.optimize(nn.Sequential(modules, nn.Linear(32, 32)), "int8")
    assert [type(module) for module in modules] == classes
    assert not any(isinstance(x, fastgpt.QuantizedWeight) for x in modules.parameters())


@torch.no_grad()
def test_parametrized_after_optimize():
    model, x = ft.optimize(nn.Sequential(nn.Linear(32, 32))), torch.randn(2, 32)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    with ft.record() as calls:
        assert torch.equal(model(x), F.linear(x, 2 * model[0].parametrizations.weight.original, model[0].bias))
    assert calls == {"linear: PyTorch": 1}
    with pytest.raises(
        ValueError, match="model: expected no parametrizations that were added after `optimize`, got one of '0'"
    ):
        ft.restore(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(ft.restore(model)[0]) is nn.Linear


@torch.no_grad()
@pytest.mark.parametrize("cls, pruned", [(nn.Linear, "weight"), (nn.Linear, "bias"), (Conv1D, "bias")])
def test_pruned_after_optimize(cls, pruned):
    layer, x = cls(32, 32), torch.randn(2, 32)
    ft.optimize(nn.Sequential(layer))
    prune.random_unstructured(layer, pruned, 8)
    with ft.record() as calls:
        found = layer(x)
    assert calls == {"linear: PyTorch": 1}
    weight, bias = layer.weight.double(), layer.bias.double()
    numerics.check(found, lambda: F.linear(x.double(), weight.t() if cls is Conv1D else weight, bias))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@torch.no_grad()
def test_calls_that_are_not_served():
    """By keywords, of tensors of other types and dtypes, and without weights: as before, with the errors as before."""
    linear, norm, double = nn.Linear(32, 8), nn.LayerNorm(32), nn.Linear(32, 8).double()
    x = torch.randn(2, 32)
    expected = linear(x), norm(x), double(x.double())
    model = ft.optimize(
        nn.ModuleList([linear, norm, double, nn.LayerNorm(32, elementwise_affine=False), nn.LayerNorm((2, 32))])
    )
    with ft.record() as calls:
        assert torch.equal(model[0](input=x), expected[0]) and torch.equal(model[1](input=x), expected[1])
        assert model[3](x).shape == model[4](x).shape == x.shape
    assert calls == {"linear: PyTorch": 1, "norm: PyTorch": 3}
    with ft.record() as calls:
        assert torch.equal(model[2](x.double()), expected[2])
    assert calls == {"linear: PyTorch": 1}
    for module, wrong in ((model[0], x[:, 1:]), (model[0], x.bfloat16()), (model[1], x[:, 1:]), (model[0], x.int())):
        with pytest.raises(RuntimeError) as raised:
            module(wrong)
        with pytest.raises(RuntimeError) as original:
            type(module).original.forward(module, wrong)
        assert str(raised.value) == str(original.value)
    assert model[0](x[:0]).shape == (0, 8) and model[0](x[0]).shape == (8,)


@torch.no_grad()
def test_strides_of_a_norm_are_those_of_its_class():
    cls = transformers.models.llama.modeling_llama.LlamaRMSNorm
    norm, x = cls(16), torch.randn(2, 5, 4, 16).transpose(1, 2)
    expected, original = norm(x), copy.deepcopy(norm).double()
    ft.optimize(norm)
    with ft.record() as calls:
        out = norm(x)
    assert calls == {"norm: cpp": 1} and out.stride() == expected.stride() == x.stride()
    with numerics.only_double_precision():
        numerics.check(out, lambda: original(x.double()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("gpt2", "gemma"))
def test_half_precision(name, dtype):
    model = ft.optimize(build(name)).to(dtype)
    with ft.record() as calls:
        found = outputs(model, inputs(name))
    assert calls.keys() == KERNELS and found["output"].dtype == dtype
    check_model(found, build(name, dtype=dtype), inputs(name), arithmetic=dtype)


@pytest.mark.parametrize("grad", (False, True))
def test_autocast(grad):
    model, arguments = build("llama", "sdpa"), inputs("llama")
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        expected = outputs(model, arguments)["output"]
        ft.optimize(model).set_attn_implementation("sdpa")
        with ft.record() as calls:
            assert torch.equal(outputs(model, arguments)["output"], expected)
    assert calls.keys() == {"linear: reference", "norm: PyTorch"}


def test_meta():
    """Optimized first, loaded later."""
    original = build("gpt2")
    with torch.device("meta"):
        model = ft.optimize(transformers.GPT2LMHeadModel(original.config).eval())
    with torch.no_grad():
        assert model(inputs_embeds=torch.randn(1, 3, 32, device="meta")).logits.shape == (1, 3, 90)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    model.load_state_dict(original.state_dict())
    with torch.no_grad(), ft.record() as calls:
        found = outputs(model, inputs("gpt2"))
    assert "linear: PyTorch" not in calls
    with torch.no_grad():
        check_model(found, original, inputs("gpt2"))


# Copies and files


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: saved_and_loaded(model, weights_only=False),
}


def saved_and_loaded(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


@torch.no_grad()
@pytest.mark.parametrize("weights", (None, "int8"))
@pytest.mark.parametrize("way", COPIES)
def test_copies(way, weights):
    model, arguments = ft.optimize(build("gpt2", "sdpa"), weights), inputs("gpt2")
    expected = outputs(model, arguments)["output"]
    other = COPIES[way](model)
    with ft.record() as calls:
        assert torch.equal(outputs(other, arguments)["output"], expected)
    assert calls.keys() == KERNELS
    assert other.lm_head.weight is other.transformer.wte.weight is not model.lm_head.weight
    ft.restore(other, dequantize=weights is not None)
    assert other.config._attn_implementation == "sdpa" and model.config._attn_implementation == "fastgpt"
    with ft.record() as calls:
        outputs(other, arguments)
    assert not calls
    assert torch.equal(outputs(model, arguments)["output"], expected)


@pytest.mark.slow
def test_unpickled_in_another_process(tmp_path):
    torch.save(ft.optimize(build("llama")), tmp_path / "model.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.save(model(torch.tensor([[3, 4, 5]])).logits, sys.argv[2])"
    )
    paths = tmp_path / "model.pt", tmp_path / "logits.pt"
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = torch.load(paths[0], weights_only=False)
    assert torch.equal(torch.load(paths[1]), model(torch.tensor([[3, 4, 5]])).logits)


@pytest.mark.parametrize("name", BROAD)
def test_state_dict(name):
    """The same names, shapes and values, loaded in both directions."""
    original = build(name)
    model = ft.optimize(copy.deepcopy(original))
    expected, found = original.state_dict(), model.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    original.load_state_dict(model.state_dict())
    assert torch.equal(outputs(original, inputs(name))["output"], outputs(ft.restore(model), inputs(name))["output"])


@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_save_pretrained(name, tmp_path):
    model = build(name)
    expected = {key: x.clone() for key, x in model.state_dict().items()}
    ft.optimize(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert all(torch.equal(expected[key], x) for key, x in loaded.state_dict().items())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name, weights", [("gpt2", None), ("llama", "int8")])
def test_compiled(name, weights):
    torch.compiler.reset()
    model, arguments, targets = ft.optimize(build(name), weights), inputs(name), []
    original = ft.restore(copy.deepcopy(model), dequantize=True)

    def backend(graph, example):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    found = outputs(torch.compile(model, backend=backend, fullgraph=True), arguments)
    check_model(found, original, arguments)
    assert sum("fastgpt.norm" in target for target in targets) == 5
    assert sum("fastgpt.linear" in target for target in targets) == (9 if name == "gpt2" else 15)


# Quantized


@pytest.mark.parametrize("weights", ("int8", "int4"))
@pytest.mark.parametrize("name", BROAD)
@torch.no_grad()
def test_quantized(name, weights):
    """A model computes with what its weights stand for; those that do not fit into groups stay."""
    model, arguments = ft.optimize(build(name), weights), inputs(name)
    with ft.record() as calls:
        found = outputs(model, arguments)
    assert calls.keys() == KERNELS
    matrices = [x for x in model.parameters() if isinstance(x, fastgpt.QuantizedWeight)]
    assert len(matrices) > 8 and not any(x.requires_grad for x in matrices)
    assert {x.shape[1] for x in matrices} <= {32, 64, 128}  # and not those of 48 columns
    with pytest.raises(ValueError, match="model: expected one whose weights are not quantized"):
        ft.restore(model)
    tokens = generated(model, arguments)
    ft.restore(model, dequantize=True)
    assert not any(isinstance(x, fastgpt.QuantizedWeight) for x in model.parameters())
    assert [type(module) for module in model.modules()] == [type(module) for module in build(name).modules()]
    assert "save_pretrained" not in vars(model)
    check_model(found, model, arguments)
    assert torch.equal(generated(model, arguments), tokens)


@torch.no_grad()
def test_quantized_is_close():
    original = build("llama")
    exact = outputs(original, inputs("llama"))["output"]
    for weights, least in (("int8", 30), ("int4", 6)):  # signal to noise, in dB
        found = outputs(ft.optimize(copy.deepcopy(original), weights), inputs("llama"))["output"]
        assert 20 * torch.log10(exact.norm() / (found - exact).norm()) > least


def test_output_matrices_have_eight_bits():
    """Tied or not: as in checkpoints that fastgpt loads in 4 bits."""
    for name in BROAD:
        model = ft.optimize(build(name), "int4")
        bits = {path: x.packing.bits for path, x in model.named_parameters() if isinstance(x, fastgpt.QuantizedWeight)}
        head = model.get_output_embeddings().weight
        assert head.packing == (8, 32, False, 0)
        assert [path for path, count in bits.items() if count == 8] == [
            path for path, x in model.named_parameters() if x is head
        ]
        assert list(bits.values()).count(4) >= 8
    model = ft.optimize(nn.Sequential(nn.Linear(32, 32)), "int4")
    assert model[0].weight.packing.bits == 4


def test_a_quantized_token_embedding_is_not_resized():
    """Where it is the output matrix, too: the error says what to do."""
    model = ft.optimize(build("gpt2"), "int8")
    with pytest.raises(RuntimeError, match=r"expected a QuantizedWeight, .* restore\(model, dequantize=True\) first"):
        model.resize_token_embeddings(95)
    ft.restore(model, dequantize=True).resize_token_embeddings(95)
    assert ft.optimize(model, "int8").lm_head.weight.shape == (95, 32)
    model = ft.optimize(build("gpt2"))
    model.resize_token_embeddings(95)
    with ft.record() as calls, torch.no_grad():
        assert outputs(model, inputs("gpt2"))["output"].shape[-1] == 95
    assert calls.keys() == KERNELS
    assert model.lm_head.weight is model.transformer.wte.weight


def test_tied_weights_stay_tied():
    for weights in (None, "int8"):
        model = ft.optimize(build("gpt2"), weights)
        model.tie_weights()
        assert model.lm_head.weight is model.transformer.wte.weight
        assert isinstance(model.lm_head.weight, fastgpt.QuantizedWeight) == (weights is not None)
        assert not isinstance(model.transformer.wpe.weight, fastgpt.QuantizedWeight)
    model = ft.optimize(build("llama"), "int8")
    assert not isinstance(model.model.embed_tokens.weight, fastgpt.QuantizedWeight)


@torch.no_grad()
@pytest.mark.parametrize("name", ("gpt2", "llama", "t5"))
def test_quantized_and_saved(name, tmp_path):
    """For transformers alone, with what the weights stand for; and by state_dict, quantized."""
    model, arguments = ft.optimize(build(name), "int8"), inputs(name)
    expected = outputs(model, arguments)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in build(name).modules()]
    check_model(expected, loaded, arguments)
    other = build(name)
    for parameter in other.parameters():
        parameter.normal_()
    ft.optimize(other, "int8").load_state_dict(saved_and_loaded(model.state_dict()))
    assert all(torch.equal(x, expected[key]) for key, x in outputs(other, arguments).items())


@torch.no_grad()
def test_quantized_to_another_dtype():
    model = ft.optimize(build("llama"), "int8").to(torch.bfloat16)
    with ft.record() as calls:
        assert outputs(model, inputs("llama"))["output"].dtype == torch.bfloat16
    assert calls.keys() == KERNELS


def test_errors():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        ft.optimize("gpt2")
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got NoneType"):
        ft.restore(None)
    for wrong in ("int2", 8, "", True):
        with pytest.raises(ValueError, match=f"weights: expected one of None, 'int8', 'int4', got {wrong!r}"):
            ft.optimize(nn.Linear(32, 32), wrong)
    model = build("llama", "sdpa")
    for part in (model, model.model.layers[0]):
        ft.optimize(part)
        with pytest.raises(ValueError, match="model: expected one that is not optimized, got one that is"):
            ft.optimize(model)
        ft.restore(model)
    for other in (model, nn.GELU()):
        with pytest.raises(ValueError, match="model: expected one that `optimize` has changed, got another"):
            ft.restore(other)
    with pytest.raises(TypeError, match="dequantize: expected a bool, got 1"):
        ft.restore(ft.optimize(nn.Linear(2, 2)), dequantize=1)
    with pytest.raises(ValueError, match="model: expected a matrix .* with a multiple of 32 columns to quantize, got none"):
        ft.optimize(nn.Linear(33, 32), "int8")
    with pytest.raises(ValueError, match="got 0.weight on the meta device: load them first"):
        ft.optimize(nn.Sequential(nn.Linear(32, 32, device="meta")), "int4")


@pytest.mark.parametrize("fault", (lambda x: x.fill_(torch.nan), lambda x: x.double()))
def test_nothing_has_changed_after_an_error(fault):
    model = build("llama", "sdpa")
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = fault(weight.data)
    state = state_of(model)
    with pytest.raises((TypeError, ValueError), match=r"model.*layers\.1\.mlp\.up_proj\.weight"):
        ft.optimize(model, "int8")
    assert state_of(model) == state and model.config._attn_implementation == "sdpa"


def test_conv1d_is_a_linear_layer_while_it_is_quantized():
    layer = nn.Sequential(Conv1D(64, 32))
    matrix = layer[0].weight.detach().clone()
    ft.optimize(layer, "int8")
    assert isinstance(layer[0], nn.Linear) and (layer[0].in_features, layer[0].out_features) == (32, 64)
    assert torch.equal(layer[0].weight.dequantize(), fastgpt.quantize(matrix.t()).dequantize())
    ft.restore(layer, dequantize=True)
    assert type(layer[0]) is Conv1D and layer[0].weight.shape == (32, 64) and not hasattr(layer[0], "in_features")
