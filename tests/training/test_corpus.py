"""Texts to train on: read in pieces, and tokenized as a whole would be."""

import random
import subprocess
import sys

import pytest
import torch
from texts import CORPUS, byte_fallback, byte_level
from training_runs import TEXT, TINY

from fastgpt.text.tokenizer import Tokenizer
from fastgpt.training import corpus
from fastgpt.training.trainer import Trainer


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"abc\xffdef", "text: expected UTF-8, .*text.txt has the byte 0xff at offset 3"),
        (b"x" * 70000 + "\u00e9".encode()[:1], "text: expected UTF-8, .*text.txt has the byte 0xc3 at offset 70,000"),
        (b"", "text: expected at least 20 tokens for a context of 16, got 0"),
        (b"\xef\xbb\xbf", "text: expected at least 20 tokens for a context of 16, got 0"),
        (None, "text: expected a file, .*text.txt is a folder"),
    ],
)
def test_files_that_are_not_text_raise(content, problem, tmp_path):
    path = tmp_path / "text.txt"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        Trainer(path, TINY)


def test_a_file_is_its_text(tmp_path):
    path = tmp_path / "text.txt"
    for text in (TEXT, TEXT.replace("\n", "\r\n"), "Zwölf Boxkämpfer 🙂\n" * 4000):
        path.write_bytes(text.encode())
        assert corpus.summarize(path) == corpus.summarize(path.read_text(encoding="utf-8"))
        trainer = Trainer(path, TINY)
        whole = torch.tensor(trainer.tokenizer.encode(path.read_text(encoding="utf-8")))
        assert torch.equal(torch.cat([trainer.train_tokens.long(), trainer.held_out]), whole)


@pytest.mark.slow
@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_tokenizing_in_windows_matches_tokenizing_the_whole_text(make, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 3000)
    monkeypatch.setattr(corpus, "OVERLAP", 1024)
    tokenizer, draw = Tokenizer(make()), random.Random(0)
    parts = [*CORPUS, "\n\n", "   ", "=" * 3000, "a" * 500, "<|eos|>", "\u00e9", "e\u0301", "🙂", " " * 2500, "1234", "\t"]
    for count in (0, 1, 30, 300):
        text = "".join(draw.choices(parts, [draw.random() ** 3 for _ in parts], k=count))
        assert corpus.tokenize(text, tokenizer).tolist() == tokenizer.encode(text)


MEASURE = """
import resource, sys
from pathlib import Path
from fastgpt.training.config import TrainConfig
from fastgpt.training.trainer import Trainer
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
config = TrainConfig(layers=1, heads=1, width=8, context=16, batch_size=2)
Trainer("a few words to begin with. " * 20, config).train_step()
before = peak()
Trainer(Path(sys.argv[1]), config).train_step()
print((peak() - before) / Path(sys.argv[1]).stat().st_size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is that of Linux")
def test_memory_for_a_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * (10_000_000 // len(TEXT)))
    result = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    assert float(result.stdout) <= 20  # bytes for each character
