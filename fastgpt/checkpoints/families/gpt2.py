"""GPT-2."""

from typing import Any

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import (
    ACTIVATION_NAMES,
    COMMON,
    DROPOUT,
    EPSILON,
    HEADS_EACH,
    LAYERS,
    MLP_WIDTH,
    POSITIONS,
    UNUSED_DROPOUT,
    VOCABULARY,
    WIDTH,
    head_dim_of,
    maybe,
)
from fastgpt.schema import choice, flag, number, only, unsupported

GPT2_SCHEMA = COMMON | {
    "vocab_size": VOCABULARY,
    "n_positions": POSITIONS,
    "n_layer": LAYERS,
    "n_head": HEADS_EACH,
    "n_embd": WIDTH,
    "n_inner": maybe(MLP_WIDTH, None),
    "activation_function": choice(ACTIVATION_NAMES, "gelu_new"),
    "embd_pdrop": DROPOUT,
    "resid_pdrop": number(0.1, least=0, below=1),
    "attn_pdrop": UNUSED_DROPOUT,
    "layer_norm_epsilon": number(1e-5, **EPSILON),
    "scale_attn_weights": only(True, True),
    "scale_attn_by_inverse_layer_idx": unsupported(),
    "add_cross_attention": flag(False),
    "tie_word_embeddings": flag(True),
}


def _gpt2_fields_from(config: dict) -> dict:
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["n_positions"],
        "num_layers": config["n_layer"],
        "num_heads": config["n_head"],
        "hidden_size": config["n_embd"],
        "head_dim": head_dim_of(config, "n_embd", "n_head"),
        "intermediate_size": config["n_inner"],
        "dropout": config["resid_pdrop"],
        "norm_eps": config["layer_norm_epsilon"],
        "activation": ACTIVATION_NAMES[config["activation_function"]],
        "cross_attention": config["add_cross_attention"],
        "tie_embeddings": config["tie_word_embeddings"],
    }


def _gpt2_config_to(config: Any) -> dict:
    return {
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.hidden_size,
        "n_inner": None if config.intermediate_size == 4 * config.hidden_size else config.intermediate_size,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "layer_norm_epsilon": config.norm_eps,
        "add_cross_attention": config.cross_attention,
        "tie_word_embeddings": config.tie_embeddings,
        # transformers' defaults name tokens of OpenAI's vocabulary, which a smaller one does not have.
        "bos_token_id": None,
        "eos_token_id": None,
    }


GPT2 = Family(
    schema=GPT2_SCHEMA,
    fields_from=_gpt2_fields_from,
    config_to=_gpt2_config_to,
    names={
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "blocks.{i}.attention_norm": "h.{i}.ln_1",
        "blocks.{i}.attention.qkv": "h.{i}.attn.c_attn",
        "blocks.{i}.attention.out": "h.{i}.attn.c_proj",
        "blocks.{i}.cross_attention_norm": "h.{i}.ln_cross_attn",
        "blocks.{i}.cross_attention.q": "h.{i}.crossattention.q_attn",
        "blocks.{i}.cross_attention.kv": "h.{i}.crossattention.c_attn",
        "blocks.{i}.cross_attention.out": "h.{i}.crossattention.c_proj",
        "blocks.{i}.mlp_norm": "h.{i}.ln_2",
        "blocks.{i}.mlp.up": "h.{i}.mlp.c_fc",
        "blocks.{i}.mlp.down": "h.{i}.mlp.c_proj",
        "norm": "ln_f",
        "output": "lm_head",
        "score": "score",
        "classifier": "classifier",
    },
    transposed=frozenset(
        f"h.{{i}}.{matrix}"
        for matrix in (
            "attn.c_attn",
            "attn.c_proj",
            "crossattention.q_attn",
            "crossattention.c_attn",
            "crossattention.c_proj",
            "mlp.c_fc",
            "mlp.c_proj",
        )  # fmt: skip
    ),
    prefix="transformer.",
    # Causal masks that old checkpoints carry as buffers.
    ignored=r"\.(attn|crossattention)\.(bias|masked_bias)$",
)
