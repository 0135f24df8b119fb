"""The edges of attention's contract: what a query does not see does not reach it, whatever is there; a key whose bias is -inf is
not seen; a row that sees no key gives zeros."""

import math

import pytest
import torch

from fastgpt import attention, attention_reference, attention_varlen

pytestmark = pytest.mark.threads

B, H, H_KV, S, D, D_V = 2, 4, 2, 70, 16, 24  # D_V: head dim of values
IMPLS = ("cpp", "reference")
NOT_FINITE = (math.nan, math.inf, -math.inf)


def inputs(T, dtype=torch.float32):
    return torch.randn(B, H, T, D).to(dtype), torch.randn(B, H_KV, S, D).to(dtype), torch.randn(B, H_KV, S, D_V).to(dtype)


def hide(how, T, key):
    """Options that hide a key from the first half of the queries, or if there is one from it."""
    hidden = torch.zeros(T, S, dtype=torch.bool)
    hidden[: -(-T // 2), key] = True
    return {
        "mask": {"mask": ~hidden, "causal": False},
        "bias": {"bias": torch.randn(H, T, S).masked_fill(hidden, -math.inf), "causal": False},
        "causal": {"causal": True},
        "window": {"window": 5, "causal": False},
        "bias and softcap": {"bias": torch.zeros(T, S).masked_fill(hidden, -math.inf), "softcap": 2.0, "causal": False},
        "everything": {
            "mask": ~hidden, "softcap": 2.0, "sinks": torch.randn(H), "alibi_slopes": torch.rand(H), "window": S,
        },
    }[how]  # fmt: skip


def with_gradients(call, impl, dout, dlse):
    leaves = {name: call[name].clone().requires_grad_() for name in ("q", "k", "v", "bias", "sinks") if name in call}
    results = attention(**call | leaves, return_lse=True, impl=impl)
    gradients = torch.autograd.grad(results, list(leaves.values()), (dout, dlse))
    return *results, *gradients


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", (2, 20, 70))
@pytest.mark.parametrize("what", ("k", "v"))
@pytest.mark.parametrize("how", ("mask", "bias", "causal", "window", "bias and softcap", "everything"))
def test_what_a_query_does_not_see_does_not_reach_it(how, what, T, impl):
    """Results and gradients of those that do not see a key are the same whether it is finite or not."""
    key = S - 1 if how == "causal" else 0 if how == "window" else 33
    q, k, v = inputs(T)
    options = hide(how, T, key)
    seen = torch.zeros(T, dtype=torch.bool)
    if how == "window":
        seen[: max(T - S + 5, 0)] = True  # query i is at position i + S - T
    else:
        seen[-1 if how == "causal" else -(-T // 2) :] = True
    call = {"q": q, "k": k, "v": v, **options}
    dout, dlse = torch.randn(B, H, T, D_V), torch.randn(B, H, T)
    # Gradients of queries that see the key would make all that of keys infinite.
    dout[:, :, seen], dlse[:, :, seen] = 0.0, 0.0
    expected = with_gradients(call, impl, dout, dlse)
    for number in NOT_FINITE:
        changed = call[what].clone()
        changed[:, :, key] = number
        out, lse, dq, *_ = with_gradients(call | {what: changed}, impl, dout, dlse)
        for actual, wanted in zip((out, lse, dq), expected):
            torch.testing.assert_close(actual[:, :, ~seen], wanted[:, :, ~seen])
            assert actual[:, :, ~seen].isfinite().all()
        touched = out[:, :, seen] if what == "v" or number != -math.inf else out[:, :, :0]
        assert what == "k" or not touched.isfinite().any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("number", NOT_FINITE)
def test_queries_do_not_reach_keys_that_they_do_not_see(number, impl):
    """What is not finite in q, or in the gradient of out, makes no gradient NaN of a key that the query does not see."""
    T = 40
    for name in ("q", "dout"):
        tensors = dict(zip("qkv", inputs(T)), dout=torch.randn(B, H, T, D_V))
        tensors[name][:, :, 7] = number
        mask = torch.ones(T, S, dtype=torch.bool)
        mask[7, 20:] = False
        leaves = [tensors[x].requires_grad_() for x in "qkv"]
        out = attention(*leaves, causal=False, mask=mask, impl=impl)
        dq, dk, dv = torch.autograd.grad(out, leaves, tensors["dout"])
        if name == "q" or impl == "cpp":
            assert dk[:, :, 20:].isfinite().all() and dv[:, :, 20:].isfinite().all()
        rest = [t for t in range(T) if t != 7]
        assert dq[:, :, rest].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", (1, 9, 70))
@pytest.mark.parametrize("sinks", (False, True))
@pytest.mark.parametrize("how", ("bias", "mask"))
def test_rows_that_see_no_key(how, sinks, T, impl):
    """Zeros, lse -inf and zero gradients, though keys and values are NaN, with sinks, too."""
    q, k, v = inputs(T)
    hidden = torch.zeros(T, 1, dtype=torch.bool)
    hidden[::2] = True
    call = {"q": q, "k": k, "v": v, "causal": False}
    call |= {"bias": torch.zeros(T, 1).masked_fill(hidden, -math.inf)} if how == "bias" else {"mask": ~hidden}
    if sinks:
        call["sinks"] = torch.randn(H)
    dout, dlse = torch.randn(B, H, T, D_V), torch.randn(B, H, T)
    for number in (0.0, math.nan):
        if number != 0.0:
            call |= {"k": torch.full_like(k, number), "v": torch.full_like(v, number)}
        out, lse, dq, dk, dv, *more = with_gradients(call, impl, dout, dlse)
        assert torch.equal(out[:, :, ::2], torch.zeros_like(out[:, :, ::2]))
        assert (lse[:, :, ::2] == -math.inf).all()
        assert torch.equal(dq[:, :, ::2], torch.zeros_like(dq[:, :, ::2]))
        if T == 1:
            assert all(torch.equal(x, torch.zeros_like(x)) for x in (dk, dv, *more))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", (1, 20))
def test_infinite_scores(T, impl):
    """A score of -inf hides its key; one of +inf leaves NaN and an lse of +inf, in its row alone."""
    q, k, v = inputs(T)
    bias = torch.zeros(B, H, T, S)
    bias[0, 1, 0, 3] = math.inf
    out, lse = attention(q, k, v, bias=bias, causal=False, return_lse=True, impl=impl)
    assert out[0, 1, 0].isnan().all() and lse[0, 1, 0] == math.inf
    bias[0, 1, 0, 3] = 0.0
    assert torch.equal(out.isnan().sum(), torch.tensor(D_V))
    q = q.abs() + 0.1
    k[:, :, 5] = -math.inf
    rest = [i for i in range(S) if i != 5]
    out, lse = attention(q, k, v, causal=False, return_lse=True, impl=impl)
    expected = attention_reference(q, k[:, :, rest], v[:, :, rest], causal=False, return_lse=True)
    for actual, wanted in zip((out, lse), expected):
        torch.testing.assert_close(actual, wanted)


def test_long_caches_in_splits():
    """A token's keys, cut into splits, of which one holds what it does not see."""
    q, k, v = torch.randn(1, 2, 1, D), torch.randn(1, 1, 5000, D), torch.randn(1, 1, 5000, D_V)
    mask = torch.ones(5000, dtype=torch.bool)
    mask[2100:2200] = False
    expected = attention(q, k, v, mask=mask, return_lse=True)
    v[:, :, 2100:2200] = math.nan
    for actual, wanted in zip(attention(q, k, v, mask=mask, return_lse=True), expected):
        torch.testing.assert_close(actual, wanted)


def test_packed_sequences_do_not_reach_each_other():
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    q, k, v = torch.randn(12, H, D), torch.randn(12, H_KV, D), torch.randn(12, H_KV, D_V)
    expected = attention_varlen(q, k, v, starts, starts, 7, 7)
    for x in (q, k, v):
        x[5:] = math.nan
    assert torch.equal(attention_varlen(q, k, v, starts, starts, 7, 7)[:5], expected[:5])


@pytest.mark.parametrize("impl", IMPLS)
def test_windows_beyond_any_length(impl):
    q, k, v = inputs(20)
    expected = attention(q, k, v, impl=impl)
    for window in (2**31 - 1, 2**31, 2**63 - 1):
        assert torch.equal(attention(q, k, v, window=window, impl=impl), expected)
        beyond = attention(q, k[:, :, :5], v[:, :, :5], window=window, impl=impl)  # of queries before the first key
        assert torch.equal(beyond, attention(q, k[:, :, :5], v[:, :, :5], impl=impl))


@pytest.mark.parametrize("impl", (*IMPLS, None))
@pytest.mark.parametrize("softcap", (0.0, -1.0, 1e-46, 2.0**-127, 1e39, math.nan, math.inf, 10**400))
def test_softcaps_that_fp32_cannot_hold(softcap, impl):
    with pytest.raises(ValueError, match="^softcap: expected a finite number"):
        attention(*inputs(3), softcap=softcap, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_smallest_and_largest_softcap(impl):
    """Of one that bounds nothing, scores are as they are; of one that leaves nothing, all keys weigh the same."""
    q, k, v = inputs(9)
    torch.testing.assert_close(attention(q, k, v, softcap=2.0**100, impl=impl), attention(q, k, v, impl=impl))
    torch.testing.assert_close(attention(q, k, v, softcap=2.0**-126, impl=impl), attention(q, k, v, scale=0.0, impl=impl))
