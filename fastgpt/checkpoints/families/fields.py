"""What the config.json of several families may say, with its ranges, and the fields of GPTConfig."""

from typing import Any

from fastgpt.model.rope import MAX_POSITIONS
from fastgpt.ops.experts import ACTIVATION_NUMBERS
from fastgpt.ops.linear import ACTIVATIONS
from fastgpt.ops.route import GROUP_SCORES, SCORINGS
from fastgpt.schema import OMITTED, Field, choice, flag, integer, number, several, unsupported

# Ranges of sizes. Numbers of elements and bytes of every matrix in them are integers of 64 bits.
VOCABULARY, POSITIONS = integer(1, 2**31 - 1), integer(1, MAX_POSITIONS)
LAYERS, HEADS_EACH, WIDTH, MLP_WIDTH = integer(0, 2**16), integer(1, 2**16), integer(1, 2**20), integer(1, 2**24)
EXPERTS = integer(1, 2**12)  # of a layer, each of which has names of its own
MAX_HEAD_DIM = 576  # of `fastgpt.attention`
EPSILON: dict[str, Any] = {"least": 1e-30, "most": 1e6}  # a row of zeros has no norm without it
SCALE: dict[str, Any] = {"least": 1e-6, "most": 1e6}  # of what a number is multiplied or capped with
ACTIVATION_NAMES = {  # transformers' name -> ours
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip


def maybe(size: Field, default: Any = OMITTED) -> Field:
    """The entry, or null."""
    return Field(lambda name, value: None if value is None else size.check(name, value), default)


DECODER_SCHEMA = {  # GPTConfig's fields
    "vocab_size": VOCABULARY,
    "context_length": POSITIONS,
    "num_layers": LAYERS,
    "num_heads": HEADS_EACH,
    "hidden_size": WIDTH,
    "dropout": number(OMITTED, least=0, below=1),
    "norm_eps": number(OMITTED, **EPSILON),
    "num_kv_heads": maybe(HEADS_EACH),
    "head_dim": maybe(integer(1, 2**16)),
    "v_head_dim": maybe(integer(1, 2**16)),
    "kv_rank": maybe(WIDTH),
    "q_rank": maybe(WIDTH),
    "latent_norm_eps": number(OMITTED, optional=True, **EPSILON),
    "intermediate_size": maybe(MLP_WIDTH),
    "norm": choice(("layer", "rms"), OMITTED),
    "norm_offset": number(OMITTED, least=-1e6, most=1e6),
    "norm_bias": flag(OMITTED),
    "pre_norms": integer(0, 2, OMITTED),
    "post_norms": flag(OMITTED),
    "norm_first": flag(OMITTED),
    "parallel": flag(OMITTED),
    "residual_scale": number(OMITTED, **SCALE),
    "activation": choice(ACTIVATION_NUMBERS, OMITTED),
    "gated": flag(OMITTED),
    "qkv_bias": flag(OMITTED),
    "out_bias": flag(OMITTED),
    "mlp_bias": flag(OMITTED),
    "num_experts": maybe(EXPERTS),
    "experts_per_token": maybe(EXPERTS),
    "expert_size": maybe(MLP_WIDTH),
    "shared_expert_size": maybe(MLP_WIDTH),
    "shared_expert_gate": flag(OMITTED),
    "moe_layers": several(flag(), OMITTED, optional=True),
    "router_bias": flag(OMITTED),
    "router_fp32": flag(OMITTED),
    "router_scoring": choice(SCORINGS, OMITTED),
    "router_groups": integer(1, 2**12, OMITTED),
    "router_top_groups": integer(1, 2**12, OMITTED),
    "router_group_score": choice(GROUP_SCORES, OMITTED),
    "router_normalize": flag(OMITTED),
    "router_scale": number(OMITTED, **SCALE),
    "router_selection_bias": flag(OMITTED),
    "qk_norm": flag(OMITTED),
    "qk_norm_per_head": flag(OMITTED),
    "position": choice(("learned", "sinusoidal", "rotary", "relative", None), OMITTED),
    "relative_buckets": integer(2, 2**16, OMITTED),
    "relative_max_distance": integer(1, MAX_POSITIONS, OMITTED),
    "rope_layers": several(flag(), OMITTED, optional=True),
    "windows": several(maybe(POSITIONS), OMITTED, optional=True),
    "causal": flag(OMITTED),
    "cross_attention": flag(OMITTED),
    "attention_scale": number(OMITTED, optional=True, **SCALE),
    "attention_softcap": number(OMITTED, optional=True, **SCALE),
    "attention_sinks": flag(OMITTED),
    "logit_scale": number(OMITTED, **SCALE),
    "logit_softcap": number(OMITTED, optional=True, **SCALE),
    "embedding_scale": number(OMITTED, optional=True, **SCALE),
    "tie_embeddings": flag(OMITTED),
    "output_bias": flag(OMITTED),
}
ENCODER_SCHEMA = {  # EncoderConfig's, beyond them
    "first_position": integer(0, 2**20, OMITTED),
    "token_types": integer(0, 2**20, OMITTED),
    "embedding_norm": flag(OMITTED),
    "pooler": flag(OMITTED),
    "pooler_activation": choice(("tanh", "relu", None), OMITTED),
    "pooling": choice(("first", "mean"), OMITTED),
    "masked_head": flag(OMITTED),
    "head_activation": choice(ACTIVATIONS, OMITTED),
    "head_bias": flag(OMITTED),
    "vocabulary_bias": flag(OMITTED),
}
# EncoderDecoderConfig's, beside those of its parts.
ENCODER_DECODER_SCHEMA = {"start_token": integer(0, 2**31 - 1, OMITTED), "share_embedding": flag(OMITTED)}

# What changes results where it is said, in any family but those that override it.
NOT_SUPPORTED = {
    name: unsupported()
    for name in (
        "quantization_config", "compression_config", "use_bidirectional_attention", "is_encoder_decoder",
        "add_cross_attention", "alibi", "use_alibi", "use_parallel_residual", "parallel_attn", "use_qk_norm", "qk_layernorm",
        "attention_chunk_size", "no_rope_layers", "no_rope_layer_interval", "rope_local_base_freq", "rope_local_theta",
        "attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "kv_lora_rank",
        "q_lora_rank", "sliding_window",
    )
} | {
    "num_experts": unsupported(0, 1),
    "num_local_experts": unsupported(0, 1),
    "n_routed_experts": unsupported(0),
    "embedding_multiplier": unsupported(1, 1.0),
    "residual_multiplier": unsupported(1, 1.0),
    "logits_scaling": unsupported(1, 1.0),
    "logit_scale": unsupported(1, 1.0),
    "pruned_heads": unsupported({}),
    "mlp_bias": unsupported(),
}  # fmt: skip
TOKEN_ID = integer(-(2**31), 2**31 - 1)  # below 0: no token
TOKEN_IDS = {
    name: several(TOKEN_ID, None, optional=True, or_one=True) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
}
DROPOUT = number(0.0, least=0, below=1)
UNUSED_DROPOUT = number(0.0, least=0, most=1, optional=True)  # of attention weights in training
COMMON = NOT_SUPPORTED | TOKEN_IDS


def expect(condition: bool, name: str, expected: str, got: Any) -> None:
    """Raises ValueError that begins with the name of an entry, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def without_head_dim(config: dict) -> dict:
    """config.json of a family whose heads have hidden_size / num_attention_heads dimensions, whatever it says."""
    given = config["head_dim"]
    config = config | {"head_dim": None}
    head_dim = head_dim_of(config, "hidden_size", "num_attention_heads")
    expect(given in (None, head_dim), "head_dim", f"{head_dim}, hidden_size / num_attention_heads", given)
    return config


def head_dim_of(config: dict, hidden: str, heads: str) -> int:
    """What config.json says, or else hidden size / heads."""
    head_dim = config.get("head_dim")
    if head_dim is None:
        expect(config[hidden] % config[heads] == 0, hidden, f"a multiple of {heads}={config[heads]}", config[hidden])
        head_dim = config[hidden] // config[heads]
        expect(head_dim <= MAX_HEAD_DIM, hidden, f"at most {MAX_HEAD_DIM} for each of {heads}={config[heads]}", config[hidden])
    return head_dim
