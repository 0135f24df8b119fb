"""What needs a CUDA GPU beyond the kernels' own tests: the cache update, and the decoder as a whole."""

from unittest import mock

import pytest
import torch
from cache_updates import angles, differing, on, update_inputs
from models import random_ids, random_model

import fastgpt
from fastgpt import (
    GPT,
    SHIPPED_MODEL,
    attention_reference,
    decoding,
    generate,
    kv_cache_update,
    kv_cache_update_reference,
    rope_kv_cache_update,
    rope_kv_cache_update_reference,
)
from fastgpt.cache.create import CACHE_KINDS
from fastgpt.generation import replay
from fastgpt.generation.generate import stream
from fastgpt.generation.sampling import Sampler
from fastgpt.ops.library import CUDA_MISSING
from fastgpt.testing.numerics import check

pytestmark = pytest.mark.gpu


# The kernels of the CUDA library, where it was built. More of those that take its place: test_triton_kv_cache_update.py.
built = pytest.mark.skipif(CUDA_MISSING is not None, reason=str(CUDA_MISSING))
implementations = pytest.mark.parametrize("impl", [pytest.param("cuda", marks=built), "triton"])


def assert_same_cache(actual, expected):
    assert not differing(actual, expected)


@built
@pytest.mark.parametrize("page", [None, 5, 16])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("layout", ["head-major", "token-major"])
@pytest.mark.parametrize("D", [1, 3, 8, 64, 80, 128])  # accesses of 2, 4, 8 and 16 bytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kv_cache_update_is_exact(dtype, D, layout, cache_dtype, page):
    for B, H, T, S in ((1, 12, 1, 100), (3, 4, 50, 70), (32, 2, 1, 9)):
        expected = update_inputs(B, H, T, S, D, dtype, layout, cache_dtype, page)
        actual = on("cuda", expected)
        assert fastgpt.explain(kv_cache_update, **actual)["cuda"] == "chosen"
        kv_cache_update(**actual)
        kv_cache_update_reference(**expected)
        assert_same_cache(actual, expected)


