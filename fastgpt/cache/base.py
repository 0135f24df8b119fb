"""KV caches: keys and values of past tokens, so that a step computes only its new ones.

A cache serves all layers of a decoder. In each forward pass the decoder calls `extend` once, for the positions of the new
tokens, and then in each layer `append`, which stores the layer's new keys and values, and `attend`, over all that the cache
holds; or for one token of each sequence `step`, which is both. Kinds differ in where they store:

    ContiguousCache   room for `capacity` tokens for each sequence, allocated at once
    SlidingCache      a ring of the last `window` tokens, in layers that have a window
    PagedCache        pages of a pool, taken as sequences grow, and shared by sequences that begin alike
    Uncached          nowhere: attention over the tokens of the call alone

Sequences of a batch may differ in length: the new tokens of a pass are then padded on the left.

No derivatives flow through what is stored: the backward pass after a forward pass with a cache raises RuntimeError, and so do
forward-mode derivatives and transforms of torch.func at once.
"""

from collections.abc import Sequence

import torch

from fastgpt import huge_pages
from fastgpt._C import OutOfPages, PageAllocator
from fastgpt.checks import require_integer
from fastgpt.ops.attention import attention
from fastgpt.ops.attention_with_kv_cache import attention_with_kv_cache, waits
from fastgpt.ops.decode_step import advance
from fastgpt.ops.derivatives import refuse_transforms_of_cache, through_cache
from fastgpt.ops.kv_cache_update import kv_cache_update, rope_kv_cache_update, rope_reference
from fastgpt.ops.quantization import QUANTISED_DTYPES, as_bytes

__all__ = ["CACHE_KINDS", "ContiguousCache", "KVCache", "OutOfPages", "PagePool", "PagedCache", "SlidingCache", "Uncached"]


# Counters of a GPU's kernels for each sequence of a cache: attention_with_kv_cache says how many it needs, which are more only
# for a hundred thousand tokens of a model with dozens of key and value heads.
COUNTERS = 1024
CACHE_KINDS = ("contiguous", "sliding", "paged")


class Storage:
    """Keys and values of every layer, allocated once: (layers, N, H_kv, rows, head dim) each, with scales if quantised.

    Args:
        num_layers, num_kv_heads, head_dim: of the decoder.
        v_head_dim: of values, if another than that of keys.
        N, rows: sequences and tokens of each; or pages and their size.
        dtype: of the decoder's keys and values.
        cache_dtype: dtype, torch.int8 or torch.float8_e4m3fn; default dtype.
    """

    def __init__(
        self, N, rows, *, num_layers, num_kv_heads, head_dim, v_head_dim=None, dtype=None, cache_dtype=None, device=None
    ):
        refuse_transforms_of_cache(filled=False)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        cache_dtype = dtype if cache_dtype is None else cache_dtype
        if cache_dtype not in (dtype, *QUANTISED_DTYPES):
            raise TypeError(
                f"cache_dtype: expected {dtype} (of the model) or {' or '.join(map(str, QUANTISED_DTYPES))}, got {cache_dtype}"
            )
        shape = (num_layers, N, num_kv_heads, rows)
        self.k, self.v = (
            huge_pages.empty((*shape, size), dtype=cache_dtype, device=device).zero_()
            for size in (head_dim, head_dim if v_head_dim is None else v_head_dim)
        )
        self.k_scale = self.v_scale = None
        if cache_dtype in QUANTISED_DTYPES:
            self.k_scale, self.v_scale = (torch.zeros(shape, device=device) for _ in range(2))
        self._make_views()

    def _make_views(self):
        """Views of each layer, made once and not at every step."""
        scales = [(None, None)] * len(self.k) if self.k_scale is None else zip(self.k_scale, self.v_scale)
        self.layers = [
            {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale} for k, v, (k_scale, v_scale) in zip(self.k, self.v, scales)
        ]

    def __getstate__(self):
        state = {name: value for name, value in vars(self).items() if name != "layers"}
        return state | {"k": as_bytes(self.k), "v": as_bytes(self.v), "cache_dtype": self.k.dtype}  # 8-bit floats do not pickle

    def __setstate__(self, state):
        dtype = state.pop("cache_dtype")
        vars(self).update(state, k=state["k"].view(dtype), v=state["v"].view(dtype))
        self._make_views()  # a copy's layers are its own

    def tensors(self):
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors())

    def repeated(self, n: int, into: "Storage | None" = None) -> "Storage":
        """A copy in which each of the N is there n times in a row, in the memory of an earlier one if that is given."""
        result = object.__new__(Storage) if into is None else into
        for name in ("k", "v", "k_scale", "v_scale"):
            x = getattr(self, name)
            copies = None if x is None else as_bytes(x).repeat_interleave(n, dim=1)
            if into is None:
                setattr(result, name, None if x is None else copies.view(x.dtype))
            elif x is not None:
                as_bytes(getattr(into, name)).copy_(copies)
        if into is None:
            result._make_views()
        return result

    def copy(self, source: list[int], target: list[int]) -> None:
        """Copies the sequences or pages `source` to `target`, in every layer."""
        source, target = on_device([source, target], self.k.device)
        for x in map(as_bytes, self.tensors()):
            x[:, target] = x[:, source]


