"""The decoder: GPT-2's architecture, short enough to read in one sitting.

Shapes: B batch, T tokens, C hidden size, H heads, D = C / H head dim, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from fastgpt import capture, checkpoint, memory
from fastgpt.cache import CACHE_KINDS, ContiguousCache, KVCache, PagedCache, PagePool, SlidingCache, Uncached
from fastgpt.capture import Captured
from fastgpt.generate import generate
from fastgpt.ops.linear import linear


@dataclass(frozen=True)
class GPTConfig:
    """What a decoder is made of.

    dropout applies, in training, to the embeddings and to what each attention and MLP adds to the residual stream.
    """

    vocab_size: int
    context_length: int
    num_layers: int
    num_heads: int
    hidden_size: int
    dropout: float = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "num_layers", "num_heads", "hidden_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size: expected a multiple of num_heads={self.num_heads}, got {self.hidden_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {self.dropout!r}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def project(x, layer: nn.Linear, norm: nn.LayerNorm | None = None, **options):
    """`layer`, after `norm` if there is one; options: what `linear` does after it."""
    if norm is not None:
        options |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}
    return linear(x, layer.weight, layer.bias, **options)


class Attention(nn.Module):
    """x + out(attention(qkv(norm(x)))): causal, over the tokens at hand or over a cache that they join."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, norm: nn.LayerNorm, cache: KVCache | Uncached, last_only: bool):
        B, T, C = x.shape
        qkv = project(x, self.qkv, norm).view(B, T, 3, self.config.num_heads, self.config.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D), a view
        if last_only:
            q, x = q[:, :, -1:], x[:, -1:]
        y = cache.attend(self.layer, q, k, v)  # as q
        y = y.transpose(1, 2).reshape(x.shape)
        return project(y, self.out, residual=x, dropout_p=self.config.dropout if self.training else 0.0)


