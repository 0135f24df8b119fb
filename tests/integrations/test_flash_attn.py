"""flash_attn's functions by fastgpt, against plain PyTorch."""

import inspect
import itertools

import numpy as np
import pytest
import torch

from fastgpt.integrations import flash_attn
from fastgpt.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from fastgpt.testing import numerics

SENTINEL = -77.0
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

COMMON = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip
REQUIRED = inspect.Parameter.empty
PACKING = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), REQUIRED)
SIGNATURES = {
    "flash_attn_func": dict.fromkeys("qkv", REQUIRED) | COMMON,
    "flash_attn_kvpacked_func": dict.fromkeys(("q", "kv"), REQUIRED) | COMMON,
    "flash_attn_qkvpacked_func": {"qkv": REQUIRED} | COMMON,
    "flash_attn_varlen_func": dict.fromkeys("qkv", REQUIRED) | PACKING | COMMON | {"block_table": None},
    "flash_attn_varlen_kvpacked_func": dict.fromkeys(("q", "kv"), REQUIRED) | PACKING | COMMON,
    "flash_attn_varlen_qkvpacked_func": dict.fromkeys(("qkv", "cu_seqlens", "max_seqlen"), REQUIRED) | COMMON,
    "flash_attn_with_kvcache": dict.fromkeys(("q", "k_cache", "v_cache"), REQUIRED) | dict.fromkeys(
        ("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table",
         "softmax_scale")
    ) | {"causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True, "alibi_slopes": None,
         "num_splits": 0, "return_softmax_lse": False},
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_and_defaults_are_flash_attns(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert [(parameter.name, parameter.default) for parameter in parameters.values()] == list(SIGNATURES[name].items())
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on(device, function):
    """`function` with its tensors moved to a device, and its results back."""

    def moved(*arguments, **options):
        arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
        options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        return tuple(x.cpu() for x in function(*arguments, **options))

    return moved


def slopes(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(8))


def reference(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, first=0):
    """One sequence: q (T, H, D), k, v (S, H_kv, D) from key `first` on -> out (T, H, D), lse (H, T).

    In q's precision, and in fp32 at least. alibi_slopes: (H,).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    out_dtype, (q, k, v) = q.dtype, (x.to(dtype) for x in (q, k, v))
    T, H, D = q.shape
    S = len(k)
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q * (D**-0.5 if softmax_scale is None else softmax_scale), k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(T).unsqueeze(1) + S - T - torch.arange(S)  # how far a key is to the left
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype).view(H, 1, 1) * distance.abs()
    left, right = window_size
    seen = (torch.arange(S) >= first).expand(T, S)
    if left >= 0:
        seen = seen & (distance <= left)
    if right >= 0:
        seen = seen & (distance >= -right)
    if causal:
        seen = seen & (distance >= 0)
    scores = scores.masked_fill(~seen, -torch.inf)
    blind = ~seen.any(-1)
    weights = scores.masked_fill(blind.unsqueeze(-1), 0.0).softmax(-1).masked_fill(blind.unsqueeze(-1), 0.0)
    return torch.einsum("hts,shd->thd", weights, v).to(out_dtype), scores.logsumexp(-1)


def batched_reference(q, k, v, alibi_slopes=None, **options):
    """Of q (B, T, H, D)."""
    rows = [
        reference(
            *x, alibi_slopes=None if alibi_slopes is None else alibi_slopes.expand(len(q), -1)[b], **options
        ) for b, x in enumerate(zip(q, k, v))
    ]  # fmt: skip
    return tuple(torch.stack(column) for column in zip(*rows))


def results(function, tensors, dtype, **options):
    """(out, lse, gradients of the tensors) of `function`, in dtype, as the contract names them."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out, lse, *_ = function(*leaves, **options)
    dout = random(*out.shape, seed=9).to(out.dtype)
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout)))


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.3},
    "window to the left": {"window_size": (3, -1)},
    "causal window": {"window_size": (3, 0)},
    "causal, window to the right": {"causal": True, "window_size": (4, 5)},
    "nothing to the right": {"window_size": (-1, 0)},
    "window to the right": {"window_size": (-1, 2)},
    "both sides": {"window_size": (2, 3)},
    "wide": {"window_size": (100, 100)},
    "softcap": {"softcap": 1.5, "causal": True},
    "alibi": {"alibi_slopes": slopes(4), "causal": True},
    "alibi of sequences": {"alibi_slopes": slopes(3, 4)},
    "everything": {"alibi_slopes": slopes(3, 4), "softcap": 2.0, "window_size": (5, 2), "softmax_scale": 0.4},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.one_of(2)
