"""What every kind of cache has, and how keys and values are stored and read."""

from collections.abc import Sequence
from typing import Any

import torch

from fastgpt.cache.storage import Storage, on_device
from fastgpt.checks import require_integer
from fastgpt.ops.attention import attention
from fastgpt.ops.attention_with_kv_cache import attention_with_kv_cache, waits
from fastgpt.ops.decode_step import advance
from fastgpt.ops.derivatives import refuse_transforms_of_cache, through_cache
from fastgpt.ops.kv_cache_update import kv_cache_update, rope_kv_cache_update
from fastgpt.ops.quantization import QUANTIZED_DTYPES

# Counters of a GPU's kernels for each sequence of a cache: attention_with_kv_cache says how many it needs, which are more only
# for a hundred thousand tokens of a model with dozens of key and value heads.
COUNTERS = 1024


class KVCache:
    """What every kind has. See `fastgpt.cache` for how a decoder uses it.

    counts: tokens of each sequence so far, known on the host: no synchronization to check them.
    lengths: (B,) int32 the same on the device, for the kernels.
    capacity: tokens that a sequence can have; None if the cache sets no limit.
    window: tokens that one attends to, itself included; None for all, or as many as a layer says in `attend`.
    encoder_kv: keys and values of a second stream (fastgpt/model/encoder_states.py) that the sequences attend to, too; None without one.
    nbytes: bytes of keys, values and scales, used or not.
    expected_length: tokens that the longest sequence will have when a prompt has joined that comes in pieces; a decoder may rotate keys
        otherwise for it, from the first piece on.
    """

    storage: Storage
    expected_length = 0
    causal = True
    encoder_kv: Any = None
    fits = None  # the id of a model that was seen to have such layers
    casts = False  # its dtype is autocast's, and not that of the model's weights
    block_table: torch.Tensor | None = None  # (B, pages) int32, if tokens lie in pages

    def __init__(self, batch_size: int, capacity: int | None, window: int | None, device: torch.device | str | None) -> None:
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
        """Stores k and v of the current tokens, and attends over all that the cache then holds of the layer; of one token, on
        a GPU, in one launch.

        Args:
            q, k, v: (B, H, T, D), (B, H_kv, T, D) and (B, H_kv, T, D_v).
            rotation: cos and sin, (positions, R/2) fp32 each, by which q and k are rotated first; default: they are not.
            window: of this layer; that of the cache counts as well.
            last_only: attend with the last token of each sequence only.
            options: further ones of `attention`.

        Returns: (B, H, T, D_v), or with last_only (B, H, 1, D_v), in the dtype of q, or of the cache if that is another.
        """
        return store_and_attend(
            q, k, v, self.storage.layers[layer], self.positions, rotation=rotation, block_table=self.block_table,
            counters=self._counters, last_only=last_only, kv_lengths=self.lengths, window=least(window, self.window), **options,
        )  # fmt: skip

    def attend_waits(self, num_heads: int, dtype: torch.dtype) -> str | None:
        """Why `attend`, of one query of so many heads in this dtype, waits for the device, as no CUDA graph can; or None."""
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

    def _forked(self, n: int, into: "KVCache | None") -> Any:
        """Everything of a fork but its storage."""
        counts, lengths = [count for count in self.counts for _ in range(n)], self.lengths.repeat_interleave(n)
        if into is not None:
            into.counts, into.expected_length = counts, self.expected_length
            into.lengths.copy_(lengths)
            return into
        result = object.__new__(type(self))
        result.__dict__.update(self.__dict__)
        result.counts, result.lengths = counts, lengths
        result.encoder_kv = None if self.encoder_kv is None else self.encoder_kv.repeated(n)
        result._make_steady()
        return result


def least(a: int | None, b: int | None) -> int | None:
    """The smaller of two windows, of those that there are."""
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def store_and_attend(
    q, k, v, cache: dict, positions, *, rotation, counters, last_only=False, slots=None, block_table=None, **options
) -> torch.Tensor:
    """`KVCache.attend` over one layer's tensors. options: what a query sees, and others of `attention`."""
    if q.shape[2] == 1:
        return step(
            q, k, v, cache, positions, rotation=rotation, counters=counters, slots=slots, block_table=block_table, **options
        )
    q = store(q, k, v, cache, positions, slots=slots, rotation=rotation, block_table=block_table)
    return read(q[:, :, -1:] if last_only else q, cache, block_table=block_table, **options)


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


def read(q, cache: dict, **options) -> torch.Tensor:
    """The attention of q over what is stored. options: of `attention`."""
    options |= {"k_scale": cache["k_scale"], "v_scale": cache["v_scale"]}
    return through_cache(lambda q: attention(q, cache["k"], cache["v"], **options), q)


def step(q, k, v, cache: dict, positions, *, rotation=None, **options) -> torch.Tensor:
    """`store` one token of each sequence and `read`, in one operation. options: theirs, and counters."""
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
    if k.dtype is dtype is q.dtype or dtype in QUANTIZED_DTYPES:
        return q, k, v
    return q.to(dtype), k.to(dtype), v.to(dtype)
