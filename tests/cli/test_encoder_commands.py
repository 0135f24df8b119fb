"""`fastgpt embed` and `fastgpt fill`."""

import json
import re

import numpy as np
import pytest
import torch
from command_line import run
from encoder_checkpoints import TEXTS, sentence_model

import fastgpt


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sentence_model(tmp_path_factory.mktemp("model"))


def test_embed(model, tmp_path, capsys):
    texts = [text for text in TEXTS if text]
    expected = fastgpt.embed(texts, model)
    status, out, error = run(capsys, "embed", *texts, "--model", model, "--device", "cpu")
    assert (status, error) == (0, "")
    assert torch.equal(torch.tensor([json.loads(line) for line in out.splitlines()]), expected)
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    arguments = "--texts", tmp_path / "texts.txt", "--out", tmp_path / "out.npy", "--batch-tokens", 9, "--dtype", "float32"
    status, out, _ = run(capsys, "embed", *arguments, "--model", model)
    assert (status, out) == (0, "")
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), expected)


def test_fill(model, capsys):
    expected = fastgpt.pipeline(model).fill("the [MASK].", 3)
    status, out, _ = run(capsys, "fill", "the [MASK].", "--model", model, "--top-k", 3)
    assert status == 0 and [line.split("%  ")[1] for line in out.splitlines()] == [filling.filled for filling in expected]
    status, out, _ = run(capsys, "fill", "the [MASK].", "--model", model, "--top-k", 3, "--json")
    assert [entry["token"] for entry in json.loads(out)] == [filling.token for filling in expected]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["embed", "the " * 50], r"texts\[0\]: expected at most 40 tokens, got 52"),
        (["fill", "the dog"], r"texts\[0\]: expected a text with the token"),
        (["generate", "the dog"], "model_type: expected a decoder, got 'bert', which fastgpt.Encoder loads"),
        (["inspect", "the dog"], "model_type: expected a decoder, got 'bert'"),
    ],
)
def test_errors(arguments, message, model, capsys):
    status, out, error = run(capsys, *arguments, "--model", model)
    assert status == 2 and out == "" and error.startswith("fastgpt: error: ")
    assert re.search(message, error), error