@pytest.mark.parametrize("lengths", [(7, 7), (5, 12), (11, 6), (1, 9)], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_dense_parity(feature, lengths, device):
    T, S = lengths
    tensors = random(3, T, 4, 16), random(3, S, 2, 16, seed=1), random(3, S, 2, 16, seed=2)
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if (T, S) == (5, 12) else (torch.float32,)
    for dtype in dtypes:
        rounded = [x.to(dtype) for x in tensors]
        actual = results(on(device, flash_attn_func), rounded, dtype, return_attn_probs=True, **FEATURES[feature])
        numerics.check(actual, lambda: results(batched_reference, rounded, torch.float64, **FEATURES[feature]), weights=dtype)


def test_results_have_flash_attns_shapes():
    q, k = random(2, 3, 4, 8), random(2, 5, 2, 8)
    out, lse, probabilities = flash_attn_func(q, k, k, return_attn_probs=True)
    assert out.shape == (2, 3, 4, 8) and out.is_contiguous() and lse.shape == (2, 4, 3) and probabilities.numel() == 0
    assert isinstance(flash_attn_func(q, k, k), torch.Tensor)


def test_dropout():
    """Of values that are the identity, the result is the weights."""
    q, k = random(2, 64, 2, 64), random(2, 64, 2, 64, seed=1)
    identity = torch.eye(64).view(1, 64, 1, 64).expand(2, 64, 2, 64)
    weights, dropped = flash_attn_func(q, k, identity), flash_attn_func(q, k, identity, dropout_p=0.3)
    kept = dropped != 0
    assert abs(kept.float().mean() - 0.7) < 0.02
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.7)


def test_packed_arguments_are_the_same_unpacked():
    qkv, q, kv = random(2, 5, 3, 4, 8), random(2, 3, 4, 8), random(2, 5, 2, 2, 8)
    for packed, whole, parts in (
        (flash_attn_qkvpacked_func, (qkv,), qkv.unbind(2)),
        (flash_attn_kvpacked_func, (q, kv), (q, *kv.unbind(2))),
    ):
        for options in ({}, {"causal": True, "softcap": 2.0}, {"window_size": (1, 2), "softmax_scale": 0.2}):
            assert torch.equal(packed(*whole, **options), flash_attn_func(*parts, **options))
        ours, theirs = ([x.detach().requires_grad_() for x in tensors] for tensors in (whole, parts))
        packed(*ours).sin().sum().backward()
        flash_attn_func(*theirs).sin().sum().backward()
        stacked = torch.stack([x.grad for x in theirs[-len(parts) + len(whole) - 1 :]], dim=2)
        assert torch.equal(ours[-1].grad, stacked)
    cu, longest = torch.tensor([0, 4, 10], dtype=torch.int32), 6
    options = {"causal": True, "return_attn_probs": True}
    qkv, kv = qkv.flatten(0, 1), kv.flatten(0, 1)
    expected = flash_attn_varlen_func(*qkv.unbind(1), cu, cu, longest, longest, **options)
    assert all(map(torch.equal, flash_attn_varlen_qkvpacked_func(qkv, cu, longest, **options), expected))
    expected = flash_attn_varlen_func(qkv[:, 0], *kv.unbind(1), cu, cu, longest, longest, **options)
    actual = flash_attn_varlen_kvpacked_func(qkv[:, 0], kv, cu, cu, longest, longest, **options)
    assert all(map(torch.equal, actual, expected))


