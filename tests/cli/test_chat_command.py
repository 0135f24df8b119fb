"""`fastgpt chat`, line by line from a pipe, and in a terminal."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys

import pytest
from command_line import run
from texts import CHATML, byte_level, write_checkpoint

from fastgpt import SHIPPED_MODEL


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    backend = byte_level()
    config = {"chat_template": CHATML, "eos_token": "<|end|>"}
    return write_checkpoint(tmp_path_factory.mktemp("chat") / "model", backend, tokenizer_config=config)


def chat(capsys, monkeypatch, model, lines, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return run(capsys, "chat", "--model", model, "--max-new-tokens", 6, *options)


def test_each_line_of_a_pipe_is_a_turn(capsys, monkeypatch, model, tmp_path):
    path = tmp_path / "chat.json"
    lines = ["the fox", "", "the dog", "/undo", "token", f"/save {path}", "/save", "/nothing", "/help", "/exit", "not read"]
    status, out, err = chat(capsys, monkeypatch, model, lines, "--system", "Words", "--speculate")
    assert status == 0 and err.count("tokens a pass") == 3 and err.count("read ") == 3
    messages = json.loads(path.read_text())
    assert [message["content"] for message in messages if message["role"] != "assistant"] == ["Words", "the fox", "token"]
    assert all(message["content"] in out for message in messages if message["role"] == "assistant")
    for said in (
        "(took back the last turn)",
        "(wrote 5 messages to ",
        "(/save FILE: expected",
        "(/nothing: expected",
        "/reset  ",
    ):
        assert said in err


def test_a_conversation_goes_on_from_a_file(capsys, monkeypatch, model, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    _, _, err = chat(capsys, monkeypatch, model, ["the fox", "/save ~/a.json"], "--system", "Words")
    assert "(wrote 3 messages to ~/a.json)" in err
    lines = ["/load ~/a.json", "the dog", "/load nowhere", "/load", "/save ~/b.json"]
    status, _, err = chat(capsys, monkeypatch, model, lines)
    messages, more = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert status == 0 and more[:3] == messages and len(more) == 5
    assert "(read 3 messages from ~/a.json)" in err and "(/load FILE: expected a file of messages, nowhere cannot be" in err
    assert "(/load FILE: expected the name of a file)" in err


def test_messages_may_begin_with_a_slash(capsys, monkeypatch, model, tmp_path):
    chat(capsys, monkeypatch, model, ["//fox", "///", f"/save {tmp_path / 'a'}"])
    messages = json.loads((tmp_path / "a").read_text())
    assert [message["content"] for message in messages if message["role"] == "user"] == ["/fox", "//"]


def test_variables_reach_the_template(capsys, monkeypatch, tmp_path):
    template = "{% if brief %}the fox{% endif %}" + CHATML
    model = write_checkpoint(tmp_path / "model", byte_level(), tokenizer_config={"chat_template": template})
    counts = []
    for options in ([], ["--template-var", "brief=true"]):
        _, _, err = chat(capsys, monkeypatch, model, ["a"], *options)
        counts.append(int(err.split("read ")[1].split(",")[0]))
    assert counts[0] < counts[1]
    status, out, err = chat(capsys, monkeypatch, model, ["a"], "--template-var", "breif=true")
    assert (
        status == 2 and not out and "--template-var: expected variables that the model's chat template reads, got breif" in err
    )


def test_the_oldest_turns_are_dropped_and_that_is_said(capsys, monkeypatch, model):
    status, _, err = chat(capsys, monkeypatch, model, ["the quick brown fox jumps over the lazy dog"] * 5 + ["x " * 200])
    assert status == 0 and "(the context is full: dropped the oldest 2 messages)" in err
    assert "(text: expected fewer than 160 tokens" in err


def test_a_draft_model(capsys, monkeypatch, model):
    plain = chat(capsys, monkeypatch, model, ["the fox", "dog"])
    assert chat(capsys, monkeypatch, model, ["the fox", "dog"], "--draft", model)[:2] == plain[:2]


def test_bad_input_is_one_line(capsys, monkeypatch, model):
    for options, message in (
        (["--speculate-tokens", 3], "expected --speculate or --draft with it"),
        (["--speculate", "--draft", model], "expected --speculate or --draft, got both"),
        (["--top-k", 0], "--top-k: expected"),
        (["--max-new-tokens", 0], "--max-new-tokens: expected"),
        (["--draft", "nowhere"], "--draft: expected a checkpoint folder"),
        (["--draft", SHIPPED_MODEL], "--draft: expected a model with the vocabulary of "),
        (["--stop", ""], "--stop: expected"),
    ):
        status, out, err = chat(capsys, monkeypatch, model, ["a"], *options)
        assert status == 2 and not out and message in err and err.count("\n") == 1
    status, _, err = chat(capsys, monkeypatch, model, ["the fox", "a\udcff"])
    assert status == 2 and err.endswith("fastgpt: error: standard input: expected UTF-8, got other bytes in line 2\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
    status, _, err = run(capsys, "chat")
    assert status == 2 and err == "fastgpt: error: the following arguments are required: --model (see fastgpt chat --help)\n"
    status, _, err = run(capsys, "chat", "--model", SHIPPED_MODEL)
    assert status == 2 and "--model: expected one with a chat template, made for chats; " in err and err.endswith(" has none\n")


@pytest.mark.slow
def test_an_interrupt_ends_the_answer_and_not_the_program(model):
    reader, writer = pty.openpty()
    code = """
import itertools, sys, time
from fastgpt.cli.main import main
from fastgpt.generation import sampling

steps, sample = itertools.count(), sampling.Sampler.__call__

def slow(sampler, logits):
    time.sleep(0.05)
    return sample(sampler, logits)

sampling.Sampler.__call__ = slow
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, "chat", "--model", str(model)]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, stdin=writer, stdout=writer, stderr=writer, preexec_fn=heed)
    os.close(writer)
    seen = b""

    def wait_for(text):
        nonlocal seen
        while text not in seen:
            assert select.select([reader], [], [], 300)[0], f"only {seen!r}"
            seen += os.read(reader, 1000)
        seen = seen[seen.index(text) + len(text) :]

    wait_for(b"> ")
    os.write(reader, b"the fox\n")
    wait_for(b"the fox\r\n")
    while len(seen) < 5:
        seen += os.read(reader, 100)
    process.send_signal(signal.SIGINT)
    wait_for(b"stopped)")
    wait_for(b"> ")
    os.write(reader, b"/exit\n")
    assert process.wait(300) == 0
    os.close(reader)
