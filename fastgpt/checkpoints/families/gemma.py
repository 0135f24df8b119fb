"""Gemma and Gemma 2."""

import math
from typing import Any

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import ACTIVATION_NAMES, MAX_HEAD_DIM, SCALE, maybe
from fastgpt.checkpoints.families.llama import (
    LLAMA_NAMES,
    LLAMA_SCHEMA,
    WINDOW,
    llama_config_to,
    llama_fields_from,
    types_of,
    windows_of,
)
from fastgpt.checkpoints.families.rope import ropes_to
from fastgpt.schema import choice, flag, integer, number, unsupported

GEMMA_SCHEMA = LLAMA_SCHEMA | {
    "hidden_act": choice(ACTIVATION_NAMES, "gelu_pytorch_tanh"), "head_dim": maybe(integer(1, MAX_HEAD_DIM), 256),
    "tie_word_embeddings": flag(True), "mlp_bias": unsupported(),
}  # fmt: skip


def _gemma_fields_from(config: dict, activation: str = "hidden_act", **fields) -> dict:
    if config[activation] == "gelu":  # which early checkpoints say, and do not mean
        config = config | {activation: "gelu_pytorch_tanh"}
    scale = math.sqrt(config["hidden_size"])
    return llama_fields_from(config, activation=activation, norm_offset=1.0, embedding_scale=scale, **fields)


GEMMA = Family(GEMMA_SCHEMA, _gemma_fields_from, llama_config_to, LLAMA_NAMES)
GEMMA2_SCHEMA = GEMMA_SCHEMA | {
    "hidden_activation": choice(ACTIVATION_NAMES, "gelu_pytorch_tanh"),
    "query_pre_attn_scalar": number(256, least=1e-6, most=1e10),
    "attn_logit_softcapping": number(50.0, optional=True, **SCALE),
    "final_logit_softcapping": number(30.0, optional=True, **SCALE),
    "sliding_window": WINDOW,
}


def _gemma2_fields_from(config: dict) -> dict:
    layers = range(config["num_hidden_layers"])
    return _gemma_fields_from(
        config, "hidden_activation", post_norms=True,
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=config["attn_logit_softcapping"],
        logit_softcap=config["final_logit_softcapping"],
        windows=windows_of(config, config["sliding_window"], [layer % 2 == 0 for layer in layers]),
    )  # fmt: skip


def _gemma2_config_to(config: Any) -> dict:
    return llama_config_to(config, "hidden_activation") | {
        "layer_types": types_of(config),
        "query_pre_attn_scalar": _as_integer((config.attention_scale or config.head_dim**-0.5) ** -2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _as_integer(x: float) -> int | float:
    return round(x) if math.isclose(x, round(x), rel_tol=1e-9) else x


GEMMA2_NAMES = LLAMA_NAMES | {
    "blocks.{i}.attention.post_norm": "layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp_norm": "layers.{i}.pre_feedforward_layernorm",
    "blocks.{i}.mlp.post_norm": "layers.{i}.post_feedforward_layernorm",
}
GEMMA2 = Family(GEMMA2_SCHEMA, _gemma2_fields_from, _gemma2_config_to, GEMMA2_NAMES)
GEMMA3_SCHEMA = GEMMA2_SCHEMA | {
    "attn_logit_softcapping": unsupported(),  # which transformers ignores
    "final_logit_softcapping": number(None, optional=True, **SCALE),
    "rope_theta": number(1e6, least=1e-10, most=1e20),
    "rope_local_base_freq": number(1e4, least=1e-10, most=1e20),
    "sliding_window_pattern": integer(1, 2**16, 6),
}


def _gemma3_fields_from(config: dict) -> dict:
    full = config["sliding_window_pattern"]
    sliding = [(layer + 1) % full != 0 for layer in range(config["num_hidden_layers"])]
    return _gemma_fields_from(
        config, "hidden_activation", post_norms=True, qk_norm=True,
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        logit_softcap=config["final_logit_softcapping"],
        windows=windows_of(config, config["sliding_window"], sliding),
        local_theta="rope_local_base_freq",
    )  # fmt: skip


def _gemma3_config_to(config: Any) -> dict:
    return _gemma2_config_to(config) | ropes_to(config)


GEMMA3_NAMES = GEMMA2_NAMES | {
    f"blocks.{{i}}.attention.{x}_norm": f"layers.{{i}}.self_attn.{x}_norm" for x in "qk"
}  # fmt: skip
GEMMA3 = Family(GEMMA3_SCHEMA, _gemma3_fields_from, _gemma3_config_to, GEMMA3_NAMES)
