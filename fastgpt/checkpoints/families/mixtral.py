"""Mixtral: Mistral with a mixture of experts in each layer."""

from typing import Any

from fastgpt.checkpoints.families.experts import ROUTER_ENTRIES, expert_names, experts_of, fused_experts
from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import EPSILON, EXPERTS, POSITIONS, maybe
from fastgpt.checkpoints.families.llama import LLAMA_NAMES, MISTRAL_SCHEMA, llama_config_to, llama_fields_from, windows_of
from fastgpt.schema import number, unsupported

MIXTRAL_SCHEMA = MISTRAL_SCHEMA | ROUTER_ENTRIES | {
    "num_local_experts": EXPERTS, "num_experts": unsupported(), "sliding_window": maybe(POSITIONS, None),
    "rms_norm_eps": number(1e-5, **EPSILON), "rope_theta": number(1e6, least=1e-10, most=1e20),
}  # fmt: skip
MIXTRAL_NAMES = {name: theirs for name, theirs in LLAMA_NAMES.items() if ".mlp." not in name}
MIXTRAL_NAMES |= expert_names("block_sparse_moe", "w1", "w3", "w2")


def _mixtral_fields_from(config: dict) -> dict:
    return llama_fields_from(
        config, windows=windows_of(config, config["sliding_window"]), num_experts=experts_of(config, "num_local_experts"),
        experts_per_token=config["num_experts_per_tok"], router_normalize=True,
    )  # fmt: skip


def _mixtral_config_to(config: Any) -> dict:
    return llama_config_to(config) | {
        "num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token
    }  # fmt: skip


MIXTRAL = Family(
    MIXTRAL_SCHEMA, _mixtral_fields_from, _mixtral_config_to, MIXTRAL_NAMES,
    fused=fused_experts(MIXTRAL_NAMES),
)  # fmt: skip