class KVCache:
    """What every kind has. See the module's docstring for how a decoder uses it.

    counts: tokens of each sequence so far, known on the host: no synchronisation to check them.
    lengths: (B,) int32 the same on the device, for the kernels.
    capacity: tokens that a sequence can have; None if the cache sets no limit.
    window: tokens that one attends to, itself included; None for all, or as many as a layer says in `attend`.
    context: keys and values of a second stream (fastgpt/model/encoder_states.py) that the sequences attend to, too; None without one.
    nbytes: bytes of keys, values and scales, used or not.
    reach: tokens that the longest sequence will have when a prompt has joined that comes in pieces; a decoder may rotate keys
        otherwise for it, from the first piece on.
    """

    reach = 0
    causal = True
    context = None
    fits = None  # the id of a model that was seen to have such layers
    casts = False  # its dtype is autocast's, and not that of the model's weights
    block_table = None  # (B, pages) int32, if tokens lie in pages

    def __init__(self, batch_size: int, capacity: int | None, window: int | None, device):
        batch_size = require_integer("batch_size", batch_size, 1)
        self.capacity = None if capacity is None else require_integer("capacity", capacity, 1)
        self.window = None if window is None else require_integer("window", window, 1)
        self.counts = [0] * batch_size
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.positions = None  # (B, T) int32: of the tokens of the current pass; negative for padding
        self._make_steady()

    def _make_steady(self) -> None:
        """Tensors that passes of one token write to: a captured step (fastgpt/generation/replay.py) finds them in place."""
        self._next = torch.zeros_like(self.lengths).unsqueeze(1)  # (B, 1) positions
        self._counters = self.lengths.new_zeros(len(self.lengths) * COUNTERS)

    @property
    def batch_size(self) -> int:
        return len(self.counts)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.counts)

    @property
    def storages(self) -> list[Storage]:
        return [self.storage]

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes for storage in self.storages)

    def extend(self, num_tokens: int, new: list[int] | None = None) -> torch.Tensor:
        """Makes room for the next tokens: `reserve` and `advance`.

        Args:
            num_tokens: T, columns of this pass.
            new: how many of them, the last ones, are tokens of each sequence; the others are padding. Default: all.

        Returns: their positions (B, T) int32, negative for padding.
        Raises: ValueError, before anything changes, when they do not fit.
        """
        self.reserve(num_tokens, new)
        return self.advance(num_tokens, new)

    def reserve(self, num_tokens: int, new: list[int] | None = None) -> None:
        """The host's half of `extend`: takes storage and counts. A step that is replayed has it done before each replay."""
        refuse_transforms_of_cache()
        counts = [num_tokens] * self.batch_size if new is None else self.require_counts(num_tokens, new)
        for stored, count in zip(self.counts, counts):
            if self.capacity is not None and stored + count > self.capacity:
                raise ValueError(
                    f"cache: expected at most {self.capacity} tokens (its capacity), got {stored} stored + {count} new"
                )
        self._take(counts)
        self.counts = [stored + count for stored, count in zip(self.counts, counts)]

    def require_counts(self, num_tokens: int, new: list[int]) -> list[int]:
        """`new`, if it is what `extend` takes. Raises TypeError, ValueError."""
        if not isinstance(new, Sequence) or not all(isinstance(count, int) for count in new):
            raise TypeError(f"new: expected a list of {self.batch_size} integers, got {new!r}")
        if len(new) != self.batch_size or not all(0 <= count <= num_tokens for count in new):
            raise ValueError(f"new: expected {self.batch_size} counts, each from 0 to {num_tokens} (the columns), got {new}")
        return new

    def require_model(self, layers: int, num_kv_heads: int, head_dim: int, device: torch.device) -> None:
        """Raises ValueError if a model's keys and values do not fit in."""
        k, v = self.storages[0].k, self.storages[0].v
        got, of_values = (self.num_layers, k.shape[2], k.shape[4]), v.shape[4]
        if (layers, num_kv_heads, head_dim) != got or of_values != head_dim:
            values = "" if of_values == got[2] else f", with values of {of_values}"
            raise ValueError(
                f"cache: expected one of this model's, with {layers} layers of {num_kv_heads} key heads of {head_dim}, "
                f"got {got[0]} of {got[1]} of {got[2]}{values}"
            )
        if self.lengths.device != device:
            raise ValueError(f"cache: expected device {device}, where the tokens are, got {self.lengths.device}")

    @property
    def dtype(self) -> torch.dtype:
        """In which keys and values are kept."""
        return self.storages[0].k.dtype

    @property
    def num_layers(self) -> int:
        return sum(len(storage.k) for storage in self.storages)

    def advance(self, num_tokens: int, new: list[int] | None = None) -> torch.Tensor:
        """The device's half of `extend`. One token of each sequence: in place, so a CUDA graph can capture it."""
        if num_tokens == 1 and new is None:
            self.positions = self._next
            advance(self.lengths, self.positions)
            return self.positions
        past = self.lengths.unsqueeze(1)
        steps = torch.arange(num_tokens, dtype=torch.int32, device=self.lengths.device)
        if new is None:
            self.positions = past + steps
            self.lengths += num_tokens
        else:
            count = on_device(new, self.lengths.device).int()
            rank = steps - (num_tokens - count).unsqueeze(1)  # of a token among the new ones; negative for padding
            self.positions = torch.where(rank < 0, -1, past + rank)
            self.lengths += count
        return self.positions

    def _take(self, counts: list[int]) -> None:
        """Takes what storage the new tokens need; raises before anything changes."""

    def append(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotation=None) -> torch.Tensor:
        """Stores k (B, H_kv, T, D) and v (B, H_kv, T, D_v) of the current tokens; returns q (B, H, T, D).

        rotation: cos and sin, (positions, R/2) fp32 each, by which q and k are rotated first; default: they are not.
        """
        return store(q, k, v, self.storage.layers[layer], self.positions, rotation=rotation, block_table=self.block_table)

    def attend(self, layer: int, q: torch.Tensor, *, window: int | None = None, **options) -> torch.Tensor:
        """The attention (B, H, T, D_v) of q (B, H, T, D) that `append` returned, or of the last of its tokens only.

        window: of this layer; that of the cache counts as well. Further options: those of `attention`.
        """
        return attend(
            q, self.storage.layers[layer], kv_lengths=self.lengths, window=least(window, self.window),
            block_table=self.block_table, **options,
        )  # fmt: skip

    def step(self, layer: int, q, k, v, rotation=None, *, window: int | None = None, **options) -> torch.Tensor:
        """`append`, and of what it returns `attend`, in a pass of one token: on a GPU in one launch."""
        return step(
            q, k, v, self.storage.layers[layer], self.positions, rotation=rotation, kv_lengths=self.lengths,
            window=least(window, self.window), block_table=self.block_table, counters=self._counters, **options,
        )  # fmt: skip

    def step_waits(self, num_heads: int, dtype: torch.dtype) -> str | None:
        """Why `step`, of queries of so many heads in this dtype, waits for the device, as no CUDA graph can; or None."""
        for storage in self.storages:
            for layer in storage.layers[:1]:
                k, v = (
                    torch.empty(self.batch_size, x.shape[1], 1, x.shape[3], dtype=dtype, device=self.lengths.device)
                    for x in (layer["k"], layer["v"])
                )
                q = k.new_empty(len(k), num_heads, 1, k.shape[3])
                reason = waits(
                    q, k, v, layer["k"], layer["v"], self._next, block_table=self.block_table, k_scale=layer["k_scale"],
                    v_scale=layer["v_scale"],
                )  # fmt: skip
                if reason is not None:
                    return reason
        return None

    def truncate(self, counts: list[int]) -> None:
        """Forgets all but the first counts[b] tokens of each sequence b.

        Raises: ValueError for more tokens than there are, or where older ones are gone (a ring that was full).
        """
        if len(counts) != self.batch_size or not all(0 <= new <= old for new, old in zip(counts, self.counts)):
            raise ValueError(f"counts: expected {self.batch_size}, each from 0 to that of {self.counts}, got {counts}")
        self._give_back(counts)
        self.counts = list(counts)
        self.lengths.copy_(torch.tensor(counts, dtype=torch.int32, device="cpu"))

    def _give_back(self, counts: list[int]) -> None:
        """Gives back storage that truncated sequences no longer need; raises before anything changes."""

    def fork(self, n: int, into: "KVCache | None" = None) -> "KVCache":
        """A cache with n copies of each sequence in a row, which go on apart from each other and from this one.

        into: a fork of one like this, whose sequences are forgotten; what a captured step reads of it stays in place.
        """
        raise NotImplementedError

    def _forked(self, n: int, into: "KVCache | None") -> "KVCache":
        """Everything of a fork but its storage."""
        counts, lengths = [count for count in self.counts for _ in range(n)], self.lengths.repeat_interleave(n)
        if into is not None:
            into.counts, into.reach = counts, self.reach
            into.lengths.copy_(lengths)
            return into
        result = object.__new__(type(self))
        result.__dict__.update(self.__dict__)
        result.counts, result.lengths = counts, lengths
        result.context = None if self.context is None else self.context.repeated(n)
        result._make_steady()
        return result