@built
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("D, rotary", [(2, 2), (40, 10), (64, 64), (80, 32), (128, 128), (128, 64), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rope_kv_cache_update_is_exact(dtype, D, rotary, cache_dtype, page, interleaved):
    for B, H, H_kv, T, S in ((1, 12, 12, 1, 100), (3, 8, 2, 50, 70)):
        expected = update_inputs(B, H_kv, T, S, D, dtype, "token-major", cache_dtype, page)
        expected |= {"q": torch.randn(B, T, H, D).transpose(1, 2).to(dtype), "interleaved": interleaved}
        expected["cos"], expected["sin"] = angles(S, rotary // 2)
        actual = on("cuda", expected)
        q = rope_kv_cache_update(**actual)
        assert torch.equal(q.cpu(), rope_kv_cache_update_reference(**expected))
        assert_same_cache(actual, expected)


# Arguments of update_inputs, and a rotary dim if there is one: of copies by 2, 4, 8 and 16 bytes; of rows that are changed
# 16 bytes at a time and number by number.
COPIES = [(torch.bfloat16, 1, None), (torch.bfloat16, 2, None), (torch.float16, 4, None), (torch.float32, 64, None)]
CHANGES = [
    (dtype, D, cache_dtype, rotary)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for D, cache_dtype, rotary in (
        (64, torch.int8, 0), (3, torch.float8_e4m3fn, 0), (128, None, 64), (40, None, 10), (64, torch.float8_e4m3fn, 64),
        (256, torch.int8, 32),
    )
]  # fmt: skip


@implementations
@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("times", [1, 3])
def test_update_kernels_one_by_one(times, page, impl):
    """What benchmarks.sanitizer runs: every kernel of both operations, in several blocks, with tokens that are skipped; of
    values as long as keys or three times as long."""
    for dtype, D, cache_dtype, rotary in [*((*copy, 0) for copy in COPIES), *CHANGES]:
        for interleaved in (False, True)[: 2 if rotary else 1]:
            expected = update_inputs(3, 2, 7, 9, D, dtype, "token-major", cache_dtype, page, D_v=times * D)
            update, reference = kv_cache_update, kv_cache_update_reference
            if rotary:
                update, reference = rope_kv_cache_update, rope_kv_cache_update_reference
                expected |= {"q": torch.randn(3, 7, 4, D).transpose(1, 2).to(dtype), "interleaved": interleaved}
                expected["cos"], expected["sin"] = angles(9, rotary // 2)
            actual = on("cuda", expected)
            q, q_reference = update(**actual, impl=impl), reference(**expected)
            assert_same_cache(actual, expected)
            assert q is None or torch.equal(q.cpu(), q_reference)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("page", [None, 16])
def test_decode_kernels_one_by_one(page, cache_dtype):
    """Likewise: one query of each head over keys that are split, of sequences that fill none of their last tiles or pages."""
    B, H, H_kv, S, D = 3, 6, 2, 600, 64
    cache = update_inputs(B, H_kv, S, S, D, torch.float16, cache_dtype=cache_dtype, page=page)
    cache["positions"] = torch.arange(S, dtype=torch.int32).expand(B, S)
    kv_cache_update_reference(**cache)
    options = {"kv_lengths": torch.tensor([600, 1, 533], dtype=torch.int32)}
    options |= {name: cache.get(name) for name in ("block_table", "k_scale", "v_scale")}
    arguments = {"q": torch.randn(B, H, 1, D).half(), "k": cache["k_cache"], "v": cache["v_cache"], **options}
    exact = {name: x.double() if torch.is_tensor(x) and x.dtype == torch.float16 else x for name, x in arguments.items()}
    with torch.inference_mode():
        actual = fastgpt.attention(**on("cuda", arguments), impl="triton")
        check(actual, lambda: attention_reference(**exact), weights=torch.float16)


@pytest.mark.parametrize("page", [None, 4])
def test_tokens_outside_the_cache_are_not_written(page):
    inputs = update_inputs(1, 2, 3, 4, 8, torch.float32, page=page)
    expected = {name: x.clone() for name, x in inputs.items()}
    outside = on("cuda", inputs) | {"positions": torch.tensor([[4, 2**31 - 1, -5]], device="cuda")}
    kv_cache_update(**outside)
    assert_same_cache(outside, expected)
    if page:
        for wrong in (-1, 2, 2**31 - 1):
            outside = on("cuda", inputs) | {"block_table": torch.tensor([[wrong]], dtype=torch.int32, device="cuda")}
            kv_cache_update(**outside)
            assert_same_cache(outside, expected)
    x, ones = torch.randn(1, 2, 3, 8, device="cuda"), torch.ones(2, 4, device="cuda")
    outside = on("cuda", inputs) | {"positions": torch.tensor([[2, 3, 900]], device="cuda"), "cos": ones, "sin": ones}
    assert torch.equal(rope_kv_cache_update(x, **outside), x)
    assert_same_cache(outside, expected)


@implementations
def test_a_decode_step_can_be_captured_in_a_cuda_graph(impl):
    """The operations alone: stored and attended at positions that change between replays."""
    q, k, v = (torch.randn(2, 4, 1, 64, device="cuda") for _ in range(3))
    k_cache, v_cache = (torch.zeros(2, 4, 50, 64, device="cuda") for _ in range(2))
    positions = torch.zeros(2, 1, dtype=torch.int32, device="cuda")
    lengths = torch.ones(2, dtype=torch.int32, device="cuda")

    def step():
        kv_cache_update(k, v, k_cache, v_cache, positions, impl=impl)
        return fastgpt.attention(q, k_cache, v_cache, kv_lengths=lengths)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for position in (0, 7, 31):
        for x in (q, k, v):
            x.normal_()
        positions.fill_(position)
        lengths.fill_(position + 1)
        graph.replay()
        assert torch.equal(out, step())
        assert torch.equal(k_cache[:, :, position], k[:, :, 0])


def test_cached_and_uncached_tokens_are_identical():
    for seed in range(3):
        model = random_model(layers=3, heads=4, width=128, context=256, seed=seed).cuda()
        ids = random_ids(model, 3, 17, seed).cuda()
        uncached = generate(model, ids, 150, window=100, use_cache=False)
        for kind in CACHE_KINDS:
            assert torch.equal(generate(model, ids, 150, window=100, cache=kind), uncached)
        assert torch.equal(generate(model, ids, 150), generate(model, ids, 150, use_cache=False))
    model = GPT.from_pretrained(SHIPPED_MODEL, dtype=torch.float32, device="cuda")
    ids = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    assert torch.equal(generate(model, ids, 300), generate(model, ids, 300, use_cache=False))


GRAPHED = [
    {},
    {"window": 9},
    {"cache": "sliding", "window": 9},
    {"cache": "paged", "page_size": 4},
    {"cache": "paged", "page_size": 4, "num_samples": 3},
    {"cache_dtype": torch.int8, "num_samples": 2},
]
SAMPLED = {"temperature": 1.0, "seed": 3, "top_p": 0.95, "top_k": 40, "min_p": 0.001, "repetition_penalty": 1.2}


@pytest.mark.parametrize("rules", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("options", GRAPHED, ids=str)
def test_steps_of_a_cuda_graph_are_those_without(options, rules):
    model = random_model().cuda()
    prompts = [random_ids(model, 1, length, seed=length)[0].cuda() for length in (5, 14, 9)]
    options = options | rules | {"return_logprobs": True}
    with mock.patch.object(replay, "has_graphs", lambda device: False):
        rows, logprobs = generate(model, prompts, 60, **options)
    with mock.patch.object(replay, "cuda_graph", wraps=replay.cuda_graph) as captures:
        again, again_logprobs = generate(model, prompts, 60, **options)
    assert captures.call_count == 1
    assert all(map(torch.equal, again, rows)) and all(map(torch.equal, again_logprobs, logprobs))


@torch.inference_mode()
@pytest.mark.parametrize("kind", [{}, {"kind": "sliding", "window": 9}, {"kind": "paged", "page_size": 4}], ids=str)
def test_logits_of_a_cuda_graph_are_those_without(kind):
    model = random_model().cuda()
    ids = random_ids(model, 3, 40).cuda()
    eager, graphed = model.new_cache(3, **kind), model.new_cache(3, **kind)
    step = decoding(model, graphed)
    for cache in (eager, graphed):
        model(ids[:, :5], cache=cache, new=[5, 2, 4])
    for i in range(5, 40):
        assert torch.equal(step(ids[:, i]), model(ids[:, i : i + 1], cache=eager)[:, -1])
    assert step.recording.refused is None and step.recording.step.replay is not None


@pytest.mark.parametrize("rules", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("cache", [{}, {"cache": "sliding", "window": 9}, {"cache": "paged", "page_size": 4}], ids=str)
def test_steps_do_not_wait_for_the_gpu(cache, rules):
    """After the first two, of which the second captures, and until the 16th, which looks whether all rows have ended."""
    model = random_model().cuda()
    steps = stream(model, random_ids(model, 2, 6).cuda(), 40, eos=64, **cache, **rules)
    for _ in range(3):
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(12):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Launches of a layer: qkv; rotation, cache update and attention; out, up, down. Around them:
# positions, embedding, logits, the likeliest token (which PyTorch may find in two), noted, and handed to the next step.
LAUNCHES_A_LAYER, LAUNCHES_AROUND = 5, 7


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decode_step_is_few_launches(dtype):
    """Of GPT-2 (124M), and its tokens are those of steps one by one."""
    model = random_model(layers=12, heads=12, width=768, context=1024, vocabulary=50257).cuda().to(dtype)
    ids = random_ids(model, 1, 300).cuda()
    samplers = [Sampler(list(ids), 40, 50257, repetition_penalty=1.0) for _ in range(2)]
    graphed, eager = model.new_cache(1, 600), model.new_cache(1, 600)
    tokens = [sampler(model(ids, cache=cache)[:, -1]) for sampler, cache in zip(samplers, (graphed, eager))]
    step = decoding(model, graphed, samplers[0])
    for _ in range(30):
        tokens[0] = step(tokens[0])
        tokens[1] = samplers[1](model(tokens[1].unsqueeze(1), cache=eager)[:, -1])
        assert torch.equal(*tokens)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(tokens[0])
        torch.cuda.synchronize()
    launches = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    print(*dict.fromkeys(event.name for event in launches), sep="\n")
    assert len(launches) <= 12 * LAUNCHES_A_LAYER + LAUNCHES_AROUND


def test_rows_end_with_their_eos():
    """Which the host sees some steps later."""
    model = random_model().cuda()
    ids = random_ids(model, 4, 6).cuda()
    free = generate(model, ids, 60)[:, 6:].tolist()
    eos = free[0][20]
    lengths = [row.index(eos) + 1 if eos in row else 60 for row in free]
    rows = generate(model, ids.tolist(), 60, eos=eos)
    assert [row[6:].tolist() for row in rows] == [row[:length] for row, length in zip(free, lengths)]
    assert generate(model, ids[:1], 60, eos=eos)[0, 6:].tolist() == free[0][: lengths[0]]


def test_sampled_tokens_are_those_of_the_cpu():
    """In float64, so that rounding moves no probability across the number that is drawn."""
    model = random_model().double()
    ids = random_ids(model, 3, 9)
    expected = generate(model, ids, 40, num_samples=2, **SAMPLED)
    assert torch.equal(generate(model.cuda(), ids.cuda(), 40, num_samples=2, **SAMPLED).cpu(), expected)


def test_the_decoder_uses_the_kernels():
    x = torch.zeros(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    assert fastgpt.explain(fastgpt.attention, x, x, x)["triton"] == "chosen"
    assert fastgpt.explain(fastgpt.linear, x, x[0, 0])["triton"] == "chosen"
    assert fastgpt.explain(fastgpt.norm, x, x[0, 0, 0])["triton"] == "chosen"


def test_the_decoder_trains():
    model = random_model(layers=1).cuda().train()
    ids = random_ids(model, 2, 16).cuda()
    torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# What a first run is to tell: one kernel of each kind, and what can go wrong only on a GPU


def attended(attend, device, dtype, *shape, T=None, **options):
    """(out, dq, dk, dv) of an attention function of q, k and v (B, H, S, D), T of them queries, by CPU's random numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(shape, generator=generator).half() for _ in range(4))
    q, dout = (x[:, :, : T or shape[2]] for x in (q, dout))
    leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, **{name: x.to(device) if torch.is_tensor(x) else x for name, x in options.items()})
    return out, *torch.autograd.grad(out, leaves, dout.to(device, dtype))


def exactly(*shape, **options):
    """The same by the reference in float64, for `check`."""

    def reference(q, k, v, **options):
        options = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in options.items()}
        return attention_reference(q, k, v, **options)

    return lambda: attended(reference, "cpu", torch.float64, *shape, **options)


@pytest.mark.parametrize("D", [64, 128])
def test_attention_of_each_kind(D):
    shape = 2, 4, 200, D
    check(attended(fastgpt.attention, "cuda", torch.float16, *shape), exactly(*shape), weights=torch.float16)
    q, k, v = (torch.randn(2, 4, 700, D).half() for _ in range(3))
    out = fastgpt.attention(*on("cuda", {"q": q[:, :, :1], "k": k, "v": v}).values(), impl="triton")
    check(out, lambda: attention_reference(q[:, :, :1].double(), k.double(), v.double()), weights=torch.float16)


@pytest.mark.parametrize("rows", [1, 7])
def test_linear_and_norm_of_each_kind(rows):
    x, weight, scale = torch.randn(rows, 768).half(), torch.randn(1024, 768).half() / 16, torch.rand(768).half()
    x_64, weight_64, scale_64 = (y.double() for y in (x, weight, scale))
    out = fastgpt.linear(x.cuda(), weight.cuda(), norm_weight=scale.cuda(), norm="rms", impl="triton")
    expected = lambda: fastgpt.linear_reference(x_64, weight_64, norm_weight=scale_64, norm="rms")  # noqa: E731
    check(out, expected, weights=torch.float16)
    out = fastgpt.norm(x.cuda(), scale.cuda(), kind="rms", impl="triton")
    check(out, lambda: fastgpt.norm_reference(x_64, scale_64, kind="rms"))


@pytest.mark.parametrize("D", [64, 128])
def test_float_masks_of_pytorch_hide_keys(D):
    """-inf in a sliding window's mask, the first tiles of later rows among it: never NaN, and the gradients of the rest."""
    from fastgpt.integrations.sdpa import scaled_dot_product_attention

    T = 300
    distance = torch.arange(T)[:, None] - torch.arange(T)
    mask = torch.zeros(T, T).masked_fill((distance < 0) | (distance >= 40), -torch.inf)

    def attend(q, k, v, bias, causal):
        return scaled_dot_product_attention(q, k, v, bias.to(q.dtype))

    actual = attended(attend, "cuda", torch.float16, 2, 3, T, D, bias=mask, causal=False)
    assert all(x.isfinite().all() for x in actual)
    check(actual, exactly(2, 3, T, D, bias=mask, causal=False), weights=torch.float16)


def needs_memory(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory")


def test_gradients_past_2_31_numbers_of_a_mask():
    """Only the last queries see keys, and only the last, where offsets in the mask take more than 32 bits."""
    needs_memory(8)
    seen_by_last(46_400, "cuda")


def seen_by_last(S, device, few=64, D=64):
    generator = torch.Generator().manual_seed(0)
    few_q, few_k, few_v, few_dout = (torch.randn(1, 1, few, D, generator=generator).half() for _ in range(4))
    few_mask = torch.rand(few, few, generator=generator) < 0.5
    mask = torch.zeros(S, S, dtype=torch.bool, device=device)
    mask[-few:, -few:] = few_mask.to(device)
    whole = [torch.zeros(1, 1, S, D, dtype=torch.float16, device=device) for _ in range(4)]
    for x, last in zip(whole, (few_q, few_k, few_v, few_dout)):
        x[:, :, -few:] = last.to(device)
    q, k, v = (x.requires_grad_() for x in whole[:3])
    out = fastgpt.attention(q, k, v, mask=mask, causal=False)
    gradients = torch.autograd.grad(out, (q, k, v), whole[3])

    def reference():
        leaves = [x.double().requires_grad_() for x in (few_q, few_k, few_v)]
        out = attention_reference(*leaves, mask=few_mask, causal=False)
        return out, *torch.autograd.grad(out, leaves, few_dout.double())

    check(tuple(x[:, :, -few:] for x in (out, *gradients)), reference, weights=torch.float16)
    assert not any(x[:, :, :-few].any() for x in (out, *gradients))


def test_gradients_of_heads_with_strides_above_2_31():
    needs_memory(12)
    heads_apart(2**31, "cuda")


def heads_apart(step, device, N=100, D=64):
    shape, strides = (1, 2, N, D), (2 * step, step, D, 1)
    memory = torch.empty(step + N * D, dtype=torch.float16, device=device)

    def apart(x):
        view = memory.as_strided(shape, strides)
        view.copy_(x)
        return view

    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    q = apart(dense.to(device)).requires_grad_()
    out = fastgpt.attention(q, q.detach(), q.detach())
    (dq,) = torch.autograd.grad(out, q, torch.ones_like(out))

    def reference():
        q = dense.double().requires_grad_()
        out = attention_reference(q, q.detach(), q.detach())
        return out, *torch.autograd.grad(out, q, torch.ones_like(out))

    check((out, dq), reference, weights=torch.float16)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one():
    """Each launch is on the device of its tensors, and what was compiled for one is not taken for the other."""
    torch.cuda.set_device(0)
    results = [attended(fastgpt.attention, device, torch.float16, 2, 4, 200, 64) for device in ("cuda:0", "cuda:1")]
    for here, there in zip(*results):
        assert there.device.index == 1 and torch.equal(here.cpu(), there.cpu())
    model = random_model()
    ids = random_ids(model, 2, 9)
    for options in ({}, {"cache": "paged"}, {"cache_dtype": torch.int8}):
        tokens = [generate(model.to(device), ids.to(device), 40, **options).cpu() for device in ("cuda:0", "cuda:1")]
        assert torch.equal(*tokens)
    assert torch.cuda.current_device() == 0
