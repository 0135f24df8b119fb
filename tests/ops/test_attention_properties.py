"""Properties of attention that need no reference, and the reference itself against its formula."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_calls import random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import attention, attention_reference
from fastgpt.ops import attention as ops
from fastgpt.ops.dropout import keep_mask, philox
from fastgpt.testing import numerics
from fastgpt.testing.attention_features import FEATURES, inputs, options
from fastgpt.testing.attention_parity import run_cpp

pytestmark = pytest.mark.threads


def test_fully_masked_rows_are_zero():
    q, k, v = random_qkv(1, 2, 2, 5, 3, 16)
    out, lse = attention(q, k, v, return_lse=True)
    assert torch.equal(out[:, :, :2], torch.zeros(1, 2, 2, 16)) and (lse[:, :, :2] == -torch.inf).all()
    assert (lse[:, :, 2:] > -torch.inf).all()


def test_bottom_right_alignment():
    """T=2, S=5: the first query sees four keys, the second all five."""

    def row_by_row(q, k, v):
        rows = [attention_reference(q[:, :, i : i + 1], k[:, :, : 4 + i], v[:, :, : 4 + i], causal=False) for i in (0, 1)]
        return torch.cat(rows, 2)

    x = random_qkv(1, 1, 1, 2, 5, 16)
    for impl in ("cpp", "reference"):
        numerics.check(attention(*x, impl=impl), lambda: row_by_row(*(tensor.double() for tensor in x)))


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_large_scores_do_not_overflow(impl):
    q, k, v = random_qkv(1, 2, 2, 40, 40, 64)
    out, lse = attention(q * 1e4, k * 1e4, v, impl=impl, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    # The largest score takes all the weight.
    best = (q @ k.transpose(-2, -1)).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).argmax(-1)
    assert torch.equal(out, v.gather(2, best.unsqueeze(-1).expand_as(v)))


@pytest.mark.parametrize("T", [1, 40])
def test_nan_is_not_hidden(T):
    q, k, v = random_qkv(1, 1, 1, T, 40, 64)
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
    q, k, v = random_qkv(B, H_kv * group, H_kv, T, T + extra, D, seed=seed)
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
    q, k, v = random_qkv(B, H_kv * group, H_kv, T, T + extra, D, seed=seed)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(attention(q[order], k[order], v[order]), attention(q, k, v)[order])


@pytest.mark.parametrize("T", [1, 70])
def test_result_does_not_depend_on_threads_or_repetition(T):
    q, k, v = random_qkv(2, 4, 2, T, 3000, 64)
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
    q, k, v = random_qkv(2, 4, 2, 3, 50, 16, torch.float64)
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
    q, k, v = random_qkv(1, 2, 2, 5, 9, 8)
    first, same, other = (attention(q, k, v, dropout_p=0.5, dropout_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    torch.manual_seed(0)
    first = attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, attention(q, k, v, dropout_p=0.5))
    torch.manual_seed(0)
    assert torch.equal(first, attention(q, k, v, dropout_p=0.5))


@pytest.mark.slow
def test_reference_gradients():
    """Through masks, lengths, grouped-query heads and fully masked rows."""
    q, k, v = (x.double().requires_grad_() for x in random_qkv(2, 4, 2, 4, 3, 8))
    lengths = torch.tensor([2, 3], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *x: attention_reference(*x, kv_lengths=lengths, return_lse=False), (q, k, v))
