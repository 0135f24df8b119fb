"""The attention operation: parity of the CPU kernels, properties, errors, registration."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_levels import lower_levels
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from fastgpt import attention, attention_reference, attention_varlen
from fastgpt.ops import attention as ops
from fastgpt.ops.dropout import keep_mask, philox
from fastgpt.ops.quantization import quantize
from fastgpt.testing import numerics
from fastgpt.testing.attention_features import FEATURES, PACKED_FEATURES, inputs, options, paged
from fastgpt.testing.attention_parity import compare, run_cpp, run_cpp_packed

pytestmark = pytest.mark.threads

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# B, H, H_kv, T, S, D, or (D, D_v) for values of another head dim: shapes that hurt.
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


def make(B, H, H_kv, T, S, D, dtype=torch.float32, seed=0):
    D, D_v = D if isinstance(D, tuple) else (D, D)
    generator = torch.Generator().manual_seed(seed)
    # Token-major storage, as a model has it: strided, last dimension contiguous.
    q = torch.randn(B, T, H, D, generator=generator).transpose(1, 2).to(dtype)
    k, v = (torch.randn(B, S, H_kv, size, generator=generator).transpose(1, 2).to(dtype) for size in (D, D_v))
    return q, k, v


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
    check_parity(*make(*shape, dtype), causal=causal)


def check_all(call, run=run_cpp, packing=None):
    """Parity of the C++ kernels, forward and backward."""
    for name, actual, yardstick in compare(call, run, packing):
        numerics.check(actual, yardstick, name=name)


@pytest.mark.one_of(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_of_gradients(shape, dtype):
    q, k, v = make(*shape, dtype)
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
    q, k, v = make(3, 4, 2, 70, 150, 64)
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
    q, k, v = make(1, 4, 2, T, 150, 40, dtype)
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
    q, k, v = make(4, 4, 2, T, 150, 64, dtype)
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
    q, k, v = make(3, 4, 2, T, 150, 40, dtype)
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
    q, k, v = make(3, 4, 2, T, 150, D, dtype)
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
    q, k, v = make(3, 4, 2, T, 150, D, dtype)
    (k, k_scale), (v, v_scale) = quantize(k, kv_dtype), quantize(v, kv_dtype)
    options = {"kv_lengths": torch.tensor([0, 83, 150], dtype=torch.int32), "k_scale": k_scale, "v_scale": v_scale}
    if page is not None:
        (k, options["block_table"]), (v, _) = paged(k, page), paged(v, page)
        options["k_scale"], options["v_scale"] = paged(k_scale, page)[0], paged(v_scale, page)[0]
    check_parity(q, k, v, **options)


@pytest.mark.slow
@pytest.mark.one_of(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(1, None, 64), (4, None, 64), (1, 2500, 64), (1, None, (24, 40))], ids=str)
def test_parity_with_splits_of_the_keys(case, dtype):
    """Also where all keys are in the first, and with the bits of only those."""
    T, window, D = case
    q, k, v = make(3, 4, 2, T, 5000, D, dtype)
    lengths = torch.tensor([0, 83, 5000], dtype=torch.int32)
    options = {"window": window, "sinks": torch.ones(4), "kv_lengths": lengths}
    check_parity(q, k, v, **options)
    first = attention(q[:2], k[:2, :, :100], v[:2, :, :100], **options | {"kv_lengths": lengths[:2]})
    assert torch.equal(attention(q, k, v, **options)[:2], first)


def test_window_of_every_key_changes_nothing():
    q, k, v = make(2, 4, 2, 70, 150, 40)
    assert torch.equal(attention(q, k, v, window=150), attention(q, k, v))


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_window_is_the_last_keys_own_position_included(impl):
    q, k, v = make(1, 1, 1, 2, 5, 16)

    def row_by_row(q, k, v):
        seen = (slice(2 + i, 4 + i) for i in (0, 1))
        rows = [attention_reference(q[:, :, i : i + 1], k[:, :, keys], v[:, :, keys]) for i, keys in enumerate(seen)]
        return torch.cat(rows, 2)

    numerics.check(attention(q, k, v, window=2, impl=impl), lambda: row_by_row(q.double(), k.double(), v.double()))


@pytest.mark.exhaustive  # test_numerics.py has a sample
@pytest.mark.parametrize("level", lower_levels())
def test_lower_cpu_levels(level):
    """The tests of parity and tanh again, in a process that is forced to a lower instruction set."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "parity or tanh", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"FASTGPT_CPU_LEVEL": level}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_blind_rows_are_zero():
    q, k, v = make(1, 2, 2, 5, 3, 16)
    out, lse = attention(q, k, v, return_lse=True)
    assert torch.equal(out[:, :, :2], torch.zeros(1, 2, 2, 16)) and (lse[:, :, :2] == -torch.inf).all()
    assert (lse[:, :, 2:] > -torch.inf).all()


