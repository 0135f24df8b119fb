"""OLMo 2 and 3: norms of what attention and MLP return, not of what they read. OLMoE: Llama with norms of queries and keys, and
mixtures of experts."""

from typing import Any

from fastgpt.checkpoints.families.experts import ROUTER_ENTRIES, expert_names, experts_of, fused_experts
from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import EPSILON, EXPERTS
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
from fastgpt.schema import flag, number, unsupported

OLMO2_SCHEMA = LLAMA_SCHEMA | {"rms_norm_eps": number(1e-5, **EPSILON), "mlp_bias": unsupported()}
OLMO_FIELDS: dict[str, Any] = {"pre_norms": 0, "post_norms": True, "qk_norm": True, "qk_norm_per_head": False}
OLMO_NAMES = {name: theirs for name, theirs in LLAMA_NAMES.items() if not name.endswith(("attention_norm", "mlp_norm"))} | {
    "blocks.{i}.attention.q_norm": "layers.{i}.self_attn.q_norm",
    "blocks.{i}.attention.k_norm": "layers.{i}.self_attn.k_norm",
    "blocks.{i}.attention.post_norm": "layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp.post_norm": "layers.{i}.post_feedforward_layernorm",
}


def _olmo2_fields_from(config: dict) -> dict:
    return llama_fields_from(config, **OLMO_FIELDS)


OLMO2 = Family(OLMO2_SCHEMA, _olmo2_fields_from, llama_config_to, OLMO_NAMES)
OLMO3_SCHEMA = OLMO2_SCHEMA | {"sliding_window": WINDOW, "rope_theta": number(5e5, least=1e-10, most=1e20)}


def _olmo3_fields_from(config: dict) -> dict:
    sliding = [(layer + 1) % 4 != 0 for layer in range(config["num_hidden_layers"])]
    windows = windows_of(config, config["sliding_window"], sliding)
    return llama_fields_from(config, windows=windows, local_theta="rope_theta", **OLMO_FIELDS)


def _olmo3_config_to(config: Any) -> dict:
    return llama_config_to(config) | {"layer_types": types_of(config)} | ropes_to(config)


OLMO3 = Family(OLMO3_SCHEMA, _olmo3_fields_from, _olmo3_config_to, OLMO_NAMES)

OLMOE_SCHEMA = OLMO2_SCHEMA | ROUTER_ENTRIES | {
    "num_experts": EXPERTS, "norm_topk_prob": flag(False), "clip_qkv": unsupported(),
}  # fmt: skip
OLMOE_NAMES = {name: theirs for name, theirs in LLAMA_NAMES.items() if ".mlp." not in name} | expert_names("mlp")
OLMOE_NAMES |= {f"blocks.{{i}}.attention.{x}_norm": f"layers.{{i}}.self_attn.{x}_norm" for x in "qk"}


def _olmoe_fields_from(config: dict) -> dict:
    return llama_fields_from(
        config, qk_norm=True, qk_norm_per_head=False, num_experts=experts_of(config, "num_experts"),
        experts_per_token=config["num_experts_per_tok"], router_normalize=config["norm_topk_prob"],
    )  # fmt: skip


def _olmoe_config_to(config: Any) -> dict:
    return llama_config_to(config) | {
        "num_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.router_normalize, "clip_qkv": None,
    }  # fmt: skip


OLMOE = Family(
    OLMOE_SCHEMA, _olmoe_fields_from, _olmoe_config_to, OLMOE_NAMES,
    fused=fused_experts(OLMOE_NAMES),
)  # fmt: skip
