"""Where a checkpoint is read from: files, shards, links and the Hub."""

import json

import pytest
import torch
from checkpoint_files import raises, shard
from safetensors.torch import load_file

from fastgpt import GPT


def test_missing_weight_files_are_explained(folder):
    path = folder / "model.safetensors"
    path.rename(folder / "pytorch_model.bin")
    with raises("expected model.safetensors or .*found pytorch_model.bin: only safetensors are read", FileNotFoundError):
        GPT.from_pretrained(folder)
    (folder / "pytorch_model.bin").rename(folder / "training_state.pt")
    with raises("found training_state.pt: the training run there has saved no weights yet", FileNotFoundError):
        GPT.from_pretrained(folder)
    with raises("^model: expected a checkpoint folder, got x+: File name too long", FileNotFoundError):
        GPT.from_pretrained("x" * 5000)
    path.mkdir()
    with raises("expected model.safetensors or", FileNotFoundError):
        GPT.from_pretrained(folder)
    for wrong, error, message in (
        (folder / "config.json", FileNotFoundError, "expected a checkpoint folder, .* is a file$"), (5, TypeError, "model: expected a path"),
        ("", ValueError, "model: expected a path, got an empty string"), ("a\0b", ValueError, "model: expected a path, got 'a"),
        ("\ud800", ValueError, "model: expected a path, got '"), (b"a", TypeError, "model: expected a path, got b'a'"),
    ):  # fmt: skip
        with raises(message, error):
            GPT.from_pretrained(wrong)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/a.safetensors", "x/a.safetensors", "x\\a.safetensors", "C:a.safetensors", "a.safetensors\0", "a" * 300 + ".safetensors", "", "a.bin", 5, None]
)  # fmt: skip
def test_an_index_names_files_in_its_folder(name, folder):
    shard(folder, **{"model.norm.weight": name})
    (folder / "x").mkdir()
    for place in (folder.parent, folder / "x"):
        (place / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    with raises(
        r"index.json: weight_map.model.norm.weight: expected the plain name of a .safetensors file in this folder, got "
    ):
        GPT.from_pretrained(folder)


def test_shards_must_match_the_index(folder):
    weights = load_file(folder / "model.safetensors")
    shard(folder)
    assert torch.equal(GPT.from_pretrained(folder).norm.weight, weights["model.norm.weight"])
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[weight_map["model.norm.weight"]]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": other}}))
    with raises(f"{other} lacks weights: model.norm.weight, which model.safetensors.index.json says is in it"):
        GPT.from_pretrained(folder)
    for content, message in (
        ({}, "weight_map: expected a JSON object, got nothing"),
        ({"weight_map": {}}, "weight_map: expected at least"),
    ):
        index.write_text(json.dumps(content))
        with raises(f"index.json: {message}"):
            GPT.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_links_do_not_lead_out_of_the_folder(name, folder, tmp_path):
    (folder / "generation_config.json").write_text("{}")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with raises(f"{name}: expected a file in this folder, got a link to .*elsewhere"):
        GPT.from_pretrained(folder)
    (tmp_path / "elsewhere").rename(folder / "inside")
    (folder / name).unlink()
    (folder / name).symlink_to("inside")
    GPT.from_pretrained(folder)


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_hub_cache_are_followed(shared, folder, tmp_path):
    """CACHE/models--ID/snapshots/COMMIT/NAME leads to CACHE/models--ID/blobs/HASH, and that, maybe, to CACHE/blobs/HASH."""
    repository = tmp_path / "cache" / "models--someone--model"
    snapshot = repository / "snapshots" / "0123"
    for place in (snapshot, repository / "blobs", tmp_path / "cache" / "blobs"):
        place.mkdir(parents=True)
    for path in folder.iterdir():
        blob = repository / "blobs" / path.stem
        path.rename(tmp_path / "cache" / "blobs" / path.stem if shared else blob)
        if shared:
            blob.symlink_to(f"../../blobs/{path.stem}")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.stem}")
    assert GPT.from_pretrained(snapshot).config.vocab_size == 33


def test_hub(folder, monkeypatch, tmp_path):
    """An id that is no folder is downloaded, and what goes wrong is said in one sentence."""
    import huggingface_hub
    from huggingface_hub import errors

    asked = []

    def snapshot_download(name, allow_patterns, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert GPT.from_pretrained("someone/a-model.1").config.num_kv_heads == 2
    GPT.from_pretrained("someone/a-model.1", revision="v2")
    assert asked == [("someone/a-model.1", {"revision": None}), ("someone/a-model.1", {"revision": "v2"})]
    with raises("^revision: expected None for .*, which is a folder here", ValueError):
        GPT.from_pretrained(folder, revision="main")
    with raises("^revision: expected a string or None, got 5", TypeError):
        GPT.from_pretrained("someone/a-model.1", revision=5)

    def fail(error):
        def raise_it(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", raise_it)

    def of_kind(kind):
        return kind.__new__(kind)

    for error, reason in (
        (OSError("no route to host\nand much more"), "the Hub failed: OSError: no route to host"),
        (of_kind(errors.GatedRepoError), "access must be asked for on its page on the Hub, and then a login: hf auth login"),
        (
            of_kind(errors.RepositoryNotFoundError),
            "the Hub has no such model, or it is private and needs a login: hf auth login",
        ),
        (of_kind(errors.RevisionNotFoundError), "the Hub has no revision 'v9' of it"),
        (errors.LocalEntryNotFoundError("x"), "the Hub cannot be reached, and it has not been downloaded before"),
        (errors.OfflineModeIsEnabled("x"), r"the Hub is not asked in offline mode \(HF_HUB_OFFLINE\)"),
    ):
        fail(error)
        with raises(f"got someone/a-model.1: there is no such folder, and {reason}$", FileNotFoundError):
            GPT.from_pretrained("someone/a-model.1", revision="v9")
    with raises("expected a checkpoint folder, ./nowhere/else/at-all does not exist", FileNotFoundError):
        GPT.from_pretrained("./nowhere/else/at-all")
