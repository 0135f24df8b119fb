"""KV caches: keys and values of past tokens, so that a step computes only its new ones.

A cache serves all layers of a decoder. In each forward pass the decoder calls `extend` once, for the positions of the new
tokens, and then `attend` in each layer, which stores the layer's new keys and values and attends over all that the cache
holds. Kinds differ in where they store:

    ContiguousCache   room for `capacity` tokens for each sequence, allocated at once
    SlidingCache      a ring of the last `window` tokens
    PagedCache        pages of a pool, taken as sequences grow, and shared by sequences that begin alike
    Uncached          nowhere: attention over the tokens of the call alone

Sequences of a batch may differ in length: the new tokens of a pass are then padded on the left.
"""

import torch

from fastgpt._C import OutOfPages, PageAllocator
from fastgpt import memory
from fastgpt.ops.attention import attention
from fastgpt.ops.kv_cache_update import kv_cache_update
from fastgpt.ops.quantisation import QUANTISED_DTYPES, as_bytes

__all__ = ["CACHE_KINDS", "ContiguousCache", "KVCache", "OutOfPages", "PagePool", "PagedCache", "SlidingCache", "Uncached"]


CACHE_KINDS = ("contiguous", "sliding", "paged")


class Storage:
    """Keys and values of every layer, allocated once: (layers, N, H_kv, rows, D) each, with scales if quantised.

    Args:
        num_layers, num_kv_heads, head_dim: of the decoder.
        N, rows: sequences and tokens of each; or pages and their size.
        dtype: of the decoder's keys and values.
        cache_dtype: dtype, torch.int8 or torch.float8_e4m3fn; default dtype.
    """

    def __init__(self, N, rows, *, num_layers, num_kv_heads, head_dim, dtype=None, cache_dtype=None, device=None):
        dtype = torch.get_default_dtype() if dtype is None else dtype
        cache_dtype = dtype if cache_dtype is None else cache_dtype
        if cache_dtype not in (dtype, *QUANTISED_DTYPES):
            raise TypeError(
                f"cache_dtype: expected {dtype} (of the model) or {' or '.join(map(str, QUANTISED_DTYPES))}, "
                f"got {cache_dtype}"
            )
        shape = (num_layers, N, num_kv_heads, rows, head_dim)
        self.k, self.v = (memory.empty(shape, dtype=cache_dtype, device=device).zero_() for _ in range(2))
        self.k_scale = self.v_scale = None
        if cache_dtype in QUANTISED_DTYPES:
            self.k_scale, self.v_scale = (torch.zeros(shape[:-1], device=device) for _ in range(2))
        self._make_views()

    def _make_views(self):
        """Views of each layer, made once and not at every step."""
        scales = [(None, None)] * len(self.k) if self.k_scale is None else zip(self.k_scale, self.v_scale)
        self.layers = [
            {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
            for k, v, (k_scale, v_scale) in zip(self.k, self.v, scales)
        ]

    def tensors(self):
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors())

    def repeated(self, n: int) -> "Storage":
        """A copy in which each of the N is there n times in a row."""
        result = object.__new__(Storage)
        for name in ("k", "v", "k_scale", "v_scale"):
            x = getattr(self, name)
            setattr(result, name, None if x is None else as_bytes(x).repeat_interleave(n, dim=1).view(x.dtype))
        result._make_views()
        return result

    def copy(self, source: list[int], target: list[int]) -> None:
        """Copies the sequences or pages `source` to `target`, in every layer."""
        source, target = (torch.tensor(index, device=self.k.device) for index in (source, target))
        for x in map(as_bytes, self.tensors()):
            x[:, target] = x[:, source]


