"""Cohere 2 (Command R7B, Command A)."""

from typing import Any

from fastgpt.checkpoints.families.family import Family, adjacent_pairs
from fastgpt.checkpoints.families.fields import EPSILON, SCALE, without_head_dim
from fastgpt.checkpoints.families.llama import (
    LLAMA_NAMES,
    LLAMA_SCHEMA,
    WINDOW,
    llama_config_to,
    llama_fields_from,
    types_of,
    windows_of,
)
from fastgpt.schema import flag, integer, number, unsupported

COHERE2_SCHEMA = LLAMA_SCHEMA | {
    "layer_norm_eps": number(1e-5, **EPSILON), "logit_scale": number(0.0625, **SCALE), "sliding_window": WINDOW,
    "sliding_window_pattern": integer(1, 2**16, 4), "mlp_bias": unsupported(), "tie_word_embeddings": flag(True),
}  # fmt: skip


def _cohere2_fields_from(config: dict) -> dict:
    full = config["sliding_window_pattern"]
    sliding = [(layer + 1) % full != 0 for layer in range(config["num_hidden_layers"])]
    windows = windows_of(config, config["sliding_window"], sliding)
    rotates = tuple(window is not None for window in windows or (None,) * len(sliding))
    return llama_fields_from(
        without_head_dim(config), norm="layer", norm_eps=config["layer_norm_eps"], norm_bias=False, parallel=True, pre_norms=1,
        logit_scale=config["logit_scale"], windows=windows, rope_layers=None if all(rotates) else rotates,
    )  # fmt: skip


def _cohere2_config_to(config: Any) -> dict:
    result = llama_config_to(config, norm_eps="layer_norm_eps") | {
        "layer_types": types_of(config), "logit_scale": config.logit_scale
    }  # fmt: skip
    del result["head_dim"], result["mlp_bias"]
    return result


COHERE2 = Family(
    COHERE2_SCHEMA,
    _cohere2_fields_from,
    _cohere2_config_to,
    {name: theirs for name, theirs in LLAMA_NAMES.items() if not name.endswith("mlp_norm")},
    qkv_order=adjacent_pairs,
)