def test_bottom_right_alignment():
    """T=2, S=5: the first query sees four keys, the second all five."""

    def row_by_row(q, k, v):
        rows = [attention_reference(q[:, :, i : i + 1], k[:, :, : 4 + i], v[:, :, : 4 + i], causal=False) for i in (0, 1)]
        return torch.cat(rows, 2)

    x = make(1, 1, 1, 2, 5, 16)
    for impl in ("cpp", "reference"):
        numerics.check(attention(*x, impl=impl), lambda: row_by_row(*(tensor.double() for tensor in x)))


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_large_scores_do_not_overflow(impl):
    q, k, v = make(1, 2, 2, 40, 40, 64)
    out, lse = attention(q * 1e4, k * 1e4, v, impl=impl, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    # The largest score takes all the weight.
    best = (q @ k.transpose(-2, -1)).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).argmax(-1)
    assert torch.equal(out, v.gather(2, best.unsqueeze(-1).expand_as(v)))


@pytest.mark.parametrize("T", [1, 40])
def test_nan_is_not_hidden(T):
    q, k, v = make(1, 1, 1, T, 40, 64)
    k[0, 0, 0, 0] = float("nan")
    assert attention(q, k, v).isnan().all()


dims = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 80), st.integers(0, 100), st.integers(1, 70)
)


@pytest.mark.slow
@settings(max_examples=60)
@given(dims, st.integers(0, 2**16))
def test_causality(dims, seed):
    """Changing a later key or value changes nothing before it, bit for bit."""
    B, H_kv, group, T, extra, D = dims
    q, k, v = make(B, H_kv * group, H_kv, T, T + extra, D, seed=seed)
    before = attention(q, k, v)
    k[:, :, -1] += 1
    v[:, :, -1] -= 1
    after = attention(q, k, v)
    assert torch.equal(before[:, :, :-1], after[:, :, :-1])
    assert not torch.equal(before[:, :, -1], after[:, :, -1])


@settings(max_examples=30)
@given(dims, st.integers(0, 2**16))
def test_permuting_the_batch_permutes_the_result(dims, seed):
    B, H_kv, group, T, extra, D = dims
    q, k, v = make(B, H_kv * group, H_kv, T, T + extra, D, seed=seed)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(attention(q[order], k[order], v[order]), attention(q, k, v)[order])


