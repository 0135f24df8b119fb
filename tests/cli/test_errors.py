"""Errors are one line that names the option."""

import argparse
import re

import pytest
import torch
from command_line import run
from models import random_model

from fastgpt.cli.main import error_message, parser

ERRORS = [
    (["generate", ""], "prompt: expected at least one token, got an empty prompt"),
    (["generate", "naïve"], "prompt: expected only the 65 characters .*, got 'ï'"),
    (
        ["generate", "A", "--max-new-tokens", "512"],
        "--max-new-tokens: expected at most 511 after a prompt of 1 .* of 512, got 512",
    ),
    (["generate", "A" * 600], "prompt: expected a prompt of at most 512 tokens, .*, got 600: shorten it, or .*--model"),
    (["inspect", "A" * 600], "prompt: expected a prompt of at most 512 tokens, .*, got 600: shorten it, or .*--model"),
    (["generate", "A", "--logprobs"], "logprobs: expected --json with it, got --logprobs alone"),
    (["generate", "A", "--stop", ""], r"stop: expected strings that are not empty, got \[''\]"),
    (["generate", "A", "--num-samples", "0"], "--num-samples: expected an integer >= 1, got 0"),
    (["generate", "A", "--temperature", "a"], "temperature: expected a number, got 'a'"),
    (["generate", "A", "--temperature", "nan"], "temperature: expected a finite number >= 0, got nan"),
    (["generate", "A", "--temperature", "inf"], "temperature: expected a finite number >= 0, got inf"),
    (["generate", "A", "--max-new-tokens", "-1"], "--max-new-tokens: expected an integer >= 0, got -1"),
    (["generate", "A", "--max-new-tokens", "1.5"], "max-new-tokens: expected an integer, got '1.5'"),
    (["generate", "A", "--max-new-tokens"], "max-new-tokens: expected one argument"),
    (["generate", "A", "--seed", "-1"], "seed: expected integers from 0 to .*, got -1"),
    (["generate", "A", "--cache", "ring"], "cache: invalid choice: 'ring'"),
    (["generate", "A", "--logit-bias", "5"], "logit-bias: expected a JSON object of token ids and numbers, .*, got '5'"),
    (["generate", "A", "--logit-bias", '{"a": 1}'], "logit-bias: expected a JSON object of token ids and numbers"),
    (["generate", "A", "--logit-bias", "[[1, 2]]"], "logit-bias: expected a JSON object of token ids and numbers"),
    (["generate", "A", "--logit-bias", '{"1": 1, "01": 2}'], "logit-bias: expected a JSON object of token ids and numbers"),
    (["generate", "A", "--logit-bias", "[" * 99999], "logit-bias: expected a JSON object of token ids and numbers"),
    (["generate", "A", "--logit-bias", '{"1": "a"}'], "--logit-bias: expected a finite number .*, got 'a'"),
    (["generate", "A", "--beams", "3"], r"unrecognized arguments: --beams 3 \(see fastgpt generate --help\)"),
    (
        ["generate", "--prompt", "A"],
        r"--prompt: expected PROMPT itself, which has no option, got --prompt \(see fastgpt generate --help\)",
    ),
    (["inspect", "--prompt=A", "A"], "--prompt: expected PROMPT itself, which has no option, got --prompt=A"),
    (["quantize", "--model", "/nowhere", "--out", "x"], "--model: expected MODEL itself, which has no option, got --model"),
    (["generate", "A", "--revision", "main"], "--revision: expected none for .*, which is a folder here"),
    (["train", "--text", "/nowhere", "--out", "x", "--stepz", "3"], r"--stepz 3 \(see fastgpt train --help\)"),
    (["generate", "A", "--no-cache", "--cache", "paged"], "--cache: expected none with --no-cache, got paged"),
    (["generate", "A", "--no-cache", "--cache-dtype", "int8"], "--cache-dtype: expected none with --no-cache, got int8"),
    (["generate", "abc\udcff"], "prompt: expected text in UTF-8, it has the byte 0xff at 3"),
    (["inspect", "abc\udcff"], "prompt: expected text in UTF-8, it has the byte 0xff at 3"),
    (["generate", "A", "--model", "/"], "--model: expected config.json in the checkpoint folder /"),
    (["train", "--text", "/nowhere", "--out", "x", "--learning-rate", "a"], "--learning-rate: expected a number, got 'a'"),
    (["train", "--text", "/nowhere", "--out", "x", "--steps", "1.5"], "--steps: expected an integer, got '1.5'"),
    (["train", "--text", "/nowhere", "--out", "x", "--accumulate", "a"], "--accumulate: expected an integer, got 'a'"),
    (["inspect", "A", "--layer", "1"], "--layer: expected --attention with it, got --layer alone"),
    (["inspect", "A", "--head", "0"], "--head: expected --attention with it, got --head alone"),
    (["inspect", "A", "--top", "0"], "top: expected an integer >= 1, got 0"),
    (["inspect"], "the following arguments are required: PROMPT"),
    (["bench", "--seconds", "nan"], "seconds: expected a finite number >= 0, got nan"),
    (["dance"], "invalid choice: 'dance'"),
    ([], "the following arguments are required: COMMAND"),
    (["generate", "A", "--chat"], "--chat: expected a --model with a chat template, the shipped model has none"),
    (["generate", "A", "--cache", "sliding"], "--window: expected a number of tokens for a sliding .* contiguous or paged"),
    (["generate", "A", "--top-p", "1.5"], "--top-p: expected a finite number <= 1 and > 0, got 1.5"),
    (["generate", "A", "--model", "/nowhere"], "expected a checkpoint folder, /nowhere does not exist"),
    (["generate", "A", "--device", "tpu9"], "device: expected cpu, cuda or cuda:N, got 'tpu9'"),
    (["bench", "--only", "nothing of this name"], "only: expected text in the name of a case, got 'nothing of this name'"),
    (["generate", "--model", ""], "model: expected a path, got an empty string"),
    (["generate", "--prompt-file", ""], "prompt-file: expected a path, got an empty string"),
    (["inspect", "A", "--attention", ""], "attention: expected a path, got an empty string"),
    (["train", "--text", "", "--out", "a new folder"], "text: expected a path, got an empty string"),
    (["train", "--text", "/nowhere", "--out", ""], "out: expected a path, got an empty string"),
    (["train", "--text", "/nowhere", "--out", "a\0b"], r"out: expected a folder, got 'a\\x00b': embedded null byte"),
    (["train", "--text", "/nowhere", "--out", "x" * 5000], "out: expected a folder, got 'x+': File name too long"),
    (
        ["train", "--text", "/nowhere", "--out", "a new folder", "--init-from", ""],
        "init-from: expected a path, got an empty string",
    ),
    (["train", "--text", "/nowhere", "--out", "a new folder"], "text: expected a file, /nowhere does not exist"),
    (["train", "--text", "/nowhere", "--out", "a new folder", "--lora", "4"], "lora: expected --init-from with it"),
    (["info", "/nowhere"], "model: expected a checkpoint folder or a GGUF file, /nowhere does not exist"),
]


