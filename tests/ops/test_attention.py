"""Parity of the C++ attention kernels with the reference, forward and backward."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_calls import DTYPES, check_all, random_qkv
from cpu_levels import lower_levels

from fastgpt import attention, attention_reference
from fastgpt.ops import attention as ops
from fastgpt.ops.dropout import keep_mask
from fastgpt.ops.quantization import quantize
from fastgpt.testing import numerics
from fastgpt.testing.attention_features import FEATURES, inputs, options, paged
from fastgpt.testing.attention_parity import run_cpp

pytestmark = pytest.mark.threads


# B, H, H_kv, T, S, D, or (D, D_v) for values of another head dim.
SHAPES = [
    (1, 2, 2, 1, 1, 64),
    (2, 4, 2, 1, 77, 64),  # decode
    (1, 12, 12, 1, 1000, 64),
    (2, 6, 2, 5, 200, 40),  # a few queries of three heads share keys
    (3, 8, 2, 2, 129, 7),
    (1, 3, 3, 130, 130, 64),  # off-block
    (1, 1, 1, 200, 333, 128),  # S > T
    (1, 2, 2, 70, 30, 16),  # S < T: the first rows see no key
    (1, 2, 1, 64, 64, 80),
    (1, 2, 2, 66, 300, 256),
    (1, 6, 2, 3, 128, 96),
    (1, 1, 1, 5, 9, 1),
    (1, 2, 1, 70, 90, (192, 128)),
    (1, 2, 1, 2, 90, (192, 128)),
    (1, 2, 1, 66, 70, (576, 512)),
    (1, 4, 1, 2, 130, (576, 512)),
    (1, 2, 2, 66, 70, (16, 576)),
    (3, 8, 2, 2, 129, (7, 5)),
    (2, 4, 2, 40, 77, (72, 40)),
    (1, 2, 2, 3, 65, (3, 257)),
    (1, 2, 1, 65, 40, (257, 3)),
    (1, 2, 1, 9, 20, (40, 64)),
    (2, 2, 2, 3, 0, (16, 24)),
    (2, 2, 2, 0, 5, (16, 24)),
    (2, 2, 2, 3, 0, 16),  # no keys at all
    (2, 2, 2, 0, 5, 16),  # no queries
    (0, 2, 2, 3, 5, 16),
]


def check_parity(q, k, v, **options):
    out, lse = attention(q, k, v, impl="cpp", return_lse=True, **options)
    exact = (q, k, v) if "k_scale" not in options else (q,)  # 8-bit keys are what they are
    double = *(x.double() for x in exact), *(k, v)[len(exact) - 1 :]
    numerics.check((out, lse), lambda: attention_reference(*double, return_lse=True, **options), weights=q.dtype)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.shape == (*q.shape[:3], v.shape[3])


@pytest.mark.one_of(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, causal, dtype):
    check_parity(*random_qkv(*shape, dtype), causal=causal)


@pytest.mark.one_of(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_of_gradients(shape, dtype):
    q, k, v = random_qkv(*shape, dtype)
    check_all(ops.Call(q, k, v, scale=q.shape[-1] ** -0.5))


# B, H, H_kv, T, S, D or (D, D_v)
FEATURE_SHAPES = [
    (2, 4, 2, 37, 70, 40),
    (2, 3, 1, 3, 33, 64),  # a few queries of heads that share keys
    (1, 2, 2, 40, 21, 16),  # S < T
    (1, 4, 2, 130, 130, 64),  # off-block
    (2, 2, 2, 1, 77, 64),
    (1, 2, 1, 66, 300, 80),
    (1, 2, 2, 65, 66, 7),
    (2, 4, 2, 37, 70, (40, 24)),
    (2, 3, 1, 2, 33, (24, 80)),
]


@pytest.mark.one_of(6)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", FEATURE_SHAPES, ids=str)
def test_parity_of_features(shape, feature, dtype):
    B, H, _, T, S, _ = shape
    call = ops.Call(*inputs(*shape, dtype), **options(feature, B, H, T, S, dtype))
    check_all(call._replace(scale=call.q.shape[-1] ** -0.5 if call.scale is None else call.scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, (80, 40)])
def test_parity_of_features_together_without_a_bias(D, dtype):
    together = {"softcap": 3.0, "window": 99, "sinks": torch.ones(4, dtype=dtype), "dropout_p": 0.2}
    call = ops.Call(*inputs(2, 4, 2, 130, 150, D, dtype), scale=0.11, dropout_seed=torch.tensor([5]), **together)
    check_all(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_where_the_mean_of_a_row_matters(dtype):
    """dq is a difference of values and their mean: few keys that are seen, dropout, values with a common offset."""
    check_all(ops.Call(*inputs(2, 4, 2, 64, 17, 64, dtype), scale=0.125))
    call = ops.Call(*inputs(2, 4, 2, 130, 130, 64, dtype), scale=0.125, dropout_p=0.2, dropout_seed=torch.tensor([5]))
    check_all(call)
    check_all(call._replace(v=call.v + 30.0, dropout_p=0.0, dropout_seed=None))
    certain = 100 * torch.eye(16, dtype=dtype).expand(1, 1, 16, 16).contiguous()  # a query sees one key, so that dq is 0
    check_all(call._replace(q=certain, k=certain, v=torch.randn(1, 1, 16, 16).to(dtype), scale=1.0, causal=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks_beside_which_all_weights_underflow(dtype):
    """A row is not fully masked then: the sink has a gradient of lse."""
    sinks = torch.tensor([200.0, 0.0, 90.0, 300.0]).to(dtype)
    for T in (3, 70):
        check_all(ops.Call(*inputs(2, 4, 2, T, 90, 24, dtype), scale=0.2, sinks=sinks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_what_scratch_memory_held_does_not_matter(feature, dtype):
    """Where a vector or a tile has fewer queries, keys or columns, another call may have left NaN."""
    for T, kind in ((70, dtype), (40, dtype), (70, torch.float32)):
        nan = (torch.full_like(x, torch.nan) for x in inputs(2, 2, 1, T, 200, 64, kind))
        call = ops.Call(*nan, scale=1.0, dropout_p=0.1, dropout_seed=torch.tensor([5]), softcap=2.0)
        run_cpp(call, (torch.full_like(call.q, torch.nan), torch.full(call.q.shape[:3], torch.nan)))
    shape = 2, 4, 2, 5, 37, 24
    call = ops.Call(*inputs(*shape, dtype), **options(feature, 2, 4, 5, 37, dtype))
    check_all(call._replace(scale=0.2))


@pytest.mark.parametrize(
    "shape", [(9,), (1, 9), (5, 1), (3, 1, 9), (2, 1, 1, 1), (1, 3, 1, 9), (2, 1, 5, 9), (1, 1, 1, 1), ()], ids=str
)
def test_parity_with_a_bias_that_broadcasts(shape):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    check_all(ops.Call(*inputs(2, 3, 3, 5, 9, 8, torch.float32), scale=0.35, bias=bias))


def test_parity_with_a_bias_in_float32():
    bias = torch.randn(2, 1, 5, 9, generator=torch.Generator().manual_seed(5))
    check_all(ops.Call(*inputs(2, 4, 2, 5, 9, 8, torch.float16), scale=0.35, bias=bias))


@pytest.mark.parametrize("T", [2, 70])
def test_masks_biases_and_gradients_may_have_any_strides(T):
    q, k, v = inputs(2, 4, 2, T, 90, 16, torch.float32)
    mask, bias = (torch.rand(90, 4, T, 2) < 0.5).permute(3, 1, 2, 0), torch.randn(90, 4, T, 2).permute(3, 1, 2, 0)
    dout, dlse = torch.randn(T, 2, 4, 16).permute(1, 2, 0, 3), torch.randn(1, 4, 1).expand(2, 4, T)
    strided = run_cpp(ops.Call(q, k, v, scale=0.25, mask=mask, bias=bias), (dout, dlse))
    mask, bias, dout, dlse = (x.contiguous() for x in (mask, bias, dout, dlse))
    dense = run_cpp(ops.Call(q, k, v, scale=0.25, mask=mask, bias=bias), (dout, dlse))
    assert all(torch.equal(strided[name], dense[name]) for name in dense)


def test_keys_past_the_lengths_are_never_read_backward_and_get_zeros():
    q, k, v = random_qkv(3, 4, 2, 70, 150, 64)
    lengths = torch.tensor([0, 83, 150], dtype=torch.int32)
    for b, length in enumerate(lengths):
        k[b, :, length:] = v[b, :, length:] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dq, dk, dv = torch.autograd.grad(attention(*leaves, kv_lengths=lengths, impl="cpp").sum(), leaves)
    assert dq.isfinite().all() and dq[0].eq(0).all()
    for b, length in enumerate(lengths):
        assert dk[b, :, length:].eq(0).all() and dv[b, :, length:].eq(0).all()
        assert length == 0 or (dk[b, :, :length].ne(0).any() and dv[b, :, :length].ne(0).all())


def test_tanh_is_within_two_units_in_the_last_place():
    """The log-sum-exp of one key is its score: with softcap=1, tanh(q)."""
    q = torch.cat([torch.logspace(-30, 1.5, 20001), torch.linspace(0.4, 9, 20001)])
    q = torch.cat([q, -q, torch.tensor([0.0, torch.inf])]).view(1, 1, -1, 1)
    one = torch.ones(1, 1, 1, 1)
    _, lse = attention(q, one, one, causal=False, scale=1.0, softcap=1.0, return_lse=True, impl="cpp")
    expected = q[..., 0].double().tanh()
    unit = torch.nextafter(expected.abs().float(), torch.tensor(torch.inf)).double() - expected.abs().float().double()
    assert ((lse.double() - expected).abs() <= 2 * unit).all()


@pytest.mark.one_of(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("number", ["inf", "-inf", "NaN", "largest"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("T", [1, 70])
def test_parity_with_a_number_that_is_not_finite(T, where, number, softcap, dtype):
    """Or that is the largest: the same results are NaN or infinite, and the others right."""
    q, k, v = random_qkv(1, 4, 2, T, 150, 40, dtype)
    q[..., 3] = q[..., 3].abs()  # with -inf a key gets scores of -inf, and no weight
    nan = torch.full((), -1, dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)  # all bits set
    numbers = {"inf": torch.inf, "-inf": -torch.inf, "NaN": nan, "largest": torch.finfo(dtype).max}
    {"q": q, "k": k, "v": v}[where][0, 0, min(T - 1, 50), 3] = numbers[number]
    out = attention(q, k, v, softcap=softcap, impl="cpp")
    double = [x.double() for x in (q, k, v)]
    numerics.check(out, lambda: attention_reference(*double, softcap=softcap), weights=dtype)


@pytest.mark.parametrize("T", [1, 70])
def test_dropout_drops_exactly_the_weights_that_the_reference_drops(T):
    S = 130
    q, k, _ = inputs(2, 4, 2, T, S, 130, torch.float32)
    seed = torch.tensor([(123 << 40) + 45])
    v = torch.eye(S).expand(2, 2, S, S)  # out is then the weights
    out = attention(q, k, v, causal=False, dropout_p=0.4, dropout_seed=seed, impl="cpp")
    assert torch.equal(out != 0, keep_mask(seed, 0.4, 2, 4, T, S, "cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("T", [1, 3, 70])
def test_parity_with_lengths_never_reads_past_them(T, causal, dtype):
    q, k, v = random_qkv(4, 4, 2, T, 150, 64, dtype)
    lengths = torch.tensor([0, 1, 83, 150], dtype=torch.int32)
    for b, length in enumerate(lengths):
        k[b, :, length:] = float("nan")
        v[b, :, length:] = float("nan")
    check_parity(q, k, v, causal=causal, kv_lengths=lengths)


@pytest.mark.one_of(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("window", (1, 2, 60, 64, 200))
@pytest.mark.parametrize("T", (1, 3, 150))
def test_parity_with_a_window(T, window, causal, dtype):
    q, k, v = random_qkv(3, 4, 2, T, 150, 40, dtype)
    check_parity(q, k, v, causal=causal, window=window)
    check_parity(q, k, v, causal=causal, window=window, kv_lengths=torch.tensor([0, 83, 150], dtype=torch.int32))


@pytest.mark.one_of(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [1, 16, 64, 100])
@pytest.mark.parametrize(
    "T, window, D",
    [(1, None, 64), (1, 20, 40), (3, None, 64), (70, None, 40), (70, 33, 64), (1, None, (72, 40)), (70, 33, (40, 64))],
)
def test_parity_paged(T, window, D, page, dtype):
    """And with the bits that the contiguous cache gives."""
    q, k, v = random_qkv(3, 4, 2, T, 150, D, dtype)
    lengths = torch.tensor([0, 83, 150], dtype=torch.int32)
    (k_pool, table), (v_pool, _) = paged(k, page), paged(v, page)
    table[1, -(-83 // page) :] = -7  # nothing is read there
    table[0] = 1 << 30
    options = {"kv_lengths": lengths, "window": window}
    check_parity(q, k_pool, v_pool, block_table=table, **options)
    assert torch.equal(attention(q, k_pool, v_pool, block_table=table, **options), attention(q, k, v, **options))


@pytest.mark.one_of(3)
@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [40, 64, (64, 40)])
@pytest.mark.parametrize("T, page", [(1, None), (3, None), (70, None), (1, 16), (70, 64)])
def test_parity_quantized(T, page, D, dtype, kv_dtype):
    q, k, v = random_qkv(3, 4, 2, T, 150, D, dtype)
    (k, k_scale), (v, v_scale) = quantize(k, kv_dtype), quantize(v, kv_dtype)
    options = {"kv_lengths": torch.tensor([0, 83, 150], dtype=torch.int32), "k_scale": k_scale, "v_scale": v_scale}
    if page is not None:
        (k, options["block_table"]), (v, _) = paged(k, page), paged(v, page)
        options["k_scale"], options["v_scale"] = paged(k_scale, page)[0], paged(v_scale, page)[0]
    check_parity(q, k, v, **options)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("T", [1, 40])
def test_parity_of_every_fp8_number(T, flush):
    """A query that sees one key returns its value: subnormal numbers and NaN too, and where subnormal floats count as zero."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    v = codes.view(1, 1, 1, 256).expand(1, 2, 1, 256).contiguous()
    q, k, scale = torch.zeros(1, 2, T, 256), torch.zeros_like(v), torch.ones(1, 2, 1)
    torch.set_flush_denormal(flush)
    try:
        out = attention(q, k, v, causal=False, k_scale=scale, v_scale=scale, impl="cpp")
    finally:
        torch.set_flush_denormal(False)
    expected = codes.float()
    assert torch.equal(out.isnan(), expected.isnan().expand(1, 2, T, 256))
    assert torch.equal(out.nan_to_num(0.0), expected.nan_to_num(0.0).expand(1, 2, T, 256))