class ContiguousCache(KVCache):
    """Room for `capacity` tokens for each sequence, allocated at once. Further arguments: `Storage`, `KVCache`."""

    def __init__(self, *, batch_size: int, capacity: int, window: int | None = None, **storage):
        super().__init__(batch_size, capacity, window, storage.get("device"))
        self.storage = Storage(batch_size, capacity, **storage)

    def fork(self, n, into=None):
        result = self._forked(n, into)
        result.storage = self.storage.repeated(n, None if into is None else into.storage)
        return result


class SlidingCache(KVCache):
    """Rings of the last tokens: in a layer with a window, the token at position p is in slot p % window. Nothing is ever
    moved, and memory does not grow with the text.

    Args:
        window: of every layer.
        windows: instead, the window of each layer; None: the layer keeps all `capacity` tokens.
        capacity: tokens that a sequence can have; default: no limit, if every layer has a window.
        storage: `Storage`, but for N and rows.
    """

    def __init__(
        self, *, batch_size: int, window: int | None = None, windows: Sequence[int | None] | None = None,
        capacity: int | None = None, num_layers: int, **storage,
    ):  # fmt: skip
        super().__init__(batch_size, capacity, window, storage.get("device"))
        windows = [window] * num_layers if windows is None else windows
        sizes = [capacity if size is None else size for size in windows]
        if any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"windows: expected integers >= 1, and a capacity for layers without one, got {windows!r}")
        self.rings = {
            size: Ring(size, Storage(batch_size, size, num_layers=sizes.count(size), **storage))
            for size in dict.fromkeys(sizes)
        }
        self.places = [(self.rings[size], sizes[:layer].count(size)) for layer, size in enumerate(sizes)]

    @property
    def storages(self):
        return [ring.storage for ring in self.rings.values()]

    def advance(self, num_tokens, new=None):
        if num_tokens == 1 and new is None:
            positions = super().advance(1)
            for ring in self.rings.values():
                ring.advance(positions, self.lengths)
            return positions
        past_lengths = self.lengths.clone()
        past_counts = [count - (num_tokens if new is None else new[b]) for b, count in enumerate(self.counts)]
        positions = super().advance(num_tokens, new)
        for ring in self.rings.values():
            ring.extend(past_counts, past_lengths, self.counts, self.lengths, positions)
        return positions

    def append(self, layer, q, k, v, rotation=None):
        ring, place = self.places[layer]
        return ring.append(place, q, k, v, self.positions, rotation)

    def attend(self, layer, q, *, window=None, **options):
        ring, place = self.places[layer]
        return ring.attend(place, q, **options)

    def step(self, layer, q, k, v, rotation=None, *, window=None, **options):
        ring, place = self.places[layer]
        return ring.step(place, q, k, v, self.positions, rotation, counters=self._counters, **options)

    def _give_back(self, counts):
        for size in self.rings:
            for new, old in zip(counts, self.counts):
                if 0 < new < old and old > size:
                    raise ValueError(
                        f"counts: expected {old} or 0 for a sequence whose ring of {size} has overwritten older tokens, got {new}"
                    )

    def fork(self, n, into=None):
        result = self._forked(n, into)
        if into is not None:
            for size, ring in self.rings.items():
                ring.storage.repeated(n, into.rings[size].storage)
            return into
        result.rings = {size: Ring(size, ring.storage.repeated(n)) for size, ring in self.rings.items()}
        result.places = [(result.rings[ring.size], place) for ring, place in self.places]
        return result