@pytest.mark.parametrize("arguments, message", ERRORS, ids=[message[:30] for _, message in ERRORS])
def test_errors_are_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, error = run(capsys, *arguments)
    assert status == 2 and out == "" and error.startswith("fastgpt: error: ") and len(error.splitlines()) == 1
    assert re.search(message, error)


SAID = [
    ("top_p: expected a number or None, got 1.5", "--top-p: expected a number, got 1.5"),
    ("max_new_tokens: expected an integer >= 0 or None, got -1", "--max-new-tokens: expected an integer >= 0, got -1"),
    ("max_new_tokens: expected at most max_new_tokens or None", "--max-new-tokens: expected at most max_new_tokens or None"),
    ("model: expected a folder, got 'top_p or None, got'", "--model: expected a folder, got 'top_p or None, got'"),
    ("top_p: expected none with top_k=3, got 'top_k=3'", "--top-p: expected none with --top-k 3, got 'top_k=3'"),
    (
        "tokens: expected fewer: ignore_eos=True and stop='a b' help",
        "tokens: expected fewer: --ignore-eos and --stop 'a b' help",
    ),
    ("top_p: expected None for a model", "--top-p: expected none for a model"),
    ("top_p: expected Nonesuch", "--top-p: expected Nonesuch"),
    ("texts[2]: expected a text", "text 3: expected a text"),
    ("prompt: expected a text or None, got 3", None),
    ("layers: expected an integer or None, got 3", None),
    ("top_p expected a number or None, got 3", None),
    ("run: or None, got 3", None),
    ("", None),
]


@pytest.mark.parametrize("message, expected", SAID)
def test_arguments_are_named_as_they_are_typed(message, expected):
    """Those of this command; and nothing of what was given is changed."""
    options = parser().parse_args(["generate", "A", "--top-p", "1"])
    assert error_message(ValueError(message), options) == (message if expected is None else expected)
    if not message.startswith("texts"):
        assert error_message(ValueError(message), argparse.Namespace()) == message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(capsys):
    status, _, error = run(capsys, "generate", "A", "--device", "cuda")
    assert status == 2 and "device: expected one of this machine, got 'cuda', but" in error


def test_model_without_tokenizer(tmp_path, capsys):
    random_model().save_pretrained(tmp_path)
    status, _, error = run(capsys, "generate", "A", "--model", tmp_path)
    assert status == 2 and "tokenizer: expected the file" in error
