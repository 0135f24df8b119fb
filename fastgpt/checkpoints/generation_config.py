"""`generation_config.json`: what a checkpoint says about how to generate with it."""

from pathlib import Path

import numpy as np
import torch

from fastgpt import folders, schema
from fastgpt.checkpoints.families.fields import TOKEN_IDS
from fastgpt.checkpoints.files import GENERATION_CONFIG, naming, read_json
from fastgpt.checks import PENALTY

# What it says that `generate` can do, and its names there and here.
GENERATION = {
    "do_sample": schema.Field(lambda name, value: None if value is None else schema.flag().check(name, value), None),
    "temperature": schema.number(None, least=0, optional=True),
    "top_k": schema.integer(0, 2**31 - 1, None, optional=True),
    "top_p": schema.number(None, least=0, most=1, optional=True),
    "min_p": schema.number(None, least=0, most=1, optional=True),
    "repetition_penalty": schema.number(None, **PENALTY, optional=True),
    "no_repeat_ngram_size": schema.integer(0, 2**31 - 1, None, optional=True),
    "max_new_tokens": schema.integer(1, 2**31 - 1, None, optional=True),
    "min_new_tokens": schema.integer(0, 2**31 - 1, None, optional=True),
} | TOKEN_IDS
OFF = {"top_k": 0, "top_p": 0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}  # values that stand for none


def read_generation_config(folder: Path) -> dict:
    """Options of `generate`, and max_new_tokens, from a checkpoint's generation_config.json; {} if there is none.

    As in transformers, the temperature is 1 by default with `"do_sample": true`, and 0 without. Entries for other ways to
    generate, such as beam search, are ignored.

    Raises: ValueError that names the file and the entry.
    """
    path = folders.find(folder, GENERATION_CONFIG)
    if path is None:
        return {}
    content = read_json(path)
    with naming(path):
        stored = schema.read(GENERATION, content)
    if stored["do_sample"]:
        stored["temperature"] = 1.0 if stored["temperature"] is None else stored["temperature"]
    elif stored["do_sample"] is False or stored["temperature"] is not None:
        stored["temperature"] = 0.0
    eos = [token for token in stored["eos_token_id"] or () if token >= 0]
    result = {name: stored[name] for name in GENERATION if name != "do_sample" and name not in TOKEN_IDS} | {"eos": eos or None}
    return {name: value for name, value in result.items() if value is not None and OFF.get(name) != value}


def generation_config(defaults: dict) -> dict:
    """The entries that `read_generation_config` reads as these options."""
    config = {"eos_token_id" if name == "eos" else name: value for name, value in defaults.items()}
    if isinstance(eos := config.get("eos_token_id"), (np.ndarray, torch.Tensor)):
        config["eos_token_id"] = eos.tolist()
    checked = schema.read(GENERATION, config, "generation_defaults.", closed=True)
    config = {name: checked[name] for name in config}
    if config.get("temperature") is not None:
        config["do_sample"] = config["temperature"] > 0
        if not config["do_sample"]:
            del config["temperature"]
    return config
