"""A paged KV cache, and the pool of pages that sequences share."""

from typing import Any

import torch

from fastgpt._C import PageAllocator
from fastgpt.cache.base import KVCache
from fastgpt.cache.storage import Storage, on_device
from fastgpt.checks import require_integer


class PagePool:
    """A pool of pages for the keys and values of all layers, which any number of PagedCaches share.

    Args:
        num_pages: number of pages.
        page_size: tokens in a page.
        num_layers, num_kv_heads, head_dim: of the decoder.
        v_head_dim: head dim of values, if it differs from that of keys.
        dtype: dtype of the decoder's keys and values; default: PyTorch's default dtype.
        cache_dtype: dtype in which they are stored: dtype (default), torch.int8 or torch.float8_e4m3fn.
        device: default: PyTorch's default device.

    Raises: TypeError, ValueError, naming the argument.
    """

    def __init__(self, *, num_pages: int, page_size: int = 16, **storage) -> None:
        self.allocator = PageAllocator(num_pages, page_size)  # checks both
        self.page_size = page_size
        self.storage = Storage(num_pages, page_size, **storage)

    def statistics(self) -> dict[str, int]:
        """Counts by name: num_pages, page_size, used_pages, free_pages, shared_pages, sequences, tokens."""
        return self.allocator.statistics()


class PagedCache(KVCache):
    """A KV cache whose sequences take pages from a pool, one at a time as they grow.

    `fork` shares pages, and a shared page is copied when one of its sequences writes to it. `extend` raises OutOfPages (a
    RuntimeError), before anything changes, if the pool has too few free pages.

    Args:
        pool: the PagePool.
        batch_size: number of sequences.
        capacity: the maximum number of tokens in a sequence, if the pool has pages for them.
        window: attention window in tokens, the token itself included; default: full attention.

    Raises: TypeError, ValueError, naming the argument.
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
        """An empty cache of batch_size sequences over the same pool, with the same capacity and window."""
        return PagedCache(self.pool, batch_size=batch_size, capacity=self.capacity, window=self.window)

    def first(self, n: int) -> "PagedCache":
        """A cache of the first n sequences over the same lengths and table of pages. Its `sequences` and `counts` are lists of its
        own, as they are now."""
        result = object.__new__(PagedCache)
        result.__dict__.update(self.__dict__)
        result.lengths, result.block_table = self.lengths[:n], self.block_table[:n]
        result.sequences, result.counts = self.sequences[:n], self.counts[:n]
        result._make_steady()
        return result

    def put(self, b: int, sequence: int) -> None:
        """Makes a sequence of the pool the b-th one of this cache. The one that it replaces stays in the pool."""
        allocator = self.pool.allocator
        pages, length = allocator.pages(sequence), allocator.length(sequence)
        self.sequences[b], self.counts[b] = sequence, length
        self.lengths[b] = length
        if pages:
            self.block_table[b, : len(pages)] = on_device(pages, self.block_table.device).int()

    def fork(self, n: int, into: Any = None) -> "KVCache":
        require_integer("n", n, 1)  # before pages are given back
        if into is not None:
            into.free()
        result = self._forked(n, into)
        result.sequences = [self.pool.allocator.fork(sequence) for sequence in self.sequences for _ in range(n)]
        table = self.block_table.repeat_interleave(n, dim=0)
        result.block_table = table if into is None else into.block_table.copy_(table)
        return result

    def free(self) -> None:
        """Returns all pages to the pool, except those that other sequences share. The cache must not be used afterwards."""
        for sequence in self.sequences:
            self.pool.allocator.free(sequence)
        self.sequences = []
