"""Weights of 8 and 4 bits: what they stand for, `linear` with them, and what PyTorch does with them."""

import copy
import io
import operator
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cpu_levels import lower_levels
from torch._subclasses.fake_tensor import FakeTensorMode
from wide_ranges import wide_ranges

import fastgpt
from fastgpt import QuantizedWeight, linear, linear_reference, quantize
from fastgpt.generation.replay import CpuReplay
from fastgpt.ops.matrix_product import FASTEST, KERNEL
from fastgpt.ops.quantized_weight import Packing, quantize_to, reference_blocks
from fastgpt.testing import numerics
from fastgpt.testing.linear_features import FEATURES, call_of, in_float64, split

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = [(dtype, size, minima) for dtype in ("int8", "int4") for size in (32, 64, 128, None) for minima in (False, True)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}{'-minima' * kind[2]}")
ROWS = (1, 2, 3, 4, 5, 9, 17, 64, 65)
STEPS = {("int8", False): 254, ("int8", True): 255, ("int4", False): 15, ("int4", True): 15}


def quantized(weight, kind):
    dtype, size, minima = kind
    return quantize(weight, dtype, size, minima=minima)


@kinds
def test_numbers_are_within_half_a_step(kind):
    """Of 8 bits all, and of 4 bits those that the fit does not clip; scales are those of fp16."""
    dtype, size, minima = kind
    weight = torch.randn(24, 256)
    stored = quantized(weight, kind)
    groups, found = (x.reshape(24, -1, size or 256) for x in (weight, stored.dequantize()))
    extent = groups.amax(-1) - groups.amin(-1) if minima else 2 * groups.abs().amax(-1)
    step = extent.unsqueeze(-1) / STEPS[dtype, minima] * 1.01
    near = (found - groups).abs() <= step * (0.51 if dtype == "int8" else 0.5)
    assert near.float().mean() >= (1.0 if dtype == "int8" else 0.93)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_blocks_are_those_of_the_reference(kind, dtype):
    """But for the sign of a scale of zero, and a few groups in which the fit takes another way, as sums are in another order."""
    weight = (torch.randn(60, 1, generator=torch.Generator().manual_seed(1)).exp() * torch.randn(60, 512)).to(dtype)
    weight[3], weight[4, :64], weight[5, 7], weight[6] = 0, 1.5, 60_000, weight[6] * 1e-6
    stored = quantized(weight, kind)
    blocks = reference_blocks(weight.float(), stored.packing)
    expected = QuantizedWeight(blocks, stored.packing, 512).dequantize()
    size = stored.packing.group_size
    found, expected, weight = (x.view(60, -1, size) for x in (stored.dequantize(torch.float32), expected, weight.double()))
    differ = (found != expected).any(-1)
    assert differ.double().mean() < 0.002 + 1.5 / differ.numel()
    errors = [(x - weight).square().sum(-1)[differ] for x in (found, expected)]
    assert (errors[0] <= 1.02 * errors[1]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_what_is_finite_in_fp16_stays_so(kind, dtype):
    """Scales are not rounded up so far that the largest numbers of fp16 become infinite; blocks are those of the reference."""
    most, generator = 65504, torch.Generator().manual_seed(2)
    lowest, part = (torch.rand(300, n, generator=generator) for n in (1, 256))
    weight = most * (2 * lowest - 1 + (2 - 2 * lowest) * part)  # between a number and the largest one
    weight[::3] *= -1
    weight[:100:2, 7], weight[:100:3, 8] = most, -most
    weight[100:150] = most - 64 * part[100:150]
    weight[150], weight[151], weight[152, ::2], weight[153, 5] = most, -most, most, most
    weight = weight.clamp(-most, most).to(dtype)
    weight = torch.where(weight.float().abs() > most, weight.sign() * 65280, weight)  # in bf16 it was rounded up
    stored = quantized(weight, kind)
    blocks = reference_blocks(weight.float(), stored.packing)
    assert stored.dequantize(torch.float16).isfinite().all()
    assert (QuantizedWeight(blocks, stored.packing, 256).dequantize() == stored.dequantize(torch.float32)).all(
        1
    ).float().mean() > 0.99
    near = (stored.dequantize(torch.float32) - weight.float()).abs() <= 2 * most / STEPS[kind[0], kind[2]]
    assert near.float().mean() >= (1.0 if kind[0] == "int8" else 0.93)


@pytest.mark.parametrize("most", [torch.finfo(torch.bfloat16).max, torch.finfo(torch.float32).max])
@kinds
def test_what_no_scale_reaches_is_refused(kind, most):
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="weight: expected finite numbers of magnitude [0-9]+ at most, got 3.[0-9]+e.38"):
            quantized(
                torch.full((2, 256), most, dtype=torch.float32).clamp(max=torch.finfo(torch.bfloat16).max).to(dtype), kind
            )


