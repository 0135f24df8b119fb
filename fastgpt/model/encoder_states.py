"""What tokens attend to beside one another: padding, which they must not, and a second stream, such as an encoder's states."""

import torch

from fastgpt.cache.base import KVCache
from fastgpt.cache.uncached import Uncached
from fastgpt.checks import is_autocasting, require_device, require_dtype, require_shape, require_tensor
from fastgpt.model.inputs import as_lengths, require_ids
from fastgpt.ops.attention import attention
from fastgpt.ops.derivatives import through_cache


class EncoderKV:
    """Keys and values of a second stream, computed once for all passes and steps of a decoder that attends to it.

    Args:
        layers: k, v (B, H_kv, S, D) of each layer.
        batch_size: B.
        lengths: (B,) int32, the stream's tokens where they differ; none attends to the columns from there on. Default: all.
    """

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], batch_size: int, lengths: torch.Tensor | None = None):
        self.layers, self.batch_size, self.lengths = layers, batch_size, lengths

    def __getstate__(self):
        # k and v are views of one tensor, which each of them would take along.
        layers = [tuple(x.clone(memory_format=torch.contiguous_format) for x in layer) for layer in self.layers]
        return vars(self) | {"layers": layers}

    def attend(self, layer: int, q: torch.Tensor, **options) -> torch.Tensor:
        """The attention of q (B, H, T, D). Options: those of `attention`."""
        k, v = self.layers[layer]
        # k and v differ in dtype where autocast was not on, or not as it is now, when they were read.
        return attention(q.to(k.dtype), k, v, causal=False, kv_lengths=self.lengths, **options).to(q.dtype)

    def repeated(self, n: int) -> "EncoderKV":
        """For a batch in which each sequence is there n times in a row."""
        if n == 1:
            return self
        layers = [tuple(x.repeat_interleave(n, dim=0) for x in layer) for layer in self.layers]
        lengths = None if self.lengths is None else self.lengths.repeat_interleave(n)
        return EncoderKV(layers, n * self.batch_size, lengths)


def uncached(model, ids, lengths=None, encoder_states=None, encoder_lengths=None) -> Uncached:
    """In place of a cache, for a pass of ids (B, T); arguments and errors: `GPT.forward`."""
    require_ids(ids, model.first_weight.device)
    lengths = None if lengths is None else as_lengths("lengths", lengths, ids)
    result = Uncached(device=ids.device, causal=model.config.causal, lengths=lengths)
    result.encoder_kv = read_encoder_states(model, encoder_states, encoder_lengths)
    return result


def read_encoder_states(model, states, lengths=None) -> EncoderKV | None:
    """The second stream `states` (B, S, C) as the model's cross-attention reads it; None of None.

    Raises: TypeError, ValueError for states or lengths of another shape, dtype or device.
    """
    if states is None:
        if lengths is not None:
            raise ValueError("encoder_lengths: expected None without encoder_states, got lengths")
        return None
    if not model.config.cross_attention:
        raise ValueError("encoder_states: expected None for a model without cross-attention, got a second stream")
    weight = model.first_weight
    require_tensor("encoder_states", states, 3)
    require_shape("encoder_states", states, (*states.shape[:2], model.config.hidden_size), "(B, S, C)")
    require_device("encoder_states", states, weight.device)
    if not is_autocasting(states.device):
        require_dtype("encoder_states", states, (weight.dtype,))
    lengths = None if lengths is None else as_lengths("encoder_lengths", lengths, states)
    return EncoderKV([block.cross_attention.read(states) for block in model.blocks], len(states), lengths)


def stored_encoder_states(model, states, lengths=None) -> EncoderKV | None:
    """`read_encoder_states` for a cache, which keeps no graph: a gradient by the states is refused in the backward pass."""
    with torch.no_grad():
        encoder_kv = read_encoder_states(model, states, lengths)
    if encoder_kv is not None:
        encoder_kv.layers = [through_cache(lambda _, layer=layer: layer, states) for layer in encoder_kv.layers]
    return encoder_kv


def require_encoder_states(config, cache: KVCache | Uncached, batch_size: int) -> None:
    """Raises ValueError for a cache that a model of this config cannot use, or that lacks what it attends to."""
    if cache.causal:
        require_causal(config)
    if config.cross_attention and cache.encoder_kv is None:
        raise ValueError("encoder_states: expected a second stream (B, S, C) for a model with cross-attention, got None")
    if cache.encoder_kv is not None and cache.encoder_kv.batch_size != batch_size:
        raise ValueError(f"encoder_states: expected one for a batch of {batch_size}, got one for {cache.encoder_kv.batch_size}")


def require_causal(config) -> None:
    if not config.causal:
        raise ValueError("model: expected a causal one to generate from or to cache tokens of, got one with causal=False")
