"""The decoder: GPT-2's architecture and what later families changed of it, short enough to read in one sitting.

Shapes: B batch, T tokens, C hidden size, H query heads, H_kv key and value heads, D head dim, I intermediate size,
V vocabulary.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from fastgpt import huge_pages
from fastgpt.cache.base import KVCache
from fastgpt.cache.create import new_cache
from fastgpt.cache.uncached import Uncached
from fastgpt.checkpoints import hub, transformers_format
from fastgpt.checks import is_autocasting, require_flag
from fastgpt.model.config import GPTConfig
from fastgpt.model.encoder_states import EncoderKV, require_causal, require_encoder_states, stored_encoder_states, uncached
from fastgpt.model.fusion import BEFORE_WEIGHTS_MOVE, computes, is_plain_matrix, is_training, plain
from fastgpt.model.inputs import require_ids
from fastgpt.model.rope import Tables, sinusoidal
from fastgpt.ops.decode_step import embed
from fastgpt.ops.linear import finish, linear
from fastgpt.ops.norm import norm
from fastgpt.ops.quantization import QUANTIZED_DTYPES


@plain(weights=2)
class Norm(nn.Module):
    """Layer norm or RMS norm of the last dimension. Where a matrix follows, `linear` computes both at once."""

    def __init__(self, config: GPTConfig, width: int):
        super().__init__()
        self.kind, self.eps, self.offset = config.norm, config.norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - self.offset))
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if self.kind == "layer" else None)

    def forward(self, x, residual=None):
        return norm(x, self.weight, self.bias, kind=self.kind, eps=self.eps, offset=self.offset, residual=residual)

    def before(self) -> dict:
        """What makes `linear` compute it first."""
        weights = self._parameters
        return {
            "norm": self.kind, "norm_weight": weights["weight"], "norm_bias": weights["bias"], "norm_eps": self.eps,
            "norm_offset": self.offset,
        }  # fmt: skip


def new_layer(cls: type[nn.Module], *sizes: int, **options) -> nn.Module:
    """PyTorch's own nn.Linear or nn.Embedding, the very class, as its tools look for it; without values, which
    `GPT.initialize` draws: drawing them twice, or without memory, takes a second of loading."""
    return nn.utils.skip_init(cls, *sizes, device=torch.get_default_device(), **options)


def only_looks_up(embedding: nn.Module) -> bool:
    """Whether calling it takes rows of its weight, and nothing else."""
    return computes(embedding, nn.Embedding.forward) and embedding.max_norm is None


def look_up(embedding: nn.Module, index: torch.Tensor) -> torch.Tensor:
    """embedding(index); for a decode step without the Python in between, which takes as long as the rest."""
    if torch.is_grad_enabled() or not only_looks_up(embedding):
        return embedding(index)
    return torch.embedding(embedding._parameters["weight"], index)


def project(x, layer: nn.Module, norm: nn.Module | None = None, **options):
    """layer(norm(x)), or layer(x), and what `options` say of `linear` after it: in one operation where both are plain."""
    if not computes(layer, nn.Linear.forward):
        return finish(layer(x if norm is None else norm(x)), **options)
    weights = layer._parameters  # faster than attributes, which are looked up there
    weight, bias = weights["weight"], weights["bias"]
    if norm is None:
        return linear(x, weight, bias, **options)
    if not computes(norm, Norm.forward):
        return linear(norm(x), weight, bias, **options)
    return linear(x, weight, bias, **norm.before(), **options)


def add(x, y, layer: nn.Module, post_norm: nn.Module | None, dropout_p: float):
    """x + layer(y), or x + post_norm(layer(y))."""
    if post_norm is None:
        return project(y, layer, residual=x, dropout_p=dropout_p)
    y = project(y, layer, dropout_p=dropout_p)
    return post_norm(y, residual=x) if computes(post_norm, Norm.forward) else x + post_norm(y)


@plain(weights=0)
class Attention(nn.Module):
    """x + out(attention(qkv(norm(x)))), over the tokens at hand or over a cache that they join."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.options = {
            "window": config.window(layer), "scale": config.attention_scale, "softcap": config.attention_softcap
        }  # fmt: skip
        wide = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = new_layer(nn.Linear, config.hidden_size, wide, bias=config.qkv_bias)
        self.q_norm, self.k_norm = (Norm(config, config.head_dim) if config.qk_norm else None for _ in range(2))
        self.out = new_layer(nn.Linear, config.num_heads * config.head_dim, config.hidden_size, bias=config.out_bias)
        self.post_norm = Norm(config, config.hidden_size) if config.post_norms else None

    def forward(self, x, norm: Norm, cache: KVCache | Uncached, rotation, last_only: bool):
        B, T, _ = x.shape
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        q, k, v = project(x, self.qkv, norm).view(B, T, sum(heads), self.head_dim).split(heads, dim=2)  # views
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, D), (B, H_kv, T, D) twice
        y = cache.attend(self.layer, q, k, v, rotation, last_only=last_only, **self.options)  # as q, or the last of it
        x = x[:, -1:] if last_only else x
        if y.dtype is not q.dtype:  # that of a cache which autocast, on or off since, made another
            y = y.to(q.dtype)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H · D)
        return add(x, y, self.out, self.post_norm, self.dropout if is_training(self) else 0.0)