LENGTHS = [(4, 9, 1), (6, 9, 0)]  # of queries and keys of three sequences


def packed_inputs(lengths=LENGTHS):
    cu = [torch.tensor([0, *itertools.accumulate(column)], dtype=torch.int32) for column in lengths]
    totals = [sum(column) for column in lengths]
    tensors = random(totals[0], 4, 16), random(totals[1], 2, 16, seed=1), random(totals[1], 2, 16, seed=2)
    return tensors, (*cu, *map(max, lengths))


def packed_reference(q, k, v, cu_q, cu_k, max_seqlen_q, max_seqlen_k, alibi_slopes=None, **options):
    parts = [
        reference(q[q0:q1], k[k0:k1], v[k0:k1],
                  alibi_slopes=None if alibi_slopes is None else alibi_slopes.expand(3, -1)[b], **options)
        for b, (q0, q1, k0, k1) in enumerate(zip(cu_q, cu_q[1:], cu_k, cu_k[1:]))
    ]  # fmt: skip
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_varlen_parity(feature, dtype, device):
    tensors, packing = packed_inputs()
    rounded = [x.to(dtype) for x in tensors]

    def run(function, dtype, **options):
        return results(lambda *x: function(*x, *packing, **FEATURES[feature], **options), rounded, dtype)

    actual = run(on(device, flash_attn_varlen_func), dtype, return_attn_probs=True)
    numerics.check(actual, lambda: run(packed_reference, torch.float64), weights=dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("feature", FEATURES)
def test_rows_past_the_last_sequence(feature, device):
    """They see nothing and nothing sees them, whatever they hold, and their gradients are zero."""
    tensors, packing = packed_inputs()
    longer = [torch.cat([x, torch.full((3, *x.shape[1:]), torch.nan)]) for x in tensors]

    def run(tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        function = on(device, flash_attn_varlen_func)
        out, lse, _ = function(*leaves, *packing, return_attn_probs=True, **FEATURES[feature])
        (out.sin().sum() + lse[lse.isfinite()].sum()).backward()
        return out.detach(), lse.detach().T, *(x.grad for x in leaves)

    names = ("out", "lse", "dq", "dk", "dv")
    for name, actual, expected in zip(names, run(longer), run(tensors)):
        assert torch.equal(actual[:-3], expected), name
        assert (actual[-3:] == (-torch.inf if name == "lse" else 0.0)).all(), name


@pytest.mark.parametrize("integer", [np.int64, np.int32, torch.tensor, lambda n: torch.tensor([n], dtype=torch.int32)])
def test_integers_of_any_kind(integer):
    """Numbers from NumPy, tensors of one number, and lengths and tables in int64 are what they say."""
    (q, k, v), (cu_q, cu_k, max_seqlen_q, max_seqlen_k) = packed_inputs()
    expected = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_seqlen_q, max_seqlen_k, window_size=(3, 1))
    window = integer(3), integer(1)
    actual = flash_attn_varlen_func(
        q, k, v, cu_q.long(), cu_k.long(), integer(max_seqlen_q), integer(max_seqlen_k), window_size=window
    )
    assert torch.equal(actual, expected)
    q, cache, lengths, table = random(2, 1, 4, 16), random(8, 4, 2, 16), torch.tensor([5, 3]), torch.tensor([[1, 0], [4, 7]])
    expected = flash_attn_with_kvcache(
        q, cache, cache, cache_seqlens=lengths.int(), block_table=table.int(), window_size=(2, 0)
    )
    window = integer(2), integer(0)
    actual = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths, block_table=table, window_size=window)
    assert torch.equal(actual, expected)
    actual = flash_attn_with_kvcache(q, cache[:2], cache[:2], cache_seqlens=np.int64(3), cache_batch_idx=torch.tensor([1, 0]))
    assert torch.equal(actual, flash_attn_func(q, *(cache[[1, 0], :3],) * 2))