@pytest.mark.parametrize("T", [1, 70])
def test_result_does_not_depend_on_threads_or_repetition(T):
    q, k, v = make(2, 4, 2, T, 3000, 64)
    expected = attention(q, k, v)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(attention(q, k, v), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("feature", ["plain", "mask", "dropout", "bias of heads", "bias of keys", "everything"])
@pytest.mark.parametrize("B, H_kv", [(2, 2), (1, 1)])  # as many heads as threads, and fewer
def test_gradients_do_not_depend_on_threads_or_repetition(B, H_kv, feature):
    q, k, v = inputs(B, 4, H_kv, 150, 300, 64, torch.float32)
    call = ops.Call(q, k, v, **{"scale": 0.125} | options(feature, B, 4, 150, 300, torch.float32))
    douts = torch.randn(B, 4, 150, 64), torch.randn(B, 4, 150)
    expected = run_cpp(call, douts)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            actual = run_cpp(call, douts)
            assert all(torch.equal(actual[name], expected[name]) for name in expected)
    finally:
        torch.set_num_threads(threads)


PEAK = """
import re, sys, torch
from fastgpt import attention

def peak():  # bytes; resource's ru_maxrss would count the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

T = int(sys.argv[1])
torch.set_num_threads(2)
q, k, v, dout = (torch.randn(1, 4, T, 64, requires_grad=True) for _ in range(4))
before = peak()
torch.autograd.grad(attention(q, k, v, impl="cpp"), (q, k, v), dout)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_linear_in_the_number_of_tokens():
    """Forward and backward take 1.5 times what inputs, outputs and gradients do, where scores alone would take 4 GiB."""
    T = 16384
    result = subprocess.run([sys.executable, "-c", PEAK, str(T)], capture_output=True, text=True, check=True)
    tensor = 4 * T * 64 * 4  # bytes: q, k, v and dout are there before, out, dq, dk and dv come
    assert 4 * tensor <= int(result.stdout) <= 1.5 * 8 * tensor - 4 * tensor + 2**24


def by_the_formula(q, k, v, causal=True, scale=None, window=None, softcap=None, alibi_slopes=None, sinks=None, mask=None,
                   bias=None, kv_lengths=None, dropout_p=0.0, dropout_seed=None):  # fmt: skip
    """out and lse in float64, one score at a time."""
    (B, H, T, D), S = q.shape, k.shape[2]
    scale = D**-0.5 if scale is None else scale
    out, lse = torch.zeros(B, H, T, v.shape[3], dtype=torch.float64), torch.full((B, H, T), -torch.inf, dtype=torch.float64)
    whole = torch.broadcast_to
    mask = None if mask is None else whole(mask, (B, H, T, S))
    bias = None if bias is None else whole(bias, (B, H, T, S)).double()
    kept = keep_mask(dropout_seed, dropout_p, B, H, T, S, "cpu") if dropout_p else torch.ones(B, H, T, S)
    for b, h, i in itertools.product(range(B), range(H), range(T)):
        length = S if kv_lengths is None else kv_lengths[b].item()
        own = i + length - T
        scores = {}
        for j in range(length):
            hidden = causal and j > own or window is not None and j <= own - window
            if hidden or mask is not None and not mask[b, h, i, j] or bias is not None and bias[b, h, i, j] == -torch.inf:
                continue
            score = scale * (q[b, h, i].double() @ k[b, h // (H // k.shape[1]), j].double()).item()
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            if alibi_slopes is not None:
                score -= alibi_slopes[h].item() * abs(own - j)
            scores[j] = score + (0.0 if bias is None else bias[b, h, i, j].item())
        if not scores:
            continue
        total = sum(map(math.exp, scores.values())) + (0.0 if sinks is None else math.exp(sinks[h].item()))
        lse[b, h, i] = math.log(total)
        for j, score in scores.items():
            if kept[b, h, i, j]:
                out[b, h, i] += math.exp(score) / total / (1 - dropout_p) * v[b, h // (H // k.shape[1]), j].double()
    return out, lse


@pytest.mark.parametrize("feature", FEATURES)
def test_reference_is_the_formula(feature):
    q, k, v = inputs(2, 4, 2, 5, 9, (8, 12), torch.float64)
    arguments = options(feature, 2, 4, 5, 9, torch.float64)
    expected = by_the_formula(q, k, v, **arguments)
    for actual, wanted in zip(attention_reference(q, k, v, **arguments, return_lse=True), expected):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("feature", FEATURES)
def test_features_through_the_public_operation(feature):
    """Forward and backward, the same numbers as through the operators."""
    tensors, arguments = inputs(2, 4, 2, 5, 9, (8, 12), torch.float32), options(feature, 2, 4, 5, 9, torch.float32)
    call = ops.Call(*tensors, **{"scale": 0.35} | arguments)
    leaves = {name: getattr(call, name) for name in ("q", "k", "v", "bias", "sinks")}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items() if x is not None}
    out, lse = attention(**call._replace(**leaves)._asdict(), return_lse=True, impl="cpp")
    douts = torch.randn(out.shape), torch.randn(lse.shape)
    gradients = torch.autograd.grad((out, lse), list(leaves.values()), douts)
    expected = run_cpp(call, douts)
    assert torch.equal(out, expected["out"]) and torch.equal(lse, expected["lse"])
    assert all(torch.equal(x, expected[f"d{name}"]) for name, x in zip(leaves, gradients))


def test_keys_in_parts_merge_by_their_lse():
    q, k, v = make(2, 4, 2, 3, 50, 16, torch.float64)
    whole, whole_lse = attention(q, k, v, causal=False, return_lse=True)
    parts = [attention(q, k[:, :, a:b], v[:, :, a:b], causal=False, return_lse=True) for a, b in ((0, 13), (13, 50))]
    lse = torch.stack([lse for _, lse in parts])
    merged = sum(out * (part_lse - lse.logsumexp(0)).exp().unsqueeze(-1) for out, part_lse in parts)
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(lse.logsumexp(0), whole_lse)


def test_philox_is_philox():
    """Known answers of Random123's kat_vectors for philox4x32-10."""

    def words(counter, seed):
        return [int(word) for word in philox(torch.tensor(seed), *(torch.tensor(c) for c in counter))]

    assert words((0, 0, 0, 0), 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((2**32 - 1,) * 4, -1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_dropout_drops_its_share_and_is_repeatable():
    kept = keep_mask(torch.tensor([5]), 0.3, 2, 3, 100, 200, "cpu")
    assert abs(kept.float().mean().item() - 0.7) < 0.01
    assert abs((kept[:, :, 1:] == kept[:, :, :-1]).float().mean().item() - 0.58) < 0.01  # rows are independent
    q, k, v = make(1, 2, 2, 5, 9, 8)
    first, same, other = (attention(q, k, v, dropout_p=0.5, dropout_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    torch.manual_seed(0)
    first = attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, attention(q, k, v, dropout_p=0.5))
    torch.manual_seed(0)
    assert torch.equal(first, attention(q, k, v, dropout_p=0.5))


CU_Q, CU_K = torch.tensor([0, 3, 3, 8], dtype=torch.int32), torch.tensor([0, 5, 6, 12], dtype=torch.int32)


def packed(q, k, v):
    return (x[0].transpose(0, 1) for x in (q, k, v))  # (total, heads, D)


@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize("feature", PACKED_FEATURES[:-1])  # dropout counts sequences
def test_packed_sequences_are_a_loop(feature, impl):
    """The same bits, and gradients."""
    leaves = [x.requires_grad_() for x in inputs(1, 4, 2, 8, 12, (16, 24), torch.float32)]
    arguments = options(feature, 1, 4, 8, 12, torch.float32) | {"impl": impl, "return_lse": True}
    out, lse = attention_varlen(*packed(*leaves), CU_Q, CU_K, 5, 6, **arguments)
    assert out.shape == (8, 4, 24) and lse.shape == (4, 8)
    dout = torch.randn(out.shape)
    gradients = torch.autograd.grad(out, leaves, dout)
    q, k, v = leaves
    for b in range(3):
        rows, keys = slice(CU_Q[b], CU_Q[b + 1]), slice(CU_K[b], CU_K[b + 1])
        expected = attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], **arguments)
        assert torch.equal(out[rows].transpose(0, 1), expected[0][0]) and torch.equal(lse[:, rows], expected[1][0])
        wanted = torch.autograd.grad(expected[0], leaves, dout[rows].transpose(0, 1).unsqueeze(0))
        for part, x, y in zip((rows, keys, keys), gradients, wanted):
            assert torch.equal(x[:, :, part], y[:, :, part])


@pytest.mark.slow
@pytest.mark.one_of(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", PACKED_FEATURES)
@pytest.mark.parametrize("D", [40, (40, 24)], ids=str)
def test_parity_of_packed_sequences(D, feature, dtype):
    starts = ([0, 70, 70, 75, 205], [0, 90, 93, 98, 300])
    packing = ops.Packing(*(torch.tensor(numbers, dtype=torch.int32) for numbers in starts), 130, 202)
    call = ops.Call(*inputs(1, 4, 2, 205, 300, D, dtype), **{"scale": 0.15} | options(feature, 1, 4, 205, 300, dtype))
    check_all(call, lambda call, douts: run_cpp_packed(call, packing, douts), packing)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(1, 2, 3, 4)}, ValueError, "q: expected 3 dimensions"),
        ({"cu_seqlens_q": CU_Q.long()}, TypeError, "cu_seqlens_q: expected dtype torch.int32"),
        ({"cu_seqlens_k": CU_K[:3]}, ValueError, r"cu_seqlens_k: expected shape \(B \+ 1,\)"),
        ({"cu_seqlens_k": CU_K + 1}, ValueError, r"cu_seqlens_k: expected numbers that ascend from 0 to 12, got \[1, 6"),
        ({"max_seqlen_q": 4}, ValueError, "max_seqlen_q: expected at least 5, the longest sequence, got 4"),
        ({"max_seqlen_k": 5}, ValueError, "max_seqlen_k: expected at least 6, the longest sequence, got 5"),
        ({"window": 0}, ValueError, "window: expected an integer >= 1"),
    ],
)
def test_packing_errors(change, error, message):
    q, k, v = packed(*inputs(1, 4, 2, 8, 12, 16, torch.float32))
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": 5, "max_seqlen_k": 6}
    with pytest.raises(error, match=message):
        attention_varlen(**arguments | change)


