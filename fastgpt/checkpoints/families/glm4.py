"""GLM-4, of 2025 (GLM-4-0414)."""

from typing import Any

from fastgpt.checkpoints.families.family import Family, adjacent_pairs
from fastgpt.checkpoints.families.fields import EPSILON, MAX_HEAD_DIM, maybe
from fastgpt.checkpoints.families.llama import LLAMA_NAMES, LLAMA_SCHEMA, llama_config_to, llama_fields_from
from fastgpt.checkpoints.families.rope import PARTIAL, with_share
from fastgpt.schema import flag, integer, number, unsupported

GLM4_SCHEMA = LLAMA_SCHEMA | {
    "head_dim": maybe(integer(1, MAX_HEAD_DIM), 128), "rms_norm_eps": number(1.5625e-7, **EPSILON), "attention_bias": flag(True),
    "mlp_bias": unsupported(), "partial_rotary_factor": number(0.5, above=0, most=1),
}  # fmt: skip


def _glm4_fields_from(config: dict) -> dict:
    return llama_fields_from(config, out_bias=False, post_norms=True, rope_schema=PARTIAL)


def _glm4_config_to(config: Any) -> dict:
    return with_share(llama_config_to(config), config) | {"attention_bias": config.qkv_bias}


GLM4 = Family(
    GLM4_SCHEMA,
    _glm4_fields_from,
    _glm4_config_to,
    LLAMA_NAMES
    | {
        "blocks.{i}.attention.post_norm": "layers.{i}.post_self_attn_layernorm",
        "blocks.{i}.mlp.up": "layers.{i}.mlp.gate_up_proj",
        "blocks.{i}.mlp.post_norm": "layers.{i}.post_mlp_layernorm",
    },
    qkv_order=adjacent_pairs,
)
