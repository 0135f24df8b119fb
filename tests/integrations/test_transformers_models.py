"""Models of transformers with fastgpt's attention, against eager attention on the same weights."""

from unittest import mock

import pytest
import torch
from architectures import (
    ALONE,
    ARCHITECTURES,
    COMPILED,
    agreement,
    build,
    compiled,
    gradients,
    inputs,
    outputs,
    shares,
    unserved,
)

import fastgpt.integrations.transformers as ft

SERVED = [name for name in ARCHITECTURES if name not in ALONE]


@pytest.fixture(autouse=True)
def registered():
    ft.register()
    yield
    ft.unregister()


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_outputs(name):
    for padding in (None, *ARCHITECTURES[name].padding):
        check(name, padding, outputs)


@pytest.mark.slow
@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", SERVED)
def test_gradients(name):
    for padding in (None, *ARCHITECTURES[name].padding):
        check(name, padding, gradients)


def check(name, padding, function):
    calls, found = shares(name, padding, function)
    assert sum(calls.values()) >= 2  # one a layer
    assert calls.keys() == {"cpp"}
    # Written so that a NaN fails.
    assert not {part: share for part, share in found.items() if not share <= 1}, padding


@pytest.mark.slow
@pytest.mark.one_of(2)
@pytest.mark.parametrize("padding", (None, "left"))
@pytest.mark.parametrize("name", [name for name in SERVED if ARCHITECTURES[name].generates])
def test_greedy_tokens(name, padding):
    assert agreement(name, padding) == {"dynamic": True, "static": True, "ours": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gemma2", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in COMPILED if x != "gemma2")]
)
def test_compiled(name):
    for padding in (None, "right"):
        calls, found = compiled(name, padding)
        assert calls == 2 and max(found.values()) <= 1


@pytest.mark.slow
@torch.no_grad()
def test_compiled_layers():
    """A mask that was made before, and comes to them as an argument."""
    model, arguments = build("llama", "fastgpt"), inputs("llama", "left")
    expected = outputs(model, arguments)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outputs(model, arguments), expected)


@pytest.mark.parametrize("name", ALONE)
def test_models_that_are_not_served(name):
    assert unserved(name)


def test_switching():
    model, arguments = build("llama"), inputs("llama", "left")
    for implementation in ("sdpa", "fastgpt", "eager"):
        model.set_attn_implementation(implementation)
        with ft.record() as calls:
            outputs(model, arguments)
        assert bool(calls) == (implementation == "fastgpt")
    model.set_attn_implementation("fastgpt")
    ft.unregister()
    with pytest.raises(KeyError, match="fastgpt"):
        outputs(model, arguments)


def without(*names):
    """fastgpt's attention but for some of what it is asked for."""

    def faulty(*args, **kwargs):
        return ft.attention(*args, **{name: value for name, value in kwargs.items() if name not in names})

    return faulty


@pytest.mark.parametrize(
    "name, fault",
    [("gemma2", without("softcap")), ("gpt_oss", without("s_aux")), ("t5", without("position_bias")), ("granite", without("scaling"))],
)  # fmt: skip
def test_faults_are_found(name, fault):
    """What is not done shows: the models depend on it."""
    with mock.patch.dict("transformers.modeling_utils.AttentionInterface._global_mapping", {"fastgpt": fault}):
        _, found = shares(name, None)
    assert max(found.values()) > 10


@pytest.mark.parametrize("name, padding", [("mistral", None), ("llama", "left"), ("bert", "right")])
def test_faulty_masks_are_found(name, padding):
    """No window, and no padding."""
    with mock.patch.dict("transformers.masking_utils.AttentionMaskInterface._global_mapping", {"fastgpt": lambda **call: None}):
        _, found = shares(name, padding)
    assert max(found.values()) > 10
