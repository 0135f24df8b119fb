"""A cache with room for all tokens from the beginning."""

from fastgpt.cache.base import KVCache
from fastgpt.cache.storage import Storage


class ContiguousCache(KVCache):
    """Room for `capacity` tokens for each sequence, allocated at once. Further arguments: `Storage`, `KVCache`."""

    def __init__(self, *, batch_size: int, capacity: int, window: int | None = None, **storage) -> None:
        super().__init__(batch_size, capacity, window, storage.get("device"))
        self.storage = Storage(batch_size, capacity, **storage)

    def fork(self, n: int, into: "KVCache | None" = None) -> "KVCache":
        result = self._forked(n, into)
        result.storage = self.storage.repeated(n, None if into is None else into.storage)
        return result
