"""`fastgpt train`: starts, stops and resumes runs, alone in their folders, and starts from checkpoints."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from command_line import run
from family_checkpoints import theirs
from models import random_model
from texts import CHATML, byte_level, write_checkpoint
from training_runs import TEXT, TINY, weights

from fastgpt import GPT
from fastgpt.cli.main import main
from fastgpt.text.tokenizer import Tokenizer
from fastgpt.training.loop import train
from fastgpt.training.run_folder import LOCK
from fastgpt.training.trainer import Trainer


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma2"])
def test_a_checkpoint_of_transformers_stays_one(case, text_file, tmp_path):
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    model = theirs(case)
    model.save_pretrained(checkpoint)
    Tokenizer.from_corpus(TEXT).save(checkpoint / "tokenizer.json")
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    settings = "--context 16 --batch-size 4 --steps 3 --warmup 0".split()
    main(["train", "--init-from", str(checkpoint), "--text", str(text_file), "--out", str(out), *settings])
    trained = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(trained) is type(model) and trained.config.num_key_value_heads == 2
    assert not torch.equal(trained.get_input_embeddings().weight, model.get_input_embeddings().weight)
    resumed = weights(Trainer.resume(out, TEXT))
    for name, weight in GPT.from_pretrained(out).state_dict().items():
        assert torch.equal(weight, resumed[name]), name
    assert Tokenizer.from_folder(out).chat_template == CHATML


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


def test_fine_tuning_keeps_the_tokenizer_files(tmp_path, capsys):
    folder, text = tmp_path / "from", tmp_path / "text.txt"
    folder.mkdir()
    write_checkpoint(folder, byte_level(), tokenizer_config={"chat_template": CHATML})
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


def command(*arguments):
    return [sys.executable, "-m", "fastgpt", "train", *map(str, arguments)]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


SMALL = ["--layers", 1, "--heads", 2, "--width", 32, "--context", 16, "--batch-size", 4, "--eval-interval", 1000]


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_that_generates_and_resumes(text_file, tmp_path):
    out = tmp_path / "run"
    arguments = ("--text", text_file, "--out", out, *SMALL, "--steps", 100000)
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    progress = ""
    while "loss" not in progress:  # the progress bar is on stderr
        piece = process.stderr.read(50)
        assert piece, progress
        progress += piece
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    assert "continue with --resume" in stdout and "held-out loss" in stdout

    generate = [sys.executable, "-m", "fastgpt", "generate", "the ", "--model", str(out), "--max-new-tokens", "8", "--json"]
    result = subprocess.run(generate, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["text"].startswith("the ")
    stopped = Trainer.resume(out, TEXT).step
    assert 0 < stopped < 100000


@pytest.mark.slow
def test_resuming_on_the_command_line(text_file, tmp_path):
    out = tmp_path / "run"
    start = command("--text", text_file, "--out", out, *SMALL, "--steps", 4)
    subprocess.run(start, capture_output=True, check=True)
    resume = command("--text", text_file, "--out", out, "--resume")
    result = subprocess.run(resume, capture_output=True, text=True, check=True)
    assert "0 steps to go" in result.stdout

    again = subprocess.run(start, capture_output=True, text=True)
    assert again.returncode == 2 and "holds a run; continue it with --resume" in again.stderr


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--resume", "--width", "64"], "width: expected 32, with which the run in {out} was started, got 64"),
        (["--resume", "--init-from", "x"], "--init-from: expected none with --resume, which continues {out}, got x"),
        (["--resume", "--accumulate", "3"], "--batch-size: expected a multiple of 3 (processes: 1, parts in each: 3), got 8"),
        (["--resume", "--accumulate", "0"], "accumulate: expected an integer >= 1, got 0"),
        (["--parallel", "fsdp"], "parallel: expected processes to be started by torchrun"),
    ],
)
def test_bad_options_on_the_command_line(options, problem, text_file, tmp_path, capsys):
    out = tmp_path / "run"
    Trainer(TEXT, TINY).save(out, weights=True)
    with pytest.raises(SystemExit) as exit:
        main(["train", "--text", str(text_file), "--out", str(out), *options])
    assert exit.value.code == 2 and problem.format(out=out) in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_diverged_run_keeps_its_last_good_state(kind, text_file, tmp_path, capsys, monkeypatch):
    """And goes on from there."""
    out, train_step = tmp_path / "run", Trainer.train_step

    def poisoned(self):
        loss, norm = train_step(self)
        nan = torch.tensor(math.nan)
        return (loss, norm) if self.step < 25 else (nan, norm) if kind == "loss" else (loss, nan)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    arguments = ["train", "--text", text_file, "--out", out, *SMALL, "--steps", 40]
    with pytest.raises(SystemExit) as exit:
        main([*map(str, arguments), "--eval-interval", "20"])
    error = capsys.readouterr().err
    assert exit.value.code == 1 and "the run has diverged by step 40" in error and f"{out} holds step 20" in error
    monkeypatch.setattr(Trainer, "train_step", train_step)
    main(["train", "--text", str(text_file), "--out", str(out), "--resume", "--learning-rate", "1e-4", "--steps", "30"])
    resumed = Trainer.resume(out, text_file)
    assert resumed.step == 30 and resumed.config.learning_rate == 1e-4
    assert all(weight.isfinite().all() for weight in weights(resumed).values())


@pytest.mark.parametrize("name", ["special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_what_is_copied_with_a_tokenizer_is_no_link_out_of_its_folder(name, tmp_path, text_file, capsys):
    random_model().save_pretrained(tmp_path / "from")
    Tokenizer.from_corpus(TEXT).save(tmp_path / "from" / "tokenizer.json")
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "from" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "from" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(SystemExit) as exit:
        main(["train", "--text", str(text_file), "--out", str(tmp_path / "out"), "--init-from", str(tmp_path / "from")])
    assert exit.value.code == 2 and f"{name}: expected a file in this folder, got a link to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resuming_a_finished_run_says_how_to_continue(text_file, tmp_path, capsys):
    arguments = ["train", "--text", str(text_file), "--out", str(tmp_path / "out"), *map(str, SMALL)]
    main([*arguments, "--steps", "2"])
    assert "--steps MORE" not in capsys.readouterr().err
    main([*arguments[:5], "--resume"])
    assert "has done all its 2 steps: --steps MORE continues it" in capsys.readouterr().err
    main([*arguments[:5], "--resume", "--steps", "3"])
    assert "--steps MORE" not in capsys.readouterr().err


@pytest.mark.parametrize("holds", ["a file", "a model"])
def test_out_is_looked_at_before_the_text(holds, tmp_path, capsys):
    out = tmp_path / "out"
    if holds == "a file":
        out.touch()
    else:
        random_model().save_pretrained(out)
    with pytest.raises(SystemExit) as exit:
        main(["train", "--text", str(tmp_path / "missing"), "--out", str(out)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("fastgpt: error: --out: expected a") and str(out) in error


HOLD = """
import sys, time
from pathlib import Path
from fastgpt.training.run_folder import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(3600)
"""


@pytest.mark.slow
def test_a_folder_is_one_runs_until_its_process_dies(text_file, tmp_path, capsys):
    """For new runs, resumed ones and those of Python, each of which is refused before it computes."""
    out = tmp_path / "folder" / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    arguments = ["train", "--text", str(tmp_path / "never read"), "--out", str(out)]
    problem = f"out: expected a folder that no other run uses, {out} is in use by process {process.pid} on "
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit) as exit:
            main(arguments + more)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and problem in error and len(error.splitlines()) == 1
    trainer = Trainer(TEXT, replace(TINY, steps=2))
    for call in (lambda: train(trainer, out), lambda: trainer.save(out, weights=True)):
        with pytest.raises(ValueError, match="^out: expected a folder that no other run uses"):
            call()
    assert trainer.step == 0 and [path.name for path in out.iterdir()] == [LOCK]
    process.kill()
    process.communicate()
    assert (out / LOCK).exists()  # which the dead process left: neither a new run nor what loads it minds
    main(["train", "--text", str(text_file), "--out", str(out), *map(str, SMALL), "--steps", "2"])
    (out / LOCK).write_text("process 1 on another machine\n")
    GPT.from_pretrained(out)
    train(Trainer.resume(out, TEXT, steps=3), out)
    assert Trainer.resume(out, TEXT).step == 3 and not (out / LOCK).exists()


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(SystemExit):
        main(["train", "--text", str(tmp_path / "missing"), "--out", str(tmp_path / "a" / "b")])
    assert not list(tmp_path.iterdir())
