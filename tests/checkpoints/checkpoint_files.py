"""Small checkpoints on disk, and edits of their files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_fuzz import CONFIGS, new_model
from safetensors.torch import load_file, save_file

LLAMA = next(config for config in CONFIGS if config["model_type"] == "llama")

GPT2 = next(config for config in CONFIGS if config["model_type"] == "gpt2")


def write(folder: Path, config: dict) -> Path:
    """A checkpoint with that config.json and random weights."""
    new_model(config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def shard(folder: Path, **changes) -> None:
    """Divides the weights into a.safetensors and b.safetensors; changes: of weight_map, by the name with _ for dots."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: ("a", "b")[i % 2] + ".safetensors" for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        save_file({name: x for name, x in weights.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map | changes}))


def raises(message: str, error=ValueError):
    return pytest.raises(error, match=message)


MEASURE = """
import re, sys, torch
from pathlib import Path
from fastgpt import GPT

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

weights = sys.argv[3] or None
GPT.from_pretrained(sys.argv[2], weights=weights)  # what is loaded and started once is not counted
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
model = GPT.from_pretrained(sys.argv[1], weights=weights)
print((resident("VmHWM") - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""


def peak_of_loading(path: Path, loaded_before: Path, weights: str | None = None) -> float:
    """The most memory that loading a checkpoint takes, in a process of its own, as a multiple of its weights."""
    arguments = [sys.executable, "-c", MEASURE, path, loaded_before, weights or ""]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return float(result.stdout)
