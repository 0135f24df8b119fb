"""linear: the kernel against the reference, and what it says to bad input."""

import os
import subprocess
import sys

import pytest
import torch
from cpu_levels import lower_levels

import fastgpt
from fastgpt import linear, linear_reference
from fastgpt.generation.replay import CpuReplay
from fastgpt.ops.linear import ACTIVATIONS, MAX_ROWS_CPU
from fastgpt.ops.matrix_product import FASTEST, KERNEL
from fastgpt.testing import numerics
from fastgpt.testing.linear_features import FEATURES, call_of, in_float64, split

pytestmark = pytest.mark.threads

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(40, 65), (33, 7), (768, 300), (3072, 64), (5, 23)]  # C, N
ROWS = (1, 2, 3, 4, 7, 9, 17, 33, 64, 65)  # those of the kernel, and more
everything = pytest.mark.parametrize("feature", ["everything", "everything, gated"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C, N", SHAPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_contract(feature, C, N, dtype):
    """Judged over all numbers of rows together; beyond 64 rows PyTorch's product rounds once more."""
    call = call_of(feature, sum(ROWS), C, N, dtype)
    actual = torch.cat([linear(**part, impl="cpp") for part in split(call, ROWS)])
    assert actual.dtype == dtype
    numerics.check(actual, lambda: linear_reference(**in_float64(call)), arithmetic=dtype)


@pytest.mark.exhaustive  # test_numerics.py has a sample
@pytest.mark.parametrize("level", lower_levels())
def test_lower_cpu_levels(level):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "contract", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"FASTGPT_CPU_LEVEL": level}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_large_means_do_not_cancel():
    """Numbers far from zero: the variance is taken about the mean, of a row with padding too."""
    for C in (64, 70):
        call = call_of("norm", 2, C, 8, torch.float32)
        call["x"] = call["x"] + 1000
        numerics.check(linear(**call, impl="cpp"), lambda: linear_reference(**in_float64(call)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 9, 17, MAX_ROWS_CPU, MAX_ROWS_CPU + 23])
@pytest.mark.parametrize("gated", [False, True])
def test_a_number_depends_on_its_row_and_feature_only(gated, rows, dtype, monkeypatch):
    """Whatever is multiplied side by side, and fills up blocks: not a neighbor's NaN, nor what lies past the last weight."""
    monkeypatch.setitem(FASTEST, dtype, KERNEL)
    N, C = 37, 45
    weight = torch.randn(((2 if gated else 1) * N + 2, C)).to(dtype)
    weight[-2:] = torch.nan
    x = torch.randn(rows + 2, C).to(dtype)
    x[rows:] = torch.nan
    weight, x = weight[:-2], x[:rows]
    clean = linear(x, weight, gated=gated, impl="cpp")
    assert clean.isfinite().all()
    weight[5], x[2] = torch.nan, torch.nan
    dirty = linear(x, weight, gated=gated, impl="cpp")
    hit = torch.zeros_like(clean, dtype=torch.bool)
    hit[2], hit[:, 5] = True, True
    assert dirty[hit].isnan().all() and torch.equal(dirty[~hit], clean[~hit])


@everything
def test_any_leading_dimensions_and_strides(feature):
    call = call_of(feature, 6, 40, 65, torch.float32)
    expected = linear(**call, impl="cpp")
    x, residual = call.pop("x"), call.pop("residual")
    shaped = linear(x.view(2, 3, 40), residual=residual.view(2, 3, 65), **call)
    assert torch.equal(shaped, expected.view(2, 3, 65))
    apart = torch.zeros(6, 80)[:, ::2].copy_(x)
    assert torch.equal(linear(apart, residual=torch.zeros(65, 6).t().copy_(residual), **call), expected)
    assert torch.equal(linear(x[0], residual=residual[0], **call), linear(x[:1], residual=residual[:1], **call)[0])
    assert linear(x[:0], residual=residual[:0], **call).shape == (0, 65)


@everything
def test_a_row_gives_the_same_bits_in_any_batch_and_on_any_number_of_threads(feature):
    call = call_of(feature, 16, 768, 1000, torch.float32)
    whole, threads = linear(**call), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear(**call), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("feature", ["norm and bias", "everything, gated"])
def test_infinities_and_nan_stay_in_their_row(feature):
    call = call_of(feature, 4, 40, 65, torch.float32)
    expected = linear(**call)
    call["x"] = call["x"].clone()
    call["x"][1, 3], call["x"][2, 3] = torch.nan, torch.inf
    actual = linear(**call)
    assert actual[1].isnan().all() and actual[2].isnan().all()
    assert torch.equal(actual[[0, 3]], expected[[0, 3]])


@everything
def test_many_rows_leave_their_inputs_alone(feature):
    call = call_of(feature, 200, 40, 65, torch.bfloat16)
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    linear(**call)
    assert all(torch.equal(call[name], value) for name, value in before.items())


@torch.inference_mode()
@everything
def test_a_plan_runs_it_again(feature):
    call = call_of(feature, 2, 40, 65, torch.float32)
    call.pop("x")
    function = CpuReplay(lambda x: linear(x, **call))
    for _ in range(3):
        x = torch.randn(2, 40)
        assert torch.equal(function(x), linear(x, **call))
    assert function.refused is None and len(function.plan) == 1


@torch.inference_mode()
def test_the_offset_is_added_in_float32():
    """To weights that a sum in bfloat16 would swallow: nearly all numbers are the nearest of all."""
    x, norm_weight = torch.randn(32, 256).bfloat16(), torch.randn(256).bfloat16() / 100
    for rows in (x, x.repeat(2, 1)):  # few and many
        call = {"x": rows, "weight": torch.eye(256).bfloat16(), "norm": "rms", "norm_weight": norm_weight, "norm_offset": 1.0}
        nearest = linear_reference(**in_float64(call)).bfloat16()
        for impl in ("cpp", "reference"):
            assert (linear(**call, impl=impl) == nearest).float().mean() > 0.99


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu", "relu"])
def test_activations_far_from_zero(activation):
    """And near it: in parts, each of which is judged by its own scale."""
    x = torch.cat([torch.linspace(-30, 30, 6000), torch.tensor([1e30])])
    far = linear(torch.ones(1, 1), x.view(-1, 1), activation=activation).view(-1)
    sizes = 500, 1900, 600, 600, 2400, 1  # up to -25, -6, 0, 6, 30, and the last one
    for actual, part in zip(far.split(sizes), x.double().split(sizes), strict=True):
        numerics.check(actual, lambda: ACTIVATIONS[activation](part), name=f"from {part[0]:.0f}")


@everything
def test_gradients_are_served_by_the_reference(feature):
    call = call_of(feature, 16, 40, 65, torch.float32)
    call["weight"].requires_grad_()
    reasons = fastgpt.explain(linear, **call)
    assert reasons["cpp"] == "it has no backward pass, and a gradient is required" and reasons["reference"] == "chosen"
    (gradient,) = torch.autograd.grad(linear(**call).sum(), call["weight"])
    (expected,) = torch.autograd.grad(linear_reference(**call).sum(), call["weight"])
    assert torch.equal(gradient, expected)
    with torch.no_grad():
        assert fastgpt.explain(linear, **call)["cpp"] == "chosen"


def test_dropout_applies_before_the_residual_is_added():
    call = call_of("everything", 4, 40, 65, torch.float32)
    torch.manual_seed(0)
    out = linear(**call, dropout_p=0.5)
    kept = out != call["residual"]
    assert 0.3 < kept.float().mean() < 0.7
    exact = in_float64(call)
    residual = exact.pop("residual")
    numerics.check(out, lambda: residual + 2.0 * torch.where(kept, linear_reference(**exact), 0.0))


def test_autocast():
    call = call_of("everything", 4, 40, 65, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = linear(call["x"], call["weight"])
        assert half.dtype == torch.bfloat16
        assert linear(half, call["weight"].new_ones(3, 65)).dtype == torch.bfloat16


@pytest.mark.slow
def test_opcheck():
    call = call_of("everything", 3, 40, 65, torch.float32)
    op, order = torch.ops.fastgpt.linear.default, ("x", "weight", "bias", "residual")
    torch.library.opcheck(op, (call["x"], call["weight"]))
    torch.library.opcheck(op, (*(call[name] for name in order), 1, False, call["norm_weight"], call["norm_bias"]))
    torch.library.opcheck(torch.ops.fastgpt.linear_finish_.default, (call["residual"], call["bias"], None, 1))
    call = call_of("everything, gated", 3, 40, 65, torch.float32)
    torch.library.opcheck(op, (*(call[name] for name in order), 2, True, call["norm_weight"], None, True, 1e-5, 1.0))
    product = torch.randn(3, 130)
    torch.library.opcheck(torch.ops.fastgpt.linear_gate.default, (product, call["bias"], call["residual"], 3))


x, weight, bias = torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \(..., C\), got a scalar"),
        ({"x": x.int()}, TypeError, "x: expected dtype .*, got torch.int32"),
        ({"weight": weight[0]}, ValueError, r"weight: expected 2 dimensions, got shape \(8,\)"),
        ({"weight": torch.zeros(3, 9)}, ValueError, r"weight: expected shape \(3, 8\) \(N, C\), got \(3, 9\)"),
        ({"weight": weight.double()}, TypeError, "weight: expected dtype torch.float32, got torch.float64"),
        ({"weight": weight.to("meta")}, ValueError, "weight: expected device cpu, got meta"),
        ({"weight": torch.zeros(8, 3).t()}, ValueError, "weight: expected a contiguous last dimension"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(3,\) \(N,\), got \(4,\)"),
        ({"bias": 1.0}, TypeError, "bias: expected a torch.Tensor, got float"),
        ({"norm_weight": torch.zeros(3)}, ValueError, r"norm_weight: expected shape \(8,\)"),
        ({"norm_bias": torch.zeros(8)}, ValueError, "norm_bias: expected None without norm_weight, got a tensor"),
        ({"residual": torch.zeros(2, 8)}, ValueError, r"residual: expected shape \(2, 3\) \(..., N\), got \(2, 8\)"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of None, 'gelu_tanh', .*'relu', got 'tanh'"),
        ({"activation": ["relu"]}, ValueError, r"activation: expected one of None, .*, got \['relu'\]"),
        ({"norm": "batch"}, ValueError, "norm: expected one of 'layer', 'rms', got 'batch'"),
        ({"norm_weight": weight[0], "norm_offset": "1"}, TypeError, "norm_offset: expected a finite number, got '1'"),
        ({"gated": True}, ValueError, r"weight: expected an even number of rows \(2N, C\) with a gate, got \(3, 8\)"),
        ({"gated": True, "weight": weight[:2], "bias": bias[:1]}, ValueError, r"bias: expected shape \(2,\) \(2N,\), got"),
        ({"gated": True, "weight": weight[:2], "residual": x[:, :2]}, ValueError, r"residual: expected shape \(2, 1\)"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a finite number >= 0 and < 1, got 1.0"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of 'cpp', 'triton', 'reference' or None, got 'cuda'"),
        ({"x": x.double(), "weight": weight.double(), "impl": "cpp"}, ValueError, "cannot serve .* torch.float64"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        linear(**({"x": x, "weight": weight} | change))


def test_shapes_without_numbers():
    """Tensors on the meta device, and products of no numbers, which are zeros."""
    x, weight = torch.empty(40, 8, device="meta"), torch.empty(6, 8, device="meta")
    assert linear(x, weight, norm_weight=weight[0], gated=True).shape == (40, 3)
    assert torch.equal(linear(torch.zeros(33, 0), torch.zeros(4, 0), torch.ones(4)), torch.ones(33, 4))
