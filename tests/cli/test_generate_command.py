"""`fastgpt generate`: its options, and what it prints."""

import contextlib
import json
import math
import re
import shutil
import sys

import pytest
import torch
from command_line import TOKENS, run
from models import random_model
from texts import CHATML, byte_level, write_checkpoint

import fastgpt
from fastgpt import SHIPPED_MODEL
from fastgpt.checkpoints import hub
from fastgpt.cli import generate
from fastgpt.cli.arguments import unescape
from fastgpt.generation.scheduler import Scheduler
from fastgpt.training.processes import Processes


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
    status, _, err = run(capsys, *arguments, "--chat", *flags, "--template-var", "enable_thinkng=true", "--template-var", "x=1")
    assert status == 2
    assert (
        "--template-var: expected variables that the model's chat template reads, got enable_thinkng, x, which it does not"
        in err
    )


def test_chats_and_eos_tokens(chat_model, capsys):
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


def test_speculation_changes_nothing_but_speed(capsys):
    arguments = ["generate", "ROMEO:", *TOKENS, "--temperature", 0.5, "--seed", 1]
    plain = run(capsys, *arguments)
    for options in (["--speculate"], ["--speculate", "--speculate-tokens", 2], ["--draft", SHIPPED_MODEL]):
        status, out, err = run(capsys, *arguments, *options)
        assert (status, out) == plain[:2]
    assert "tokens a pass" in err
    assert run(capsys, *arguments, "--speculate", "--compare-cache")[0] == 0
    for options, message in (
        (["--speculate", "--no-cache"], "--speculate: expected a cache with it, got --no-cache"),
        (["--speculate-tokens", 2], "--speculate-tokens: expected --speculate or --draft with it"),
    ):
        status, _, err = run(capsys, *arguments, *options)
        assert status == 2 and message in err


def test_json(capsys):
    report = json.loads(run(capsys, "generate", "A", *TOKENS, "--json")[1])
    assert sorted(report) == sorted(
        "text finish_reason prompt_tokens new_tokens prefill_seconds decode_seconds decode_tokens_per_second tokens_per_pass seed device "
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


@pytest.mark.slow
def test_speed_and_seed_are_printed_on_stderr(capsys):
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
    ignored = "without effect at temperature 0: --top-k, --min-p; choose a --temperature above it"
    assert ignored in run(capsys, "generate", "A", *TOKENS, "--top-k", 5, "--min-p", 0.1)[2]
    assert "without effect" not in run(capsys, "generate", "A", *TOKENS, "--top-k", 5, "--temperature", 1)[2]
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
    assert status == 2 and "max-new-tokens: expected at most 10 after a prompt of 50 " in error


def test_rules(capsys):
    pipe = fastgpt.pipeline(SHIPPED_MODEL)
    space, e = (pipe.tokenizer.encode(text)[0] for text in " e")
    bias = json.dumps({str(space): 2.5, str(e): -math.inf})
    flags = ["--no-repeat-ngram-size", 3, "--min-new-tokens", 5, "--logit-bias", bias]
    report = json.loads(run(capsys, "generate", "A", *TOKENS, *flags, "--json")[1])
    rules = {"no_repeat_ngram_size": 3, "min_new_tokens": 5, "logit_bias": {space: 2.5, e: -math.inf}}
    assert report["text"] == "A" + pipe("A", 40, **rules) and "e" not in report["text"]


def test_generation_defaults_of_the_checkpoint_apply(monkeypatch, capsys):
    pipe = fastgpt.pipeline(SHIPPED_MODEL)
    pipe.model.generation_defaults = {"temperature": 0.9, "top_k": 5, "max_new_tokens": 17}
    monkeypatch.setattr(generate, "pipeline", lambda *path, **options: pipe)
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
    monkeypatch.setattr(generate, "pipeline", lambda *path, **options: asked.append(options["revision"]) or sys.exit(0))
    run(capsys, "generate", "A", "--model", "some/model", "--revision", "v2")
    monkeypatch.setattr(hub, "resolve", lambda path, revision: asked.append(revision) or sys.exit(0))
    run(capsys, "inspect", "A", "--model", "some/model", "--revision", "v3")
    assert asked == ["v2", "v3"]


def test_only_the_first_process_prints(capsys, monkeypatch):
    @contextlib.contextmanager
    def second(parallel, device):
        yield Processes(rank=1, size=1)

    monkeypatch.setattr(generate, "joined", second)
    assert run(capsys, "generate", "A", "--max-new-tokens", 2, "--seed", 1) == (0, "", "")


ESCAPES = [
    (r"\n\n", "\n\n"), (r"a\tb\r", "a\tb\r"), (r"\\n", r"\n"), (r"\x41\u00e9\U0001F600", "Aé😀"), (r"\ud83d\ude00", "😀"),
    (r"\d\q\xZZ", r"\d\q\xZZ"), ("\n", "\n"), ("", ""), ("\\", "\\"), (r"\0", "\0"),
]  # fmt: skip


@pytest.mark.parametrize("written, text", ESCAPES, ids=[repr(entry[0]) for entry in ESCAPES])
def test_escapes(written, text):
    assert unescape(written) == text


@pytest.mark.parametrize("written", [r"\ud800", r"\uFFFF\uDC00", r"\U00110000", r"\UFFFFFFFF"])
def test_escapes_that_are_not_characters_raise(written):
    with pytest.raises(ValueError, match="^stop: expected escapes of characters, got "):
        unescape(written, "stop")


def test_prompts_of_a_file_in_a_batch_that_they_join_and_leave(capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("ROMEO:\n\nJULIET:\nFirst Citizen:\n")
    flags = ["--prompts", file, "--max-batch", 2, *TOKENS, "--stop", r"\n"]
    status, out, err = run(capsys, "generate", *flags)
    assert status == 0 and "tok/s" in err
    report = json.loads(run(capsys, "generate", *flags, "--json")[1])
    names = ["ROMEO:", "JULIET:", "First Citizen:"]
    alone = [run(capsys, "generate", name, *TOKENS, "--stop", r"\n")[1].removesuffix("\n") for name in names]
    assert [sample["text"] for sample in report["samples"]] == alone and report["prefill_seconds"] is None
    assert out == "\n".join(f"--- {i} of 3: {name!r}\n{text}\n" for i, (name, text) in enumerate(zip(names, alone), 1))


def test_an_interrupt_among_many_prompts_prints_what_is_done(capsys, monkeypatch):
    steps = []

    def interrupted(self, step=Scheduler.step):
        steps.append(1)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Scheduler, "step", interrupted)
    flags = ["A:", "B", "--max-batch", 1, *TOKENS, "--max-new-tokens", 8]
    status, out, err = run(capsys, "generate", *flags)
    assert status == 130 and out.startswith("--- 1 of 2: 'A:'\nA:") and "2 of 2" not in out
    assert err.splitlines()[-1] == "fastgpt: interrupted: 1 of 2 texts are done"
    steps.clear()
    status, out, _ = run(capsys, "generate", *flags, "--json")
    assert status == 130 and [sample["finish_reason"] for sample in json.loads(out)["samples"]] == ["length", None]


@pytest.mark.parametrize("content, message", [("\n \n", "at least one line with text"), ("", "at least one character")])
def test_a_file_without_prompts_is_an_error(capsys, tmp_path, content, message):
    (tmp_path / "empty.txt").write_text(content)
    status, _, err = run(capsys, "generate", "--prompts", tmp_path / "empty.txt")
    assert status == 2 and message in err and "--prompts" in err