def test_blocks_are_the_same_on_every_cpu_level_and_number_of_threads():
    code = (
        "import hashlib, sys, torch, fastgpt; torch.set_num_threads(int(sys.argv[1])); torch.manual_seed(0)\n"
        "weights = [fastgpt.quantize(torch.randn(300, 512), kind, size, minima=minima)\n"
        "           for kind in ('int8', 'int4') for size in (32, None) for minima in (False, True)]\n"
        "print(hashlib.sha256(b''.join(weight.blocks.numpy().tobytes() for weight in weights)).hexdigest())"
    )
    runs = [(level, 2) for level in [*lower_levels(), fastgpt.build_info()["cpu_level"]]] + [("baseline", 1)]
    digests = {
        subprocess.check_output([sys.executable, "-c", code, str(n)], env=os.environ | {"FASTGPT_CPU_LEVEL": level})
        for level, n in runs
        if level in fastgpt.build_info()["cpu_levels"]
    }
    assert len(digests) == 1


def test_into_columns_of_blocks():
    """As a matrix is quantized that is stored transposed, some rows at a time."""
    weight, whole = torch.randn(40, 256), torch.zeros(40, 8 * 18, dtype=torch.uint8)
    stored = quantize(weight, "int4")
    for first in (0, 4):
        quantize_to(
            whole[:, first * 18 :][:, : 4 * 18], weight[:, first * 32 :][:, :128], stored.packing._replace(group_size=32)
        )
    assert torch.equal(whole, stored.blocks)
    with pytest.raises(ValueError, match="blocks: expected 40 rows of 72 bytes, each contiguous"):
        quantize_to(whole[:, ::2], weight[:, :128], stored.packing)


@kinds
def test_fitted_scales_are_no_worse_than_those_of_the_range(kind):
    """The first of the parts tried is the whole range, as GGUF's quantizer takes it."""
    dtype, size, minima = kind
    weight = torch.randn(24, 256)
    groups = weight.view(24, -1, size or 256)
    highest, lowest = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    if minima:
        scale = (highest - lowest) / STEPS[dtype, minima]
        plain = ((groups - lowest) / scale).round() * scale + lowest
    else:
        scale = torch.where(highest > -lowest, highest, lowest) / (-8 if dtype == "int4" else 127)
        plain = (groups / scale).round().clamp(*((-8, 7) if dtype == "int4" else (-127, 127))) * scale
    error = (quantized(weight, kind).dequantize() - weight).square().mean()
    assert error <= (plain.view_as(weight) - weight).square().mean() * 1.01


