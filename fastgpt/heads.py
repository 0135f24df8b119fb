"""Heads other than the next token's: what class a sequence has, or each of its tokens, read off a decoder or an encoder."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from fastgpt import checkpoint
from fastgpt.context import as_lengths
from fastgpt.generate import as_prompts
from fastgpt.model import GPT, GPTConfig, project


class Classifier(nn.Module):
    """What both heads have.

    Args:
        model: the decoder or encoder whose states are classified; it becomes part of this. Its output matrix is not used.
        num_labels: classes; 1 for a regression.
        id2label: the name of each, by its number; default LABEL_0, LABEL_1, ...
        pad_token_id: what a tensor of ids is padded with; default: it is not padded.
    """

    head: str  # one of fastgpt.families.HEADS

    def __init__(
        self, model: GPT, num_labels: int, *, id2label: Mapping[int, str] | None = None, pad_token_id: int | None = None
    ):
        super().__init__()
        if not isinstance(num_labels, int) or num_labels < 1:
            raise ValueError(f"num_labels: expected an integer >= 1, got {num_labels!r}")
        id2label = {label: f"LABEL_{label}" for label in range(num_labels)} if id2label is None else dict(id2label)
        if sorted(id2label) != list(range(num_labels)):
            raise ValueError(f"id2label: expected a name for each of 0 to {num_labels - 1}, got {id2label!r}")
        self.model, self.num_labels, self.id2label, self.pad_token_id = model, num_labels, id2label, pad_token_id

    def new_layer(self, bias: bool) -> nn.Linear:
        weight = self.model.token_embedding.weight
        layer = nn.Linear(self.config.hidden_size, self.num_labels, bias=bias, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(layer.weight, 0.0, 0.02)
        if bias:
            nn.init.zeros_(layer.bias)
        return layer

    @property
    def config(self) -> GPTConfig:
        return self.model.config

    @property
    def checkpoint_config(self) -> dict:
        return self.model.checkpoint_config

    def batch(self, ids, lengths=None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids (B, T), padded on the right, and the lengths (B,) int32 of sequences that differ; arguments: `forward`."""
        if not isinstance(ids, torch.Tensor):
            if lengths is not None:
                raise ValueError("lengths: expected None for a list of sequences, which have their own")
            sequences = as_prompts(self.model, ids)
            ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
            return ids, as_lengths("lengths", [len(sequence) for sequence in sequences], ids)
        if lengths is not None:
            return ids, as_lengths("lengths", lengths, ids)
        if self.pad_token_id is None or ids.dim() != 2:
            return ids, None
        columns = torch.arange(1, ids.shape[1] + 1, dtype=torch.int32, device=ids.device)
        return ids, (columns * (ids != self.pad_token_id)).amax(1).clamp(min=1)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype=None, device=None):
        """A checkpoint that transformers' class of this head wrote, in evaluation mode; arguments, errors: those of GPT's."""
        folder = checkpoint.resolve(path)
        family, stored, fields = checkpoint.read_config(folder, cls.head)
        labels = stored.get("id2label")
        labels = None if labels is None else {int(label): name for label, name in labels.items()}
        count = stored.get("num_labels", 2) if labels is None else len(labels)
        with torch.device("meta"):
            model = GPT(GPTConfig(**fields | {"tie_embeddings": True}))  # without an output matrix, as the checkpoint is
            head = cls(model, count, id2label=labels, pad_token_id=stored.get("pad_token_id"), **cls.settings(stored))
        model.checkpoint_config = stored
        return checkpoint.read_weights(head, folder, family, dtype=dtype, device=device).eval()

    @staticmethod
    def settings(stored: dict) -> dict:
        """What else a head is told by config.json."""
        return {}

    def entries(self) -> dict:
        """What a head has in config.json beyond its decoder."""
        kept = ("tie_word_embeddings", "problem_type")
        return {key: self.checkpoint_config[key] for key in kept if key in self.checkpoint_config} | {
            "id2label": {str(label): name for label, name in self.id2label.items()},
            "label2id": {name: label for label, name in self.id2label.items()},
            "pad_token_id": self.pad_token_id,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`, which transformers reads too if it has this architecture."""
        checkpoint.write(self, folder, self.head, self.entries())


class SequenceClassifier(Classifier):
    """The class of each sequence: scores of its last token, which has seen all of it; in an encoder, of the mean of all."""

    head = "ForSequenceClassification"

    def __init__(self, model, num_labels, **options):
        super().__init__(model, num_labels, **options)
        self.score = self.new_layer(bias=False)

    def forward(self, ids, lengths=None):
        """ids -> logits (B, num_labels).

        Args:
            ids: a list of B sequences of any length; or (B, T) int64, padded on the right.
            lengths: (B,), tokens of each sequence of such a tensor; default: all up to the last that is not padding.

        Raises: TypeError, ValueError as `GPT.forward`.
        """
        ids, lengths = self.batch(ids, lengths)
        if self.config.causal:
            hidden = self.model.hidden(ids, last_only=lengths is None)
            last = -1 if lengths is None else lengths.long() - 1
            return project(hidden[torch.arange(len(ids), device=ids.device), last], self.score, self.model.norm)
        states = self.model.encode(ids, lengths)
        if lengths is None:
            return project(states.mean(1), self.score)
        padding = torch.arange(ids.shape[1], device=ids.device) >= lengths.unsqueeze(1)
        states = states.masked_fill(padding.unsqueeze(-1), 0.0)
        return project(states.sum(1) / lengths.unsqueeze(1).to(states.dtype), self.score)


class TokenClassifier(Classifier):
    """The class of each token.

    dropout: in training, of the states that are classified. Further arguments: `Classifier`.
    """

    head = "ForTokenClassification"

    def __init__(self, model, num_labels, *, dropout: float = 0.1, **options):
        super().__init__(model, num_labels, **options)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout!r}")
        self.dropout = dropout
        self.classifier = self.new_layer(bias=True)

    def forward(self, ids, lengths=None):
        """ids -> logits (B, T, num_labels); those of padding mean nothing. Arguments and errors: `SequenceClassifier`."""
        states = self.model.encode(*self.batch(ids, lengths))
        return project(F.dropout(states, self.dropout, self.training), self.classifier)

    @staticmethod
    def settings(stored):
        given = (stored.get(key) for key in ("classifier_dropout", "hidden_dropout"))
        return {"dropout": next((value for value in given if value is not None), 0.1)}

    def entries(self):
        return super().entries() | {"classifier_dropout": self.dropout}