class KVCache:
    """What every kind has. See the module's docstring for how a decoder uses it.

    counts: tokens of each sequence so far, known on the host: no synchronisation to check them.
    lengths: (B,) int32 the same on the device, for the kernels.
    capacity: tokens that a sequence can have; None if the cache sets no limit.
    window: tokens that one attends to, itself included; None for all.
    nbytes: bytes of keys, values and scales, used or not.
    """

    storage: Storage

    def __init__(self, batch_size: int, capacity: int | None, window: int | None, device):
        for name, value in (("batch_size", batch_size), ("capacity", capacity), ("window", window)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        self.capacity, self.window = capacity, window
        self.counts = [0] * batch_size
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.positions = None  # (B, T) int32: of the tokens of the current pass; negative for padding
        self._make_steady()

    def _make_steady(self) -> None:
        """Tensors that passes of one token write to: a captured step (fastgpt/capture.py) finds them in place."""
        self._next = torch.zeros_like(self.lengths).unsqueeze(1)  # (B, 1) positions

    @property
    def batch_size(self) -> int:
        return len(self.counts)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.counts)

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    def extend(self, num_tokens: int, new: list[int] | None = None) -> torch.Tensor:
        """Makes room for the next tokens.

        Args:
            num_tokens: T, columns of this pass.
            new: how many of them, the last ones, are tokens of each sequence; the others are padding. Default: all.

        Returns: their positions (B, T) int32, negative for padding.
        Raises: ValueError, before anything changes, when they do not fit.
        """
        counts = [num_tokens] * self.batch_size if new is None else new
        if len(counts) != self.batch_size or not all(0 <= count <= num_tokens for count in counts):
            raise ValueError(
                f"new: expected {self.batch_size} counts, each from 0 to {num_tokens} (the columns), got {new}"
            )
        for stored, count in zip(self.counts, counts):
            if self.capacity is not None and stored + count > self.capacity:
                raise ValueError(
                    f"cache: expected at most {self.capacity} tokens (its capacity), got {stored} stored + {count} new"
                )
        self._take(counts)
        self.counts = [stored + count for stored, count in zip(self.counts, counts)]
        past = self.lengths.unsqueeze(1)
        if num_tokens == 1 and new is None:
            self.positions = self._next.copy_(past)
            self.lengths += 1
            return self.positions
        steps = torch.arange(num_tokens, dtype=torch.int32, device=self.lengths.device)
        if new is None:
            self.positions = past + steps
            self.lengths += num_tokens
        else:
            count = torch.tensor(new, dtype=torch.int32, device=self.lengths.device)
            rank = steps - (num_tokens - count).unsqueeze(1)  # of a token among the new ones; negative for padding
            self.positions = torch.where(rank < 0, -1, past + rank)
            self.lengths += count
        return self.positions

    def _take(self, counts: list[int]) -> None:
        """Takes what storage the new tokens need; raises before anything changes."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores k, v (B, H_kv, T, D) of the current tokens; returns the attention of q (B, H, T, D), or of the last of
        them only."""
        raise NotImplementedError

    def truncate(self, counts: list[int]) -> None:
        """Forgets all but the first counts[b] tokens of each sequence b.

        Raises: ValueError for more tokens than there are, or where older ones are gone (a ring that was full).
        """
        if len(counts) != self.batch_size or not all(0 <= new <= old for new, old in zip(counts, self.counts)):
            raise ValueError(f"counts: expected {self.batch_size}, each from 0 to that of {self.counts}, got {counts}")
        self._give_back(counts)
        self.counts = list(counts)
        self.lengths.copy_(torch.tensor(counts, dtype=torch.int32))

    def _give_back(self, counts: list[int]) -> None:
        """Gives back storage that truncated sequences no longer need; raises before anything changes."""

    def fork(self, n: int) -> "KVCache":
        """A cache with n copies of each sequence in a row, which go on apart from each other and from this one."""
        raise NotImplementedError

    def _forked(self, n: int) -> "KVCache":
        """Everything of a fork but its storage."""
        result = object.__new__(type(self))
        result.__dict__.update(self.__dict__)
        result.counts = [count for count in self.counts for _ in range(n)]
        result.lengths = self.lengths.repeat_interleave(n)
        result._make_steady()
        return result


class ContiguousCache(KVCache):
    """Room for `capacity` tokens for each sequence, allocated at once. Further arguments: `Storage`, `KVCache`."""

    def __init__(self, *, batch_size: int, capacity: int, window: int | None = None, **storage):
        super().__init__(batch_size, capacity, window, storage.get("device"))
        self.storage = Storage(batch_size, capacity, **storage)

    def attend(self, layer, q, k, v):
        cache = self.storage.layers[layer]
        store(k, v, cache, self.positions)
        return attend(q, cache, kv_lengths=self.lengths, window=self.window)

    def fork(self, n):
        result = self._forked(n)
        result.storage = self.storage.repeated(n)
        return result


