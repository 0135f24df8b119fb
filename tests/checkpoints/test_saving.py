"""Saving: whole or not at all, and as files that others can read."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import raises
from checkpoint_fuzz import CONFIGS
from models import random_ids, random_model
from safetensors import SafetensorError

from fastgpt import GPT, GPTConfig
from fastgpt.checkpoints import transformers_format
from fastgpt.checkpoints.families import FAMILIES
from fastgpt.folders import replacing
from fastgpt.text.tokenizer import Tokenizer


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_save_that_fails_leaves_the_folder_as_it_was(folder, tmp_path, monkeypatch):
    (folder / "generation_config.json").write_text('{"top_k": 7}')
    model, before = GPT.from_pretrained(folder), contents(folder)
    torch.nn.init.zeros_(model.norm.weight)

    def fails(error, message, **changed):
        with monkeypatch.context() as patch, raises(message, error):
            for name, value in changed.items():
                patch.setattr(*((transformers_format, name) if name == "save_file" else (model, name)), value)
            model.save_pretrained(folder)
        assert contents(folder) == before

    def full(weights, path, **options):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    fails(ValueError, "^generation_defaults.top_k: expected", generation_defaults={"top_k": np.array([5])})
    fails(
        ValueError, "^config.json: expected .*got object", checkpoint_config=model.checkpoint_config | {"x_token_id": object()}
    )
    fails(OSError, "^folder: No space left on device for .*", save_file=full)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").mkdir()
    with raises("^folder: .*, got .*: generation_config.json in it is a folder", OSError):
        model.save_pretrained(folder)
    (folder / "generation_config.json").rmdir()
    del before["generation_config.json"]
    monkeypatch.setattr(model.norm, "weight", torch.nn.Parameter(model.norm.weight.to("meta")))
    fails(ValueError, "^model: expected weights, got model.norm.weight on the meta device")


def test_folders_that_cannot_be_written_to_are_named(folder, tmp_path):
    model = GPT.from_pretrained(folder)
    for wrong, error, message in (
        (folder / "config.json", OSError, "got .*config.json: File exists"), ("/proc/nowhere", OSError, "got .*nowhere: No such"),
        (folder / "config.json" / "x", OSError, "got .*x: Not a directory"), ("x" * 5000, OSError, "got x+: File name too long"),
        ("a\0b", ValueError, "expected a path, got 'a"), ("", ValueError, "expected a path"), (5, TypeError, "expected a path"),
    ):  # fmt: skip
        with raises("^folder: .*" + message, error):
            model.save_pretrained(wrong)
        with raises("^path: expected a (file|path)", (error, OSError)):
            Tokenizer.from_corpus("abc").save(folder if isinstance(wrong, Path) else wrong)


def test_numbers_of_numpy_are_saved(folder, tmp_path):
    model = GPT.from_pretrained(folder)
    given = {"temperature": np.float32(0.5), "top_k": np.int64(5), "top_p": np.float64(0.9), "eos": np.array([3, 4])}
    model.generation_defaults, model.checkpoint_config["pad_token_id"] = given, np.int64(1)
    model.save_pretrained(tmp_path / "again")
    again = GPT.from_pretrained(tmp_path / "again")
    assert again.generation_defaults == {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "eos": [3, 4]}
    assert again.checkpoint_config["pad_token_id"] == 1
    for eos in (np.int64(3), torch.tensor(3), [np.uint8(3)], (3,)):
        model.generation_defaults = {"eos": eos}
        model.save_pretrained(tmp_path / "again")
        assert GPT.from_pretrained(tmp_path / "again").generation_defaults == {"eos": [3]}


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_saved_files_have_the_modes_of_files(umask, tmp_path):
    """Not those that safetensors gives its own; and one that is replaced keeps its mode, as when it is written into."""
    model = random_model()
    model.generation_defaults = {"temperature": 0.5}
    model.save_pretrained(tmp_path)
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert {path.name: mode_of(path) for path in tmp_path.iterdir()} == dict.fromkeys(names, 0o640)
    for name, mode in zip(names, (0o600, 0o444, 0o664)):
        (tmp_path / name).chmod(mode)
    model.save_pretrained(tmp_path)
    assert [mode_of(tmp_path / name) for name in names] == [0o600, 0o444, 0o664]
    assert GPT.from_pretrained(tmp_path).generation_defaults == {"temperature": 0.5}


def test_a_link_is_replaced_and_not_written_through(umask, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for name in ("new", "new.writing"):
        elsewhere.write_text("somebody's")
        elsewhere.chmod(0o600)
        (tmp_path / name).symlink_to(elsewhere)
        with replacing(tmp_path / "new") as temporary:
            temporary.write_text("mine")
        assert elsewhere.read_text() == "somebody's" and (tmp_path / "new").read_text() == "mine"
        assert not (tmp_path / "new").is_symlink() and mode_of(tmp_path / "new") == 0o640
        assert not os.path.lexists(tmp_path / "new.writing")
        (tmp_path / "new").unlink()


def test_saving_where_files_have_no_modes(tmp_path, monkeypatch):
    def refuses(*args, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuses)
    monkeypatch.setattr(Path, "chmod", refuses)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("mine")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_write_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "file"
    for content in (None, "before"):
        if content:
            path.write_text(content)
        with pytest.raises(OSError, match="No space"), replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")
        assert [file.read_text() for file in tmp_path.iterdir()] == ([content] if content else [])


@pytest.mark.parametrize("made_before", ["", "a", "a/b", "a/b/c"])
def test_a_save_that_fails_leaves_no_folder(made_before, tmp_path, monkeypatch):
    """But those that were there, empty or not."""

    def full(*args, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    (tmp_path / made_before).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(transformers_format, "save_file", full)
    with pytest.raises(OSError, match="^folder: No space left on device for .*c$"):
        random_model().save_pretrained(tmp_path / "a" / "b" / "c")
    assert sorted(tmp_path.rglob("*")) == before


@torch.no_grad()
def test_saving_and_loading_round_trips(tmp_path):
    """Of an architecture of our own, with every field that its config.json can have."""
    model = GPT(GPTConfig(**FAMILIES["fastgpt"].config_from(next(x for x in CONFIGS if x["model_type"] == "fastgpt")))).eval()
    model.save_pretrained(tmp_path)
    again, ids = GPT.from_pretrained(tmp_path), random_ids(model, 2, 20)
    assert again.config == model.config and torch.equal(again(ids), model(ids))
