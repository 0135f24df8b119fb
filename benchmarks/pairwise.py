"""A few configurations of kernels for all: each pair of choices that occurs together somewhere occurs together in one of them.

What keeps a kernel within its registers mostly depends on two or three choices at once, as a tile and a mask. All pairs are in
a twentieth of what ships, with those that are new to most pairs first, so that whoever has less time takes the first of them.
"""

import heapq
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence

from fastgpt.kernels.tiles import Tile

# Constants of the attention kernels that follow from others, or are one choice with them.
FOLLOWING = {"BLOCK_D", "BLOCK_R", "BLOCK_V", "AT_ONCE", "maxnreg", "enable_fp_fusion"}


def choices(arch: int, configuration: tuple) -> dict[str, Hashable]:
    """What one may vary in a configuration of `shipped_kernels`, by name: the architecture, dtypes, optional arguments, and
    each constant, but that head dims are one choice, and so is a tile of attention."""
    _, dtype, cache_dtype, constants, given = configuration
    found = {"arch": arch, "dtype": dtype, "cache_dtype": cache_dtype, "given": frozenset(given), **constants}
    if "V_DIM" in constants:
        for name, parts in (("head dims", ("HEAD_DIM", "V_DIM")), ("tile", Tile._fields)):
            found[name] = tuple(found.pop(part, None) for part in parts)
        found = {name: choice for name, choice in found.items() if name not in FOLLOWING}
    return found


def pairs(arch: int, configuration: tuple) -> Iterator[tuple]:
    """The pairs of choices of a configuration, each with the kernel's name."""
    named = sorted(choices(arch, configuration).items(), key=lambda choice: choice[0])
    return ((configuration[0].__name__, *two) for two in itertools.combinations(named, 2))


def pairwise_cover(configurations: Iterable[tuple[int, tuple]]) -> list[tuple[int, tuple]]:
    """Some of (architecture, configuration of `shipped_kernels`) that have every pair of choices of all; the same ones, in the
    same order, at every call."""
    configurations = list(configurations)
    numbers: dict[tuple, int] = {}  # of pairs, as sets of numbers are faster
    sets = [{numbers.setdefault(pair, len(numbers)) for pair in pairs(*each)} for each in configurations]
    return [configurations[i] for i in greedy_cover(sets)]


def greedy_cover(sets: Sequence[set[int]]) -> list[int]:
    """Indices of sets whose union is that of all: one after the other that with the most that is new, of several the first.

    What is new in a set only becomes less, so a heap by what was new in it when last looked at has the next one near its top.
    """
    heap = [(-len(each), i, each) for i, each in enumerate(sets)]
    heapq.heapify(heap)
    missing = set().union(*sets)
    chosen = []
    while missing:
        most, i, candidate = heap[0]
        new = candidate & missing
        if len(new) < -most:
            heapq.heapreplace(heap, (-len(new), i, new))
        else:
            chosen.append(i)
            missing -= new
            heapq.heappop(heap)
    return chosen
