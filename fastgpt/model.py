"""The decoder: GPT-2's architecture and what later families changed of it, short enough to read in one sitting.

Shapes: B batch, T tokens, C hidden size, H query heads, H_kv key and value heads, D head dim, I intermediate size,
V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from fastgpt import capture, checkpoint, memory, schema
from fastgpt.cache import CACHE_KINDS, ContiguousCache, KVCache, PagedCache, PagePool, SlidingCache, Uncached, least
from fastgpt.capture import Captured
from fastgpt.context import Context, Given, read_context, require_causal, require_context, stored_context, uncached
from fastgpt.families import DECODER_SCHEMA, MAX_HEAD_DIM
from fastgpt.generate import generate
from fastgpt.inspection import run_with_cache
from fastgpt.ops.linear import linear
from fastgpt.ops.norm import norm
from fastgpt.ops.step import embed
from fastgpt.positions import Rope, sinusoidal


@dataclass(frozen=True)
class GPTConfig:
    """What a decoder is made of. The defaults are GPT-2's.

    num_heads, num_kv_heads, head_dim: of attention; default as many key and value heads as query heads, and
        hidden_size / num_heads. Each key head serves num_heads / num_kv_heads query heads.
    intermediate_size: width of the MLP; default 4 · hidden_size.
    dropout: in training, of the embeddings and of what each attention and MLP adds to the residual stream.
    norm: "layer" or "rms", with norm_eps; norm_offset is added to its weight.
    post_norms: what attention and MLP add to the residual stream is normalised, too.
    activation: of the MLP: down(activation(up(x))), or if gated down(activation(gate(x)) · up(x)).
    qkv_bias, out_bias, mlp_bias: whether the matrices have one.
    qk_norm: queries and keys are normalised, head by head.
    position: "learned" or "sinusoidal" embeddings, "rotary" as `rope` says, or None.
    windows: for each layer the last tokens that one attends to, itself included, or None for all; default all, everywhere.
    causal: False lets tokens attend to later ones as well: an encoder.
    cross_attention: between attention and MLP, each block attends to a second stream, too: the states of an encoder, say.
    attention_scale, attention_softcap: of `attention`; default 1 / sqrt(head_dim), and none.
    logit_softcap: bound on the logits, c · tanh(logits / c).
    embedding_scale: factor on the token embeddings, rounded to their dtype.
    tie_embeddings: the output matrix is the token embedding.

    Raises: TypeError, ValueError that begins with the field's name.
    """

    vocab_size: int
    context_length: int
    num_layers: int
    num_heads: int
    hidden_size: int
    dropout: float = 0.0
    norm_eps: float = 1e-5
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    norm: str = "layer"
    norm_offset: float = 0.0
    post_norms: bool = False
    activation: str = "gelu_tanh"
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    position: str | None = "learned"
    rope: Rope | None = None
    windows: tuple[int | None, ...] | None = None
    causal: bool = True
    cross_attention: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    tie_embeddings: bool = True

    def __post_init__(self):
        schema.check_fields(self, DECODER_SCHEMA)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size: expected a multiple of num_heads={self.num_heads}, got {self.hidden_size}")
        derived = {
            "num_kv_heads": self.num_heads,
            "head_dim": self.hidden_size // self.num_heads,
            "intermediate_size": 4 * self.hidden_size,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.num_layers and self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim: expected at most {MAX_HEAD_DIM}, got {self.head_dim}")
        if self.rope is not None and not isinstance(self.rope, Rope):
            raise TypeError(f"rope: expected a Rope or None, got {self.rope!r}")
        if (self.position == "rotary") != (self.rope is not None):
            raise ValueError(f"rope: expected a Rope if position is 'rotary', and None else, got {self.rope!r}")
        if self.rope is not None and self.rope.dim > self.head_dim:
            raise ValueError(f"rope.dim: expected at most head_dim={self.head_dim}, got {self.rope.dim}")
        if self.windows is not None and len(self.windows) != self.num_layers:
            raise ValueError(f"windows: expected {self.num_layers}, one for each layer, got {self.windows!r}")
        if self.windows is not None and not self.causal:
            raise ValueError(f"windows: expected None for a model that is not causal, got {self.windows!r}")

    def window(self, layer: int) -> int | None:
        return None if self.windows is None else self.windows[layer]


class Norm(nn.Module):
    """Layer norm or RMS norm of the last dimension. Where a matrix follows, `linear` computes both at once."""

    def __init__(self, config: GPTConfig, width: int):
        super().__init__()
        self.kind, self.eps, self.offset = config.norm, config.norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - self.offset))
        self.bias = nn.Parameter(torch.zeros(width)) if self.kind == "layer" else None

    def forward(self, x, residual=None):
        return norm(x, self.weight, self.bias, kind=self.kind, eps=self.eps, offset=self.offset, residual=residual)

    def before(self) -> dict:
        """What makes `linear` compute it first."""
        return {
            "norm": self.kind, "norm_weight": self.weight, "norm_bias": self.bias, "norm_eps": self.eps,
            "norm_offset": self.offset,
        }  # fmt: skip


class Linear(nn.Linear):
    """`GPT.initialize` draws its weights: drawing them twice, or without memory, takes a second of loading.

    group: the processes that hold its columns, each some of them: what they compute is added up (fastgpt/parallel.py).
    """

    group = None

    def reset_parameters(self):
        pass


class Embedding(nn.Embedding):
    def reset_parameters(self):
        pass


def project(x, layer: Linear, norm: Norm | None = None, **options):
    """`layer`, after `norm` if there is one; options: what `linear` does after it."""
    return linear(x, layer.weight, layer.bias, **(norm.before() if norm is not None else {}), **options)


class Attention(nn.Module):
    """x + out(attention(qkv(norm(x)))), over the tokens at hand or over a cache that they join."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.options = {
            "window": config.window(layer), "scale": config.attention_scale, "softcap": config.attention_softcap
        }  # fmt: skip
        self.qkv = Linear(
            config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim, bias=config.qkv_bias
        )
        self.q_norm, self.k_norm = (Norm(config, config.head_dim) if config.qk_norm else None for _ in range(2))
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.out_bias)
        self.post_norm = Norm(config, config.hidden_size) if config.post_norms else None

    def forward(self, x, norm: Norm, cache: KVCache | Uncached, rotation, last_only: bool):
        B, T, _ = x.shape
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        q, k, v = project(x, self.qkv, norm).view(B, T, sum(heads), self.head_dim).split(heads, dim=2)  # views
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, D), (B, H_kv, T, D) twice
        if T == 1:
            y = cache.step(self.layer, q, k, v, rotation, **self.options)  # as q
        else:
            q = cache.append(self.layer, q, k, v, rotation)
            if last_only:
                q, x = q[:, :, -1:], x[:, -1:]
            y = cache.attend(self.layer, q, **self.options)  # as q
        y = y.transpose(1, 2).flatten(2)  # (B, T, H · D)
        return add(x, y, self.out, self.post_norm, self.dropout if self.training else 0.0)


