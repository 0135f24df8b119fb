"""The state file of a training run: the schema of its entries, and whether they fit a model."""

import math
from pathlib import Path

import torch

from fastgpt import schema
from fastgpt.checks import require_number, require_tensor
from fastgpt.training.config import TrainConfig

ANYTHING = schema.Field(lambda name, value: value)


def _dict_of(kind: type, entry: schema.Field = ANYTHING) -> schema.Field:
    """A dict with keys of one type."""

    def check(name, value):
        if not isinstance(value, dict):
            raise TypeError(f"{name}: expected a dict, got {type(value).__name__}")
        for key in value:
            if type(key) is not kind:
                raise TypeError(f"{name}: expected keys of type {kind.__name__}, got {key!r}")
        return {key: entry.check(f"{name}.{key}", x) for key, x in value.items()}

    return schema.Field(check)


def _numbers(name: str, value) -> torch.Tensor:
    require_tensor(name, value)
    if not value.is_floating_point() or value.device.type != "cpu" or not value.isfinite().all():
        raise ValueError(f"{name}: expected finite floating-point numbers, got {value.dtype} or NaN or infinity")
    return value


def _loss(name: str, value) -> float:
    return math.inf if value == math.inf else require_number(name, value)  # before the first evaluation


def _settings(name: str, value) -> TrainConfig:
    given = _dict_of(str).check(name, value)
    try:
        return TrainConfig(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


TENSORS = _dict_of(str, schema.Field(_numbers))
STATE_ENTRIES = {  # of the file STATE
    "config": schema.Field(_settings),
    "text_hash": schema.text(),
    "step": schema.integer(0, 2**62),
    "best_loss": schema.Field(_loss),
    "model": TENSORS,
    "base": schema.text(None, optional=True),  # with LoRA, the checkpoint whose adapters `model` has
    "optimizer": schema.Field(
        lambda name, value: schema.read(
            {"state": _dict_of(int, TENSORS), "param_groups": schema.several(_dict_of(str))},
            _dict_of(str).check(name, value),
            f"{name}.",
        )
    ),
}


def read_state(path: Path) -> dict:
    """Reads the state that `Trainer.save` wrote, with the types of all entries checked, and its config as a TrainConfig.

    Raises: OSError; ValueError that names the file and what is wrong in it.
    """
    with path.open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # of many types, OSError among them, depending on where the file is damaged
            raise ValueError(f"resume: {path} is damaged: {type(error).__name__}: {error}".splitlines()[0]) from error
    try:
        return schema.read(STATE_ENTRIES, _dict_of(str).check("state", state))
    except (TypeError, ValueError) as error:
        raise ValueError(f"resume: {path} is damaged: {error}") from None


def require_shapes(name: str, given: dict, expected: dict) -> None:
    """Raises ValueError that names an entry, unless two dicts have tensors of the same names and shapes."""
    if given.keys() != expected.keys():
        lacking, more = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
        raise ValueError(f"{name}: expected the entries of this model, got {lacking[:5]} missing and {more[:5]} unexpected")
    for entry, value in given.items():
        if value.shape != expected[entry].shape:
            raise ValueError(f"{name}.{entry}: expected shape {tuple(expected[entry].shape)}, got {tuple(value.shape)}")