@pytest.mark.parametrize(
    "kind, name", [(("int8", 32, False), "Q8_0"), (("int4", 32, False), "Q4_0"), (("int4", 32, True), "Q4_1")]
)
def test_groups_of_32_are_stored_as_in_gguf(kind, name):
    gguf = pytest.importorskip("gguf")
    stored = quantized(torch.randn(5, 96), kind)
    expected = gguf.quants.dequantize(stored.blocks.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(stored.dequantize(), torch.from_numpy(expected))


def test_four_bits_lie_where_they_are_said_to():
    packing = Packing(4, 32, True)
    numbers = torch.arange(16, dtype=torch.uint8)
    header = torch.tensor([2.0, -1.0]).half().view(torch.uint8)
    blocks = torch.cat([header, numbers | numbers.flip(0) << 4]).view(1, -1)
    expected = torch.cat([numbers, numbers.flip(0)]).float() * 2 - 1
    assert torch.equal(QuantizedWeight(blocks, packing, 32).dequantize(), expected.view(1, 32))


def test_empty_matrices_and_ids():
    empty, weight = quantize(torch.randn(0, 64)), quantize(torch.randn(9, 64))
    assert empty.shape == empty.dequantize().shape == (0, 64)
    assert F.embedding(torch.zeros(2, 0, dtype=torch.long), weight).shape == (2, 0, 64)
    for ids in (torch.tensor([-1]), torch.tensor([9]), torch.tensor([True])):
        with pytest.raises((IndexError, RuntimeError)):
            F.embedding(ids, weight)


@pytest.mark.parametrize(
    "packing, columns, message",
    [
        ((0, 16, True, 10), 256, "packing: expected a block_type of .*, as it is, or 0"),
        ((2, 16, True, 99), 256, "packing: expected a block_type"),
        ((4, 16, False), 64, "packing: expected 8 or 4 bits, and a group_size that is a multiple of 32"),
        ((8, 0, False), 64, "packing: expected 8 or 4 bits"),
        ((8, 32, False), 65, "columns: expected a positive multiple of 32, got 65"),
    ],
)
def test_packings_that_do_not_exist_are_refused(packing, columns, message):
    """The operation would read memory that the blocks do not have."""
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(torch.zeros(8, 84, dtype=torch.uint8), packing, columns)
    with pytest.raises(RuntimeError):
        torch.ops.fastgpt.linear_quantized(torch.randn(1, columns), torch.zeros(8, 84, dtype=torch.uint8), *(*packing, 0)[:4])


@pytest.mark.parametrize("value", [0.0, 1e-8, 1e-5, 0.02, 400.0])
@kinds
def test_constant_and_tiny_groups(kind, value):
    weight = torch.full((2, 256), value)
    found = quantized(weight, kind).dequantize()
    assert (found - weight).abs().max() <= max(6e-8 * 255, value * 0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_contract(kind, dtype):
    """The product with the dequantized weight, for few rows and many, alone and with all that surrounds it."""
    for feature in ("plain", "everything", "everything, gated"):
        call = call_of(feature, sum(ROWS), 640, 37, dtype)
        call["weight"] = quantized(call["weight"], kind)
        actual = torch.cat([linear(**part, impl="cpp") for part in split(call, ROWS)])
        assert actual.dtype == dtype
        double = in_float64(call | {"weight": call["weight"].dequantize(torch.float32)})
        numerics.check(actual, lambda double=double: linear_reference(**double), arithmetic=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_contract_of_the_kernel_with_many_rows(kind, dtype, monkeypatch):
    """Wherever PyTorch's product is faster, too; of blocks of columns that end within a group."""
    monkeypatch.setitem(FASTEST, dtype, KERNEL)
    call = call_of("everything, gated", 90, 672 if kind[1] in (32, None) else 640, 37, dtype)
    call["weight"] = quantized(call["weight"], kind)
    double = in_float64(call | {"weight": call["weight"].dequantize(torch.float32)})
    numerics.check(linear(**call, impl="cpp"), lambda: linear_reference(**double), arithmetic=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_contract_of_long_rows(kind, dtype):
    """A row may have only 16 numbers, whose rounding errors do not average out."""
    for seed in range(4):
        torch.manual_seed(seed)
        x, weight = torch.randn(17, 1024).to(dtype), quantized(torch.randn(37, 1024).mul_(0.03).to(dtype), kind)
        double = weight.dequantize(torch.float32).double()
        numerics.check(
            linear(x, weight, impl="cpp"), lambda x=x, double=double: linear_reference(x.double(), double), arithmetic=dtype
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_contract_of_outliers(kind, dtype):
    """Columns of x that are large where weights are zero, or next to it, or infinite."""
    for lowest in (-0.02, 0.0):
        matrix = torch.rand(37, 256) * 0.02 + lowest
        matrix[:, 7] = lowest if lowest == 0 else 0
        weight = quantized(matrix.to(dtype), kind)
        double = weight.dequantize(torch.float32).double()
        for rows in (1, 3, 4, 6):
            x = torch.randn(rows, 256, dtype=dtype)
            x[:, 7] = 1e4
            numerics.check(linear(x, weight, impl="cpp"), lambda x=x: linear_reference(x.double(), double), arithmetic=dtype)
            x[0, 3] = torch.inf
            numerics.check(linear(x, weight, impl="cpp"), lambda x=x: linear_reference(x.double(), double), arithmetic=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [32, 96, 256, 1024])
@kinds
def test_contract_of_wide_ranges(kind, columns, dtype):
    """However much of x is large where weights are zero, in neighbors or in every other column, the rest is as precise."""
    if columns % (kind[1] or 32):
        pytest.skip("columns are a multiple of the groups")
    torch.manual_seed(0)
    for x, zero in wide_ranges(3, columns):
        weight = quantized((torch.randn(37, columns) * 0.02).masked_fill(zero, 0).to(dtype), kind)
        x, double = x.to(dtype), weight.dequantize(torch.float32).double()
        numerics.check(
            linear(x, weight, impl="cpp"), lambda x=x, double=double: linear_reference(x.double(), double), arithmetic=dtype
        )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[1] == 32], ids=str)
def test_contract_at_the_ends_of_float32(kind):
    """Subnormal numbers, the largest ones, and both together."""
    weight = quantized(torch.randn(37, 256) * 0.02, kind)
    double = weight.dequantize().double()
    x = torch.randn(4, 256)
    largest = 122.0 if kind[0] == "int4" else 110.0  # times the integers
    for exponent in (torch.tensor(-130.0), torch.tensor(-115.0), torch.tensor(largest), torch.linspace(-140, 110, 256)):
        extreme = (x.double() * exponent.double().exp2()).float()
        numerics.check(linear(extreme, weight, impl="cpp"), lambda x=extreme: linear_reference(x.double(), double))


@pytest.mark.parametrize("minima", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size, columns", [(32, 32), (32, 160), (96, 192), (160, 160)])
def test_groups_that_end_within_64_columns(bits, minima, size, columns):
    packing = Packing(bits, size, minima)
    matrix = torch.randn(37, columns)
    weight = QuantizedWeight(reference_blocks(matrix, packing), packing, columns)
    double = weight.dequantize().double()
    for rows in (1, 3, 5):
        x = torch.randn(rows, columns)
        x[0, columns // 2] = 1e6
        numerics.check(linear(x, weight, impl="cpp"), lambda x=x: linear_reference(x.double(), double))


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(feature):
    call = call_of(feature, 7, 256, 70, torch.float32)
    call["weight"] = quantize(call["weight"], "int4")
    double = in_float64(call | {"weight": call["weight"].dequantize()})
    for rows in (1, 6):
        part, double_part = (x | {name: x[name][:rows] for name in ("x", "residual") if name in x} for x in (call, double))
        numerics.check(linear(**part), lambda double_part=double_part: linear_reference(**double_part))
        numerics.check(linear_reference(**part), lambda double_part=double_part: linear_reference(**double_part))


@pytest.mark.parametrize("level", lower_levels())
def test_lower_cpu_levels(level):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "contract and float32", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"FASTGPT_CPU_LEVEL": level}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@kinds
def test_a_number_depends_on_its_row_and_feature_only(kind, dtype):
    weight = torch.randn(39, 256).to(dtype)
    stored = quantized(weight, kind)
    stored.blocks[5, :2] = torch.tensor([0xFF, 0x7F], dtype=torch.uint8)  # a scale that is NaN
    for rows in (3, 8, 9, 20):
        x = torch.randn(rows, 256).to(dtype)
        clean = linear(x, quantized(weight, kind))
        x[2, 7] = torch.nan
        dirty = linear(x, stored)
        hit = torch.zeros_like(clean, dtype=torch.bool)
        hit[2], hit[:, 5] = True, True
        assert dirty[hit].isnan().all() and torch.equal(dirty[~hit], clean[~hit])


@pytest.mark.threads
@pytest.mark.parametrize("rows", [1, 3, 40, 90])
@kinds
def test_any_number_of_threads_gives_the_same_bits(kind, rows, monkeypatch):
    monkeypatch.setitem(FASTEST, torch.float32, KERNEL)
    weight, x, threads = (
        quantized(torch.randn(1000, 768 if kind[1] else 256), kind),
        torch.randn(rows, 768),
        torch.get_num_threads(),
    )
    x = x[:, : weight.shape[1]]
    whole = linear(x, weight)
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def test_a_plan_runs_it_again():
    weight = quantize(torch.randn(70, 256), "int4")
    function = CpuReplay(lambda x: linear(x, weight, activation="silu"))
    for _ in range(3):
        x = torch.randn(2, 256)
        assert torch.equal(function(x), linear(x, weight, activation="silu"))
    assert function.refused is None and len(function.plan) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_x_and_what_surrounds(dtype):
    """They are those of the dequantized weight, which is not kept for them."""
    call = call_of("everything, gated", 5, 64, 20, dtype)
    weight = quantize(call.pop("weight"), "int8")
    names = ["x", "bias", "norm_weight", "residual"]
    leaves = {name: call[name].detach().requires_grad_() for name in names}
    out = linear(**(call | leaves), weight=weight)
    dout = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    double = in_float64(call | {"weight": weight.dequantize(torch.float32)})
    twins = {name: double[name].requires_grad_() for name in names}

    def oracle(name):
        return torch.autograd.grad(linear_reference(**(double | twins)), twins[name], dout.double())[0]

    for name, grad in zip(names, grads):
        numerics.check(grad, lambda name=name: oracle(name), arithmetic=dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear(leaves["x"], weight)
    assert all(x.dtype == torch.uint8 or x.numel() < weight.numel() for x in kept)


def test_transforms_are_those_of_the_dequantized_weight():
    x, tangent, weight = torch.randn(3, 2, 64), torch.randn(3, 2, 64), quantize(torch.randn(20, 64))
    full = weight.dequantize()
    one, other = (lambda x, weight=weight: linear(x, weight, activation="silu") for weight in (weight, full))
    for transform in (
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.jacrev(f)(x[0, 0]),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x),
    ):
        assert torch.equal(transform(one), transform(other))


def test_modules_take_it():
    """nn.Linear and nn.Embedding with a quantized weight, through state_dict, dtypes, copies and files."""
    weight = quantize(torch.randn(40, 64), "int4", 64)
    layer = torch.nn.Linear(64, 40)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), linear(x, weight, layer.bias))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    other = torch.nn.Linear(64, 40)
    other.weight = torch.nn.Parameter(quantize(torch.zeros(40, 64), "int4", 64), requires_grad=False)
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(x), layer(x))
    other.weight = torch.nn.Parameter(quantize(torch.zeros(40, 64), "int4", 64), requires_grad=False)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="expected a QuantizedWeight like .*int4.*, got a tensor of torch.float32"):
        other.load_state_dict(torch.nn.Linear(64, 40).state_dict())
    assert copy.deepcopy(layer).share_memory().weight.blocks.is_shared()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert isinstance(half.weight, QuantizedWeight) and torch.equal(half.weight.blocks, weight.blocks)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    embedding = torch.nn.Embedding(40, 64)
    embedding.weight = torch.nn.Parameter(weight, requires_grad=False)
    ids = torch.tensor([[3, 39], [0, 3]])
    assert torch.equal(embedding(ids), weight.dequantize()[ids])


