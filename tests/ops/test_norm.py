"""norm: the kernel against the reference, wherever its rows lie, and what it says to bad input."""

import os
import subprocess
import sys

import pytest
import torch
from cpu_levels import lower_levels

import fastgpt
from fastgpt import norm, norm_reference
from fastgpt.generation.replay import CpuReplay
from fastgpt.testing import numerics
from fastgpt.testing.linear_features import in_float64
from fastgpt.testing.norm_features import FEATURES, call_of

pytestmark = pytest.mark.threads

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [1, 5, 16, 40, 64, 80, 128, 256, 2304])
@pytest.mark.parametrize("feature", FEATURES)
def test_contract(feature, C, dtype):
    call = call_of(feature, (3, 50, C), dtype)
    actual = norm(**call, impl="cpp")
    assert actual.dtype == dtype and actual.is_contiguous()
    numerics.check(actual, lambda: norm_reference(**in_float64(call)))


@pytest.mark.exhaustive  # test_numerics.py has a sample
@pytest.mark.parametrize("level", lower_levels())
def test_lower_cpu_levels(level):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "contract", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"FASTGPT_CPU_LEVEL": level}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize("feature", FEATURES)
def test_rounded_once(feature, impl):
    """Nearly all numbers are the nearest of all, with an offset too that a bfloat16 weight would swallow."""
    call = call_of(feature, (64, 256), torch.bfloat16)
    call["weight"] = call["weight"] / 100
    nearest = norm_reference(**in_float64(call)).bfloat16()
    assert (norm(**call, impl=impl) == nearest).float().mean() > 0.99


def test_large_means_do_not_cancel():
    for C in (64, 70):  # the latter with padding
        call = call_of("layer", (2, C), torch.float32)
        call["x"] = call["x"] + 1000
        numerics.check(norm(**call, impl="cpp"), lambda: norm_reference(**in_float64(call)))


B, T, H, D = 2, 3, 4, 40
qkv = torch.randn(B, T, 3 * H * D)
heads = qkv.view(B, T, 3, H, D)
VIEWS = {
    "queries, token by token": heads[:, :, 0],
    "keys, head by head": heads[:, :, 1].transpose(1, 2),
    "one token": heads[:, -1:, 0],
    "last tokens": qkv[:, -1:],
    "one row": qkv[0, 0],
    "every other row": qkv[:, ::2, 7:],
    "backwards": heads.permute(3, 1, 0, 2, 4)[:, :, :, :2],  # more dimensions than the kernel takes: copied
    "columns": qkv.transpose(1, 2),  # copied
    "one row again and again": qkv[:1, :1].expand(B, T, -1),
    "no rows": qkv[:0],
    "rows of nothing": qkv[..., :0],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_any_strides(view):
    weight, contiguous = torch.randn(view.shape[-1]), view.clone(memory_format=torch.contiguous_format)
    for impl in ("cpp", "reference"):
        actual = norm(view, weight, residual=view, impl=impl)
        assert actual.shape == view.shape and actual.is_contiguous()
        assert torch.equal(actual, norm(contiguous, weight, residual=contiguous, impl=impl))


@torch.inference_mode()
def test_a_plan_runs_it_again():
    """Of queries within a row, where no operation but fastgpt's may run; what is copied is not recorded."""
    weight, residual, ones = torch.randn(D), torch.randn(B, T, H, D), torch.ones(3 * H * D)
    for kind in ("layer", "rms"):

        def of_heads(x):
            return norm(x.view(B, T, 3, H, D)[:, :, 0], weight, kind=kind, residual=residual)

        def of_columns(x):
            return norm(x.view(B, -1, T).transpose(1, 2), ones, kind=kind)

        heads, columns = CpuReplay(of_heads), CpuReplay(of_columns)
        for _ in range(3):
            x = torch.randn(B, T, 3 * H * D)
            assert torch.equal(heads(x), of_heads(x))
            assert torch.equal(columns(x), of_columns(x))
        assert heads.refused is None and len(heads.plan) == 1
        assert columns.refused == "an operation of fastgpt's cannot be recorded"


def test_a_row_gives_the_same_bits_in_any_batch_and_on_any_number_of_threads():
    call = call_of("everything", (500, 256), torch.float32)
    whole, threads = norm(**call), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(norm(**call), whole)
    finally:
        torch.set_num_threads(threads)
    x, residual = call.pop("x"), call.pop("residual")
    assert torch.equal(norm(x[123], residual=residual[123], **call), whole[123])


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_infinities_and_nan_stay_in_their_row(kind):
    x, weight = torch.randn(4, 40), torch.randn(40)
    expected = norm(x, weight, kind=kind, impl="cpp")
    x[1, 3], x[2, 3] = torch.nan, torch.inf
    actual = norm(x, weight, kind=kind, impl="cpp")
    assert actual[1].isnan().all() and actual[2].isnan().any()
    assert torch.equal(actual[[0, 3]], expected[[0, 3]])


def test_gradients_are_served_by_the_reference():
    call = call_of("everything", (4, 40), torch.float32)
    call["weight"].requires_grad_()
    reasons = fastgpt.explain(norm, **call)
    assert reasons["cpp"] == "it has no backward pass, and a gradient is required" and reasons["reference"] == "chosen"
    (gradient,) = torch.autograd.grad(norm(**call).sum(), call["weight"])
    (expected,) = torch.autograd.grad(norm_reference(**call).sum(), call["weight"])
    assert torch.equal(gradient, expected)
    with torch.no_grad():
        assert fastgpt.explain(norm, **call)["cpp"] == "chosen"


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_of_the_reference(feature):
    call = in_float64(call_of(feature, (2, 5), torch.float32))
    tensors = [value.requires_grad_() for value in call.values() if isinstance(value, torch.Tensor)]
    names = [name for name, value in call.items() if isinstance(value, torch.Tensor)]
    assert torch.autograd.gradcheck(lambda *values: norm_reference(**call | dict(zip(names, values))), tensors)


def test_double_stays_double():
    call = in_float64(call_of("everything", (4, 40), torch.float32))
    reasons = fastgpt.explain(norm, **call)
    assert reasons["cpp"] == "it takes fp32, fp16 and bf16, and x is torch.float64" and reasons["reference"] == "chosen"
    assert norm(**call).dtype == torch.float64


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_autocast(kind):
    x, weight = torch.randn(4, 40), torch.randn(40)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x, weight, kind=kind).dtype == torch.float32
        assert norm(x.bfloat16(), weight, kind=kind).dtype == torch.bfloat16


