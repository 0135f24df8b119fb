"""The Triton kernels of moe with quantized experts against the reference.

Tests that run the kernels need a GPU or Triton's interpreter, see interpreter.py.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from interpreter import DEVICE, one_of_interpreted, passed, runs_kernel, starts_the_interpreter  # noqa: E402

import fastgpt  # noqa: E402
from fastgpt import quantize  # noqa: E402
from fastgpt.kernels import tiles  # noqa: E402
from fastgpt.kernels.moe_quantized import moe_quantized  # noqa: E402
from fastgpt.ops.experts import ACTIVATION_NUMBERS  # noqa: E402
from fastgpt.ops.moe import moe_reference  # noqa: E402
from fastgpt.testing import moe_features  # noqa: E402
from fastgpt.testing.moe_features import in_float64  # noqa: E402
from fastgpt.testing.numerics import check  # noqa: E402

DTYPES = torch.float32, torch.float16, torch.bfloat16
# (bits, group size or None for a row, minima) of up and of down.
PACKINGS = [
    (("int8", 32, False), ("int8", None, True)), (("int4", 32, False), ("int4", 64, True)), (("int4", 32, True), ("int8", 64, False)),
]  # fmt: skip
SMALL = ("int4", 32, False), ("int4", 32, True)
features = pytest.mark.parametrize("feature", moe_features.FEATURES)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Tiles of several features, as matrices have that are large."""
    monkeypatch.setattr(tiles, "LEAST_PROGRAMS", 2)
    tiles.quantized_tile.cache_clear()
    yield
    tiles.quantized_tile.cache_clear()


def call_of(feature, rows, dtype, packings=PACKINGS[0], **sizes):
    """Arguments of moe with quantized experts, and those in float64 that they stand for."""
    call = moe_features.call_of(feature, rows, dtype, **(dict(E=5, K=2, C=64, I=64) | sizes))
    exact = in_float64(call)
    for name, (kind, group_size, minima) in zip(("up", "down"), packings):
        call[name] = quantize(call[name].flatten(0, 1), kind, group_size, minima=minima)
        exact[name] = call[name].dequantize(torch.float64).view_as(exact[name])
    return tuple({name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in of.items()} for of in (call, exact))


def moe(
    x, experts, weights, up, down, *, up_bias=None, down_bias=None, activation="silu", gated=True, residual=None
):  # fmt: skip
    packed = up.blocks, up.packing[:3], down.blocks, down.packing[:3], down.shape[0] // x.shape[-1]
    return moe_quantized(x, experts, weights, *packed, up_bias, down_bias, residual, ACTIVATION_NUMBERS[activation], gated)


@runs_kernel
@one_of_interpreted(6)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packings", PACKINGS, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
@features
def test_parity(feature, rows, packings, dtype):
    call, exact = call_of(feature, rows, dtype, packings)
    actual = moe(**call)
    assert actual.dtype == dtype and actual.is_contiguous()
    check(actual, lambda: moe_reference(**exact), arithmetic=dtype)


INT4, INT8 = (("int4", 32, False),) * 2, (("int8", None, False),) * 2
SHAPES = [
    (dict(E=1, K=1, C=32, I=32), INT4), (dict(E=3, K=3, C=32, I=96), INT8), (dict(E=20, K=1, C=1056, I=32), INT4),
    (dict(E=3, K=1, C=32, I=544), INT8),
]  # fmt: skip


@runs_kernel
@pytest.mark.parametrize("shape, packings", SHAPES, ids=str)
def test_parity_of_shapes(shape, packings):
    """One tile of columns, and several, of which the last is not full."""
    call, exact = call_of("everything", 1, torch.float16, packings, **shape)
    check(moe(**call), lambda: moe_reference(**exact), arithmetic=torch.float16)


@runs_kernel
def test_other_rows_and_experts_do_not_matter():
    """Neither their NaN, nor experts that do not exist, of whatever weight."""
    call, exact = call_of("everything", 2, torch.float32, SMALL, C=32, I=32)
    expected = moe(**call)
    call["x"][0, 3] = torch.nan
    actual = moe(**call)
    assert actual[0].isnan().all() and torch.equal(actual[1:], expected[1:])
    call["x"], call["experts"], call["weights"] = exact["x"].float(), call["experts"].clone(), call["weights"].clone()
    exact["experts"][:, 1], exact["weights"][:, 1], call["weights"][:, 1] = 0, 0, torch.nan
    for index in (-1, 5, 2**31 - 1, -(2**31)):
        call["experts"][:, 1] = index
        check(moe(**call), lambda: moe_reference(**exact), arithmetic=torch.float32)


@runs_kernel
def test_any_leading_dimensions_strides_and_indices():
    call, _ = call_of("everything", 2, torch.float32, SMALL, C=32, I=32)
    expected, names = moe(**call), ("x", "experts", "weights", "residual")
    assert torch.equal(moe(**call | {name: call[name].view(2, 1, -1) for name in names}), expected.view(2, 1, -1))
    apart = {name: call[name].repeat_interleave(2, -1)[..., ::2] for name in names}
    assert torch.equal(moe(**call | apart), expected)
    assert torch.equal(moe(**call | {"experts": call["experts"].long()}), expected)
    assert moe(**call | {name: call[name][:0] for name in names}).shape == (0, 32)
    for name in ("up", "down"):
        weight = call[name]
        memory = torch.empty(weight.blocks.numel() + 1, dtype=torch.uint8, device=DEVICE)
        call[name] = weight.with_blocks(memory[1:].view_as(weight.blocks).copy_(weight.blocks))  # at an odd address
    assert torch.equal(moe(**call), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 32])
def test_capture_in_a_cuda_graph(rows):
    """By the public function; routes differ from those at capture."""
    call, exact = call_of("everything", rows, torch.bfloat16, PACKINGS[1])
    assert fastgpt.explain(fastgpt.moe, **call)["triton"] == "chosen"
    check(fastgpt.moe(**call), lambda: moe_reference(**exact), arithmetic=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastgpt.moe(**call)
    call["experts"].copy_((call["experts"] + 1) % 5)
    graph.replay()
    assert torch.equal(out, fastgpt.moe(**call))


@pytest.mark.slow
@starts_the_interpreter
def test_under_the_interpreter():
    assert passed(__file__) >= 25
