"""The draft model of commands that generate."""

import argparse
import re

import torch

from fastgpt.cli.arguments import DTYPES
from fastgpt.generation.pipeline import pipeline
from fastgpt.model.decoder import GPT


def draft_model(options: argparse.Namespace, model: GPT, device: torch.device) -> GPT:
    """The model of --draft. Raises ValueError, OSError, naming it, unless it fits the one that it drafts for."""
    try:
        draft = pipeline(options.draft, dtype=DTYPES.get(options.dtype), device=device, decoder_only=True).model
    except (ValueError, OSError) as error:
        raise type(error)(re.sub("^model:", "draft:", str(error))) from error
    if draft.config.vocab_size != (size := model.config.vocab_size):
        raise ValueError(
            f"draft: expected a model with the vocabulary of {size:,} tokens, got one of {draft.config.vocab_size:,}"
        )
    return draft