def test_files_hold_what_is_stored():
    weight, file = quantize(torch.randn(400, 256), "int4", None), io.BytesIO()
    torch.save({"weight": weight}, file)
    assert file.tell() < weight.nbytes + 4000
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["weight"]
    assert (
        isinstance(loaded, QuantizedWeight) and loaded.packing == weight.packing and torch.equal(loaded.blocks, weight.blocks)
    )


def test_other_operations_compute_with_the_dequantized_weight():
    weight = quantize(torch.randn(40, 64), "int8")
    full = weight.dequantize()
    assert (
        torch.equal(weight @ torch.eye(64), full) and torch.equal(weight.t(), full.t()) and torch.equal(weight[3:5], full[3:5])
    )
    assert isinstance(weight.double(), QuantizedWeight) and torch.equal(weight.double().dequantize(), full.double())
    assert weight.nbytes == 40 * 68 and "int8" in repr(weight) and weight.device == full.device
    view = weight[3:5]
    assert (
        torch.equal(view.t() @ torch.eye(2), full[3:5].t()) and view.tolist() == full[3:5].tolist() and "tensor" in repr(view)
    )
    assert torch.equal(copy.deepcopy(view).zero_(), torch.zeros(2, 64))
    assert torch.equal(torch.from_numpy(view.numpy().copy()), full[3:5]) and not view.numpy().flags.writeable


