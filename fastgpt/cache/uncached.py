"""In place of a cache, for a pass that keeps nothing."""

from typing import Any

import torch

from fastgpt.cache.base import least
from fastgpt.ops.attention import attention
from fastgpt.ops.kv_cache_update import rope_reference


class Uncached:
    """In place of a cache: each pass attends over its own tokens only, each of them over the last `window`.

    Args:
        causal: False lets tokens attend to later ones as well, as in an encoder.
        lengths: (B,) int32, tokens of each sequence where they differ; the columns from there on are padding, which no token
            attends to. Default: all.
    """

    expected_length = 0
    encoder_kv: Any = None  # as of KVCache

    def __init__(self, window: int | None = None, device=None, *, causal: bool = True, lengths: torch.Tensor | None = None):
        self.window, self.device, self.causal, self.lengths = window, device, causal, lengths

    def extend(self, num_tokens: int, new: None = None) -> torch.Tensor:
        """The tokens' positions, (num_tokens,)."""
        self.positions, self.length = torch.arange(num_tokens, device=self.device), num_tokens
        return self.positions

    def attend(self, layer, q, k, v, rotation=None, *, window=None, last_only=False, **options):
        """As `KVCache.attend`, which stores nothing here."""
        if rotation is not None:
            positions = self.positions.expand(len(q), -1)
            q, k = (rope_reference(x, positions, *rotation) for x in (q, k))
        return self.attend_rotated(layer, q[:, :, -1:] if last_only else q, k, v, **self.visible(window), **options)

    def attend_rotated(self, layer, q, k, v, **options):
        return attention(q, k, v, **options)

    def visible(self, window: int | None) -> dict:
        """Which keys a query sees, as `attention` takes it. If causal, none sees the padding, which comes after it."""
        lengths = None if self.causal else self.lengths
        return {"causal": self.causal, "kv_lengths": lengths, "window": least(window, self.window)}
