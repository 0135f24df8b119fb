"""KV caches of every kind: the same logits and tokens as without one, and the memory that each promises."""

import contextlib

import pytest
import torch
from models import random_ids, random_model, reference_operations
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import GPT, SHIPPED_MODEL, ContiguousCache, OutOfPages, PagedCache, generate
from fastgpt.cache.create import CACHE_KINDS
from fastgpt.cache.uncached import Uncached, rotated
from fastgpt.model.rope import Rope
from fastgpt.testing import numerics

DTYPES = [None, torch.int8, torch.float8_e4m3fn]
KINDS = [("contiguous", None), ("contiguous", 9), ("sliding", 9), ("sliding", 100), ("paged", None), ("paged", 9)]


def new_cache(model, batch, kind, window, **options):
    return model.new_cache(batch, kind=kind, window=window, page_size=4, **options)


def tokens_of(logits, new):
    """The rows that belong to tokens, not to padding: (tokens, V), sequence by sequence."""
    return torch.cat([row[len(row) - count :] for row, count in zip(logits, new)])


@torch.no_grad()
@pytest.mark.parametrize("kind, window", KINDS)
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 1, 11], [19, 1]], ids=str)
def test_cached_logits_are_the_uncached_ones(chunks, kind, window):
    """Whatever the pieces in which the tokens come."""
    model = random_model()
    ids = random_ids(model, 3, 20)
    cache = new_cache(model, 3, kind, window)
    logits = torch.cat([model(piece, cache=cache) for piece in ids.split(chunks, dim=1)], dim=1)
    numerics.check(logits, lambda: model.double()(ids, cache=Uncached(window)))
    assert cache.length == 20 and cache.counts == [20, 20, 20] and cache.lengths.tolist() == [20, 20, 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rotation_without_a_cache(dtype):
    """Where no gradients are needed, by the operation that caches use: with the same bits."""
    q, k, v = (torch.randn(2, 9, heads, 16, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2))
    arguments = torch.arange(9).expand(2, -1), Rope(8).rotation(9)
    expected = rotated(q, k, v, *arguments)
    assert expected[2] is v
    with torch.no_grad(), DispatchLog() as log:
        found = rotated(q, k, v, *arguments)
    assert all(torch.equal(*pair) for pair in zip(found, expected))
    assert "fastgpt::rope_kv_cache_update" in log.names
    q.requires_grad_()
    rotated(q, k, v, *arguments)[0].sum().backward()
    assert q.grad is not None


class DispatchLog(TorchDispatchMode):
    """Records the names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.one_of(2)
@pytest.mark.parametrize("cache", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_ragged_batch_matches_its_sequences_one_by_one(dtype, cache):
    """Through prompts, single tokens and pieces of different lengths, some of them empty."""
    kind, window = cache
    model = random_model()
    pieces = [[5, 1, 13], [1, 1, 1], [0, 1, 1], [2, 0, 9], [1, 1, 1], [12, 3, 0]]
    rows = [random_ids(model, 1, sum(counts), seed)[0] for seed, counts in enumerate(zip(*pieces))]
    cache = new_cache(model, 3, kind, window, cache_dtype=dtype)
    logits, starts = [], [0, 0, 0]
    for new in pieces:
        ids = torch.full((3, max(new)), 64)
        for i, count in enumerate(new):
            ids[i, len(ids[i]) - count :] = rows[i][starts[i] : starts[i] + count]
            starts[i] += count
        logits.append(tokens_of(model(ids, cache=cache, new=new), new))
    assert cache.counts == starts and cache.lengths.tolist() == starts
    actual = torch.cat(logits)

    def alone(model):
        """The same pieces, each sequence in a cache of its own; in the order in which they came above."""
        caches = [new_cache(model, 1, kind, window, cache_dtype=dtype) for _ in rows]
        logits, starts = [], [0, 0, 0]
        for new in pieces:
            for i, count in enumerate(new):
                if count:
                    logits.append(model(rows[i][None, starts[i] : starts[i] + count], cache=caches[i])[0])
                    starts[i] += count
        return torch.cat(logits)

    if dtype is None:
        numerics.check(actual, lambda: alone(model.double()))
    else:
        # Rounding before quantization may turn a number to the next step: of 8-bit rows, 1/127 or 1/16 of the largest.
        with reference_operations():
            low = alone(model)
        assert (actual - low).abs().max() <= 0.05 * low.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind, window", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forked_sequences_are_independent(dtype, kind, window):
    """A fork is what recomputing each copy from the start gives, and leaves the original as it was."""
    model = random_model()
    prompts, after = random_ids(model, 2, 5), random_ids(model, 6, 7, seed=2)  # 30 rows: one kernel, the same bits
    cache = new_cache(model, 2, kind, window, cache_dtype=dtype, **({"num_pages": 40} if kind == "paged" else {}))
    model(prompts, cache=cache)
    fork = cache.fork(3)
    assert fork.batch_size == 6 and fork.counts == [5] * 6
    actual = torch.cat([model(token, cache=fork) for token in after.split(1, dim=1)], dim=1)
    own = new_cache(model, 6, kind, window, cache_dtype=dtype)
    model(prompts.repeat_interleave(3, dim=0), cache=own)
    expected = torch.cat([model(token, cache=own) for token in after.split(1, dim=1)], dim=1)
    assert torch.equal(actual, expected)
    untouched = new_cache(model, 2, kind, window, cache_dtype=dtype)
    model(prompts, cache=untouched)
    assert cache.counts == [5, 5] and torch.equal(model(after[:2], cache=cache), model(after[:2], cache=untouched))


@torch.no_grad()
@pytest.mark.parametrize("kind, window", KINDS)
def test_truncate_removes_tokens(kind, window):
    model = random_model()
    ids, other = random_ids(model, 2, 20), random_ids(model, 2, 6, seed=2)
    cache, expected = (new_cache(model, 2, kind, window) for _ in range(2))
    model(ids[:, :7], cache=cache), model(ids[:, :7], cache=expected)
    model(ids[:, 7:8] if window == 9 else ids[:, 7:12], cache=cache)
    cache.truncate([7, 7])
    assert cache.counts == [7, 7]
    assert torch.equal(model(other, cache=cache), model(other, cache=expected))
    if kind == "paged":
        assert cache.pool.statistics() == expected.pool.statistics()
    with pytest.raises(ValueError, match=r"counts: expected 2 integers from 0 to those of \[13, 13\], got \[14, 1\]"):
        cache.truncate([14, 1])
    if kind == "sliding" and window == 9:
        with pytest.raises(
            ValueError, match="counts: expected 13 or 0 for a sequence whose ring buffer of 9 has overwritten older"
        ):
            cache.truncate([13, 12])


SETTINGS = [
    # layers, heads, width, prompts
    (2, 2, 32, [5, 5, 5]),
    (3, 4, 64, [17]),
    (2, 8, 128, [1, 30, 7, 16]),
    (4, 3, 96, [40, 39]),
    (2, 1, 80, [64, 1, 2]),
]


@pytest.mark.slow
@pytest.mark.one_of(2)
@pytest.mark.parametrize("cache", [*KINDS, ("sliding", 1)], ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_cached_and_uncached_tokens_are_identical(setting, cache):
    (layers, heads, width, lengths), (kind, window) = setting, cache
    for seed in range(2):
        model = random_model(layers=layers, heads=heads, width=width, context=128, seed=seed)
        prompts = [random_ids(model, 1, length, seed)[0] for length in lengths]
        options = {"window": window, "page_size": 4}
        cached = generate(model, prompts, 60, cache=kind, **options)
        uncached = generate(model, prompts, 60, use_cache=False, **options)
        for prompt, a, b in zip(prompts, cached, uncached, strict=True):
            assert torch.equal(a, b) and torch.equal(a[: len(prompt)], prompt) and len(a) == len(prompt) + 60
            assert window == 1 or len(a[len(prompt) :].unique()) > 3  # a model stuck on a token would prove little


@pytest.mark.parametrize("kind, window", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_share_a_prompt(kind, window, dtype):
    """Each goes on as the prompt would alone."""
    model = random_model()
    prompts = [random_ids(model, 1, length)[0] for length in (9, 13)]
    options = {"cache": kind, "window": window, "cache_dtype": dtype, "page_size": 4}
    alone = generate(model, prompts, 30, **options)
    assert all(map(torch.equal, generate(model, prompts, 30, num_samples=3, **options), [x for x in alone for _ in range(3)]))
    options |= {"temperature": 1.0, "seed": 3}
    samples = generate(model, prompts, 30, num_samples=3, **options)
    assert len(samples) == 6 and all(map(torch.equal, samples[::3], generate(model, prompts, 30, **options)))
    assert not torch.equal(samples[0], samples[1])
    contiguous = generate(model, prompts, 30, num_samples=3, **options | {"cache": "contiguous"})
    assert all(map(torch.equal, samples, contiguous))
    if dtype is None:
        uncached = generate(model, prompts, 30, num_samples=3, use_cache=False, **options)
        assert all(map(torch.equal, samples, uncached))


# Memory


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_storage_is_never_reallocated(kind):
    model = random_model()
    cache = new_cache(model, 2, kind, 10)
    before = [x.data_ptr() for x in (*cache.storages[0].tensors(), cache.lengths)]
    for token in random_ids(model, 2, 40).split(1, dim=1):
        model(token, cache=cache)
    assert before == [x.data_ptr() for x in (*cache.storages[0].tensors(), cache.lengths)]


@torch.no_grad()
def test_a_ring_is_as_large_as_its_window_and_is_not_rolled():
    model = random_model()
    cache = model.new_cache(1, kind="sliding", window=8)
    (storage,) = cache.storages
    assert storage.k.shape == (2, 1, 4, 8, 16) and cache.nbytes == 2 * 2 * 4 * 8 * 16 * 4
    ids = random_ids(model, 1, 30)
    model(ids[:, :20], cache=cache)
    before = storage.k.clone()
    model(ids[:, 20:21], cache=cache)
    changed = (storage.k != before).any(-1).any(0)[0].any(0)  # (8,) slots
    assert changed.tolist() == [slot == 20 % 8 for slot in range(8)]


@torch.no_grad()
def test_paged_caches_waste_at_most_a_page_per_sequence():
    model = random_model(layers=1, heads=1, width=16, context=128)
    lengths = torch.randint(1, 100, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    page, tokens = 16, sum(lengths)
    cache = model.new_cache(64, kind="paged", page_size=page, num_pages=tokens // page + 64)
    ids = random_ids(model, 64, max(lengths))
    model(ids, cache=cache, new=lengths)
    statistics = cache.pool.statistics()
    assert statistics["tokens"] == tokens and statistics["sequences"] == 64
    assert statistics["used_pages"] <= tokens / page + 64
    bytes_a_token = 2 * 16 * 4
    assert cache.nbytes <= (tokens + 64 * page) * bytes_a_token
    contiguous = model.new_cache(64, max(lengths))
    assert cache.nbytes < 0.75 * contiguous.nbytes
    cache.free()
    assert cache.pool.statistics()["free_pages"] == statistics["num_pages"]


def test_generate_allocates_only_the_pages_that_it_needs(monkeypatch):
    pools = []
    original = PagedCache.__init__

    def spy(self, pool, **options):
        pools.append(pool)
        original(self, pool, **options)

    monkeypatch.setattr(PagedCache, "__init__", spy)
    model = random_model()
    prompts = [random_ids(model, 1, length)[0] for length in (9, 16, 1)]
    generate(model, prompts, 21, cache="paged", page_size=8, num_samples=4, temperature=1.0)
    # 29, 36 and 21 tokens are stored; 1, 2 and 0 pages of the prompts are shared.
    expected = (1 + 4 * 3) + (2 + 4 * 3) + 4 * 3
    statistics = pools[0].statistics()
    assert (statistics["num_pages"], statistics["used_pages"], statistics["shared_pages"]) == (expected, expected, 3)


@pytest.mark.parametrize("dtype, share", [(torch.int8, (64 + 4) / 256), (torch.float8_e4m3fn, (64 + 4) / 256)])
def test_8_bit_caches_take_a_quarter_of_the_memory_plus_scales(dtype, share):
    model = random_model(heads=1, width=64)
    assert model.new_cache(2, cache_dtype=dtype).nbytes == share * model.new_cache(2).nbytes


# 8 bits


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype, limit", [(torch.int8, 0.005), (torch.float8_e4m3fn, 0.02)])
def test_8_bit_caches_hardly_change_the_loss(dtype, limit):
    """Of the shipped model, on text that it wrote itself."""
    model = GPT.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    ids = generate(model, random_ids(model, 4, 1), 400, temperature=1.0, seed=0)

    def loss(cache):
        logits = model(ids[:, :-1], cache=cache)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()

    exact, rounded = loss(None), loss(model.new_cache(4, cache_dtype=dtype))
    assert exact != rounded and abs(rounded / exact - 1) < limit


# Errors


@torch.no_grad()
def test_running_out_of_pages_leaves_every_sequence_intact():
    model = random_model()
    ids = random_ids(model, 2, 20)
    cache = model.new_cache(2, kind="paged", page_size=4, num_pages=6)
    model(ids[:, :9], cache=cache)
    before = [x.clone() for x in cache.storages[0].tensors()], cache.block_table.clone(), list(cache.counts)
    with pytest.raises(OutOfPages, match="pages: expected 2 free for this step, got 0 of 6"):
        model(ids[:, 9:13], cache=cache)
    assert all(map(torch.equal, before[0], cache.storages[0].tensors()))
    assert torch.equal(before[1], cache.block_table) and before[2] == cache.counts and cache.lengths.tolist() == [9, 9]
    # It goes on as far as there is room: rows 9 to 11 of the last pages.
    logits = model(ids[:, 9:12], cache=cache)
    numerics.check(logits, lambda: model.double()(ids[:, :12])[:, 9:])


def test_pools_are_shared_between_caches():
    model = random_model()
    first = model.new_cache(1, kind="paged", page_size=4, num_pages=8)
    second = PagedCache(first.pool, batch_size=2, capacity=96)
    ids = random_ids(model, 3, 8)
    with torch.no_grad():
        model(ids[:1], cache=first), model(ids[1:], cache=second)
        assert first.pool.statistics()["used_pages"] == 6
        with pytest.raises(OutOfPages):
            model(random_ids(model, 2, 8), cache=second)
        first.free()
        model(random_ids(model, 2, 8), cache=second)
    assert first.pool.statistics()["free_pages"] == 0


BAD = {
    "kind": ({"kind": "ring"}, ValueError, "kind: expected one of 'contiguous', 'sliding', 'paged', got 'ring'"),
    "window": (
        {"kind": "sliding"},
        ValueError,
        "window: expected a number of tokens for a sliding cache of a model without windows, got None",
    ),
    "window 0": ({"window": 0}, ValueError, "window: expected an integer >= 1, got 0"),
    "dtype": (
        {"cache_dtype": torch.float16},
        TypeError,
        "cache_dtype: expected torch.float32 .* or torch.int8 or .*, got torch.float16",
    ),
    "capacity": ({"capacity": 0}, ValueError, "capacity: expected an integer >= 1 and <= 2147483647, got 0"),
    "large": ({"capacity": 2**62}, ValueError, "capacity: expected an integer >= 1 and <= 2147483647, got 4611686018427387904"),
    "page size": ({"kind": "paged", "page_size": 0}, ValueError, "page_size: expected an integer >= 1, got 0"),
    "pages": ({"kind": "paged", "num_pages": -1}, ValueError, "num_pages: expected an integer >= 0, got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        random_model().new_cache(2, **options)


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_too_large_caches_are_one_sentence(kind):
    """Of so many sequences that there are no numbers for them, and of so many tokens that there is no memory."""
    model = random_model()
    window = 9 if kind == "sliding" else None
    expected = "(batch_size: expected an integer >= 1 and <= 2147483647|num_pages: expected at most 2.31 - 1), got "
    with pytest.raises(ValueError, match=expected):
        model.new_cache(2**40, kind=kind, window=window)
    with pytest.raises(MemoryError, match="the cache does not fit into memory"):
        ContiguousCache(batch_size=2, capacity=2**31 - 1, num_layers=2**30, num_kv_heads=2**30, head_dim=64)
    with contextlib.suppress(RuntimeError):
        torch.empty(2**38, dtype=torch.uint8)  # less than a layer would take
        pytest.skip("the system grants a quarter of a terabyte, as QEMU does")
    with pytest.raises(MemoryError, match=r"the cache does not fit into memory; choose a smaller batch_size, .* \(.+\)"):
        model.new_cache(2**24, kind=kind, window=window)


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_more_than_the_capacity_raises_and_changes_nothing(kind):
    model = random_model()
    cache = new_cache(model, 2, kind, 96, capacity=10)
    with torch.no_grad():
        model(random_ids(model, 2, 8), cache=cache, new=[8, 3])
        before = [x.clone() for x in cache.storages[0].tensors()]
        with pytest.raises(ValueError, match=r"cache: expected at most 10 tokens \(its capacity\), got 8 stored \+ 3 new"):
            model(random_ids(model, 2, 7), cache=cache, new=[3, 7])
        assert cache.counts == [8, 3] and all(map(torch.equal, before, cache.storages[0].tensors()))
        model(random_ids(model, 2, 7), cache=cache, new=[2, 7])


def test_counts_of_new_tokens_are_checked():
    model = random_model()
    ids = random_ids(model, 2, 4)
    for new in ([4], [5, 1], [-1, 2]):
        with pytest.raises(ValueError, match="new: expected 2 counts from 0 to 4"):
            model(ids, cache=model.new_cache(2), new=new)
    with pytest.raises(ValueError, match="new: expected None without a cache"):
        model(ids, new=[4, 4])


Q, KV = torch.randn(2, 4, 1, 16), torch.randn(2, 4, 1, 16)
BAD_CALLS = {
    "no counts": (lambda cache: cache.truncate(None), TypeError, "counts: expected a list of 2 integers, got None"),
    "a text": (lambda cache: cache.truncate("ab"), TypeError, "counts: expected an integer, got 'a'"),
    "flags": (lambda cache: cache.truncate([True, False]), TypeError, "counts: expected an integer, got True"),
    "fractions": (lambda cache: cache.truncate([1.5, 2]), TypeError, "counts: expected an integer, got 1.5"),
    "no copies": (lambda cache: cache.fork(0), ValueError, "n: expected an integer >= 1, got 0"),
    "half a copy": (lambda cache: cache.fork(1.5), TypeError, "n: expected an integer >= 1, got 1.5"),
    "fewer tokens": (lambda cache: cache.extend(-1), ValueError, "num_tokens: expected an integer >= 0, got -1"),
    "tokens": (lambda cache: cache.extend("1"), TypeError, "num_tokens: expected an integer >= 0, got '1'"),
    "last layer": (lambda cache: cache.attend(-1, Q, KV, KV), ValueError, "layer: expected an integer >= 0 and <= 1, got -1"),
    "layer": (lambda cache: cache.attend(2, Q, KV, KV), ValueError, "layer: expected an integer >= 0 and <= 1, got 2"),
    "no queries": (lambda cache: cache.attend(0, None, KV, KV), TypeError, "q: expected a torch.Tensor, got NoneType"),
    "a list": (lambda cache: cache.attend(0, Q, [1], KV), TypeError, "k: expected a torch.Tensor, got list"),
    "cosines": (lambda cache: cache.attend(0, Q, KV, KV, (Q,)), TypeError, "rotation: expected a pair of tensors, cos and"),
    "a number": (lambda cache: cache.attend(0, Q, KV, KV, 3), TypeError, "rotation: expected a pair .*, got 3"),
    "name of a layer": (lambda cache: cache.attend("0", Q, KV, KV), TypeError, "layer: expected an integer .*, got '0'"),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHE_KINDS)
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_change_nothing(case, kind):
    call, error, message = BAD_CALLS[case]
    model = random_model()
    cache = new_cache(model, 2, kind, 96)
    model(random_ids(model, 2, 8), cache=cache)
    before = [x.clone() for x in cache.storages[0].tensors()]
    with pytest.raises(error, match=f"^{message}"):
        call(cache)
    assert cache.counts == [8, 8] and cache.lengths.tolist() == [8, 8]
    assert all(map(torch.equal, before, cache.storages[0].tensors()))


@torch.inference_mode()
def test_a_ring_gives_back_no_more_than_the_tokens_of_the_last_pass():
    """Of each sequence: a pass has as many columns as the longest needs."""
    model = random_model(context=64)
    cache = model.new_cache(2, 60, kind="sliding", window=4)
    model.hidden(random_ids(model, 2, 10), cache)
    cache.extend(3, [3, 1], as_steps=True)
    with pytest.raises(ValueError, match="^counts: expected 11 or 0 for a sequence whose ring buffer of 4 has overwritten"):
        cache.truncate([10, 8])
    cache.truncate([10, 10])
    assert cache.counts == [10, 10]


def test_sequences_move_between_caches_of_a_pool_and_slots_without_one_store_nothing():
    """Two sequences are read in a cache of their own and put into slots 0 and 1 of three: a pass over the first two goes on with
    both, and one over all three, of which the last has no token, too."""
    model = random_model()
    ids = random_ids(model, 2, 12)
    slots = model.new_cache(3, 24, kind="paged", page_size=4)
    read = slots.like(2)
    model(ids[:, :9], cache=read)
    for b, sequence in enumerate(read.sequences):
        slots.pool.allocator.free(slots.sequences[1 - b])
        slots.put(1 - b, sequence)
    before = slots.pool.statistics()["used_pages"]
    swapped = ids.flip(0)
    expected = model(swapped)
    first = slots.first(2)
    torch.testing.assert_close(model(swapped[:, 9:10], cache=first), expected[:, 9:10])
    assert first.counts == [10, 10] and slots.lengths.tolist() == [10, 10, 0]
    slots.counts = [*first.counts, 0]
    padded = torch.cat([swapped[:, 10:11], swapped[:1, :1]])
    torch.testing.assert_close(model(padded, cache=slots, new=[1, 1, 0])[:2], expected[:, 10:11])
    assert slots.lengths.tolist() == [11, 11, 0] and slots.pool.statistics()["used_pages"] == before