class Ring:
    """What a SlidingCache holds of the layers that keep `size` tokens of each sequence.

    slots: (B, T) int32, where the tokens of the current pass go; negative for those that are not stored.
    held: (B,) int32, tokens in the ring after it.
    chunk: what a pass attends over if its tokens overwrite some that its first ones still see; else None.
    """

    def __init__(self, size: int, storage: Storage):
        self.size, self.storage, self.chunk = size, storage, None
        # Passes of one token write to these: a captured step (fastgpt/generation/replay.py) finds them in place.
        self._held = torch.zeros(storage.k.shape[1], dtype=torch.int32, device=storage.k.device)
        self._slot = torch.zeros_like(self._held).unsqueeze(1)

    def advance(self, positions, lengths):
        """One new token of each sequence."""
        self.slots = torch.remainder(positions, self.size, out=self._slot)
        self.held = torch.clamp(lengths, max=self.size, out=self._held)
        self.chunk, self.in_order = None, False

    def extend(self, past_counts, past_lengths, counts, lengths, positions):
        """New tokens at `positions` (B, T); counts and lengths, before and after, are those of the cache."""
        self.held, self.chunk = lengths.clamp(max=self.size), None
        self.in_order = max(counts) <= self.size
        if self.in_order:
            self.slots = positions
            return
        # Only the last `size` tokens of each sequence are stored.
        kept = (positions >= 0) & (positions >= (lengths - self.size).unsqueeze(1))
        self.slots = torch.where(kept, positions % self.size, -1)
        if positions.shape[1] > 1:
            self.chunk = self._chunk(past_counts, past_lengths, lengths, positions)

    def _chunk(self, past_counts, past_lengths, lengths, positions):
        """Where the tokens that a pass of several new ones may attend to come from.

        Its first token sees size - 1 older ones, which its last ones replace in the ring. So they are attended in a cache of
        the pass alone: older ones first, in order, then the new ones.
        """
        before = min(max(past_counts), self.size - 1)  # older ones, of the sequence that has most
        old = past_lengths.clamp(max=self.size - 1).unsqueeze(1)  # (B, 1)
        order = torch.arange(before, dtype=torch.int32, device=positions.device)
        ring = (past_lengths.unsqueeze(1) - old + order) % self.size  # (B, before) slots; beyond `old`, anything
        slots = torch.where(positions < 0, -1, positions - (past_lengths.unsqueeze(1) - old))
        return before, ring.long(), slots, old.squeeze(1) + lengths - past_lengths

    def append(self, place, q, k, v, positions, rotation):
        cache = self.storage.layers[place]
        if self.chunk is None:
            return store(q, k, v, cache, positions, slots=self.slots, rotation=rotation)
        before, ring, slots, _ = self.chunk
        B = len(positions)
        self.seen = {}
        for name, x in cache.items():
            self.seen[name] = None
            if x is not None:
                self.seen[name] = x.new_zeros(*x.shape[:2], before + k.shape[2], *x.shape[3:])
                index = ring.view(B, 1, before, *[1] * (x.dim() - 3)).expand(-1, x.shape[1], -1, *x.shape[3:])
                as_bytes(self.seen[name])[:, :, :before] = as_bytes(x).gather(2, index)
        store(q, k, v, cache, positions, slots=self.slots, rotation=rotation)
        return store(q, k, v, self.seen, positions, slots=slots, rotation=rotation)

    def attend(self, place, q, **options):
        if self.chunk is not None:
            seen, self.seen = self.seen, None
            return attend(q, seen, kv_lengths=self.chunk[-1], window=self.size, **options)
        return attend(q, self.storage.layers[place], **self._visible(), **options)

    def step(self, place, q, k, v, positions, rotation, **options):
        return step(
            q, k, v, self.storage.layers[place], positions, slots=self.slots, rotation=rotation, **self._visible(), **options
        )

    def _visible(self) -> dict:
        """Which keys a query sees, as `attention` takes it."""
        if self.in_order:
            return {"kv_lengths": self.held, "window": self.size}
        return {"kv_lengths": self.held, "causal": False}  # in the ring's order: attention has none


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
            rows, columns, pages = on_device([changes.rows, changes.columns, changes.pages], self.block_table.device)
            self.block_table[rows, columns] = pages.int()

    def _give_back(self, counts):
        for sequence, count in zip(self.sequences, counts):
            self.pool.allocator.truncate(sequence, count)

    def like(self, batch_size: int) -> "PagedCache":
        """An empty one of so many sequences over the same pages, with this one's capacity and window."""
        return PagedCache(self.pool, batch_size=batch_size, capacity=self.capacity, window=self.window)

    def fork(self, n, into=None):
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


