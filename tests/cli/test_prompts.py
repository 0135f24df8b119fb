"""Prompts from the command line, files and standard input."""

import io
import json
import re
import subprocess
import sys

import pytest
from command_line import TOKENS, run

import fastgpt
from fastgpt import SHIPPED_MODEL


def generated(prompt):
    return prompt + fastgpt.pipeline(SHIPPED_MODEL)(prompt, 40) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["-"]], ids=str)
def test_prompts_from_standard_input(arguments):
    command = [sys.executable, "-m", "fastgpt", "generate", *arguments, *TOKENS]
    result = subprocess.run(command, input=b"But hark!\n", capture_output=True, check=True)
    assert result.stdout.decode() == generated("But hark!")


@pytest.mark.slow
def test_standard_input_is_read_only_where_it_is_asked_for(capsys, monkeypatch):
    for given, prompt in (("A", "A"), (None, "hark\n")):
        monkeypatch.setattr("sys.stdin", io.StringIO("hark\n\n"))
        _, out, _ = run(capsys, "generate", *([given] if given else []), *TOKENS)
        assert out == generated(prompt)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run(capsys, "generate", *TOKENS)[1] == generated("\n")
    status, _, error = run(capsys, "generate", "-", *TOKENS)
    assert status == 2 and "prompt: expected at least one token, got an empty prompt" in error
    status, _, error = run(capsys, "generate", "-", "-", *TOKENS)
    assert status == 2 and "prompt: expected - once" in error
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abc\xff")))
    status, _, error = run(capsys, "generate", "-", *TOKENS)
    assert status == 2 and "prompt: expected text in UTF-8, standard input has the byte 0xff at 3" in error
    monkeypatch.setattr("sys.stdin", io.StringIO("hark\n"))
    assert json.loads(run(capsys, "inspect", "-", "--json")[1])["tokens"][-1]["text"] == "k"


@pytest.mark.parametrize(
    "content, prompt",
    [
        (b"Hark", "Hark"), (b"Hark\n", "Hark"), (b"Hark\r\n", "Hark"), (b"Hark\n\n", "Hark\n"), (b"\n", "\n"),
        (b"\xef\xbb\xbfHark", "Hark"), (b"Ha\r\nrk\r\n\r\n", "Ha\nrk\n"), (b"Ha\rrk\r", "Ha\nrk"),
    ],
    ids=str,
)  # fmt: skip
def test_a_prompt_from_a_file(content, prompt, tmp_path, capsys):
    (tmp_path / "prompt").write_bytes(content)
    assert run(capsys, "generate", "--prompt-file", tmp_path / "prompt", *TOKENS)[1] == generated(prompt)


@pytest.mark.slow
def test_several_prompts(tmp_path, capsys):
    (tmp_path / "prompt").write_text("ROMEO:\n")
    flags = [*TOKENS, "--prompt-file", tmp_path / "prompt"]
    _, out, _ = run(capsys, "generate", "A", "B", *flags)
    texts = [generated(prompt)[:-1] for prompt in ("A", "B", "ROMEO:")]
    numbered = enumerate(zip(("A", "B", "ROMEO:"), texts), 1)
    assert out == "\n".join(f"--- {number} of 3: {prompt!r}\n{text}\n" for number, (prompt, text) in numbered)
    report = json.loads(run(capsys, "generate", "A", "B", *flags, "--json", "--num-samples", 2)[1])
    assert [sample["text"] for sample in report["samples"]] == [text for text in texts for _ in range(2)]
    assert report["prompt_tokens"] == 1 + 1 + 6 and report["new_tokens"] == 6 * 40


def test_headings_are_one_short_line(capsys):
    prompts = ["A\nB", "A" * 40, "A" * 41]
    _, out, _ = run(capsys, "generate", *prompts, "--max-new-tokens", 0)
    shown = [r"'A\nB'", repr("A" * 40), repr("A" * 39 + "…")]
    assert re.findall("^--- .*$", out, re.MULTILINE) == [f"--- {i} of 3: {prompt}" for i, prompt in enumerate(shown, 1)]
    assert all(f"\n{prompt}\n" in out for prompt in prompts)


BAD_FILES = [
    (b"", "--prompt-file: expected at least one character, .*prompt is empty"),
    (b"caf\xe9", "--prompt-file: expected text in UTF-8, .*prompt has the byte 0xe9 at 3"),
    (None, "--prompt-file: expected a file to read, got .*prompt: No such file or directory"),
    ("folder", "--prompt-file: expected a file to read, got .*prompt: Is a directory"),
]


@pytest.mark.parametrize("content, message", BAD_FILES, ids=[message[:40] for _, message in BAD_FILES])
def test_bad_prompt_files(content, message, tmp_path, capsys):
    path = tmp_path / "prompt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    status, out, error = run(capsys, "generate", "--prompt-file", path)
    assert status == 2 and out == "" and len(error.splitlines()) == 1 and re.search(message, error)