class SlidingCache(KVCache):
    """A ring of the last `window` tokens: the token at position p is in slot p % window. Nothing is ever moved.

    Memory does not grow with the text, and `capacity` (default: none) need not be set.
    """

    def __init__(self, *, batch_size: int, window: int, capacity: int | None = None, **storage):
        super().__init__(batch_size, capacity, window, storage.get("device"))
        self.storage = Storage(batch_size, window, **storage)

    def _make_steady(self):
        super()._make_steady()
        self._slot, self._held = torch.zeros_like(self._next), torch.zeros_like(self.lengths)

    def extend(self, num_tokens, new=None):
        if num_tokens == 1 and new is None:
            positions = super().extend(1)
            self.slots = torch.remainder(positions, self.window, out=self._slot)
            self.held = torch.clamp(self.lengths, max=self.window, out=self._held)
            self.chunk = None
            return positions
        past_counts, past_lengths = self.counts, self.lengths.clone()
        positions = super().extend(num_tokens, new)
        # Only the last `window` tokens of each sequence are stored.
        kept = positions >= (self.lengths - self.window).unsqueeze(1)
        self.slots = torch.where(kept & (positions >= 0), positions % self.window, -1)
        self.held = self.lengths.clamp(max=self.window)  # (B,) tokens in the ring
        self.chunk = None if num_tokens == 1 else self._chunk(past_counts, past_lengths, positions)
        return positions

    def _give_back(self, counts):
        for new, old in zip(counts, self.counts):
            if new < old and old > self.window:
                raise ValueError(
                    f"counts: expected {old} for a sequence whose ring of {self.window} has overwritten older tokens, got {new}"
                )

    def _chunk(self, past_counts, past_lengths, positions):
        """Where the tokens that a pass of several new ones may attend to come from.

        Its first token sees window - 1 older ones, which its last ones replace in the ring. So they are attended in a
        cache of the pass alone: older ones first, in order, then the new ones.
        """
        before = min(max(past_counts), self.window - 1)  # older ones, of the sequence that has most
        old = past_lengths.clamp(max=self.window - 1).unsqueeze(1)  # (B, 1)
        order = torch.arange(before, dtype=torch.int32, device=positions.device)
        ring = (past_lengths.unsqueeze(1) - old + order) % self.window  # (B, before) slots; beyond `old`, anything
        slots = torch.where(positions < 0, -1, positions - (past_lengths.unsqueeze(1) - old))
        new = self.lengths - past_lengths
        return before, ring.long(), slots, old.squeeze(1) + new

    def attend(self, layer, q, k, v):
        cache = self.storage.layers[layer]
        if self.chunk is None:
            store(k, v, cache, self.slots)
            return attend(q, cache, kv_lengths=self.held, causal=False)  # in the ring's order: attention has none
        before, ring, slots, lengths = self.chunk
        chunk = {}
        for name, x in cache.items():
            chunk[name] = None
            if x is not None:
                chunk[name] = x.new_zeros(*x.shape[:2], before + k.shape[2], *x.shape[3:])
                index = ring.view(self.batch_size, 1, before, *[1] * (x.dim() - 3)).expand(-1, x.shape[1], -1, *x.shape[3:])
                as_bytes(chunk[name])[:, :, :before] = as_bytes(x).gather(2, index)
        store(k, v, chunk, slots)
        out = attend(q, chunk, kv_lengths=lengths, window=self.window)
        store(k, v, cache, self.slots)
        return out

    def fork(self, n):
        result = self._forked(n)
        result.storage = self.storage.repeated(n)
        return result


class PagePool:
    """`num_pages` pages of `page_size` tokens, for all layers, that the sequences of any number of PagedCaches share.

    Args: num_pages; page_size; further ones: `Storage`.
    """

    def __init__(self, *, num_pages: int, page_size: int = 16, **storage):
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

    def __init__(self, pool: PagePool, *, batch_size: int, capacity: int, window: int | None = None):
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
            rows, columns, pages = torch.tensor(
                [changes.rows, changes.columns, changes.pages], device=self.block_table.device
            )
            self.block_table[rows, columns] = pages.int()

    def _give_back(self, counts):
        for sequence, count in zip(self.sequences, counts):
            self.pool.allocator.truncate(sequence, count)

    def attend(self, layer, q, k, v):
        cache = self.storage.layers[layer]
        store(k, v, cache, self.positions, self.block_table)
        return attend(q, cache, kv_lengths=self.lengths, window=self.window, block_table=self.block_table)

    def fork(self, n):
        result = self._forked(n)
        result.sequences = [self.pool.allocator.fork(sequence) for sequence in self.sequences for _ in range(n)]
        result.block_table = self.block_table.repeat_interleave(n, dim=0)
        return result

    def free(self) -> None:
        """Gives the pages back that no other sequence shares."""
        for sequence in self.sequences:
            self.pool.allocator.free(sequence)
        self.sequences = []


class Uncached:
    """In place of a cache: each pass attends over its own tokens only, each of them over the last `window`."""

    def __init__(self, window: int | None = None, device=None):
        self.window, self.device = window, device

    def extend(self, num_tokens: int, new: None = None) -> torch.Tensor:
        """The tokens' positions, (num_tokens,)."""
        return torch.arange(num_tokens, device=self.device)

    def attend(self, layer, q, k, v):
        return attention(q, k, v, window=self.window)


def store(k, v, cache: dict, slots, block_table=None) -> None:
    kv_cache_update(
        k, v, cache["k"], cache["v"], slots,
        block_table=block_table, k_scale=cache["k_scale"], v_scale=cache["v_scale"],
    )  # fmt: skip


def attend(q, cache: dict, **options) -> torch.Tensor:
    return attention(q, cache["k"], cache["v"], k_scale=cache["k_scale"], v_scale=cache["v_scale"], **options)
