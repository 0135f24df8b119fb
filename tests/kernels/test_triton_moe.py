"""The Triton kernels of route and moe against the references.

Tests that run the kernels need a GPU or Triton's interpreter, see interpreter.py.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from interpreter import DEVICE, INTERPRETED, passed, runs_kernel, starts_the_interpreter  # noqa: E402

import fastgpt  # noqa: E402
from fastgpt.kernels import moe as kernel  # noqa: E402
from fastgpt.ops.experts import ACTIVATION_NUMBERS  # noqa: E402
from fastgpt.ops.moe import moe_reference  # noqa: E402
from fastgpt.ops.route import GROUP_SCORES, SCORINGS, route_reference  # noqa: E402
from fastgpt.testing import moe_features  # noqa: E402
from fastgpt.testing.moe_features import in_float64  # noqa: E402
from fastgpt.testing.numerics import check  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)[: 2 if INTERPRETED else 3]  # there, bf16 is served as fp32
FEW, MANY = 2, 13  # rows of 3 of 8 experts
features = pytest.mark.parametrize("feature", moe_features.FEATURES)


def moe(
    x, experts, weights, up, down, *, up_bias=None, down_bias=None, activation="silu", gated=True, residual=None
):  # fmt: skip
    number = ACTIVATION_NUMBERS[activation]
    return kernel.moe(x, experts, weights, up, down, up_bias, down_bias, residual, number, gated)


def route(
    logits, top_k, *, scoring="softmax", selection_bias=None, num_groups=1, top_groups=1, group_score="max", normalize=False,
    scale=1.0,
):  # fmt: skip
    groups = num_groups, top_groups, GROUP_SCORES[group_score]
    return kernel.route(logits, top_k, SCORINGS[scoring], selection_bias, *groups, normalize, scale)


def on_device(call):
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in call.items()}


def call_of(*arguments, **sizes):
    return on_device(moe_features.call_of(*arguments, **sizes))


@runs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, FEW, MANY])
@features
def test_parity(feature, rows, dtype):
    """Few rows and many; sizes are multiples of nothing."""
    call = call_of(feature, rows, dtype, C=37, I=19)
    actual = moe(**call)
    assert actual.dtype == dtype and actual.is_contiguous()
    check(actual, lambda: moe_reference(**in_float64(call)), arithmetic=dtype)


SHAPES = [
    (dict(E=1, K=1, C=16, I=16), (1, 5)),
    (dict(E=5, K=5, C=48, I=1), (1, 3)),
    (dict(E=40, K=2, C=33, I=70), (1, 20, 30)),
    (dict(E=3, K=1, C=130, I=66), (3, 70)),
    (dict(E=4, K=2, C=1, I=5), (1, 9)),
    (dict(E=4, K=2, C=16, I=0), (1, 9)),
    (dict(E=3, K=2, C=20, I=5), (1, 4)),
]


@runs_kernel
@pytest.mark.parametrize("shape, rows", SHAPES, ids=str)
def test_parity_of_shapes(shape, rows):
    """All experts are chosen, one is, and most have no row; some have several tiles of rows."""
    for n in rows:
        call = call_of("everything", n, torch.float16, **shape)
        check(moe(**call), lambda call=call: moe_reference(**in_float64(call)), arithmetic=torch.float16)


@runs_kernel
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_other_rows_do_not_matter(rows):
    """Neither their NaN, nor the weights of experts that a row has not chosen."""
    call = call_of("everything", rows, torch.float32)
    call["experts"] %= 7
    expected = moe(**call)
    call["x"][0, 3], call["up"][7], call["down"][7] = torch.nan, torch.nan, torch.inf
    actual = moe(**call)
    assert actual[0].isnan().all() and torch.equal(actual[1:], expected[1:])


@runs_kernel
@pytest.mark.parametrize("rows", [1, FEW, MANY])
def test_experts_that_do_not_exist_add_nothing(rows):
    call = call_of("everything", rows, torch.float32)
    call["experts"][:, 1] = 0
    known = call | {name: call[name].clone() for name in ("experts", "weights")}
    known["weights"][:, 1] = 0
    for index in (-1, 8, 2**31 - 1, -(2**31)):
        call["experts"][:, 1] = index
        check(moe(**call), lambda: moe_reference(**in_float64(known)), arithmetic=torch.float32)


@runs_kernel
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_any_leading_dimensions_strides_and_indices(rows):
    call = call_of("everything", 2 * rows, torch.float32)
    expected = moe(**call)
    names = "x", "experts", "weights", "residual"
    assert torch.equal(moe(**call | {name: call[name].view(2, rows, -1) for name in names}), expected.view(2, rows, -1))
    apart = {name: call[name].repeat_interleave(2, -1)[..., ::2] for name in names}
    assert not any(x.is_contiguous() for x in apart.values())
    assert torch.equal(moe(**call | apart), expected)
    assert torch.equal(moe(**call | {"experts": call["experts"].long()}), expected)
    assert moe(**call | {name: call[name][:0] for name in names}).shape == (0, 40)


@runs_kernel
def test_many_rows_in_parts():
    call = call_of("everything", 30, torch.float16)
    expected = moe(**call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "MOST_PRODUCTS", 4 * 40 * 3 * 11)
        check(moe(**call), lambda: moe_reference(**in_float64(call)), arithmetic=torch.float16)
    check(expected, lambda: moe_reference(**in_float64(call)), arithmetic=torch.float16)


@runs_kernel
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("E, K", [(8, 1), (8, 4), (64, 8), (20, 3)])
@pytest.mark.parametrize("feature", moe_features.ROUTES)
def test_route(feature, E, K, dtype):
    call = on_device(moe_features.route_call_of(feature, 5, E, K, dtype))
    experts, weights = route(**call)
    expected, _ = route_reference(**call | {"logits": call["logits"].float()})
    assert experts.dtype == torch.int32 and torch.equal(experts, expected)
    check(weights, lambda: route_reference(**in_float64(call))[1], arithmetic=torch.float32)


@runs_kernel
def test_route_of_equal_logits_nan_and_infinities():
    logits = torch.zeros(3, 9, device=DEVICE)
    logits[:, 7], logits[2] = 1, -0.0
    assert route(logits, 3)[0].tolist() == [[7, 0, 1], [7, 0, 1], [0, 1, 2]]
    logits = torch.randn(6, 8, device=DEVICE)
    logits[0, 3], logits[1], logits[2, 5], logits[3], logits[4, :4] = torch.nan, torch.nan, torch.inf, -torch.inf, -torch.inf
    for scoring in SCORINGS:
        for options in ({}, {"num_groups": 4, "top_groups": 2, "group_score": "top2", "normalize": True}):
            experts, weights = route(logits, 4, scoring=scoring, **options)
            assert experts.ge(0).all() and experts.lt(8).all() and all(len(row.unique()) == 4 for row in experts)
            assert weights[0].isnan().any() and torch.isfinite(weights[5]).all()


@runs_kernel
def test_route_of_any_strides():
    logits = torch.randn(6, 24, device=DEVICE)
    expected = route(logits, 2)
    for view in (logits.view(2, 3, 24), torch.randn(6, 30, device=DEVICE)[:, 3:27].copy_(logits), logits.t().contiguous().t()):
        experts, weights = route(view, 2)
        assert torch.equal(experts.view(6, 2), expected[0]) and torch.equal(weights.view(6, 2), expected[1])
    assert [x.shape for x in route(logits[:0], 2)] == [(0, 2), (0, 2)]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 600])
def test_the_public_functions_use_the_kernels(rows):
    """Of a layer as Qwen3-30B-A3B's, with half of its experts."""
    call = call_of("gated silu", rows, torch.bfloat16, E=64, K=8, C=2048, I=768)
    assert fastgpt.explain(fastgpt.moe, **call)["triton"] == "chosen"
    actual = fastgpt.moe(**call)
    assert torch.equal(actual, moe(**call))
    check(actual, lambda: moe_reference(**in_float64(call)), arithmetic=torch.bfloat16)
    logits = torch.randn(rows, 64, device=DEVICE)
    assert fastgpt.explain(fastgpt.route, logits, 8)["triton"] == "chosen"
    assert all(map(torch.equal, fastgpt.route(logits, 8), route(logits, 8)))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 100])
def test_capture_in_a_cuda_graph(rows):
    """Routes differ from those at capture."""
    call = call_of("everything", rows, torch.bfloat16)
    logits = torch.randn(rows, 8, device=DEVICE)

    def run():
        experts, weights = route(logits, 3)
        return moe(**call | {"experts": experts, "weights": weights})

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    logits.neg_()
    graph.replay()
    assert torch.equal(out, run())


@pytest.mark.gpu
def test_opcheck():
    call = call_of("everything", 3, torch.float32)
    tensors = [call[name] for name in ("x", "experts", "weights", "up", "down", "up_bias", "down_bias", "residual")]
    torch.library.opcheck(torch.ops.fastgpt.moe.default, (*tensors, ACTIVATION_NUMBERS["swiglu_clamped"]))
    torch.library.opcheck(torch.ops.fastgpt.route.default, (torch.randn(3, 8, device=DEVICE), 2))


@pytest.mark.slow
@starts_the_interpreter
def test_under_the_interpreter():
    assert passed(__file__) >= 80
