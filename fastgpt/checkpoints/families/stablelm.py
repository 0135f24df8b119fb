"""StableLM."""

from typing import Any

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import EPSILON, without_head_dim
from fastgpt.checkpoints.families.llama import LLAMA_NAMES, LLAMA_SCHEMA, llama_config_to, llama_fields_from
from fastgpt.checkpoints.families.rope import PARTIAL, with_share
from fastgpt.schema import flag, number, unsupported

STABLELM_SCHEMA = LLAMA_SCHEMA | {
    "partial_rotary_factor": number(0.25, above=0, most=1),
    "layer_norm_eps": number(1e-5, **EPSILON), "use_qkv_bias": flag(False), "use_parallel_residual": flag(False),
    "attention_bias": unsupported(), "mlp_bias": unsupported(), "hidden_dropout": unsupported(0, 0.0),
}  # fmt: skip


def _stablelm_fields_from(config: dict) -> dict:
    parallel = config["use_parallel_residual"]
    return llama_fields_from(
        without_head_dim(config), norm="layer", norm_eps=config["layer_norm_eps"],
        qkv_bias=config["use_qkv_bias"], parallel=parallel, pre_norms=1 if parallel else 2,
        rope_schema=PARTIAL,
    )  # fmt: skip


def _stablelm_config_to(config: Any) -> dict:
    result = llama_config_to(config, norm_eps="layer_norm_eps")
    del result["attention_bias"], result["mlp_bias"], result["head_dim"]
    return with_share(result, config) | {"use_qkv_bias": config.qkv_bias, "use_parallel_residual": config.parallel}


STABLELM = Family(STABLELM_SCHEMA, _stablelm_fields_from, _stablelm_config_to, LLAMA_NAMES)