@pytest.mark.slow
def test_opcheck():
    call = call_of("everything", (3, 40), torch.float32)
    order = ("x", "weight", "bias", "residual")
    torch.library.opcheck(torch.ops.fastgpt.norm.default, (*(call[name] for name in order), True, 1e-5, 1.0))
    torch.library.opcheck(torch.ops.fastgpt.norm.default, (VIEWS["queries, token by token"], call["weight"]))


x, weight = torch.zeros(2, 8), torch.zeros(8)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \(..., C\), got a scalar"),
        ({"x": x.int()}, TypeError, "x: expected dtype .*, got torch.int32"),
        ({"weight": None}, TypeError, "weight: expected a torch.Tensor, got NoneType"),
        ({"weight": torch.zeros(9)}, ValueError, r"weight: expected shape \(8,\) \(C,\), got \(9,\)"),
        ({"weight": weight.half()}, TypeError, "weight: expected dtype torch.float32, got torch.float16"),
        ({"weight": weight.to("meta")}, ValueError, "weight: expected device cpu, got meta"),
        ({"bias": torch.zeros(2, 8)}, ValueError, r"bias: expected shape \(8,\) \(C,\), got \(2, 8\)"),
        ({"residual": torch.zeros(8)}, ValueError, r"residual: expected shape \(2, 8\) \(..., C\), got \(8,\)"),
        ({"residual": x.half()}, TypeError, "residual: expected dtype torch.float32, got torch.float16"),
        ({"kind": "batch"}, ValueError, "kind: expected one of 'layer', 'rms', got 'batch'"),
        ({"kind": ["rms"]}, ValueError, r"kind: expected one of 'layer', 'rms', got \['rms'\]"),
        ({"eps": "1e-5"}, TypeError, "eps: expected a finite number >= 0, got '1e-5'"),
        ({"offset": None}, TypeError, "offset: expected a finite number, got None"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of 'cpp', 'triton', 'reference' or None, got 'cuda'"),
        ({"x": x.double(), "weight": weight.double(), "impl": "cpp"}, ValueError, "cannot serve .* torch.float64"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    for impl in (None, "reference") if "impl" not in change else (change["impl"],):
        with pytest.raises(error, match=message):
            norm(**({"x": x, "weight": weight} | change | {"impl": impl}))