WRITES = {
    "all": lambda w: w.mul_(2),
    "not w = w + 1": lambda w: operator.iadd(w, 1),
    "an index": lambda w: w.__setitem__(0, 1),
    "a slice": lambda w: w[3:5].zero_(),
    "a view of a view": lambda w: w.view(-1)[0].zero_(),
    "data": lambda w: w.data.mul_(2),
    "a view of data": lambda w: w.data[0].mul_(2),
    "the transpose": lambda w: w.t().add_(1),
    "one of several views": lambda w: w.unbind(0)[3].fill_(1),
    "flattened": lambda w: w.flatten().copy_(torch.zeros(40 * 64)),
    "out": lambda w: torch.add(torch.ones(40, 64), 1, out=w),
    "a list": lambda w: torch._foreach_mul_([w], 2),
    "initialization": torch.nn.init.normal_,
}


@pytest.mark.parametrize("way", WRITES)
def test_it_cannot_be_written(way):
    """And neither can a view of it, which would lose what is written."""
    weight = quantize(torch.randn(40, 64), "int8")
    before = weight.blocks.clone()
    kind = (
        "a view of a QuantizedWeight"
        if "view" in way or way in ("an index", "a slice", "the transpose", "flattened")
        else "a Q"
    )
    with pytest.raises(RuntimeError, match=f"expected a tensor that can be written, got {kind}"):
        WRITES[way](weight)
    assert torch.equal(weight.blocks, before)


