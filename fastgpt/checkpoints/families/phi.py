"""Phi 1, 1.5 and 2."""

from typing import Any

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import ACTIVATION_NAMES, DROPOUT, EPSILON, expect, without_head_dim
from fastgpt.checkpoints.families.llama import LLAMA_NAMES, LLAMA_SCHEMA, llama_config_to, llama_fields_from
from fastgpt.checkpoints.families.rope import PARTIAL, with_share
from fastgpt.schema import choice, flag, number, unsupported

PHI_SCHEMA = LLAMA_SCHEMA | {
    "layer_norm_eps": number(1e-5, **EPSILON), "hidden_act": choice(ACTIVATION_NAMES, "gelu_new"), "qk_layernorm": flag(False),
    "resid_pdrop": DROPOUT, "embd_pdrop": DROPOUT, "attention_bias": unsupported(), "mlp_bias": unsupported(),
    "partial_rotary_factor": number(0.5, above=0, most=1), "tie_word_embeddings": flag(False),
}  # fmt: skip


def _phi_fields_from(config: dict) -> dict:
    dropout = config["resid_pdrop"]
    expect(config["embd_pdrop"] == dropout, "embd_pdrop", f"{dropout!r}, as resid_pdrop", config["embd_pdrop"])
    return llama_fields_from(
        without_head_dim(config), norm="layer", norm_eps=config["layer_norm_eps"], gated=False, parallel=True, pre_norms=1,
        qkv_bias=True, out_bias=True, mlp_bias=True, output_bias=not config["tie_word_embeddings"], qk_norm=config["qk_layernorm"],
        dropout=dropout, rope_schema=PARTIAL,
    )  # fmt: skip


def _phi_config_to(config: Any) -> dict:
    result = with_share(llama_config_to(config, norm_eps="layer_norm_eps"), config)
    for entry in ("attention_bias", "mlp_bias", "head_dim"):
        del result[entry]
    activation = {"gelu_tanh": "gelu_new"}.get(config.activation, result["hidden_act"])  # the same, with other rounding
    return result | {
        "hidden_act": activation,
        "qk_layernorm": config.qk_norm,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
    }


PHI = Family(
    PHI_SCHEMA,
    _phi_fields_from,
    _phi_config_to,
    LLAMA_NAMES
    | {
        "blocks.{i}.attention.q_norm": "layers.{i}.self_attn.q_layernorm",
        "blocks.{i}.attention.k_norm": "layers.{i}.self_attn.k_layernorm",
        "blocks.{i}.attention.out": "layers.{i}.self_attn.dense",
        "blocks.{i}.mlp.up": "layers.{i}.mlp.fc1",
        "blocks.{i}.mlp.down": "layers.{i}.mlp.fc2",
        "norm": "final_layernorm",
    },
)
