"""The command line, run as a user runs it."""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models import random_model
from texts import CHATML, byte_level, write_checkpoint

import fastgpt
from fastgpt import cli, startup
from fastgpt.checkpoints import transformers_format
from fastgpt.cli import SHIPPED_MODEL, main
from fastgpt.ops import explain
from fastgpt.text.tokenizer import Tokenizer
from fastgpt.training.processes import Processes

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


@pytest.mark.slow
def test_the_default_is_the_shipped_model_and_a_default_prompt(capsys):
    status, out, _ = run(capsys, "generate")
    assert status == 0 and len(out) == 1 + 300 + 1


def test_sampling_options(capsys):
    options = ["--temperature", 0.8, "--top-k", 30, "--top-p", 0.9]
    texts = [run(capsys, "generate", "A", *TOKENS, *options, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_options_are_those_of_generate(capsys):
    """All at once, beside the same from Python."""
    flags = "--temperature 1.3 --top-k 30 --top-p 0.9 --min-p 0.02 --repetition-penalty 1.2 --seed 5".split()
    options = {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 5}
    report = json.loads(run(capsys, "generate", "A", *TOKENS, *flags, "--json")[1])
    assert report["text"] == "A" + fastgpt.pipeline(SHIPPED_MODEL)("A", 40, **options) and report["seed"] == 5


def test_samples(capsys):
    flags = [*TOKENS, "--num-samples", 3, "--temperature", 1, "--seed", 2]
    status, out, _ = run(capsys, "generate", "ROMEO:", *flags)
    report = json.loads(run(capsys, "generate", "ROMEO:", *flags, "--json")[1])
    assert status == 0 and len(report["samples"]) == 3 and report["new_tokens"] == 120 and "text" not in report
    texts = [sample["text"] for sample in report["samples"]]
    assert len(set(texts)) == 3 and all(text.startswith("ROMEO:") and len(text) == 46 for text in texts)
    assert out == "\n".join(f"--- {number} of 3: 'ROMEO:'\n{text}\n" for number, text in enumerate(texts, 1))
    assert report["decode_tokens_per_second"] == pytest.approx(117 / report["decode_seconds"])


def test_stop_strings(capsys):
    free = json.loads(run(capsys, "generate", "ROMEO:", *TOKENS, "--json")[1])["text"]
    stop = free[20:24]
    end = free.index(stop, len("ROMEO:"))
    status, out, _ = run(capsys, "generate", "ROMEO:", *TOKENS, "--stop", "never met", "--stop", stop)
    assert status == 0 and out == free[:end] + "\n"
    report = json.loads(run(capsys, "generate", "ROMEO:", *TOKENS, "--stop", stop, "--json", "--compare-cache")[1])
    assert (report["text"], report["finish_reason"], report["tokens_agree"]) == (free[:end], "stop", True)


def test_logprobs(capsys):
    report = json.loads(run(capsys, "generate", "A", *TOKENS, "--json", "--logprobs")[1])
    assert len(report["tokens"]) == 40 and "".join(token["token"] for token in report["tokens"]) == report["text"][1:]
    assert all(token["logprob"] < 0 and isinstance(token["id"], int) for token in report["tokens"])


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A folder with a chat template, where two in three tokens end a text."""
    eos = [token for token in range(400) if token % 3 < 2]
    config = {"tokenizer_config": {"chat_template": CHATML}, "generation_config": {"eos_token_id": eos}}
    return write_checkpoint(tmp_path_factory.mktemp("chat"), byte_level(), **config)


def test_variables_of_the_chat_template(tmp_path, capsys):
    template = "{{ messages[0].content }}{{ '!' if enable_thinking is false }}{{ style }}{{ tools[0].name if tools }}"
    folder = write_checkpoint(tmp_path, byte_level(), tokenizer_config={"chat_template": template})
    arguments = ["generate", "the dog", "--model", folder, *TOKENS, "--json"]
    flags = [
        "--template-var",
        "enable_thinking=false",
        "--template-var",
        "style=a=b",
        "--template-var",
        'tools=[{"name": "f"}]',
    ]
    status, out, err = run(capsys, *arguments, "--chat", *flags)
    assert status == 0, err
    assert json.loads(out)["text"] == fastgpt.pipeline(folder)("the dog!a=bf", 40)
    for wrong in (["--template-var", "x=1"], ["--chat", "--template-var", "x"], ["--chat", "--template-var", "=1"]):
        status, _, err = run(capsys, *arguments, *wrong)
        assert status == 2 and "template-var: expected " in err


def test_chats_and_ends(chat_model, capsys):
    arguments = ["generate", "Who is lazy?", "--model", chat_model, *TOKENS, "--json", "--chat"]
    report = json.loads(run(capsys, *arguments, "--logprobs")[1])
    assert report["finish_reason"] == "eos" and report["new_tokens"] < 40 and report["prompt_tokens"] > 20
    assert report["tokens"][-1]["id"] % 3 < 2 and all(token["id"] % 3 == 2 for token in report["tokens"][:-1])
    endless = json.loads(run(capsys, *arguments, "--ignore-eos")[1])
    assert endless["finish_reason"] == "length" and endless["new_tokens"] == 40
    assert endless["text"] == fastgpt.pipeline(chat_model).chat("Who is lazy?", 40, eos=None)
    _, out, _ = run(capsys, *arguments[:-2], "--chat", "--ignore-eos")
    assert out == endless["text"] + "\n"


def test_compare_cache(capsys):
    status, out, _ = run(capsys, "generate", "A", *TOKENS, "--compare-cache")
    lines = out.splitlines()[-4:]
    assert status == 0
    assert [line.split(":")[0] for line in lines] == ["cached", "uncached", "speed-up", "tokens"]
    assert lines[0].endswith(" tok/s") and lines[2].endswith("x") and lines[3] == "tokens: the same with and without the cache"


def test_json(capsys):
    report = json.loads(run(capsys, "generate", "A", *TOKENS, "--json")[1])
    assert sorted(report) == sorted(
        "text finish_reason prompt_tokens new_tokens prefill_seconds decode_seconds decode_tokens_per_second seed device "
        "dtype implementation".split()
    )
    assert report["text"].startswith("A") and len(report["text"]) == 41 and report["finish_reason"] == "length"
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


@pytest.mark.slow
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
    assert "attention_with_kv_cache on cpu: unfused" in out


def test_info_tells_of_all_that_can_be_explained(capsys):
    """And what each name of an implementation means."""
    assert cli.OPERATIONS.keys() == explain.OPERATIONS.keys()
    _, out, _ = run(capsys, "info")
    for operation, meaning in cli.OPERATIONS.items():
        assert re.search(rf"^{operation.__qualname__} on cpu: \w+\n    {meaning}\n    not \w+: ", out, re.MULTILINE)
    calls, _, meanings = out.partition("\n\n")[2].rpartition("\n\n")
    named = re.findall(r"^(?:\S+ on cpu: |    not )(\w+)", calls, re.MULTILINE)
    assert set(named) == {line.partition(": ")[0] for line in meanings.splitlines()}


STOPS_HALFWAY = """
import itertools, sys, time
from fastgpt import cli
from fastgpt.generation import sampling

steps, sample = itertools.count(), sampling.Sampler.__call__

def sample_or_wait(sampler, logits):
    if next(steps) == 20:
        time.sleep(3600)
    return sample(sampler, logits)

sampling.Sampler.__call__ = sample_or_wait
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_text_streams_as_it_comes():
    """Through a terminal: the first characters are there before a later step, which waits to be interrupted."""
    reader, writer = pty.openpty()
    command = [sys.executable, "-c", STOPS_HALFWAY, "generate", "ROMEO:", *TOKENS]
    # A shell's background job ignores SIGINT, and so would its children.
    heed_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, preexec_fn=heed_interrupts)
    os.close(writer)
    first = b""
    while len(first) < 10:
        assert select.select([reader], [], [], 300)[0], f"only {first!r}"
        first += os.read(reader, 10)
    assert first.startswith(b"ROMEO:") and process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 130 and error.strip() == b"fastgpt: interrupted"
    os.close(reader)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 10])
