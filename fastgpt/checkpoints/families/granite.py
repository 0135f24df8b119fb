"""Granite: Llama with factors on embeddings, attention scores, residuals and logits; and with mixtures of experts."""

from typing import Any

from fastgpt.checkpoints.families.experts import ROUTER_ENTRIES, experts_of
from fastgpt.checkpoints.families.family import Family, Fused
from fastgpt.checkpoints.families.fields import EXPERTS, SCALE
from fastgpt.checkpoints.families.llama import LLAMA_NAMES, LLAMA_SCHEMA, llama_config_to, llama_fields_from
from fastgpt.schema import number, unsupported

GRANITE_SCHEMA = LLAMA_SCHEMA | {
    name: number(1.0, **SCALE)
    for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
}


def _granite_fields_from(config: dict, **fields) -> dict:
    return llama_fields_from(
        config, **fields, embedding_scale=config["embedding_multiplier"], residual_scale=config["residual_multiplier"],
        attention_scale=config["attention_multiplier"], logit_scale=1 / config["logits_scaling"],
    )  # fmt: skip


def _granite_config_to(config: Any) -> dict:
    return llama_config_to(config) | {
        "embedding_multiplier": config.embedding_scale or 1.0,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.attention_scale or config.head_dim**-0.5,
        "logits_scaling": float(f"{1 / config.logit_scale:.15g}"),  # its reciprocal, without the last bit's error
    }


GRANITE = Family(GRANITE_SCHEMA, _granite_fields_from, _granite_config_to, LLAMA_NAMES)

EXPERT = "layers.{i}.block_sparse_moe.experts.{e}"
GRANITE_MOE_SCHEMA = GRANITE_SCHEMA | ROUTER_ENTRIES | {"num_local_experts": EXPERTS, "num_experts": unsupported()}
GRANITE_MOE_NAMES = {name: theirs for name, theirs in LLAMA_NAMES.items() if ".mlp." not in name} | {
    "blocks.{i}.mlp.router": "layers.{i}.block_sparse_moe.router.layer",
    "blocks.{i}.mlp.experts.up": f"{EXPERT}.input_linear",
    "blocks.{i}.mlp.experts.down": f"{EXPERT}.output_linear",
}


def _granite_moe_fields_from(config: dict) -> dict:
    return _granite_fields_from(
        config, num_experts=experts_of(config, "num_local_experts"), experts_per_token=config["num_experts_per_tok"],
        router_normalize=True,
    )  # fmt: skip


def _granite_moe_config_to(config: Any) -> dict:
    return _granite_config_to(config) | {
        "num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token,
    }  # fmt: skip


GRANITE_MOE = Family(
    GRANITE_MOE_SCHEMA, _granite_moe_fields_from, _granite_moe_config_to, GRANITE_MOE_NAMES, writes_fused=True,
    fused={
        f"layers.{{i}}.block_sparse_moe.{name}.weight": Fused((f"{EXPERT}.{name}.weight",))
        for name in ("input_linear", "output_linear")
    },
)  # fmt: skip
