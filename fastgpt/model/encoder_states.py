"""Encoder states for cross-attention: their keys and values, computed once, and their checks."""

from typing import Any

import torch

from fastgpt.cache.base import KVCache
from fastgpt.cache.uncached import Uncached
from fastgpt.checks import is_autocasting, require_device, require_dtype, require_shape, require_tensor
from fastgpt.model.config import GPTConfig
from fastgpt.model.inputs import as_lengths, require_ids
from fastgpt.ops.attention import attention
from fastgpt.ops.derivatives import through_cache


class EncoderKV:
    """Keys and values of encoder states for cross-attention, computed once for all passes of a decoder.

    Args:
        layers: for each layer k and v (B, H_kv, S, D).
        batch_size: B.
        lengths: (B,) int32, the number of encoder states of each sequence; those past it are not attended to. Default: S.
    """

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], batch_size: int, lengths: torch.Tensor | None = None):
        self.layers, self.batch_size, self.lengths = layers, batch_size, lengths

    def __getstate__(self):
        # k and v are views of one tensor: pickling would store the whole of it for each.
        layers = [tuple(x.clone(memory_format=torch.contiguous_format) for x in layer) for layer in self.layers]
        return vars(self) | {"layers": layers}

    def attend(self, layer: int, q: torch.Tensor, **options) -> torch.Tensor:
        """Attention of q (B, H, T, D): (B, H, T, D). options: those of `attention`."""
        k, v = self.layers[layer]
        # k and v have another dtype if autocast was in another state when they were computed.
        return attention(q.to(k.dtype), k, v, causal=False, kv_lengths=self.lengths, **options).to(q.dtype)

    def repeated(self, n: int) -> "EncoderKV":
        """A copy in which each sequence is repeated n times, as by repeat_interleave."""
        if n == 1:
            return self
        layers = [tuple(x.repeat_interleave(n, dim=0) for x in layer) for layer in self.layers]
        lengths = None if self.lengths is None else self.lengths.repeat_interleave(n)
        return EncoderKV(layers, n * self.batch_size, lengths)


def uncached(
    model: Any, ids: torch.Tensor, lengths: Any = None, encoder_states: torch.Tensor | None = None, encoder_lengths: Any = None
) -> Uncached:
    """The `Uncached` for a pass over ids (B, T) without a cache. Arguments and errors are those of `GPT.forward`."""
    require_ids(ids, model.first_weight.device)
    lengths = None if lengths is None else as_lengths("lengths", lengths, ids)
    result = Uncached(device=ids.device, causal=model.config.causal, lengths=lengths)
    result.encoder_kv = read_encoder_states(model, encoder_states, encoder_lengths)
    return result


def read_encoder_states(model: Any, states: torch.Tensor | None, lengths: Any = None) -> EncoderKV | None:
    """Keys and values of encoder states (B, S, C) for a model with cross-attention; None if there are no states.

    Raises: TypeError, ValueError for states or lengths of another shape, dtype or device.
    """
    if states is None:
        if lengths is not None:
            raise ValueError("encoder_lengths: expected None without encoder_states, got lengths")
        return None
    if not model.config.cross_attention:
        raise ValueError("encoder_states: expected None for a model without cross-attention, got a tensor")
    weight = model.first_weight
    require_tensor("encoder_states", states, 3)
    require_shape("encoder_states", states, (*states.shape[:2], model.config.hidden_size), "(B, S, C)")
    require_device("encoder_states", states, weight.device)
    if not is_autocasting(states.device):
        require_dtype("encoder_states", states, (weight.dtype,))
    lengths = None if lengths is None else as_lengths("encoder_lengths", lengths, states)
    return EncoderKV([block.cross_attention.read(states) for block in model.blocks], len(states), lengths)


def stored_encoder_states(model: Any, states: torch.Tensor | None, lengths: Any = None) -> EncoderKV | None:
    """`read_encoder_states` for a cache, without a graph: the backward pass raises if it needs a gradient of the states."""
    with torch.no_grad():
        encoder_kv = read_encoder_states(model, states, lengths)
    if encoder_kv is not None:
        encoder_kv.layers = [through_cache(lambda _, layer=layer: layer, states) for layer in encoder_kv.layers]
    return encoder_kv


def require_encoder_states(config: GPTConfig, cache: KVCache | Uncached, batch_size: int) -> None:
    """Raises ValueError if only the cache is causal, or if encoder states are missing or of another batch size."""
    if cache.causal:
        require_causal(config)
    if config.cross_attention and cache.encoder_kv is None:
        raise ValueError("encoder_states: expected a tensor (B, S, C) for a model with cross-attention, got None")
    if cache.encoder_kv is not None and cache.encoder_kv.batch_size != batch_size:
        raise ValueError(f"encoder_states: expected batch size {batch_size}, as ids has, got {cache.encoder_kv.batch_size}")


def require_causal(config: GPTConfig) -> None:
    if not config.causal:
        raise ValueError("model: expected a causal model for generation or a KV cache, got one with causal=False")
