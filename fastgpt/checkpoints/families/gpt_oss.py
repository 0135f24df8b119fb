"""GPT-OSS: mixtures of experts with biases and a clamped activation, attention with sinks, and windows in every other layer."""

from typing import Any

from fastgpt.checkpoints.families.experts import ROUTER_ENTRIES, experts_of
from fastgpt.checkpoints.families.family import Family, Fused
from fastgpt.checkpoints.families.fields import EPSILON, EXPERTS, MAX_HEAD_DIM, POSITIONS, maybe
from fastgpt.checkpoints.families.llama import (
    LLAMA_NAMES,
    LLAMA_SCHEMA,
    llama_config_to,
    llama_fields_from,
    types_of,
    windows_of,
)
from fastgpt.ops.experts import ALPHA, CLAMPED, LIMIT
from fastgpt.schema import flag, integer, number, only, unsupported

GPT_OSS_SCHEMA = LLAMA_SCHEMA | ROUTER_ENTRIES | {
    "num_local_experts": EXPERTS, "num_experts": unsupported(), "sliding_window": maybe(POSITIONS, 128),
    "head_dim": maybe(integer(1, MAX_HEAD_DIM), 64), "rms_norm_eps": number(1e-5, **EPSILON),
    "rope_theta": number(150000.0, least=1e-10, most=1e20), "attention_bias": flag(True), "mlp_bias": unsupported(),
    "hidden_act": only("silu", "silu"), "swiglu_alpha": only(ALPHA, ALPHA), "swiglu_limit": only(LIMIT, LIMIT),
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip  # where nothing else is said
EXPERT = "layers.{i}.mlp.experts.{e}"
GPT_OSS_NAMES = {name: theirs for name, theirs in LLAMA_NAMES.items() if ".mlp." not in name} | {
    "blocks.{i}.attention.sinks": "layers.{i}.self_attn.sinks",
    "blocks.{i}.mlp.router": "layers.{i}.mlp.router",
    "blocks.{i}.mlp.experts.up": (f"{EXPERT}.gate_proj", f"{EXPERT}.up_proj"),
    "blocks.{i}.mlp.experts.down": f"{EXPERT}.down_proj",
}
FUSED = {
    f"layers.{{i}}.mlp.experts.{name}{suffix}": Fused(
        tuple(f"{EXPERT}.{part}.{kind}" for part in parts), kind == "weight", len(parts) > 1
    )
    for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)))
    for suffix, kind in (("", "weight"), ("_bias", "bias"))
}


def _gpt_oss_fields_from(config: dict) -> dict:
    if not config["rope_parameters"] and not config["rope_scaling"]:
        config = config | {"rope_parameters": YARN}
    sliding = [layer % 2 == 0 for layer in range(config["num_hidden_layers"])]
    return llama_fields_from(
        config, windows=windows_of(config, config["sliding_window"], sliding), activation="hidden_act",
        num_experts=experts_of(config, "num_local_experts"), experts_per_token=config["num_experts_per_tok"], router_bias=True,
        router_normalize=True, mlp_bias=True, attention_sinks=True,
    ) | {"activation": CLAMPED}  # fmt: skip


def _gpt_oss_config_to(config: Any) -> dict:
    return llama_config_to(config) | {
        "hidden_act": "silu", "num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token,
        "layer_types": types_of(config), "swiglu_alpha": ALPHA, "swiglu_limit": LIMIT, "mlp_bias": False,
    }  # fmt: skip


GPT_OSS = Family(
    GPT_OSS_SCHEMA, _gpt_oss_fields_from, _gpt_oss_config_to, GPT_OSS_NAMES, fused=FUSED, writes_fused=True
)  # fmt: skip
