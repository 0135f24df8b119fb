"""The trainer: it learns, resumes to the same numbers, survives Ctrl-C, and refuses what it cannot do."""

import json
import math
import random
import re
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import tokenizers
import torch
import transformers
from family_checkpoints import theirs
from models import random_model
from safetensors import SafetensorError
from texts import CHATML, CORPUS, byte_fallback, byte_level

from fastgpt import GPT
from fastgpt.checkpoints import transformers_format as checkpoints
from fastgpt.checks import writing
from fastgpt.cli import main
from fastgpt.testing import numerics
from fastgpt.text.tokenizer import Tokenizer
from fastgpt.training import corpus
from fastgpt.training.evaluation import evaluate, split
from fastgpt.training.trainer import LOCK, TrainConfig, Trainer, claimed, pretrained, train

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
TINY = TrainConfig(layers=1, heads=2, width=32, context=16, batch_size=8, steps=60, warmup=5, eval_interval=20)


def weights(trainer):
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns(dtype, tmp_path):
    trainer = Trainer(TEXT, replace(TINY, steps=150, learning_rate=5e-3, eval_interval=50, dtype=dtype))
    before = trainer.evaluate()
    train(trainer, tmp_path)
    assert abs(before - math.log(trainer.tokenizer.vocab_size)) < 0.2
    assert trainer.best_loss < 0.5 * before
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "training_state.pt"]
    # What was saved is the model with the lowest held-out loss.
    model, tokenizer = GPT.from_pretrained(tmp_path), Tokenizer.load(tmp_path / "tokenizer.json")
    held_out = split(torch.tensor(tokenizer.encode(TEXT)), 16)[1]
    with trainer.autocast():
        assert evaluate(model, held_out) == trainer.best_loss


def test_resuming_gives_the_numbers_of_an_uninterrupted_run(tmp_path):
    config = replace(TINY, dropout=0.2)
    straight = Trainer(TEXT, config)
    straight.model.train()
    losses = [straight.train_step() for _ in range(30)]

    first = Trainer(TEXT, config)
    first.model.train()
    resumed_losses = [first.train_step() for _ in range(13)]
    first.save(tmp_path, weights=True)
    torch.rand(5)  # the global generator's state must not matter
    second = Trainer.resume(tmp_path, TEXT)
    second.model.train()
    resumed_losses += [second.train_step() for _ in range(17)]

    assert losses == resumed_losses
    assert second.step == 30
    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(second)[name]), name


def test_evaluation_and_sampling_do_not_disturb_the_run(tmp_path):
    """Two runs that differ only in how often they are looked at."""
    config = replace(TINY, dropout=0.2, steps=12)
    often, once = (Trainer(TEXT, replace(config, eval_interval=interval)) for interval in (2, 12))
    train(often, tmp_path / "often")
    train(once, tmp_path / "once")
    for name, weight in weights(often).items():
        assert torch.equal(weight, weights(once)[name]), name


@pytest.mark.slow
def test_no_layers_are_a_bigram_model(tmp_path):
    """Each token predicts the next alone: what is left is the text's own entropy of a character given the one before."""
    config = replace(TINY, layers=0, dropout=0.0, steps=300, learning_rate=3e-2, eval_interval=300)
    trainer = Trainer(TEXT, config)
    train(trainer, tmp_path)
    model, ids = GPT.from_pretrained(tmp_path), trainer.held_out[None, :16]
    assert torch.equal(model(ids)[0, -1], model(ids * torch.eye(16, dtype=torch.int64)[-1])[0, -1])
    pairs = torch.zeros(model.config.vocab_size, model.config.vocab_size)
    pairs.index_put_((trainer.held_out[:-1], trainer.held_out[1:]), torch.ones(()), accumulate=True)
    entropy = -torch.special.xlogy(pairs, pairs / pairs.sum(1, keepdim=True)).nansum().item() / pairs.sum().item()
    assert entropy < trainer.best_loss < 1.05 * entropy


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_batch():
    """But for rounding: sums in another order err as much as in the usual order."""
    config = replace(TINY, layers=2, dropout=0.0)

    def curves(accumulate, dtype):
        """Losses and norms of gradients, step by step."""
        trainer = Trainer(TEXT, config, accumulate=accumulate)
        trainer.model.train().to(dtype)
        values = [[value.item() for value in trainer.train_step()] for _ in range(6)]
        return torch.tensor(values, dtype=dtype).unbind(1)

    numerics.check(curves(4, torch.float32), lambda: curves(1, torch.float64))


