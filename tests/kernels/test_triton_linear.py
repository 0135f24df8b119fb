"""The Triton kernels of linear and norm against the references.

Tests that run the kernels need a GPU or Triton's interpreter, see interpreter.py.
"""

from unittest import mock

import pytest
import torch
from models import random_ids, random_model

triton = pytest.importorskip("triton")

from interpreter import DEVICE, INTERPRETED, one_of_interpreted, passed, runs_kernel, starts_the_interpreter  # noqa: E402

import fastgpt  # noqa: E402
from fastgpt.kernels import linear as kernel  # noqa: E402
from fastgpt.kernels import norm as norm_kernel  # noqa: E402
from fastgpt.model import decoder, layers  # noqa: E402
from fastgpt.model.rope import Rope  # noqa: E402
from fastgpt.ops.linear import ACTIVATION_NUMBERS, ACTIVATIONS, MAX_ROWS_CUDA, linear_reference  # noqa: E402
from fastgpt.ops.norm import norm_reference  # noqa: E402
from fastgpt.testing import linear_features, norm_features  # noqa: E402
from fastgpt.testing.linear_features import in_float64, split  # noqa: E402
from fastgpt.testing.numerics import check  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)[: 2 if INTERPRETED else 3]  # there, bf16 is served as fp32
ROWS = (1, 7)
SHAPES = [
    *((K, N, torch.float16) for K, N in ((1, 1), (128, 16), (256, 20), (3000, 2))),
    (5, 3, torch.float32), (160, 5, torch.float32), (4200, 2, torch.float32),
]  # fmt: skip
features = pytest.mark.parametrize("feature", linear_features.FEATURES)
everything = pytest.mark.parametrize("feature", ["everything", "everything, gated"])


def linear(
    x, weight, bias=None,
    *, norm="layer", norm_weight=None, norm_bias=None, norm_eps=1e-5, norm_offset=0.0, activation=None, gated=False,
    residual=None,
):  # fmt: skip
    number, rms = ACTIVATION_NUMBERS[activation], norm == "rms"
    return kernel.linear(x, weight, bias, residual, number, gated, norm_weight, norm_bias, rms, norm_eps, norm_offset)


def norm(x, weight, bias=None, *, kind="layer", eps=1e-5, offset=0.0, residual=None):
    return norm_kernel.norm(x, weight, bias, residual, kind == "rms", eps, offset)


def call_of(features, *arguments):
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in features.call_of(*arguments).items()}


def assert_parity(call, rows):
    """Over all numbers of rows together."""
    actual = torch.cat([linear(**part) for part in split(call, rows)])
    assert actual.dtype == call["x"].dtype and actual.is_contiguous()
    check(actual, lambda: linear_reference(**in_float64(call)))
    return actual


