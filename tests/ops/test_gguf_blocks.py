"""GGML's types of blocks: what they stand for, and `linear` with them as they are stored."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cpu_levels import lower_levels
from wide_ranges import wide_ranges

from fastgpt import QuantizedWeight, linear, linear_reference
from fastgpt.ops.gguf_blocks import BLOCK_TYPES
from fastgpt.ops.quantized_weight import Packing
from fastgpt.testing import numerics
from fastgpt.testing.linear_features import call_of, in_float64, split

KINDS = list(BLOCK_TYPES.values())
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
ROWS = (1, 2, 3, 4, 5, 17, 65)


def random_weight(kind, rows, columns, dtype=torch.float32):
    """Random blocks with numbers of about a normal matrix's size."""
    packing = Packing(kind.bytes * 8 // kind.columns, kind.group_size, kind.minima, kind.number)
    blocks = torch.randint(256, (rows, packing.row_bytes(columns)), dtype=torch.uint8)
    halves = packing.halves(blocks)
    apart = blocks.view(rows, -1, kind.bytes)
    if halves.numel():
        apart[..., kind.halves] = (torch.rand(halves.shape) * 0.01 + 0.001).half().view(torch.uint8)
    else:  # the exponents of MXFP4
        apart[..., 0] = torch.randint(118, 124, apart.shape[:2])
    return QuantizedWeight(blocks, packing, columns, dtype)


@kinds
def test_numbers_are_those_of_the_gguf_package(kind):
    """For all bits, those of scales that are not finite included."""
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind.name]
    assert (kind.number, kind.columns, kind.bytes) == (number, *gguf.constants.GGML_QUANT_SIZES[number])
    blocks = torch.randint(256, (50, 3 * kind.bytes), dtype=torch.uint8)
    blocks[:, 0] = torch.arange(50)
    packing = Packing(4, kind.group_size, kind.minima, kind.number)
    found = QuantizedWeight(blocks, packing, 3 * kind.columns).dequantize()
    expected = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), number))
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)) and kind.name in repr(
        QuantizedWeight(blocks, packing, 3 * kind.columns)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@kinds
def test_contract(kind, dtype):
    """The product with the dequantized weight, for few rows and many, with all that surrounds it."""
    for feature, rows in (("everything", 37), ("everything, gated", 22)):
        call = call_of(feature, sum(ROWS), 3 * 256, rows, dtype)
        call["weight"] = random_weight(kind, len(call["weight"]), 3 * 256, dtype)
        actual = torch.cat([linear(**part, impl="cpp") for part in split(call, ROWS)])
        double = in_float64(call | {"weight": call["weight"].dequantize(torch.float32)})
        numerics.check(actual, lambda double=double: linear_reference(**double), arithmetic=dtype)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@kinds
def test_contract_of_outliers(kind, dtype):
    """Columns of x that are large where weights happen to be small, or infinite."""
    weight = random_weight(kind, 300, 512, dtype)
    double = weight.dequantize(torch.float64)
    for rows in (1, 3, 6):
        x = torch.randn(rows, 512, dtype=dtype)
        x[:, 7] = 1e4
        numerics.check(linear(x, weight, impl="cpp"), lambda x=x: linear_reference(x.double(), double))
        x[0, 3] = torch.inf
        numerics.check(linear(x, weight, impl="cpp"), lambda x=x: linear_reference(x.double(), double))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@kinds
def test_contract_of_wide_ranges(kind, dtype):
    """Columns of x of very different sizes; blocks of zeros meet the large ones."""
    torch.manual_seed(0)
    ids = torch.arange(512)
    weight = random_weight(kind, 37, 512, dtype)
    double = weight.dequantize(torch.float32).double()
    x = torch.randn(3, 512)
    for exponents in (
        torch.rand(3, 512) * 24 - 14,
        ids % 2 * 10.0,
        ids % 32 // 16 * 10.0,
        (ids % 4 == 0) * 12.0,
        ids // 256 * 20.0,
    ):
        wide = (x * exponents.exp2()).to(dtype)
        numerics.check(linear(wide, weight, impl="cpp"), lambda x=wide: linear_reference(x.double(), double), arithmetic=dtype)


@kinds
def test_contract_of_tiny_numbers_where_subnormal_ones_are_zero(kind):
    """What x is multiplied with may be subnormal only where x is, too."""
    weight = random_weight(kind, 37, 512)
    double = weight.dequantize(torch.float64)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush subnormal numbers to zero")
    try:
        for exponent in (-98, -90, -82, -78):
            x = torch.randn(2, 512) * 2.0**exponent
            numerics.check(linear(x, weight, impl="cpp"), lambda x=x: linear_reference(x.double(), double))
    finally:
        torch.set_flush_denormal(False)


def packed(kind, q, zero):
    """Q4_K or Q6_K blocks of integers q (rows, columns), from 0 on, and which of q stands for zero."""
    rows = len(q)
    q = q.view(rows, -1, 2, 128)
    if kind.name == "Q6_K":
        quarters = q.unflatten(-1, (4, 32))
        low = torch.cat([quarters[..., :2, :] & 15 | (quarters[..., 2:, :] & 15) << 4], -2).flatten(-2)
        high = sum(quarters[..., i, :] >> 4 << 2 * i for i in range(4))
        scales = torch.full((*q.shape[:2], 16), 3)
        parts = low.flatten(2), high.flatten(2), scales, half(0.01).expand(*q.shape[:2], 2)
    else:  # with minima of 1/zero of each scale
        halves = q.unflatten(-1, (2, 2, 32))
        numbers = (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(2)
        scales = torch.tensor([2] * 4 + [2 * zero] * 4 + [2 | 2 * zero << 4] * 4).expand(*q.shape[:2], 12)
        parts = half(0.01).expand(*q.shape[:2], 2), half(0.01).expand(*q.shape[:2], 2), scales, numbers
    blocks = torch.cat(parts, -1).to(torch.uint8).flatten(1)
    packing = Packing(kind.bytes * 8 // kind.columns, kind.group_size, kind.minima, kind.number)
    return QuantizedWeight(blocks, packing, q.shape[1] * 256)


def half(x):
    return torch.tensor([x]).half().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, integers, zero", [("Q4_K", 16, 7), ("Q6_K", 64, 32)])
def test_contract_where_large_numbers_meet_zeros(kind, integers, zero, dtype):
    """However much of x is large where weights are exactly zero, as products with scales and minima cancel, or none are there."""
    kind = next(other for other in KINDS if other.name == kind)
    for x, where in wide_ranges(3, 512):
        weight = packed(kind, torch.randint(integers, (37, 512)).masked_fill(where, zero), zero)
        double = weight.dequantize().double()
        assert not double[:, where].any() and double.std() > 0.01
        x = x.to(dtype)
        numerics.check(
            linear(x, weight.to(dtype), impl="cpp"), lambda x=x, double=double: linear_reference(x.double(), double),
            arithmetic=dtype,
        )  # fmt: skip


@pytest.mark.parametrize("level", lower_levels())
def test_lower_cpu_levels(level):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "contract and float32", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"FASTGPT_CPU_LEVEL": level}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@kinds
def test_the_last_row_is_read_to_its_end_and_no_further(kind):
    """Blocks end where memory does: what lies beyond is a scale that is NaN."""
    weight = random_weight(kind, 3, kind.columns)
    beyond = torch.full((4, weight.blocks.shape[1]), 0xFF, dtype=torch.uint8)
    beyond[:3] = weight.blocks
    for rows in (1, 6):
        x = torch.randn(rows, kind.columns)
        out = linear(x, QuantizedWeight(beyond[:3], weight.packing, kind.columns))
        assert torch.equal(out, linear(x, weight)) and out.isfinite().all()


@pytest.mark.threads
@kinds
def test_any_number_of_threads_gives_the_same_bits(kind):
    weight, threads = random_weight(kind, 300, 512), torch.get_num_threads()
    x = torch.randn(5, 512)
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([linear(x[:1], weight), linear(x, weight)])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))


def test_rows_of_part_of_a_block_are_refused():
    weight = random_weight(BLOCK_TYPES[12], 4, 512)
    with pytest.raises(ValueError, match="blocks: expected contiguous torch.uint8 of shape"):
        QuantizedWeight(weight.blocks, weight.packing, 768)
    with pytest.raises(RuntimeError, match="x: expected a positive multiple of 256 columns, got 288"):
        torch.ops.fastgpt.linear_quantized(torch.randn(1, 288), weight.blocks, *weight.packing)
    with pytest.raises(RuntimeError, match="block_type: unknown number 99"):
        torch.ops.fastgpt.linear_quantized(torch.randn(1, 512), weight.blocks, 4, 32, True, 99)


def test_embedding_and_gradients():
    weight = random_weight(BLOCK_TYPES[14], 20, 256)
    ids = torch.tensor([[3, 19], [0, 3]])
    assert torch.equal(F.embedding(ids, weight), weight.dequantize()[ids])
    x = torch.randn(2, 256, requires_grad=True)
    linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(2, 256))
