"""SmolLM3: Llama with layers without rotary embedding."""

from typing import Any

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import POSITIONS, expect, maybe
from fastgpt.checkpoints.families.llama import (
    LLAMA_NAMES,
    LLAMA_SCHEMA,
    llama_config_to,
    llama_fields_from,
    types_of,
    windows_of,
)
from fastgpt.schema import flag, integer, number, several

SMOLLM3_SCHEMA = LLAMA_SCHEMA | {
    "rope_theta": number(2e6, least=1e-10, most=1e20), "no_rope_layers": several(integer(0, 1), None, optional=True),
    "no_rope_layer_interval": integer(1, 2**16, 4), "use_sliding_window": flag(False), "sliding_window": maybe(POSITIONS, None),
    "tie_word_embeddings": flag(True),
}  # fmt: skip


def _smollm3_fields_from(config: dict) -> dict:
    layers, rotates = config["num_hidden_layers"], config["no_rope_layers"]  # 1 for layers that do
    if rotates is None:
        rotates = [(layer + 1) % config["no_rope_layer_interval"] != 0 for layer in range(layers)]
    expect(len(rotates) == layers, "no_rope_layers", f"{layers} of them, as many as num_hidden_layers", list(rotates))
    windows = None
    if config["use_sliding_window"]:
        window = config["sliding_window"]
        windows = windows_of(config, window, [window is not None and not rotated for rotated in rotates])
    return llama_fields_from(config, windows=windows, rope_layers=None if all(rotates) else tuple(map(bool, rotates)))


def _smollm3_config_to(config: Any) -> dict:
    return llama_config_to(config) | {
        "layer_types": types_of(config),
        "no_rope_layers": [int(rotates) for rotates in config.rope_layers or [True] * config.num_layers],
        "use_sliding_window": any(config.windows or ()),
    }


SMOLLM3 = Family(SMOLLM3_SCHEMA, _smollm3_fields_from, _smollm3_config_to, LLAMA_NAMES)
