"""T5, its later versions with a gated MLP and an output matrix of its own, mT5, and their encoders alone."""

from dataclasses import replace
from typing import Any

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import (
    ACTIVATION_NAMES,
    COMMON,
    EPSILON,
    HEADS_EACH,
    LAYERS,
    MLP_WIDTH,
    VOCABULARY,
    WIDTH,
    expect,
    maybe,
)
from fastgpt.model.rope import MAX_POSITIONS
from fastgpt.schema import Field, flag, integer, number, text, unsupported

# Relative positions have no end. What some files say, n_positions, is how long the training texts were; transformers does not read it.
CONTEXT = 1 << 15
T5_SCHEMA: dict[str, Field] = COMMON | {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": integer(1, 2**16, 64),
    "d_ff": MLP_WIDTH,
    "num_layers": LAYERS,
    "num_decoder_layers": maybe(LAYERS, None),
    "num_heads": HEADS_EACH,
    "relative_attention_num_buckets": integer(2, 2**16, 32),
    "relative_attention_max_distance": integer(1, MAX_POSITIONS, 128),
    "dropout_rate": number(0.1, least=0, below=1),
    "layer_norm_epsilon": number(1e-6, **EPSILON),
    "feed_forward_proj": text("relu"),
    "is_encoder_decoder": flag(True),
    "is_decoder": unsupported(),
    "decoder_start_token_id": maybe(integer(0, 2**31 - 1), None),
    "tie_word_embeddings": flag(True),
    "scale_decoder_outputs": maybe(flag(), None),
}


def _activation(config: dict) -> tuple[str, bool]:
    """The activation, and whether it is gated: "relu", "gated-silu", and "gated-gelu" for the approximation of GELU by tanh."""
    given = config["feed_forward_proj"]
    name = given.removeprefix("gated-")
    names = ", ".join(map(repr, ACTIVATION_NAMES))
    expect(name in ACTIVATION_NAMES, "feed_forward_proj", f"one of {names}, or one of them after 'gated-'", given)
    return "gelu_tanh" if given == "gated-gelu" else ACTIVATION_NAMES[name], name != given


def _stack_from(config: dict, layers: int, **fields) -> dict:
    activation, gated = _activation(config)
    return {
        "vocab_size": config["vocab_size"],
        "context_length": CONTEXT,
        "num_layers": layers,
        "num_heads": config["num_heads"],
        "hidden_size": config["d_model"],
        "head_dim": config["d_kv"],
        "intermediate_size": config["d_ff"],
        "dropout": config["dropout_rate"],
        "norm": "rms",
        "norm_eps": config["layer_norm_epsilon"],
        "norm_bias": False,
        "norm_first": True,
        "activation": activation,
        "gated": gated,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "position": "relative",
        "relative_buckets": config["relative_attention_num_buckets"],
        "relative_max_distance": config["relative_attention_max_distance"],
        "attention_scale": 1.0,
        **fields,
    }


def _encoder_fields_from(config: dict) -> dict:
    expect(
        config["relative_attention_num_buckets"] >= 4, "relative_attention_num_buckets", "at least 4, two in each direction",
        config["relative_attention_num_buckets"],
    )  # fmt: skip
    exact = config["relative_attention_num_buckets"] // 2  # of the decoder, which has all in one direction
    given = config["relative_attention_max_distance"]
    expect(
        given > exact, "relative_attention_max_distance", f"more than {exact}, half of relative_attention_num_buckets", given
    )
    return _stack_from(config, config["num_layers"], embedding_norm=False)


def _t5_fields_from(config: dict) -> dict:
    layers, start = config["num_decoder_layers"], config["decoder_start_token_id"]
    if start is None:
        start = next((token for token in config["pad_token_id"] or () if token >= 0), 0)
    expect(start < config["vocab_size"], "decoder_start_token_id", f"a token below vocab_size={config['vocab_size']}", start)
    # transformers ties what has no output matrix of its own, and says whether it scales: in earlier versions if it is tied.
    scales = config["tie_word_embeddings"] if config["scale_decoder_outputs"] is None else config["scale_decoder_outputs"]
    decoder = _stack_from(
        config, config["num_layers"] if layers is None else layers, cross_attention=True,
        tie_embeddings=config["tie_word_embeddings"] and scales, logit_scale=config["d_model"] ** -0.5 if scales else 1.0,
    )  # fmt: skip
    return {"encoder": _encoder_fields_from(config), "decoder": decoder, "start_token": start, "share_embedding": True}


