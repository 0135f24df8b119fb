"""Checkpoint folders: `config.json` and `model.safetensors`, read strictly and written atomically."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastgpt import memory
from fastgpt.families import FAMILIES, Family

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def resolve(path: str | Path) -> Path:
    """The folder of a checkpoint."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f"model: expected a checkpoint folder, {path} does not exist or is not a folder")
    return Path(path)


def read_config(folder: str | Path) -> tuple[Family, dict]:
    """The family of a checkpoint and GPTConfig's fields for it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model: expected a checkpoint folder, {folder} does not exist or is not a folder")
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"model: expected {CONFIG} in the checkpoint folder {folder}")
    try:
        config = json.loads(path.read_text())
        model_type = config["model_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"model: {path} is damaged: expected a JSON object with a model_type ({error})") from error
    if model_type not in FAMILIES:
        raise ValueError(f"model: {path} has model_type {model_type!r}, supported: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[model_type], FAMILIES[model_type].config_from(config)
    except KeyError as error:
        raise ValueError(f"model: {path} lacks the entry {error}") from error


def read_weights(model, folder: str | Path, family: Family, *, dtype=None, device=None):
    """Fills a model made on the meta device, tensor by tensor, and returns it.

    Raises ValueError naming the first weights that are missing, unexpected or misshapen.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"model: expected {WEIGHTS} in the checkpoint folder {folder}")
    try:
        with safe_open(path, framework="pt") as file:
            stored = family.stored_names(file.keys())
            parameters = {family.checkpoint_name(name)[0]: name for name in dict(model.named_parameters())}
            _require_same_names(path, stored.keys(), parameters.keys())
            for stored_as, name in parameters.items():
                module, _, attribute = name.rpartition(".")
                weight = file.get_tensor(stored[stored_as])
                transposed = family.checkpoint_name(name)[1]
                weight = weight.t() if transposed else weight
                expected = model.get_parameter(name).shape
                if weight.shape != expected:
                    raise ValueError(
                        f"model: {path}: {stored[stored_as]}: expected shape "
                        f"{tuple(expected[::-1] if transposed else expected)}, "
                        f"got {tuple(weight.shape[::-1] if transposed else weight.shape)}"
                    )
                parameter = memory.empty(expected, dtype=dtype or weight.dtype, device=device).copy_(weight)
                setattr(model.get_submodule(module), attribute, torch.nn.Parameter(parameter))
    except SafetensorError as error:
        raise ValueError(f"model: {path} is damaged: {error}") from error
    return model


def write(model, folder: str | Path, family: str, fields: dict) -> None:
    """Writes a checkpoint that `read_config` and `read_weights` read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, parameter in model.named_parameters():
        stored_as, transposed = FAMILIES[family].checkpoint_name(name)
        weight = parameter.detach()
        weights[stored_as] = (weight.t() if transposed else weight).contiguous()
    with replacing(folder / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    config = FAMILIES[family].config_to(fields) | {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


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
