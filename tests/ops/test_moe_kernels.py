"""The C++ kernels of route and moe against the references."""

import os
import subprocess
import sys

import pytest
import torch
from cpu_levels import lower_levels

import fastgpt
from fastgpt import explain, moe, moe_reference, quantize, route, route_reference
from fastgpt.generation.replay import CpuReplay
from fastgpt.ops.experts import ACTIVATION_NUMBERS
from fastgpt.ops.route import SCORINGS
from fastgpt.testing import numerics
from fastgpt.testing.moe_features import FEATURES, ROUTES, call_of, in_float64, route_call_of

pytestmark = pytest.mark.threads

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (E, K, C, I, rows): sizes that are multiples of nothing; all experts, one expert, one choice; rows of one expert in several
# blocks; so many pairs that they are taken in batches.
SIZES = [
    (8, 3, 40, 24, (1, 2, 7)), (5, 5, 33, 7, (1, 4, 40)), (1, 1, 70, 130, (1, 3, 200)), (64, 8, 37, 21, (1, 9, 150)),
    (3, 1, 1, 1, (1, 5)), (16, 2, 96, 0, (1, 3, 200)), (1, 1, 33, 0, (150,)),
]  # fmt: skip
everything = pytest.mark.parametrize("feature", ["everything", "everything, no gate"])


def check(call, **options):
    actual = moe(**call, impl="cpp")
    assert actual.dtype == call["x"].dtype and actual.is_contiguous() and actual.shape == call["x"].shape
    numerics.check(actual, lambda: moe_reference(**in_float64(call)), arithmetic=call["x"].dtype, **options)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_contract(feature, dtype):
    for rows in (1, 3, 30, 400):
        check(call_of(feature, rows, dtype, C=45, I=27))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_contract_of_sizes(sizes, dtype):
    E, K, C, I, numbers = sizes
    for rows in numbers:
        check(call_of("everything", rows, dtype, E=E, K=K, C=C, I=I))


@pytest.mark.parametrize("chosen", [[0, 1, 1], [1, 1, 0], [2, 2, 2], [0, *[1] * 64], [3] * 70 + [2]], ids=len)
@pytest.mark.parametrize("rows", [1, 2])
def test_experts_that_are_chosen_several_times(chosen, rows):
    call, experts = call_of("everything", rows, torch.float32, E=4, K=2, C=96, I=40), [chosen] * rows
    check(call | {"experts": torch.tensor(experts, dtype=torch.int32), "weights": torch.rand(rows, len(chosen))})


@pytest.mark.parametrize("impl", [None, "cpp", "reference"])
def test_a_row_without_experts_is_refused(impl):
    call = call_of("everything", 2, torch.float32, E=4, K=2, C=64, I=32)
    none = {"experts": torch.zeros(2, 0, dtype=torch.int32), "weights": torch.zeros(2, 0)}
    with pytest.raises(ValueError, match="^experts: expected shape"):
        moe(**call | none, impl=impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E, K", [(8, 1), (8, 4), (20, 3), (64, 8), (256, 8)])
@pytest.mark.parametrize("feature", ROUTES)
def test_contract_of_route(feature, E, K, dtype):
    call = route_call_of(feature, 30, E, K, dtype)
    experts, weights = route(**call, impl="cpp")
    assert experts.dtype == torch.int32 and weights.dtype == torch.float32
    assert torch.equal(experts, route_reference(**call)[0])
    numerics.check(weights, lambda: route_reference(**in_float64(call))[1], arithmetic=torch.float32)


@pytest.mark.exhaustive
@pytest.mark.parametrize("level", lower_levels())
def test_lower_cpu_levels(level):
    which = "contract or quantized or neighbors"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", which, "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"FASTGPT_CPU_LEVEL": level}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