class Uncached:
    """In place of a cache: each pass attends over its own tokens only, each of them over the last `window`.

    Args:
        causal: False lets tokens attend to later ones as well, as in an encoder.
        lengths: (B,) int32, tokens of each sequence where they differ; the columns from there on are padding, which no token
            attends to. Default: all.
    """

    reach = 0
    context = None  # as of KVCache

    def __init__(self, window: int | None = None, device=None, *, causal: bool = True, lengths: torch.Tensor | None = None):
        self.window, self.device, self.causal, self.lengths = window, device, causal, lengths

    def extend(self, num_tokens: int, new: None = None) -> torch.Tensor:
        """The tokens' positions, (num_tokens,)."""
        self.positions, self.length = torch.arange(num_tokens, device=self.device), num_tokens
        return self.positions

    def append(self, layer, q, k, v, rotation=None):
        if rotation is not None:
            positions = self.positions.expand(len(q), -1)
            q, k = (rope_reference(x, positions, *rotation) for x in (q, k))
        self.k, self.v = k, v
        return q

    def step(self, layer, q, k, v, rotation=None, **options):
        return self.attend(layer, self.append(layer, q, k, v, rotation), **options)

    def visible(self, window: int | None) -> dict:
        """Which keys a query sees, as `attention` takes it. If causal, none sees the padding, which comes after it."""
        lengths = None if self.causal else self.lengths
        return {"causal": self.causal, "kv_lengths": lengths, "window": least(window, self.window)}

    def attend(self, layer, q, *, window=None, **options):
        k, v, self.k, self.v = self.k, self.v, None, None
        return attention(q, k, v, **self.visible(window), **options)


