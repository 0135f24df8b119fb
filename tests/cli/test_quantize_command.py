"""`fastgpt quantize`: folders and GGUF files, perplexities, and nothing that is half-written."""

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from command_line import run
from texts import CORPUS, byte_level, write_checkpoint

from fastgpt import GPT, SHIPPED_MODEL, QuantizedWeight, pipeline
from fastgpt.checkpoints import gguf_writer
from fastgpt.training.evaluation import evaluate

TEXT = "\n".join(CORPUS) * 4


@pytest.fixture
def model(tmp_path):
    """A folder with a byte-level tokenizer, a chat template and defaults."""
    backend = byte_level()
    folder = write_checkpoint(
        tmp_path / "model", backend, tokenizer_config={"bos_token": "<|start|>", "eos_token": "<|eos|>", "chat_template": "{{ 1 }}"},
        generation_config={"eos_token_id": [0], "top_k": 5, "do_sample": True},
    )  # fmt: skip
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def packings(model):
    return {weight.packing[:3] for weight in model.parameters() if isinstance(weight, QuantizedWeight)}


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--weights", "int8"], {(8, 32, False)}),
        (["--weights", "int4"], {(8, 32, False), (4, 32, False)}),
        (["--weights", "int4", "--group-size", "64", "--minima"], {(8, 64, False), (4, 64, True)}),
        (["--weights", "int8", "--group-size", "row"], {(8, 64, False), (8, 256, False)}),
        (["--weights", "int8", "--minima"], {(8, 32, True)}),
    ],
)
def test_folders(options, expected, model, tmp_path, capsys):
    status, out, _ = run(capsys, "quantize", model, tmp_path / "out", *options)
    assert status == 0 and re.fullmatch(r".*/out: [\d,]+ parameters in [\d.]+ MB, before [\d.]+ MB\n", out)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    ours, theirs = pipeline(tmp_path / "out", device="cpu"), pipeline(model, device="cpu")
    assert packings(ours.model) == expected
    assert ours.model.generation_defaults == theirs.model.generation_defaults and ours.tokenizer.eos == theirs.tokenizer.eos
    assert ours.tokenizer.chat_template == "{{ 1 }}" and ours.tokenizer.special_tokens == theirs.tokenizer.special_tokens
    status, out, _ = run(capsys, "generate", "The dog", "--model", tmp_path / "out", "--max-new-tokens", "3", "--json")
    assert status == 0 and json.loads(out)["new_tokens"] <= 3


@pytest.mark.parametrize("kind, expected", [("q8_0", (8, 32, False)), ("q4_0", (4, 32, False)), ("q4_1", (4, 32, True))])
def test_gguf_files(kind, expected, model, tmp_path, capsys):
    pytest.importorskip("gguf")
    status, _, error = run(capsys, "quantize", model, tmp_path / "new" / "model.gguf", "--gguf", kind)
    assert (status, error) == (0, "") and [path.name for path in (tmp_path / "new").iterdir()] == ["model.gguf"]
    read, source = pipeline(tmp_path / "new" / "model.gguf", device="cpu"), pipeline(model, device="cpu")
    assert packings(read.model) == {(8, 32, False), expected}
    assert read.tokenizer.encode(TEXT) == source.tokenizer.encode(TEXT) and read.tokenizer.chat_template == "{{ 1 }}"
    # And from that file a folder, and another file.
    assert run(capsys, "quantize", tmp_path / "new" / "model.gguf", tmp_path / "folder", "--weights", "int8")[0] == 0
    folder = pipeline(tmp_path / "folder", device="cpu")
    assert folder.tokenizer.encode(TEXT) == source.tokenizer.encode(TEXT) and folder.tokenizer.eos == read.tokenizer.eos
    assert run(capsys, "quantize", tmp_path / "new" / "model.gguf", tmp_path / "again.gguf", "--gguf", kind)[0] == 0
    again = GPT.from_pretrained(tmp_path / "again.gguf")
    for one, other in zip(read.model.parameters(), again.parameters(), strict=True):
        assert type(one) is type(other)
        one, other = (x.dequantize() if isinstance(x, QuantizedWeight) else x for x in (one, other))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * one.abs().amax().item())  # scales are fitted again


