"""A sliding-window KV cache: ring buffers of the last tokens."""

from collections.abc import Sequence
from typing import Any

import torch

from fastgpt.cache.base import MAX_STEPS, KVCache, read, require_attend, store, store_and_attend
from fastgpt.cache.storage import Storage
from fastgpt.checks import shown
from fastgpt.ops.quantization import as_bytes


class SlidingCache(KVCache):
    """A KV cache that keeps only the tokens inside the attention window: the token at position p is in slot p % window of a
    ring buffer. Nothing is moved, and memory does not grow with the sequence.

    Args:
        batch_size: number of sequences.
        window: attention window of all layers in tokens, the token itself included.
        windows: the window of each layer instead; None for a layer that keeps all `capacity` tokens.
        capacity: the maximum number of tokens in a sequence; default: no limit, if every layer has a window.
        num_layers: of the decoder.
        storage: num_kv_heads, head_dim, v_head_dim, dtype, cache_dtype and device, as of `ContiguousCache`.

    Raises: TypeError, ValueError, naming the argument.
    """

    in_order = False  # once a ring has wrapped around

    def __init__(
        self,
        *,
        batch_size: int,
        window: int | None = None,
        windows: Sequence[int | None] | None = None,
        capacity: int | None = None,
        num_layers: int,
        **storage,
    ) -> None:
        super().__init__(batch_size, capacity, window, storage.get("device"))
        windows = [window] * num_layers if windows is None else windows
        sizes = [capacity if size is None else size for size in windows]
        if any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"windows: expected integers >= 1, and a capacity for layers without one, got {shown(windows)}")
        self.rings = {
            size: Ring(size, Storage(batch_size, size, num_layers=sizes.count(size), **storage))
            for size in dict.fromkeys(sizes)
        }
        self.steps = False  # whether the last pass was one `as_steps`
        self.latest = [0] * batch_size  # new tokens of each sequence in it
        self.slices = [(self.rings[size], sizes[:layer].count(size)) for layer, size in enumerate(sizes)]  # ring, index in it

    @property
    def storages(self) -> list[Storage]:
        return [ring.storage for ring in self.rings.values()]

    @property
    def max_steps(self) -> int:
        return min(MAX_STEPS, *self.rings)  # no token of a pass overwrites another one

    def reserve(self, num_tokens: int, new: list[int] | None = None) -> None:
        super().reserve(num_tokens, new)
        self.latest = [num_tokens] * self.batch_size if new is None else list(new)

    def advance(self, num_tokens: int, new: list[int] | torch.Tensor | None = None, as_steps: bool = False) -> torch.Tensor:
        self.steps = as_steps
        if as_steps:
            positions = super().advance(num_tokens, new, as_steps)
            for ring in self.rings.values():
                ring.advance_by_steps(positions)
            return positions
        if num_tokens == 1 and new is None:
            positions = super().advance(1)
            for ring in self.rings.values():
                ring.advance(positions, self.lengths)
            return positions
        past_lengths = self.lengths.clone()
        past_counts = [count - (num_tokens if new is None else int(new[b])) for b, count in enumerate(self.counts)]
        positions = super().advance(num_tokens, new)
        for ring in self.rings.values():
            ring.extend(past_counts, past_lengths, self.counts, self.lengths, positions)
        return positions

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        window: int | None = None,
        last_only: bool = False,
        **options,
    ) -> torch.Tensor:
        require_attend(layer, self.slices, q, k, v, rotation)
        if options.get("bias") is not None:
            raise ValueError("bias: expected None in a sliding cache, whose keys are not in the order of their positions")
        ring, index = self.slices[layer]
        if self.steps:
            return ring.attend_by_steps(
                index, q, k, v, rotation=rotation, counters=self._counters, last_only=last_only, **options
            )
        return ring.attend(
            index, q, k, v, self.positions, rotation=rotation, counters=self._counters, last_only=last_only, **options
        )

    def _give_back(self, counts):
        latest = self.latest if self.steps else [0] * self.batch_size  # tokens whose slots can be restored
        for size in self.rings:
            for new, old, last in zip(counts, self.counts, latest):
                if 0 < new < old - last and old > size:
                    raise ValueError(
                        f"counts: expected {old} or 0 for a sequence whose ring buffer of {size} has overwritten older tokens, got {new}"
                    )
        for ring in self.rings.values() if self.steps else ():
            for b, (new, old) in enumerate(zip(counts, self.counts)):
                if 0 < new < old and old > ring.size:
                    ring.restore(b, range(new, old))
        self.steps = False  # they are restored once

    def fork(self, n: int, into: Any = None) -> "KVCache":
        result = self._forked(n, into)
        if into is not None:
            for size, ring in self.rings.items():
                ring.storage.repeated(n, into.rings[size].storage)
            return into
        result.rings = {size: Ring(size, ring.storage.repeated(n)) for size, ring in self.rings.items()}
        result.slices = [(result.rings[ring.size], index) for ring, index in self.slices]
        return result


