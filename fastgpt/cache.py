"""The KV cache: keys and values of past tokens, so that a step computes only its new ones."""

import torch

from fastgpt.ops.attention import attention
from fastgpt.ops.kv_cache_update import kv_cache_update


class KVCache:
    """A contiguous cache for every layer of a decoder, allocated once.

    The decoder calls `extend(T)` once in a forward pass, for the positions of the T new tokens, and then `attend` in
    each layer, which stores the layer's new keys and values and attends over all that the cache holds.

    Args:
        num_layers, batch_size, num_kv_heads, head_dim: of the decoder.
        capacity: tokens that each sequence can hold.
        dtype, device: of the keys and values.
    """

    def __init__(self, *, num_layers, batch_size, num_kv_heads, head_dim, capacity, dtype=None, device=None):
        shape = (num_layers, batch_size, num_kv_heads, capacity, head_dim)  # (layers, B, H_kv, S, D)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = list(zip(self.k, self.v))  # views (B, H_kv, S, D), made once and not at every step
        self.batch_size, self.capacity = batch_size, capacity
        self.length = 0  # tokens stored for each sequence, known on the host: no synchronisation to check it
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)  # (B,) the same, for the kernels
        self.positions = None  # (B, T) slots of the tokens of the current forward pass

    def extend(self, num_tokens: int) -> torch.Tensor:
        """Makes room for the next tokens; returns their positions, (B, num_tokens) int32.

        Raises ValueError, before anything changes, when they do not fit.
        """
        if self.length + num_tokens > self.capacity:
            raise ValueError(
                f"cache: expected at most {self.capacity} tokens (its capacity), "
                f"got {self.length} stored + {num_tokens} new"
            )
        new = torch.arange(num_tokens, dtype=torch.int32, device=self.lengths.device)
        self.positions = self.lengths.unsqueeze(1) + new
        self.lengths += num_tokens
        self.length += num_tokens
        return self.positions

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores k, v (B, H_kv, T, D) of the current tokens and returns their attention, (B, H, T, D)."""
        k_cache, v_cache = self.layers[layer]
        kv_cache_update(k, v, k_cache, v_cache, self.positions)
        return attention(q, k_cache, v_cache, kv_lengths=self.lengths)
