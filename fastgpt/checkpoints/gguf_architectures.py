"""Architectures in GGUF files: how each one's tensors are named and laid out, and what its metadata say beyond the common ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastgpt.checkpoints.families.deepseek import mscale_all_dim
from fastgpt.checkpoints.families.family import Fused
from fastgpt.checkpoints.families.fields import EPSILON, LAYERS, MAX_HEAD_DIM, MLP_WIDTH, SCALE, WIDTH, maybe
from fastgpt.model.rope import ROPE_SCHEMA
from fastgpt.schema import Field, flag, integer, number, only, several, unsupported

# Modules of the decoder -> tensors.
NAMES: dict[str, str | tuple[str, ...]] = {
    "token_embedding": "token_embd",
    "position_embedding": "position_embd",
    "blocks.{i}.attention_norm": "blk.{i}.attn_norm",
    "blocks.{i}.attention.qkv": tuple(f"blk.{{i}}.attn_{x}" for x in "qkv"),
    "blocks.{i}.attention.q_norm": "blk.{i}.attn_q_norm",
    "blocks.{i}.attention.k_norm": "blk.{i}.attn_k_norm",
    "blocks.{i}.attention.out": "blk.{i}.attn_output",
    "blocks.{i}.attention.post_norm": "blk.{i}.post_attention_norm",
    "blocks.{i}.mlp_norm": "blk.{i}.ffn_norm",
    "blocks.{i}.mlp.up": ("blk.{i}.ffn_gate", "blk.{i}.ffn_up"),
    "blocks.{i}.mlp.down": "blk.{i}.ffn_down",
    "blocks.{i}.mlp.post_norm": "blk.{i}.post_ffw_norm",
    "blocks.{i}.attention.sinks": "blk.{i}.attn_sinks.weight",
    "blocks.{i}.mlp.router": "blk.{i}.ffn_gate_inp",
    "blocks.{i}.mlp.experts.up": ("blk.{i}.ffn_gate_exps.{e}", "blk.{i}.ffn_up_exps.{e}"),
    "blocks.{i}.mlp.experts.down": "blk.{i}.ffn_down_exps.{e}",
    "blocks.{i}.mlp.shared.up": ("blk.{i}.ffn_gate_shexp", "blk.{i}.ffn_up_shexp"),
    "blocks.{i}.mlp.shared.down": "blk.{i}.ffn_down_shexp",
    "blocks.{i}.mlp.shared_gate": "blk.{i}.ffn_gate_inp_shexp",
    "norm": "output_norm",
    "output": "output",
}
OF_ALL_EXPERTS = {
    f"blk.{{i}}.ffn_{x}_exps.{kind}": Fused((f"blk.{{i}}.ffn_{x}_exps.{{e}}.{kind}",))
    for x in ("gate", "up", "down")
    for kind in ("weight", "bias")
}
FUSED = {"blocks.{i}.attention.qkv": "blk.{i}.attn_qkv", "blocks.{i}.mlp.up": "blk.{i}.ffn_up"}


@dataclass(frozen=True)
class Architecture:
    """How an architecture is stored.

    names: of its tensors, where others have other ones.
    interleaved: rotary pairs of queries and keys are (2n, 2n + 1); the decoder's are (n, n + dim/2).
    norm_offset: of a family, which is added to the weights of norms in the file.
    family: its name in config.json; default: that of the architecture.
    optional_biases: whether files have biases or not.
    partial: whether a share of a head's dimensions can be rotated.
    latent: whether attention is multi-head latent attention, whose values have a head dim of their own.
    schema: of metadata, where it has others, or other ones.
    config: this metadata, and the tensors -> further entries of config.json.
    metadata: GPTConfig -> further metadata.
    """

    names: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    interleaved: bool = False
    norm_offset: float = 0.0
    family: str | None = None
    optional_biases: bool = False
    partial: bool = False
    latent: bool = False
    schema: Mapping[str, Field] = field(default_factory=dict)
    config: Callable[[dict, Mapping], dict] = lambda found, tensors: {}
    metadata: Callable[[Any], dict] = lambda config: {}


UNGATED = {"blocks.{i}.mlp.up": FUSED["blocks.{i}.mlp.up"]}
LAYER_NORM = {
    "attention.layer_norm_rms_epsilon": unsupported(), "attention.layer_norm_epsilon": number(**EPSILON)
}  # fmt: skip
ANY_SCALE = number(None, least=0, most=SCALE["most"], optional=True)  # 0: none
GRANITE_SCALES = {  # metadata -> config.json
    "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier", "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}  # fmt: skip


def _layer_norm(found: dict, tensors: Mapping) -> dict:
    return {"layer_norm_eps": found["attention.layer_norm_epsilon"]}


def _granite(found: dict, tensors: Mapping) -> dict:
    scales = {theirs: found[ours] or 1.0 for ours, theirs in GRANITE_SCALES.items()}
    return scales | {"attention_multiplier": found["attention.scale"] or found["head_dim"] ** -0.5}


def _granite_metadata(config: Any) -> dict:
    return {
        "embedding_scale": float(config.embedding_scale or 1.0), "residual_scale": float(config.residual_scale),
        "attention.scale": float(config.attention_scale or config.head_dim**-0.5), "logit_scale": 1 / config.logit_scale,
    }  # fmt: skip


def _gemma3(found: dict, tensors: Mapping) -> dict:
    largest = found["block_count"] == 62  # its queries are scaled as if heads had hidden size / heads
    return {
        "query_pre_attn_scalar": found["embedding_length"] // found["attention.head_count"] if largest else found["head_dim"],
        "final_logit_softcapping": found["final_logit_softcapping"],
        "sliding_window": found["attention.sliding_window"] or 4096,
        "rope_parameters": {
            "full_attention": found["rope"],
            "sliding_attention": {"rope_type": "default", "rope_theta": found["rope.freq_base_swa"]},
        },
    }


COUNT, SIZE = maybe(integer(0, 2**12), None), maybe(integer(0, 2**24), None)
EXPERTS = {"expert_count": COUNT, "expert_used_count": COUNT, "expert_feed_forward_length": SIZE}


def _experts(count: str, **more: str) -> Callable[[dict, Mapping], dict]:
    """Entries of config.json, count for the number of experts, and others by what they are in metadata."""

    def entries(found: dict, tensors: Mapping) -> dict:
        said = {count: found["expert_count"], "num_experts_per_tok": found["expert_used_count"]}
        return said | {theirs: found[ours] for ours, theirs in more.items()}

    return entries


def _metadata_of_experts(config: Any) -> dict:
    return {"expert_count": config.num_experts, "expert_used_count": config.experts_per_token}


def _metadata_of_moe(config: Any) -> dict:
    return _metadata_of_experts(config) | {"expert_feed_forward_length": config.expert_size}


def _mixtral(found: dict, tensors: Mapping) -> dict:
    if not found["expert_count"]:
        return {}
    return {"model_type": "mixtral", "sliding_window": found["attention.sliding_window"] or None} | _experts(
        "num_local_experts"
    )(found, tensors)


def _gpt_oss(found: dict, tensors: Mapping) -> dict:
    return _experts("num_local_experts")(found, tensors) | {
        "intermediate_size": found["expert_feed_forward_length"] or found["feed_forward_length"],
        "sliding_window": found["attention.sliding_window"] or 128,
        "rope_parameters": found["rope"] | {"truncate": False},  # as the model was trained, though llama.cpp truncates
    }


def _olmo3(found: dict, tensors: Mapping) -> dict:
    """OLMo 3 has windows, and says that it is olmo2."""
    window, pattern = found["attention.sliding_window"], found["attention.sliding_window_pattern"]
    if not window:
        return {}
    local = {"rope_type": "default", "rope_theta": found["rope.freq_base"]}
    entries = {
        "model_type": "olmo3", "sliding_window": window,
        "rope_parameters": {"full_attention": found["rope"], "sliding_attention": local},
    }  # fmt: skip
    if pattern is not None:
        entries["layer_types"] = [f"{'sliding' if slides else 'full'}_attention" for slides in pattern]
    return entries


LATENT_NAMES = {
    "blocks.{i}.attention.latent.q": "blk.{i}.attn_q", "blocks.{i}.attention.latent.q_a": "blk.{i}.attn_q_a",
    "blocks.{i}.attention.latent.q_a_norm": "blk.{i}.attn_q_a_norm", "blocks.{i}.attention.latent.q_b": "blk.{i}.attn_q_b",
    "blocks.{i}.attention.latent.kv_a": "blk.{i}.attn_kv_a_mqa", "blocks.{i}.attention.latent.kv_a_norm": "blk.{i}.attn_kv_a_norm",
    "blocks.{i}.attention.latent.kv_b": "blk.{i}.attn_kv_b", "blocks.{i}.mlp.selection_bias": "blk.{i}.exp_probs_b.bias",
}  # fmt: skip
SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
LATENT_SCHEMA = EXPERTS | {
    # Of the heads; where there are _mla ones, those without it are of the absorbed form, in which all heads share keys and values.
    "attention.key_length": integer(1, 2**16), "attention.value_length": integer(1, 2**16),
    "attention.key_length_mla": maybe(integer(0, MAX_HEAD_DIM), None),
    "attention.value_length_mla": maybe(integer(0, MAX_HEAD_DIM), None),
    "attention.q_lora_rank": SIZE, "attention.kv_lora_rank": WIDTH, "rope.dimension_count": integer(2, MAX_HEAD_DIM),
    "rope.scaling.yarn_log_multiplier": number(0.0, least=0, most=10), "rope.scaling.attn_factor": only(1.0, 1.0),
    "rope.scaling.yarn_attn_factor": unsupported(1.0), "leading_dense_block_count": maybe(LAYERS, None),
    "expert_shared_count": COUNT, "expert_weights_scale": number(None, least=0, most=SCALE["most"], optional=True),
    "expert_weights_norm": flag(False), "expert_gating_func": integer(0, SIGMOID, SOFTMAX),
    "expert_group_count": COUNT, "expert_group_used_count": COUNT, "nextn_predict_layers": unsupported(0),
}  # fmt: skip


def _deepseek(found: dict, tensors: Mapping) -> dict:
    key, value = (found[f"attention.{x}_length_mla"] or found[f"attention.{x}_length"] for x in ("key", "value"))
    rotated, rope, groups = found["rope.dimension_count"], found["rope"], found["expert_group_count"] or 1
    sigmoid = found["expert_gating_func"] == SIGMOID
    if rope["rope_type"] == "yarn":  # its factor scales the products of queries and keys, and not cosines and sines
        rope = rope | {
            "attention_factor": 1.0,
            "mscale_all_dim": float(f"{10 * found['rope.scaling.yarn_log_multiplier']:.6g}"),
        }
    entries = {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2", "head_dim": None, "num_key_value_heads": None,
        "rope_parameters": rope, "qk_rope_head_dim": rotated, "qk_nope_head_dim": key - rotated, "v_head_dim": value,
        "q_lora_rank": found["attention.q_lora_rank"] or None, "kv_lora_rank": found["attention.kv_lora_rank"],
        "n_shared_experts": found["expert_shared_count"], "first_k_dense_replace": found["leading_dense_block_count"] or 0,
        "routed_scaling_factor": found["expert_weights_scale"] or 1.0, "norm_topk_prob": found["expert_weights_norm"],
    }  # fmt: skip
    if sigmoid or groups > 1:
        entries |= {"n_group": groups, "topk_group": found["expert_group_used_count"] or 1}
    if not sigmoid and groups > 1:
        entries["topk_method"] = "group_limited_greedy"
    return entries | _experts("n_routed_experts", expert_feed_forward_length="moe_intermediate_size")(found, tensors)


def _deepseek_metadata(config: Any) -> dict:
    """Without the absorbed form, so that quantized blocks stay as they are: llama.cpp reads both."""
    entries = _metadata_of_moe(config) | {
        "attention.value_length": config.v_head_dim, "attention.kv_lora_rank": config.kv_rank,
        "leading_dense_block_count": sum(not config.has_experts(i) for i in range(config.num_layers)),
        "expert_shared_count": (config.shared_expert_size or 0) // config.expert_size,
        "expert_weights_scale": float(config.router_scale), "expert_weights_norm": config.router_normalize,
        "expert_gating_func": SIGMOID if config.router_scoring == "sigmoid" else SOFTMAX,
        "expert_group_count": config.router_groups, "expert_group_used_count": config.router_top_groups,
    }  # fmt: skip
    if config.q_rank is not None:
        entries["attention.q_lora_rank"] = config.q_rank
    if (scale := mscale_all_dim(config)) is not None:
        entries["rope.scaling.yarn_log_multiplier"] = 0.1 * scale
    return entries


ARCHITECTURES = {  # Mistral's and Mixtral's is llama
    "gpt2": Architecture(FUSED),
    "llama": Architecture(
        interleaved=True, optional_biases=True, schema=EXPERTS, config=_mixtral,
        metadata=lambda config: {} if config.num_experts is None else _metadata_of_experts(config),
    ),
    "qwen2": Architecture(),
    "qwen3": Architecture(optional_biases=True),
    "phi3": Architecture(FUSED, partial=True),
    "gemma": Architecture(norm_offset=1.0),
    "gemma2": Architecture(norm_offset=1.0),
    "gemma3": Architecture(
        norm_offset=1.0, family="gemma3_text", config=_gemma3,
        schema={
            "final_logit_softcapping": number(None, optional=True, **SCALE),
            "rope.freq_base_swa": replace(ROPE_SCHEMA["theta"], default=10000.0),
            "attention.sliding_window_pattern": unsupported(6),
        },
        metadata=lambda config: {"rope.freq_base_swa": float((config.local_rope or config.rope).theta)},
    ),
    "starcoder2": Architecture(
        UNGATED, optional_biases=True, schema=LAYER_NORM,
        config=lambda found, tensors: {
            "norm_epsilon": found["attention.layer_norm_epsilon"], "sliding_window": found["attention.sliding_window"] or None
        },
    ),
    "stablelm": Architecture(
        optional_biases=True, partial=True, schema=LAYER_NORM | {"use_parallel_residual": flag(True)},
        config=lambda found, tensors: _layer_norm(found, tensors) | {
            "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors  # whatever the metadata says, as in llama.cpp
        },
        metadata=lambda config: {"use_parallel_residual": config.parallel},
    ),
    "granite": Architecture(
        interleaved=True, optional_biases=True, schema=dict.fromkeys(GRANITE_SCALES, ANY_SCALE), config=_granite,
        metadata=_granite_metadata,
    ),
    "olmo2": Architecture(
        optional_biases=True, schema={"attention.sliding_window_pattern": several(flag(), None, optional=True)}, config=_olmo3,
    ),
    "smollm3": Architecture(interleaved=True, optional_biases=True),
    "gptneox": Architecture(
        FUSED, family="gpt_neox", optional_biases=True, partial=True,
        schema=LAYER_NORM | {"use_parallel_residual": flag(True)},
        config=lambda found, tensors: _layer_norm(found, tensors) | {"use_parallel_residual": found["use_parallel_residual"]},
        metadata=lambda config: {"use_parallel_residual": config.parallel},
    ),
    "phi2": Architecture(UNGATED, family="phi", partial=True, schema=LAYER_NORM, config=_layer_norm),
    "glm4": Architecture(UNGATED, interleaved=True, optional_biases=True, partial=True),
    "cohere2": Architecture(
        interleaved=True, optional_biases=True, schema=LAYER_NORM | {"logit_scale": number(**SCALE), "attention.sliding_window_pattern": unsupported(4)},
        config=lambda found, tensors: _layer_norm(found, tensors) | {
            "logit_scale": found["logit_scale"], "sliding_window": found["attention.sliding_window"] or 4096
        },
        metadata=lambda config: {"logit_scale": float(config.logit_scale)},
    ),
    # What llama.cpp does whatever the metadata say: weights of Qwen3's experts are normalized, those of Qwen2's and OLMoE's not.
    "qwen2moe": Architecture(
        family="qwen2_moe", schema=EXPERTS | {"expert_shared_feed_forward_length": MLP_WIDTH},
        config=_experts(
            "num_experts", expert_feed_forward_length="moe_intermediate_size",
            expert_shared_feed_forward_length="shared_expert_intermediate_size",
        ),
        metadata=lambda config: _metadata_of_moe(config) | {"expert_shared_feed_forward_length": config.shared_expert_size},
    ),
    "qwen3moe": Architecture(
        family="qwen3_moe", optional_biases=True, schema=EXPERTS, metadata=_metadata_of_moe,
        config=lambda found, tensors: {"norm_topk_prob": True} | _experts(
            "num_experts", expert_feed_forward_length="moe_intermediate_size"
        )(found, tensors),
    ),
    "olmoe": Architecture(optional_biases=True, schema=EXPERTS, config=_experts("num_experts"), metadata=_metadata_of_experts),
    "granitemoe": Architecture(
        interleaved=True, optional_biases=True, schema=dict.fromkeys(GRANITE_SCALES, ANY_SCALE) | EXPERTS,
        config=lambda found, tensors: _granite(found, tensors) | _experts("num_local_experts")(found, tensors),
        metadata=lambda config: _granite_metadata(config) | _metadata_of_experts(config),
    ),
    "deepseek2": Architecture(
        LATENT_NAMES, family="deepseek_v3", latent=True, schema=LATENT_SCHEMA, config=_deepseek, metadata=_deepseek_metadata
    ),
    "gpt-oss": Architecture(
        {"blocks.{i}.mlp_norm": "blk.{i}.post_attention_norm"}, family="gpt_oss", schema=EXPERTS, config=_gpt_oss,
        metadata=_metadata_of_moe,
    ),
}  # fmt: skip
