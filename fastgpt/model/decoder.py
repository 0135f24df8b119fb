"""The decoder: GPT-2's architecture and what later families changed in it, short enough to read in one sitting.

    GPT      ids (B, T) -> token and position embeddings (B, T, C) -> blocks -> final norm -> output matrix -> logits (B, T, V)
    Block    x = x + attention(norm(x)), then x = x + mlp(norm(x)); x (B, T, C) is the residual stream
             or at once: x + attention(norm(x)) + mlp(norm(x)); mlp may be a mixture of experts
             or with the norms after: x = norm(x + attention(x)), then x = norm(x + mlp(x)), and no final norm

A cache holds the keys and values of the tokens before (fastgpt/cache). Without one, `Uncached` takes its place, so the blocks
are written once. Where the modules are plain ones, `linear` computes a projection with the norm before it and the activation,
gate and residual after it in one operation (fastgpt/model/fusion.py says when). Norms, projections and the MLP are in
fastgpt/model/layers.py, mixtures of experts in fastgpt/model/moe.py.

Shapes: B batch, T tokens, C hidden size, H query heads, H_kv key and value heads, D head dim, D_v that of values (D, except
in latent attention, fastgpt/model/latent.py), I intermediate size, S keys, V vocabulary.
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
from fastgpt.cache.packed import Packed
from fastgpt.cache.uncached import Uncached
from fastgpt.checkpoints import adapters, gguf, gguf_file, hub, transformers_format
from fastgpt.checks import is_autocasting, require_choice, require_flag
from fastgpt.model.config import GPTConfig, require_config
from fastgpt.model.encoder_states import EncoderKV, require_causal, require_encoder_states, stored_encoder_states, uncached
from fastgpt.model.evaluation_mode import is_training
from fastgpt.model.fusion import BEFORE_WEIGHTS_MOVE, computes, is_plain_matrix, plain
from fastgpt.model.inputs import require_ids, require_order
from fastgpt.model.latent import Latent
from fastgpt.model.layers import MLP, Norm, add, is_plain_lookup, look_up, new_layer, project, stream_norm
from fastgpt.model.lora import apply_adapters
from fastgpt.model.moe import MoE
from fastgpt.model.relative_bias import RelativeBias
from fastgpt.model.rope import Tables, sinusoidal
from fastgpt.ops.decode_step import embed
from fastgpt.ops.linear import linear
from fastgpt.ops.quantization import QUANTIZED_DTYPES
from fastgpt.ops.quantized_weight import Quantization


@plain(weights=1)
class Attention(nn.Module):
    """x + out(attention(qkv(norm(x)))), where keys and values go through the cache."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.options = {
            "window": config.window(layer), "scale": config.attention_scale, "softcap": config.attention_softcap
        }  # fmt: skip
        self.qkv = self.latent = None
        if config.kv_rank is not None:
            self.latent = Latent(config)
        else:
            qkv_size = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
            self.qkv = new_layer(nn.Linear, config.hidden_size, qkv_size, bias=config.qkv_bias)
        self.rotation = config.rotation_of(layer)
        self.per_head = config.qk_norm_per_head
        self.q_norm, self.k_norm = (
            Norm(config, config.head_dim * (1 if self.per_head else heads)) if config.qk_norm else None
            for heads in (config.num_heads, config.num_kv_heads)
        )
        self.register_parameter("sinks", nn.Parameter(torch.zeros(config.num_heads)) if config.attention_sinks else None)
        self.out = new_layer(nn.Linear, config.num_heads * config.v_head_dim, config.hidden_size, bias=config.out_bias)
        self.post_norm = Norm(config, config.hidden_size) if config.post_norms else None

    def forward(
        self,
        x: torch.Tensor,
        norm: Norm | None,
        cache: KVCache | Uncached | Packed,
        tables: tuple[torch.Tensor, ...] | None,
        last_only: bool,
    ) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C), or with last_only (B, 1, C). tables: of `GPTConfig.rotation`, or None."""
        B, T, _ = x.shape
        if self.latent is not None:
            q, k, v = self.latent(x, norm)  # (B, T, H, D) twice, (B, T, H, D_v)
        elif isinstance(self.qkv, nn.ModuleList):  # loaded in parts, which need not be joined to be recorded
            y = x if norm is None else norm(x)
            q, k, v = (project(y, part).view(B, T, -1, self.head_dim) for part in self.qkv)
        else:
            heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
            qkv = project(x, self.qkv, norm).view(B, T, sum(heads), self.head_dim)  # (B, T, H + 2 H_kv, D)
            q, k, v = qkv.split(heads, dim=2)  # views: (B, T, H, D), (B, T, H_kv, D) twice
        if self.q_norm is not None:
            if self.per_head:
                q, k = self.q_norm(q), self.k_norm(k)
            else:
                q, k = self.q_norm(q.flatten(2)).view(q.shape), self.k_norm(k.flatten(2)).view(k.shape)
        rotation = None if tables is None or self.rotation is None else tables[self.rotation]  # (positions, R/2) twice
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, D), (B, H_kv, T, D), (B, H_kv, T, D_v)
        options: dict = self.options
        if (sinks := self._parameters["sinks"]) is not None:
            options = {**options, "sinks": sinks if sinks.dtype is q.dtype else sinks.to(q.dtype)}
        y = cache.attend(self.layer, q, k, v, rotation, last_only=last_only, **options)  # (B, H, T or 1, D_v)
        x = x[:, -1:] if last_only else x
        if y.dtype is not q.dtype:  # the cache was made under another state of autocast, and y has its dtype
            y = y.to(q.dtype)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H · D_v)
        return add(x, y, self.out, self.post_norm, self.dropout if is_training(self) else 0.0)


@plain(weights=0)
class CrossAttention(nn.Module):
    """x + out(attention(q(norm(x)), k, v)), with k, v of a second sequence (an encoder's states): not causal, no positions."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.options = {"scale": config.attention_scale, "softcap": config.attention_softcap}
        q_size, kv_size = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
        self.q = new_layer(nn.Linear, config.hidden_size, q_size, bias=config.qkv_bias)
        self.kv = new_layer(nn.Linear, config.hidden_size, kv_size, bias=config.qkv_bias)
        self.out = new_layer(nn.Linear, q_size, config.hidden_size, bias=config.out_bias)
        self.post_norm = Norm(config, config.hidden_size) if config.post_norms else None

    def read(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of encoder states: (B, S, C) -> (B, H_kv, S, D) twice."""
        k, v = project(states, self.kv).unflatten(-1, (2, self.num_kv_heads, self.head_dim)).unbind(2)
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: torch.Tensor, norm: Norm | None, encoder_kv: EncoderKV) -> torch.Tensor:
        q = project(x, self.q, norm).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        y = encoder_kv.attend(self.layer, q, **self.options).transpose(1, 2).flatten(2)  # (B, T, H · D)
        return add(x, y, self.out, self.post_norm, self.dropout if is_training(self) else 0.0)


@plain(weights=0)
class Block(nn.Module):
    """Attention, cross-attention if the model has it, and an MLP or a mixture of experts, each with its residual, and the norm
    before it, if there is one, or after the addition. In a parallel block the MLP reads what attention does, and may share its
    norm."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.parallel, self.norm_first = config.parallel, config.norm_first
        # What the first attention of an encoder reads may be normal already.
        is_normal = config.is_encoder and config.norm_first and config.embedding_norm and layer == 0  # type: ignore[attr-defined]
        self.attention_norm = stream_norm(config) if config.pre_norms and not is_normal else None
        self.attention = Attention(config, layer)
        self.cross_attention_norm = stream_norm(config) if config.cross_attention and config.pre_norms else None
        self.cross_attention = CrossAttention(config, layer) if config.cross_attention else None
        self.mlp_norm = stream_norm(config) if config.pre_norms == 2 else None
        self.mlp = MoE(config) if config.has_experts(layer) else MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        cache: KVCache | Uncached | Packed,
        tables: tuple[torch.Tensor, ...] | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C), or with last_only (B, 1, C): of the last token, which still attends to all."""
        if not self.norm_first:
            x = self.attention_norm(self.attention(x, None, cache, tables, last_only))  # type: ignore[misc]  # which there is then
            if self.cross_attention is not None:
                x = self.cross_attention_norm(self.cross_attention(x, None, cache.encoder_kv))  # type: ignore[misc]
            return self.mlp_norm(self.mlp(x, None, x))  # type: ignore[misc]
        y = self.attention(x, self.attention_norm, cache, tables, last_only)
        if self.parallel:
            norm = self.attention_norm if self.mlp_norm is None else self.mlp_norm
            return self.mlp(x[:, -1:] if last_only else x, norm, y)
        if self.cross_attention is not None:
            y = self.cross_attention(y, self.cross_attention_norm, cache.encoder_kv)
        return self.mlp(y, self.mlp_norm, y)


@plain(weights=0)
class GPT(nn.Module):
    """A decoder: `model(ids)` returns logits (B, T, V); with a cache, ids are the tokens that follow the cached ones.

    config: the architecture.
    checkpoint_config: the contents of config.json, if the model came from a checkpoint; `save_pretrained` writes them back.
    generation_defaults: defaults of `generate` and max_new_tokens from the checkpoint's generation_config.json, under the names
        of `generate`: for example {"temperature": 0.6, "top_p": 0.9, "eos": [2]}. `save_pretrained` writes them.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        require_config(config, GPTConfig)
        self.config, self.checkpoint_config, self.generation_defaults = config, {}, {}
        self.token_embedding = new_layer(nn.Embedding, config.vocab_size, config.hidden_size)
        self.position_embedding = None
        if config.position == "learned":
            self.position_embedding = new_layer(nn.Embedding, config.context_length, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm, self.output = stream_norm(config) if config.norm_first else None, None
        self.relative_bias = RelativeBias(config) if config.position == "relative" else None
        if not config.tie_embeddings:
            self.output = new_layer(nn.Linear, config.hidden_size, config.vocab_size, bias=config.output_bias)
        self.tables = None  # by position: cos and sin of rotary embeddings, or sinusoidal embeddings
        if config.rope is not None:
            self.tables = Tables(config.rotation, config.context_length)
        elif config.position == "sinusoidal":
            self.tables = Tables(functools.partial(sinusoidal, width=config.hidden_size), config.context_length)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draws GPT-2's initial weights: N(0, 0.02), with the standard deviation of the projections into the residual stream
        divided by the square root of their number. On the meta device it does nothing."""
        if self.token_embedding.weight.is_meta:
            return
        additions = (3 if self.config.cross_attention else 2) * self.config.num_layers
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() > 1:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight", "mlp.down", "shared.down.weight"))
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
        """Token ids (B, T) -> logits (B, T, V).

        Args:
            ids: (B, T) int64 or int32, on the device of the model.
            cache: the keys and values of the tokens before, to which those of ids are added; see `new_cache`. Default: there
                are no tokens before.
            new: with a cache, the number of new tokens of each sequence: the last new[b] columns of row b. The columns before
                them are padding, whose logits are meaningless. Default: all columns.
            lengths: (B,), a list or a tensor; without a cache, the number of tokens of each sequence: the first lengths[b]
                columns of row b. The others are padding. Default: all columns.
            encoder_states: (B, S, C) in the dtype of the weights, which cross-attention attends to; with a cache, they are
                given to `new_cache` instead.
            encoder_lengths: (B,), a list or a tensor: the number of encoder states of each sequence. Default: S.
            output_hidden_states: also return the residual stream: a tuple of num_layers + 1 tensors (B, T, C), the input of
                each block and the output of the last one, after the final norm.

        Returns: logits (B, T, V), or with output_hidden_states (logits, hidden states).
        Raises: TypeError, ValueError for ids of another shape or dtype, outside the vocabulary (on CPU), or more than the
            context or the cache has room for; for lengths and encoder states that do not match them.
        """
        if cache is None:
            cache = uncached(self, ids, lengths, encoder_states, encoder_lengths)
        elif not (lengths is encoder_states is encoder_lengths is None):
            raise ValueError("lengths, encoder_states, encoder_lengths: expected None with a cache, which has its own")
        require_flag("output_hidden_states", output_hidden_states)
        states = [] if output_hidden_states else None
        x = self.run_blocks(self.embed(ids, cache, new), cache, states=states)
        return (self.logits(x), (*states, self.final_norm(x))) if output_hidden_states else self.logits(x)

    def hidden(
        self, ids: torch.Tensor, cache: KVCache | Uncached | None = None, new: list[int] | None = None, last_only: bool = False
    ) -> torch.Tensor:
        """The output of the last block, which `logits` takes: ids (B, T) -> (B, T, C), or with last_only (B, 1, C)."""
        cache = uncached(self, ids) if cache is None else cache
        return self.run_blocks(self.embed(ids, cache, new), cache, last_only)

    def encode(self, ids: torch.Tensor, lengths: torch.Tensor | Sequence[int] | None = None) -> torch.Tensor:
        """Token ids (B, T) -> the final hidden states (B, T, C), after the final norm: the input of classification heads, and
        of the cross-attention of another model.

        Args:
            ids: (B, T) int64 or int32, padded on the right.
            lengths: (B,), a list or a tensor: the number of tokens of each sequence. Default: T.

        Raises: TypeError, ValueError as `forward`.
        """
        return self.final_norm(self.hidden(ids, uncached(self, ids, lengths)))

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output of the last block, normalized if the model has a final norm: (..., C) -> (..., C)."""
        return hidden if self.norm is None else self.norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm and the output matrix: (..., C) -> (..., V)."""
        return self.softcap_logits(self.uncapped_logits(hidden))

    def uncapped_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`logits` before their scale and the soft cap."""
        if self.output is not None:
            return project(hidden, self.output, self.norm)
        weight = getattr(self.token_embedding, "weight", None)
        if not isinstance(weight, torch.Tensor):
            got = type(self.token_embedding).__name__
            raise ValueError(f"token_embedding: expected a module with a weight, which is also the output matrix, got {got}")
        if not is_plain_matrix(weight) or not (self.norm is None or computes(self.norm, Norm.forward)):
            return F.linear(self.final_norm(hidden), weight)
        return linear(hidden, weight, **({} if self.norm is None else self.norm.as_options()))

    def softcap_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits times their scale, and then c · tanh(logits / c), if the model has a soft cap c."""
        scale, cap = self.config.logit_scale, self.config.logit_softcap
        logits = logits if scale == 1 else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def embed(self, ids: torch.Tensor, cache: KVCache | Uncached, new: list[int] | None = None) -> torch.Tensor:
        """Reserves room for ids (B, T) in the cache and returns their embeddings (B, T, C)."""
        self.check(ids, cache, new)
        try:
            x = look_up(self.token_embedding, ids)  # (B, T, C)
        except IndexError:
            limit = self.config.vocab_size - 1
            raise ValueError(
                f"ids: expected token ids from 0 to {limit}, got {ids.min().item()} to {ids.max().item()}"
            ) from None
        positions = cache.extend(ids.shape[1], new)  # (T,) or (B, T)
        if self.relative_bias is not None:
            cache.add_bias(self.relative_bias)
        if new is not None:
            positions = positions.clamp(min=0)  # those of padding are negative
        return self.embed_at(x, positions, self.position_tables(x, cache))

    def embed_at(self, x: torch.Tensor, positions: torch.Tensor, tables: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Token embeddings x (B, T, C), scaled, plus the embeddings of their positions (T,) or (B, T), if there are any."""
        config = self.config
        if config.embedding_scale is not None:
            x = x * torch.tensor(config.embedding_scale, dtype=x.dtype, device="cpu")
        if self.position_embedding is not None:
            x = x + look_up(self.position_embedding, positions)
        elif config.position == "sinusoidal":
            x = x + F.embedding(positions, tables[0]).to(x.dtype)
        return self.as_stream(x)

    def as_stream(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The residual stream that begins with these embeddings (B, T, C)."""
        config = self.config
        x = embeddings if config.residual_scale == 1 else embeddings / config.residual_scale
        return F.dropout(x, config.dropout) if is_training(self) else x

    def embed_reserved(
        self, ids: torch.Tensor, cache: KVCache, tables: tuple[torch.Tensor, ...] | None = None, as_steps: bool = False
    ) -> torch.Tensor:
        """Embeds ids (B, T) of a decode step, T = 1, or of a pass `as_steps`, which `check` has accepted and `cache.reserve` has
        made room for: (B, T, C). On a GPU, plain embeddings of a step take two launches.

        Args:
            as_steps: see `KVCache.extend`; ids may then be padded on the left with -1.
        """
        config, tokens, positions = self.config, self.token_embedding, self.position_embedding
        at = cache.advance(ids.shape[1], (ids >= 0).sum(1, dtype=torch.int32), True) if as_steps else cache.advance(1)
        if self.relative_bias is not None:
            cache.add_bias(self.relative_bias)
        ids = ids.clamp(min=0) if as_steps else ids
        for embedding in (tokens, positions):
            if embedding is not None and not is_plain_lookup(embedding):
                return self.embed_at(tokens(ids), at.clamp(min=0) if as_steps else at, tables)
        table = None
        if positions is not None:
            table = positions.weight
        elif config.position == "sinusoidal":
            table = tables[0]
        return self.as_stream(embed(ids, tokens.weight, at, table, scale=config.embedding_scale))

    def position_tables(self, x: torch.Tensor, cache: KVCache | Uncached) -> tuple[torch.Tensor, ...] | None:
        """The tables by position for a pass over the cached tokens, on the device of x: (cos, sin), (embeddings,) or None."""
        if self.tables is None:
            return None
        rope, rows = self.config.rope, cache.length
        if torch.compiler.is_compiling() and not isinstance(cache, Uncached):  # a fixed number: one graph serves all passes
            rows = self.config.context_length if cache.capacity is None else min(cache.capacity, self.config.context_length)
        return self.tables(rows, x, *(() if rope is None else (rope.is_long(max(cache.length, cache.expected_length)),)))

    def check(self, ids: torch.Tensor, cache: KVCache | Uncached, new: list[int] | None = None) -> None:
        """Raises TypeError, ValueError for ids and counts that the cache or the model cannot take, without a device sync."""
        weight = self.first_weight
        require_ids(ids, weight.device)
        B, T = ids.shape
        if isinstance(cache, Uncached):
            if new is not None:
                raise ValueError("new: expected None without a cache, got counts")
            past, longest = 0, T
        else:
            if not isinstance(cache, KVCache):
                raise TypeError(f"cache: expected a KVCache (see `new_cache`), got {type(cache).__name__}")
            if cache.batch_size != B:
                raise ValueError(f"cache: expected batch size {B}, as ids has, got {cache.batch_size}")
            if new is not None:
                new = cache.require_counts(T, new)
            past = cache.length
            longest = past + T if new is None else max(map(sum, zip(cache.counts, new)))
            dtype = cache.dtype
            same = dtype is weight.dtype or dtype in QUANTIZED_DTYPES or cache.casts
            if not same and not is_autocasting(ids.device):
                raise TypeError(f"cache: expected dtype {weight.dtype}, as the model's weights, got {dtype}: make a new cache")
            if cache.fits != id(self):
                sizes = self.config.num_layers, self.num_kv_heads, self.config.head_dim, self.config.v_head_dim
                cache.require_model(*sizes, ids.device)
                require_order(self.config, cache.in_order)
                cache.fits = id(self)
        require_encoder_states(self.config, cache, B)
        if longest > self.config.context_length:
            raise ValueError(
                f"ids: expected at most {self.config.context_length} tokens (the context), "
                f"got {past} cached + {longest - past} new"
            )
        if past and self.rope_factors_change(max(past, cache.expected_length), max(longest, cache.expected_length)):
            raise ValueError(
                f"cache: expected an empty cache for a pass beyond {self.config.rope.original_context} tokens, from where on "
                f"longrope rotates all keys by other factors, got {past} cached + {longest - past} new"
            )

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads of each layer; under tensor parallelism those of this process (fastgpt/parallel.py)."""
        number = self.config.num_kv_heads
        return getattr(self.blocks[0].attention, "num_kv_heads", number) if self.blocks else number

    @property
    def first_weight(self) -> torch.Tensor:
        """A weight with the model's dtype and device: the token embedding, or any parameter if that module has no weight."""
        embedding = self._modules["token_embedding"]
        weight = embedding._parameters.get("weight")  # read at each step: attribute access on a module takes ten times as long
        weight = getattr(embedding, "weight", None) if weight is None else weight
        return weight if isinstance(weight, torch.Tensor) else next(self.parameters())

    @property
    def key_dtype(self) -> torch.dtype:
        """The dtype of keys and values: that of the weights, or under autocast the one that it casts to."""
        weight = self.first_weight
        cast = is_autocasting(weight.device) and weight.dtype.is_floating_point and weight.dtype != torch.float64
        return torch.get_autocast_dtype(weight.device.type) if cast else weight.dtype

    def rope_factors_change(self, before: int, after: int) -> bool:
        """Whether longrope's factors for `after` tokens are others than for `before` tokens: all keys must be rotated again."""
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
        """Runs the blocks: x (B, T, C) -> (B, T, C).

        Args:
            last_only: compute the last token's output only: (B, 1, C).
            states: a list, to which the input of each block is appended.
            tables: what `position_tables` returned, if the caller has it.
        """
        if self.config.rope is not None and tables is None:
            tables = self.position_tables(x, cache)
        for block in self.blocks:
            if states is not None:
                states.append(x)
            x = block(x, cache, tables, last_only and block is self.blocks[-1])
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
        """Makes an empty KV cache for this model, on its device.

        Args:
            batch_size: number of sequences.
            capacity: the maximum number of tokens in each sequence; default: the model's context_length.
            kind: "contiguous", "sliding" (layers with a window keep only the tokens inside it) or "paged".
            cache_dtype: dtype in which keys and values are stored: that of the weights (default), torch.int8 or
                torch.float8_e4m3fn.
            window: attention window in tokens, the token itself included, for layers without a smaller one of their own.
                kind="sliding" needs one, here or in the model.
            page_size: tokens in a page of a paged cache.
            num_pages: pages of a paged cache; default: enough for `capacity` tokens of every sequence.
            encoder_states: (B, S, C) in the dtype of the weights, which cross-attention attends to. Their keys and values are
                computed here, once.
            encoder_lengths: (B,), a list or a tensor: the number of encoder states of each sequence. Default: S.

        Returns: a KVCache.
        Raises: TypeError, ValueError, naming the argument.
        """
        require_causal(self.config)
        require_order(self.config, kind != "sliding")
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
            v_head_dim=self.config.v_head_dim,
            dtype=self.key_dtype,
            cache_dtype=cache_dtype,
            device=self.first_weight.device,
        )
        cache.casts = self.key_dtype != self.first_weight.dtype
        cache.encoder_kv = stored_encoder_states(self, encoder_states, encoder_lengths)
        return cache

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        weights: str | Quantization | None = None,
        lora: str | Path | None = None,
    ) -> "GPT":
        """Loads a decoder from a checkpoint in the format of transformers, or from a GGUF file. It is returned in evaluation mode.

        If config.json ties the output matrix to the token embedding, but the file has an output matrix that differs, that one
        is used, with a warning.

        Args:
            path: a folder with `config.json` and one or several safetensors files; or the id of a model on the Hugging Face
                Hub, which is downloaded. Only files in this folder, or in the Hub's cache, are read. Or a GGUF file, or one of
                those that a model was split into, all of which are read; this takes the package gguf.
            revision: a branch, tag or commit of a model on the Hub. Default: its main branch.
            dtype: of all weights: torch.float32, bfloat16, float16 or float64. Default: the dtype of most stored numbers; of
                quantized ones it is float32.
            device: of all weights. Default: PyTorch's default device.
            weights: "int8" or "int4" quantizes the matrices while they are loaded, in groups of 32 columns: see
                `fastgpt.quantize`. A token then costs reading 8.5 or 4.5 bits a number; the token embedding and the output
                matrix take 8.5 in either case. They have no gradients. A `Quantization` says more: other groups, or minima.
                Default: as they are stored; matrices of quantized folders, and those of a GGUF file in types that `linear` takes,
                stay quantized, unless it is "dequantized".
            lora: a folder with a LoRA adapter of this model, or its id on the Hub, as PEFT and `fastgpt train --lora` save it. It is
                added to the weights; to quantized ones at each call, beside them. If it was trained on a model of another name,
                a warning says so.

        Raises: FileNotFoundError or another OSError, naming the file that cannot be read; ValueError, naming the file and the
            wrong entry of config.json or generation_config.json, or the weights that are missing, unexpected, misshapen, not
            finite, or of an unsupported dtype; TypeError for arguments of another type; ImportError without the package gguf.
        """

        def build(fields: dict, _: dict) -> "GPT":
            return cls(GPTConfig(**fields))

        if gguf_file.is_gguf(path):
            hub.require_no_revision(path, revision)
            model = gguf.load(path, build, dtype=dtype, device=device, weights=weights)
        else:
            folder = hub.resolve(path, revision)
            model = transformers_format.load(folder, build, loader="GPT", dtype=dtype, device=device, weights=weights)
        if lora is not None:
            apply_adapters(model, adapters.read(lora, model, path))
        return model

    def save_pretrained(self, folder: str | Path, *, weights: str | None = None) -> None:
        """Writes `config.json`, `model.safetensors` and, if there are generation_defaults, `generation_config.json` into a
        folder, which is made if it is missing. transformers loads them, if it has this architecture and nothing is quantized.

        Args:
            weights: None: as they are, quantized matrices in their blocks, which `from_pretrained` loads again as they were.
                "dequantized": as what they stand for, in the dtype of the others, for other libraries and for training.

        Raises: OSError, naming the argument, if the folder cannot be written to; ValueError for weights.
        """
        require_choice("weights", weights, (None, "dequantized"))
        transformers_format.write(
            self, folder, generation_defaults=self.generation_defaults, dequantize=weights == "dequantized"
        )
