"""kv_cache_update: exact over random shapes, strides and positions; untouched slots keep their sentinel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from fastgpt import kv_cache_update, kv_cache_update_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SENTINEL = -77.0

# How a (B, H, N, D) tensor lies in memory: a permutation of its first three dimensions, and padding of rows.
layouts = st.tuples(st.permutations([0, 1, 2]), st.sampled_from([0, 1, 3]))


def laid_out(x, layout):
    """x with the same values in another memory layout; the last dimension stays contiguous."""
    order, padding = layout
    storage = torch.full((*(x.shape[i] for i in order), x.shape[3] + padding), SENTINEL, dtype=x.dtype)
    view = storage[..., : x.shape[3]].permute(*(order.index(i) for i in range(3)), 3)
    return view.copy_(x)


def tokens(B, H, T, D, dtype):
    return torch.randn(B, H, T, D).to(dtype)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_exact(data):
    B, H, T, S, D = (data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 3), (0, 9), (0, 12), (1, 20)))
    dtype = data.draw(st.sampled_from(DTYPES))
    index = data.draw(st.sampled_from([torch.int32, torch.int64]))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    k, v = (laid_out(tokens(B, H, T, D, dtype), data.draw(layouts)) for _ in range(2))
    caches = [laid_out(torch.full((B, H, S, D), SENTINEL, dtype=dtype), data.draw(layouts)) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    # Distinct slots within a row, and some tokens skipped.
    slots = torch.stack([torch.randperm(max(S, T))[:T] for _ in range(B)])
    positions = slots.masked_fill((slots >= S) | (torch.rand(B, T) < 0.2), -1).to(index)
    if data.draw(st.booleans()):
        positions = positions.mT.contiguous().mT
    kv_cache_update(k, v, *caches, positions)
    kv_cache_update_reference(k, v, *expected, positions)
    for cache, reference in zip(caches, expected):
        assert torch.equal(cache, reference)
        if S:
            written = torch.zeros(B, S + 1, dtype=torch.bool).scatter(1, positions.long() % (S + 1), True)[:, :S]
            assert (cache.transpose(1, 2)[~written] == SENTINEL).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt_and_then_single_tokens(dtype):
    k, v = tokens(2, 3, 40, 64, dtype), tokens(2, 3, 40, 64, dtype)
    k_cache, v_cache = (torch.full((2, 3, 50, 64), SENTINEL, dtype=dtype) for _ in range(2))
    positions = torch.arange(40, dtype=torch.int32).expand(2, 40)
    kv_cache_update(k[:, :, :37], v[:, :, :37], k_cache, v_cache, positions[:, :37])
    for t in range(37, 40):
        kv_cache_update(k[:, :, t : t + 1], v[:, :, t : t + 1], k_cache, v_cache, positions[:, t : t + 1])
    assert torch.equal(k_cache[:, :, :40], k) and torch.equal(v_cache[:, :, :40], v)
    assert (k_cache[:, :, 40:] == SENTINEL).all() and (v_cache[:, :, 40:] == SENTINEL).all()


def test_large_update_in_parallel():
    k, v = tokens(2, 8, 2000, 64, torch.float32), tokens(2, 8, 2000, 64, torch.float32)
    caches = [torch.full((2, 8, 2100, 64), SENTINEL) for _ in range(2)]
    positions = torch.stack([torch.randperm(2100)[:2000] for _ in range(2)])
    expected = [cache.clone() for cache in caches]
    kv_cache_update(k, v, *caches, positions)
    kv_cache_update_reference(k, v, *expected, positions)
    assert all(map(torch.equal, caches, expected))


def test_of_two_tokens_for_one_slot_the_last_stays():
    k = torch.arange(3.0).view(1, 1, 3, 1)
    cache = torch.full((2, 1, 1, 4, 1), SENTINEL)
    kv_cache_update(k, k, *cache, torch.tensor([[2, 2, 2]]))
    assert cache[0].flatten().tolist() == [SENTINEL, SENTINEL, 2.0, SENTINEL]


def test_opcheck():
    k, v = tokens(1, 2, 3, 4, torch.float32), tokens(1, 2, 3, 4, torch.float32)
    arguments = (k, v, torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), torch.tensor([[0, -1, 4]]))
    torch.library.opcheck(torch.ops.fastgpt.kv_cache_update.default, arguments)


def test_explain():
    k, positions = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, dtype=torch.int32)
    reasons = fastgpt.explain(kv_cache_update, k, k, k.clone(), k.clone(), positions)
    assert reasons["cpp"] == "chosen" and reasons["reference"] == "available" and "CUDA tensors" in reasons["cuda"]


# Errors: each names the argument, and nothing is written.

X = torch.ones(2, 3, 2, 8)
CACHE = (2, 3, 5, 8)
POSITIONS = torch.tensor([[0, 1], [2, 3]])

BAD = {
    "not a tensor": ({"k": None}, TypeError, "k: expected a torch.Tensor, got NoneType"),
    "dimensions": ({"v": X[0]}, ValueError, "v: expected 4 dimensions"),
    "dtype": ({"k": X.int()}, TypeError, "k: expected dtype .* got torch.int32"),
    "mixed dtypes": ({"v": X.half()}, TypeError, "v: expected dtype torch.float32, got torch.float16"),
    "cache dtype": ({"v_cache": torch.zeros(CACHE).half()}, TypeError, "v_cache: expected dtype torch.float32"),
    "heads": ({"k_cache": torch.zeros(2, 4, 5, 8)}, ValueError, r"k_cache: expected shape \(2, 3, 5, 8\)"),
    "capacities": ({"v_cache": torch.zeros(2, 3, 6, 8)}, ValueError, r"v_cache: expected shape \(2, 3, 5, 8\)"),
    "v": ({"v": X[:, :, :1]}, ValueError, r"v: expected shape \(2, 3, 2, 8\) .*, got \(2, 3, 1, 8\)"),
    "device": ({"k_cache": torch.zeros(CACHE, device="meta")}, ValueError, "k_cache: expected device cpu, got meta"),
    "stride": ({"k": torch.ones(2, 3, 8, 2).mT}, ValueError, "k: expected a contiguous last dimension"),
    "positions shape": ({"positions": POSITIONS[:, :1]}, ValueError, r"positions: expected shape \(2, 2\) \(B, T\)"),
    "positions dtype": ({"positions": POSITIONS.float()}, TypeError, "positions: expected dtype torch.int32 or"),
    "position": (
        {"positions": torch.tensor([[0, 1], [2, 5]])},
        ValueError,
        "positions: expected values below the cache's capacity of 5, got 5",
    ),
}


@pytest.mark.parametrize(
    "case, update", [*((case, kv_cache_update) for case in BAD), ("position", kv_cache_update_reference)]
)
def test_errors(case, update):
    change, error, message = BAD[case]
    k_cache, v_cache = (torch.full(CACHE, SENTINEL) for _ in range(2))
    arguments = {"k": X, "v": X, "k_cache": k_cache, "v_cache": v_cache, "positions": POSITIONS} | change
    with pytest.raises(error, match=message):
        update(**arguments)
    assert (k_cache == SENTINEL).all() and (v_cache == SENTINEL).all()
