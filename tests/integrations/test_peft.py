"""PEFT's adapters on models that fastgpt optimizes and quantizes."""

import copy

import pytest
import torch
import torch.nn as nn
from architectures import build, check_model, inputs, outputs

import fastgpt
import fastgpt.integrations.transformers as ft

peft = pytest.importorskip("peft", reason="peft is not installed")

TARGETS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "up_proj", "down_proj"]}


@pytest.fixture(autouse=True)
def unregistered():
    yield
    ft.unregister()


def adapted(model, name, **options):
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS[name], fan_in_fan_out=False, **options)
    return peft.get_peft_model(model, config)


def loss_of(model, arguments):
    return model(**arguments, labels=arguments["input_ids"]).loss


def gradients(model, arguments):
    """Of the loss, by every parameter that is trained."""
    model.zero_grad()
    loss_of(model, arguments).backward()
    return {path: x.grad for path, x in model.named_parameters() if x.grad is not None}


def trained(model, arguments, steps=6):
    """The losses of some steps of training."""
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, arguments)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TARGETS)
def test_base_layers_and_adapters_are_served(name):
    model, arguments = adapted(build(name, "sdpa"), name, init_lora_weights=False).eval(), inputs(name)
    original = copy.deepcopy(model)
    ft.optimize(model)
    with torch.no_grad(), ft.record() as calls:
        found = outputs(model, arguments)
        check_model(found, original, arguments)
    layers = sum(isinstance(module, peft.tuners.lora.Linear) for module in model.modules())
    assert calls.keys() == {"cpp", "linear: cpp", "norm: cpp"}
    assert calls["linear: cpp"] == (9 if name == "gpt2" else 15) + 2 * layers
    found = gradients(model, arguments)
    assert found and all("lora_" in key for key in found)
    check_model(found, original, arguments, gradients)
    ft.restore(model)
    with torch.no_grad():
        assert torch.equal(outputs(model, arguments)["output"], outputs(original, arguments)["output"])
        check_model(outputs(model.merge_and_unload(), arguments), original, arguments)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("weights", ("int8", "int4"))
@pytest.mark.parametrize("name", TARGETS)
def test_adapters_of_a_quantized_model(name, weights, tmp_path):
    """The loss falls, only the adapters change, and they are saved and loaded."""
    base = ft.optimize(build(name), weights)
    original, arguments = copy.deepcopy(base), inputs(name)
    model = adapted(base, name)
    before = {key: x.detach().clone() for key, x in model.named_parameters()}
    losses = trained(model, arguments)
    assert losses[-1] < 0.9 * losses[0]
    for key, x in model.named_parameters():
        old, new = (y.blocks if isinstance(y, fastgpt.QuantizedWeight) else y for y in (before[key], x.data))
        assert torch.equal(old, new) == ("lora_" not in key), key
    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 60_000
    loaded = peft.PeftModel.from_pretrained(original, tmp_path).eval()
    with torch.no_grad():
        expected = outputs(model, arguments)["output"]
        assert torch.equal(outputs(loaded, arguments)["output"], expected)
        with loaded.disable_adapter():
            assert not torch.equal(outputs(loaded, arguments)["output"], expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradients_of_adapters_are_those_of_the_dequantized_model():
    arguments = inputs("llama")
    model = ft.optimize(adapted(build("llama"), "llama", init_lora_weights=False), "int8").eval()
    assert not any(isinstance(x, fastgpt.QuantizedWeight) for key, x in model.named_parameters() if "lora_" in key)
    found = gradients(model, arguments)
    assert found and all("lora_" in key for key in found)
    check_model(found, ft.restore(model, dequantize=True), arguments, gradients)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("safe_merge", (False, True))
def test_merging_into_quantized_weights(safe_merge):
    """Is refused, and possible after they are dequantized."""
    model = adapted(ft.optimize(build("llama"), "int8"), "llama", init_lora_weights=False).eval()
    arguments = inputs("llama")
    with torch.no_grad():
        expected = outputs(model, arguments)["output"]
        with pytest.raises(RuntimeError, match=r"can be written, got a QuantizedWeight: .*restore\(model, dequantize=True\)"):
            model.merge_and_unload(safe_merge=safe_merge)
        assert torch.equal(outputs(model, arguments)["output"], expected)  # nothing has changed
        original = copy.deepcopy(ft.restore(model, dequantize=True))
        check_model(outputs(model.merge_and_unload(safe_merge=safe_merge), arguments), original, arguments)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapted_output_matrix_has_eight_bits():
    model = build("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
    ft.optimize(model, "int4")
    bits = {path: x.packing.bits for path, x in model.named_parameters() if isinstance(x, fastgpt.QuantizedWeight)}
    assert [path for path, count in bits.items() if count == 8] == ["base_model.model.lm_head.base_layer.weight"]
    assert len(bits) > 8


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_of_quantized_linear_layers():
    """Of any module that holds a QuantizedWeight."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    model[0].weight = nn.Parameter(fastgpt.quantize(model[0].weight), requires_grad=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    x, target = torch.randn(8, 32, requires_grad=True), torch.randn(8, 4)
    optimizer = torch.optim.SGD([y for y in model.parameters() if y.requires_grad], lr=0.3)
    losses = []
    for _ in range(10):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and x.grad is not None
