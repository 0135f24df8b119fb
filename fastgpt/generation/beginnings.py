"""Beginnings of prompts that have been read, for prompts that begin with the same tokens."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

MOST_KEPT = 32


class Beginnings:
    """Sequences of a pool that hold what was read of prompts, in whole pages.

    Args:
        allocator: the pool's.
        page: tokens of a page.
    """

    def __init__(self, allocator: Any, page: int):
        self.allocator, self.page = allocator, page
        self.kept: dict[int, np.ndarray] = {}  # by sequence, the ids that it holds; the one used last at the end

    def common(self, ids: torch.Tensor, other: torch.Tensor | np.ndarray) -> int:
        """How many first tokens of ids (T,) need not be read after `other`: those that are the same, in whole pages, but not the
        last one, whose logits are wanted."""
        n = min(len(ids) - 1, len(other))
        differ = (ids[:n].numpy() != np.asarray(other[:n])).nonzero()[0]
        return (int(differ[0]) if len(differ) else n) // self.page * self.page

    def find(self, ids: torch.Tensor) -> tuple[int, int | None]:
        """How many first tokens of ids need not be read, and the sequence that holds them."""
        stored, sequence = max(((self.common(ids, other), sequence) for sequence, other in self.kept.items()), default=(0, 0))
        if not stored:
            return 0, None
        self.kept[sequence] = self.kept.pop(sequence)
        return stored, sequence

    def keep(self, ids: torch.Tensor, sequence: int) -> int | None:
        """Keeps what a sequence holds of ids, unless it is kept. Returns the sequence that does."""
        whole = len(ids) // self.page * self.page
        new = ids[:whole].numpy()
        for kept, other in self.kept.items():
            if len(other) >= whole and np.array_equal(new, other[:whole]):
                return kept
        if not whole:
            return None
        fork = self.allocator.fork(sequence)
        self.allocator.truncate(fork, whole)
        self.kept[fork] = new
        if len(self.kept) > MOST_KEPT:
            self.drop()
        return fork

    def drop(self, in_use: Collection[int | None] = ()) -> bool:
        """Gives up the one that was not used for longest, and is not in use. Returns whether there is one."""
        sequence = next((sequence for sequence in self.kept if sequence not in in_use), None)
        if sequence is None:
            return False
        del self.kept[sequence]
        self.allocator.free(sequence)
        return True

    def leave_free(self, pages: int, in_use: Collection[int | None]) -> bool:
        """Gives up those that are not in use until so many pages are free. Returns whether they are."""
        while pages > self.allocator.statistics()["free_pages"]:
            if not self.drop(in_use):
                return False
        return True