def test_a_longest_sequence_may_be_any_integer():
    q, k, v = packed(*inputs(1, 4, 2, 8, 12, 16, torch.float32))
    expected = attention_varlen(q, k, v, CU_Q, CU_K, 5, 6)
    assert torch.equal(attention_varlen(q, k, v, CU_Q, CU_K, 2**32 + 1, 2**40), expected)


@pytest.mark.slow
def test_reference_gradients():
    """Through masks, lengths, shared heads and blind rows."""
    q, k, v = (x.double().requires_grad_() for x in make(2, 4, 2, 4, 3, 8))
    lengths = torch.tensor([2, 3], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *x: attention_reference(*x, kv_lengths=lengths, return_lse=False), (q, k, v))


# Registration


@pytest.mark.slow
def test_opcheck():
    q, k, v = make(2, 4, 2, 3, 20, (16, 24))
    lengths = torch.tensor([5, 20], dtype=torch.int32)
    for arguments in ({}, {"kv_lengths": lengths}, {"kv_lengths": lengths, "window": 7}):
        torch.library.opcheck(torch.ops.fastgpt.attention_forward.default, (q, k, v, True, 0.25), arguments)
    (k, k_scale), (v, v_scale) = quantize(k, torch.int8), quantize(v, torch.int8)
    (k, table), (v, _), (k_scale, _), (v_scale, _) = (paged(x, 8) for x in (k, v, k_scale, v_scale))
    arguments = {"kv_lengths": lengths, "block_table": table, "k_scale": k_scale, "v_scale": v_scale}
    torch.library.opcheck(torch.ops.fastgpt.attention_forward.default, (q, k, v, True, 0.25), arguments)


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["plain", "lengths", "bias of queries", "everything"])
def test_opcheck_of_gradients(feature):
    call = ops.Call(*make(2, 4, 2, 3, 20, (16, 24)), **{"scale": 0.25} | options(feature, 2, 4, 3, 20, torch.float32))
    torch.library.opcheck(torch.ops.fastgpt.attention_forward.default, tuple(call))
    out, lse = torch.ops.fastgpt.attention_forward(*call)
    arguments = (out, lse, out, lse, call.bias is not None, *call[:12], call.dropout_p, call.dropout_seed)
    torch.library.opcheck(torch.ops.fastgpt.attention_backward.default, arguments)