def test_a_reader_that_leaves_early_leaves_no_trace(count):
    """As `| head -c 10` does; nor is its status an error."""
    command = [sys.executable, "-m", "fastgpt", "generate", "A", "--max-new-tokens", "400"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(count).startswith(b"A")
    process.stdout.close()
    assert process.wait(timeout=600) == 0 and process.stderr.read() == b""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_an_output_that_is_full_is_an_error_in_one_line():
    command = [sys.executable, "-m", "fastgpt", "generate", "A", "--max-new-tokens", "1"]
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    expected = "fastgpt: error: output: expected one that can be written to, got No space left on device\n"
    assert (result.returncode, result.stderr) == (2, expected)


# Prompts


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


# What is said beside the text, and by default


@pytest.mark.slow
def test_speed_and_seed_are_said_beside_the_text(capsys):
    _, out, error = run(capsys, "generate", "A", *TOKENS, "--temperature", 1)
    number, speed, seed = re.fullmatch(r"(\d+) tokens, ([\d.,]+) tok/s, seed (\d+)\n", error).groups()
    assert number == "40" and float(speed.replace(",", "")) > 0
    assert run(capsys, "generate", "A", *TOKENS, "--temperature", 1, "--seed", seed)[1] == out
    assert run(capsys, "generate", "A", *TOKENS, "--json")[2] == ""
    greedy = run(capsys, "generate", "A", *TOKENS)[2]
    assert re.fullmatch(r"40 tokens, [\d.,]+ tok/s\n", greedy)
    assert json.loads(run(capsys, "generate", "A", *TOKENS, "--json")[1])["seed"] is None
    assert run(capsys, "generate", "A", "--max-new-tokens", 0)[2] == "0 tokens\n"
    alike = "samples of a prompt are all the same at temperature 0"
    assert alike in run(capsys, "generate", "A", *TOKENS, "--num-samples", 2)[2]
    for flags in (["--temperature", 1], ["--json", "--temperature", 1]):
        assert alike not in run(capsys, "generate", "A", *TOKENS, "--num-samples", 2, *flags)[2]
    assert "fills the model's context" in run(capsys, "generate", "A" * 512)[2]
    assert "fills the model's context" not in run(capsys, "generate", "A" * 511)[2]


def test_by_default_texts_end_where_the_context_does(tmp_path, capsys):
    """As that of a model that was trained with the trainer's defaults, for which 300 tokens are too many."""
    model = random_model(context=60)
    model.save_pretrained(tmp_path)
    shutil.copy(SHIPPED_MODEL / "tokenizer.json", tmp_path)
    for prompt in ("A", "A" * 50):
        report = json.loads(run(capsys, "generate", prompt, "--model", tmp_path, "--json")[1])
        assert report["new_tokens"] == 60 - len(prompt) and report["finish_reason"] == "length"
    status, _, error = run(capsys, "generate", "A" * 50, "--model", tmp_path, "--max-new-tokens", 11)
    assert status == 2 and "max-new-tokens: expected at most 10, " in error


def test_rules(capsys):
    pipe = fastgpt.pipeline(SHIPPED_MODEL)
    space, e = (pipe.tokenizer.encode(text)[0] for text in " e")
    bias = json.dumps({str(space): 2.5, str(e): -math.inf})
    flags = ["--no-repeat-ngram-size", 3, "--min-new-tokens", 5, "--logit-bias", bias]
    report = json.loads(run(capsys, "generate", "A", *TOKENS, *flags, "--json")[1])
    rules = {"no_repeat_ngram_size": 3, "min_new_tokens": 5, "logit_bias": {space: 2.5, e: -math.inf}}
    assert report["text"] == "A" + pipe("A", 40, **rules) and "e" not in report["text"]


def test_the_checkpoints_defaults_hold_where_nothing_is_said(monkeypatch, capsys):
    pipe = fastgpt.pipeline(SHIPPED_MODEL)
    pipe.model.generation_defaults = {"temperature": 0.9, "top_k": 5, "max_new_tokens": 17}
    monkeypatch.setattr(cli, "pipeline", lambda *path, **options: pipe)
    defaults = json.loads(run(capsys, "generate", "A", "--seed", 3, "--json")[1])
    told = json.loads(run(capsys, "generate", "A", "--seed", 3, "--json", "--max-new-tokens", 20, "--temperature", 0)[1])
    assert defaults["text"] == "A" + pipe("A", 17, temperature=0.9, top_k=5, seed=3)
    assert told["text"] == "A" + pipe("A", 20, temperature=0)


def test_escapes_in_stop_strings(capsys):
    line = fastgpt.pipeline(SHIPPED_MODEL)("ROMEO:", 200).partition("\n")
    assert line[1]
    _, out, _ = run(capsys, "generate", "ROMEO:", "--max-new-tokens", 200, "--stop", r"\n")
    assert out == f"ROMEO:{line[0]}\n"


def test_the_revision_reaches_the_hub(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cli, "pipeline", lambda *path, **options: asked.append(options["revision"]) or sys.exit(0))
    run(capsys, "generate", "A", "--model", "some/model", "--revision", "v2")
    monkeypatch.setattr(cli.hub, "resolve", lambda path, revision: asked.append(revision) or sys.exit(0))
    run(capsys, "inspect", "A", "--model", "some/model", "--revision", "v3")
    assert asked == ["v2", "v3"]


# Errors

ERRORS = [
    (["generate", ""], "prompt: expected at least one token, got an empty prompt"),
    (["generate", "naïve"], "text: expected only the 65 characters .*, got 'ï'"),
    (["generate", "A", "--max-new-tokens", "512"], "context of 512 tokens, got 1 . 512"),
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
    (["bench", "--only", "nothing of this name"], "only: expected a part of what can be measured, 'nothing of this name' is"),
    (["generate", "--model", ""], "model: expected the path of a file or a folder, got ''"),
    (["generate", "--prompt-file", ""], "prompt-file: expected the path of a file or a folder, got ''"),
    (["inspect", "A", "--attention", ""], "attention: expected the path of a file or a folder, got ''"),
    (["train", "--text", "", "--out", "/tmp/x"], "text: expected the path of a file or a folder, got ''"),
    (["train", "--text", "/nowhere", "--out", ""], "out: expected the path of a file or a folder, got ''"),
    (["train", "--text", "/nowhere", "--out", "a\0b"], r"out: expected a folder, got 'a\\x00b': embedded null byte"),
    (["train", "--text", "/nowhere", "--out", "x" * 5000], "out: expected a folder, got 'x+': File name too long"),
    (["train", "--text", "/nowhere", "--out", "/tmp/x", "--init-from", ""], "init-from: expected the path of a file or"),
    (["train", "--text", "/nowhere", "--out", "/tmp/x"], "text: expected a file, /nowhere does not exist"),
]


@pytest.mark.parametrize("arguments, message", ERRORS, ids=[message[:30] for _, message in ERRORS])
def test_errors_are_one_line(arguments, message, capsys):
    status, out, error = run(capsys, *arguments)
    assert status == 2 and out == "" and error.startswith("fastgpt: error: ") and len(error.splitlines()) == 1
    assert re.search(message, error)


SAID = [
    ("top_p: expected a number or None, got 1.5", "--top-p: expected a number, got 1.5"),
    ("max_new_tokens: expected an integer >= 0 or None, got -1", "--max-new-tokens: expected an integer >= 0, got -1"),
    ("max_new_tokens: expected at most max_new_tokens or None", "--max-new-tokens: expected at most max_new_tokens or None"),
    ("model: expected a folder, got 'top_p or None, got'", "--model: expected a folder, got 'top_p or None, got'"),
    ("prompt: expected a text or None, got 3", None),
    ("layers: expected an integer or None, got 3", None),
    ("top_p expected a number or None, got 3", None),
    ("run: or None, got 3", None),
    ("", None),
]


@pytest.mark.parametrize("message, expected", SAID)
def test_arguments_are_named_as_they_are_typed(message, expected):
    """Those of this command; and nothing of what was given is changed."""
    options = cli.parser().parse_args(["generate", "A", "--top-p", "1"])
    options.prompts, options.given = ["A"], {}  # as the command goes on
    assert cli.as_typed(ValueError(message), options) == (message if expected is None else expected)
    assert cli.as_typed(ValueError(message), argparse.Namespace()) == message


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


@pytest.mark.parametrize("text, prompt", [("ab\n" * 50, "\n"), ("\U0001f600" * 150, "\U0001f600"), ("ab" * 80, "a")])
def test_a_trained_model_generates_by_default(text, prompt, tmp_path, capsys, monkeypatch):
    """Also where its text has no line break, which is the prompt else."""
    monkeypatch.setattr(sys, "stdin", None)
    (tmp_path / "text.txt").write_text(text)
    sizes = {"layers": 1, "heads": 1, "width": 8, "context": 8, "steps": 1, "batch-size": 2, "eval-windows": 1}
    arguments = [part for name, size in sizes.items() for part in (f"--{name}", size)]
    assert run(capsys, "train", "--text", tmp_path / "text.txt", "--out", tmp_path / "run", *arguments)[0] == 0
    status, out, _ = run(capsys, "generate", "--model", tmp_path / "run")
    assert status == 0 and out.startswith(prompt) and len(out) == 8 + 1  # as much as the context holds


def test_without_standard_output(capsys, monkeypatch):
    """As processes beyond the first and daemons are."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        status, _, error = run(capsys, "generate", "A", "--max-new-tokens", 2)
    assert status == 0 and error.startswith("2 tokens, ")


def test_without_standard_error(tmp_path, capsys, monkeypatch):
    """As programs without a console are: nothing that belongs there comes elsewhere."""
    monkeypatch.setattr(transformers_format, "SHOW_PROGRESS", 0)
    (tmp_path / "text.txt").write_text("ab\n" * 50)
    sizes = {"layers": 1, "heads": 1, "width": 8, "context": 8, "steps": 1, "batch-size": 2, "eval-windows": 1}
    arguments = [part for name, size in sizes.items() for part in (f"--{name}", size)]
    for names in (("stderr",), ("stdin", "stdout", "stderr")):
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(sys, name, None)
            bad = run(capsys, "generate", "A", "--top-k", 0)
            generated = run(capsys, "generate", "A", "--max-new-tokens", 2, "--temperature", 0)
            trained = run(capsys, "train", "--text", tmp_path / "text.txt", "--out", tmp_path / names[0], *arguments)
        assert (bad[0], bad[1]) == (2, "") and generated[0] == trained[0] == 0
        assert "tok/s" not in generated[1]


def test_processes_beyond_the_first_say_nothing(capsys, monkeypatch):
    @contextlib.contextmanager
    def second(parallel, device):
        yield Processes(rank=1, size=1)

    monkeypatch.setattr(cli, "joined", second)
    assert run(capsys, "generate", "A", "--max-new-tokens", 2, "--seed", 1) == (0, "", "")


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


def test_training_from_a_checkpoint_keeps_what_belongs_to_its_tokenizer(chat_model, tmp_path, capsys):
    folder, text = tmp_path / "from", tmp_path / "text.txt"
    shutil.copytree(chat_model, folder)
    more = {"additional_chat_templates/tools.jinja": "tools", "special_tokens_map.json": "{}"}
    for name, content in more.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    text.write_text("the quick brown fox\n" * 200)
    flags = ["--text", text, "--out", tmp_path / "out", "--init-from", folder, "--context", 8]
    status, _, error = run(capsys, "train", *flags, "--steps", 1, "--batch-size", 2, "--eval-windows", 1)
    assert status == 0, error
    for name, content in more.items():
        assert (tmp_path / "out" / name).read_text() == content
    assert Tokenizer.from_folder(tmp_path / "out").chat_template == Tokenizer.from_folder(folder).chat_template


# Ctrl-C while modules are imported

WAITS = "print('importing', flush=True)\nimport time\ntime.sleep(600)"


def interrupted(command, folder):
    """(exit status, stdout, stderr) of a program that is interrupted when it prints a line; its modules may be in `folder`."""
    folders = os.pathsep.join([str(folder), str(Path(fastgpt.__file__).parents[1])])
    # A shell's background job ignores SIGINT, and so would its children.
    heed_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": folders}, cwd=folder,
        preexec_fn=heed_interrupts, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    assert line, process.communicate()
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    return process.returncode, line + out, error


@pytest.mark.parametrize("imported, how", [("torch", "-m"), ("torch", "script"), ("tqdm", "-m"), ("tqdm", "script")])
def test_interrupted_while_it_starts(imported, how, tmp_path):
    """A module that the command imports, PyTorch or a later one, takes its time."""
    (tmp_path / f"{imported}.py").write_text(WAITS)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "fastgpt").write_text("from fastgpt.__main__ import main\nmain()")
    command = [sys.executable, *(["-m", "fastgpt"] if how == "-m" else [tmp_path / "bin" / "fastgpt"]), "info"]
    assert interrupted(command, tmp_path) == (130, "importing\n", "\nfastgpt: interrupted\n")


CATCHES = """
try:
    import fastgpt
except KeyboardInterrupt:
    print("caught")
"""


@pytest.mark.parametrize("how", ["-m", "script"])
def test_a_program_that_imports_fastgpt_is_interrupted_as_ever(how, tmp_path):
    (tmp_path / "torch.py").write_text(WAITS)
    (tmp_path / "fastgpt_server.py").write_text(CATCHES)
    program = ["-m", "fastgpt_server"] if how == "-m" else [tmp_path / "fastgpt_server.py"]
    assert interrupted([sys.executable, *program, "-m", "fastgpt"], tmp_path) == (0, "importing\ncaught\n", "")


@pytest.mark.slow
def test_interrupts_are_the_programs_own_once_it_is_loaded(tmp_path):
    """Even where it has the command's name; and no thread other than the main one sets a handler."""
    (tmp_path / "fastgpt").write_text("import fastgpt, signal\nprint(signal.getsignal(signal.SIGINT).__name__)")
    environment = os.environ | {"PYTHONPATH": str(Path(fastgpt.__file__).parents[1])}
    heed_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    result = subprocess.run(
        [sys.executable, tmp_path / "fastgpt"], capture_output=True, text=True, env=environment, preexec_fn=heed_interrupts
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "default_int_handler\n", "")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor() as pool:
            pool.submit(startup.watch).result()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        for handler in (signal.SIG_IGN, lambda *_: None):  # a background job's, or the program's
            signal.signal(signal.SIGINT, handler)
            startup.watch()
            assert signal.getsignal(signal.SIGINT) is handler
            startup.unwatch()
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_installed_command_is_the_module():
    """Whose imports may be interrupted."""
    scripts = (Path(fastgpt.__file__).parents[1] / "pyproject.toml").read_text()
    assert '\nfastgpt = "fastgpt.__main__:main"\n' in scripts


@pytest.mark.slow
def test_help_and_module(capsys):
    result = subprocess.run([sys.executable, "-m", "fastgpt", "--help"], capture_output=True, text=True, check=True)
    assert all(command in result.stdout for command in ("generate", "train", "bench", "info"))
    assert run(capsys)[0] == 2


@pytest.mark.parametrize("command", ["generate", "inspect", "train", "bench", "info"])
def test_every_option_of_every_command_has_a_help_text(command, capsys):
    commands = next(action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    assert all(action.help and re.search("[a-z]{3}", action.help) for action in actions)
    status, out, _ = run(capsys, command, "--help")
    assert status == 0 and all(name in out for action in actions for name in action.option_strings)