def test_bfloat16_is_for_products_only():
    trainer = Trainer(TEXT, config := replace(TINY, dropout=0.0, dtype="bfloat16"))

    def in_double():
        high = Trainer(TEXT, config)
        high.model.double()
        high.autocast = nullcontext
        return high.train_step()[0]

    products = []
    trainer.model.register_forward_hook(lambda model, inputs, logits: products.append(logits.dtype))
    loss, _ = trainer.train_step()
    numerics.check(loss, in_double, arithmetic=torch.bfloat16, name="loss")
    assert products == [torch.bfloat16]
    moments = [moment for state in trainer.optimizer.state.values() for moment in state.values()]
    assert {tensor.dtype for tensor in (*trainer.model.parameters(), *moments)} == {torch.float32}


def test_weight_decay_is_on_matrices_only():
    trainer = Trainer(TEXT, TINY)
    decayed, others = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() == 2 for p in decayed["params"])
    assert others["weight_decay"] == 0.0 and all(p.dim() == 1 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(trainer.model.parameters()))


def test_learning_rate_warms_up_and_follows_a_cosine():
    trainer = Trainer(TEXT, replace(TINY, steps=1000, warmup=100, learning_rate=1.0))
    rates = [trainer.learning_rate(step) for step in range(1000)]
    assert rates[:100] == pytest.approx([(step + 1) / 100 for step in range(100)])
    assert rates[550] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert rates[99:] == sorted(rates[99:], reverse=True)


def test_the_last_tenth_is_held_out():
    train_tokens, held_out = split(torch.arange(1005), 16)
    assert torch.equal(torch.cat([train_tokens, held_out]), torch.arange(1005)) and len(held_out) == 100


def test_evaluation_counts_every_token_once():
    model = random_model(context=8)
    tokens = torch.randint(65, (30,), generator=torch.Generator().manual_seed(0))
    losses = []
    for target in range(1, 30):
        start = (target - 1) // 8 * 8
        logits = model(tokens[None, start:target])[0, -1]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[target]).item())
    assert evaluate(model, tokens) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a decoder of random weights and a tokenizer of pairs of characters, fewer than the decoder has."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    alphabet = sorted(set(TEXT))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    folder = tmp_path / "checkpoint"
    random_model(vocabulary=64, context=32, width=32, dropout=0.3).save_pretrained(folder)
    Tokenizer(backend).save(folder / "tokenizer.json")
    return folder


def test_training_goes_on_from_a_checkpoint(checkpoint, tmp_path):
    config, model, tokenizer = pretrained(checkpoint, context=16, batch_size=8, steps=20, warmup=0)
    assert (config.layers, config.heads, config.width, config.context) == (2, 4, 32, 16)
    trainer = Trainer(TEXT, config, model=model, tokenizer=tokenizer)
    ids = torch.tensor(Tokenizer.load(checkpoint / "tokenizer.json").encode(TEXT))
    assert len(ids) < 0.7 * len(TEXT)
    untrained = evaluate(GPT.from_pretrained(checkpoint), split(ids, 16)[1], context=16)
    assert trainer.evaluate() == untrained
    assert config.dropout == trainer.model.config.dropout == 0.3

    train(trainer, tmp_path / "run")
    assert trainer.best_loss < 0.9 * untrained
    assert GPT.from_pretrained(tmp_path / "run").config.context_length == 32
    assert Tokenizer.load(tmp_path / "run" / "tokenizer.json").encode(TEXT) == ids.tolist()
    resumed = Trainer.resume(tmp_path / "run", TEXT)
    assert torch.equal(resumed.held_out, trainer.held_out)
    for name, weight in weights(trainer).items():
        assert torch.equal(weight, weights(resumed)[name]), name


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


