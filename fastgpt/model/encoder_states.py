"""What tokens attend to beside one another: padding, which they must not, and a second stream, such as an encoder's states."""

from collections.abc import Sequence

import torch

from fastgpt.cache.base import KVCache, Uncached
from fastgpt.checks import is_autocasting, require_device, require_dtype, require_shape, require_tensor
from fastgpt.ops.attention import attention
from fastgpt.ops.derivatives import through_cache


class Context:
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

    def repeated(self, n: int) -> "Context":
        """For a batch in which each sequence is there n times in a row."""
        if n == 1:
            return self
        layers = [tuple(x.repeat_interleave(n, dim=0) for x in layer) for layer in self.layers]
        lengths = None if self.lengths is None else self.lengths.repeat_interleave(n)
        return Context(layers, n * self.batch_size, lengths)


class Given:
    """A decoder together with what it attends to: for generation, which knows a decoder only by how it is called."""

    def __init__(self, model, context: Context):
        self.model, self.context = model, context

    def __getattr__(self, name):
        return getattr(self.model, name)

    def new_cache(self, *args, **options):
        cache = self.model.new_cache(*args, **options)
        cache.context = self.context
        return cache

    def hidden(self, ids, cache, *args, **options):
        if isinstance(cache, Uncached):
            cache.context = self.context.repeated(len(ids) // self.context.batch_size)
        return self.model.hidden(ids, cache, *args, **options)


def uncached(model, ids, lengths=None, context=None, context_lengths=None) -> Uncached:
    """In place of a cache, for a pass of ids (B, T); arguments and errors: `GPT.forward`."""
    require_ids(ids, model.first_weight.device)
    lengths = None if lengths is None else as_lengths("lengths", lengths, ids)
    result = Uncached(device=ids.device, causal=model.config.causal, lengths=lengths)
    result.context = read_context(model, context, context_lengths)
    return result


def read_context(model, states, lengths=None) -> Context | None:
    """The second stream `states` (B, S, C) as the model's cross-attention reads it; None of None.

    Raises: TypeError, ValueError for states or lengths of another shape, dtype or device.
    """
    if states is None:
        if lengths is not None:
            raise ValueError("context_lengths: expected None without a context, got lengths")
        return None
    if not model.config.cross_attention:
        raise ValueError("context: expected None for a model without cross-attention, got a second stream")
    weight = model.first_weight
    require_tensor("context", states, 3)
    require_shape("context", states, (*states.shape[:2], model.config.hidden_size), "(B, S, C)")
    require_device("context", states, weight.device)
    if not is_autocasting(states.device):
        require_dtype("context", states, (weight.dtype,))
    lengths = None if lengths is None else as_lengths("context_lengths", lengths, states)
    return Context([block.cross_attention.read(states) for block in model.blocks], len(states), lengths)


def stored_context(model, states, lengths=None) -> Context | None:
    """`read_context` for a cache, which keeps no graph: a gradient by the states is refused in the backward pass."""
    with torch.no_grad():
        context = read_context(model, states, lengths)
    if context is not None:
        context.layers = [through_cache(lambda _, layer=layer: layer, states) for layer in context.layers]
    return context


def require_ids(ids, device: torch.device) -> None:
    """Raises TypeError, ValueError for what cannot be ids (B, T) of a model on a device."""
    require_tensor("ids", ids)
    require_dtype("ids", ids, (torch.int64, torch.int32))
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids: expected shape (B, T) with at least one token, got {tuple(ids.shape)}")
    require_device("ids", ids, device)


def as_lengths(name: str, lengths, x: torch.Tensor) -> torch.Tensor:
    """How many of x's columns (B, T, ...), the first ones, are tokens: a list or a tensor -> (B,) int32 on its device.

    Raises: TypeError, ValueError, but for numbers outside 1 to T that are on a GPU.
    """
    if not isinstance(lengths, torch.Tensor):
        if not isinstance(lengths, Sequence) or not all(isinstance(n, int) for n in lengths):
            raise TypeError(f"{name}: expected a tensor or a list of integers, got {lengths!r}")
        lengths = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected integers, got {lengths.dtype}")
    if lengths.shape != x.shape[:1] or lengths.is_cpu and not all(1 <= n <= x.shape[1] for n in lengths.tolist()):
        got = lengths.tolist() if lengths.shape == x.shape[:1] else f"shape {tuple(lengths.shape)}"
        raise ValueError(f"{name}: expected {len(x)} numbers, each from 1 to {x.shape[1]} (the columns), got {got}")
    return lengths.to(x.device, torch.int32)


def require_context(config, cache: KVCache | Uncached, batch_size: int) -> None:
    """Raises ValueError for a cache that a model of this config cannot use, or that lacks what it attends to."""
    if cache.causal:
        require_causal(config)
    if config.cross_attention and cache.context is None:
        raise ValueError("context: expected a second stream (B, S, C) for a model with cross-attention, got None")
    if cache.context is not None and cache.context.batch_size != batch_size:
        raise ValueError(f"context: expected one for a batch of {batch_size}, got one for {cache.context.batch_size}")


def require_causal(config) -> None:
    if not config.causal:
        raise ValueError("model: expected a causal one to generate from or to cache tokens of, got one with causal=False")
