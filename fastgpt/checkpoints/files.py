"""The files of a checkpoint folder: their names, and errors that say which one is wrong."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fastgpt import schema

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
GENERATION_CONFIG = "generation_config.json"
STATE = "training_state.pt"  # of the run that a folder is of


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError that names it."""
    try:
        return schema.read_json(path)
    except ValueError as error:
        raise ValueError(f"model: {error}") from None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors about what a file says name it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {path}: {error}") from None
