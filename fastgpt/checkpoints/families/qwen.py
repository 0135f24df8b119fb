"""Qwen2 and Qwen3."""

from typing import Any

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import MAX_HEAD_DIM, maybe
from fastgpt.checkpoints.families.llama import (
    LLAMA_NAMES,
    LLAMA_SCHEMA,
    WINDOW,
    llama_config_to,
    llama_fields_from,
    types_of,
    windows_of,
)
from fastgpt.schema import flag, integer, only, unsupported

QWEN_SCHEMA = LLAMA_SCHEMA | {
    "sliding_window": WINDOW, "use_sliding_window": flag(False), "max_window_layers": integer(0, 2**16, 28),
    "mlp_bias": unsupported(),
}  # fmt: skip


def _qwen_windows(config: dict) -> tuple[int | None, ...] | None:
    window = config["sliding_window"] if config["use_sliding_window"] else None
    first = config["max_window_layers"]
    return windows_of(config, window, [window is not None and layer >= first for layer in range(config["num_hidden_layers"])])


def _qwen2_fields_from(config: dict) -> dict:
    return llama_fields_from(config, qkv_bias=True, out_bias=False, windows=_qwen_windows(config))


def _qwen_config_to(config: Any) -> dict:
    return llama_config_to(config) | {"layer_types": types_of(config), "use_sliding_window": any(config.windows or ())}


QWEN2 = Family(QWEN_SCHEMA, _qwen2_fields_from, _qwen_config_to, LLAMA_NAMES)


def _qwen3_fields_from(config: dict) -> dict:
    return llama_fields_from(config, qk_norm=True, windows=_qwen_windows(config))


QWEN3 = Family(
    QWEN_SCHEMA | {"head_dim": maybe(integer(1, MAX_HEAD_DIM), 128), "use_qk_norm": only(True, True)},
    _qwen3_fields_from,
    _qwen_config_to,
    LLAMA_NAMES
    | {f"blocks.{{i}}.attention.{x}_norm": f"layers.{{i}}.self_attn.{x}_norm" for x in "qk"},
)  # fmt: skip
