"""The folder of a run: whatever goes wrong with it, it holds a run that can be resumed, of one process."""

import math
import re
import threading
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from training_runs import TEXT, TINY, weights

from fastgpt import folders
from fastgpt.checkpoints import transformers_format as checkpoints
from fastgpt.checks import writing
from fastgpt.training.loop import train
from fastgpt.training.run_folder import LOCK, claimed
from fastgpt.training.trainer import Trainer


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

    class Cut(folders.replacing):
        def __exit__(self, exception, *rest):
            if self.path.name == names[where]:
                raise OSError(28, "No space left on device")
            return super().__exit__(exception, *rest)

    monkeypatch.setattr(checkpoints, "replacing", Cut)
    monkeypatch.setattr("fastgpt.training.trainer.replacing", Cut)
    with pytest.raises(OSError, match=f"^out: No space left on device for {re.escape(str(tmp_path))}$"):
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
    "fastgpt.training.run_folder.os.getpid": no_space,  # of the lock file
}


@pytest.mark.parametrize("writes", WRITES)
def test_a_save_that_fails_says_why_once(writes, tmp_path, monkeypatch):
    """In the words of the system, where a library's error hides them. A new folder is gone if nothing is in it."""
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(writes, WRITES[writes])
    for folder in (tmp_path / "new" / "run", tmp_path / "old"):
        with pytest.raises(OSError) as raised:
            try:
                raise FileNotFoundError(2, "No such file or directory")
            except FileNotFoundError:  # which has nothing to do with it
                Trainer(TEXT, TINY).save(folder, weights=True)
        assert str(raised.value) == f"out: No space left on device for {folder}"
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