class MLP(nn.Module):
    """x + down(gelu(up(norm(x))))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x, norm: nn.LayerNorm):
        y = project(x, self.up, norm, activation="gelu_tanh")  # (B, T, C) -> (B, T, 4C)
        return project(y, self.down, residual=x, dropout_p=self.dropout if self.training else 0.0)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cache: KVCache | Uncached, last_only: bool = False):
        """x (B, T, C) -> the same, or (B, 1, C) of the last token, which still looks back at all."""
        return self.mlp(self.attention(x, self.attention_norm, cache, last_only), self.mlp_norm)


class GPT(nn.Module):
    """A decoder: `model(ids)` gives logits (B, T, V); with `cache`, ids are the tokens that follow those in it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)  # also the output matrix
        self.position_embedding = nn.Embedding(config.context_length, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """GPT-2's initial weights: N(0, 0.02), and 1/sqrt(2 layers) of that where a block adds to the residual."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                parameter.normal_(0.0, 0.02 / math.sqrt(2 * self.config.num_layers) if residual else 0.02)
        memory.collapse(self.parameters())

    def forward(self, ids, cache: KVCache | None = None, new: list[int] | None = None):
        """ids (B, T) int64 -> logits (B, T, V).

        Args:
            cache: holds the tokens before, and then these too; see `new_cache`. Default: there are none.
            new: with a cache, how many of the columns, the last ones, are tokens of each sequence; the others are
                padding, whose logits mean nothing. Default: all.

        Raises: TypeError, ValueError for ids that are not (B, T) int64, out of the vocabulary (on CPU), or more than
            the context or the cache holds.
        """
        return self.logits(self.hidden(ids, cache, new))

    def hidden(self, ids, cache: KVCache | Uncached | None = None, new: list[int] | None = None, last_only=False):
        """The last block's output, which `logits` takes: ids (B, T) -> (B, T, C), or with last_only (B, 1, C)."""
        cache = Uncached(device=ids.device) if cache is None else cache
        return self.transform(self.embed(ids, cache, new), cache, last_only)

    def logits(self, hidden):
        """The final norm and the output matrix: (..., C) -> (..., V)."""
        norm = self.norm
        return linear(
            hidden, self.token_embedding.weight, norm_weight=norm.weight, norm_bias=norm.bias, norm_eps=norm.eps
        )

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
            return self.logits(self.transform(x, cache)[:, -1])

        def chosen(logits):
            return logits if choose is None else choose(logits)

        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())
        if capture.has_graphs(cache.lengths.device) and not hooked:
            graph = capture.Graphed(lambda token: chosen(step(self.embed(token.unsqueeze(1), cache, reserved=True))))

            def replayed(token):
                self.check(token.unsqueeze(1), cache)
                cache.reserve(1)
                return graph(token)

            return replayed
        if not hooked:  # hooks want to be called at every step
            step = Captured(step)
        return lambda token: chosen(step(self.embed(token.unsqueeze(1), cache)))

    def embed(self, ids, cache: KVCache | Uncached, new: list[int] | None = None, reserved: bool = False):
        """Makes room for ids (B, T) in the cache and embeds them: (B, T, C).

        reserved: the host has done its part already, `check` and `cache.reserve`.
        """
        if not reserved:
            self.check(ids, cache, new)
        try:
            x = self.token_embedding(ids)  # (B, T, C)
        except IndexError:
            limit = self.config.vocab_size - 1
            raise ValueError(
                f"ids: expected token ids from 0 to {limit}, got {ids.min().item()} to {ids.max().item()}"
            ) from None
        positions = (cache.advance if reserved else cache.extend)(ids.shape[1], new)  # (T,) or (B, T)
        if new is not None:
            positions = positions.clamp(min=0)  # of padding: any
        x = x + self.position_embedding(positions)
        if self.training:
            x = F.dropout(x, self.config.dropout)
        return x

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
        if longest > self.config.context_length:
            raise ValueError(
                f"ids: expected at most {self.config.context_length} tokens (the context), "
                f"got {past} cached + {longest - past} new"
            )

    def transform(self, x, cache: KVCache | Uncached, last_only: bool = False):
        """The blocks, one after the other: (B, T, C) -> (B, T, C). With last_only the last block computes no other token's
        output: (B, 1, C)."""
        for block in self.blocks:
            x = block(x, cache, last_only and block is self.blocks[-1])
        return x

    def new_cache(
        self, batch_size: int, capacity: int | None = None,
        *, kind: str = "contiguous", cache_dtype: torch.dtype | None = None, window: int | None = None,
        page_size: int = 16, num_pages: int | None = None,
    ) -> KVCache:  # fmt: skip
        """An empty cache.

        Args:
            capacity: tokens that each sequence can have; default the whole context.
            kind: "contiguous", "sliding" (keeps the last `window` tokens only) or "paged".
            cache_dtype: the weights' (default), torch.int8 or torch.float8_e4m3fn.
            window: tokens that one attends to, itself included; default all. "sliding" needs it.
            page_size, num_pages: of a paged cache; default pages for `capacity` tokens of every sequence.

        Raises: TypeError, ValueError, naming the argument.
        """
        weight = self.token_embedding.weight
        capacity = self.config.context_length if capacity is None else capacity
        options = {"batch_size": batch_size, "capacity": capacity, "window": window}
        storage = {
            "num_layers": self.config.num_layers,
            "num_kv_heads": self.config.num_heads,
            "head_dim": self.config.head_dim,
            "dtype": weight.dtype,
            "cache_dtype": cache_dtype,
            "device": weight.device,
        }
        if kind == "contiguous":
            return ContiguousCache(**options, **storage)
        if kind == "sliding":
            if window is None:
                raise ValueError("window: expected a number of tokens for a sliding cache, got None")
            return SlidingCache(**options, **storage)
        if kind == "paged":
            if not isinstance(page_size, int) or page_size < 1:
                raise ValueError(f"page_size: expected an integer >= 1, got {page_size!r}")
            if num_pages is None:
                num_pages = batch_size * -(-capacity // page_size)
            return PagedCache(PagePool(num_pages=num_pages, page_size=page_size, **storage), **options)
        raise ValueError(f"kind: expected one of {', '.join(map(repr, CACHE_KINDS))}, got {kind!r}")

    generate = generate

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype=None, device=None) -> "GPT":
        """A decoder, in evaluation mode, from a folder with `config.json` and `model.safetensors`.

        Args:
            dtype: of the weights; default as stored.

        Raises: FileNotFoundError, or ValueError that says what is damaged, missing, unexpected or misshapen.
        """
        family, fields = checkpoint.read_config(folder)
        with torch.device("meta"):
            model = cls(GPTConfig(**fields))
        return checkpoint.read_weights(model, folder, family, dtype=dtype, device=device).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`, which transformers' GPT-2 reads too."""
        checkpoint.write(self, folder, "gpt2", asdict(self.config))