def test_perplexities(model, text, tmp_path, capsys):
    command = ["quantize", model, tmp_path / "out", "--weights", "int4", "--evaluate", text]
    status, out, error = run(capsys, *command, "--json")
    result = json.loads(out)
    count = len(pipeline(model, device="cpu").tokenizer.encode(TEXT))
    assert error == "".join(f"fastgpt: perplexity {when}, of {count:,} tokens\n" for when in ("before", "after"))
    assert status == 0 and result["evaluated_tokens"] == count
    assert result["weights"] == "int4" and result["group_size"] == 32 and not result["minima"]
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    for name, folder in (("before", model), ("after", tmp_path / "out")):
        pipe = pipeline(folder, device="cpu")
        tokens = torch.tensor(pipe.tokenizer.encode(TEXT))
        context = pipe.model.config.context_length
        assert len(tokens) > context
        expected = math.exp(evaluate(pipe.model, tokens, context=context, overlap=context // 2))
        assert result[f"perplexity_{name}"] == pytest.approx(expected, rel=1e-6)
    command[2] = tmp_path / "other"
    status, out, _ = run(capsys, *command, "--evaluate-tokens", 20)
    assert re.search(r"\nperplexity of 20 tokens: [\d.]+ before, [\d.]+ after \([+-][\d.]+%\)\n$", out)


def test_what_is_quantized_already(model, tmp_path, capsys):
    """Is quantized again, which is noted once."""
    pytest.importorskip("gguf")
    assert run(capsys, "quantize", model, tmp_path / "folder", "--weights", "int8")[2] == ""
    assert run(capsys, "quantize", model, tmp_path / "file.gguf", "--gguf", "q8_0")[2] == ""
    for source in ("folder", "file.gguf"):
        status, out, error = run(capsys, "quantize", tmp_path / source, tmp_path / f"{source}-again", "--weights", "int4")
        assert (
            status == 0
            and error == f"fastgpt: {tmp_path / source} is quantized already: quantizing it again adds to its error\n"
        )


ERRORS = [
    ([], "--weights: expected int8 or int4, or --gguf with a type, got neither"),
    (["--gguf", "q4_0", "--weights", "int8"], "--weights: expected int4, as q4_0 is, got int8"),
    (["--gguf", "q4_0", "--minima"], "--minima: expected none with --gguf q4_0, got some: q4_1 has minima"),
    (["--gguf", "q4_0", "--group-size", "64"], "--group-size: expected 32, as in all types of --gguf, got 64"),
    (["--weights", "int2"], "--weights: invalid choice: 'int2'"),
    (["--weights", "int8", "--group-size", "16"], "--group-size: invalid choice: '16'"),
    (["--weights", "int8", "--evaluate", "/nowhere"], "--evaluate: expected a file, /nowhere does not exist"),
    (["--weights", "int8", "--evaluate-tokens", "9"], "--evaluate-tokens: expected --evaluate with it, got 9 alone"),
    (["--weights", "int8", "--evaluate", "/", "--evaluate-tokens", "1"], "--evaluate-tokens: expected an integer >= 2, got 1"),
    (["--weights", "int8", "--evaluate", "/"], "--evaluate: expected a file with text in UTF-8, got /"),
]


@pytest.mark.parametrize("options, message", ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors(options, message, tmp_path, capsys):
    status, out, error = run(capsys, "quantize", SHIPPED_MODEL, tmp_path / "out", *options)
    assert status == 2 and out == "" and error.startswith(f"fastgpt: error: {message}") and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_is_asked_for_by_its_type(tmp_path, capsys, monkeypatch):
    status, _, error = run(capsys, "quantize", SHIPPED_MODEL, tmp_path / "out.gguf", "--weights", "int8")
    message = f"fastgpt: error: out: expected a folder, or --gguf with a type for a GGUF file, got {tmp_path / 'out.gguf'}\n"
    assert (status, error) == (2, message)
    monkeypatch.setitem(sys.modules, "gguf", None)
    status, _, error = run(capsys, "quantize", tmp_path / "no model", tmp_path / "out", "--gguf", "q4_0")
    assert status == 2 and error.startswith("fastgpt: error: --gguf: expected the package gguf, which writes GGUF files")


def test_places_that_are_taken(model, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    for out in (model, tmp_path / "link", tmp_path / "file", tmp_path):
        status, _, error = run(capsys, "quantize", model, out, "--weights", "int8")
        assert status == 2 and error == f"fastgpt: error: out: expected a path that does not exist, {out} does\n"
    for out, message in ((tmp_path / "file" / "x", "File exists"), ("a\0b", "a path, got"), ("x" * 5000, "too long")):
        status, _, error = run(capsys, "quantize", model, out, "--weights", "int8")
        assert status == 2 and "out: expected a" in error and message in error
    for source, message in (("/nowhere", "expected a checkpoint folder"), (tmp_path / "file", "expected a checkpoint folder")):
        status, _, error = run(capsys, "quantize", source, tmp_path / "out", "--weights", "int8")
        assert status == 2 and message in error
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_gguf_files_cannot_hold(tmp_path, capsys):
    status, _, error = run(capsys, "quantize", SHIPPED_MODEL, tmp_path / "model.gguf", "--gguf", "q8_0")
    assert status == 2 and "tokenizer: expected BPE" in error and not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(model, tmp_path, capsys, monkeypatch):
    before = sorted(tmp_path.rglob("*"))

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    for target, options in (("fastgpt.cli.quantize.copy_companions", ["--weights", "int8"]), ("", ["--gguf", "q8_0"])):
        with monkeypatch.context() as patch:
            patch.setattr(target, full) if target else patch.setattr(gguf_writer, "write", full)
            status, _, error = run(capsys, "quantize", model, tmp_path / "a" / "out", *options)
        assert status == 2 and error == f"fastgpt: error: out: No space left on device for {tmp_path / 'a' / 'out'}\n"
        assert sorted(tmp_path.rglob("*")) == before


WAITS = """
import sys, time
from fastgpt.cli import quantize
from fastgpt.cli.main import main

def wait(*args):
    print("waits", flush=True)
    time.sleep(600)

quantize.copy_companions = wait
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(model, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    # A shell's background job ignores SIGINT, and so would its children.
    heed_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-c", WAITS, "quantize", str(model), str(tmp_path / "out"), "--weights", "int8"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts)
    assert process.stdout.readline() == b"waits\n"
    assert sorted(tmp_path.rglob("*")) != before and not os.path.exists(tmp_path / "out")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 130 and error.strip() == b"fastgpt: interrupted"
    assert sorted(tmp_path.rglob("*")) == before