@pytest.mark.slow
def test_opcheck_of_packed_sequences():
    q, k, v = make(1, 4, 2, 8, 12, (16, 24))
    packing, options = (CU_Q, CU_K, 5, 6), {"sinks": torch.ones(4)}
    torch.library.opcheck(torch.ops.fastgpt.attention_varlen_forward.default, (*packing, q, k, v, True, 0.25), options)
    out, lse = torch.ops.fastgpt.attention_varlen_forward(*packing, q, k, v, True, 0.25, **options)
    arguments = (out, None, out, lse, *packing, q, k, v, True, 0.25)
    torch.library.opcheck(torch.ops.fastgpt.attention_varlen_backward.default, arguments, options)


@pytest.mark.parametrize("D", [16, (16, 24)])
def test_fake_strides_are_real_strides(D):
    q, k, v = make(2, 4, 2, 3, 20, D)
    real = torch.ops.fastgpt.attention_forward(q, k, v, True, 0.25)
    fake = torch.ops.fastgpt.attention_forward(q.to("meta"), k.to("meta"), v.to("meta"), True, 0.25)
    for a, b in zip(real, fake):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["plain", "window", "sinks", "mask", "dropout", "everything"])
def test_compiles_as_one_graph(feature):
    q, k, v = inputs(2, 4, 2, 5, 9, (8, 12), torch.float32)
    arguments = options(feature, 2, 4, 5, 9, torch.float32)
    torch._dynamo.reset()  # each feature compiles this test's function anew, which is limited

    def eager(*x):
        return attention(*x, **arguments, return_lse=True)

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), eager(q, k, v))
    q.requires_grad_()
    torch.testing.assert_close(*(torch.autograd.grad(f(q, k, v)[0].sum(), q) for f in (compiled, eager)))


