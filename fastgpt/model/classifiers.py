"""Sequence and token classification on top of a decoder or an encoder."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from fastgpt.checkpoints import hub, transformers_format
from fastgpt.checks import require_integer, require_number, shown
from fastgpt.model.config import EncoderConfig, GPTConfig
from fastgpt.model.decoder import GPT
from fastgpt.model.encoder import Encoder, Transform, initialize
from fastgpt.model.evaluation_mode import is_training
from fastgpt.model.inputs import as_lengths, as_sequences, require_ids
from fastgpt.model.layers import project
from fastgpt.schema import integer, mapping, number, read

MAX_LABELS = 1 << 16
DROPOUT = number(None, least=0, below=1, optional=True)


def labels_of(stored: dict | None) -> dict[int, str] | None:
    """id2label of config.json, with its string keys as integers."""
    if stored is None:
        return None
    for label, name in stored.items():
        if not re.fullmatch(r"[0-9]{1,7}", label) or not isinstance(name, str):
            raise ValueError(f"id2label: expected label ids as keys and names as values, got {shown(label)}: {name!r}")
    return {int(label): name for label, name in stored.items()}


class Classifier(nn.Module):
    """The base class of both classifiers.

    Args:
        model: the decoder or encoder whose hidden states are classified; it becomes a submodule. Its output matrix is not used.
        num_labels: number of classes; 1 for regression.
        dropout: probability in training, on what classes are computed from.
        id2label: names of the classes; default LABEL_0, LABEL_1, ...
        pad_token_id: the token id that tensors of ids are padded with; default: they are not padded.
    """

    head: str  # one of fastgpt.checkpoints.families.HEADS
    dropouts: tuple[str, ...]  # entries of config.json, of which the first that there is says the dropout
    schema = {  # entries of config.json, beyond those of the decoder
        "id2label": mapping(None, optional=True),
        "num_labels": integer(1, MAX_LABELS, 2),
        "pad_token_id": integer(-(2**31), 2**31 - 1, None, optional=True),
    }

    def __init__(
        self,
        model: GPT | Encoder,
        num_labels: int,
        *,
        dropout: float = 0.0,
        id2label: Mapping[int, str] | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        super().__init__()
        num_labels = require_integer("num_labels", num_labels, least=1, most=MAX_LABELS)
        pad_token_id = require_integer("pad_token_id", pad_token_id, optional=True)
        id2label = {label: f"LABEL_{label}" for label in range(num_labels)} if id2label is None else dict(id2label)
        if sorted(id2label) != list(range(num_labels)):
            raise ValueError(f"id2label: expected a name for each of 0 to {num_labels - 1}, got {shown(id2label)}")
        self.dropout = require_number("dropout", dropout, least=0, below=1)
        self.model, self.num_labels, self.id2label, self.pad_token_id = model, num_labels, id2label, pad_token_id

    def new_layer(self, bias: bool) -> nn.Linear:
        weight = self.model.token_embedding.weight
        layer = nn.Linear(self.config.hidden_size, self.num_labels, bias=bias, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(layer.weight, 0.0, 0.02)
        if bias:
            nn.init.zeros_(layer.bias)
        return layer

    def new_transform(self) -> Transform:
        """A layer before the classes of an encoder; it begins as the encoder's pooler, if that is such a layer."""
        weight, config = self.model.token_embedding.weight, self.config
        transform = Transform.of_classes(config)
        initialize(transform)
        transform.to(device=weight.device, dtype=weight.dtype)
        pooler = self.model.pooler
        if pooler is not None and pooler.activation == transform.activation:
            transform.load_state_dict(pooler.state_dict())
        return transform

    @property
    def config(self) -> Any:
        """The model's GPTConfig or EncoderConfig."""
        return self.model.config

    @property
    def checkpoint_config(self) -> dict:
        return self.model.checkpoint_config

    def batch(self, ids: Any, lengths: Any = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Arguments of `forward` -> ids (B, T), padded on the right, and lengths (B,) int32, or None if all are T."""
        if not isinstance(ids, torch.Tensor):
            if lengths is not None:
                raise ValueError("lengths: expected None for a list of sequences, which have their own")
            sequences = as_sequences(self.model, ids)
            ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
            return ids, as_lengths("lengths", [len(sequence) for sequence in sequences], ids)
        require_ids(ids, self.model.first_weight.device)
        if lengths is not None:
            return ids, as_lengths("lengths", lengths, ids)
        if self.pad_token_id is None or ids.dim() != 2:
            return ids, None
        columns = torch.arange(1, ids.shape[1] + 1, dtype=torch.int32, device=ids.device)
        return ids, (columns * (ids != self.pad_token_id)).amax(1).clamp(min=1)

    def types(self, ids: Any, token_types: torch.Tensor | None) -> dict:
        """Arguments of `forward` -> those of `encode` beyond the ones of `batch`."""
        if token_types is None:
            return {}
        if not self.config.is_encoder or not isinstance(ids, torch.Tensor):
            raise ValueError("token_types: expected None, or ids (B, T) of an encoder with them, got token_types")
        return {"token_types": token_types}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "Classifier":
        """Loads a checkpoint as the class of transformers with this head writes it. It is returned in evaluation mode.

        Args:
            path: a folder with `config.json` and safetensors, or the id of a model on the Hugging Face Hub.
            revision: a branch, tag or commit of a model on the Hub. Default: its main branch.
            dtype: of all weights. Default: the dtype of most stored numbers.
            device: of all weights. Default: PyTorch's default device.

        Raises: OSError, ValueError, TypeError as `GPT.from_pretrained`.
        """
        folder = hub.resolve(path, revision)

        def build(fields: dict, stored: dict):
            settings = read(cls.schema, stored)
            labels = labels_of(settings["id2label"])
            count = settings["num_labels"] if labels is None else len(labels)
            model = Encoder(EncoderConfig(**fields)) if "masked_head" in fields else GPT(GPTConfig(**fields))
            dropout = next((settings[name] for name in cls.dropouts if settings[name] is not None), 0.1)
            return cls(model, count, dropout=dropout, id2label=labels, pad_token_id=settings["pad_token_id"])

        return transformers_format.load(folder, build, cls.head, dtype=dtype, device=device)

    def entries(self) -> dict:
        """Entries of config.json beyond those of the model."""
        kept = ("tie_word_embeddings", "problem_type")
        result = {key: self.checkpoint_config[key] for key in kept if key in self.checkpoint_config} | {
            "id2label": {str(label): name for label, name in self.id2label.items()},
            "label2id": {name: label for label, name in self.id2label.items()},
        }
        if self.pad_token_id is not None or not self.config.is_encoder:  # whose configurations have an id in any case
            result["pad_token_id"] = self.pad_token_id
        return result

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into a folder, which is made if it is missing. transformers loads them,
        if it has this architecture."""
        transformers_format.write(self, folder, self.head, self.entries())


class SequenceClassifier(Classifier):
    """Classifies sequences: a decoder's by the hidden state of the last token, a `GPT`'s that is not causal by the mean over all
    tokens, an `Encoder`'s by what its config calls pooling, after a layer like its pooler.

    Args:
        model: the decoder or encoder whose hidden states are classified; it becomes a submodule.
        num_labels: number of classes; 1 for regression.
        dropout: probability in training, on what the classes of an `Encoder` are computed from.
        id2label: names of the classes; default LABEL_0, LABEL_1, ...
        pad_token_id: the token id that tensors of ids are padded with; default: they are not padded.
    """

    head = "ForSequenceClassification"
    dropouts = "classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob"
    schema = Classifier.schema | dict.fromkeys(dropouts, DROPOUT)

    def __init__(self, model: GPT | Encoder, num_labels: int, **options) -> None:
        super().__init__(model, num_labels, **options)
        self.transform = self.new_transform() if self.config.is_encoder else None
        self.score = self.new_layer(bias=self.config.is_encoder)

    def forward(
        self,
        ids: torch.Tensor | Sequence,
        lengths: torch.Tensor | Sequence[int] | None = None,
        token_types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids -> logits (B, num_labels).

        Args:
            ids: a list of B sequences of any length; or a tensor (B, T) int64 or int32, padded on the right.
            lengths: (B,), a list or a tensor: the number of tokens of each row of a tensor. Default: up to the last token that
                is not pad_token_id.
            token_types: (B, T) integers, with a tensor of ids of an `Encoder` whose tokens have types. Default: 0.

        Raises: TypeError, ValueError as `GPT.forward`.
        """
        types = self.types(ids, token_types)
        ids, lengths = self.batch(ids, lengths)
        if self.config.causal:
            hidden = self.model.hidden(ids, last_only=lengths is None)
            last = -1 if lengths is None else lengths.long() - 1
            return project(hidden[torch.arange(len(ids), device=ids.device), last], self.score, self.model.norm)
        states = self.model.encode(ids, lengths, **types)
        if self.transform is None:
            return project(mean(states, lengths), self.score)
        pooled = states[:, 0] if self.config.pooling == "first" else mean(states, lengths)
        return project(F.dropout(self.transform(pooled), self.dropout, is_training(self)), self.score)

    def entries(self) -> dict:
        name = "seq_classif_dropout" if "seq_classif_dropout" in self.checkpoint_config else "classifier_dropout"
        return super().entries() | ({name: self.dropout} if self.config.is_encoder else {})


def mean(states: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """The mean of the states (B, T, C) of the tokens of each sequence, without padding: (B, C)."""
    if lengths is None:
        return states.mean(1)
    padding = torch.arange(states.shape[1], device=states.device) >= lengths.unsqueeze(1)
    return states.masked_fill(padding.unsqueeze(-1), 0.0).sum(1) / lengths.unsqueeze(1).to(states.dtype)


class TokenClassifier(Classifier):
    """Classifies each token by its hidden state.

    Args:
        model: the decoder or encoder whose hidden states are classified; it becomes a submodule.
        num_labels: number of classes.
        dropout: probability in training, on the hidden states.
        id2label: names of the classes; default LABEL_0, LABEL_1, ...
        pad_token_id: the token id that tensors of ids are padded with; default: they are not padded.
    """

    head = "ForTokenClassification"
    dropouts = "classifier_dropout", "hidden_dropout", "hidden_dropout_prob", "dropout"
    schema = Classifier.schema | dict.fromkeys(dropouts, DROPOUT)

    def __init__(self, model: GPT | Encoder, num_labels: int, *, dropout: float = 0.1, **options) -> None:
        super().__init__(model, num_labels, dropout=dropout, **options)
        has_transform = self.config.is_encoder and self.config.pooler_activation is None
        self.transform = self.new_transform() if has_transform else None
        self.classifier = self.new_layer(bias=True)

    def forward(
        self,
        ids: torch.Tensor | Sequence,
        lengths: torch.Tensor | Sequence[int] | None = None,
        token_types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids -> logits (B, T, num_labels); those of padding are meaningless.

        Args:
            ids: a list of B sequences of any length; or a tensor (B, T) int64 or int32, padded on the right.
            lengths: (B,), a list or a tensor: the number of tokens of each row of a tensor. Default: up to the last token that
                is not pad_token_id.
            token_types: (B, T) integers, with a tensor of ids of an `Encoder` whose tokens have types. Default: 0.

        Raises: TypeError, ValueError as `GPT.forward`.
        """
        types = self.types(ids, token_types)
        states = self.model.encode(*self.batch(ids, lengths), **types)
        states = states if self.transform is None else self.transform(states)
        return project(F.dropout(states, self.dropout, is_training(self)), self.classifier)

    def entries(self) -> dict:
        return super().entries() | {"classifier_dropout": self.dropout}