class Ring:
    """The ring buffers of a SlidingCache for all layers that keep `size` tokens of each sequence.

    slots: (B, T) int32, the slots of the tokens of the current pass; negative for those that are not stored.
    held: (B,) int32, tokens in the ring after this pass.
    in_order: whether slots are positions: no ring has wrapped around.
    chunk: see `_chunk`, if new tokens overwrite keys that the first of them still attend to; else None.
    steps: of a pass `as_steps`, for each of its tokens: positions (B, 1), slots (B, 1) and held (B,).
    overwritten: what was in the slots of such a pass, (layers, B, H_kv, T, ...) of each of the storage's tensors.
    """

    def __init__(self, size: int, storage: Storage):
        self.size, self.storage, self.chunk = size, storage, None
        # Decode steps write to these in place, as a captured step (fastgpt/generation/replay.py) requires.
        self._held = torch.zeros(storage.k.shape[1], dtype=torch.int32, device=storage.k.device)
        self._slot = torch.zeros_like(self._held).unsqueeze(1)
        self._steady: dict[int, tuple[list, list]] = {}  # steps and overwritten, by the number of tokens

    def advance(self, positions: torch.Tensor, lengths: torch.Tensor) -> None:
        """One new token of each sequence."""
        self.slots = torch.remainder(positions, self.size, out=self._slot)
        self.held = torch.clamp(lengths, max=self.size, out=self._held)
        self.chunk, self.in_order = None, False

    def advance_by_steps(self, positions: torch.Tensor) -> None:
        """New tokens at `positions` (B, T), negative for padding, in place; saves what they will overwrite."""
        T = positions.shape[1]
        if T not in self._steady:
            steps = [(self._slot.clone(), self._slot.clone(), self._held.clone()) for _ in range(T)]
            saved = [torch.empty_like(as_bytes(x)[:, :, :, :1]).repeat_interleave(T, 3) for x in self.storage.tensors()]
            self._steady[T] = steps, saved
        self.steps, self.overwritten = self._steady[T]
        slots = torch.where(positions < 0, -1, positions % self.size)
        held = (positions + 1).clamp(max=self.size)
        for t, (position, slot, count) in enumerate(self.steps):
            position.copy_(positions[:, t : t + 1])
            slot.copy_(slots[:, t : t + 1])
            count.copy_(held[:, t])
        index = slots.clamp(min=0).long()
        for x, saved in zip(self.storage.tensors(), self.overwritten):
            rows = index.view(1, len(index), 1, T, *[1] * (x.dim() - 4)).expand(saved.shape)
            torch.gather(as_bytes(x), 3, rows, out=saved)

    def attend_by_steps(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, last_only: bool, **options
    ) -> torch.Tensor:
        """`attend` of a pass `as_steps`, token by token: each overwrites a slot that those before it still attend to."""
        out = []
        for t, (positions, slots, held) in enumerate(self.steps):
            q_t, k_t, v_t = (x[:, :, t : t + 1] for x in (q, k, v))
            out.append(
                store_and_attend(
                    q_t, k_t, v_t, self.storage.layers[index], positions, slots=slots, kv_lengths=held, causal=False, **options
                )
            )
        return out[-1] if last_only or len(out) == 1 else torch.cat(out, dim=2)

    def restore(self, b: int, tokens: range) -> None:
        """Puts back what the last tokens of sequence b, at these positions, have overwritten in the last pass `as_steps`."""
        slots = torch.tensor([token % self.size for token in tokens], device=self._held.device)
        for x, saved in zip(self.storage.tensors(), self.overwritten):
            as_bytes(x)[:, b].index_copy_(2, slots, saved[:, b, :, -len(tokens) :])

    def extend(
        self,
        past_counts: list[int],
        past_lengths: torch.Tensor,
        counts: list[int],
        lengths: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """New tokens at `positions` (B, T); counts and lengths of the cache, before and after them."""
        self.held, self.chunk = lengths.clamp(max=self.size), None
        self.in_order = max(counts) <= self.size
        if self.in_order:
            self.slots = positions
            return
        # Only the last `size` tokens of each sequence are stored.
        stored = (positions >= 0) & (positions >= (lengths - self.size).unsqueeze(1))
        self.slots = torch.where(stored, positions % self.size, -1)
        if positions.shape[1] > 1:
            self.chunk = self._chunk(past_counts, past_lengths, lengths, positions)

    def _chunk(self, past_counts, past_lengths, lengths, positions):
        """How to make a temporary cache for a pass of several new tokens: (older tokens, their slots in the ring, slots of the
        new tokens, lengths).

        The first new token attends to size - 1 older ones, which the last new ones overwrite in the ring. So the pass attends
        to a cache of its own: the older tokens in order, then the new ones.
        """
        before = min(max(past_counts), self.size - 1)  # the most older tokens of a sequence
        old = past_lengths.clamp(max=self.size - 1).unsqueeze(1)  # (B, 1)
        order = torch.arange(before, dtype=torch.int32, device=positions.device)
        ring = (past_lengths.unsqueeze(1) - old + order) % self.size  # (B, before) slots; beyond `old`, anything
        slots = torch.where(positions < 0, -1, positions - (past_lengths.unsqueeze(1) - old))
        return before, ring.long(), slots, old.squeeze(1) + lengths - past_lengths

    def attend(
        self,
        index: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        *,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        counters: torch.Tensor | None,
        last_only: bool,
        **options,
    ) -> torch.Tensor:
        """`KVCache.attend` for the layer with this index in the storage."""
        cache = self.storage.layers[index]
        if self.chunk is None:
            return store_and_attend(
                q, k, v, cache, positions, slots=self.slots, rotation=rotation, counters=counters, last_only=last_only,
                **self._visible(), **options,
            )  # fmt: skip
        before, ring, slots, lengths = self.chunk
        B = len(positions)
        chunk = {}
        for name, x in cache.items():
            chunk[name] = None
            if x is not None:
                chunk[name] = x.new_zeros(*x.shape[:2], before + k.shape[2], *x.shape[3:])
                rows = ring.view(B, 1, before, *[1] * (x.dim() - 3)).expand(-1, x.shape[1], -1, *x.shape[3:])
                as_bytes(chunk[name])[:, :, :before] = as_bytes(x).gather(2, rows)
        store(q, k, v, cache, positions, slots=self.slots, rotation=rotation)
        q = store(q, k, v, chunk, positions, slots=slots, rotation=rotation)
        return read(q[:, :, -1:] if last_only else q, chunk, kv_lengths=lengths, window=self.size, **options)

    def _visible(self) -> dict:
        """The arguments of `attention` that say which keys a query attends to."""
        if self.in_order:
            return {"kv_lengths": self.held, "window": self.size}
        return {"kv_lengths": self.held, "causal": False}  # the order of keys does not matter