def paged(x, page, seed=0):
    """x (B, S, H, D) in pages of a pool in random order (num_pages, page, H, D), NaN where no token is, and the table."""
    B, S = x.shape[:2]
    pages = -(-S // page)
    table = torch.randperm(B * pages + 2, generator=torch.Generator().manual_seed(seed))[: B * pages].view(B, pages)
    pool = x.new_full((B * pages + 2, page, *x.shape[2:]), torch.nan)
    for b, i in itertools.product(range(B), range(pages)):
        rows = x[b, i * page : (i + 1) * page]
        pool[table[b, i], : len(rows)] = rows
    return pool, table.int()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("feature", FEATURES)
def test_varlen_parity_with_pages(feature, device):
    (q, k, v), packing = packed_inputs()
    cu_k, B, S = packing[1], 3, packing[3]
    dense = [torch.full((B, S, 2, 16), torch.nan) for _ in range(2)]
    for x, y in zip(dense, (k, v)):
        for b in range(B):
            x[b, : cu_k[b + 1] - cu_k[b]] = y[cu_k[b] : cu_k[b + 1]]
    (k_pool, table), (v_pool, _) = (paged(x, 4) for x in dense)
    actual = on(device, flash_attn_varlen_func)(
        q, k_pool, v_pool, *packing, block_table=table, return_attn_probs=True, **FEATURES[feature]
    )
    double = [x.double() for x in (q, k, v)]
    numerics.check(actual[:2], lambda: packed_reference(*double, *packing, **FEATURES[feature]))


# With a cache.


def rotated(x, positions, cos, sin, interleaved):
    """x (T, H, D) at positions (T,), in the precision of the operation: fp32, rounded once."""
    R = 2 * cos.shape[1]
    c, s = cos[positions].float().unsqueeze(1), sin[positions].float().unsqueeze(1)
    turning, rest = x[..., :R].float(), x[..., R:]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    a, b = a * c - b * s, b * c + a * s
    turned = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


class Cache:
    """Keys and values in one of the layouts, SENTINEL where nothing was stored; and a copy of it to follow by hand."""

    def __init__(self, layout, lengths, S, H_kv=2, D=16, dtype=torch.float32):
        B = len(lengths)
        self.arguments, self.lengths = {}, lengths
        self.rows = list(range(B))
        if layout == "paged":
            self.page, pages = 4, -(-S // 4)
            table = torch.randperm(B * pages + 1, generator=torch.Generator().manual_seed(1))[: B * pages].view(B, pages)
            self.arguments["block_table"] = self.table = table.int()
            shape = (B * pages + 1, 4, H_kv, D)
        else:
            shape = (B + 2, S, H_kv, D) if layout == "rows" else (B, S, H_kv, D)
            if layout == "rows":
                self.rows = [B + 1, 0, 2][:B]
                self.arguments["cache_batch_idx"] = torch.tensor(self.rows, dtype=torch.int32)
        self.tensors = [torch.full(shape, SENTINEL, dtype=dtype) for _ in range(2)]
        self.copies = [x.clone() for x in self.tensors]
        for b, length in enumerate(lengths):
            for p in range(length):
                for seed, pair in enumerate(zip(self.tensors, self.copies)):
                    for x in pair:
                        x[self.slot(b, p)] = random(H_kv, D, dtype=dtype, seed=100 * b + 10 * p + seed)

    def slot(self, b, p):
        if hasattr(self, "table"):
            return self.table[b, p // self.page].item(), p % self.page
        return self.rows[b], p

    def append(self, b, k, v):
        """By hand, to the copies."""
        for x, new in zip(self.copies, (k, v)):
            for t, token in enumerate(new):
                x[self.slot(b, self.lengths[b] + t)] = token

    def stored(self, b, length):
        return [torch.stack([x[self.slot(b, p)] for p in range(length)]) for x in self.copies]


CALLS_WITH_A_CACHE = [  # T, T_new, options
    (1, 1, {}),
    (1, 1, {"causal": True}),
    (3, 3, {"causal": True}),
    (3, 3, {}),
    (2, 4, {"causal": True}),
    (5, 2, {"window_size": (3, 1)}),
    (2, 0, {"causal": True}),
    (3, 3, {"causal": True, "window_size": (4, 0), "softcap": 2.0, "softmax_scale": 0.3}),
    (1, 1, {"alibi_slopes": slopes(3, 4)}),
    (2, 2, {"alibi_slopes": slopes(4), "causal": True}),
]


@pytest.mark.one_of(5)
@pytest.mark.parametrize("layout", ["rows in order", "rows", "paged"])
@pytest.mark.parametrize("call", CALLS_WITH_A_CACHE)
@pytest.mark.parametrize("rotation", [(0, True), (8, True), (8, False), (16, True), (16, False)])  # rotary, interleaved
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "kinds",
    [((torch.float32, False), (torch.bfloat16, True)), ((torch.float32, True), (torch.bfloat16, False))],
    ids=["plain fp32, padded bf16", "padded fp32, plain bf16"],
)
def test_with_a_cache(kinds, device, layout, call, rotation):
    (T, T_new, options), (rotary, interleaved) = call, rotation
    leftpad = torch.tensor([2, 0, 1], dtype=torch.int32)
    lengths, S = [5, 0, 9], 15
    for dtype, padded in kinds:
        cache = Cache(layout, lengths, S, dtype=dtype)
        q, k, v = (random(3, n, h, 16, dtype=dtype, seed=n + h) for n, h in ((T, 4), (T_new, 2), (T_new, 2)))
        if T_new == 0:
            rotary = 0  # angles come with new keys
        cos, sin = (random(S, rotary // 2, seed=i) for i in (5, 6)) if rotary else (None, None)
        new = {"k": k, "v": v, "rotary_cos": cos, "rotary_sin": sin} if T_new else {}
        tensors = [x.to(device) for x in cache.tensors]
        out, lse = on(device, flash_attn_with_kvcache)(
            q, *tensors, **new, cache_seqlens=torch.tensor(lengths, dtype=torch.int32), return_softmax_lse=True,
            cache_leftpad=leftpad if padded else None, rotary_interleaved=interleaved, **cache.arguments, **options,
        )  # fmt: skip
        local = options.get("causal", False) or "window_size" in options
        for b, length in enumerate(lengths):
            query, key = q[b], k[b]
            if rotary:
                steps = torch.arange(T) if local else torch.zeros(T, dtype=torch.int64)
                query = rotated(query, length + steps, cos, sin, interleaved)
                key = rotated(key, length + torch.arange(T_new), cos, sin, interleaved)
            cache.append(b, key, v[b])
            keys = cache.stored(b, length + T_new) if length + T_new else [k.new_zeros(0, 2, 16)] * 2
            given = options | {"first": leftpad[b] if padded else 0}
            if "alibi_slopes" in options:
                given["alibi_slopes"] = options["alibi_slopes"].expand(3, -1)[b]
            double = [x.double() for x in (query, *keys)]
            numerics.check((out[b], lse[b]), lambda: reference(*double, **given), weights=dtype, name=f"sequence {b}")
        for x, copy in zip(tensors, cache.copies):
            assert torch.equal(x.cpu(), copy)  # every slot of it


def test_a_cache_may_be_full_or_of_one_length():
    q, cache = random(2, 1, 4, 16), [random(2, 9, 2, 16, seed=i) for i in (1, 2)]
    expected = flash_attn_func(q, *cache)
    assert torch.equal(flash_attn_with_kvcache(q, *cache), expected)
    assert torch.equal(flash_attn_with_kvcache(q, *cache, cache_seqlens=9), expected)
    short = flash_attn_with_kvcache(q, *cache, cache_seqlens=4)
    torch.testing.assert_close(short, flash_attn_func(q, *(x[:, :4] for x in cache)))


def test_a_cache_has_no_gradients_and_is_not_copied():
    q = random(1, 1, 4, 16).requires_grad_()
    cache = [torch.zeros(1, 9, 4, 16) for _ in range(2)]
    addresses = [x.data_ptr() for x in cache]
    out = flash_attn_with_kvcache(q, *cache, q, q, cache_seqlens=3)
    assert not cache[0].requires_grad and [x.data_ptr() for x in cache] == addresses
    assert torch.equal(cache[0][0, 3], q[0, 0])
    with pytest.raises(RuntimeError, match="cache: expected no derivatives"):
        (out.sum() + q.sum()).backward()


INT = torch.int32
q1, cache1 = random(1, 1, 4, 16), random(1, 9, 2, 16)
new1 = {"k": cache1[:, :1], "v": cache1[:, :1]}
angles1 = {"rotary_cos": random(9, 8), "rotary_sin": random(9, 8)}
tensors1, packing1 = packed_inputs()
BAD = {
    "window": (flash_attn_func, (q1, cache1, cache1), {"window_size": (3,)}, ValueError, "window_size: expected two"),
    "window of floats": (flash_attn_func, (q1, cache1, cache1), {"window_size": (1.0, 2)}, TypeError, "window_size: expected an integer"),
    "window beyond every length": (
        flash_attn_func, (q1, cache1, cache1), {"window_size": (2**40, 2)}, ValueError, "window_size: expected an integer",
    ),
    "causal": (flash_attn_func, (q1, cache1, cache1), {"causal": "yes"}, TypeError, "causal: expected a bool"),
    "softcap": (flash_attn_func, (q1, cache1, cache1), {"softcap": "1"}, TypeError, "softcap: expected a finite number"),
    **{
        f"softcap {x}": (flash_attn_func, (q1, cache1, cache1), {"softcap": x}, ValueError, "softcap: expected 0 for none, or")
        for x in (1e-300, 1e-38, 1e39, -1.0)
    },
    "scale": (flash_attn_func, (q1, cache1, cache1), {"softmax_scale": float("nan")}, ValueError, "softmax_scale: expected"),
    "dropout": (flash_attn_func, (q1, cache1, cache1), {"dropout_p": None}, TypeError, "dropout_p: expected a finite number"),
    "slopes in a list": (flash_attn_func, (q1, cache1, cache1), {"alibi_slopes": [1.0]}, TypeError, "alibi_slopes: expected a"),
    "probabilities": (
        flash_attn_func, (q1, cache1, cache1), {"dropout_p": 0.1, "return_attn_probs": True}, ValueError,
        "return_attn_probs: expected False",
    ),
    "dimensions": (flash_attn_func, (q1[0], cache1, cache1), {}, ValueError, "q: expected 4"),
    "heads": (flash_attn_func, (q1[:, :, :3], cache1, cache1), {}, ValueError, "k: expected a number of heads"),
    "not a tensor": (flash_attn_func, (1, cache1, cache1), {}, TypeError, "q: expected a torch.Tensor"),
    "slopes": (flash_attn_func, (q1, cache1, cache1), {"alibi_slopes": slopes(2, 4)}, ValueError, "alibi_slopes"),
    "qkv": (flash_attn_qkvpacked_func, (random(2, 5, 2, 4, 8),), {}, ValueError, "qkv: expected 3"),
    "packing": (
        flash_attn_varlen_func, (*tensors1, packing1[0] + 1, *packing1[1:]), {"window_size": (1, 1)}, ValueError,
        "cu_seqlens_q: expected numbers that ascend from 0",
    ),
    "packing beyond the rows": (
        flash_attn_varlen_func, (tensors1[0][:-1], *tensors1[1:], *packing1), {}, ValueError,
        "cu_seqlens_q: expected numbers that ascend from 0 to at most",
    ),
    "packing of other numbers": (
        flash_attn_varlen_func, (*tensors1, packing1[0][:-1], *packing1[1:]), {}, ValueError, "cu_seqlens_k: expected shape",
    ),
    "no longest": (flash_attn_varlen_func, (*tensors1, *packing1[:2], None, 9), {}, TypeError, "max_seqlen_q: expected an"),
    "longest": (
        flash_attn_varlen_func, (*tensors1, *packing1[:3], 3), {"window_size": (1, 1)}, ValueError,
        "max_seqlen_k: expected at least 9",
    ),
    "lengths": (
        flash_attn_with_kvcache, (q1, cache1, cache1), {"cache_seqlens": torch.tensor([3, 4], dtype=INT)}, ValueError,
        "cache_seqlens: expected shape",
    ),
    "lengths in fp32": (
        flash_attn_with_kvcache, (q1, cache1, cache1), {"cache_seqlens": torch.tensor([3.0])}, TypeError, "cache_seqlens",
    ),
    "negative length": (
        flash_attn_with_kvcache, (q1, cache1, cache1), {"cache_seqlens": torch.tensor([-3])}, ValueError,
        "cache_seqlens: expected lengths >= 0, got -3",
    ),
    "more than there is": (
        flash_attn_with_kvcache, (q1, cache1, cache1), {"cache_seqlens": 10}, ValueError,
        "cache_seqlens: expected at most 9, the rows of the cache less 0 new ones, got 10",
    ),
    "more than the pages hold": (
        flash_attn_with_kvcache, (q1, cache1, cache1),
        {"cache_seqlens": 10, "block_table": torch.zeros(1, 1, dtype=INT)}, ValueError,
        "block_table: expected pages for 10 tokens and 0 new ones, got 9 slots",
    ),
    "no lengths": (flash_attn_with_kvcache, (q1, cache1, cache1), new1, ValueError, "cache_seqlens: expected with k"),
    "no values": (
        flash_attn_with_kvcache, (q1, cache1, cache1, cache1[:, :1]), {"cache_seqlens": 1}, ValueError,
        "v: expected with k",
    ),
    "no keys": (
        flash_attn_with_kvcache, (q1, cache1, cache1), angles1 | {"cache_seqlens": 1}, ValueError,
        "k: expected new keys with rotary_cos",
    ),
    "sines without keys": (
        flash_attn_with_kvcache, (q1, cache1, cache1), {"rotary_sin": random(9, 8), "cache_seqlens": 1}, ValueError,
        "k: expected new keys with rotary_sin",
    ),
    "wide angles": (
        flash_attn_with_kvcache, (q1, cache1, cache1),
        new1 | {"rotary_cos": random(9, 9), "rotary_sin": random(9, 9), "cache_seqlens": 1}, ValueError,
        r"rotary_cos: expected at most 8 columns, half of the head dim, got shape \(9, 9\)",
    ),
    "few angles": (
        flash_attn_with_kvcache, (q1, cache1, cache1),
        new1 | {"rotary_cos": random(3, 8), "rotary_sin": random(3, 8), "cache_seqlens": 3}, ValueError,
        "rotary_cos: expected more than 3 rows, the last position of k, got 3",
    ),
    "other sines": (
        flash_attn_with_kvcache, (q1, cache1, cache1),
        new1 | {"rotary_cos": random(9, 8), "rotary_sin": random(9, 4), "cache_seqlens": 3}, ValueError,
        r"rotary_sin: expected shape \(9, 8\) to match rotary_cos",
    ),
    "full": (
        flash_attn_with_kvcache, (q1, cache1, cache1), new1 | {"cache_seqlens": 9}, ValueError,
        "cache_seqlens: expected at most 8, the rows of the cache less 1 new ones, got 9",
    ),
    "angles": (
        flash_attn_with_kvcache, (random(1, 2, 4, 16), cache1, cache1),
        new1 | {"causal": True, "rotary_cos": random(4, 8), "rotary_sin": random(4, 8), "cache_seqlens": 3}, ValueError,
        "rotary_cos: expected more than 4 rows",
    ),
    "rows and pages": (
        flash_attn_with_kvcache, (q1, cache1, cache1),
        {"cache_batch_idx": torch.zeros(1, dtype=INT), "block_table": torch.zeros(1, 1, dtype=INT)}, ValueError,
        "cache_batch_idx: expected None",
    ),
    "no such row": (
        flash_attn_with_kvcache, (q1, cache1, cache1), {"cache_batch_idx": torch.ones(1, dtype=INT)}, ValueError,
        "cache_batch_idx: expected rows from 0 to 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    function, arguments, options, error, message = BAD[case]
    before = cache1.clone()
    with pytest.raises(error, match=f"^{message}"):
        function(*arguments, **options)
    assert torch.equal(cache1, before)


JUNK = [
    "x", None, [1], object(), 1.5, -3, 2**70, True, float("nan"), 1j, {}, (1, 2, 3), ("a", "b"), np.ones(3), torch.tensor(1.0),
    torch.zeros(0), torch.ones(2, 3), torch.ones(2, 3).to_sparse(), random(2, 5, 4, 16).to(torch.int8), random(2, 5, 4, 300),
    random(2, 5, 4, 16).double(), random(2, 5, 4, 16).to("meta"), torch.full((2,), 100, dtype=INT), torch.ones(5), random(1, 1, 1, 1, 1, 1),
    torch.zeros(2, 0, 4, 16), torch.tensor([7, 3, 0], dtype=INT), torch.nested.nested_tensor([random(2, 4, 16), random(3, 4, 16)]),
]  # fmt: skip
CALLS = {
    flash_attn_func: (random(2, 5, 4, 16), random(2, 9, 2, 16), random(2, 9, 2, 16)),
    flash_attn_kvpacked_func: (random(2, 5, 4, 16), random(2, 9, 2, 2, 16)),
    flash_attn_qkvpacked_func: (random(2, 5, 3, 4, 16),),
    flash_attn_varlen_func: (*tensors1, *packing1),
    flash_attn_varlen_kvpacked_func: (tensors1[0], torch.stack(tensors1[1:], 1), *packing1),
    flash_attn_varlen_qkvpacked_func: (random(11, 3, 4, 16), packing1[0], packing1[2]),
    flash_attn_with_kvcache: (
        random(2, 1, 4, 16), random(2, 9, 2, 16), random(2, 9, 2, 16), random(2, 1, 2, 16), random(2, 1, 2, 16), random(9, 8),
        random(9, 8), torch.tensor([3, 4], dtype=INT),
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_junk_in_any_argument(function):
    """Either the call makes sense, or an error begins with the name of an argument and nothing is written."""
    names = list(SIGNATURES[function.__name__])
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in CALLS[function]]
    refused = 0
    for name, junk in itertools.product(names, JUNK):
        arguments = [x.clone() if isinstance(x, torch.Tensor) else x for x in before]
        call = dict(zip(names, arguments)) | {name: junk}
        try:
            function(**call)
        except (TypeError, ValueError) as error:
            assert str(error).partition(":")[0] in names, (name, junk, error)
            assert all(not isinstance(x, torch.Tensor) or torch.equal(x, y) for x, y in zip(arguments, before)), (name, junk)
            refused += 1
    assert refused > len(names) * len(JUNK) / 3
