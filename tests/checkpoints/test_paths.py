"""Paths of checkpoints and tokenizers in Python."""

import pytest
from models import random_model

import fastgpt
from fastgpt.text.tokenizer import Tokenizer


@pytest.mark.parametrize("call", [
    fastgpt.GPT.from_pretrained, fastgpt.pipeline, random_model().save_pretrained, Tokenizer.load, Tokenizer.from_folder,
    Tokenizer.from_corpus("ab").save,
])  # fmt: skip
@pytest.mark.parametrize("path, error", [("", ValueError), (None, TypeError), (3, TypeError)])
def test_paths_in_python(call, path, error, tmp_path, monkeypatch):
    """An empty one is not the current directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match="(model|folder|tokenizer|path): expected a path, got"):
        call(path)
    assert not list(tmp_path.iterdir())
