"""Attention of one query per sequence over a KV cache, compared with PyTorch's and other libraries' and with memory bandwidth.

KV caches are cold, as in a decoder, which reads all other layers and weights before a layer is used again: on a CPU each call
takes the next of several copies, together larger than its caches; on a GPU the L2 cache is flushed before each call.
"""

import itertools

import pytest
import torch

from benchmarks.attention_peers import check, peers
from benchmarks.timing import DEVICE, DTYPE, full, measured_time, name_of, reading, time_interleaved
from fastgpt import attention, attention_with_kv_cache, explain, kv_cache_update, rope_kv_cache_update
from fastgpt.bench.timing import cold, implementation
from fastgpt.ops.quantization import quantize

pytestmark = pytest.mark.benchmark(timer=measured_time)
PAGE = 16
HEADS = {"12heads": (12, 12, 64), "32heads-8share": (32, 4, 128)}  # H, H_kv, D
KINDS = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8,
    "fp8": torch.float8_e4m3fn, "paged": DTYPE,
}  # fmt: skip
BASE = name_of(DTYPE)
WITH_FLEX = "over 8,192 keys" if DEVICE == "cpu" else f"of one sequence over a {BASE} cache"
SLOW_TO_COMPILE = {"FlexAttention": f"it compiles for seconds: in the full set, or {WITH_FLEX}"}


def cases():
    """(keys, kind of cache, heads, batch)."""
    quick = [
        *((keys, BASE, "12heads", 1) for keys in (1024, 8192, 65536)),
        *((8192, kind, "12heads", 1) for kind in KINDS if kind not in (BASE, "float32")),
        *((8192, kind, "32heads-8share", 1) for kind in (BASE, "int8")),
        *((1024, kind, "12heads", 16) for kind in (BASE, "paged")),
    ]
    all_of_them = itertools.product((1024, 8192, 65536), KINDS, HEADS, (1, 16))
    chosen = [case for case in all_of_them if case[0] * case[3] <= 1 << 17] if full() else quick
    ids = [f"{keys}keys-{kind}-{heads}-batch{B}" for keys, kind, heads, B in chosen]
    return pytest.mark.parametrize("keys, kind, heads, B", chosen, ids=ids)


def example_of(kind, H, H_kv, D, keys, B):
    """The arguments of attention: q, and a cache of this kind."""
    torch.manual_seed(0)
    dtype = KINDS[kind] if KINDS[kind].itemsize > 1 else DTYPE
    example = {"q": torch.randn(B, H, 1, D, device=DEVICE).to(dtype)}
    table = torch.randperm(B * keys // PAGE, device=DEVICE).view(B, -1)
    for name in "kv":
        x = torch.randn(B, H_kv, keys, D, device=DEVICE).to(dtype)
        if kind == "paged":
            pages = x.view(B, H_kv, -1, PAGE, D).transpose(1, 2)  # (B, pages, H_kv, page, D)
            x = torch.empty_like(pages.flatten(0, 1))
            x[table] = pages
        if KINDS[kind].itemsize == 1:
            x, example[f"{name}_scale"] = quantize(x, KINDS[kind])
        example[name] = x
    return example | ({"block_table": table.int()} if kind == "paged" else {})


@cases()
@torch.inference_mode()
def test_decode(benchmark, keys, kind, heads, B):
    H, H_kv, D = HEADS[heads]
    example = example_of(kind, H, H_kv, D, keys, B)
    check(attention(**example), **example)
    compiles = full() or ((kind, B) == (BASE, 1) if DEVICE == "cuda" else (keys, kind) == (8192, BASE))
    others, absent = peers(attention, example, without=None if compiles else SLOW_TO_COMPILE)

    def over(cache, function):
        return lambda **copies: function(**copies[cache])

    inputs = [{"this": cache} for cache in cold(**example)]
    others = {name: over("this", function) for name, function in others.items()}
    if kind != BASE:
        contiguous = itertools.cycle(cold(**example_of(BASE, H, H_kv, D, keys, B)))
        inputs = [copy | {"contiguous": next(contiguous)} for copy in inputs]
        others[f"ours, {BASE}"] = over("contiguous", attention)
    time_interleaved(
        benchmark, over("this", attention), others, inputs=inputs, limit=reading(), flush=True,
        info={
            "what": "decode", "device": DEVICE, "kind": kind, "dtype": name_of(example["q"].dtype), "batch": B, "heads": H,
            "kv_heads": H_kv, "head_dim": D, "keys": keys, "bytes": sum(x.nbytes for x in example.values()),
            "implementation": implementation(explain(attention, **example)), "absent": absent,
        },
    )  # fmt: skip


@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU it is the two operations")
@pytest.mark.parametrize("rotated", (False, True) if full() else (True,), ids=lambda x: "rotated" if x else "not-rotated")
@cases()
@torch.inference_mode()
def test_step(benchmark, keys, kind, heads, B, rotated):
    """Stores the last key and attends, in one launch, compared with the update followed by attention."""
    H, H_kv, D = HEADS[heads]
    example = example_of(kind, H, H_kv, D, keys, B)
    q, *caches = (example.pop(name) for name in "qkv")
    k, v = (torch.randn(B, H_kv, 1, D, device=DEVICE).to(q.dtype) for _ in range(2))
    positions = torch.full((B, 1), keys - 1, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((B,), keys, dtype=torch.int32, device=DEVICE)
    counters = torch.zeros(B * H_kv * (1 + keys), dtype=torch.int32, device=DEVICE)
    angles = torch.arange(keys, device=DEVICE)[:, None] * 1e4 ** -(torch.arange(D // 2, device=DEVICE) / (D // 2))
    rotation = (angles.cos(), angles.sin()) if rotated else ()

    def fused(counters=counters):
        return attention_with_kv_cache(q, k, v, *caches, positions, *rotation, kv_lengths=lengths, counters=counters, **example)

    def unfused():
        if rotated:
            q_rotated = rope_kv_cache_update(q, k, v, *caches, positions, *rotation, **example)
        else:
            q_rotated = q
            kv_cache_update(k, v, *caches, positions, **example)
        return attention(q_rotated, *caches, kv_lengths=lengths, **example)

    torch.testing.assert_close(fused(), unfused(), atol=1e-2, rtol=1e-2)
    reasons = explain(attention_with_kv_cache, q, k, v, *caches, positions, *rotation, kv_lengths=lengths, **example)
    time_interleaved(
        benchmark, fused, {"update, then attention": unfused, "without counters": lambda: fused(None)}, limit=reading(), flush=True,
        info={
            "what": "step", "device": DEVICE, "kind": kind, "dtype": name_of(q.dtype), "batch": B, "heads": H, "kv_heads": H_kv,
            "head_dim": D, "keys": keys, "rotated": rotated, "implementation": implementation(reasons), "absent": {},
            "bytes": sum(x.nbytes for x in (q, k, v, *caches, *example.values())),
        },
    )  # fmt: skip