QUANTIZATIONS = [("int8", 32, False), ("int8", None, True), ("int4", 32, False), ("int4", 64, True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_quantized(quantization, dtype):
    """Experts' matrices one below the other, of rows that are read one by one and of panels."""
    kind, group_size, minima = quantization
    for feature, rows in (("everything", 1), ("gated silu", 5), ("no gate", 60), ("biases", 400)):
        call = call_of(feature, rows, dtype, C=128, I=64)
        exact = in_float64(call)
        for name in ("up", "down"):
            quantized = quantize(call[name].flatten(0, 1), kind, group_size, minima=minima)
            exact[name] = quantized.dequantize(torch.float64).view_as(call[name])
            call[name] = quantized
        assert explain(moe, **call)["cpp"] == "chosen"
        # What `linear` rounds to bfloat16 on some CPUs, the reference in bfloat16 rounds, too.
        numerics.check(moe(**call, impl="cpp"), lambda exact=exact: moe_reference(**exact), arithmetic=dtype)


def test_both_matrices_are_quantized_or_none():
    call = call_of("residual", 3, torch.float32, C=64, I=32)
    call["up"] = quantize(call["up"].flatten(0, 1))
    assert explain(moe, **call)["cpp"] == "it takes both up and down quantized, or neither"
    numerics.check(
        moe(**call), lambda: moe_reference(**in_float64(call) | {"up": call["up"].dequantize(torch.float64).view(8, 64, 64)})
    )


@pytest.mark.parametrize("rows", [1, 9, 130])
@everything
def test_bits_depend_on_no_neighbors_and_no_threads(feature, rows):
    """Neither on the number of threads, nor on other rows, nor on experts that a row has not chosen."""
    call = call_of(feature, rows, torch.float32, C=200, I=150)
    call["experts"] %= 7
    whole, threads = moe(**call), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(moe(**call), whole)
    finally:
        torch.set_num_threads(threads)
    call["up"][7], call["down"][7], call["x"][-1, 3] = torch.nan, torch.inf, torch.nan
    dirty = moe(**call)
    assert torch.equal(dirty[:-1], whole[:-1]) and dirty[-1].isnan().all()


@everything
def test_any_leading_dimensions_strides_and_indices(feature):
    call = call_of(feature, 6, torch.float32)
    expected, names = moe(**call, impl="cpp"), ("x", "experts", "weights", "residual")
    assert torch.equal(moe(**call | {name: call[name].view(2, 3, -1) for name in names}), expected.view(2, 3, -1))
    apart = {name: call[name].repeat_interleave(2, -1)[..., ::2] for name in names}
    assert torch.equal(moe(**call | apart), expected)
    assert torch.equal(moe(**call | {"experts": call["experts"].long()}), expected)
    assert torch.equal(
        moe(**call | {name: call[name][0] for name in names}), moe(**call | {name: call[name][:1] for name in names})[0]
    )
    assert moe(**call | {name: call[name][:0] for name in names}, impl="cpp").shape == (0, 40)
    strided = call | {"up": torch.zeros(8, call["up"].shape[1], 80)[..., :40].copy_(call["up"])}
    assert explain(moe, **strided)["cpp"] == "it takes contiguous up and down"
    numerics.check(moe(**strided), lambda: moe_reference(**in_float64(call)), arithmetic=torch.float32)


@torch.inference_mode()
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_plan_chooses_experts_anew(rows, quantized):
    """Of a router, its choice, and what the experts compute, for other rows than those that it was recorded with."""
    call = call_of("everything", rows, torch.float32, E=16, C=64, I=32)
    if quantized:
        call |= {name: quantize(call[name].flatten(0, 1)) for name in ("up", "down")}
    router = torch.randn(16, 64)

    def step(x):
        experts, weights = route(fastgpt.linear(x, router), 3, normalize=True)
        return moe(**call | {"x": x, "experts": experts, "weights": weights})

    function = CpuReplay(step)
    for _ in range(4):
        x = torch.randn(rows, 64)
        assert torch.equal(function(x), step(x))
    assert function.refused is None and len(function.plan) == 3


@torch.inference_mode()
def test_a_plan_refuses_experts_that_do_not_exist():
    call = call_of("everything", 2, torch.float32)
    function = CpuReplay(lambda x: moe(**call | {"x": x}))
    expected = function(call["x"]).clone()
    call["experts"][1, 1] += 8
    with pytest.raises(RuntimeError, match="experts: expected indices from 0 to 7, got"):
        function(call["x"])
    call["experts"][1, 1] -= 8
    assert torch.equal(function(call["x"]), expected)


def test_route_of_equal_logits_nan_and_infinities():
    logits = torch.zeros(3, 9)
    logits[:, 7], logits[2] = 1, -0.0
    assert route(logits, 3, impl="cpp")[0].tolist() == [[7, 0, 1], [7, 0, 1], [0, 1, 2]]
    logits = torch.randn(6, 8)
    logits[0, 3], logits[1], logits[2, 5], logits[3], logits[4, :4] = torch.nan, torch.nan, torch.inf, -torch.inf, -torch.inf
    for scoring in SCORINGS:
        for options in ({}, {"num_groups": 4, "top_groups": 2, "group_score": "top2", "normalize": True}):
            experts, weights = route(logits, 4, scoring=scoring, **options, impl="cpp")
            assert experts.ge(0).all() and experts.lt(8).all() and all(len(row.unique()) == 4 for row in experts)
            assert weights[0].isnan().any() and torch.isfinite(weights[5]).all()


def test_route_of_any_shapes_and_strides():
    logits = torch.randn(6, 24)
    expected = route(logits, 2)
    for view in (logits.view(2, 3, 24), torch.randn(6, 30)[:, 3:27].copy_(logits), logits.t().contiguous().t()):
        experts, weights = route(view, 2, impl="cpp")
        assert torch.equal(experts.view(6, 2), expected[0]) and torch.equal(weights.view(6, 2), expected[1])
    assert [x.shape for x in route(logits[0], 24, impl="cpp")] == [(24,), (24,)]
    assert [x.shape for x in route(logits[:0], 2, impl="cpp")] == [(0, 2), (0, 2)]


@pytest.mark.slow
def test_opcheck():
    call = call_of("everything", 3, torch.float32, C=64, I=32)
    names = "up_bias", "down_bias", "residual"
    tensors = [call[name] for name in ("x", "experts", "weights", "up", "down", *names)]
    number = ACTIVATION_NUMBERS["swiglu_clamped"]
    torch.library.opcheck(torch.ops.fastgpt.moe.default, (*tensors, number))
    up, down = (quantize(call[name].flatten(0, 1)) for name in ("up", "down"))
    packed = up.blocks, *up.packing, down.blocks, *down.packing, 8
    torch.library.opcheck(torch.ops.fastgpt.moe_quantized.default, (*tensors[:3], *packed, *tensors[5:], number))
    torch.library.opcheck(torch.ops.fastgpt.route.default, (torch.randn(3, 8), 2))
    torch.library.opcheck(torch.ops.fastgpt.route.default, (torch.randn(3, 8), 2, True, torch.randn(8), 4, 2, True, True, 2.5))
