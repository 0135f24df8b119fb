"""Making a cache by the name of its kind."""

from collections.abc import Sequence

from fastgpt.cache.base import KVCache, least
from fastgpt.cache.contiguous import ContiguousCache
from fastgpt.cache.paged import PagedCache, PagePool
from fastgpt.cache.sliding import SlidingCache
from fastgpt.checks import require_choice, require_integer

CACHE_KINDS = ("contiguous", "sliding", "paged")


def new_cache(
    kind: str, *, batch_size: int, capacity: int, window: int | None = None, windows: Sequence[int | None],
    page_size: int = 16, num_pages: int | None = None, **storage,
) -> KVCache:  # fmt: skip
    """An empty cache for a decoder.

    Args:
        kind: "contiguous", "sliding" (layers with a window keep only the tokens inside it) or "paged".
        batch_size: number of sequences.
        capacity: the maximum number of tokens in each sequence.
        window: attention window in tokens, the token itself included, for layers without a smaller one.
        windows: the windows of the decoder's layers, None for layers without one. "sliding" needs one, here or in `window`.
        page_size: tokens in a page of a paged cache.
        num_pages: pages of a paged cache; default: enough for `capacity` tokens of every sequence.
        storage: further arguments of `Storage`.

    Raises: TypeError, ValueError, naming the argument.
    """
    require_choice("kind", kind, CACHE_KINDS)
    options = {"batch_size": batch_size, "capacity": capacity, "window": window}
    if kind == "contiguous":
        return ContiguousCache(**options, **storage)
    if kind == "sliding":
        windows = [least(window, of_layer) for of_layer in windows]
        if all(window is None for window in windows):
            raise ValueError(
                "window: expected a number of tokens for a sliding cache of a model without windows, got None; pass one, or choose "
                "a contiguous or paged cache"
            )
        return SlidingCache(**options, windows=windows, **storage)
    page_size = require_integer("page_size", page_size, 1)
    if num_pages is None:
        num_pages = batch_size * -(-capacity // page_size)
    return PagedCache(PagePool(num_pages=num_pages, page_size=page_size, **storage), **options)