def test_settings_that_do_not_fit_the_checkpoint(checkpoint):
    assert pretrained(checkpoint)[0].context == 32  # not TrainConfig's 256
    with pytest.raises(ValueError, match="width: expected 32, that of the model in .*checkpoint, got 64"):
        pretrained(checkpoint, width=64)
    with pytest.raises(ValueError, match="context: expected at most 32, that of the model in .*checkpoint, got 33"):
        pretrained(checkpoint, context=33)
    random_model(vocabulary=59).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="init_from: expected a tokenizer.json of at most 59 tokens, .* got 60"):
        pretrained(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer: expected the file .*tokenizer.json"):
        pretrained(checkpoint)


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
        (["--resume", "--init-from", "x"], "--init-from: expected none with --resume, which goes on from {out}, got x"),
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


def test_bad_text(tmp_path):
    with pytest.raises(ValueError, match="text: expected at least 285 tokens for a context of 256, got 45"):
        Trainer("the quick brown fox jumps over the lazy dog.\n", TrainConfig())
    trainer = Trainer(TEXT, TINY)
    trainer.save(tmp_path, weights=False)
    with pytest.raises(ValueError, match="text: expected the text that the run in .* was started with"):
        Trainer.resume(tmp_path, TEXT + "more")


def test_text_of_just_the_length_that_the_error_asks_for():
    with pytest.raises(ValueError, match="at least 285 tokens"):
        split(torch.zeros(284), 256)
    assert len(split(torch.zeros(285), 256)[0]) == 257


def test_bad_state(tmp_path):
    with pytest.raises(FileNotFoundError, match="resume: expected training_state.pt of an earlier run"):
        Trainer.resume(tmp_path, TEXT)
    (tmp_path / "training_state.pt").write_bytes(b"not a state")
    with pytest.raises(ValueError, match="resume: .*training_state.pt is damaged"):
        Trainer.resume(tmp_path, TEXT)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(TEXT, TINY)
    trainer.train_step()
    trainer.save(folder, weights=True)
    return folder


def test_a_state_that_ends_early(run):
    path = run / "training_state.pt"
    whole = path.read_bytes()
    try:
        for end in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
            path.write_bytes(whole[:end])
            with pytest.raises(ValueError, match="resume: .*training_state.pt is damaged: "):
                Trainer.resume(run, TEXT)
    finally:
        path.write_bytes(whole)
    assert Trainer.resume(run, TEXT).step == 1


WEIGHT = "token_embedding.weight"
DAMAGES = [
    ((), [1], "state: expected a dict, got list"),
    (("step",), None, "step: expected an integer"), (("step",), "a", "step: expected an integer >= 0 .* got 'a'"),
    (("step",), -5, "step: expected an integer >= 0 .* got -5"), (("step",), 1.0, "step: expected an integer"),
    (("step",), ..., "step: expected an integer .* got nothing"), (("best_loss",), None, "best_loss: expected a finite number"),
    (("best_loss",), math.nan, "best_loss: expected a finite number, got nan"), (("best_loss",), "a", "best_loss: expected a"),
    (("text_hash",), 5, "text_hash: expected a string, got 5"), (("config",), [1], "config: expected a dict, got list"),
    (("config", "steps"), "a", "config: steps: expected an integer"), (("config", "nonsense"), 1, "config: .*nonsense"),
    (("model",), [], "model: expected a dict, got list"), (("model",), {}, "model: expected the entries of this model"),
    (("model", 1), torch.ones(1), "model: expected keys of type str, got 1"),
    (("model", WEIGHT), "a", f"model.{WEIGHT}: expected a torch.Tensor, got str"),
    (("model", WEIGHT), torch.ones(2, 3), rf"model.{WEIGHT}: expected shape .*, got \(2, 3\)"),
    (("model", WEIGHT), torch.tensor(math.nan), f"model.{WEIGHT}: expected finite floating-point numbers"),
    (("model", WEIGHT), torch.ones(1, dtype=torch.int64), f"model.{WEIGHT}: expected finite floating-point numbers"),
    (("model", WEIGHT), torch.ones(1, device="meta"), f"model.{WEIGHT}: expected "),
    (("optimizer",), {}, "optimizer.state: expected a dict"), (("optimizer",), None, "optimizer: expected a dict, got NoneType"),
    (("optimizer", "param_groups"), [], "optimizer.param_groups: expected the parameters of the model"),
    (("optimizer", "param_groups"), {}, "optimizer.param_groups: expected a list"),
    (("optimizer", "param_groups"), [1, 2], r"optimizer.param_groups\[0\]: expected a dict"),
    (("optimizer", "state"), [], "optimizer.state: expected a dict, got list"),
    (("optimizer", "state", 0), ..., "optimizer.state: expected an entry for each"),
    (("optimizer", "state", 0), {}, "optimizer.state.0: expected the entries of this model, got .*exp_avg"),
    (("optimizer", "state", 0, "exp_avg"), torch.ones(3), r"optimizer.state.0.exp_avg: expected shape .* got \(3,\)"),
    (("optimizer", "state", 0, "exp_avg"), None, "optimizer.state.0.exp_avg: expected a torch.Tensor, got NoneType"),
]  # fmt: skip


@pytest.mark.parametrize("place, value, message", DAMAGES, ids=[".".join(map(str, entry[0])) or "state" for entry in DAMAGES])
def test_a_state_with_a_wrong_entry(place, value, message, run):
    """... stands for a missing one."""
    path = run / "training_state.pt"
    whole = path.read_bytes()
    state = outer = {"state": torch.load(path)}
    *ways, last = ("state", *place)
    for name in ways:
        outer = outer[name]
    outer.pop(last) if value is ... else outer.__setitem__(last, value)
    try:
        torch.save(state["state"], path)
        with pytest.raises(ValueError, match=f"^resume: .*training_state.pt is damaged: {message}"):
            Trainer.resume(run, TEXT)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 1.5}, {"context": 0}, {"heads": True}, {"learning_rate": math.nan}, {"dropout": 1.0}, {"seed": "a"},
        {"weight_decay": math.inf}, {"steps": 0}, {"batch_size": -1}, {"learning_rate": 0.0}, {"grad_clip": math.nan}, {"dtype": "float16"}, {"layers": -1},
    ],
)  # fmt: skip
def test_bad_settings(change):
    (name,) = change
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        replace(TINY, **change)


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