# Choice of implementation


def test_explain_says_what_serves_and_why_not():
    q, k, v = make(1, 1, 1, 2, 2, 16)
    assert fastgpt.explain(attention, q, k, v) == {
        "triton": "it runs on CUDA tensors, and q is on cpu",
        "cpp": "chosen",
        "reference": "available",
    }
    assert fastgpt.explain(attention, q.requires_grad_(), k, v)["cpp"] == "chosen"
    table = torch.zeros(1, 1, dtype=torch.int32)
    reasons = fastgpt.explain(attention, q, k, v, block_table=table)
    assert reasons["reference"] == "chosen" and "no backward through a block table" in reasons["cpp"]
    reasons = fastgpt.explain(attention, *(x.double() for x in (q, k, v)))
    assert reasons["reference"] == "chosen" and "q is torch.float64" in reasons["cpp"]
    packed_call = (*packed(*inputs(1, 4, 2, 8, 12, 16, torch.float32)), CU_Q, CU_K, 5, 6)
    assert fastgpt.explain(attention_varlen, *packed_call)["cpp"] == "chosen"
    with pytest.raises(ValueError, match="operation: expected one of fastgpt.attention"):
        fastgpt.explain(print, 1)


def test_a_named_implementation_does_not_fall_back():
    q, k, v = make(1, 1, 1, 2, 2, 16)
    with pytest.raises(ValueError, match="impl='triton' cannot serve this call: it runs on CUDA tensors"):
        attention(q, k, v, impl="triton")
    with pytest.raises(ValueError, match="impl='cpp' cannot serve this call: it has no backward through a block table"):
        attention(q.requires_grad_(), k, v, impl="cpp", block_table=torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="impl: expected one of 'cpp', 'triton', 'reference' or None, got 'flash'"):
        attention(q, k, v, impl="flash")


# Errors

Q = torch.zeros(2, 4, 3, 16)
KV = torch.zeros(2, 2, 5, 16)
INT = torch.zeros(2, dtype=torch.int32)

