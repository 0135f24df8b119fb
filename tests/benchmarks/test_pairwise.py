"""The configurations that stand for all that ships have every pair of choices, and are the same ones every time."""

import itertools
import random

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.machine_code import SHARED_MEMORY  # noqa: E402
from benchmarks.pairwise import choices, greedy_cover, pairs, pairwise_cover  # noqa: E402
from benchmarks.shipped_kernels import shipped  # noqa: E402


def test_cover_takes_the_set_with_most_new_pairs():
    assert greedy_cover([{1, 2}, {3}, {1, 2, 3}, {4, 5}, {2, 3, 4}]) == [2, 3]
    assert greedy_cover([{1}, {2}, {1}]) == [0, 1]  # of several the first
    assert greedy_cover([]) == greedy_cover([set()]) == []


def test_cover_equals_that_of_an_exhaustive_greedy_search():
    generator = random.Random(0)
    for _ in range(20):
        sets = [set(generator.sample(range(60), generator.randint(1, 12))) for _ in range(50)]
        missing, expected = set().union(*sets), []
        while missing:
            expected.append(max(range(len(sets)), key=lambda i: (len(sets[i] & missing), -i)))
            missing -= sets[expected[-1]]
        assert greedy_cover(sets) == expected


def test_choices_of_a_configuration():
    """Head dims are one choice, and so is a tile; what follows from others is none."""
    configuration = next(x for x in shipped(90, ["attention_decode"]) if "cos_ptr" in x[4] and x[3]["HEAD_DIM"] == 576)
    found = choices(90, configuration)
    assert found["arch"] == 90 and found["head dims"] == (576, 512) and found["dtype"] is torch.float16
    assert found["given"] == set(configuration[4]) and found["SPLIT"] == configuration[3]["SPLIT"]
    assert set(found) == {
        "arch", "dtype", "cache_dtype", "given", "head dims", "tile", "SPLIT", "IS_CAUSAL", "INTERLEAVED", "MASK_UNIT",
        "BIAS_UNIT", "PDL", "launch_pdl",
    }  # fmt: skip


@pytest.mark.slow
def test_cover_of_shipped_kernels_has_every_pair():
    every = [(arch, configuration) for arch in SHARED_MEMORY for configuration in shipped(arch)]
    chosen = pairwise_cover(every)
    of_attention = [sum("HEAD_DIM" in x[3] for _, x in listed) for listed in (chosen, every)]  # which has the most choices
    assert of_attention[0] * 24 < of_attention[1] and len(chosen) * 18 < len(every)
    assert {pair for each in chosen for pair in pairs(*each)} == {pair for each in every for pair in pairs(*each)}
    assert chosen == pairwise_cover(every)
    wide = {(arch, x[0].__name__) for arch, x in chosen if x[3].get("HEAD_DIM") == 576}
    assert wide >= set(itertools.product(SHARED_MEMORY, ("attention_forward_kernel", "attend_split_kernel")))