def on_device(numbers: list, device: torch.device) -> torch.Tensor:
    """int64. Copied from pinned memory, a GPU's are there in time for what follows, without the host waiting for it."""
    return torch.tensor(numbers, device="cpu", pin_memory=device.type == "cuda").to(device, non_blocking=True)


def least(a: int | None, b: int | None) -> int | None:
    """The smaller of two windows, of those that there are."""
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def store(q, k, v, cache: dict, positions, *, slots=None, rotation=None, block_table=None) -> torch.Tensor:
    """Stores k and v in `slots` (default: at their positions), rotated if there is a rotation. Returns q, rotated likewise."""
    q, k, v = of_cache(q, k, v, cache)
    options = {"block_table": block_table, "k_scale": cache["k_scale"], "v_scale": cache["v_scale"]}

    def write(q, k, v):
        if rotation is not None:
            return rope_kv_cache_update(q, k, v, cache["k"], cache["v"], positions, *rotation, slots=slots, **options)
        kv_cache_update(k, v, cache["k"], cache["v"], positions if slots is None else slots, **options)
        return q

    return through_cache(write, q, k, v)


def attend(q, cache: dict, **options) -> torch.Tensor:
    options |= {"k_scale": cache["k_scale"], "v_scale": cache["v_scale"]}
    return through_cache(lambda q: attention(q, cache["k"], cache["v"], **options), q)


def step(q, k, v, cache: dict, positions, *, rotation=None, **options) -> torch.Tensor:
    """`store`, and of what it returns `attend`. options: theirs, and counters."""
    q, k, v = of_cache(q, k, v, cache)
    cos, sin = (None, None) if rotation is None else rotation
    options |= {"k_scale": cache["k_scale"], "v_scale": cache["v_scale"]}
    return through_cache(
        lambda q, k, v: attention_with_kv_cache(q, k, v, cache["k"], cache["v"], positions, cos, sin, **options), q, k, v
    )


def of_cache(q, k, v, cache: dict):
    """q, k and v in a cache's dtype: autocast, switched on or off since it was made, or modules of another precision may make
    them in another one."""
    dtype = cache["k"].dtype
    if k.dtype is dtype is q.dtype or dtype in QUANTISED_DTYPES:
        return q, k, v
    return q.to(dtype), k.to(dtype), v.to(dtype)