BAD = {
    "not a tensor": ((1, KV, KV), {}, TypeError, "q: expected a torch.Tensor, got int"),
    "dimensions": ((Q[0], KV, KV), {}, ValueError, r"q: expected 4 dimensions, got shape \(4, 3, 16\)"),
    "dtype": ((Q.int(), KV, KV), {}, TypeError, "q: expected dtype .*, got torch.int32"),
    "mixed dtypes": ((Q, KV.half(), KV), {}, TypeError, "k: expected dtype torch.float32 or .*, got torch.float16"),
    "head dim": ((Q.repeat(1, 1, 1, 37), KV, KV), {}, ValueError, "q: expected a head dim from 1 to 576, got 592"),
    "head dim of values": ((Q, KV, KV.repeat(1, 1, 1, 37)), {}, ValueError, "v: expected a head dim from 1 to 576, got 592"),
    "no values": ((Q, KV, KV[..., :0]), {}, ValueError, r"v: expected a head dim from 1 to 576, got 0 in shape \(2, 2, 5, 0\)"),
    "head dim of keys": ((Q, KV[..., :8], KV), {}, ValueError, r"k: expected shape \(2, 2, 5, 16\) .*, got \(2, 2, 5, 8\)"),
    "heads": ((Q[:, :3], KV, KV), {}, ValueError, "k: expected a number of heads that divides the 3 heads of q, got 2"),
    "batch": ((Q, KV[:1], KV), {}, ValueError, r"k: expected shape \(2, 2, 5, 16\) .*, got \(1, 2, 5, 16\)"),
    "v": ((Q, KV, KV[:, :, :4]), {}, ValueError, r"v: expected shape \(2, 2, 5, 16\) .*, got \(2, 2, 4, 16\)"),
    "device": ((Q, KV, KV.to("meta")), {}, ValueError, "v: expected device cpu, got meta"),
    "stride": ((Q, KV, torch.zeros(2, 2, 16, 5).mT), {}, ValueError, "v: expected a contiguous last dimension"),
    "scale": ((Q, KV, KV), {"scale": "x"}, TypeError, "scale: expected a finite number .* or None, got 'x'"),
    "lengths shape": ((Q, KV, KV), {"kv_lengths": INT[:1]}, ValueError, r"kv_lengths: expected shape \(2,\)"),
    "lengths dtype": ((Q, KV, KV), {"kv_lengths": INT.long()}, TypeError, "kv_lengths: expected dtype torch.int32"),
    "window": ((Q, KV, KV), {"window": 0}, ValueError, "window: expected an integer >= 1 .* or None, got 0"),
    "no scale": ((Q, KV.char(), KV.char()), {"v_scale": KV[..., 0]}, ValueError, "k_scale: expected a scale for .*int8"),
    "scale not taken": ((Q, KV, KV), {"v_scale": KV[..., 0]}, ValueError, "v_scale: expected None for k and v of"),
    "scale shape": (
        (Q, KV.char(), KV.char()),
        {"k_scale": KV[..., 0], "v_scale": KV[:, :, :4, 0]},
        ValueError,
        r"v_scale: expected shape \(2, 2, 5\) \(B, H_kv, S\) to match k, got \(2, 2, 4\)",
    ),
    "scale dtype": (
        (Q, KV.char(), KV.char()),
        {"k_scale": KV[..., 0].half(), "v_scale": KV[..., 0]},
        TypeError,
        "k_scale: expected dtype torch.float32",
    ),
    "table shape": ((Q, KV, KV), {"block_table": INT[None]}, ValueError, r"block_table: expected shape \(2, 2\)"),
    "table dtype": ((Q, KV, KV), {"block_table": INT[:, None].long()}, TypeError, "block_table: expected dtype torch.int32"),
    "page": ((Q, KV, KV), {"block_table": INT[:, None] + 2}, ValueError, "block_table: expected pages from 0 to 1, got 2"),
    "softcap": ((Q, KV, KV), {"softcap": 0.0}, ValueError, "softcap: expected a finite number >= 1.17.*, got 0.0"),
    "slopes shape": ((Q, KV, KV), {"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes: expected shape \(4,\) \(H,\)"),
    "slopes dtype": (
        (Q, KV, KV),
        {"alibi_slopes": torch.ones(4).half()},
        TypeError,
        "alibi_slopes: expected dtype torch.float32",
    ),
    "sinks shape": ((Q, KV, KV), {"sinks": torch.ones(2)}, ValueError, r"sinks: expected shape \(4,\) \(H,\), got \(2,\)"),
    "sinks dtype": ((Q, KV, KV), {"sinks": torch.ones(4).int()}, TypeError, "sinks: expected dtype .*, got torch.int32"),
    "mask dtype": ((Q, KV, KV), {"mask": torch.ones(3, 5)}, TypeError, "mask: expected dtype torch.bool, got torch.float32"),
    "mask shape": (
        (Q, KV, KV),
        {"mask": torch.ones(3, 4).bool()},
        ValueError,
        r"mask: expected a shape that broadcasts to \(2, 4, 3, 5\) \(B, H, T, S\), got \(3, 4\)",
    ),
    "bias shape": ((Q, KV, KV), {"bias": torch.ones(3, 4, 3, 5)}, ValueError, "bias: expected a shape that broadcasts to"),
    "bias dtype": (
        (Q, KV, KV),
        {"bias": torch.ones(5).half()},
        TypeError,
        "bias: expected dtype torch.float32 .*, got torch.float16",
    ),
    "bias device": ((Q, KV, KV), {"bias": torch.ones(5, device="meta")}, ValueError, "bias: expected device cpu, got meta"),
    "dropout": ((Q, KV, KV), {"dropout_p": 1.0}, ValueError, "dropout_p: expected a finite number >= 0 and < 1, got 1.0"),
    "seed": ((Q, KV, KV), {"dropout_p": 0.5, "dropout_seed": -1}, ValueError, "dropout_seed: expected an integer >= 0"),
    "lengths device": ((Q, KV, KV), {"kv_lengths": INT.to("meta")}, ValueError, "kv_lengths: expected device cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    arguments, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        attention(*arguments, **options)


def test_operators_check_what_memory_safety_needs():
    """Called directly, without the public function's checks."""
    q, k, v = make(1, 4, 2, 8, 12, 16)
    out, lse = torch.ops.fastgpt.attention_forward(q, k, v, True, 0.25)

    def backward(dout=out, dlse=None, needs_dbias=False, **options):
        torch.ops.fastgpt.attention_backward(dout, dlse, out, lse, needs_dbias, q, k, v, True, 0.25, **options)

    def packed_forward(starts_q, starts_k):
        starts = (torch.tensor(starts, dtype=torch.int32) for starts in (starts_q, starts_k))
        torch.ops.fastgpt.attention_varlen_forward(*starts, 8, 12, q, k, v, True, 0.25)

    for call, message in (
        (lambda: backward(dout=out[:, :, :7]), "dout: unexpected shape"),
        (lambda: backward(dout=out[..., :8]), "dout: unexpected shape"),
        (lambda: backward(dout=out.half()), "dout: expected the dtype of q"),
        (lambda: backward(dout=torch.zeros(1, 4, 16, 8).mT), "dout: expected a contiguous last dimension"),
        (lambda: backward(dlse=lse[:, :3]), "dlse: unexpected shape"),
        (lambda: backward(needs_dbias=True), "bias: expected a tensor"),
        (lambda: backward(bias=torch.zeros(8, 11)), "bias: expected a shape that broadcasts"),
        (lambda: backward(dropout_p=0.5), "dropout_seed: expected a tensor"),
        (lambda: packed_forward([0, 9, 8], [0, 5, 12]), "cu_seqlens_q: expected numbers that ascend from 0 to 8"),
        (lambda: packed_forward([0, 3, 8], [0, 5, 13]), "cu_seqlens_k: expected numbers that ascend from 0 to 12"),
        (lambda: packed_forward([0, 3, 8], [0, 12]), "cu_seqlens_k: unexpected shape"),
        (lambda: packed_forward([0], [0]), "cu_seqlens_q: expected"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
