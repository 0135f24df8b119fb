"""Attention against PyTorch's: scaled_dot_product_attention, every backend that the device has, and FlexAttention.

Prefill forward, forward and backward, and decode over a cache, on a GPU. test_attention_cpu.py is for the CPU.
"""

import contextlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import in_turns
from fastgpt import attention, attention_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE, DTYPE = "cuda", torch.bfloat16
BATCH, HEADS = 4, 16
LENGTHS = [2048, 4096, 8192, 16384]
HEAD_DIMS = [64, 128]
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def inputs(B, H, H_kv, T, S, D):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(heads, tokens):
        return torch.randn(B, heads, tokens, D, generator=generator, device=DEVICE).to(DTYPE)

    return random(H, T), random(H_kv, S), random(H_kv, S)


def within(backend, function):
    with sdpa_kernel(backend):
        return function()


def peers(q, k, v, causal):
    """name -> a function of nothing that returns what PyTorch computes, for what can serve this call."""
    grouped = q.shape[1] != k.shape[1]
    sdpa = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=grouped)
    result = {}
    for backend in BACKENDS:
        with contextlib.suppress(RuntimeError):
            within(backend, sdpa)
            result[f"SDPA, {backend.name.removesuffix('_ATTENTION').lower()}"] = partial(within, backend, sdpa)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention)
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=DEVICE)
    with contextlib.suppress(Exception):  # whatever keeps it from compiling is not our figure
        flex(q, k, v, block_mask=mask, enable_gqa=grouped)
        result["FlexAttention"] = partial(flex, q, k, v, block_mask=mask, enable_gqa=grouped)
    return result


def check(q, k, v, causal):
    """Equality before timing, where the reference's scores fit into memory."""
    tail = q[:1, :, -512:]
    expected = attention_reference(tail.float(), k[:1].float(), v[:1].float(), causal=causal)
    out = attention(q, k, v, causal=causal)[:1, :, -512:]
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)


def flops(q, k, causal):
    B, H, T, D = q.shape
    return 4 * B * H * T * k.shape[2] * D / (2 if causal else 1)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_prefill(benchmark, D, T):
    q, k, v = inputs(BATCH, HEADS, HEADS, T, T, D)
    check(q, k, v, True)
    with torch.inference_mode():
        in_turns(
            benchmark, lambda: attention(q, k, v), peers(q, k, v, True), rounds=20,
            what="prefill", D=D, T=T, flops=flops(q, k, True),
        )  # fmt: skip


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_backward(benchmark, D, T):
    """The backward pass alone; FLOPs are 2.5 times those of the forward pass."""
    q, k, v = (x.requires_grad_() for x in inputs(BATCH, HEADS, HEADS, T, T, D))
    dout = torch.randn_like(q)

    def backward_of(out):
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    others = {name: backward_of(function()) for name, function in peers(q, k, v, True).items()}
    in_turns(
        benchmark, backward_of(attention(q, k, v)), others, rounds=20,
        what="backward", D=D, T=T, flops=2.5 * flops(q, k, True),
    )  # fmt: skip


DECODE = {"multi-head": (12, 12, 64), "8 heads share": (32, 4, 128)}


@pytest.mark.parametrize("keys", [1024, 8192, 65536])
@pytest.mark.parametrize("heads", DECODE)
def test_decode(benchmark, heads, keys):
    """One query a sequence; the bytes are those of the keys and values."""
    H, H_kv, D = DECODE[heads]
    q, k, v = inputs(8, H, H_kv, 1, keys, D)
    check(q, k, v, False)
    with torch.inference_mode():
        target = torch.empty_like(k)
        others = {**peers(q, k, v, False), "copying the keys": lambda: target.copy_(k)}  # as many bytes in and out
        in_turns(
            benchmark, lambda: attention(q, k, v), others, rounds=30,
            what="decode", heads=heads, keys=keys, bytes=2 * k.nbytes,
        )  # fmt: skip
