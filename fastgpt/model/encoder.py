"""The encoder: BERT's architecture and what later families changed in it, from the modules of the decoder.

    Encoder   ids (N,) -> token, type and position embeddings (N, C) -> norm -> blocks -> states (N, C)
              masked-language head: states -> logits (N, V);  pooler: states of first tokens (B, C) -> (B, C)
    blocks    the decoder's; BERT's have the norms after each addition, x = norm(x + attention(x)), then x = norm(x + mlp(x))

Tokens see all of their sequence, to both sides, so nothing is cached, and sequences of all lengths go through the blocks packed,
one after the other without padding: `Packed` takes the place of a cache. It is not the decoder with more options: that one's
passes, steps and recordings are about a cache, and embeddings, norms and heads differ.

Shapes: N tokens of B sequences, C hidden size, V vocabulary.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from fastgpt import huge_pages
from fastgpt.cache.packed import Packed
from fastgpt.checkpoints import hub, transformers_format
from fastgpt.checks import require_choice, require_device, require_dtype, require_shape, require_tensor, shown
from fastgpt.model.config import EncoderConfig, require_config
from fastgpt.model.decoder import Block
from fastgpt.model.evaluation_mode import is_training
from fastgpt.model.fusion import is_plain_matrix, plain
from fastgpt.model.inputs import as_lengths, require_ids
from fastgpt.model.layers import Norm, look_up, new_layer, project
from fastgpt.model.relative_bias import RelativeBias
from fastgpt.model.rope import Tables, sinusoidal
from fastgpt.ops.linear import linear
from fastgpt.ops.quantized_weight import Quantization


@plain(weights=0)
class Transform(nn.Module):
    """activation(dense(x)), normalized if there is a norm: a pooler, or what stands before classes."""

    def __init__(self, config: EncoderConfig, activation: str, *, bias: bool = True, normalize: bool = False):
        super().__init__()
        self.activation = activation
        self.dense = new_layer(nn.Linear, config.hidden_size, config.hidden_size, bias=bias)
        self.norm = Norm(config, config.hidden_size) if normalize else None

    @classmethod
    def of_head(cls, config: EncoderConfig) -> "Transform":
        """That of a masked-language head."""
        return cls(config, config.head_activation, bias=config.head_bias, normalize=True)

    @classmethod
    def of_classes(cls, config: EncoderConfig) -> "Transform":
        """That before the classes of sequences."""
        return cls.of_head(config) if config.pooler_activation is None else cls(config, config.pooler_activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., C)."""
        if self.activation == "tanh":
            x = project(x, self.dense).tanh()
        else:
            x = project(x, self.dense, activation=self.activation)
        return x if self.norm is None else self.norm(x)


@plain(weights=1)
class MaskedHead(nn.Module):
    """norm(activation(dense(x))), before the output matrix, and the bias of the logits."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.transform = Transform.of_head(config)
        self.register_parameter("bias", nn.Parameter(torch.zeros(config.vocab_size)) if config.vocabulary_bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., C)."""
        return self.transform(x)