@plain(weights=0)
class CrossAttention(nn.Module):
    """x + out(attention(q(norm(x)), k, v)): each token attends to all of a second stream, whose positions do not count."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.options = {"scale": config.attention_scale, "softcap": config.attention_softcap}
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = new_layer(nn.Linear, config.hidden_size, wide, bias=config.qkv_bias)
        self.kv = new_layer(nn.Linear, config.hidden_size, 2 * narrow, bias=config.qkv_bias)
        self.out = new_layer(nn.Linear, wide, config.hidden_size, bias=config.out_bias)
        self.post_norm = Norm(config, config.hidden_size) if config.post_norms else None

    def read(self, states):
        """The keys and values of a second stream: (B, S, C) -> (B, H_kv, S, D) twice."""
        k, v = project(states, self.kv).unflatten(-1, (2, self.num_kv_heads, self.head_dim)).unbind(2)
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, norm: Norm, encoder_kv: EncoderKV):
        q = project(x, self.q, norm).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        y = encoder_kv.attend(self.layer, q, **self.options).transpose(1, 2).flatten(2)  # (B, T, H · D)
        return add(x, y, self.out, self.post_norm, self.dropout if is_training(self) else 0.0)


@plain(weights=0)
class MLP(nn.Module):
    """x + down(activation(up(norm(x)))); if gated, up is gate and up, one below the other."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout, self.activation, self.gated = config.dropout, config.activation, config.gated
        wide = config.intermediate_size * (2 if config.gated else 1)
        self.up = new_layer(nn.Linear, config.hidden_size, wide, bias=config.mlp_bias)
        self.down = new_layer(nn.Linear, config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.post_norm = Norm(config, config.hidden_size) if config.post_norms else None

    def forward(self, x, norm: Norm):
        y = project(x, self.up, norm, activation=self.activation, gated=self.gated)  # (B, T, C) -> (B, T, I)
        return add(x, y, self.down, self.post_norm, self.dropout if is_training(self) else 0.0)


@plain(weights=0)
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
            x = self.cross_attention(x, self.cross_attention_norm, cache.encoder_kv)
        return self.mlp(x, self.mlp_norm)


@plain(weights=0)
class GPT(nn.Module):
    """A decoder: `model(ids)` gives logits (B, T, V); with `cache`, ids are the tokens that follow those in it.

    checkpoint_config: what config.json said, if the model came from a checkpoint; `save_pretrained` keeps it.
    generation_defaults: options of `generate`, and max_new_tokens, that the checkpoint's generation_config.json gives, under
        `generate`'s names: {"temperature": 0.6, "top_p": 0.9, "eos": [2]}, say. `save_pretrained` writes it.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, self.checkpoint_config, self.generation_defaults = config, {}, {}
        self.token_embedding = new_layer(nn.Embedding, config.vocab_size, config.hidden_size)
        self.position_embedding = None
        if config.position == "learned":
            self.position_embedding = new_layer(nn.Embedding, config.context_length, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = Norm(config, config.hidden_size)
        self.output = None if config.tie_embeddings else new_layer(nn.Linear, config.hidden_size, config.vocab_size, bias=False)
        self.tables = None  # what positions add to embeddings, or how they rotate queries and keys
        if config.rope is not None:
            self.tables = Tables(config.rope.rotation, config.context_length)
        elif config.position == "sinusoidal":
            self.tables = Tables(functools.partial(sinusoidal, width=config.hidden_size), config.context_length)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
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
        huge_pages.collapse(self.parameters())

    def _apply(self, fn, recurse=True):
        for forget in BEFORE_WEIGHTS_MOVE:
            forget(self)
        return super()._apply(fn, recurse)

    def forward(
        self,
        ids: torch.Tensor,
        cache: KVCache | None = None,
        new: list[int] | None = None,
        *,
        lengths: torch.Tensor | Sequence[int] | None = None,
        encoder_states: torch.Tensor | None = None,
        encoder_lengths: torch.Tensor | Sequence[int] | None = None,
        output_hidden_states: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """ids (B, T) int64 -> logits (B, T, V).

        Args:
            cache: holds the tokens before, and then these too; see `new_cache`. Default: there are none.
            new: with a cache, how many of the columns, the last ones, are tokens of each sequence; the others are
                padding, whose logits mean nothing. Default: all.
            lengths: without a cache, how many of the columns, the first ones, are; a list or a tensor (B,). Default: all.
            encoder_states: (B, S, C), the second stream, without a cache. A model with cross-attention needs one.
            encoder_lengths: as lengths, of encoder_states.
            output_hidden_states: also return the residual stream (B, T, C) before each block and, through the final norm,
                after the last: the pair (logits, a tuple of num_layers + 1).

        Raises: TypeError, ValueError for ids that are not (B, T) int64, out of the vocabulary (on CPU), or more than
            the context or the cache holds; for lengths and encoder states that do not fit them.
        """
        if cache is None:
            cache = uncached(self, ids, lengths, encoder_states, encoder_lengths)
        elif not (lengths is encoder_states is encoder_lengths is None):
            raise ValueError("lengths, encoder_states, encoder_lengths: expected None with a cache, which has its own")
        require_flag("output_hidden_states", output_hidden_states)
        states = [] if output_hidden_states else None
        x = self.run_blocks(self.embed(ids, cache, new), cache, states=states)
        return (self.logits(x), (*states, self.norm(x))) if output_hidden_states else self.logits(x)

    def hidden(
        self, ids: torch.Tensor, cache: KVCache | Uncached | None = None, new: list[int] | None = None, last_only: bool = False
    ) -> torch.Tensor:
        """The last block's output, which `logits` takes: ids (B, T) -> (B, T, C), or with last_only (B, 1, C)."""
        cache = uncached(self, ids) if cache is None else cache
        return self.run_blocks(self.embed(ids, cache, new), cache, last_only)

    def encode(self, ids: torch.Tensor, lengths: torch.Tensor | Sequence[int] | None = None) -> torch.Tensor:
        """The same through the final norm, of sequences of the given lengths (as in `forward`): what heads and the
        cross-attention of another model read."""
        return self.norm(self.hidden(ids, uncached(self, ids, lengths)))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm and the output matrix: (..., C) -> (..., V)."""
        return self.softcap_logits(self.uncapped_logits(hidden))

    def uncapped_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits before a cap."""
        if self.output is not None:
            return project(hidden, self.output, self.norm)
        weight = getattr(self.token_embedding, "weight", None)
        if not isinstance(weight, torch.Tensor):
            got = type(self.token_embedding).__name__
            raise ValueError(f"token_embedding: expected a weight, which is the output matrix too, in a module of type {got}")
        if not is_plain_matrix(weight) or not computes(self.norm, Norm.forward):
            return F.linear(self.norm(hidden), weight)
        return linear(hidden, weight, **self.norm.before())

    def softcap_logits(self, logits: torch.Tensor) -> torch.Tensor:
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def embed(self, ids: torch.Tensor, cache: KVCache | Uncached, new: list[int] | None = None) -> torch.Tensor:
        """Makes room for ids (B, T) in the cache and embeds them: (B, T, C)."""
        self.check(ids, cache, new)
        try:
            x = look_up(self.token_embedding, ids)  # (B, T, C)
        except IndexError:
            limit = self.config.vocab_size - 1
            raise ValueError(
                f"ids: expected token ids from 0 to {limit}, got {ids.min().item()} to {ids.max().item()}"
            ) from None
        positions = cache.extend(ids.shape[1], new)  # (T,) or (B, T)
        if new is not None:
            positions = positions.clamp(min=0)  # of padding: any
        return self.embed_at(x, positions, self.position_tables(x, cache))

    def embed_at(self, x: torch.Tensor, positions: torch.Tensor, tables: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Token embeddings (B, T, C) scaled, and with those of their positions, (T,) or (B, T)."""
        config = self.config
        if config.embedding_scale is not None:
            x = x * torch.tensor(config.embedding_scale, dtype=x.dtype, device="cpu")
        if self.position_embedding is not None:
            x = x + look_up(self.position_embedding, positions)
        elif config.position == "sinusoidal":
            x = x + F.embedding(positions, tables[0]).to(x.dtype)
        return F.dropout(x, config.dropout) if is_training(self) else x

    def embed_reserved(self, ids: torch.Tensor, cache: KVCache, tables: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
        """As `embed`, of ids (B, 1) of a step on a GPU that `check` and `cache.reserve` know of: plain embeddings in two
        launches, by their weights alone."""
        config, tokens, places = self.config, self.token_embedding, self.position_embedding
        for embedding in (tokens, places):
            if embedding is not None and not only_looks_up(embedding):
                return self.embed_at(tokens(ids), cache.advance(1), tables)
        table = None
        if places is not None:
            table = places.weight
        elif config.position == "sinusoidal":
            table = tables[0]
        x = embed(ids, tokens.weight, cache.advance(1), table, scale=config.embedding_scale)
        return F.dropout(x, config.dropout) if is_training(self) else x

    def position_tables(self, x: torch.Tensor, cache: KVCache | Uncached) -> tuple[torch.Tensor, ...] | None:
        """What a pass needs of `tables`, whose tokens have joined the cache, where x is: cos and sin, embeddings, or None."""
        if self.tables is None:
            return None
        rope, rows = self.config.rope, cache.length
        if torch.compiler.is_compiling() and not isinstance(cache, Uncached):  # as many at each pass: compiled once
            rows = self.config.context_length if cache.capacity is None else min(cache.capacity, self.config.context_length)
        return self.tables(rows, x, *(() if rope is None else (rope.is_long(max(cache.length, cache.expected_length)),)))

    def check(self, ids: torch.Tensor, cache: KVCache | Uncached, new: list[int] | None = None) -> None:
        """Raises TypeError, ValueError for ids that cannot join the cache, as far as the host can tell."""
        weight = self.first_weight
        require_ids(ids, weight.device)
        B, T = ids.shape
        if isinstance(cache, Uncached):
            if new is not None:
                raise ValueError("new: expected None without a cache, got counts")
            past, longest = 0, T
        else:
            if not isinstance(cache, KVCache):
                raise TypeError(f"cache: expected one of `new_cache`'s, got {type(cache).__name__}")
            if cache.batch_size != B:
                raise ValueError(f"cache: expected one for a batch of {B}, got one for {cache.batch_size}")
            if new is not None:
                new = cache.require_counts(T, new)
            past = cache.length
            longest = past + T if new is None else max(map(sum, zip(cache.counts, new)))
            dtype = cache.dtype
            same = dtype is weight.dtype or dtype in QUANTIZED_DTYPES or cache.casts
            if not same and not is_autocasting(ids.device):
                expected = f"one of {weight.dtype}, as the model's keys are"
                raise TypeError(f"cache: expected {expected}, got one of {dtype}: make a new one")
            if cache.fits != id(self):
                cache.require_model(self.config.num_layers, self.num_kv_heads, self.config.head_dim, ids.device)
                cache.fits = id(self)
        require_encoder_states(self.config, cache, B)
        if longest > self.config.context_length:
            raise ValueError(
                f"ids: expected at most {self.config.context_length} tokens (the context), "
                f"got {past} cached + {longest - past} new"
            )
        if past and self.rope_factors_change(max(past, cache.expected_length), max(longest, cache.expected_length)):
            raise ValueError(
                f"cache: expected an empty one for a pass beyond {self.config.rope.original_context} tokens, where the "
                f"rotation of all keys changes (longrope), got {past} cached + {longest - past} new"
            )

    @property
    def num_kv_heads(self) -> int:
        """Of each layer: the config's, or this process's share of them (fastgpt/parallel.py)."""
        number = self.config.num_kv_heads
        return getattr(self.blocks[0].attention, "num_kv_heads", number) if self.blocks else number

    @property
    def first_weight(self) -> torch.Tensor:
        """Of the model's dtype and device: the token embeddings or, where a module without a weight makes them, any."""
        embedding = self._modules["token_embedding"]
        weight = embedding._parameters.get("weight")  # at each step: an attribute of a module takes ten times as long
        weight = getattr(embedding, "weight", None) if weight is None else weight
        return weight if isinstance(weight, torch.Tensor) else next(self.parameters())

    @property
    def key_dtype(self) -> torch.dtype:
        """Of keys and values: the weights', or under autocast what it casts to."""
        weight = self.first_weight
        cast = is_autocasting(weight.device) and weight.dtype.is_floating_point and weight.dtype != torch.float64
        return torch.get_autocast_dtype(weight.device.type) if cast else weight.dtype

    def rope_factors_change(self, before: int, after: int) -> bool:
        """Whether sequences that grow from so many tokens to so many need all their keys anew, rotated otherwise."""
        rope = self.config.rope
        return rope is not None and rope.is_long(before) != rope.is_long(after)

    def run_blocks(
        self,
        x: torch.Tensor,
        cache: KVCache | Uncached,
        last_only: bool = False,
        states: list | None = None,
        tables: tuple[torch.Tensor, ...] | None = None,
    ) -> torch.Tensor:
        """The blocks, one after the other: (B, T, C) -> (B, T, C). With last_only the last block computes no other token's
        output: (B, 1, C). What goes into each block is appended to `states`. tables: `position_tables`, if they are known."""
        rotation = None
        if self.config.rope is not None:
            rotation = self.position_tables(x, cache) if tables is None else tables
        for block in self.blocks:
            if states is not None:
                states.append(x)
            x = block(x, cache, rotation, last_only and block is self.blocks[-1])
        return x if self.blocks or not last_only else x[:, -1:]

    def new_cache(
        self,
        batch_size: int,
        capacity: int | None = None,
        *,
        kind: str = "contiguous",
        cache_dtype: torch.dtype | None = None,
        window: int | None = None,
        page_size: int = 16,
        num_pages: int | None = None,
        encoder_states: torch.Tensor | None = None,
        encoder_lengths: torch.Tensor | Sequence[int] | None = None,
    ) -> KVCache:
        """An empty cache.

        Args:
            capacity: tokens that each sequence can have; default the whole context.
            kind: "contiguous", "sliding" (layers with a window keep the tokens in it only) or "paged".
            cache_dtype: the weights' (default), torch.int8 or torch.float8_e4m3fn.
            window: tokens that one attends to, itself included; default as many as the model's layers do. "sliding" needs
                one, here or in the model.
            page_size, num_pages: of a paged cache; default pages for `capacity` tokens of every sequence.
            encoder_states, encoder_lengths: what cross-attention reads; see `forward`. Its keys and values are computed here, once.

        Raises: TypeError, ValueError, naming the argument.
        """
        require_causal(self.config)
        cache = new_cache(
            kind,
            batch_size=batch_size,
            capacity=self.config.context_length if capacity is None else capacity,
            window=window,
            windows=[self.config.window(layer) for layer in range(self.config.num_layers)],
            page_size=page_size,
            num_pages=num_pages,
            num_layers=self.config.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.key_dtype,
            cache_dtype=cache_dtype,
            device=self.first_weight.device,
        )
        cache.casts = self.key_dtype != self.first_weight.dtype
        cache.encoder_kv = stored_encoder_states(self, encoder_states, encoder_lengths)
        return cache

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
        folder = hub.resolve(path, revision)
        return transformers_format.load(folder, lambda fields, _: cls(GPTConfig(**fields)), dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json`, `model.safetensors` and, if there are generation_defaults, `generation_config.json`, which
        transformers reads too if it has this architecture."""
        transformers_format.write(self, folder, generation_defaults=self.generation_defaults)
