"""The Triton kernels of linear with quantized weights against the reference.

Tests that run the kernels need a GPU or Triton's interpreter, see interpreter.py.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from interpreter import DEVICE, INTERPRETED, passed, runs_kernel, starts_the_interpreter  # noqa: E402

import fastgpt  # noqa: E402
from fastgpt import QuantizedWeight  # noqa: E402
from fastgpt.kernels.linear_quantized import linear_quantized  # noqa: E402
from fastgpt.kernels.tiles import quantized_tile  # noqa: E402
from fastgpt.ops.linear import (  # noqa: E402
    ACTIVATION_NUMBERS,
    MAX_ROWS_CUDA,
    MAX_ROWS_CUDA_QUANTIZED,
    linear_reference,
)
from fastgpt.ops.quantized_weight import Packing  # noqa: E402
from fastgpt.testing import linear_features  # noqa: E402
from fastgpt.testing.linear_features import in_float64, split  # noqa: E402
from fastgpt.testing.numerics import check  # noqa: E402

EIGHT, FOUR, FOUR_MINIMA = ("int8", 32, False), ("int4", 32, False), ("int4", 32, True)  # GGUF's Q8_0, Q4_0, Q4_1
DTYPES = [(EIGHT, torch.float16), (FOUR_MINIMA, torch.float32), (FOUR, torch.bfloat16)]
DTYPES = DTYPES[: 2 if INTERPRETED else 3]  # there, bf16 is served as fp32
KINDS = [(bits, group, minima) for bits in ("int8", "int4") for group in (32, 64, 128, None) for minima in (False, True)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
three_kinds = pytest.mark.parametrize("kind", [EIGHT, FOUR, FOUR_MINIMA], ids=str)
everything = pytest.mark.parametrize("feature", ["everything", "everything, gated"])
MANY = MAX_ROWS_CUDA + 1


def call_of(feature, rows, K, N, dtype, kind):
    call = linear_features.call_of(feature, rows, K, N, dtype)
    bits, group, minima = kind
    call["weight"] = fastgpt.quantize(call["weight"], bits, group, minima=minima)
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in call.items()}


def linear(
    x, weight, bias=None,
    *, norm="layer", norm_weight=None, norm_bias=None, norm_eps=1e-5, norm_offset=0.0, activation=None, gated=False,
    residual=None,
):  # fmt: skip
    number, of_norm = ACTIVATION_NUMBERS[activation], (norm_weight, norm_bias, norm == "rms", norm_eps, norm_offset)
    return linear_quantized(x, weight.blocks, *weight.packing[:3], bias, residual, number, gated, *of_norm)


def assert_parity(call, rows):
    """Over all numbers of rows together. Up to MAX_ROWS_CUDA, they are rounded once."""
    actual = torch.cat([linear(**part) for part in split(call, rows)])
    assert actual.dtype == call["x"].dtype and actual.is_contiguous()
    double = in_float64(call | {"weight": call["weight"].dequantize(torch.float32)})
    check(actual, lambda: linear_reference(**double), arithmetic=torch.float32 if max(rows) < MANY else actual.dtype)


@runs_kernel
@kinds
@everything
def test_parity_of_kinds(feature, kind):
    """N and the rows are multiples of nothing, and K of 32 alone if groups are."""
    K = {32: 96, 64: 192, 128: 384, None: 160}[kind[1]]
    assert_parity(call_of(feature, 8, K, 9, torch.float16, kind), [1, 7])


@runs_kernel
@kinds
def test_parity_of_many_rows(kind):
    assert_parity(call_of("everything" if kind[2] else "everything, gated", MANY, 384, 9, torch.float16, kind), [MANY])


@runs_kernel
@pytest.mark.parametrize("kind, dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", linear_features.FEATURES)
def test_parity_of_features(feature, kind, dtype):
    assert_parity(call_of(feature, 6, 64, 5, dtype, kind), [1, 5])
    if dtype.itemsize == 2:
        assert_parity(call_of(feature, MANY, 64, 5, dtype, kind), [MANY])


@runs_kernel
@three_kinds
@pytest.mark.parametrize("K, N", [(32, 1), (64, 2), (1056, 3), (2560, 2)], ids=str)
def test_parity_of_shapes(K, N, kind):
    """Rows of one tile and of several, whole and not."""
    assert_parity(call_of("everything", 3, K, N, torch.float16, kind), [1, 2])
    assert_parity(call_of("everything", MANY, K, N, torch.float16, kind), [MANY])


@runs_kernel
@pytest.mark.parametrize("rows", [2, 16, 17, MAX_ROWS_CUDA, 130])
@everything
def test_parity_of_more_rows(feature, rows):
    assert_parity(call_of(feature, rows, 96, 70, torch.float16, FOUR), [rows])


@runs_kernel
@pytest.mark.parametrize("kind", [("int8", 96, False), ("int4", 96, True)], ids=str)
def test_groups_of_other_sizes(kind):
    """As a file may have them."""
    bits, group, minima = kind
    call = call_of("everything", 40, 192, 6, torch.float16, (bits, 32, minima))
    packing = Packing(call["weight"].packing.bits, group, minima)
    blocks = torch.randint(256, (6, packing.row_bytes(192)), dtype=torch.uint8, device=DEVICE)
    for start in (0, packing.block_bytes):
        blocks[:, start : start + packing.header] = call["weight"].blocks[:, : packing.header]
    assert_parity(call | {"weight": QuantizedWeight(blocks, packing, 192, torch.float16)}, [1, 6, 33])


@runs_kernel
@three_kinds
def test_blocks_that_begin_anywhere(kind):
    call = call_of("plain", 36, 96, 5, torch.float16, kind)
    blocks = call["weight"].blocks
    for start in (1, 2, 4):
        moved = torch.zeros(blocks.numel() + start, dtype=torch.uint8, device=DEVICE)[start:].view(blocks.shape).copy_(blocks)
        for part in split(call, [1, 2, 33]):
            assert torch.equal(linear(**part | {"weight": call["weight"].with_blocks(moved)}), linear(**part))


@runs_kernel
@pytest.mark.parametrize("kind", KINDS[::3], ids=str)
@pytest.mark.parametrize("rows", [1, 12])
def test_rounded_once(rows, kind):
    """Nearly all numbers are the nearest of all: neither the norm, nor weights, nor the product is rounded before the end."""
    call = call_of("everything", rows, 256, 60, torch.float16, kind)
    nearest = linear_reference(**in_float64(call | {"weight": call["weight"].dequantize(torch.float32)})).half()
    assert (linear(**call) == nearest).float().mean() > 0.98


@runs_kernel
@three_kinds
def test_nan_stays_in_its_row_and_feature(kind):
    call = call_of("everything", 36, 96, 9, torch.float16, kind)
    for part in split(call, [1, 2, 33]):
        expected = linear(**part)
        part["x"][0, 3] = torch.nan
        blocks = part["weight"].blocks.clone()
        blocks[4, :2] = torch.tensor([0xFF, 0x7F], dtype=torch.uint8)  # a scale that is NaN
        actual = linear(**part | {"weight": part["weight"].with_blocks(blocks)})
        others = [i for i in range(9) if i != 4]
        assert actual[0].isnan().all() and actual[:, 4].isnan().all()
        assert torch.equal(actual[1:, others], expected[1:, others])


@runs_kernel
def test_any_leading_dimensions_and_strides():
    for rows in (6, 36):
        call = call_of("everything", rows, 64, 17, torch.float16, FOUR_MINIMA)
        expected = linear(**call)
        x, residual = call.pop("x"), call.pop("residual")
        assert torch.equal(linear(x.view(2, -1, 64), residual=residual.view(2, -1, 17), **call), expected.view(2, -1, 17))
        for width, start in ((72, 8), (71, 5)):  # rows of a wider tensor, at multiples of 16 bytes and not
            wide = torch.zeros(rows, width, dtype=x.dtype, device=DEVICE)[:, start : start + 64].copy_(x)
            assert torch.equal(linear(wide, residual=residual, **call), expected)
        apart = torch.zeros(rows, 128, dtype=x.dtype, device=DEVICE)[:, ::2].copy_(x)
        assert torch.equal(linear(apart, residual=residual.t().contiguous().t(), **call), expected)
        assert linear(x[:0], residual=residual[:0], **call).shape == (0, 17)
        one = linear(x[:1], residual=residual[:1], **call)
        assert torch.equal(linear(apart[0], residual=residual[0], **call), one[0])


def test_tiles_are_within_the_weight():
    """The kernel for one row computes features of whole tiles only."""
    for rows in range(1, 20):
        for bits in (4, 8):
            assert quantized_tile(1, rows, 4096, bits, 2).BLOCK_N <= rows


PRODUCTS = {  # of models that are run: rows of the weight, columns, and the feature, as in test_triton_linear.py
    "GPT-2 124M logits": (50257, 768, "norm"), "GPT-2 XL up": (6400, 1600, "everything"),
    "Llama 1B up": (16384, 2048, "everything, gated"), "Llama 8B up": (28672, 4096, "everything, gated"),
    "Llama 8B down": (4096, 14336, "residual"),
}  # fmt: skip
products = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)


def call_at_size(product, rows, dtype, kind):
    weight_rows, K, feature = product
    return call_of(feature, rows, K, weight_rows // (2 if "gated" in feature else 1), dtype, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [EIGHT, FOUR], ids=str)
@products
def test_parity_at_size(product, kind):
    assert_parity(call_at_size(product, 9, torch.bfloat16, kind), [1, 8])
    assert_parity(call_at_size(product, 300, torch.bfloat16, kind), [300])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_the_public_function_uses_the_kernel(rows):
    call = call_at_size(PRODUCTS["Llama 8B up"], rows, torch.bfloat16, FOUR)
    assert fastgpt.explain(fastgpt.linear, **call)["triton"] == "chosen"
    assert torch.equal(fastgpt.linear(**call), linear(**call))
    with pytest.raises(ValueError, match=f"it multiplies up to {MAX_ROWS_CUDA_QUANTIZED} rows"):
        fastgpt.linear(**call | {"x": call["x"].repeat(1100, 1), "residual": None}, impl="triton")


@pytest.mark.gpu
@three_kinds
def test_tokens_of_a_graph_are_those_of_the_dequantized_weights(kind):
    """A decoder with quantized weights, whose step is captured, and one of plain weights that are what these stand for."""
    from models import random_ids, random_model

    bits, group, minima = kind
    model = random_model(layers=2, width=128).to(DEVICE)
    plain = random_model(layers=2, width=128).to(DEVICE)
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            weight = fastgpt.quantize(module.weight, bits, group, minima=minima)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
            other.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
    ids = random_ids(model, 3, 9).to(DEVICE)
    assert fastgpt.explain(fastgpt.decoding, model, model.new_cache(3))["cuda_graph"] == "chosen"
    assert torch.equal(fastgpt.generate(model, ids, 40), fastgpt.generate(plain, ids, 40))


@pytest.mark.gpu
def test_opcheck():
    call = call_of("everything", 3, 64, 65, torch.float32, FOUR)
    arguments = call["x"], call["weight"].blocks, *call["weight"].packing, call["bias"], call["residual"]
    torch.library.opcheck(torch.ops.fastgpt.linear_quantized.default, arguments)


@pytest.mark.gpu
@three_kinds
def test_offsets_beyond_32_bits(kind):
    weight = torch.randn(64, 4096, dtype=torch.float16, device=DEVICE)
    small = fastgpt.quantize(weight, kind[0], kind[1], minima=kind[2])
    repeats = 2**31 // small.nbytes + 2
    large = QuantizedWeight(small.blocks.repeat(repeats, 1), small.packing, 4096, torch.float16)
    x = torch.randn(40, 4096, dtype=torch.float16, device=DEVICE)
    double = small.dequantize(torch.float64)
    for rows in (1, 3, 40):
        actual = linear(x[:rows], large)[:, -64:]
        check(actual, lambda rows=rows: x[:rows].double() @ double.t(), arithmetic=torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4])
@three_kinds
def test_capture_in_a_cuda_graph(kind, rows):
    """Of one launch."""
    call = call_at_size(PRODUCTS["GPT-2 XL up"], rows, torch.bfloat16, kind)
    linear(**call)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(**call)
    call["x"].neg_()
    graph.replay()
    assert torch.equal(out, linear(**call))
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA) == 1


@pytest.mark.slow
@starts_the_interpreter
def test_under_the_interpreter():
    assert passed(__file__) >= 110
