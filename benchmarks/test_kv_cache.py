"""The cache update, compared with its reference, with copying as many bytes, and with PyTorch and transformers; and the memory and
decode step of each kind of cache.

The new tokens are warm, as after a decoder's projection. KV caches are cold, as in a decoder, which reads all other layers and
weights before a layer is used again: on a CPU each call takes the next of several copies, together larger than its caches, and a
single token goes to the next position after each round of copies; on a GPU the L2 cache is flushed before each call.
"""

import itertools
import random
from functools import partial

import pytest
import torch

from benchmarks.timing import DEVICE, DTYPE, copying, full, measured_time, name_of, reading, time_interleaved
from fastgpt import (
    ContiguousCache,
    PagedCache,
    PagePool,
    SlidingCache,
    attention,
    attention_reference,
    explain,
    kv_cache_update,
    kv_cache_update_reference,
    rope_kv_cache_update,
    rope_kv_cache_update_reference,
)
from fastgpt.bench.timing import cold, implementation
from fastgpt.ops.kv_cache_update import rope_reference

pytestmark = pytest.mark.benchmark(timer=measured_time)
H, D = 12, 64
CONTEXT, CAPACITY = 1000, 1088  # tokens that a cache holds before the step, and has room for
PROMPTS = 64e6 if DEVICE == "cpu" else 512e6  # bytes of keys and values
LAYOUTS = ["token-major", "head-major"] if full() else ["token-major"]


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def new_tokens(B, T, layout="token-major"):
    """q, k or v in the layout of a decoder's projection (token-major), or contiguous (head-major)."""
    if layout == "token-major":
        return torch.randn(B, T, H, D, device=DEVICE).to(DTYPE).transpose(1, 2)
    return torch.randn(B, H, T, D, device=DEVICE).to(DTYPE)


def empty_caches(*shape, dtype=DTYPE):
    return {name: torch.empty(*shape, device=DEVICE, dtype=dtype).zero_() for name in ("k_cache", "v_cache")}


def positions_of(B, start, T=1):
    return torch.arange(start, start + T, dtype=torch.int32, device=DEVICE).expand(B, T)


def agree(functions, caches, step=0):
    """Asserts that all functions store the same bits in empty caches, and return the same."""
    results = {}
    for name, function in functions.items():
        results[name] = {key: x.clone() for key, x in caches.items()}
        returned = function(step, **results[name])
        results[name] |= {"returned": returned} if returned is not None else {}
    for name, result in results.items():
        for key, expected in results["reference"].items():
            assert torch.equal(result[key].view(torch.uint8), expected.view(torch.uint8)), f"{name}: {key}"


def measure(benchmark, what, functions, caches, reasons, *, steps=1, prepare=None, **info):
    """Times functions of a step and of caches. Each call takes the next copy of the caches, and after all copies the next step,
    so that no function finds its target in the CPU's caches."""
    inputs = [{"step": step, **copy} for step, copy in itertools.product(range(steps), cold(**caches))]
    info = {"what": what, "device": DEVICE, "dtype": name_of(DTYPE), "heads": H, "head_dim": D, **info}
    info["implementation"] = implementation(reasons)
    ours = functions.pop("ours")
    time_interleaved(benchmark, ours, functions, inputs=inputs, limit=copying(), prepare=prepare, flush=True, info=info)


@pytest.mark.parametrize("B", [1, 32], ids=lambda B: f"batch{B}")
def test_one_token(benchmark, B):
    """Storing one token per sequence: ours, PyTorch's index_copy_, and transformers' caches."""
    k, v = new_tokens(B, 1), new_tokens(B, 1)
    caches = empty_caches(B, H, CAPACITY, D)
    positions = [positions_of(B, t) for t in range(CONTEXT + 1)]
    index = [torch.tensor([t], device=DEVICE) for t in range(CONTEXT + 1)]  # one for the whole batch

    def index_copy(step, k_cache, v_cache):
        k_cache.index_copy_(2, index[step], k)
        v_cache.index_copy_(2, index[step], v)

    functions = {
        "ours": lambda step, **caches: kv_cache_update(k, v, positions=positions[step], **caches),
        "index_copy_": index_copy,
        "reference": lambda step, **caches: kv_cache_update_reference(k, v, positions=positions[step], **caches),
    }
    if DEVICE == "cuda":
        functions["Triton"] = lambda step, **caches: kv_cache_update(k, v, positions=positions[step], **caches, impl="triton")
    agree(functions, caches, CONTEXT)
    absent, prepare = {}, {}
    try:
        functions["transformers static"], functions["transformers dynamic"], rewind = of_transformers(k, v)
        prepare["transformers static"] = rewind
    except ImportError as error:
        absent = dict.fromkeys(("transformers static", "transformers dynamic"), str(error))
    measure(
        benchmark, "one token", functions, caches, explain(kv_cache_update, k, v, **caches, positions=positions[0]),
        steps=CONTEXT, prepare=prepare, batch=B, bytes=2 * (k.nbytes + v.nbytes), absent=absent,
    )  # fmt: skip


