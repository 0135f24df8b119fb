"""Values with another head dim than keys, as in MLA: the reference compared with PyTorch, caches, and integrations. Parity of the
kernels is in test_attention.py and test_kv_cache_update.py."""

import pytest
import torch
import torch.nn.functional as F
from cache_updates import angles, differing, on
from torch.nn.functional import scaled_dot_product_attention as pytorchs

import fastgpt
from fastgpt import attention, attention_reference, attention_with_kv_cache, kv_cache_update, rope_kv_cache_update
from fastgpt.cache.contiguous import ContiguousCache
from fastgpt.cache.paged import PagedCache, PagePool
from fastgpt.cache.sliding import SlidingCache
from fastgpt.cache.storage import Storage
from fastgpt.cache.uncached import Uncached
from fastgpt.integrations import flash_provider
from fastgpt.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from fastgpt.integrations.sdpa import enabled, scaled_dot_product_attention
from fastgpt.ops.kv_cache_update import kv_cache_update_reference, rope_kv_cache_update_reference
from fastgpt.ops.quantization import dequantize, quantize
from fastgpt.testing import check_attention, numerics
from fastgpt.testing.attention_features import inputs, options

HEAD_DIMS = [(192, 128), (576, 512), (7, 5), (72, 40), (3, 257), (16, 24)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CACHE_DTYPES = [None, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("causal, T, S", [(True, 9, 9), (False, 1, 9), (False, 5, 3)])
@pytest.mark.parametrize("D", HEAD_DIMS, ids=str)
def test_reference_is_pytorchs(D, causal, T, S):
    """In float64, with gradients."""
    tensors = [x.requires_grad_() for x in inputs(2, 4, 2, T, S, D, torch.float64)]
    ours = attention_reference(*tensors, causal=causal)
    theirs = pytorchs(*tensors, is_causal=causal, enable_gqa=True)
    dout = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, tensors, dout), torch.autograd.grad(theirs, tensors, dout))


@pytest.mark.parametrize(
    "feature, D, dtype", [("plain", (192, 128), torch.bfloat16), ("everything", (24, 40), torch.float32)], ids=str
)
def test_public_operation(feature, D, dtype):
    check_attention(attention, feature, shape=(1, 4, 2, 20, 33, D), dtype=dtype)


def test_the_check_finds_swapped_values():
    def swapped(q, k, v):
        return attention(q, k, torch.cat([v[..., 1:], v[..., :1]], -1))

    with pytest.raises(AssertionError, match="plain, torch.float32: out"):
        check_attention(swapped, shape=(1, 2, 2, 20, 33, (24, 40)))


def test_shapes():
    q, k, v = inputs(2, 4, 2, 3, 5, (16, 24), torch.float32)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    starts = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    for impl in (None, "cpp", "reference"):
        out, lse = attention(q, k, v, return_lse=True, impl=impl)
        assert out.shape == (2, 4, 3, 24) and lse.shape == (2, 4, 3)
        out, lse = fastgpt.attention_varlen(*packed, *starts, 3, 5, return_lse=True, impl=impl)
        assert out.shape == (3, 4, 24) and lse.shape == (4, 3)


def test_what_triton_does_not_take():
    """It says so of the head dims; a named implementation raises, and operators for CUDA do before anything is launched."""
    from fastgpt.ops.attention.checks import triton_refuses_head_dims
    from fastgpt.ops.attention.operators import attention_forward_triton

    for D, D_v in ((16, 24), (300, 300)):
        call = inputs(1, 2, 2, 3, 5, (D, D_v), torch.float32)
        if (reason := triton_refuses_head_dims(call[0], call[2], False)) is None:
            continue
        assert str(D) in reason
        with pytest.raises(ValueError, match="^v: expected a head dim that the Triton kernels support"):
            attention_forward_triton(*call, True, 0.25)


# Updates


