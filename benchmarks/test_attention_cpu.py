"""Attention on the CPU against scaled_dot_product_attention, and against what the machine can do: a large matrix product
and reading memory, timed in the same rounds."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.timing import in_turns
from fastgpt import attention, attention_reference
from fastgpt.ops.quantisation import quantise

H, D = 12, 64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def matrix_product():
    """The matrix rate: name -> function, and its FLOPs."""
    a, b = torch.randn(2, 1536, 1536)
    return {"matrix product": lambda: a @ b}, {"limit_flops": 2 * 1536**3}


@pytest.fixture(scope="module")
def reading():
    """The read bandwidth: name -> function, and its bytes."""
    x = torch.ones(128 << 20)
    return {"reading": lambda: x.sum()}, {"limit_bytes": x.nbytes}


def inputs(T, S, heads=H, kv_heads=H, head_dim=D):
    return (torch.randn(1, n, tokens, head_dim) for n, tokens in ((heads, T), (kv_heads, S), (kv_heads, S)))


def check(actual, expected):
    """Equality before timing."""
    rtol = max(1e-4, torch.finfo(actual.dtype).eps)
    torch.testing.assert_close(actual.float(), expected.float(), atol=2e-5, rtol=rtol)


@pytest.mark.parametrize(
    "T, dtype", [*((T, torch.float32) for T in (128, 512, 2048, 8192)), (2048, torch.float16), (2048, torch.bfloat16)]
)
def test_prefill(benchmark, matrix_product, T, dtype):
    q, k, v = (x.to(dtype) for x in inputs(T, T))
    what = "prefill" if dtype == torch.float32 else "prefill of 16 bits"

    def sdpa():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    if dtype == torch.float32:
        check(attention(q, k, v), sdpa())
    else:  # both round; ours errs no more than twice as much
        exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        assert (attention(q, k, v) - exact).abs().max() <= 2 * (sdpa() - exact).abs().max()
    limit, info = matrix_product
    with torch.inference_mode():
        in_turns(
            benchmark, lambda: attention(q, k, v), {"SDPA": sdpa}, limits=limit,
            rounds=21 if T < 8192 else 7, calls=max(1, 2048 // T),
            what=what, T=T, dtype=str(dtype).removeprefix("torch."), flops=2 * H * T * T * D, **info,
        )  # fmt: skip


def test_forward_and_backward(benchmark, matrix_product):
    """The FLOPs of the backward pass are 2.5 times those of the forward pass."""
    T = 2048
    leaves = [x.requires_grad_() for x in inputs(T, T)]
    dout = torch.randn(1, H, T, D)

    def gradients(out):
        return torch.autograd.grad(out, leaves, dout)

    def ours():
        return gradients(attention(*leaves))

    def sdpa():
        return gradients(F.scaled_dot_product_attention(*leaves, is_causal=True))

    for actual, expected in zip(ours(), sdpa(), strict=True):
        check(actual, expected)
    limit, info = matrix_product
    in_turns(
        benchmark, ours, {"SDPA": sdpa}, limits=limit, rounds=11,
        what="forward and backward", T=T, flops=7 * H * T * T * D, **info,
    )  # fmt: skip


def test_window(benchmark, matrix_product):
    T, window = 8192, 1024
    q, k, v = inputs(T, T)
    behind = torch.arange(T)[:, None] - torch.arange(T)
    mask = (behind >= 0) & (behind < window)

    def sdpa():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    check(attention(q, k, v, window=window), sdpa())
    limit, info = matrix_product
    with torch.inference_mode():
        in_turns(
            benchmark, lambda: attention(q, k, v, window=window), {"SDPA": sdpa}, limits=limit, rounds=5,
            what="window", T=T, window=window, flops=4 * H * int(mask.sum()) * D, **info,
        )  # fmt: skip


HEADS = {"12 heads of 64": (12, 12, 64), "32 heads of 128, 8 share": (32, 4, 128)}


@pytest.mark.parametrize("heads, keys", [*((next(iter(HEADS)), keys) for keys in (1024, 8192, 65536)), ([*HEADS][1], 8192)])
def test_decode(benchmark, reading, heads, keys):
    """One query; the bytes are those of the keys and values."""
    q, k, v = inputs(1, keys, *HEADS[heads])

    def sdpa():
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] > k.shape[1])

    check(attention(q, k, v), sdpa())
    limit, info = reading
    with torch.inference_mode():
        in_turns(
            benchmark, lambda: attention(q, k, v), {"SDPA": sdpa}, limits=limit,
            rounds=21, calls=max(1, 16384 // keys),
            what="decode", heads=heads, keys=keys, bytes=2 * k.nbytes, **info,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int8", "float8_e4m3fn", "pages of 16"])
def test_cache(benchmark, reading, kind):
    """Decoding over 65,536 keys as a cache may hold them, against contiguous fp32."""
    keys, page = 65536, 16
    q, k, v = inputs(1, keys)
    dtype = getattr(torch, kind, torch.float32)
    options = {}
    if kind.startswith("pages"):
        pages = keys // page
        table = torch.randperm(pages)
        held = [q]
        for x in (k, v):
            pool = torch.empty(pages, H, page, D)
            pool[table] = x.view(H, pages, page, D).transpose(0, 1)
            held.append(pool)
        options["block_table"] = table.int()[None]
    elif dtype.itemsize == 1:
        (k8, options["k_scale"]), (v8, options["v_scale"]) = quantise(k, dtype), quantise(v, dtype)
        held = [q, k8, v8]
    else:
        held = [x.to(dtype) for x in (q, k, v)]
    expected = attention_reference(*(x.float() if dtype.itemsize == 2 else x for x in held), **options)
    check(attention(*held, **options), expected.to(held[0].dtype))
    limit, info = reading
    with torch.inference_mode():
        in_turns(
            benchmark, lambda: attention(*held, **options), {"fp32": lambda: attention(q, k, v)}, limits=limit, rounds=15,
            what="cache", kind=kind, keys=keys, bytes=sum(x.nbytes for x in (*held[1:], *options.values())), **info,
        )  # fmt: skip
