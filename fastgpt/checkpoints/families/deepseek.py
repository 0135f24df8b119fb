"""DeepSeek V2 and V3: multi-head latent attention, and mixtures of experts in groups with experts for all tokens beside them."""

import math
from typing import Any

import torch

from fastgpt.checkpoints.families.experts import ROUTER_ENTRIES, expert_names, experts_of, fused_experts
from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import EXPERTS, MAX_HEAD_DIM, MLP_WIDTH, SCALE, WIDTH, expect, maybe
from fastgpt.checkpoints.families.llama import LLAMA_NAMES, LLAMA_SCHEMA, llama_config_to, llama_fields_from
from fastgpt.checkpoints.families.rope import rope_to
from fastgpt.schema import REQUIRED, choice, flag, integer, number, only, unsupported

LATENT_NORM_EPS = 1e-6  # whatever rms_norm_eps is
DEEPSEEK_SCHEMA = LLAMA_SCHEMA | ROUTER_ENTRIES | {
    "head_dim": maybe(integer(1, 2**16), None),  # the rotated dimensions', or another one: it has no effect
    "kv_lora_rank": WIDTH, "q_lora_rank": maybe(WIDTH, REQUIRED), "qk_nope_head_dim": integer(1, MAX_HEAD_DIM),
    "qk_rope_head_dim": integer(2, 256), "v_head_dim": integer(1, MAX_HEAD_DIM), "n_routed_experts": EXPERTS,
    "n_shared_experts": maybe(integer(0, 2**12), REQUIRED), "moe_intermediate_size": MLP_WIDTH, "moe_layer_freq": only(1, 1),
    "mlp_bias": unsupported(),
}  # fmt: skip
DEEPSEEK_V2_SCHEMA = DEEPSEEK_SCHEMA | {
    "first_k_dense_replace": integer(0, 2**16, 0), "routed_scaling_factor": number(1.0, **SCALE),
    "topk_method": choice(("greedy", "group_limited_greedy"), "greedy"), "n_group": maybe(EXPERTS, None),
    "topk_group": maybe(EXPERTS, None), "norm_topk_prob": unsupported(), "scoring_func": only("softmax", "softmax"),
}  # fmt: skip
DEEPSEEK_V3_SCHEMA = DEEPSEEK_SCHEMA | {
    "first_k_dense_replace": integer(0, 2**16, 3), "routed_scaling_factor": number(2.5, **SCALE),
    "topk_method": only("noaux_tc", "noaux_tc"), "n_group": integer(1, 2**12, 8), "topk_group": integer(1, 2**12, 4),
    "norm_topk_prob": flag(True), "scoring_func": only("sigmoid", "sigmoid"), "rope_interleave": only(True, True),
    "num_nextn_predict_layers": integer(0, 2**16, 0, optional=True),
}  # fmt: skip


