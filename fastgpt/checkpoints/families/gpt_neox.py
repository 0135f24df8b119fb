"""GPT-NeoX, of which Pythia is."""

from typing import Any

import torch

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import ACTIVATION_NAMES, DROPOUT, EPSILON, expect, without_head_dim
from fastgpt.checkpoints.families.llama import LLAMA_SCHEMA, llama_config_to, llama_fields_from
from fastgpt.checkpoints.families.rope import PARTIAL, with_share
from fastgpt.schema import choice, flag, number, unsupported

GPT_NEOX_SCHEMA = LLAMA_SCHEMA | {
    "layer_norm_eps": number(1e-5, **EPSILON), "hidden_act": choice(ACTIVATION_NAMES, "gelu"), "attention_bias": flag(True),
    "use_parallel_residual": flag(True), "hidden_dropout": DROPOUT, "num_key_value_heads": unsupported(), "mlp_bias": unsupported(),
    "rope_theta": unsupported(), "rotary_emb_base": number(1e4, least=1e-10, most=1e20),
    "partial_rotary_factor": unsupported(), "rotary_pct": number(0.25, above=0, most=1),
}  # fmt: skip


def _gpt_neox_fields_from(config: dict) -> dict:
    config = without_head_dim(config)
    if "partial_rotary_factor" not in (config["rope_scaling"] or config["rope_parameters"] or {}):
        rotated = int(config["hidden_size"] // config["num_attention_heads"] * config["rotary_pct"])
        expect(rotated >= 2 and rotated % 2 == 0, "rotary_pct", "an even number of rotated dimensions, 2 or more", rotated)
    theirs = {"rope_theta": config["rotary_emb_base"], "partial_rotary_factor": config["rotary_pct"]}
    return llama_fields_from(
        config | theirs, norm="layer", norm_eps=config["layer_norm_eps"], gated=False, mlp_bias=True,
        parallel=config["use_parallel_residual"], dropout=config["hidden_dropout"], rope_schema=PARTIAL,
    )  # fmt: skip


def _gpt_neox_config_to(config: Any) -> dict:
    result = with_share(llama_config_to(config, norm_eps="layer_norm_eps"), config)
    for entry in ("mlp_bias", "head_dim", "num_key_value_heads"):
        del result[entry]
    if config.rope is not None:
        result |= {"rotary_emb_base": config.rope.theta, "rotary_pct": result.pop("partial_rotary_factor")}
    return result | {"use_parallel_residual": config.parallel, "hidden_dropout": config.dropout}


def _qkv_order(config: Any) -> torch.Tensor:
    """Query, key and value of a head are one below the other there."""
    return torch.arange(3 * config.num_heads * config.head_dim).view(config.num_heads, 3, -1).transpose(0, 1).flatten()


GPT_NEOX = Family(
    GPT_NEOX_SCHEMA,
    _gpt_neox_fields_from,
    _gpt_neox_config_to,
    {
        "token_embedding": "embed_in",
        "blocks.{i}.attention_norm": "layers.{i}.input_layernorm",
        "blocks.{i}.attention.qkv": "layers.{i}.attention.query_key_value",
        "blocks.{i}.attention.out": "layers.{i}.attention.dense",
        "blocks.{i}.mlp_norm": "layers.{i}.post_attention_layernorm",
        "blocks.{i}.mlp.up": "layers.{i}.mlp.dense_h_to_4h",
        "blocks.{i}.mlp.down": "layers.{i}.mlp.dense_4h_to_h",
        "norm": "final_layer_norm",
        "output": "embed_out",
        "score": "score",
        "classifier": "classifier",
    },
    prefix="gpt_neox.",
    ignored=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",  # buffers of old checkpoints
    qkv_order=_qkv_order,
)
