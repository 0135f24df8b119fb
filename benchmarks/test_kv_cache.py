"""The cache update against its reference, against copying the same bytes, and against transformers' caches; and the
memory and the decode step of each kind of cache."""

import random

import pytest
import torch

from benchmarks.timing import in_turns
from fastgpt import (
    ContiguousCache,
    PagedCache,
    PagePool,
    SlidingCache,
    kv_cache_update,
    kv_cache_update_reference,
    rope_kv_cache_update,
    rope_kv_cache_update_reference,
)
from fastgpt.ops.kv_cache_update import rope_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
H, D = 12, 64
CONTEXT, CAPACITY = 1000, 1024  # tokens that the cache holds before the step, and has room for


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def new_tokens(B, T, layout="token-major"):
    """q, k or v as a decoder's projection leaves them (token-major), or contiguous (head-major)."""
    if layout == "token-major":
        return torch.randn(B, T, H, D, device=DEVICE).to(DTYPE).transpose(1, 2)
    return torch.randn(B, H, T, D, device=DEVICE).to(DTYPE)


def rotation(positions):
    angles = torch.arange(positions)[:, None] * 10000.0 ** -(torch.arange(D // 2) / (D // 2))
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


@pytest.mark.parametrize("B", [1, 32])
def test_one_token(benchmark, B):
    """Storing one token a sequence: ours, PyTorch's ways, and what transformers' caches do."""
    transformers = pytest.importorskip("transformers")
    k, v = new_tokens(B, 1), new_tokens(B, 1)
    caches = torch.zeros(2, B, H, CAPACITY, D, device=DEVICE, dtype=DTYPE)
    positions = torch.full((B, 1), CONTEXT, dtype=torch.int32, device=DEVICE)
    expected = caches.clone()
    kv_cache_update(k, v, *caches, positions)
    kv_cache_update_reference(k, v, *expected, positions)
    assert torch.equal(caches, expected)

    index = torch.tensor([CONTEXT], device=DEVICE)  # one for the whole batch

    def index_copy():
        caches[0].index_copy_(2, index, k)
        caches[1].index_copy_(2, index, v)

    config = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=H * D, num_attention_heads=H)
    static = transformers.StaticCache(config=config, max_cache_len=CAPACITY + 32)
    static.update(k, v, 0)

    def rewind_static():
        static.layers[0].cumulative_length.fill_(CONTEXT)

    past = torch.randn(2, B, H, CONTEXT, D, device=DEVICE).to(DTYPE)

    def dynamic_cache():
        cache = transformers.DynamicCache()
        cache.update(*past, 0)
        return cache

    in_turns(
        benchmark,
        lambda: kv_cache_update(k, v, *caches, positions),
        {
            "transformers dynamic": lambda cache: cache.update(k, v, 0),  # first: it sweeps the CPU's caches
            "transformers static": lambda: static.update(k, v, 0),
            "reference": lambda: kv_cache_update_reference(k, v, *caches, positions),
            "index_copy_": index_copy,
        },
        prepare={"transformers static": rewind_static, "transformers dynamic": dynamic_cache},
        rounds=60 if B > 1 else 200,
        calls=20,
        what="one token",
        B=B,
    )


@pytest.mark.parametrize("layout", ["head-major", "token-major"])
@pytest.mark.parametrize("kind", ["contiguous", "paged", "int8", "float8_e4m3fn"])
def test_prompt(benchmark, kind, layout):
    """Storing prompts, 64 MB of keys and values (fp32), against copying as many bytes."""
    B, T, page = 8, 64 * 10**6 // (2 * 8 * H * D * 4), 16
    k, v = new_tokens(B, T, layout), new_tokens(B, T, layout)
    pages = -(-T // page)
    positions = torch.arange(T, dtype=torch.int32, device=DEVICE).expand(B, T)
    options = {}
    shape = (2, B, H, pages * page, D)
    if kind == "paged":
        shape = (2, B * pages, H, page, D)
        options["block_table"] = torch.randperm(B * pages).view(B, pages).int().to(DEVICE)
    dtype = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}.get(kind, DTYPE)
    caches = torch.zeros(shape, device=DEVICE, dtype=dtype)
    if dtype != DTYPE:
        options["k_scale"], options["v_scale"] = torch.zeros(shape[:-1], device=DEVICE)
    kv_cache_update(k, v, *caches, positions, **options)
    expected = torch.zeros_like(caches)
    kv_cache_update_reference(k, v, *expected, positions, **options)
    assert torch.equal(caches.view(torch.uint8), expected.view(torch.uint8))
    del expected

    source = torch.randn(2, B, H, T, D, device=DEVICE).to(DTYPE)
    target = torch.empty_like(source)
    in_turns(
        benchmark,
        lambda: kv_cache_update(k, v, *caches, positions, **options),
        {
            "copy": lambda: target.copy_(source),
            "reference": lambda: kv_cache_update_reference(k, v, *caches, positions, **options),
        },
        rounds=15,
        what="prompt",
        kind=kind,
        layout=layout,
        bytes=source.nbytes,
    )


@pytest.mark.parametrize("B, T", [(1, 1), (32, 1), (8, 1302)])
def test_rope(benchmark, B, T):
    """Rotating queries and keys and storing in one pass, against rotating in PyTorch and storing afterwards."""
    q, k, v = (new_tokens(B, T) for _ in range(3))
    caches = torch.zeros(2, B, H, 1400, D, device=DEVICE, dtype=DTYPE)
    start = CONTEXT if T == 1 else 0
    positions = torch.arange(start, start + T, dtype=torch.int32, device=DEVICE).expand(B, T)
    cos, sin = rotation(1400)
    expected = caches.clone()
    rotated = rope_kv_cache_update(q, k, v, *caches, positions, cos, sin)
    assert torch.equal(rotated, rope_kv_cache_update_reference(q, k, v, *expected, positions, cos, sin))
    assert torch.equal(caches, expected)

    def apart():
        rope_reference(q, positions, cos, sin)
        kv_cache_update(rope_reference(k, positions, cos, sin), v, *caches, positions)

    in_turns(
        benchmark,
        lambda: rope_kv_cache_update(q, k, v, *caches, positions, cos, sin),
        {"rope, then update": apart},
        rounds=100 if T == 1 else 10,
        calls=20 if T == 1 else 1,
        what="rope",
        B=B,
        T=T,
    )


LENGTHS = [random.Random(0).randint(20, CONTEXT) for _ in range(64)]
WINDOW = 256
KINDS = {
    "contiguous": {},
    "contiguous, int8": {"cache_dtype": torch.int8},
    "contiguous, fp8": {"cache_dtype": torch.float8_e4m3fn},
    "paged": {},
    "paged, int8": {"cache_dtype": torch.int8},
    f"sliding, {WINDOW}": {"window": WINDOW},
}
STEPS = 20


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(benchmark, kind):
    """One layer's decode step of 64 sequences of 20 to 1,000 tokens: storing a token of each and attending."""
    options = KINDS[kind] | {"dtype": DTYPE, "device": DEVICE}
    layers = {"num_layers": 1, "num_kv_heads": H, "head_dim": D}
    B = len(LENGTHS)
    if kind.startswith("paged"):
        pages = sum(-(-(length + STEPS + 3) // 16) for length in LENGTHS)
        cache = PagedCache(PagePool(num_pages=pages, **layers, **options), batch_size=B, capacity=CAPACITY + STEPS)
    elif kind.startswith("sliding"):
        cache = SlidingCache(batch_size=B, **layers, **options)
    else:
        cache = ContiguousCache(batch_size=B, capacity=CAPACITY, **layers, **options)
    prompts = [new_tokens(B, CONTEXT) for _ in range(3)]
    cache.extend(CONTEXT, LENGTHS)
    cache.attend(0, *prompts)
    del prompts
    q, k, v = (new_tokens(B, 1) for _ in range(3))

    def step():
        cache.extend(1)
        cache.attend(0, q, k, v)

    x = torch.zeros(16 << 20, device=DEVICE)
    in_turns(
        benchmark,
        step,
        {"read 64 MB": lambda: x.sum()},
        rounds=STEPS,
        what="kind",
        kind=kind,
        cache_bytes=cache.nbytes,
        tokens=sum(LENGTHS),
        token_bytes=2 * H * D * DTYPE.itemsize,
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_one_token_in_a_cuda_graph(benchmark):
    """Against the smallest kernel there is, in a graph of 100 of each: what a launch costs anyway."""
    k, v = new_tokens(1, 1), new_tokens(1, 1)
    caches = torch.zeros(2, 1, H, CAPACITY, D, device=DEVICE, dtype=DTYPE)
    positions = torch.full((1, 1), CONTEXT, dtype=torch.int32, device=DEVICE)
    one = torch.zeros(1, device=DEVICE)

    def graph_of(operation):
        operation()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(100):
                operation()
        return graph.replay

    in_turns(
        benchmark,
        graph_of(lambda: kv_cache_update(k, v, *caches, positions)),
        {"smallest kernel": graph_of(lambda: one.add_(1))},
        rounds=50,
        what="graph",
    )
