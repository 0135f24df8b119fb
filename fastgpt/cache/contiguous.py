"""A contiguous KV cache."""

from fastgpt.cache.base import KVCache
from fastgpt.cache.storage import Storage


class ContiguousCache(KVCache):
    """A KV cache with room for `capacity` tokens of each sequence, allocated once.

    Args:
        batch_size: number of sequences.
        capacity: the maximum number of tokens in a sequence.
        window: attention window in tokens, the token itself included; default: full attention.
        num_layers, num_kv_heads, head_dim: of the decoder.
        v_head_dim: head dim of values, if it differs from that of keys.
        dtype: dtype of the decoder's keys and values; default: PyTorch's default dtype.
        cache_dtype: dtype in which they are stored: dtype (default), torch.int8 or torch.float8_e4m3fn.
        device: default: PyTorch's default device.

    Raises: TypeError, ValueError, naming the argument.
    """

    def __init__(self, *, batch_size: int, capacity: int, window: int | None = None, **storage) -> None:
        super().__init__(batch_size, capacity, window, storage.get("device"))
        self.storage = Storage(batch_size, capacity, **storage)

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens of each sequence, in new memory: steps recorded over the cache are no longer valid."""
        self.storage, self.capacity = self.storage.grown(capacity), capacity

    def fork(self, n: int, into: "KVCache | None" = None) -> "KVCache":
        result = self._forked(n, into)
        result.storage = self.storage.repeated(n, None if into is None else into.storage)
        return result
