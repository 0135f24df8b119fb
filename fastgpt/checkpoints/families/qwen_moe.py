"""Qwen2-MoE and Qwen3-MoE: Qwen2 and Qwen3 with mixtures of experts, the former with a shared expert that has a gate."""

from typing import Any

from fastgpt.checkpoints.families.experts import (
    LAYER_NUMBERS,
    ROUTER_ENTRIES,
    dense_layers,
    expert_names,
    experts_of,
    fused_experts,
    layers_with_experts,
)
from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import EXPERTS, MAX_HEAD_DIM, MLP_WIDTH, maybe
from fastgpt.checkpoints.families.llama import (
    LLAMA_NAMES,
    LLAMA_SCHEMA,
    llama_config_to,
    llama_fields_from,
    types_of,
    windows_of,
)
from fastgpt.model.rope import MAX_POSITIONS
from fastgpt.schema import flag, integer, only, unsupported

MOE_SCHEMA = LLAMA_SCHEMA | ROUTER_ENTRIES | {
    "num_experts": maybe(EXPERTS, None), "num_local_experts": maybe(EXPERTS, None), "moe_intermediate_size": MLP_WIDTH,
    "norm_topk_prob": flag(False), "decoder_sparse_step": integer(1, 2**16, 1), "mlp_only_layers": LAYER_NUMBERS,
    "use_sliding_window": flag(False), "sliding_window": maybe(integer(0, MAX_POSITIONS), 4096), "mlp_bias": unsupported(),
}  # fmt: skip
MOE_NAMES = LLAMA_NAMES | expert_names("mlp")


def _moe_fields_from(config: dict, sliding: list[bool] | None = None, **fields) -> dict:
    window = config["sliding_window"] or None if config["use_sliding_window"] else None
    return llama_fields_from(
        config, windows=windows_of(config, window, sliding), num_experts=experts_of(config, "num_experts", "num_local_experts"),
        experts_per_token=config["num_experts_per_tok"], expert_size=config["moe_intermediate_size"],
        router_normalize=config["norm_topk_prob"], moe_layers=layers_with_experts(config), **fields,
    )  # fmt: skip


def _moe_config_to(config: Any) -> dict:
    return llama_config_to(config) | {
        "num_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_size, "norm_topk_prob": config.router_normalize, "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers(config), "use_sliding_window": any(config.windows or ()),
    }  # fmt: skip


def _qwen2_moe_fields_from(config: dict) -> dict:
    layers = range(config["num_hidden_layers"])
    slides = [config["use_sliding_window"] and i % 2 == 0 and i < config["max_window_layers"] for i in layers]
    return _moe_fields_from(
        config, slides, qkv_bias=config["qkv_bias"], out_bias=False,
        shared_expert_size=config["shared_expert_intermediate_size"], shared_expert_gate=True,
    )  # fmt: skip


def _qwen2_moe_config_to(config: Any) -> dict:
    return _moe_config_to(config) | {
        "shared_expert_intermediate_size": config.shared_expert_size, "qkv_bias": config.qkv_bias,
        "layer_types": types_of(config),
    }  # fmt: skip


QWEN2_MOE_NAMES = MOE_NAMES | {
    "blocks.{i}.mlp.shared.up": tuple(f"layers.{{i}}.mlp.shared_expert.{x}_proj" for x in ("gate", "up")),
    "blocks.{i}.mlp.shared.down": "layers.{i}.mlp.shared_expert.down_proj",
    "blocks.{i}.mlp.shared_gate": "layers.{i}.mlp.shared_expert_gate",
}
QWEN2_MOE = Family(
    MOE_SCHEMA | {
        "shared_expert_intermediate_size": MLP_WIDTH, "qkv_bias": flag(True), "max_window_layers": integer(0, 2**16, 28),
        "attention_bias": unsupported(),
    },
    _qwen2_moe_fields_from, _qwen2_moe_config_to, QWEN2_MOE_NAMES, fused=fused_experts(MOE_NAMES),
)  # fmt: skip


def _qwen3_moe_fields_from(config: dict) -> dict:
    return _moe_fields_from(config, qk_norm=True)


QWEN3_MOE_NAMES = MOE_NAMES | {f"blocks.{{i}}.attention.{x}_norm": f"layers.{{i}}.self_attn.{x}_norm" for x in "qk"}
QWEN3_MOE = Family(
    MOE_SCHEMA | {"head_dim": maybe(integer(1, MAX_HEAD_DIM), None), "use_qk_norm": only(True, True)},
    _qwen3_moe_fields_from, _moe_config_to, QWEN3_MOE_NAMES, fused=fused_experts(MOE_NAMES),
)  # fmt: skip