@pytest.mark.parametrize("dtype, least", [("int8", 4e-6), ("int4", 2e-7)])
def test_numbers_below_the_least_scale_become_zero(dtype, least):
    signs = torch.randn(1, 32).sign()
    assert not quantize(0.9 * least * signs, dtype).dequantize().any() and quantize(2 * least * signs, dtype).dequantize().all()


def test_meta():
    """Shapes alone, as PyTorch computes them."""
    weight = quantize(torch.randn(40, 64, device="meta"), "int4")
    assert weight.is_meta and weight.shape == (40, 64)
    assert F.linear(torch.randn(3, 64, device="meta"), weight).shape == (3, 40)


@kinds
def test_of_fake_tensor_mode(kind):
    """With a device, but without data; huge pages are not asked for where there is no memory."""
    with FakeTensorMode():
        weight = quantized(torch.randn(4096, 2048), kind)
        assert weight.shape == weight.dequantize().shape == (4096, 2048) and weight.device == torch.device("cpu")
        for rows in (3, 300):
            assert (
                linear(torch.randn(rows, 2048), weight).shape == F.linear(torch.randn(rows, 2048), weight).shape == (rows, 4096)
            )
        with pytest.raises(ValueError, match="weight: expected a multiple of 32 columns, got 33"):
            quantize(torch.randn(4, 33))


def test_data():
    weight, other = quantize(torch.randn(40, 64), "int8"), quantize(torch.randn(8, 32), "int4")
    with pytest.raises(RuntimeError, match="data: expected a QuantizedWeight, got a tensor of torch.float32"):
        weight.data = torch.zeros(40, 64)
    weight.data = other
    assert weight.shape == (8, 32) and torch.equal(weight.dequantize(), other.dequantize()) and "int4" in repr(weight)
    assert torch.equal(torch.nn.functional.linear(torch.eye(32), weight), other.dequantize().t())


def test_compiled_modules():
    layer = torch.nn.Linear(64, 40).requires_grad_(False)
    layer.weight = torch.nn.Parameter(quantize(torch.randn(40, 64), "int4"), requires_grad=False)
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_registered_operation():
    x, weight = torch.randn(3, 64), quantize(torch.randn(40, 64), "int4")
    arguments = (x, weight.blocks, *weight.packing, torch.randn(40))
    torch.library.opcheck(torch.ops.fastgpt.linear_quantized.default, arguments)
    arguments = (torch.empty(40, 64), weight.blocks, *weight.packing)
    torch.library.opcheck(torch.ops.fastgpt.linear_dequantize_.default, arguments)
    torch.ops.fastgpt.linear_dequantize_(*arguments)
    assert torch.equal(arguments[0], weight.dequantize())  # without minima there is no sum that could round


