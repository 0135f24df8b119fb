"""Checkpoint folders: `config.json` and safetensors, found or downloaded, read strictly and written atomically."""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastgpt import memory
from fastgpt.families import FAMILIES, HEADS, Family, architecture, family_of

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
PIECE = 32 << 20  # bytes of a file that are mapped at a time: what is mapped counts as this process's memory


def resolve(path: str | Path) -> Path:
    """The folder of a checkpoint: `path` itself, or what the Hugging Face Hub has under that id, downloaded.

    Raises: FileNotFoundError where there is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)):
        raise FileNotFoundError(f"model: expected a checkpoint folder, {path} does not exist or is not a folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # of half a dozen kinds: no network, no such id, no permission, no space, ...
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"model: expected a checkpoint folder or the id of one on the Hugging Face Hub, {path} is no folder, and the "
            f"Hub did not give it: {type(error).__name__}: {reason}"
        ) from error


def read_config(folder: Path, head: str | None = None) -> tuple[Family, dict, dict]:
    """The family of a checkpoint, its config.json, and GPTConfig's fields for it.

    head: one of HEADS that it must have; None: it must have none of them.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"model: expected {CONFIG} in the checkpoint folder {folder}")
    config = _read_json(path)
    if "model_type" not in config:
        raise ValueError(f"model: {path} is damaged: expected a JSON object with a model_type")
    model_type = config["model_type"]
    if model_type not in FAMILIES:
        raise ValueError(f"model: {path} has model_type {model_type!r}, supported: {', '.join(FAMILIES)}")
    for stored in config.get("architectures") or []:
        found = next((known for known in HEADS if stored.endswith(known)), None)
        if found != head:
            loader = "GPT" if stored == architecture(model_type) else HEADS.get(found)
            raise ValueError(
                f"model: {path}: expected the architecture {architecture(model_type, head)}, got {stored}"
                + (f", which fastgpt.{loader} loads" if loader else "")
            )
    try:
        return FAMILIES[model_type], config, FAMILIES[model_type].config_from(config)
    except KeyError as error:
        raise ValueError(f"model: {path} lacks the entry {error}") from error


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"model: {path} is damaged: expected a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"model: {path} is damaged: expected a JSON object, got a {type(value).__name__}")
    return value


def read_weights(model, folder: Path, family: Family, *, dtype=None, device=None):
    """Fills a model, or a head with one, made on the meta device, piece by piece, and returns it.

    Raises ValueError naming the first weights that are missing, unexpected or misshapen.
    """
    files = _weight_files(folder)
    expected = {
        name: parameter for parameter, _ in model.named_parameters() for name in family.checkpoint_names(parameter)[0]
    }
    known = set(expected)
    stored, path = {}, None  # name with prefix -> the file it is in, and its name there
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name, original in family.stored_names(file.keys(), known).items():
                    stored[name] = path, original
        if "lm_head.weight" not in known:  # some store it all the same
            stored.pop("lm_head.weight", None)
            stored.pop(family.prefix + "lm_head.weight", None)
        _require_same_names(files[0] if len(files) == 1 else folder, stored.keys(), known)
        for name, parameter in list(model.named_parameters()):
            names, transposed = family.checkpoint_names(name)
            parts = [_Stored(*stored[part], transposed) for part in names]
            sizes = _rows(model, name, len(parts))
            weight = memory.empty(parameter.shape, dtype=dtype or parts[0].dtype, device=device)
            for part, rows in zip(parts, weight.split(sizes)):
                part.copy_to(rows)
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, torch.nn.Parameter(weight))
    except SafetensorError as error:
        raise ValueError(f"model: {path} is damaged: {error}") from error
    return model


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"model: expected {WEIGHTS} or {INDEX} in the checkpoint folder {folder}")
    shards = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"model: {folder / INDEX} is damaged: expected a weight_map")
    files = [folder / name for name in sorted(set(shards.values()))]
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"model: expected {path.name} in the checkpoint folder {folder}, which {INDEX} names")
    return files


def _rows(model, name: str, parts: int) -> list[int]:
    """How many rows of a parameter each of its parts in a checkpoint has."""
    rows, config = model.get_parameter(name).shape[0], model.config
    if parts == 3:  # queries, keys, values
        return [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    return [rows // parts] * parts


class _Stored:
    """A tensor in a file."""

    def __init__(self, path: Path, name: str, transposed: bool):
        self.path, self.name, self.transposed = path, name, transposed
        with safe_open(path, framework="pt") as file:
            rows = file.get_slice(name)
            self.shape = tuple(rows.get_shape())
            self.dtype = rows[:0].dtype if self.shape else file.get_tensor(name).dtype

    def copy_to(self, target: torch.Tensor) -> None:
        target = target.t() if self.transposed else target
        if self.shape != target.shape:
            raise ValueError(
                f"model: {self.path}: {self.name}: expected shape {tuple(target.shape)}, got {self.shape}"
            )
        row = max(1, target[:1].numel() * self.dtype.itemsize)
        step = max(1, PIECE // row)
        for start in range(0, len(target), step):
            with safe_open(self.path, framework="pt") as file:  # anew: the pages of the last piece are given back
                target[start : start + step] = file.get_slice(self.name)[start : start + step]


def contents(model, head: str | None = None, entries: dict | None = None) -> tuple[dict, dict[str, torch.Tensor]]:
    """What `write` writes: config.json, and the weights by their names, without copies where they lie so already."""
    name = family_of(model.config, model.checkpoint_config.get("model_type"))
    family = FAMILIES[name]
    kept = model.checkpoint_config if model.checkpoint_config.get("model_type") == name else {}
    config = {"model_type": name} | family.config_to(model.config)
    if name != "fastgpt" or head is not None:
        config["architectures"] = [architecture(name, head)]
    config |= {key: value for key, value in kept.items() if key.endswith("_token_id")}
    config |= entries or {}
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    weights = {}
    for parameter, weight in model.named_parameters():
        if parameter == "model.output.weight":  # of the language model that a head was put on
            continue
        names, transposed = family.checkpoint_names(parameter)
        for stored_as, part in zip(names, weight.detach().split(_rows(model, parameter, len(names)))):
            weights[stored_as] = (part.t() if transposed else part).contiguous()
    return config, weights


def write(model, folder: str | Path, head: str | None = None, entries: dict | None = None) -> None:
    """Writes a checkpoint that `read_config` and `read_weights` read.

    head: one of HEADS, if the model is one; entries: of config.json, beyond what its decoder has.
    """
    folder = Path(folder)
    config, weights = contents(model, head, entries)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")
    (folder / INDEX).unlink(missing_ok=True)  # of a checkpoint that was there before, in several files


class replacing:
    """`with replacing(path) as temporary`: what is written to `temporary` appears at `path` whole, or not at all."""

    def __init__(self, path: Path):
        self.path, self.temporary = path, path.with_name(path.name + ".writing")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, exception, *_):
        if exception is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def _require_same_names(path: Path, stored, expected) -> None:
    for what, names in (("lacks", expected - stored), ("has unexpected", stored - expected)):
        if names:
            shown = ", ".join(sorted(names)[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"model: {path} {what} weights: {shown}{more}")