def of_transformers(k, v):
    """Updates of its static and dynamic caches, and a function that resets the static one to 1,000 tokens."""
    import transformers

    config = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=H * D, num_attention_heads=H)
    static = transformers.StaticCache(config=config, max_cache_len=CAPACITY)
    dynamic = transformers.DynamicCache()
    for cache in (static, dynamic):
        cache.update(k, v, 0)
    fixed, growing = static.layers[0], dynamic.layers[0]

    def update_static(step, k_cache, v_cache):
        fixed.keys, fixed.values = k_cache, v_cache
        return static.update(k, v, 0)

    def update_dynamic(step, k_cache, v_cache):
        growing.keys, growing.values = k_cache[:, :, :CONTEXT], v_cache[:, :, :CONTEXT]
        return dynamic.update(k, v, 0)

    def rewind():
        fixed.cumulative_length.fill_(CONTEXT)

    rewind()
    past = [torch.randn(k.shape[0], H, CAPACITY, D, device=DEVICE).to(DTYPE) for _ in range(2)]
    for update in (update_static, update_dynamic):
        for new, old, token in zip(update(0, *(x.clone() for x in past)), past, (k, v)):
            assert torch.equal(new[:, :, : CONTEXT + 1], torch.cat([old[:, :, :CONTEXT], token], dim=2))
    return update_static, update_dynamic, rewind


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["contiguous", "paged", "int8", "fp8"])
def test_prompt(benchmark, kind, layout):
    """Storing the keys and values of prompts."""
    B, page = 8, 16
    T = int(PROMPTS) // (2 * B * H * D * DTYPE.itemsize)
    k, v = new_tokens(B, T, layout), new_tokens(B, T, layout)
    options = {"positions": positions_of(B, 0, T)}
    pages = -(-T // page)
    shape = (B, H, pages * page, D)
    if kind == "paged":
        shape = (B * pages, H, page, D)
        options["block_table"] = torch.randperm(B * pages, device=DEVICE).view(B, pages).int()
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(kind, DTYPE)
    caches = empty_caches(*shape, dtype=dtype)
    row_bytes = D * dtype.itemsize
    if dtype != DTYPE:
        caches |= {name: torch.zeros(shape[:-1], device=DEVICE) for name in ("k_scale", "v_scale")}
        row_bytes += 4
    functions = {
        "ours": lambda step, **caches: kv_cache_update(k, v, **caches, **options),
        "reference": lambda step, **caches: kv_cache_update_reference(k, v, **caches, **options),
    }
    if DEVICE == "cuda":
        functions["Triton"] = lambda step, **caches: kv_cache_update(k, v, **caches, **options, impl="triton")

    def assign_slices(step, k_cache, v_cache):
        k_cache[:, :, :T] = k
        v_cache[:, :, :T] = v

    if kind == "contiguous":
        functions["slice assignment"] = assign_slices
    agree(functions, caches)
    measure(
        benchmark, "prompt", functions, caches, explain(kv_cache_update, k, v, **caches, **options),
        batch=B, T=T, kind=kind, layout=layout, bytes=k.nbytes + v.nbytes + 2 * B * H * T * row_bytes,
    )  # fmt: skip


@pytest.mark.parametrize("B, T", [(1, 1), (32, 1), (8, 1302)], ids=["batch1-1token", "batch32-1token", "batch8-1302tokens"])
def test_rope(benchmark, B, T):
    """Rotary embedding and storing in one pass, compared with rotary embedding in PyTorch and storing afterwards."""
    q, k, v = (new_tokens(B, T) for _ in range(3))
    capacity = max(CAPACITY, T)
    angles = torch.arange(capacity)[:, None] * 10000.0 ** -(torch.arange(D // 2) / (D // 2))
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    caches = empty_caches(B, H, capacity, D)
    positions = [positions_of(B, t, T) for t in range(CONTEXT if T == 1 else 1)]

    def fused(step, operation=rope_kv_cache_update, **caches):
        return operation(q, k, v, **caches, positions=positions[step], cos=cos, sin=sin)

    def unfused(step, **caches):
        kv_cache_update(rope_reference(k, positions[step], cos, sin), v, **caches, positions=positions[step])
        return rope_reference(q, positions[step], cos, sin)

    reference = partial(fused, operation=rope_kv_cache_update_reference)
    functions = {"ours": fused, "rope, then update": unfused, "reference": reference}
    if DEVICE == "cuda":
        functions["Triton"] = partial(fused, operation=partial(rope_kv_cache_update, impl="triton"))
    agree(functions, caches, len(positions) - 1)
    reasons = explain(rope_kv_cache_update, q, k, v, **caches, positions=positions[0], cos=cos, sin=sin)
    measure(
        benchmark, "rope", functions, caches, reasons, steps=len(positions), batch=B, T=T,
        bytes=2 * (q.nbytes + k.nbytes + v.nbytes),
    )  # fmt: skip


LENGTHS = random.Random(0).choices(range(20, CONTEXT), k=16)
LAYERS, WINDOW = 12, 256
ROUNDS = 25
STEPS = 3 + 2 * ROUNDS  # at most: the check, two to warm up, and in a round one that is timed, and one before it
KINDS = {
    "contiguous": {},
    "contiguous, int8": {"cache_dtype": torch.int8},
    "contiguous, fp8": {"cache_dtype": torch.float8_e4m3fn},
    "paged": {},
    "paged, int8": {"cache_dtype": torch.int8},
    f"sliding, {WINDOW}": {"window": WINDOW},
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.replace(", ", "-"))
def test_kinds(benchmark, kind):
    """The part of a decode step that uses the cache, for 16 sequences of 20 to 1,000 tokens: in each of 12 layers, a token of
    each sequence is stored and attends."""
    B = len(LENGTHS)
    options = {"num_layers": LAYERS, "num_kv_heads": H, "head_dim": D, "dtype": DTYPE, "device": DEVICE, **KINDS[kind]}
    if kind.startswith("paged"):
        pages = sum(-(-(length + STEPS) // 16) for length in LENGTHS)
        cache = PagedCache(PagePool(num_pages=pages, **options), batch_size=B, capacity=CAPACITY)
    elif kind.startswith("sliding"):
        cache = SlidingCache(batch_size=B, **options)
    else:
        cache = ContiguousCache(batch_size=B, capacity=CAPACITY, **options)
    prompts = [new_tokens(B, CONTEXT) for _ in range(3)]
    cache.extend(CONTEXT, LENGTHS)
    cache.attend(0, *prompts, last_only=True)
    for x in cache.storages[0].tensors():  # the other layers hold the same
        x.view(torch.uint8)[1:] = x.view(torch.uint8)[0]
    q, k, v = (new_tokens(B, 1) for _ in range(3))

    def step():
        cache.extend(1)
        return [cache.attend(layer, q, k, v) for layer in range(LAYERS)]

    check_step(step()[-1], prompts, q, k, v, cache)
    seen = sum(min(length, cache.window or length) for length in LENGTHS)
    token_bytes = 2 * H * D * DTYPE.itemsize
    stored = token_bytes if "cache_dtype" not in KINDS[kind] else 2 * H * (D + 4)
    time_interleaved(
        benchmark, step, {}, limit=reading(), rounds=ROUNDS, calls=1,
        info={
            "what": "kind", "device": DEVICE, "dtype": name_of(DTYPE), "batch": B, "heads": H, "head_dim": D, "kind": kind,
            "layers": LAYERS, "cache_bytes": cache.nbytes, "tokens": sum(LENGTHS), "token_bytes": LAYERS * token_bytes,
            "bytes": LAYERS * seen * stored, "implementation": implementation(explain(attention, q, k, v)),
        },
    )  # fmt: skip


def check_step(out, prompts, q, k, v, cache):
    """One sequence of a step against attention over its tokens; 8 bits err by a percent or so."""
    _, keys, values = (x[-1:, :, CONTEXT - LENGTHS[-1] :] for x in prompts)
    keys, values = (torch.cat([old, new[-1:]], dim=2).double() for old, new in ((keys, k), (values, v)))
    expected = attention_reference(q[-1:].double(), keys, values, window=cache.window)
    rtol = 0.05 if cache.storages[0].k_scale is not None else max(5e-5, 4 * torch.finfo(out.dtype).eps)
    torch.testing.assert_close(out[-1:].double(), expected, atol=rtol * expected.abs().max().item(), rtol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a CUDA GPU")
def test_one_token_in_a_cuda_graph(benchmark):
    """Compared with a minimal kernel, in a graph of 100 of each: the cost of a launch."""
    k, v = new_tokens(1, 1), new_tokens(1, 1)
    caches = empty_caches(1, H, CAPACITY, D)
    positions = torch.full((1, 1), CONTEXT, dtype=torch.int32, device=DEVICE)
    one = torch.zeros(1, device=DEVICE)

    def graph_of(operation):
        operation()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(100):
                operation()
        return graph.replay

    def update():
        kv_cache_update(k, v, **caches, positions=positions)

    chosen = implementation(explain(kv_cache_update, k, v, **caches, positions=positions))
    time_interleaved(
        benchmark, graph_of(update), {"smallest kernel": graph_of(lambda: one.add_(1))},
        info={"what": "graph", "device": DEVICE, "dtype": name_of(DTYPE), "operations": 100, "implementation": chosen},
    )  # fmt: skip