def update(D, page, cache_dtype, dtype=torch.float32, B=2, H_kv=2, T=3, S=11):
    """Arguments of kv_cache_update."""
    _, k, v = inputs(B, H_kv, H_kv, 1, T, D, dtype)
    first, rows = (B, S) if page is None else (B * -(-S // page), page)
    arguments = {"k": k, "v": v, "positions": torch.tensor([[0, 5, 9], [3, 4, -1]])}
    for name, size in zip(("k", "v"), D):
        arguments[f"{name}_cache"] = torch.zeros(first, H_kv, rows, size, dtype=cache_dtype or dtype)
        if cache_dtype is not None:
            arguments[f"{name}_scale"] = torch.zeros(first, H_kv, rows)
    if page is not None:
        arguments["block_table"] = torch.randperm(first).view(B, -1).int()
    return arguments


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("D", [(192, 128), (8, 24), (7, 1100)], ids=str)
def test_updates_are_the_references_bits(D, page, cache_dtype):
    if cache_dtype is not None and max(D) > 1024:
        pytest.skip("more than 8 bits take")
    actual = update(D, page, cache_dtype)
    expected = on("cpu", actual)
    kv_cache_update(**actual, impl="cpp")
    kv_cache_update_reference(**expected)
    assert not differing(actual, expected) and actual["v_cache"].any()
    cos, sin = angles(20, D[0] // 2)
    q, actual = torch.randn(2, 4, 3, D[0]), update(D, page, cache_dtype)
    expected = on("cpu", actual)
    rotated = rope_kv_cache_update(q, **actual, cos=cos, sin=sin, impl="cpp")
    assert torch.equal(rotated, rope_kv_cache_update_reference(q, **expected, cos=cos, sin=sin))
    assert not differing(actual, expected)


def test_updates_of_interleaved_caches():
    """Rows of keys and values side by side in memory are apart; where they overlap, nothing is written."""
    for D, D_v, first, fits in ((8, 24, 8, True), (24, 8, 24, True), (24, 8, 8, False), (8, 24, 4, False), (8, 8, 12, True)):
        k, v = torch.ones(1, 2, 3, D), torch.ones(1, 2, 3, D_v)
        both = torch.zeros(1, 2, 3, 40)
        k_cache, v_cache = both[..., :D], both[..., first : first + D_v]
        if fits:
            kv_cache_update(k, v, k_cache, v_cache, torch.arange(3).view(1, 3), impl="cpp")
            assert both.sum() == 6 * (D + D_v)
        else:
            with pytest.raises(ValueError, match="v_cache: expected memory apart from that of k_cache"):
                kv_cache_update(k, v, k_cache, v_cache, torch.arange(3).view(1, 3), impl="cpp")
            assert not both.any()


BAD_UPDATES = {
    "v_cache": ({"v_cache": torch.zeros(2, 2, 11, 8)}, r"v_cache: expected shape \(2, 2, 11, 24\) \(B, H_kv, S, D_v\)"),
    "k_cache": ({"k_cache": torch.zeros(2, 2, 11, 24)}, r"k_cache: expected shape \(2, 2, 11, 8\) \(B, H_kv, S, D\)"),
    "v": ({"v": torch.zeros(2, 2, 4, 24)}, r"v: expected shape \(2, 2, 3, 24\) \(B, H_kv, T, D_v\) to match k"),
}


@pytest.mark.parametrize("case", BAD_UPDATES)
@pytest.mark.parametrize("operation", [kv_cache_update, kv_cache_update_reference])
def test_errors_of_updates(operation, case):
    changed, message = BAD_UPDATES[case]
    call = update((8, 24), None, None) | changed
    with pytest.raises(ValueError, match=f"^{message}"):
        operation(**call)
    assert not any(call[name].any() for name in ("k_cache", "v_cache"))


def test_head_dims_of_8_bit_caches():
    with pytest.raises(ValueError, match="^v: expected a head dim from 1 to 1024 for a cache of torch.int8, got 1100"):
        kv_cache_update(**update((8, 1100), None, torch.int8))
    with pytest.raises(ValueError, match="^v: expected a head dim from 1 to 1024 for a cache of torch.int8, got 0"):
        kv_cache_update(**update((8, 0), None, torch.int8))


@pytest.mark.slow
def test_registrations():
    """opcheck: fake kernels, mutation and schemas."""
    call = update((8, 24), 4, torch.int8)
    tensors = [call.pop(name) for name in ("k", "v", "k_cache", "v_cache", "positions")]
    q = torch.randn(2, 4, 3, 8)
    torch.library.opcheck(torch.ops.fastgpt.kv_cache_update.default, tuple(tensors), call)
    torch.library.opcheck(torch.ops.fastgpt.rope_kv_cache_update.default, (q, *tensors, *angles(20, 4)), call)
    arguments = q, *tensors, None, True, 0.35
    torch.library.opcheck(torch.ops.fastgpt.attention_with_kv_cache.default, arguments, call)


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("D", [(192, 128), (8, 24)], ids=str)
def test_attention_with_kv_cache(D, page, cache_dtype, rotation):
    lengths = torch.tensor([10, 5], dtype=torch.int32)
    call = update(D, page, cache_dtype) | {"q": torch.randn(2, 4, 3, D[0]), "kv_lengths": lengths}
    call |= {"window": 6, "sinks": torch.randn(4), "return_lse": True}
    if rotation:
        call |= dict(zip(("cos", "sin"), angles(20, D[0] // 2)))
    expected = on("cpu", call)
    actual = attention_with_kv_cache(**call)
    assert actual[0].shape == (2, 4, 3, D[1])
    q = call["q"]
    names = ("block_table", "k_scale", "v_scale")
    stored = {name: expected[name] for name in ("k", "v", "k_cache", "v_cache", "positions", *names) if name in expected}
    if rotation:
        q = rope_kv_cache_update_reference(q, **stored, cos=call["cos"], sin=call["sin"])
    else:
        kv_cache_update_reference(**stored)
    assert not differing(call, expected)
    caches = [x if x.itemsize == 1 else x.double() for x in (expected["k_cache"], expected["v_cache"])]
    reading = {name: expected[name] for name in ("kv_lengths", "window", "sinks", "return_lse", *names) if name in expected}
    numerics.check(actual, lambda: attention_reference(q.double(), *caches, **reading))


@pytest.mark.slow
def test_compiled_attention_with_kv_cache():
    call = update((8, 24), 4, torch.int8) | {"q": torch.randn(2, 4, 3, 8), "return_lse": True}
    call |= dict(zip(("cos", "sin"), angles(20, 4)))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(call):
        return attention_with_kv_cache(**call)

    assert all(map(torch.equal, compiled(call), attention_with_kv_cache(**call)))


# Caches

KINDS = ["contiguous", "sliding", "paged"]
WINDOW = 9


def new_cache(kind, D, cache_dtype, B=2):
    storage = {"num_layers": 2, "num_kv_heads": 2, "head_dim": D[0], "v_head_dim": D[1], "cache_dtype": cache_dtype}
    if kind == "contiguous":
        return ContiguousCache(batch_size=B, capacity=40, window=WINDOW, **storage)
    if kind == "sliding":
        return SlidingCache(batch_size=B, window=WINDOW, **storage)
    return PagedCache(PagePool(num_pages=40, page_size=4, **storage), batch_size=B, capacity=40, window=WINDOW)


@torch.no_grad()
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [(24, 16), (8, 40)], ids=str)
def test_caches(D, kind, cache_dtype):
    """Pieces of several tokens and single ones: each attends as over all tokens so far; a fork goes on as its original."""
    cache, B, H = new_cache(kind, D, cache_dtype), 2, 4
    q, k, v = inputs(B, H, 2, 30, 30, D, torch.float32)
    kept = (k, v) if cache_dtype is None else [dequantize(*quantize(x, cache_dtype)) for x in (k, v)]

    def attended(cache, first, last):
        cache.extend(last - first)
        new = [x[:, :, first:last] for x in (q, k, v)]
        return cache.attend(1, *new)

    done = 0
    for count in (5, 1, 1, 7, 1, 12, 1):
        first, done = done, done + count
        out = attended(cache, first, done)
        exact = q[:, :, first:done].double(), *(x[:, :, :done].double() for x in kept)
        numerics.check(out, lambda exact=exact: attention_reference(*exact, window=WINDOW))
    assert out.shape == (B, H, 1, D[1])
    forked = cache.fork(1)
    assert torch.equal(attended(forked, 28, 29), attended(cache, 28, 29))
    assert cache.attend_waits(H, torch.float32) is None or not q.is_cuda


def test_storage_of_each():
    k, v = torch.zeros(3, 2, 4, 10, 16), torch.zeros(3, 2, 4, 10, 24)
    storage = Storage(2, 10, num_layers=3, num_kv_heads=4, head_dim=16, v_head_dim=24)
    assert storage.k.shape == k.shape and storage.v.shape == v.shape and storage.nbytes == k.nbytes + v.nbytes
    storage = Storage(2, 10, num_layers=3, num_kv_heads=4, head_dim=16, v_head_dim=24, cache_dtype=torch.int8)
    assert storage.k_scale.shape == storage.v_scale.shape == (3, 2, 4, 10)
    assert Storage(2, 10, num_layers=3, num_kv_heads=4, head_dim=16).v.shape == k.shape


def test_a_model_refuses_a_cache_of_other_values():
    from models import random_ids, random_model

    model = random_model(layers=2, heads=2, width=16)
    cache = ContiguousCache(batch_size=1, capacity=20, num_layers=2, num_kv_heads=2, head_dim=8, v_head_dim=16)
    with pytest.raises(
        ValueError, match="^cache: expected 2 layers of .* got 2 layers of 2 KV heads of head dim 8 \\(values: 16\\)"
    ):
        model(random_ids(model, 1, 3), cache=cache)


def test_without_a_cache():
    q, k, v = inputs(1, 4, 2, 6, 6, (16, 24), torch.float32)
    uncached = Uncached(3)
    uncached.extend(6)
    assert torch.equal(uncached.attend(0, q, k, v), attention(q, k, v, window=3))


# Drop-ins


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("D", [(192, 128), (576, 512), (24, 40)], ids=str)
def test_sdpa_is_served(D, T, dtype):
    """By the function and by PyTorch's own while it is switched on, with fewer heads of keys."""
    tensors = inputs(1, 4, 1, T, 20, D, dtype)
    call = {"is_causal": T > 1, "enable_gqa": True}
    explained = fastgpt.explain(scaled_dot_product_attention, *tensors, **call)
    assert explained["cpp"] == "chosen"
    with enabled():
        switched = pytorchs(*tensors, **call)
    expected = pytorchs(*tensors, **call)
    for out in (scaled_dot_product_attention(*tensors, **call), switched):
        assert out.is_contiguous() and out.shape == expected.shape
        double = [x.double() for x in tensors]
        numerics.check(out, lambda: pytorchs(*double, **call), weights=dtype)
    options = {"causal": T > 1, "scale": D[0] ** -0.5}
    assert torch.equal(switched, attention(*tensors, impl="cpp", **options))


FLASH = {
    "plain": {}, "causal": {"causal": True}, "to the right": {"window_size": (3, 2)},
    "alibi": {"alibi_slopes": torch.rand(2, 4)},
}  # fmt: skip


@pytest.mark.parametrize("feature", FLASH)
def test_flash_attn(feature):
    """Values of more and of fewer numbers are the parts of wider ones; of packed sequences and with a cache, too."""
    q, k, v = (x.transpose(1, 2) for x in inputs(2, 4, 2, 7, 9, (16, 40), torch.float32))
    options = FLASH[feature]
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    assert out.shape == (2, 7, 4, 40) and out.is_contiguous()
    parts = v.split([16, 16, 8], dim=-1)
    of_parts = [flash_attn_func(q, k, F.pad(x, (0, 16 - x.shape[-1])), **options)[..., : x.shape[-1]] for x in parts]
    torch.testing.assert_close(out, torch.cat(of_parts, dim=-1))
    starts = [torch.arange(3, dtype=torch.int32) * T for T in (7, 9)]
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    packed = flash_attn_varlen_func(*flat, *starts, 7, 9, return_attn_probs=True, **options)
    assert packed[0].shape == (14, 4, 40)
    torch.testing.assert_close(packed[0], out.flatten(0, 1))
    # Pages of three tokens, of which the last holds what is appended.
    pools = [torch.zeros(6, 3, 2, x.shape[-1]) for x in (k, v)]
    table = torch.tensor([[3, 0, 5], [1, 4, 2]], dtype=torch.int32)
    for pool, x in zip(pools, (k, v)):
        pool[table.flatten()] = x.reshape(6, 3, 2, -1)
        pool[table[:, 2]] = -77.0
    new = (x[:, 6:] for x in (k, v))
    cached = options | {"cache_seqlens": 6, "block_table": table, "return_softmax_lse": True}
    torch.testing.assert_close(flash_attn_with_kvcache(q, *pools, *new, **cached), (out, lse))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    flash_attn_func(*leaves, **options).sin().sum().backward()
    assert [x.grad.shape for x in leaves] == [x.shape for x in (q, k, v)]


def test_errors_of_flash_attn_with_a_cache():
    q, k_cache, v_cache, k, v = (torch.zeros(1, n, 2, D) for n, D in ((1, 8), (5, 8), (5, 600), (1, 8), (1, 600)))
    with pytest.raises(ValueError, match="^v_cache: expected a head dim from 1 to 576, got 600"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=2)
    with pytest.raises(ValueError, match=r"^v_cache: expected shape \(1, 2, 5, 16\)"):
        flash_attn_with_kvcache(q, k_cache, torch.zeros(1, 5, 2, 24), k, torch.zeros(1, 1, 2, 16), cache_seqlens=2)


def test_flash_provider():
    """PyTorch's operators, with gradients."""
    handle = flash_provider.register("CPU")
    try:
        tensors = [x.requires_grad_() for x in inputs(2, 4, 4, 6, 6, (16, 24), torch.float32)]
        dout = torch.randn(2, 4, 6, 24)

        def gradients(function):
            out = function(*tensors)
            return out.detach(), *torch.autograd.grad(out, tensors, dout)

        operator = torch.ops.aten._scaled_dot_product_flash_attention
        torch.testing.assert_close(gradients(lambda *x: operator(*x, 0.0, True)[0]), gradients(attention))
        q, k, v = (x.detach().transpose(1, 2).flatten(0, 1) for x in tensors)
        starts = torch.tensor([0, 6, 12], dtype=torch.int32)
        out = torch.ops.aten._flash_attention_forward(q, k, v, starts, starts, 6, 6, 0.0, True, False)[0]
        torch.testing.assert_close(out, attention(*tensors).transpose(1, 2).flatten(0, 1))
    finally:
        handle.remove()


def test_compiled_sdpa():
    leaves = [x.requires_grad_() for x in inputs(2, 4, 4, 5, 9, (16, 24), torch.float32)]
    mask = options("mask", 2, 4, 5, 9, torch.float32)["mask"]
    mask[..., 0] = True  # for a row that sees no key, PyTorch has NaN
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(pytorchs(*leaves, mask).sin().sum(), leaves)
    for function in (compiled, scaled_dot_product_attention):
        torch.testing.assert_close(torch.autograd.grad(function(*leaves, mask).sin().sum(), leaves), expected)