@pytest.mark.slow
@pytest.mark.one_of(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(1, None, 64), (4, None, 64), (1, 2500, 64), (1, None, (24, 40))], ids=str)
def test_parity_with_splits_of_the_keys(case, dtype):
    """Also where all keys are in the first, and with the bits of only those."""
    T, window, D = case
    q, k, v = random_qkv(3, 4, 2, T, 5000, D, dtype)
    lengths = torch.tensor([0, 83, 5000], dtype=torch.int32)
    options = {"window": window, "sinks": torch.ones(4), "kv_lengths": lengths}
    check_parity(q, k, v, **options)
    first = attention(q[:2], k[:2, :, :100], v[:2, :, :100], **options | {"kv_lengths": lengths[:2]})
    assert torch.equal(attention(q, k, v, **options)[:2], first)


def test_window_of_every_key_changes_nothing():
    q, k, v = random_qkv(2, 4, 2, 70, 150, 40)
    assert torch.equal(attention(q, k, v, window=150), attention(q, k, v))


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_window_includes_the_query_position(impl):
    q, k, v = random_qkv(1, 1, 1, 2, 5, 16)

    def row_by_row(q, k, v):
        seen = (slice(2 + i, 4 + i) for i in (0, 1))
        rows = [attention_reference(q[:, :, i : i + 1], k[:, :, keys], v[:, :, keys]) for i, keys in enumerate(seen)]
        return torch.cat(rows, 2)

    numerics.check(attention(q, k, v, window=2, impl=impl), lambda: row_by_row(q.double(), k.double(), v.double()))


@pytest.mark.exhaustive  # test_numerics.py has a sample
@pytest.mark.parametrize("level", lower_levels())
def test_lower_cpu_levels(level):
    """The tests of parity and tanh again, in a process that is forced to a lower instruction set."""
    files = [__file__, str(Path(__file__).with_name("test_attention_varlen.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "parity or tanh", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, env=os.environ | {"FASTGPT_CPU_LEVEL": level}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