@runs_kernel
@one_of_interpreted(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@features
def test_parity(feature, dtype):
    """K and N are multiples of nothing."""
    assert_parity(call_of(linear_features, feature, sum(ROWS), 37, 9, dtype), ROWS)


@runs_kernel
@pytest.mark.parametrize("K, N, dtype", SHAPES, ids=str)
@everything
def test_parity_of_shapes(feature, K, N, dtype):
    """Rows of one tile and of several, whole and not; moments of one piece and of two."""
    assert_parity(call_of(linear_features, feature, sum(ROWS), K, N, dtype), ROWS)


@runs_kernel
@pytest.mark.parametrize("rows", [2, 14, 15, 30, 31, MAX_ROWS_CUDA])
@everything
def test_parity_of_more_rows(feature, rows):
    """What is left of a tile's rows, two or none, decides which tile."""
    assert_parity(call_of(linear_features, feature, rows, 70, 9, torch.float16), [rows])


@runs_kernel
@pytest.mark.parametrize("rows", [1, 12])
@everything
def test_rounded_once(feature, rows):
    """Nearly all numbers are the nearest of all, in 16 bits too: neither the norm nor the product is rounded before the end."""
    call = call_of(linear_features, feature, rows, 256, 60, torch.float16)
    nearest = linear_reference(**in_float64(call)).half()
    assert (linear(**call) == nearest).float().mean() > 0.98


@runs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_numbers_far_from_one(norm, dtype):
    """Of x, rows apart by a factor of a million, or far from zero in fp32; one column outdoes all others."""
    call = call_of(linear_features, "norm and bias", 9, 300, 6, dtype) | {"norm": norm}
    x = call["x"]
    x[:, 200] *= 500
    assert_parity(call, [1, 8])
    assert_parity(call | {"x": x * torch.logspace(-3, 1.5, 9, device=DEVICE).to(dtype)[:, None]}, [1, 8])
    if dtype is torch.float32:
        assert_parity(call | {"x": x + 1000}, [1, 8])


@runs_kernel
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
def test_activations_far_from_zero(activation):
    """And near it: in parts, each of which is judged by its own scale."""
    x = torch.cat([torch.linspace(-30, 30, 25), torch.tensor([1e30])]).to(DEVICE)
    far = linear(torch.ones(2, 1, device=DEVICE), x.view(-1, 1), activation=activation)
    far = torch.cat([far, linear(torch.ones(1, 1, device=DEVICE), x.view(-1, 1), activation=activation)])
    sizes = 12, 13, 1  # up to 0, 30, and the last one
    for actual, part in zip(far.split(sizes, dim=1), x.double().split(sizes), strict=True):
        check(actual, lambda: ACTIVATIONS[activation](part).expand(3, -1), name=f"from {part[0]:.0f}")


@runs_kernel
@pytest.mark.parametrize("activation, rows", [("gelu_tanh", 1), ("gelu", 3), ("silu", 1), ("relu", 3)])
def test_nan_stays_in_its_row(activation, rows):
    call = call_of(linear_features, "everything", rows, 40, 9, torch.float32) | {"activation": activation}
    expected = linear(**call)
    call["x"][0, 3] = torch.nan
    actual = linear(**call)
    assert actual[0].isnan().all() and torch.equal(actual[1:], expected[1:])


@runs_kernel
@everything
def test_any_leading_dimensions_and_strides(feature):
    call = call_of(linear_features, feature, 6, 40, 17, torch.float32)
    expected = linear(**call)
    x, residual = call.pop("x"), call.pop("residual")
    assert torch.equal(linear(x.view(2, 3, 40), residual=residual.view(2, 3, 17), **call), expected.view(2, 3, 17))
    for width, start in ((48, 4), (47, 5)):  # rows of a wider tensor, at multiples of 16 bytes and not
        wide, wide_residual = (torch.zeros(6, width, device=DEVICE) for _ in range(2))
        wide, wide_residual = wide[:, start : start + 40].copy_(x), wide_residual[:, start : start + 17].copy_(residual)
        assert torch.equal(linear(wide, residual=wide_residual, **call), expected)
    apart = torch.zeros(6, 80, device=DEVICE)[:, ::2].copy_(x)
    assert torch.equal(linear(apart, residual=torch.zeros(17, 6, device=DEVICE).t().copy_(residual), **call), expected)
    one = linear(x[:1], residual=residual[:1], **call)
    assert torch.equal(linear(apart[0], residual=residual[0], **call), one[0])
    assert linear(x[:0], residual=residual[:0], **call).shape == (0, 17)


@pytest.mark.gpu
@everything
def test_a_row_gives_the_same_bits_among_any_others(feature):
    """As long as their number takes the same tile. Not in the interpreter, whose products are NumPy's: they round by place."""
    call = call_of(linear_features, feature, 12, 200, 19, torch.float16)
    whole = linear(**call)
    for rows in (2, 5):
        part = split(call, [rows, 12 - rows])[0]
        assert torch.equal(linear(**part), whole[:rows])


@runs_kernel
@pytest.mark.parametrize("feature", norm_features.FEATURES)
@pytest.mark.parametrize("C, dtype", [(1, torch.float32), *((C, dtype) for C in (5, 80, 1200) for dtype in DTYPES)], ids=str)
def test_parity_of_norms(feature, C, dtype):
    if not INTERPRETED or (C < 1000) != (dtype is torch.float16):
        call = call_of(norm_features, feature, (3, 45, C) if C < 1000 else (3, C), dtype)
        actual = norm(**call)
        assert actual.dtype == dtype and actual.is_contiguous()
        check(actual, lambda: norm_reference(**in_float64(call)))


@runs_kernel
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_of_long_rows_and_of_rows_far_from_zero(kind):
    for shift in (0, 1000):
        call = call_of(norm_features, "everything", (2, 5000), torch.float32) | {"kind": kind}
        call["x"] += shift
        check(norm(**call), lambda: norm_reference(**in_float64(call)))


@runs_kernel
def test_norms_of_any_strides():
    B, T, H, D = 2, 3, 4, 40
    qkv = torch.randn(B, T, 3 * H * D, device=DEVICE)
    heads = qkv.view(B, T, 3, H, D)
    views = (
        heads[:, :, 0], heads[:, :, 1].transpose(1, 2), heads[:, -1:, 0], qkv[:, -1:], qkv[0, 0], qkv[:, ::2, 7:],
        heads.permute(3, 1, 0, 2, 4)[:, :, :, :2], qkv.transpose(1, 2), qkv[:1, :1].expand(B, T, -1), qkv[:0], qkv[..., :0],
    )  # fmt: skip
    for view in views:
        weight, contiguous = torch.randn(view.shape[-1], device=DEVICE), view.clone(memory_format=torch.contiguous_format)
        actual = norm(view, weight, residual=view)
        assert actual.shape == view.shape and actual.is_contiguous()
        assert torch.equal(actual, norm(contiguous, weight, residual=contiguous))


ROTARY = {"norm": "rms", "position": "rotary", "rope": Rope(8)}
MODELS = {
    "GPT-2": {},
    "Llama": {"gated": True, "activation": "silu", "num_kv_heads": 2, "qkv_bias": False, **ROTARY},
    "Gemma": {"norm_offset": 1.0, "post_norms": True, "gated": True, "qk_norm": True, "embedding_scale": 8.0, **ROTARY},
}  # fmt: skip


@runs_kernel
@torch.inference_mode()
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_a_decoder_computes_the_same_by_the_kernels(fields):
    """Of a prompt and a step of one token; on a CPU the attention is that of C++."""
    model = random_model(layers=1, width=32, context=32, **fields).to(DEVICE)
    ids = random_ids(model, 1, 6).to(DEVICE)
    kernels = mock.Mock(side_effect=lambda x, weight, bias=None, dropout_p=0.0, **options: linear(x, weight, bias, **options))
    with (
        mock.patch.object(decoder, "linear", kernels),
        mock.patch.object(layers, "linear", kernels),
        mock.patch.object(layers, "norm", norm),
    ):
        cache = model.new_cache(1)
        logits = torch.cat([model(part, cache=cache) for part in (ids[:, :5], ids[:, 5:])], dim=1)
    assert kernels.call_count == 2 * (4 * len(model.blocks) + 1)  # of which half are of one row
    check(logits, lambda: model.double()(ids))


# Of models that are run: rows of the weight, columns, and the feature, as GPT-2's (124M, XL) or Llama's (1B, 8B).
PRODUCTS = {
    "GPT-2 124M qkv": (2304, 768, "norm and bias"),
    "GPT-2 124M out": (768, 768, "residual"),
    "GPT-2 124M up": (3072, 768, "everything"),
    "GPT-2 124M down": (768, 3072, "residual"),
    "GPT-2 124M logits": (50257, 768, "norm"),
    "GPT-2 XL up": (6400, 1600, "everything"),
    "GPT-2 XL down": (1600, 6400, "residual"),
    "Llama 1B up": (16384, 2048, "everything, gated"),
    "Llama 1B down": (2048, 8192, "residual"),
    "Llama 8B qkv": (6144, 4096, "rms norm"),
    "Llama 8B up": (28672, 4096, "everything, gated"),
    "Llama 8B down": (4096, 14336, "residual"),
}
products = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)


