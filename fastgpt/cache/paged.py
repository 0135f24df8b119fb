"""A cache in pages of a pool that sequences share."""

from typing import Any

import torch

from fastgpt._C import PageAllocator
from fastgpt.cache.base import KVCache
from fastgpt.cache.storage import Storage, on_device


class PagePool:
    """`num_pages` pages of `page_size` tokens, for all layers, that the sequences of any number of PagedCaches share.

    Args: num_pages; page_size; further ones: `Storage`.
    """

    def __init__(self, *, num_pages: int, page_size: int = 16, **storage) -> None:
        self.allocator = PageAllocator(num_pages, page_size)  # which checks them
        self.page_size = page_size
        self.storage = Storage(num_pages, page_size, **storage)

    def statistics(self) -> dict[str, int]:
        """num_pages, page_size, used_pages, free_pages, shared_pages, sequences, tokens."""
        return self.allocator.statistics()


class PagedCache(KVCache):
    """Sequences in pages of a pool, taken one by one as they grow; `fork` shares them, and copies a page when one of its
    sequences is about to write to it.

    Args:
        pool: the pages.
        capacity: tokens that a sequence can have, as far as there are pages.

    `extend` raises OutOfPages (a RuntimeError), before anything changes, when the pool has too few free pages. `free`
    gives the pages back; the cache must not be used afterwards.
    """

    def __init__(self, pool: PagePool, *, batch_size: int, capacity: int, window: int | None = None) -> None:
        device = pool.storage.k.device
        super().__init__(batch_size, capacity, window, device)
        self.pool, self.storage = pool, pool.storage
        self.sequences = [pool.allocator.allocate() for _ in range(batch_size)]
        pages = -(-capacity // pool.page_size)
        self.block_table = torch.zeros(batch_size, pages, dtype=torch.int32, device=device)

    def _take(self, counts):
        changes = self.pool.allocator.append(self.sequences, counts)
        if changes.copy_from:
            self.storage.copy(changes.copy_from, changes.copy_to)
        if changes.rows:
            rows, columns, pages = on_device([changes.rows, changes.columns, changes.pages], self.block_table.device)
            self.block_table[rows, columns] = pages.int()

    def _give_back(self, counts):
        for sequence, count in zip(self.sequences, counts):
            self.pool.allocator.truncate(sequence, count)

    def like(self, batch_size: int) -> "PagedCache":
        """An empty one of so many sequences over the same pages, with this one's capacity and window."""
        return PagedCache(self.pool, batch_size=batch_size, capacity=self.capacity, window=self.window)

    def fork(self, n: int, into: Any = None) -> "KVCache":
        if into is not None:
            into.free()
        result = self._forked(n, into)
        result.sequences = [self.pool.allocator.fork(sequence) for sequence in self.sequences for _ in range(n)]
        table = self.block_table.repeat_interleave(n, dim=0)
        result.block_table = table if into is None else into.block_table.copy_(table)
        return result

    def free(self) -> None:
        """Gives the pages back that no other sequence shares."""
        for sequence in self.sequences:
            self.pool.allocator.free(sequence)
        self.sequences = []