def test_large_matrices_are_multiplied_in_panels(monkeypatch):
    monkeypatch.setattr(sys.modules["fastgpt.ops.linear"], "PANEL_BYTES", 64 * 96 * 4)
    call = call_of("everything, gated", 70, 96, 100, torch.float32)
    call["weight"] = quantize(call["weight"], "int4", minima=True)
    double = in_float64(call | {"weight": call["weight"].dequantize()})
    numerics.check(linear(**call), lambda: linear_reference(**double))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (lambda: ([1.0],), TypeError, "weight: expected a torch.Tensor, got list"),
        (lambda: (torch.randn(4, 32, dtype=torch.float64),), TypeError, "weight: expected"),
        (lambda: (torch.randn(32),), ValueError, "weight: expected 2 dimensions"),
        (lambda: (torch.randn(4, 33),), ValueError, r"weight: expected a multiple of 32 columns, got 33"),
        (lambda: (torch.randn(4, 96), "int4", 64), ValueError, "weight: expected a multiple of 64 columns"),
        (lambda: (torch.randn(4, 0), "int4", None), ValueError, "weight: expected a multiple of 32 columns"),
        (lambda: (torch.randn(4, 32), "int2"), ValueError, "dtype: expected one of 'int8', 'int4', got 'int2'"),
        (lambda: (torch.randn(4, 32), "int8", 16), ValueError, "group_size: expected one of 32, 64, 128, None, got 16"),
        (lambda: (torch.randn(4, 32), "int8", True), TypeError, "group_size: expected an integer or None, got True"),
        (lambda: (torch.randn(4, 32), "int8", 64.0), TypeError, "group_size: expected an integer or None, got 64.0"),
        (lambda: (torch.full((4, 32), torch.inf),), ValueError, "weight: expected finite numbers"),
        (lambda: (torch.full((4, 32), torch.nan),), ValueError, "weight: expected finite numbers"),
        (lambda: (torch.full((4, 32), 1e30),), ValueError, "weight: expected finite numbers"),
    ],
)
def test_bad_weights(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(*arguments())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.randn(3, 32)}, ValueError, "weight: expected shape"),
        ({"x": torch.randn(3, 64).bfloat16()}, TypeError, "weight: expected"),
        ({"x": torch.randn(3, 64).double()}, TypeError, "weight: expected"),
        ({"gated": True}, ValueError, "weight: expected an even number of rows"),
        ({"bias": torch.randn(40)}, ValueError, "bias: expected shape"),
        ({"impl": "triton"}, ValueError, "impl='triton' cannot serve this call"),
    ],
)
def test_bad_calls(change, error, message):
    call = {"x": torch.randn(3, 64), "weight": quantize(torch.randn(41, 64))}
    for function in (linear, linear_reference):
        if function is linear or "impl" not in change:
            with pytest.raises(error, match=message):
                function(**(call | change))


@pytest.mark.parametrize(
    "change",
    [{"bits": 5}, {"group_size": 0}, {"group_size": 48}, {"group_size": 128}, {"minima": True}, {"bits": 8}],
    ids=str,
)
def test_the_operation_reads_no_more_than_there_is(change):
    weight = quantize(torch.randn(40, 64), "int4", 64)
    with pytest.raises((ValueError, RuntimeError), match="expected"):
        torch.ops.fastgpt.linear_quantized(torch.randn(3, 64), weight.blocks, *{**weight.packing._asdict(), **change}.values())


def test_explain_says_what_serves_it():
    x, weight = torch.randn(3, 64), quantize(torch.randn(40, 64))
    reasons = fastgpt.explain(linear, x, weight)
    assert reasons["cpp"] == "chosen" and reasons["reference"] == "available"
    assert fastgpt.explain(linear, x.requires_grad_(), weight)["reference"] == "chosen"


def test_functional_linear():
    x, weight = torch.randn(3, 64), quantize(torch.randn(40, 64))
    assert torch.equal(F.linear(x, weight), linear(x, weight))
    assert torch.equal(F.linear(input=x, weight=weight, bias=None), linear(x, weight))


@pytest.mark.parametrize("minima", [False, True])
def test_scales_of_four_bits_fit_their_integers_best(minima):
    """No other scale and minimum of a group would bring its integers much closer to the numbers."""
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    stored = quantize(weight, "int4", minima=minima)
    packing = stored.packing
    headers = packing.halves(stored.blocks).double()
    groups, found = (x.double().view(-1, 32, 1) for x in (weight, stored.dequantize()))
    scale = headers[..., :1].reshape(-1, 1, 1)
    q = (found - (headers[..., 1:].reshape(-1, 1, 1) if minima else 0)) / scale
    basis = torch.cat([q, torch.ones_like(q)], -1) if minima else q
    best = basis @ torch.linalg.lstsq(basis, groups).solution
    assert (found - groups).square().sum() <= 1.01 * (best - groups).square().sum()
