"""Granite: Llama with factors on embeddings, attention scores, residuals and logits."""

from typing import Any

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import SCALE
from fastgpt.checkpoints.families.llama import LLAMA_NAMES, LLAMA_SCHEMA, llama_config_to, llama_fields_from
from fastgpt.schema import number

GRANITE_SCHEMA = LLAMA_SCHEMA | {
    name: number(1.0, **SCALE)
    for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
}


def _granite_fields_from(config: dict) -> dict:
    return llama_fields_from(
        config, embedding_scale=config["embedding_multiplier"], residual_scale=config["residual_multiplier"],
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
