"""StarCoder 2."""

from typing import Any

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import ACTIVATION_NAMES, DROPOUT, EPSILON, POSITIONS, expect, maybe
from fastgpt.checkpoints.families.llama import LLAMA_NAMES, LLAMA_SCHEMA, llama_config_to, llama_fields_from, windows_of
from fastgpt.schema import choice, flag, number, unsupported

STARCODER2_SCHEMA = LLAMA_SCHEMA | {
    "norm_epsilon": number(1e-5, **EPSILON), "hidden_act": choice(ACTIVATION_NAMES, "gelu_pytorch_tanh"), "use_bias": flag(True),
    "attention_bias": unsupported(), "mlp_bias": unsupported(), "residual_dropout": DROPOUT, "embedding_dropout": DROPOUT,
    "sliding_window": maybe(POSITIONS, None), "tie_word_embeddings": flag(True),
}  # fmt: skip


def _starcoder2_fields_from(config: dict) -> dict:
    bias, dropout = config["use_bias"], config["residual_dropout"]
    expect(
        config["embedding_dropout"] == dropout,
        "embedding_dropout",
        f"{dropout!r}, as residual_dropout",
        config["embedding_dropout"],
    )
    return llama_fields_from(
        config, norm="layer", norm_eps=config["norm_epsilon"], gated=False, qkv_bias=bias, out_bias=bias, mlp_bias=bias,
        dropout=dropout, windows=windows_of(config, config["sliding_window"]),
    )  # fmt: skip


def _starcoder2_config_to(config: Any) -> dict:
    result = llama_config_to(config, norm_eps="norm_epsilon")
    del result["attention_bias"], result["mlp_bias"]
    return result | {
        "use_bias": config.qkv_bias, "residual_dropout": config.dropout, "embedding_dropout": config.dropout
    }  # fmt: skip


STARCODER2 = Family(
    STARCODER2_SCHEMA,
    _starcoder2_fields_from,
    _starcoder2_config_to,
    LLAMA_NAMES | {"blocks.{i}.mlp.up": "layers.{i}.mlp.c_fc", "blocks.{i}.mlp.down": "layers.{i}.mlp.c_proj"},
)
