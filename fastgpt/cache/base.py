"""The base class of KV caches, and how keys and values are stored and attended to."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastgpt.cache.storage import Storage, fitting_into_memory, on_device
from fastgpt.checks import require_integer, require_tensor, shown
from fastgpt.ops.attention import attention
from fastgpt.ops.attention_with_kv_cache import attention_with_kv_cache, waits
from fastgpt.ops.decode_step import advance
from fastgpt.ops.derivatives import refuse_transforms_of_cache, through_cache
from fastgpt.ops.kv_cache_update import kv_cache_update, rope_kv_cache_update
from fastgpt.ops.quantization import QUANTIZED_DTYPES

# int32 counters for each sequence, for attention_with_kv_cache on a GPU, which says how many it needs: more only for a hundred
# thousand tokens and dozens of key and value heads.
COUNTERS = 1024
# Tokens of a pass `as_steps`: kFewTokens in csrc/attention/attention.h, up to which each has the bits of a pass of its own.
MAX_STEPS = 8


class KVCache:
    """The base class of KV caches: keys and values of past tokens, for all layers of a decoder.

    `GPT.new_cache` makes one, and `model(ids, cache=cache)` uses it. In a decoder of your own, call `extend` once for each
    forward pass, and `attend` in each layer.

    counts: list of B integers, the tokens of each sequence so far; on the host, so reading them needs no device sync.
    lengths: (B,) int32 on the device, equal to counts.
    length: tokens of the longest sequence.
    batch_size: B.
    capacity: the maximum number of tokens in a sequence; None for no limit.
    window: attention window in tokens, the token itself included; None for full attention. A layer may have a smaller one.
    dtype: in which keys and values are stored.
    nbytes: bytes of keys, values and scales, used or not.
    """

    storage: Storage
    # Length that the longest sequence will have once all chunks of a prompt are stored: longrope rotates keys by it from the
    # first chunk on.
    expected_length = 0
    causal = True
    encoder_kv: Any = None  # keys and values of encoder states (fastgpt/model/encoder_states.py), for cross-attention
    position_bias: torch.Tensor | None = None  # (B or 1, H, T, S): of the current pass's tokens, see `add_bias`
    in_order = True  # whether keys lie in the order of their positions
    fits = None  # id of the last model that `require_model` accepted
    casts = False  # whether its dtype is that of autocast and not that of the model's weights
    block_table: torch.Tensor | None = None  # (B, pages) int32, of a paged cache

    def __init__(self, batch_size: int, capacity: int | None, window: int | None, device: torch.device | str | None) -> None:
        batch_size = require_integer("batch_size", batch_size, 1, 2**31 - 1)
        self.capacity = None if capacity is None else require_integer("capacity", capacity, 1, 2**31 - 1)
        self.window = None if window is None else require_integer("window", window, 1)
        self.positions: torch.Tensor | None = None  # (B, T) int32: of the current pass's tokens; negative for padding
        with fitting_into_memory():
            self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
            self._make_steady()
            self.counts = [0] * batch_size

    def _make_steady(self) -> None:
        """Allocates the tensors that decode steps write to in place, as a captured step (fastgpt/generation/replay.py) requires."""
        self._next = torch.zeros_like(self.lengths).unsqueeze(1)  # (B, 1) positions
        self._steady_positions = {1: self._next}  # by the number of tokens, (B, T)
        self._steady_bias: dict[int, torch.Tensor] = {}  # likewise, (B, H, T, S)
        self.position_bias = None
        self._counters = self.lengths.new_zeros(len(self.lengths) * COUNTERS)

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
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
        """Bytes of keys, values and scales, used or not."""
        return sum(storage.nbytes for storage in self.storages)

    def extend(self, num_tokens: int, new: list[int] | None = None, *, as_steps: bool = False) -> torch.Tensor:
        """Makes room for new tokens and returns their positions. Call it once for each forward pass.

        Args:
            num_tokens: T, columns of this pass.
            new: the number of new tokens of each sequence: the last new[b] columns. The columns before them are padding.
                Default: all columns.
            as_steps: store and attend as T passes of one token would, so that `truncate` can take back any of them, also where
                a ring buffer overwrites older tokens. T is at most `max_steps`.

        Returns: positions (B, T) int32, negative for padding.
        Raises: TypeError; ValueError if there is no room, and OutOfPages if a pool is empty, before anything changes.
        """
        require_integer("num_tokens", num_tokens, 0)
        self.reserve(num_tokens, new)
        return self.advance(num_tokens, new, as_steps)

    @property
    def max_steps(self) -> int:
        """The most tokens of a pass `as_steps`."""
        return MAX_STEPS

    def reserve(self, num_tokens: int, new: list[int] | None = None) -> None:
        """The part of `extend` on the host: reserves storage and updates counts. A replayed step calls it before each replay."""
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
        """Returns `new` if it is valid for `extend`. Raises TypeError, ValueError."""
        if not isinstance(new, Sequence) or not all(isinstance(count, int) for count in new):
            raise TypeError(f"new: expected a list of {self.batch_size} integers, got {shown(new)}")
        if len(new) != self.batch_size or not all(0 <= count <= num_tokens for count in new):
            raise ValueError(
                f"new: expected {self.batch_size} counts from 0 to {num_tokens} (the number of columns), got {new}"
            )
        return new

    def require_model(self, layers: int, num_kv_heads: int, head_dim: int, v_head_dim: int, device: torch.device) -> None:
        """Raises ValueError unless the cache was made for a model of these sizes on this device."""
        k, v = self.storages[0].k, self.storages[0].v
        expected, got = (layers, num_kv_heads, head_dim, v_head_dim), (self.num_layers, k.shape[2], k.shape[4], v.shape[4])
        if expected != got:
            wanted, found = (
                f"{sizes[0]} layers of {sizes[1]} KV heads of head dim {sizes[2]}"
                + ("" if sizes[3] == sizes[2] else f" (values: {sizes[3]})")
                for sizes in (expected, got)
            )
            raise ValueError(f"cache: expected {wanted}, as the model has, got {found}")
        if self.lengths.device != device:
            raise ValueError(f"cache: expected device {device}, where the tokens are, got {self.lengths.device}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which keys and values are stored."""
        return self.storages[0].k.dtype

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return sum(len(storage.k) for storage in self.storages)

    def advance(self, num_tokens: int, new: list[int] | torch.Tensor | None = None, as_steps: bool = False) -> torch.Tensor:
        """The part of `extend` on the device: updates lengths and positions. For one token of each sequence, and as_steps, it
        works in place, so that a CUDA graph can capture it; `new` is then None, or a tensor (B,) on the device."""
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
            count = new if isinstance(new, torch.Tensor) else on_device(new, self.lengths.device).int()
            rank = steps - (num_tokens - count).unsqueeze(1)  # index among the new tokens; negative for padding
            self.positions = torch.where(rank < 0, -1, past + rank)
            self.lengths += count
        if as_steps:
            steady = self._steady_positions.setdefault(num_tokens, torch.empty_like(self.positions))
            self.positions = steady.copy_(self.positions)
        return self.positions

    def add_bias(self, bias: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        """Makes `attend` add a bias by positions to the scores of the current pass; called after `extend`, or `advance`.

        bias: (positions (B, T) or (1, T), S keys) -> (B or 1, H, T, S) in the dtype of the queries, or fp32. Of few tokens it is
            kept in one place, which a recorded or captured step reads.
        """
        positions, T = self.positions.clamp(min=0), self.positions.shape[1]  # type: ignore[union-attr]  # after `extend`
        if T > MAX_STEPS and len(set(self.counts)) == 1:  # aligned to the right: columns differ by padding only
            positions = positions.amax(0, keepdim=True)
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        made = bias(positions, pages * self.storages[0].k.shape[3])
        if T <= MAX_STEPS and not (made.requires_grad or torch.compiler.is_compiling()):
            if T not in self._steady_bias:
                with torch.inference_mode(False):  # later passes may be outside of it
                    self._steady_bias[T] = torch.empty_like(made)
            made = self._steady_bias[T].copy_(made)
        self.position_bias = made

    def _take(self, counts: list[int]) -> None:
        """Reserves storage for new tokens; raises before anything changes."""

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
        """Stores k and v of the new tokens, and computes attention over all keys and values of the layer. On a GPU, a decode
        step of one token is one launch.

        Args:
            layer: index of the layer.
            q: (B, H, T, D), T as in the last call of `extend`.
            k: (B, H_kv, T, D).
            v: (B, H_kv, T, D_v).
            rotation: cos and sin, (positions, R/2) fp32 each, for rotary embedding of q and k. Default: no rotation.
            window: attention window of this layer, if it is smaller than that of the cache.
            last_only: compute the output of the last column only.
            options: further arguments of `fastgpt.attention`.

        Returns: (B, H, T, D_v), or with last_only (B, H, 1, D_v), in the dtype of the cache, or of q if the cache is 8-bit.
        Raises: TypeError, ValueError, as `fastgpt.attention_with_kv_cache`, before anything is stored.
        """
        require_attend(layer, self.storage.layers, q, k, v, rotation)
        if self.position_bias is not None:
            options["bias"] = self.position_bias[:, :, -1:] if last_only else self.position_bias
        return store_and_attend(
            q, k, v, self.storage.layers[layer], self.positions, rotation=rotation, block_table=self.block_table,
            counters=self._counters, last_only=last_only, kv_lengths=self.lengths, window=least(window, self.window), **options,
        )  # fmt: skip

    def attend_waits(self, num_heads: int, dtype: torch.dtype, num_tokens: int = 1) -> str | None:
        """Why `attend` of this many tokens, `as_steps`, with num_heads query heads in this dtype, cannot be captured in a CUDA
        graph, or None."""
        for storage in self.storages:
            for layer in storage.layers[:1]:
                k, v = (
                    torch.empty(self.batch_size, x.shape[1], num_tokens, x.shape[3], dtype=dtype, device=self.lengths.device)
                    for x in (layer["k"], layer["v"])
                )
                q = k.new_empty(len(k), num_heads, num_tokens, k.shape[3])
                positions = self._next.expand(-1, num_tokens)
                reason = waits(
                    q, k, v, layer["k"], layer["v"], positions, block_table=self.block_table, k_scale=layer["k_scale"],
                    v_scale=layer["v_scale"],
                )  # fmt: skip
                if reason is not None:
                    return reason
        return None

    def truncate(self, counts: list[int]) -> None:
        """Keeps only the first counts[b] tokens of each sequence b.

        Args:
            counts: list of B integers.

        Raises: TypeError; ValueError for more tokens than there are, or if earlier tokens have been overwritten (a full ring
            buffer).
        """
        if not isinstance(counts, Sequence):
            raise TypeError(f"counts: expected a list of {self.batch_size} integers, got {shown(counts)}")
        counts = [require_integer("counts", count) for count in counts]
        if len(counts) != self.batch_size or not all(0 <= new <= old for new, old in zip(counts, self.counts)):
            raise ValueError(f"counts: expected {self.batch_size} integers from 0 to those of {self.counts}, got {counts}")
        self._give_back(counts)
        self.counts = counts
        self.lengths.copy_(torch.tensor(counts, dtype=torch.int32, device="cpu"))

    def _give_back(self, counts: list[int]) -> None:
        """Releases storage that truncated sequences no longer need; raises before anything changes."""

    def fork(self, n: int, into: "KVCache | None" = None) -> "KVCache":
        """Returns a cache with each sequence repeated n times (as by repeat_interleave), all independent of each other and of
        this one. A paged cache shares pages until one of them writes.

        Args:
            n: copies of each sequence.
            into: an earlier fork to overwrite, in the same memory, so that a captured step stays valid.
        """
        raise NotImplementedError

    def _forked(self, n: int, into: "KVCache | None") -> Any:
        """A fork without its storage."""
        require_integer("n", n, 1)
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


def require_attend(layer: Any, layers: list, q: Any, k: Any, v: Any, rotation: Any) -> None:
    """Raises TypeError, ValueError for arguments of `KVCache.attend` that the operations do not check."""
    if type(layer) is not int or not 0 <= layer < len(layers):  # nor a negative index
        require_integer("layer", layer, 0, len(layers) - 1)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            require_tensor(name, x, 4)
    if not (rotation is None or isinstance(rotation, (tuple, list)) and len(rotation) == 2):
        raise TypeError(f"rotation: expected a pair of tensors, cos and sin, or None, got {shown(rotation)}")


def least(a: int | None, b: int | None) -> int | None:
    """The smaller of two windows, where None is no window."""
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def store_and_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: dict,
    positions: torch.Tensor,
    *,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    counters: torch.Tensor | None,
    last_only: bool = False,
    slots: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """`KVCache.attend` for the tensors of one layer. options: arguments of `attention`, such as kv_lengths and window."""
    if q.shape[2] == 1:
        return step(
            q, k, v, cache, positions, rotation=rotation, counters=counters, slots=slots, block_table=block_table, **options
        )
    q = store(q, k, v, cache, positions, slots=slots, rotation=rotation, block_table=block_table)
    return read(q[:, :, -1:] if last_only else q, cache, block_table=block_table, **options)


def store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: dict,
    positions: torch.Tensor,
    *,
    slots: torch.Tensor | None = None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Stores k and v in `slots` (default: at their positions), rotated if there is a rotation. Returns q, also rotated."""
    q, k, v = of_cache(q, k, v, cache)
    options = {"block_table": block_table, "k_scale": cache["k_scale"], "v_scale": cache["v_scale"]}

    def write(q, k, v):
        if rotation is not None:
            return rope_kv_cache_update(q, k, v, cache["k"], cache["v"], positions, *rotation, slots=slots, **options)
        kv_cache_update(k, v, cache["k"], cache["v"], positions if slots is None else slots, **options)
        return q

    return through_cache(write, q, k, v)


def read(q: torch.Tensor, cache: dict, **options) -> torch.Tensor:
    """Attention of q over the stored keys and values. options: arguments of `attention`."""
    options |= {"k_scale": cache["k_scale"], "v_scale": cache["v_scale"]}
    return through_cache(lambda q, *_: attention(q, cache["k"], cache["v"], **options), q, *bias_in(options))


def bias_in(options: dict) -> list[torch.Tensor]:
    """The bias among arguments of `attention`, if there is one: of it, too, there is no gradient through a cache."""
    return [] if options.get("bias") is None else [options["bias"]]


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: dict,
    positions: torch.Tensor,
    *,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    **options,
) -> torch.Tensor:
    """`store` for one token of each sequence, then `read`, in one operation. options: those of both, and counters."""
    q, k, v = of_cache(q, k, v, cache)
    cos, sin = (None, None) if rotation is None else rotation
    options |= {"k_scale": cache["k_scale"], "v_scale": cache["v_scale"]}
    return through_cache(
        lambda q, k, v, *_: attention_with_kv_cache(q, k, v, cache["k"], cache["v"], positions, cos, sin, **options),
        q, k, v, *bias_in(options),
    )  # fmt: skip


def of_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in the dtype of the cache. They may have another one under autocast, or from modules of another precision."""
    dtype = cache["k"].dtype
    if k.dtype is dtype is q.dtype or dtype in QUANTIZED_DTYPES:
        return q, k, v
    return q.to(dtype), k.to(dtype), v.to(dtype)