def call_at_size(product, rows, dtype):
    weight_rows, K, feature = product
    return call_of(linear_features, feature, rows, K, weight_rows // (2 if "gated" in feature else 1), dtype)


@pytest.mark.gpu
@products
def test_parity_at_size(product):
    rows = (1, 8, 32)
    few = product in (PRODUCTS["GPT-2 124M up"], PRODUCTS["GPT-2 124M down"], PRODUCTS["Llama 8B up"])
    for dtype in DTYPES if few else (torch.bfloat16,):
        assert_parity(call_at_size(product, sum(rows), dtype), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5])
@products
def test_the_public_function_uses_the_kernel(product, rows):
    call = call_at_size(product, rows, torch.bfloat16)
    assert fastgpt.explain(fastgpt.linear, **call)["triton"] == "chosen"
    assert torch.equal(fastgpt.linear(**call), linear(**call))
    with pytest.raises(ValueError, match="it multiplies up to 32 rows"):
        fastgpt.linear(**call | {"x": call["x"].repeat(40, 1), "residual": None}, impl="triton")


@pytest.mark.gpu
def test_the_public_norm_uses_the_kernel():
    call = call_of(norm_features, "everything", (3, 768), torch.bfloat16)
    assert fastgpt.explain(fastgpt.norm, **call)["triton"] == "chosen"
    assert torch.equal(fastgpt.norm(**call), norm(**call))


@pytest.mark.gpu
def test_calls_that_the_kernels_do_not_serve():
    call = call_of(linear_features, "everything", 4, 40, 65, torch.float32)
    apart = torch.zeros(65, 80, device=DEVICE)[:, :40]
    for change in ({"x": call["x"].clone().requires_grad_()}, {"dropout_p": 0.5}, {"weight": apart}):
        assert fastgpt.explain(fastgpt.linear, **call | change)["reference"] == "chosen"
    with torch.autocast("cuda", torch.bfloat16):
        assert fastgpt.linear(call["x"], call["weight"]).dtype == torch.bfloat16
    wide = in_float64(call)
    assert fastgpt.explain(fastgpt.linear, **wide)["reference"] == "chosen" and fastgpt.linear(**wide).dtype == torch.float64


@pytest.mark.gpu
def test_opcheck():
    call = call_of(linear_features, "everything", 3, 40, 65, torch.float32)
    order = ("x", "weight", "bias", "residual")
    arguments = (*(call[name] for name in order), 1, False, call["norm_weight"], call["norm_bias"])
    torch.library.opcheck(torch.ops.fastgpt.linear.default, arguments)
    torch.library.opcheck(torch.ops.fastgpt.norm.default, (call["x"], call["norm_weight"]))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    weight = torch.empty(2**20 + 3, 2048 + 8, dtype=torch.float16, device=DEVICE)
    weight.normal_()
    x = torch.randn(3, weight.shape[1], dtype=torch.float16, device=DEVICE)
    for rows in (1, 3):
        actual = linear(x[:rows], weight)
        check(actual[:, -9:], lambda: x[:rows].double() @ weight[-9:].double().t())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4])
def test_capture_in_a_cuda_graph(rows):
    """Of one launch."""
    call = call_at_size(PRODUCTS["GPT-2 124M up"], rows, torch.bfloat16)
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
    assert passed(__file__) >= 90
