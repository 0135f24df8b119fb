"""A cache that was pickled or copied goes on as the one that it is a copy of, and apart from it."""

import copy
import io
import pickle

import pytest
import torch
from models import random_ids, random_model

from fastgpt import PagedCache, decoding
from fastgpt.cache.uncached import Uncached
from fastgpt.model.rope import Rope

KINDS = [
    {},
    {"cache_dtype": torch.int8},
    {"cache_dtype": torch.float8_e4m3fn, "window": 9},
    {"kind": "sliding", "window": 9},
    {"kind": "paged", "page_size": 4, "num_pages": 60},
    {"kind": "paged", "page_size": 4, "num_pages": 60, "cache_dtype": torch.int8},
]


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": lambda cache: pickle.loads(pickle.dumps(cache)), "deepcopy": copy.deepcopy, "save": saved}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_copied_cache_continues_as_the_original(options, way):
    model = random_model(position="rotary", rope=Rope(16), cross_attention=True)
    ids = random_ids(model, 2, 24)
    original = model.new_cache(2, **options, encoder_states=torch.randn(2, 5, 64), encoder_lengths=[5, 3])
    model(ids[:, :11], cache=original, new=[11, 7])
    size = len(pickle.dumps(original))
    held = original.nbytes + sum(x.nbytes for kv in original.encoder_kv.layers for x in kv)
    assert size < 1.2 * held + 20_000
    other = WAYS[way](original)
    forks = [cache.fork(2) for cache in (original, other)]
    for mine, theirs in ((original, other), forks):
        tokens = ids[:, 11:] if mine is original else ids[:, 11:].repeat_interleave(2, 0)
        if options.get("kind") != "sliding":
            for cache in (mine, theirs):
                cache.truncate([count - 2 for count in cache.counts])
        steps = [decoding(model, cache) for cache in (mine, theirs)]
        for token in tokens[:, :6].T:
            assert torch.equal(*(step(token) for step in steps))
        assert torch.equal(model(tokens[:, 6:9], cache=mine), model(tokens[:, 6:9], cache=theirs))
        assert mine.counts == theirs.counts
        if isinstance(mine, PagedCache):
            assert mine.pool.statistics() == theirs.pool.statistics() and torch.equal(mine.block_table, theirs.block_table)
        for a, b in zip(mine.storages, theirs.storages, strict=True):
            assert a.k.data_ptr() != b.k.data_ptr()
            assert all(layer["k"].data_ptr() == k.data_ptr() for layer, k in zip(b.layers, b.k))


@torch.no_grad()
def test_caches_of_one_pool_are_copied_with_it_once():
    model = random_model()
    first = model.new_cache(1, kind="paged", page_size=4, num_pages=10)
    second = PagedCache(first.pool, batch_size=1, capacity=96)
    model(random_ids(model, 1, 7), cache=first), model(random_ids(model, 1, 9), cache=second)
    a, b = copy.deepcopy((first, second))
    assert a.pool is b.pool and a.pool is not first.pool
    a.free()
    assert a.pool.statistics()["used_pages"] == 3 and first.pool.statistics()["used_pages"] == 5


def test_the_pages_of_a_damaged_copy():
    allocator = random_model().new_cache(1, kind="paged", num_pages=3).pool.allocator
    state = allocator.__getstate__()
    for change in ([0, 0, 1], [0, 1], [0, 1, 7]):  # a page twice, one missing, one that there is not
        with pytest.raises(ValueError, match="pages: expected"):
            type(allocator).__new__(type(allocator)).__setstate__((*state[:3], change, state[4]))


def test_copying_anything_but_a_cache_raises():
    model = random_model(position="rotary", rope=Rope(16))
    plain = Uncached(9)
    ids = random_ids(model, 1, 12)
    assert torch.equal(model(ids, cache=copy.deepcopy(plain)), model(ids, cache=plain))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(ids), model(ids))
