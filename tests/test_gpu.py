"""What needs a CUDA GPU beyond the kernels' own tests: the cache update, and the decoder as a whole."""

import pytest
import torch
from models import random_ids, random_model

import fastgpt
from fastgpt import GPT, kv_cache_update, kv_cache_update_reference
from fastgpt.cli import SHIPPED_MODEL

pytestmark = pytest.mark.gpu
SENTINEL = -77.0


def update_inputs(B, H, T, S, D, dtype, layout="head-major"):
    def tensor(N, fill=None):
        shape = (B, H, N, D) if layout == "head-major" else (B, N, H, D)
        x = torch.randn(shape, device="cuda").to(dtype) if fill is None else torch.full(shape, fill, dtype=dtype, device="cuda")
        return x if layout == "head-major" else x.transpose(1, 2)

    slots = torch.stack([torch.randperm(S)[:T] for _ in range(B)])
    positions = slots.masked_fill(torch.rand(B, T) < 0.2, -1).to("cuda", torch.int32)
    return tensor(T), tensor(T), tensor(S, SENTINEL), tensor(S, SENTINEL), positions


@pytest.mark.parametrize("layout", ["head-major", "token-major"])
@pytest.mark.parametrize("D", [1, 3, 8, 64, 80])  # accesses of 2, 4, 8 and 16 bytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kv_cache_update_is_exact(dtype, D, layout):
    assert fastgpt.explain(kv_cache_update, *update_inputs(1, 1, 1, 1, 1, dtype))["cuda"] == "chosen"
    for B, H, T, S in ((1, 12, 1, 100), (3, 4, 50, 70), (32, 2, 1, 9)):
        k, v, k_cache, v_cache, positions = update_inputs(B, H, T, S, D, dtype, layout)
        expected = k_cache.clone(), v_cache.clone()
        kv_cache_update(k, v, k_cache, v_cache, positions)
        kv_cache_update_reference(k, v, *expected, positions)
        assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])


def test_positions_outside_the_cache_are_not_written():
    k, v, k_cache, v_cache, _ = update_inputs(1, 2, 3, 4, 8, torch.float32)
    kv_cache_update(k, v, k_cache, v_cache, torch.tensor([[4, 2**31 - 1, -5]], device="cuda"))
    torch.cuda.synchronize()
    assert (k_cache == SENTINEL).all() and (v_cache == SENTINEL).all()


def test_a_decode_step_can_be_captured_in_a_cuda_graph():
    """The operations alone: stored and attended at positions that change between replays."""
    q, k, v = (torch.randn(2, 4, 1, 64, device="cuda") for _ in range(3))
    k_cache, v_cache = (torch.zeros(2, 4, 50, 64, device="cuda") for _ in range(2))
    positions = torch.zeros(2, 1, dtype=torch.int32, device="cuda")
    lengths = torch.ones(2, dtype=torch.int32, device="cuda")

    def step():
        kv_cache_update(k, v, k_cache, v_cache, positions)
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
        assert torch.equal(model.generate(ids, 150), model.generate(ids, 150, use_cache=False))
    model = GPT.from_pretrained(SHIPPED_MODEL, dtype=torch.float32, device="cuda")
    ids = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    assert torch.equal(model.generate(ids, 300), model.generate(ids, 300, use_cache=False))


def test_the_decoder_uses_the_kernels():
    x = torch.zeros(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    assert fastgpt.explain(fastgpt.attention, x, x, x)["triton"] == "chosen"


def test_the_decoder_trains():
    model = random_model(layers=1).cuda().train()
    ids = random_ids(model, 2, 16).cuda()
    torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