def test_a_run_that_diverges_at_once_can_be_resumed(tmp_path):
    trainer = Trainer(TEXT, replace(TINY, learning_rate=1e30, grad_clip=1e30, warmup=0))
    with pytest.raises(FloatingPointError, match="diverged by step 20.*holds step 0"):
        train(trainer, tmp_path)
    resumed = Trainer.resume(tmp_path, TEXT, learning_rate=1e-3, grad_clip=1.0)
    assert all(torch.equal(weight, weights(Trainer(TEXT, TINY))[name]) for name, weight in weights(resumed).items())


def test_more_steps_go_on_at_the_rate_of_a_longer_run(tmp_path):
    trainer = Trainer(TEXT, replace(TINY, steps=8))
    train(trainer, tmp_path)
    longer = Trainer.resume(tmp_path, TEXT, steps=12)
    assert longer.step == 8 and longer.learning_rate(8) == Trainer(TEXT, replace(TINY, steps=12)).learning_rate(8)
    train(longer, tmp_path)
    assert Trainer.resume(tmp_path, TEXT).step == 12
    with pytest.raises(ValueError, match="steps: expected at least 12, .* got 11"):
        Trainer.resume(tmp_path, TEXT, steps=11)


@pytest.mark.parametrize("where", ["weights", "config", "tokenizer", "state"])
def test_a_save_that_is_cut_off_leaves_a_run(where, tmp_path, monkeypatch):
    trainer = Trainer(TEXT, replace(TINY, steps=2))
    train(trainer, tmp_path)
    before = weights(trainer)
    trainer.train_step()
    names = {
        "weights": "model.safetensors",
        "config": "config.json",
        "tokenizer": "tokenizer.json",
        "state": "training_state.pt",
    }

    class Cut(checkpoints.replacing):
        def __exit__(self, exception, *rest):
            if self.path.name == names[where]:
                raise OSError(28, "No space left on device")
            return super().__exit__(exception, *rest)

    monkeypatch.setattr(checkpoints, "replacing", Cut)
    monkeypatch.setattr("fastgpt.training.trainer.replacing", Cut)
    with pytest.raises(OSError, match=f"^out: {re.escape(str(tmp_path))} cannot be written to: No space left on device$"):
        trainer.save(tmp_path, weights=True)
    monkeypatch.undo()
    resumed = Trainer.resume(tmp_path, TEXT)
    assert resumed.step == 2
    assert all(torch.equal(weight, before[name]) for name, weight in weights(resumed).items())