def _mt5_fields_from(config: dict) -> dict:
    return _t5_fields_from(config | {"scale_decoder_outputs": False})  # whatever it says


def _encoder_config_to(config: Any) -> dict:
    names = {"gelu_tanh": "gelu"} if config.gated else {"gelu_tanh": "gelu_new"}
    activation = names.get(config.activation, config.activation)
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": config.head_dim,
        "d_ff": config.intermediate_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        "is_encoder_decoder": False,
    }


def _t5_config_to(config: Any) -> dict:
    tied, scales = config.decoder.tie_embeddings, config.decoder.logit_scale != 1
    return _encoder_config_to(config.encoder) | {
        "num_decoder_layers": config.decoder.num_layers,
        "decoder_start_token_id": config.start_token,
        "pad_token_id": 0,
        "eos_token_id": None,
        "is_encoder_decoder": True,
        "tie_word_embeddings": tied,
        "scale_decoder_outputs": scales,
    }


def _block(stack: str, prefix: str, mlp: int) -> dict[str, str | tuple[str, ...]]:
    """The names of a block of a stack, whose MLP is the layer of this number in it."""
    layer = f"{stack}.block.{{i}}.layer"
    return {
        f"{prefix}blocks.{{i}}.attention.qkv": tuple(f"{layer}.0.SelfAttention.{x}" for x in "qkv"),
        f"{prefix}blocks.{{i}}.attention.out": f"{layer}.0.SelfAttention.o",
        f"{prefix}blocks.{{i}}.attention_norm": f"{layer}.0.layer_norm",
        f"{prefix}blocks.{{i}}.mlp.up": f"{layer}.{mlp}.DenseReluDense.wi",
        f"{prefix}blocks.{{i}}.mlp.down": f"{layer}.{mlp}.DenseReluDense.wo",
        f"{prefix}blocks.{{i}}.mlp_norm": f"{layer}.{mlp}.layer_norm",
        f"{prefix}norm": f"{stack}.final_layer_norm",
        f"{prefix}relative_bias": f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
    }


CROSS = "decoder.block.{i}.layer.1"
COPIES = r"^(?:encoder|decoder)\.embed_tokens\.weight$|\.EncDecAttention\.relative_attention_bias\.weight$"


def _gated(stack: str, prefix: str, mlp: int) -> dict[str, tuple[str, ...]]:
    return {f"{prefix}blocks.{{i}}.mlp.up": tuple(f"{stack}.block.{{i}}.layer.{mlp}.DenseReluDense.wi_{n}" for n in (0, 1))}


T5 = Family(
    T5_SCHEMA, _t5_fields_from, _t5_config_to,
    {
        "encoder.token_embedding": "shared",
        "decoder.output": "lm_head",
        **_block("encoder", "encoder.", 1),
        **_block("decoder", "decoder.", 2),
        "decoder.blocks.{i}.cross_attention.q": f"{CROSS}.EncDecAttention.q",
        "decoder.blocks.{i}.cross_attention.kv": tuple(f"{CROSS}.EncDecAttention.{x}" for x in "kv"),
        "decoder.blocks.{i}.cross_attention.out": f"{CROSS}.EncDecAttention.o",
        "decoder.blocks.{i}.cross_attention_norm": f"{CROSS}.layer_norm",
    },
    prefix="", ignored=COPIES, stacks=("encoder", "decoder"), gated=_gated("encoder", "encoder.", 1) | _gated("decoder", "decoder.", 2),
)  # fmt: skip
MT5 = replace(T5, fields_from=_mt5_fields_from)
T5_ENCODER = Family(
    T5_SCHEMA, _encoder_fields_from, _encoder_config_to,
    {"token_embedding": "shared", **_block("encoder", "", 1), "output": "lm_head", "head": "lm_head"},
    prefix="", ignored=rf"{COPIES}|^decoder\.|^lm_head\.", encoder=True, gated=_gated("encoder", "", 1),
)  # fmt: skip
