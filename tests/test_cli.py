"""The command line, run as a user runs it."""

import functools
import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
import torch
from models import random_model

import fastgpt
from fastgpt.cli import main

TOKENS = ["--max-new-tokens", "40"]


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of a command."""
    try:
        main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate_continues_the_prompt(capsys):
    status, out, _ = run(capsys, "generate", "ROMEO:", *TOKENS)
    assert status == 0 and out.startswith("ROMEO:") and len(out) == len("ROMEO:") + 40 + 1


def test_the_default_is_the_shipped_model_and_a_default_prompt(capsys):
    status, out, _ = run(capsys, "generate")
    assert status == 0 and len(out) == 1 + 300 + 1


def test_sampling_options(capsys):
    options = ["--temperature", 0.8, "--top-k", 30, "--top-p", 0.9]
    texts = [run(capsys, "generate", "A", *TOKENS, *options, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_compare_cache(capsys):
    status, out, _ = run(capsys, "generate", "A", *TOKENS, "--compare-cache")
    lines = out.splitlines()[-4:]
    assert status == 0
    assert [line.split(":")[0] for line in lines] == ["cached", "uncached", "speed-up", "tokens"]
    assert lines[0].endswith(" tok/s") and lines[2].endswith("x") and lines[3] == "tokens: the same with and without the cache"


def test_json(capsys):
    report = json.loads(run(capsys, "generate", "A", *TOKENS, "--json")[1])
    assert sorted(report) == sorted(
        "text prompt_tokens new_tokens prefill_seconds decode_seconds decode_tokens_per_second device dtype "
        "implementation".split()
    )
    assert report["text"].startswith("A") and len(report["text"]) == 41
    assert (report["prompt_tokens"], report["new_tokens"]) == (1, 40)
    assert report["decode_tokens_per_second"] == pytest.approx(39 / report["decode_seconds"])
    assert (report["device"], report["dtype"]) == ("cuda" if torch.cuda.is_available() else "cpu", "float32")


def test_json_with_comparison(capsys):
    report = json.loads(run(capsys, "generate", "A", *TOKENS, "--json", "--compare-cache", "--dtype", "float32")[1])
    assert report["tokens_agree"] is True
    speed_up = report["decode_tokens_per_second"] / report["uncached_tokens_per_second"]
    assert report["speed_up"] == pytest.approx(speed_up)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_speed_without_decoding(tokens, capsys):
    status, out, _ = run(capsys, "generate", "A", "--max-new-tokens", tokens, "--json", "--compare-cache")
    report = json.loads(out)
    assert status == 0 and report["new_tokens"] == tokens and report["decode_tokens_per_second"] is None
    assert run(capsys, "generate", "A", "--max-new-tokens", tokens, "--compare-cache")[0] == 0


def test_no_cache_and_dtype(capsys):
    with_cache, without = (run(capsys, "generate", "A", *TOKENS, *more)[1] for more in ([], ["--no-cache"]))
    assert with_cache == without
    report = json.loads(run(capsys, "generate", "A", *TOKENS, "--dtype", "bfloat16", "--json")[1])
    assert report["dtype"] == "bfloat16"


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert f"fastgpt {fastgpt.__version__}" in out and f"torch {torch.__version__}" in out
    assert "attention on cpu: cpp" in out and "not triton: it runs on CUDA tensors" in out
    assert "kv_cache_update on cpu: cpp" in out


def test_text_streams_as_it_comes():
    """Through a terminal: the first characters are there long before the last."""
    reader, writer = pty.openpty()
    command = [sys.executable, "-m", "fastgpt", "generate", "ROMEO:", "--max-new-tokens", "500", "--no-cache"]
    # A shell's background job ignores SIGINT, and so would its children.
    heed_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, preexec_fn=heed_interrupts)
    os.close(writer)
    first = b""
    while len(first) < 10:
        first += os.read(reader, 10)
    assert first.startswith(b"ROMEO:") and process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.strip() == b"fastgpt: interrupted"
    os.close(reader)


def test_a_reader_that_leaves_early():
    command = [sys.executable, "-m", "fastgpt", "generate", "A", "--max-new-tokens", "400"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1) == b"A"
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and process.stderr.read() == b""


ERRORS = [
    (["generate", ""], "prompt: expected at least one character, got an empty prompt"),
    (["generate", "naïve"], "text: expected only the 65 characters .*, got 'ï'"),
    (["generate", "A", "--max-new-tokens", "512"], "context of 512 tokens, got 1 . 512"),
    (["generate", "A" * 600], "context of 512 tokens, got 600 . 300"),
    (["generate", "A", "--top-p", "1.5"], "top_p: expected 0 < top_p <= 1 or None, got 1.5"),
    (["generate", "A", "--model", "/nowhere"], "expected a checkpoint folder, /nowhere does not exist"),
    (["generate", "A", "--device", "tpu9"], "device: expected cpu, cuda or cuda:N, got 'tpu9'"),
    (["bench", "--only", "nothing of this name"], "only: expected a part of what can be measured, 'nothing of this name' is"),
    (["train", "--text", "/nowhere", "--out", "/tmp/x"], "text: expected a file, /nowhere does not exist"),
]


@pytest.mark.parametrize("arguments, message", ERRORS, ids=[message[:30] for _, message in ERRORS])
def test_errors_are_one_line(arguments, message, capsys):
    status, out, error = run(capsys, *arguments)
    assert status == 2 and out == "" and error.startswith("fastgpt: error: ") and len(error.splitlines()) == 1
    assert re.search(message, error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(capsys):
    status, _, error = run(capsys, "generate", "A", "--device", "cuda")
    assert status == 2 and "device: expected one of this machine, got 'cuda', but" in error


def test_model_without_tokenizer(tmp_path, capsys):
    random_model().save_pretrained(tmp_path)
    status, _, error = run(capsys, "generate", "A", "--model", tmp_path)
    assert status == 2 and "tokenizer: expected the file" in error


def test_text_too_short_to_train_on(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("too short")
    status, _, error = run(capsys, "train", "--text", tmp_path / "text.txt", "--out", tmp_path / "run")
    assert status == 2 and "text: expected at least 285 tokens for a context of 256, got 9" in error
    assert not (tmp_path / "run").exists()


def test_help_and_module(capsys):
    result = subprocess.run([sys.executable, "-m", "fastgpt", "--help"], capture_output=True, text=True, check=True)
    assert all(command in result.stdout for command in ("generate", "train", "bench", "info"))
    assert run(capsys, "train", "--help")[0] == 0
    assert run(capsys)[0] == 2
