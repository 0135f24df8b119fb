"""Phi-3."""

from typing import Any

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import DROPOUT, EPSILON, POSITIONS, expect, maybe
from fastgpt.checkpoints.families.llama import LLAMA_NAMES, MISTRAL_SCHEMA, llama_config_to, llama_fields_from, windows_of
from fastgpt.checkpoints.families.rope import PARTIAL
from fastgpt.model.rope import MAX_POSITIONS
from fastgpt.schema import integer, number

PHI3_SCHEMA = MISTRAL_SCHEMA | {
    "partial_rotary_factor": PARTIAL["partial_rotary_factor"],
    "sliding_window": maybe(POSITIONS, None), "rms_norm_eps": number(1e-5, **EPSILON), "embd_pdrop": DROPOUT,
    "resid_pdrop": DROPOUT, "original_max_position_embeddings": integer(2, MAX_POSITIONS, 4096),
}  # fmt: skip


def _phi3_fields_from(config: dict) -> dict:
    dropout = config["resid_pdrop"]
    expect(config["embd_pdrop"] == dropout, "embd_pdrop", f"{dropout!r}, as resid_pdrop", config["embd_pdrop"])
    for where in ("rope_scaling", "rope_parameters"):
        if config[where]:  # what early checkpoints call it
            longrope = {key: "longrope" for key in ("type", "rope_type") if config[where].get(key) in ("su", "yarn")}
            config = config | {where: config[where] | longrope}
    return llama_fields_from(config, dropout=dropout, windows=windows_of(config, config["sliding_window"]), rope_schema=PARTIAL)


def _phi3_config_to(config: Any) -> dict:
    result = llama_config_to(config) | {"embd_pdrop": config.dropout, "resid_pdrop": config.dropout}
    parameters = result.get("rope_parameters", {})
    for key in ("original_max_position_embeddings", "partial_rotary_factor"):
        if key in parameters:
            result[key] = parameters[key]
    return result


PHI3 = Family(
    PHI3_SCHEMA,
    _phi3_fields_from,
    _phi3_config_to,
    LLAMA_NAMES
    | {"blocks.{i}.attention.qkv": "layers.{i}.self_attn.qkv_proj", "blocks.{i}.mlp.up": "layers.{i}.mlp.gate_up_proj"},
)