def _fields_from(config: dict, groups: bool, **routing) -> dict:
    """groups: whether experts are chosen from some of their groups."""
    nope, rotated, heads = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["num_attention_heads"]
    expect(rotated % 2 == 0, "qk_rope_head_dim", "an even number", rotated)
    most = MAX_HEAD_DIM - rotated
    expect(nope <= most, "qk_nope_head_dim", f"at most {most} beside qk_rope_head_dim={rotated}", nope)
    kv_heads = config["num_key_value_heads"]
    expect(kv_heads in (None, heads), "num_key_value_heads", f"num_attention_heads={heads}", kv_heads)
    biases = config["attention_bias"]
    experts, size, shared = (
        experts_of(config, "n_routed_experts"),
        config["moe_intermediate_size"],
        config["n_shared_experts"] or 0,
    )
    expect(size * shared <= 2**24, "n_shared_experts", f"at most {2**24 // size} of moe_intermediate_size={size}", shared)
    layers = tuple(i >= config["first_k_dense_replace"] for i in range(config["num_hidden_layers"]))
    if groups:
        n, top = config["n_group"], config["topk_group"]
        expect(n is not None and experts % n == 0, "n_group", f"a divisor of n_routed_experts={experts}", n)
        least = -(-config["num_experts_per_tok"] // (experts // n))
        expect(top is not None and least <= top <= n, "topk_group", f"from {least} to n_group={n}", top)
        routing |= {"router_groups": n, "router_top_groups": top}
    fields = llama_fields_from(
        config | {"head_dim": rotated}, head_dim=nope + rotated, v_head_dim=config["v_head_dim"], kv_rank=config["kv_lora_rank"],
        q_rank=config["q_lora_rank"], latent_norm_eps=LATENT_NORM_EPS, qkv_bias=biases, out_bias=biases, num_experts=experts,
        experts_per_token=config["num_experts_per_tok"], expert_size=size, shared_expert_size=size * shared or None,
        moe_layers=None if all(layers) else layers, router_fp32=True, router_scale=float(config["routed_scaling_factor"]), **routing,
    )  # fmt: skip
    stored = config["rope_scaling"] or config["rope_parameters"] or {}
    rope, scale = fields["rope"], stored.get("mscale_all_dim")
    if scale and rope.kind != "default" and rope.factor > 1:
        fields["attention_scale"] = fields["head_dim"] ** -0.5 * (0.1 * scale * math.log(rope.factor) + 1) ** 2
    return fields


def mscale_all_dim(config: Any) -> float | None:
    """What makes `attention_scale` of yarn's factor: its square root is 1 + 0.1 mscale_all_dim ln(factor) times 1 / sqrt(D)."""
    if config.attention_scale is None or config.rope.factor <= 1:
        return None
    magnitude = math.sqrt(config.attention_scale * config.head_dim**0.5)
    return float(f"{(magnitude - 1) / (0.1 * math.log(config.rope.factor)):.12g}")


def _config_to(config: Any) -> dict:
    if config.rope is None or config.kv_rank is None or config.num_experts is None:
        return {}
    rope, scale = rope_to(config.rope, config.rope.dim), mscale_all_dim(config)
    if scale is not None:
        rope["mscale_all_dim"] = scale
    return llama_config_to(config) | {
        "head_dim": config.rope.dim, "rope_parameters": rope, "kv_lora_rank": config.kv_rank, "q_lora_rank": config.q_rank,
        "qk_nope_head_dim": config.head_dim - config.rope.dim, "qk_rope_head_dim": config.rope.dim,
        "v_head_dim": config.v_head_dim, "n_routed_experts": config.num_experts,
        "n_shared_experts": (config.shared_expert_size or 0) // config.expert_size, "moe_intermediate_size": config.expert_size,
        "num_experts_per_tok": config.experts_per_token, "n_group": config.router_groups, "topk_group": config.router_top_groups,
        "first_k_dense_replace": sum(not config.has_experts(i) for i in range(config.num_layers)),
        "routed_scaling_factor": config.router_scale,
    }  # fmt: skip


def _pairs(config: Any) -> torch.Tensor:
    """Where the rotated dimensions are, of which pairs are (2n, 2n + 1) in the checkpoint."""
    return torch.cat([torch.arange(0, config.rope.dim, 2), torch.arange(1, config.rope.dim, 2)])


def _query_rows(config: Any) -> torch.Tensor:
    """Of each head, the rotated dimensions are the last ones in the checkpoint."""
    others = config.head_dim - config.rope.dim
    of_head = torch.cat([others + _pairs(config), torch.arange(others)])
    return (torch.arange(0, config.num_heads * config.head_dim, config.head_dim)[:, None] + of_head).flatten()


def _latent_rows(config: Any) -> torch.Tensor:
    return torch.cat([torch.arange(config.kv_rank), config.kv_rank + _pairs(config)])


DEEPSEEK_NAMES = {name: theirs for name, theirs in LLAMA_NAMES.items() if ".qkv" not in name} | expert_names("mlp") | {
    "blocks.{i}.attention.latent.q": "layers.{i}.self_attn.q_proj",
    "blocks.{i}.attention.latent.q_a": "layers.{i}.self_attn.q_a_proj",
    "blocks.{i}.attention.latent.q_a_norm": "layers.{i}.self_attn.q_a_layernorm",
    "blocks.{i}.attention.latent.q_b": "layers.{i}.self_attn.q_b_proj",
    "blocks.{i}.attention.latent.kv_a": "layers.{i}.self_attn.kv_a_proj_with_mqa",
    "blocks.{i}.attention.latent.kv_a_norm": "layers.{i}.self_attn.kv_a_layernorm",
    "blocks.{i}.attention.latent.kv_b": "layers.{i}.self_attn.kv_b_proj",
    "blocks.{i}.mlp.selection_bias": "layers.{i}.mlp.gate.e_score_correction_bias",
    "blocks.{i}.mlp.shared.up": tuple(f"layers.{{i}}.mlp.shared_experts.{x}_proj" for x in ("gate", "up")),
    "blocks.{i}.mlp.shared.down": "layers.{i}.mlp.shared_experts.down_proj",
}  # fmt: skip
ROWS = {
    "blocks.{i}.attention.latent.q": _query_rows, "blocks.{i}.attention.latent.q_b": _query_rows,
    "blocks.{i}.attention.latent.kv_a": _latent_rows,
}  # fmt: skip


def _v2_fields_from(config: dict) -> dict:
    return _fields_from(config, config["topk_method"] == "group_limited_greedy")


def _v2_config_to(config: Any) -> dict:
    grouped = config.router_groups > 1
    result = _config_to(config) | {"topk_method": "group_limited_greedy" if grouped else "greedy"}
    return result if grouped else result | {"n_group": None, "topk_group": None}


DEEPSEEK_V2 = Family(
    DEEPSEEK_V2_SCHEMA, _v2_fields_from, _v2_config_to, DEEPSEEK_NAMES, fused=fused_experts(DEEPSEEK_NAMES), row_orders=ROWS
)  # fmt: skip


def _v3_fields_from(config: dict) -> dict:
    fields = _fields_from(
        config, True, router_scoring="sigmoid", router_group_score="top2", router_normalize=config["norm_topk_prob"],
        router_selection_bias=True,
    )  # fmt: skip
    size = fields["num_experts"] // config["n_group"]
    expect(size > 1, "n_group", f"at most n_routed_experts / 2, {fields['num_experts'] // 2}", config["n_group"])
    return fields


def _v3_config_to(config: Any) -> dict:
    return _config_to(config) | {"norm_topk_prob": config.router_normalize, "num_nextn_predict_layers": 0}


DEEPSEEK_V3 = Family(
    DEEPSEEK_V3_SCHEMA, _v3_fields_from, _v3_config_to, DEEPSEEK_NAMES, fused=fused_experts(DEEPSEEK_NAMES), row_orders=ROWS,
    further_layers=lambda config: config.get("num_nextn_predict_layers") or 0,
)  # fmt: skip
