"""Llama, and what other families have in common with it; Mistral, which differs in its window only."""

from collections.abc import Mapping
from typing import Any

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import (
    ACTIVATION_NAMES,
    COMMON,
    EPSILON,
    HEADS_EACH,
    LAYERS,
    MAX_HEAD_DIM,
    MLP_WIDTH,
    POSITIONS,
    UNUSED_DROPOUT,
    VOCABULARY,
    WIDTH,
    expect,
    head_dim_of,
    maybe,
)
from fastgpt.checkpoints.families.rope import ROPE_ENTRIES, STORED_ROPE_SCHEMA, rope_from, rope_to, ropes_from
from fastgpt.schema import choice, flag, integer, number, several, unsupported

LLAMA_SCHEMA = (
    COMMON
    | ROPE_ENTRIES
    | {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS_EACH,
        "num_key_value_heads": maybe(HEADS_EACH, None),
        "hidden_size": WIDTH,
        "head_dim": maybe(integer(1, MAX_HEAD_DIM), None),
        "intermediate_size": MLP_WIDTH,
        "rms_norm_eps": number(1e-6, **EPSILON),
        "hidden_act": choice(ACTIVATION_NAMES, "silu"),
        "attention_bias": flag(False),
        "mlp_bias": flag(False),
        "attention_dropout": UNUSED_DROPOUT,
        "tie_word_embeddings": flag(False),
        "layer_types": several(choice(("full_attention", "sliding_attention")), None, optional=True),
    }
)


def llama_fields_from(
    config: dict,
    *,
    activation: str = "hidden_act",
    rope_schema: Mapping | None = None,
    local_theta: str | None = None,
    **fields,
) -> dict:
    """config.json of Llama, or of a family that has its entries -> GPTConfig's fields.

    Args:
        activation: the name of that entry.
        rope_schema: of the entries of `rope_parameters`, where a family has others.
        local_theta: see `ropes_from`, of a family whose layers with a window have a rotation of their own.
        fields: what a family has beyond the rest, or instead.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    expect(
        kv_heads is None or heads % kv_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads={heads}", kv_heads
    )
    head_dim = head_dim_of(config, "hidden_size", "num_attention_heads")
    if "windows" not in fields:
        fields["windows"] = windows_of(config, None)
    rope_schema, local = rope_schema or STORED_ROPE_SCHEMA, None
    if local_theta is None:
        rope, context_length = rope_from(config, head_dim, rope_schema)
    else:
        rope, local, context_length = ropes_from(config, head_dim, rope_schema, local_theta)
    return {
        "vocab_size": config["vocab_size"],
        "context_length": context_length,
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "hidden_size": config["hidden_size"],
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": config["intermediate_size"],
        "norm": "rms",
        "norm_eps": config["rms_norm_eps"],
        "activation": ACTIVATION_NAMES[config[activation]],
        "gated": True,
        "qkv_bias": bool(config["attention_bias"]),
        "out_bias": bool(config["attention_bias"]),
        "mlp_bias": bool(config["mlp_bias"]),
        "position": "rotary",
        "rope": rope,
        "local_rope": None if local == rope or fields["windows"] is None else local,
        "tie_embeddings": config["tie_word_embeddings"],
        **fields,
    }


def windows_of(config: dict, window: int | None, sliding: list[bool] | None = None) -> tuple[int | None, ...] | None:
    """The window in layers that have it, as layer_types says or else as `sliding` does. None where no layer has one.

    sliding: which layers have it by default; None: all or none, which layer_types cannot change.
    """
    layers, types = config["num_hidden_layers"], config["layer_types"]
    uniform = sliding is None
    slides = [window is not None] * layers if sliding is None else sliding
    if types is not None:
        expect(len(types) == layers, "layer_types", f"{layers} of them, as many as num_hidden_layers", list(types))
        stored = [kind == "sliding_attention" for kind in types]
        if uniform:
            same = "sliding_attention" if window is not None else "full_attention"
            expect(stored == slides, "layer_types", f"only {same!r}, since sliding_window is {window!r}", list(types))
        slides = stored
    if not any(slides):
        return None
    expect(window is not None, "sliding_window", "an integer >= 1, since layers have sliding_attention", window)
    return tuple(window if slide else None for slide in slides)


def types_of(config: Any) -> list[str]:
    """GPTConfig -> layer_types."""
    return ["full_attention" if config.window(i) is None else "sliding_attention" for i in range(config.num_layers)]


def llama_config_to(config: Any, activation: str = "hidden_act", norm_eps: str = "rms_norm_eps") -> dict:
    """GPTConfig -> the config.json of Llama and of families that have the same entries.

    Args:
        activation, norm_eps: the names of these entries.
    """
    windows = [window for window in config.windows or () if window is not None]
    result = {
        activation: {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        "attention_bias": config.out_bias,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.context_length,
        "mlp_bias": config.mlp_bias,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        norm_eps: config.norm_eps,
        "sliding_window": windows[0] if windows else None,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
        # transformers' defaults name tokens that a smaller vocabulary does not have.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config.rope is not None:
        result["rope_parameters"] = rope_to(config.rope, config.head_dim)
    return result


LLAMA_NAMES: dict[str, str | tuple[str, ...]] = {
    "token_embedding": "embed_tokens",
    "blocks.{i}.attention_norm": "layers.{i}.input_layernorm",
    "blocks.{i}.attention.qkv": tuple(f"layers.{{i}}.self_attn.{x}_proj" for x in "qkv"),
    "blocks.{i}.attention.out": "layers.{i}.self_attn.o_proj",
    "blocks.{i}.mlp_norm": "layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp.up": ("layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj"),
    "blocks.{i}.mlp.down": "layers.{i}.mlp.down_proj",
    "norm": "norm",
    "output": "lm_head",
    "score": "score",
    "classifier": "score",
}
LLAMA = Family(LLAMA_SCHEMA, llama_fields_from, llama_config_to, LLAMA_NAMES)

WINDOW = maybe(POSITIONS, 4096)
MISTRAL_SCHEMA = LLAMA_SCHEMA | {"sliding_window": WINDOW, "attention_bias": unsupported(), "mlp_bias": unsupported()}


def _mistral_fields_from(config: dict) -> dict:
    return llama_fields_from(config, windows=windows_of(config, config["sliding_window"]))


MISTRAL = Family(MISTRAL_SCHEMA, _mistral_fields_from, llama_config_to, LLAMA_NAMES)
