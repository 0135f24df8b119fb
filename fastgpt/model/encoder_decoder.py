"""The Transformer as it was published, an encoder and a decoder: for translation, summaries, any text from a text. Also T5.

    EncoderDecoder   ids (B, S) -> encoder -> states (B, S, C)
                     target ids (B, T) -> decoder, whose cross-attention reads the states -> logits (B, T, V)

Inputs are padded on the right. The encoder packs them without padding, and no token of the decoder attends to padding.

Shapes: B batch, S tokens of an input, T tokens of an output, C hidden size, V vocabulary.

Source: Attention Is All You Need (arXiv 1706.03762).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from fastgpt.checkpoints import hub, transformers_format
from fastgpt.checks import require_choice, require_device, require_dtype, require_tensor, shown
from fastgpt.model.config import EncoderConfig, EncoderDecoderConfig, GPTConfig, require_config
from fastgpt.model.decoder import GPT
from fastgpt.model.encoder import Encoder
from fastgpt.model.fusion import plain
from fastgpt.model.inputs import as_sequences, require_room
from fastgpt.ops.quantized_weight import Quantization

IGNORED = -100  # the label of padding, as of F.cross_entropy


@plain(weights=0)
class EncoderDecoder(nn.Module):
    """An encoder and a decoder that attends to its states: `model(ids, target_ids)` returns logits (B, T, V), `model.loss(ids,
    labels)` what to train by, and `fastgpt.generate(model, ids)` the outputs.

    config: the architecture.
    encoder: the `Encoder`. decoder: the `GPT`. They share the module of the token embedding if the configuration says so.
    checkpoint_config: the contents of config.json, if the model came from a checkpoint; `save_pretrained` writes them back.
    generation_defaults: defaults of `generate` from the checkpoint, as of `GPT`.
    """

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        require_config(config, EncoderDecoderConfig)
        self.config, self.checkpoint_config = config, {}
        self.encoder, self.decoder = Encoder(config.encoder), GPT(config.decoder)
        if config.share_embedding:
            self.decoder.token_embedding = self.encoder.token_embedding

    def forward(
        self, ids: torch.Tensor, target_ids: torch.Tensor, lengths: torch.Tensor | Sequence[int] | None = None
    ) -> torch.Tensor:
        """Logits (B, T, V) of the token after each of the target's.

        Args:
            ids: (B, S) int64 or int32, the inputs, padded on the right.
            target_ids: (B, T) int64 or int32, the outputs so far, which begin with config.start_token.
            lengths: (B,), a list or a tensor: the number of tokens of each input. Default: S.

        Raises: TypeError, ValueError for arguments of another shape or dtype, ids outside the vocabulary (on CPU), or more
            tokens than the context.
        """
        states = self.encode(ids, lengths)
        if isinstance(target_ids, torch.Tensor) and target_ids.dim() == 2 and len(target_ids) != len(ids):
            raise ValueError(f"target_ids: expected {len(ids)} rows, as ids has, got {len(target_ids)}")
        try:
            return self.decoder(target_ids, encoder_states=states, encoder_lengths=lengths)
        except (TypeError, ValueError) as error:
            if str(error).startswith("ids:"):  # as the decoder calls them
                raise type(error)(f"target_{error}") from error
            raise

    def encode(self, ids: torch.Tensor, lengths: torch.Tensor | Sequence[int] | None = None) -> torch.Tensor:
        """The encoder's states of the inputs, (B, S, C), those of padding zero. Arguments and errors are those of `forward`."""
        return self.encoder.encode(ids, lengths)

    def loss(
        self, ids: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor | Sequence[int] | None = None
    ) -> torch.Tensor:
        """The mean cross-entropy, in nats, of each token of the outputs given the input and the tokens before it (teacher forcing).

        Args:
            ids, lengths: the inputs, as of `forward`.
            labels: (B, T) int64, the outputs, without the start token, with their end token; -100 where they are padded on the right.

        Returns: a scalar, fp32, or fp64 as the weights are; it has a gradient.
        Raises: TypeError, ValueError as `forward`; ValueError (on CPU) for labels that are all -100.
        """
        require_tensor("labels", labels, 2)
        require_dtype("labels", labels, (torch.int64,))
        require_device("labels", labels, self.first_weight.device)
        if isinstance(ids, torch.Tensor) and len(labels) != len(ids):
            raise ValueError(f"labels: expected {len(ids)} rows, as ids has, got {len(labels)}")
        if labels.is_cpu:
            real = labels[labels != IGNORED]
            if real.numel() == 0:
                raise ValueError(f"labels: expected at least one that is not {IGNORED}, got shape {tuple(labels.shape)}")
            low, high = real.aminmax()
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"labels: expected tokens from 0 to {self.config.vocab_size - 1}, or {IGNORED}, got {low if low < 0 else high}"
                )
        logits = self(ids, self.shifted(labels), lengths)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def shifted(self, labels: torch.Tensor) -> torch.Tensor:
        """What the decoder reads to predict labels (B, T): the start token, then all labels but the last, (B, T)."""
        start = labels.new_full((len(labels), 1), self.config.start_token)
        return torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)  # of padding, any token: none is predicted from it

    def begin(
        self, ids: Any, lengths: torch.Tensor | Sequence[int] | None = None
    ) -> tuple[torch.Tensor | list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """What a generation begins with: the start token of each output, (B, 1), or of a list of inputs a list; the states of the
        inputs (B, S, C); their lengths (B,) int32.

        Args:
            ids: (B, S) int64, a tensor or an array, padded on the right; or a list of B inputs of any length.
            lengths: of a tensor or an array, the number of tokens of each input. Default: S.

        Raises: TypeError, ValueError for ids and lengths that the model cannot take.
        """
        inputs = as_sequences(self.encoder, ids)
        counts = [len(one) for one in inputs]
        is_list = isinstance(ids, (list, tuple))
        if lengths is not None:
            if is_list:
                raise ValueError("encoder_lengths: expected None for a list of inputs, which have their own")
            found = lengths.tolist() if isinstance(lengths, (torch.Tensor, np.ndarray)) else lengths
            if not isinstance(found, Sequence):
                raise TypeError(f"encoder_lengths: expected a list, a tensor or an array of integers, got {shown(lengths)}")
            if len(found) != len(counts) or not all(type(n) is int and 1 <= n <= counts[0] for n in found):
                raise ValueError(f"encoder_lengths: expected {len(counts)} lengths from 1 to {counts[0]}, got {found}")
            counts, inputs = list(found), [one[:n] for one, n in zip(inputs, found)]
        require_room("ids", max(counts), self.config.encoder)
        states = self.encoder.encode_packed(torch.cat(inputs), counts).split(counts)
        start = inputs[0].new_full((len(inputs), 1), self.config.start_token)
        padded = nn.utils.rnn.pad_sequence(list(states), batch_first=True)
        return list(start) if is_list else start, padded, torch.tensor(counts, dtype=torch.int32, device=start.device)

    @property
    def generation_defaults(self) -> dict:
        """Those of the decoder, which generates."""
        return self.decoder.generation_defaults

    @generation_defaults.setter
    def generation_defaults(self, defaults: dict) -> None:
        self.decoder.generation_defaults = defaults

    @property
    def first_weight(self) -> torch.Tensor:
        """A weight with the model's dtype and device."""
        return self.encoder.first_weight

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        weights: str | Quantization | None = None,
    ) -> "EncoderDecoder":
        """Loads an encoder-decoder from a checkpoint in the format of transformers, in evaluation mode.

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

        def build(fields: dict, _: dict) -> "EncoderDecoder":
            stacks = {"encoder": EncoderConfig(**fields["encoder"]), "decoder": GPTConfig(**fields["decoder"])}
            return cls(EncoderDecoderConfig(**fields | stacks))

        folder = hub.resolve(path, revision)
        return transformers_format.load(folder, build, loader="EncoderDecoder", dtype=dtype, device=device, weights=weights)

    def save_pretrained(self, folder: str | Path, *, weights: str | None = None) -> None:
        """Writes `config.json`, `model.safetensors` and, if there are generation_defaults, `generation_config.json` into a
        folder, which is made if it is missing. transformers loads them, if it has this architecture and nothing is quantized.

        Args:
            weights: None, or "dequantized", as in `GPT.save_pretrained`.

        Raises: OSError, naming the argument, if the folder cannot be written to; ValueError for weights.
        """
        require_choice("weights", weights, (None, "dequantized"))
        transformers_format.write(
            self, folder, generation_defaults=self.generation_defaults, dequantize=weights == "dequantized"
        )