class CrossAttention(nn.Module):
    """x + out(attention(q(norm(x)), k, v)): each token attends to all of a second stream, whose positions do not count."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.options = {"scale": config.attention_scale, "softcap": config.attention_softcap}
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear(config.hidden_size, wide, bias=config.qkv_bias)
        self.kv = Linear(config.hidden_size, 2 * narrow, bias=config.qkv_bias)
        self.out = Linear(wide, config.hidden_size, bias=config.out_bias)
        self.post_norm = Norm(config, config.hidden_size) if config.post_norms else None

    def read(self, states):
        """The keys and values of a second stream: (B, S, C) -> (B, H_kv, S, D) twice."""
        k, v = project(states, self.kv).unflatten(-1, (2, self.num_kv_heads, self.head_dim)).unbind(2)
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, norm: Norm, context: Context):
        q = project(x, self.q, norm).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        y = context.attend(self.layer, q, **self.options).transpose(1, 2).flatten(2)  # (B, T, H · D)
        return add(x, y, self.out, self.post_norm, self.dropout if self.training else 0.0)


class MLP(nn.Module):
    """x + down(activation(up(norm(x)))); if gated, up is gate and up, one below the other."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout, self.activation, self.gated = config.dropout, config.activation, config.gated
        wide = config.intermediate_size * (2 if config.gated else 1)
        self.up = Linear(config.hidden_size, wide, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.post_norm = Norm(config, config.hidden_size) if config.post_norms else None

    def forward(self, x, norm: Norm):
        y = project(x, self.up, norm, activation=self.activation, gated=self.gated)  # (B, T, C) -> (B, T, I)
        return add(x, y, self.down, self.post_norm, self.dropout if self.training else 0.0)


def add(x, y, layer: Linear, post_norm: Norm | None, dropout_p: float):
    """x + layer(y), or x + post_norm(layer(y))."""
    if layer.group is not None:
        y = linear(y, layer.weight)
        torch.distributed.all_reduce(y, group=layer.group)
        y = y if layer.bias is None else y + layer.bias
        return x + y if post_norm is None else post_norm(y, residual=x)
    if post_norm is None:
        return project(y, layer, residual=x, dropout_p=dropout_p)
    return post_norm(project(y, layer, dropout_p=dropout_p), residual=x)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention_norm = Norm(config, config.hidden_size)
        self.attention = Attention(config, layer)
        self.cross_attention_norm = Norm(config, config.hidden_size) if config.cross_attention else None
        self.cross_attention = CrossAttention(config, layer) if config.cross_attention else None
        self.mlp_norm = Norm(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x, cache: KVCache | Uncached, rotation=None, last_only: bool = False):
        """x (B, T, C) -> the same, or (B, 1, C) of the last token, which still looks back at all."""
        x = self.attention(x, self.attention_norm, cache, rotation, last_only)
        if self.cross_attention is not None:
            x = self.cross_attention(x, self.cross_attention_norm, cache.context)
        return self.mlp(x, self.mlp_norm)


class GPT(nn.Module):
    """A decoder: `model(ids)` gives logits (B, T, V); with `cache`, ids are the tokens that follow those in it.

    checkpoint_config: what config.json said, if the model came from a checkpoint; `save_pretrained` keeps it.
    generation_defaults: options of `generate`, and max_new_tokens, that the checkpoint's generation_config.json gives, under
        `generate`'s names: {"temperature": 0.6, "top_p": 0.9, "eos": [2]}, say. `save_pretrained` writes it.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.checkpoint_config, self.generation_defaults = config, {}, {}
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = None
        if config.position == "learned":
            self.position_embedding = Embedding(config.context_length, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = Norm(config, config.hidden_size)
        self.output = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """GPT-2's initial weights: N(0, 0.02), and where a block adds to the residual stream that over the square root of
        how often one does. On the meta device, none."""
        if self.token_embedding.weight.is_meta:
            return
        additions = (3 if self.config.cross_attention else 2) * self.config.num_layers
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                parameter.normal_(0.0, 0.02 / math.sqrt(additions) if residual else 0.02)
        memory.collapse(self.parameters())

    def forward(
        self, ids, cache: KVCache | None = None, new: list[int] | None = None,
        *, lengths=None, context=None, context_lengths=None, output_hidden_states: bool = False,
    ):  # fmt: skip
        """ids (B, T) int64 -> logits (B, T, V).

        Args:
            cache: holds the tokens before, and then these too; see `new_cache`. Default: there are none.
            new: with a cache, how many of the columns, the last ones, are tokens of each sequence; the others are
                padding, whose logits mean nothing. Default: all.
            lengths: without a cache, how many of the columns, the first ones, are; a list or a tensor (B,). Default: all.
            context: (B, S, C), the second stream, without a cache. A model with cross-attention needs one.
            context_lengths: as lengths, of the context.
            output_hidden_states: also return the residual stream (B, T, C) before each block and, through the final norm,
                after the last: the pair (logits, a tuple of num_layers + 1).

        Raises: TypeError, ValueError for ids that are not (B, T) int64, out of the vocabulary (on CPU), or more than
            the context or the cache holds; for lengths and a context that do not fit them.
        """
        if cache is None:
            cache = uncached(self, ids, lengths, context, context_lengths)
        elif not (lengths is context is context_lengths is None):
            raise ValueError("lengths, context, context_lengths: expected None with a cache, which has its own")
        states = [] if output_hidden_states else None
        x = self.transform(self.embed(ids, cache, new), cache, states=states)
        return (self.logits(x), (*states, self.norm(x))) if output_hidden_states else self.logits(x)

    def hidden(self, ids, cache: KVCache | Uncached | None = None, new: list[int] | None = None, last_only=False):
        """The last block's output, which `logits` takes: ids (B, T) -> (B, T, C), or with last_only (B, 1, C)."""
        cache = uncached(self, ids) if cache is None else cache
        return self.transform(self.embed(ids, cache, new), cache, last_only)

    def encode(self, ids, lengths=None):
        """The same through the final norm, of sequences of the given lengths (as in `forward`): what heads and the
        cross-attention of another model read."""
        return self.norm(self.hidden(ids, uncached(self, ids, lengths)))

    def logits(self, hidden):
        """The final norm and the output matrix: (..., C) -> (..., V)."""
        return self.capped(self.scores(hidden))

    def scores(self, hidden):
        """The logits before a cap."""
        return linear(hidden, (self.token_embedding if self.output is None else self.output).weight, **self.norm.before())

    def capped(self, scores):
        cap = self.config.logit_softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def decoding(self, cache: KVCache, choose: Callable[[torch.Tensor], torch.Tensor] | None = None):
        """A function of each sequence's next token, (B,) int64, that lets it join the cache -> its logits (B, V).

        It is captured, on the CPU at its first call, where all of it runs in fastgpt's operations, on a GPU at its second,
        in a CUDA graph; so what it returns may be overwritten by the next call, and what changes in the model's modules
        afterwards is not seen.

        Args:
            choose: a function of the logits, whose result is returned in their place. A CUDA graph has it inside: it must
                then follow the rules of `Graphed`.
        """

        def step(x):
            return self.scores(self.transform(x, cache)[:, -1])

        def chosen(logits):
            return logits if choose is None else choose(logits)

        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())
        if capture.has_graphs(cache.lengths.device) and not hooked:
            graph = capture.Graphed(
                lambda token: chosen(self.capped(step(self.embed(token.unsqueeze(1), cache, reserved=True))))
            )

            def replayed(token):
                self.check(token.unsqueeze(1), cache)
                cache.reserve(1)
                return graph(token)

            return replayed
        if not hooked:  # hooks want to be called at every step
            step = Captured(step)
        return lambda token: chosen(self.capped(step(self.embed(token.unsqueeze(1), cache))))

    def embed(self, ids, cache: KVCache | Uncached, new: list[int] | None = None, reserved: bool = False):
        """Makes room for ids (B, T) in the cache and embeds them: (B, T, C).

        reserved: the host has done its part already, `check` and `cache.reserve`; T is 1.
        """
        if reserved:
            return self.embed_reserved(ids, cache)
        self.check(ids, cache, new)
        try:
            x = self.token_embedding(ids)  # (B, T, C)
        except IndexError:
            limit = self.config.vocab_size - 1
            raise ValueError(
                f"ids: expected token ids from 0 to {limit}, got {ids.min().item()} to {ids.max().item()}"
            ) from None
        if self.config.embedding_scale is not None:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        positions = cache.extend(ids.shape[1], new)  # (T,) or (B, T)
        if new is not None:
            positions = positions.clamp(min=0)  # of padding: any
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        elif self.config.position == "sinusoidal":
            table = sinusoidal(self.config.context_length, self.config.hidden_size, x.device)
            x = x + F.embedding(positions, table).to(x.dtype)
        if self.training:
            x = F.dropout(x, self.config.dropout)
        return x

    def embed_reserved(self, ids, cache: KVCache):
        """The same of ids (B, 1) of a step on a GPU, in two launches, by the weights alone: no module is called."""
        config, weight, table = self.config, self.token_embedding.weight, None
        if self.position_embedding is not None:
            table = self.position_embedding.weight
        elif config.position == "sinusoidal":
            table = sinusoidal(config.context_length, config.hidden_size, weight.device)
        x = embed(ids, weight, cache.advance(1), table, scale=config.embedding_scale)
        return F.dropout(x, config.dropout) if self.training else x

    def check(self, ids, cache: KVCache | Uncached, new: list[int] | None = None) -> None:
        """Raises TypeError, ValueError for ids that cannot join the cache, as far as the host can tell."""
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(f"ids: expected shape (B, T) with at least one token, got {tuple(ids.shape)}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids: expected dtype torch.int64 or torch.int32, got {ids.dtype}")
        B, T = ids.shape
        if isinstance(cache, Uncached):
            if new is not None:
                raise ValueError("new: expected None without a cache, got counts")
            past, longest = 0, T
        else:
            if cache.batch_size != B:
                raise ValueError(f"cache: expected one for a batch of {B}, got one for {cache.batch_size}")
            past = cache.length
            longest = past + T if new is None else max(map(sum, zip(cache.counts, new)))
        require_context(self.config, cache, B)
        if longest > self.config.context_length:
            raise ValueError(
                f"ids: expected at most {self.config.context_length} tokens (the context), "
                f"got {past} cached + {longest - past} new"
            )
        if past and self.turns(max(past, cache.reach), max(longest, cache.reach)):
            raise ValueError(
                f"cache: expected an empty one for a pass beyond {self.config.rope.original_context} tokens, where the "
                f"rotation of all keys changes (longrope), got {past} cached + {longest - past} new"
            )

    def turns(self, before: int, after: int) -> bool:
        """Whether sequences that grow from so many tokens to so many need all their keys anew, rotated otherwise."""
        rope = self.config.rope
        return rope is not None and rope.is_long(before) != rope.is_long(after)

    def transform(self, x, cache: KVCache | Uncached, last_only: bool = False, states: list | None = None):
        """The blocks, one after the other: (B, T, C) -> (B, T, C). With last_only the last block computes no other token's
        output: (B, 1, C). What goes into each block is appended to `states`."""
        rotation, rope = None, self.config.rope
        if rope is not None:
            rotation = rope.rotation(self.config.context_length, x.device, rope.is_long(max(cache.length, cache.reach)))
        for block in self.blocks:
            if states is not None:
                states.append(x)
            x = block(x, cache, rotation, last_only and block is self.blocks[-1])
        return x if self.blocks or not last_only else x[:, -1:]

    def new_cache(
        self, batch_size: int, capacity: int | None = None,
        *, kind: str = "contiguous", cache_dtype: torch.dtype | None = None, window: int | None = None,
        page_size: int = 16, num_pages: int | None = None, context=None, context_lengths=None,
    ) -> KVCache:  # fmt: skip
        """An empty cache.

        Args:
            capacity: tokens that each sequence can have; default the whole context.
            kind: "contiguous", "sliding" (layers with a window keep the tokens in it only) or "paged".
            cache_dtype: the weights' (default), torch.int8 or torch.float8_e4m3fn.
            window: tokens that one attends to, itself included; default as many as the model's layers do. "sliding" needs
                one, here or in the model.
            page_size, num_pages: of a paged cache; default pages for `capacity` tokens of every sequence.
            context, context_lengths: what cross-attention reads; see `forward`. Its keys and values are computed here, once.

        Raises: TypeError, ValueError, naming the argument.
        """
        require_causal(self.config)
        weight = self.token_embedding.weight
        capacity = self.config.context_length if capacity is None else capacity
        options = {"batch_size": batch_size, "capacity": capacity, "window": window}
        storage = {
            "num_layers": self.config.num_layers,
            "num_kv_heads": self.blocks[0].attention.num_kv_heads if self.blocks else self.config.num_kv_heads,
            "head_dim": self.config.head_dim,
            "dtype": weight.dtype,
            "cache_dtype": cache_dtype,
            "device": weight.device,
        }
        if kind == "contiguous":
            cache = ContiguousCache(**options, **storage)
        elif kind == "sliding":
            windows = [least(window, self.config.window(layer)) for layer in range(self.config.num_layers)]
            if all(window is None for window in windows):
                raise ValueError("window: expected a number of tokens for a sliding cache, got None")
            cache = SlidingCache(**options, windows=windows, **storage)
        elif kind == "paged":
            if not isinstance(page_size, int) or page_size < 1:
                raise ValueError(f"page_size: expected an integer >= 1, got {page_size!r}")
            if num_pages is None:
                num_pages = batch_size * -(-capacity // page_size)
            cache = PagedCache(PagePool(num_pages=num_pages, page_size=page_size, **storage), **options)
        else:
            raise ValueError(f"kind: expected one of {', '.join(map(repr, CACHE_KINDS))}, got {kind!r}")
        cache.context = stored_context(self, context, context_lengths)
        return cache

    def generate(self, ids, max_new_tokens: int | None = None, *, context=None, context_lengths=None, **options):
        """`fastgpt.generate.generate`, of a decoder that attends to `context` (one for each prompt), if there is one."""
        if context is None and context_lengths is None:
            return generate(self, ids, max_new_tokens, **options)
        with torch.no_grad():
            given = Given(self, read_context(self, context, context_lengths))
        return generate(given, ids, max_new_tokens, **options)

    run_with_cache = run_with_cache

    @classmethod
    def from_pretrained(cls, path: str | Path, *, revision: str | None = None, dtype=None, device=None) -> "GPT":
        """A decoder, in evaluation mode, from a checkpoint as transformers writes it.

        Where the files disagree, what is stored decides: an output matrix that differs from the token embedding is used,
        with a warning, though config.json ties them.

        Args:
            path: a folder with `config.json` and safetensors, in one file or several; or the id of one on the Hugging Face
                Hub, which is downloaded. Nothing else than files in this folder, or in the Hub's cache, is read.
            revision: of a model on the Hub: a branch, a tag or a commit. Default: its main branch.
            dtype: of all weights: torch.float32, bfloat16, float16 or float64. Default: that of most of the stored numbers.

        Raises: FileNotFoundError, or another OSError, that names the file that cannot be read; ValueError for what files say:
            it names the file and the entry of config.json or generation_config.json that is wrong, or the weights that are
            missing, unexpected, misshapen, not finite, or of a dtype that is not supported. TypeError for arguments.
        """
        folder = checkpoint.resolve(path, revision)
        return checkpoint.load(folder, lambda fields, _: cls(GPTConfig(**fields)), dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json`, `model.safetensors` and, if there are generation_defaults, `generation_config.json`, which
        transformers reads too if it has this architecture."""
        checkpoint.write(self, folder, generation_defaults=self.generation_defaults)
