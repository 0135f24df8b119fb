"""ModernBERT."""

from typing import Any

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import ACTIVATION_NAMES, EPSILON, UNUSED_DROPOUT
from fastgpt.checkpoints.families.llama import LLAMA_SCHEMA, llama_config_to, llama_fields_from, types_of, windows_of
from fastgpt.checkpoints.families.rope import ropes_to
from fastgpt.schema import choice, flag, integer, number, unsupported

THETA: dict[str, Any] = {"least": 1e-10, "most": 1e20}
POOLING = {"cls": "first", "mean": "mean"}
MODERNBERT_SCHEMA = LLAMA_SCHEMA | {
    "hidden_activation": choice(ACTIVATION_NAMES, "gelu"), "norm_eps": number(1e-5, **EPSILON), "norm_bias": flag(False),
    "num_key_value_heads": unsupported(), "head_dim": unsupported(), "tie_word_embeddings": flag(True),
    "rope_theta": unsupported(), "global_rope_theta": number(160000.0, **THETA), "local_rope_theta": number(10000.0, **THETA),
    "local_attention": integer(2, 2**31 - 2, 128), "global_attn_every_n_layers": integer(1, 2**16, 3),
    "decoder_bias": flag(True), "classifier_bias": flag(False), "classifier_activation": choice(ACTIVATION_NAMES, "gelu"),
    "classifier_pooling": choice(POOLING, "cls"), "mlp_dropout": number(0.0, least=0, below=1),
    "embedding_dropout": UNUSED_DROPOUT,
}  # fmt: skip


def _modernbert_fields_from(config: dict) -> dict:
    sliding = [layer % config["global_attn_every_n_layers"] != 0 for layer in range(config["num_hidden_layers"])]
    fields = llama_fields_from(
        config | {"rope_theta": config["global_rope_theta"]}, activation="hidden_activation", local_theta="local_rope_theta",
        windows=windows_of(config, config["local_attention"] // 2 + 1, sliding), norm="layer", norm_eps=config["norm_eps"],
    )  # fmt: skip
    return fields | {
        "norm_bias": config["norm_bias"],
        "norm_first": True,
        "dropout": config["mlp_dropout"],
        "pooler_activation": None,
        "pooling": POOLING[config["classifier_pooling"]],
        "head_activation": ACTIVATION_NAMES[config["classifier_activation"]],
        "head_bias": config["classifier_bias"],
        "vocabulary_bias": config["decoder_bias"],
    }


def _modernbert_config_to(config: Any) -> dict:
    result = llama_config_to(config, "hidden_activation", "norm_eps") | ropes_to(config)
    window = result.pop("sliding_window")
    for entry in ("head_dim", "num_key_value_heads"):
        del result[entry]
    return result | {
        "layer_types": types_of(config),
        "local_attention": 128 if window is None else 2 * (window - 1),
        "norm_bias": config.norm_bias,
        "embedding_dropout": config.dropout,
        "attention_dropout": config.dropout,
        "mlp_dropout": config.dropout,
        "classifier_pooling": {ours: theirs for theirs, ours in POOLING.items()}[config.pooling],
        "classifier_activation": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.head_activation, config.head_activation),
        "classifier_bias": config.head_bias,
        "decoder_bias": config.vocabulary_bias,
        "cls_token_id": None,
        "sep_token_id": None,
    }


MODERNBERT = Family(
    MODERNBERT_SCHEMA, _modernbert_fields_from, _modernbert_config_to,
    {
        "token_embedding": "embeddings.tok_embeddings",
        "embedding_norm": "embeddings.norm",
        "blocks.{i}.attention_norm": "layers.{i}.attn_norm",
        "blocks.{i}.attention.qkv": "layers.{i}.attn.Wqkv",
        "blocks.{i}.attention.out": "layers.{i}.attn.Wo",
        "blocks.{i}.mlp_norm": "layers.{i}.mlp_norm",
        "blocks.{i}.mlp.up": "layers.{i}.mlp.Wi",
        "blocks.{i}.mlp.down": "layers.{i}.mlp.Wo",
        "norm": "final_norm",
        "head.transform.dense": "head.dense",
        "head.transform.norm": "head.norm",
        "head": "decoder",
        "output": "decoder",
        "transform.dense": "head.dense",
        "transform.norm": "head.norm",
        "score": "classifier",
        "classifier": "classifier",
    },
    encoder=True,
)  # fmt: skip