@plain(weights=0)
class Encoder(nn.Module):
    """An encoder: `model.encode(ids)` returns the final hidden states (B, T, C), and `model(ids)` the logits (B, T, V) of its
    masked-language head, if it has one.

    config: the architecture.
    checkpoint_config: the contents of config.json, if the model came from a checkpoint; `save_pretrained` writes them back.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        require_config(config, EncoderConfig)
        self.config, self.checkpoint_config = config, {}
        width = config.hidden_size
        self.token_embedding = new_layer(nn.Embedding, config.vocab_size, width)
        self.type_embedding = new_layer(nn.Embedding, config.token_types, width) if config.token_types else None
        self.position_embedding, self.tables = None, None
        if config.position == "learned":
            self.position_embedding = new_layer(nn.Embedding, config.first_position + config.context_length, width)
        elif config.position == "rotary":
            self.tables = Tables(config.rotation, config.context_length)
        elif config.position == "sinusoidal":
            self.tables = Tables(functools.partial(sinusoidal, width=width), config.context_length)
        self.relative_bias = RelativeBias(config) if config.position == "relative" else None
        self.embedding_norm = Norm(config, width) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = Norm(config, width) if config.norm_first else None
        self.pooler = Transform(config, config.pooler_activation or "tanh") if config.pooler else None
        self.head, self.output = None, None
        if config.masked_head:
            self.head = MaskedHead(config)
            if not config.tie_embeddings:
                self.output = new_layer(nn.Linear, width, config.vocab_size, bias=False)
        initialize(self)

    def forward(
        self,
        ids: torch.Tensor,
        lengths: torch.Tensor | Sequence[int] | None = None,
        token_types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids (B, T) -> logits (B, T, V) of the masked-language head; those of padding are meaningless.

        Args:
            ids: (B, T) int64 or int32, on the device of the model, padded on the right.
            lengths: (B,), a list or a tensor: the number of tokens of each sequence. Default: T.
            token_types: (B, T) integers, such as 0 for a first sentence and 1 for a second. Default: 0.

        Raises: TypeError, ValueError for arguments of another shape or dtype, ids outside the vocabulary (on CPU), more tokens
            than the context, or a model without such a head.
        """
        return self.logits(self.encode(ids, lengths, token_types))

    def encode(
        self,
        ids: torch.Tensor,
        lengths: torch.Tensor | Sequence[int] | None = None,
        token_types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids (B, T) -> the final hidden states (B, T, C); those of padding are zero. Arguments and errors are those of
        `forward`."""
        require_ids(ids, self.first_weight.device)
        B, T = ids.shape
        if token_types is not None:
            require_tensor("token_types", token_types)
            require_shape("token_types", token_types, tuple(ids.shape), "(B, T), as ids")
        if not B:
            return self.first_weight.new_zeros(0, T, self.config.hidden_size)
        if lengths is None:
            states = self.encode_packed(ids.flatten(), [T] * B, None if token_types is None else token_types.flatten())
            return states.view(B, T, -1)
        if ids.is_meta and isinstance(lengths, torch.Tensor):
            raise ValueError(
                "lengths: expected a list of integers for a model on the meta device, got a tensor, which has no data"
            )
        checked = as_lengths("lengths", lengths, ids)
        counts = checked.tolist() if isinstance(lengths, torch.Tensor) else list(lengths)
        packed, begins = torch.arange(sum(counts), device=ids.device), torch.arange(B, device=ids.device) * T
        real = packed + (begins - checked.cumsum(0) + checked).repeat_interleave(checked, output_size=sum(counts))
        types = None if token_types is None else token_types.flatten()[real]
        states = self.encode_packed(ids.flatten()[real], counts, types)
        return states.new_zeros(B * T, states.shape[1]).index_copy(0, real, states).view(B, T, -1)

    def encode_packed(self, ids: torch.Tensor, lengths: Sequence[int], token_types: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids of sequences one after the other, (N,) -> their final hidden states (N, C).

        Args:
            ids: (N,) int64 or int32, on the device of the model.
            lengths: B integers, at least 1, the number of tokens of each sequence; their sum is N.
            token_types: (N,) integers. Default: 0.

        Raises: TypeError, ValueError as `forward`.
        """
        self.check(ids, lengths, token_types)
        packed = Packed(lengths, ids.device)
        tables, rope = None, self.config.rope
        if self.relative_bias is not None:
            packed.add_bias(self.relative_bias)
        if self.tables is not None and rope is not None:
            is_long = rope.is_long(packed.longest)
            tables = tuple(table[packed.positions] for table in self.tables(packed.longest, self.first_weight, is_long))
        x = self.embed(ids, packed, token_types).unsqueeze(0)  # (1, N, C)
        for block in self.blocks:
            x = block(x, packed, tables)
        return (x if self.norm is None else self.norm(x)).squeeze(0)

    def embed(self, ids: torch.Tensor, packed: Packed, token_types: torch.Tensor | None) -> torch.Tensor:
        """The embeddings of tokens (N,), their positions and types: (N, C)."""
        try:
            x = look_up(self.token_embedding, ids)
        except IndexError:
            limit = self.config.vocab_size - 1
            raise ValueError(
                f"ids: expected token ids from 0 to {limit}, got {ids.min().item()} to {ids.max().item()}"
            ) from None
        if self.config.embedding_scale is not None:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype, device="cpu")
        if self.type_embedding is not None:
            try:
                x = x + look_up(self.type_embedding, torch.zeros_like(ids) if token_types is None else token_types)
            except IndexError:
                limit = self.config.token_types - 1
                raise ValueError(
                    f"token_types: expected types from 0 to {limit}, got {token_types.min()} to {token_types.max()}"
                ) from None
        if self.position_embedding is not None:
            x = x + look_up(self.position_embedding, packed.positions + self.config.first_position)
        elif self.config.position == "sinusoidal":
            (table,) = self.tables(packed.longest, x)  # type: ignore[misc]  # which it has
            x = x + F.embedding(packed.positions, table).to(x.dtype)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        return F.dropout(x, self.config.dropout) if is_training(self) else x

    def check(self, ids: torch.Tensor, lengths: Sequence[int], token_types: torch.Tensor | None) -> None:
        """Raises TypeError, ValueError for arguments of `encode_packed` that the model cannot take, but for their values."""
        require_tensor("ids", ids, 1)
        if not isinstance(lengths, Sequence) or not all(type(n) is int for n in lengths):
            raise TypeError(f"lengths: expected a list of integers, got {shown(lengths)}")
        if not lengths or min(lengths) < 1 or sum(lengths) != len(ids):
            raise ValueError(
                f"lengths: expected integers >= 1 whose sum is {len(ids)}, the tokens in ids, got {shown(lengths)}"
            )
        for name, x in (("ids", ids), ("token_types", token_types)):
            if x is not None:
                require_tensor(name, x)
                require_dtype(name, x, (torch.int64, torch.int32))
                require_shape(name, x, tuple(ids.shape), "as ids")
                require_device(name, x, self.first_weight.device)
        if token_types is not None and self.type_embedding is None:
            raise ValueError("token_types: expected None for a model whose tokens have no types, got a tensor")
        if max(lengths) > (context := self.config.context_length):
            raise ValueError(f"ids: expected at most {context} tokens in a sequence (the context), got {max(lengths)}")

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The logits of the masked-language head: states (..., C) -> (..., V). Raises ValueError if there is none."""
        if self.head is None:
            raise ValueError("model: expected one with a masked-language head, which this checkpoint does not have")
        layer = self.token_embedding if self.output is None else self.output
        compute = linear if is_plain_matrix(layer.weight) else F.linear
        return compute(self.head(states), layer.weight, self.head.bias)

    @property
    def first_weight(self) -> torch.Tensor:
        """A weight with the model's dtype and device."""
        weight = getattr(self.token_embedding, "weight", None)
        return weight if isinstance(weight, torch.Tensor) else next(self.parameters())

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        weights: str | Quantization | None = None,
    ) -> "Encoder":
        """Loads an encoder from a checkpoint in the format of transformers, in evaluation mode. It has a pooler and a
        masked-language head if the checkpoint has them.

        Args:
            path: a folder with `config.json` and one or several safetensors files; or the id of a model on the Hugging Face
                Hub, which is downloaded.
            revision: a branch, tag or commit of a model on the Hub. Default: its main branch.
            dtype: of all weights: torch.float32, bfloat16, float16 or float64. Default: the dtype of most stored numbers.
            device: of all weights. Default: PyTorch's default device.
            weights: "int8", "int4" or a `Quantization` quantizes the matrices while they are loaded, as in
                `GPT.from_pretrained`.

        Raises: OSError, ValueError, TypeError as `GPT.from_pretrained`.
        """

        def build(fields: dict, _: dict) -> "Encoder":
            return cls(EncoderConfig(**fields))

        folder = hub.resolve(path, revision)
        return transformers_format.load(folder, build, loader="Encoder", dtype=dtype, device=device, weights=weights)

    def save_pretrained(self, folder: str | Path, *, weights: str | None = None) -> None:
        """Writes `config.json` and `model.safetensors` into a folder, which is made if it is missing. transformers loads them,
        if it has this architecture and nothing is quantized.

        Args:
            weights: None, or "dequantized", as in `GPT.save_pretrained`.

        Raises: OSError, naming the argument, if the folder cannot be written to; ValueError for weights.
        """
        require_choice("weights", weights, (None, "dequantized"))
        transformers_format.write(self, folder, dequantize=weights == "dequantized")


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Draws BERT's initial weights: matrices from N(0, 0.02), biases 0. On the meta device it does nothing."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            return
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 2:
            parameter.normal_(0.0, 0.02)
    huge_pages.collapse(module.parameters())