def no_space(*args, **options):
    raise OSError(28, "No space left on device")


def no_space_for_weights(*args, **options):
    raise SafetensorError("I/O error: No space left on device")


def no_space_for_a_tokenizer(tokenizer, path):
    with writing("path", path, "a file"):
        no_space()


def no_space_for_a_state(*args, **options):
    try:
        no_space()
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


WRITES = {
    "fastgpt.checkpoints.transformers_format.save_file": no_space_for_weights,
    "fastgpt.training.trainer.Tokenizer.save": no_space_for_a_tokenizer,
    "fastgpt.training.trainer.torch.save": no_space_for_a_state,
    "fastgpt.training.trainer.os.getpid": no_space,  # of the lock file
}


@pytest.mark.parametrize("writes", WRITES)
def test_a_save_that_fails_says_why_once(writes, tmp_path, monkeypatch):
    """In the words of the system, where a library's error hides them. A new folder is gone if nothing is in it."""
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(writes, WRITES[writes])
    reason = "I/O error: No space left on device" if "save_file" in writes else "No space left on device"
    for folder in (tmp_path / "new" / "run", tmp_path / "old"):
        with pytest.raises(OSError) as raised:
            try:
                raise FileNotFoundError(2, "No such file or directory")
            except FileNotFoundError:  # which has nothing to do with it
                Trainer(TEXT, TINY).save(folder, weights=True)
        begins = f"out: expected a folder, got '{folder}': " if "getpid" in writes else f"out: {folder} cannot be written to: "
        assert str(raised.value) == begins + reason
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {"config.json", "model.safetensors", "tokenizer.json"}
    assert (tmp_path / "new").exists() == bool(left) and (tmp_path / "old").exists()


def test_a_run_is_neither_read_nor_written_through_links(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    trainer = Trainer(TEXT, replace(TINY, steps=1))
    trainer.save(out, weights=True)
    for name in ("training_state.pt", "training_state.pt.writing", LOCK):
        (out / name).unlink(missing_ok=True)
        elsewhere.write_text("somebody's")
        (out / name).symlink_to(elsewhere)
        if name == "training_state.pt":
            with pytest.raises(ValueError, match="^resume: .*training_state.pt: expected a file in this folder, got a link to"):
                Trainer.resume(out, TEXT)
        if name == LOCK:
            with pytest.raises(OSError, match=f"^out: expected a folder, got .*: {LOCK} in it is a link$"):
                trainer.save(out, weights=True)
        else:
            trainer.save(out, weights=True)
            assert Trainer.resume(out, TEXT).step == 0
        assert elsewhere.read_text() == "somebody's"


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


def test_resuming_what_is_finished_says_how_to_go_on(text_file, tmp_path, capsys):
    arguments = ["train", "--text", str(text_file), "--out", str(tmp_path / "out"), *map(str, SMALL)]
    main([*arguments, "--steps", "2"])
    assert "--steps MORE" not in capsys.readouterr().err
    main([*arguments[:5], "--resume"])
    assert "has done all its 2 steps: --steps MORE continues it" in capsys.readouterr().err
    main([*arguments[:5], "--resume", "--steps", "3"])
    assert "--steps MORE" not in capsys.readouterr().err


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
def test_files_that_are_no_text(content, problem, tmp_path):
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
def test_tokens_of_pieces_are_those_of_the_whole(make, monkeypatch):
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
from fastgpt.training.trainer import TrainConfig, Trainer
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
from fastgpt.training.trainer import claimed
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


def test_two_threads_are_two_runs(tmp_path):
    refused = []

    def second():
        try:
            train(Trainer(TEXT, replace(TINY, steps=1)), tmp_path / "run")
        except ValueError as error:
            refused.append(str(error))

    with claimed(tmp_path / "run"), claimed(tmp_path / "run"):
        (thread := threading.Thread(target=second)).start()
        thread.join()
    assert len(refused) == 1 and refused[0].startswith("out: expected a folder that no other run uses")
    assert not list(tmp_path.iterdir())


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(SystemExit):
        main(["train", "--text", str(tmp_path / "missing"), "--out", str(tmp_path / "a" / "b")])
    assert not list(tmp_path.iterdir())
