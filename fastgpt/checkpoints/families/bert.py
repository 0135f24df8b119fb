"""BERT, and RoBERTa and DistilBERT, which differ in their positions, types of tokens and heads."""

from typing import Any

from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.fields import (
    ACTIVATION_NAMES,
    COMMON,
    EPSILON,
    HEADS_EACH,
    LAYERS,
    MLP_WIDTH,
    POSITIONS,
    UNUSED_DROPOUT,
    VOCABULARY,
    WIDTH,
    expect,
    head_dim_of,
)
from fastgpt.schema import choice, flag, integer, number, only, unsupported

DROPPED = number(0.1, least=0, below=1)
BERT_SCHEMA = COMMON | {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS_EACH,
    "hidden_size": WIDTH,
    "intermediate_size": MLP_WIDTH,
    "hidden_act": choice(ACTIVATION_NAMES, "gelu"),
    "hidden_dropout_prob": DROPPED,
    "attention_probs_dropout_prob": UNUSED_DROPOUT,
    "type_vocab_size": integer(1, 2**16, 2),
    "layer_norm_eps": number(1e-12, **EPSILON),
    "position_embedding_type": only("absolute", "absolute"),
    "is_decoder": unsupported(),
    "tie_word_embeddings": flag(True),
}


def _bert_fields_from(config: dict, **fields) -> dict:
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "hidden_size": config["hidden_size"],
        "head_dim": head_dim_of(config | {"head_dim": None}, "hidden_size", "num_attention_heads"),
        "intermediate_size": config["intermediate_size"],
        "dropout": config["hidden_dropout_prob"],
        "norm_eps": config["layer_norm_eps"],
        "activation": ACTIVATION_NAMES[config["hidden_act"]],
        "head_activation": ACTIVATION_NAMES[config["hidden_act"]],
        "token_types": config["type_vocab_size"],
        "tie_embeddings": config["tie_word_embeddings"],
        **fields,
    }


def _bert_config_to(config: Any) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


BERT_NAMES: dict[str, str | tuple[str, ...]] = {
    "token_embedding": "embeddings.word_embeddings",
    "type_embedding": "embeddings.token_type_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "blocks.{i}.attention.qkv": tuple(f"encoder.layer.{{i}}.attention.self.{x}" for x in ("query", "key", "value")),
    "blocks.{i}.attention.out": "encoder.layer.{i}.attention.output.dense",
    "blocks.{i}.attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "blocks.{i}.mlp.up": "encoder.layer.{i}.intermediate.dense",
    "blocks.{i}.mlp.down": "encoder.layer.{i}.output.dense",
    "blocks.{i}.mlp_norm": "encoder.layer.{i}.output.LayerNorm",
    "pooler.dense": "pooler.dense",
    "head.transform.dense": "cls.predictions.transform.dense",
    "head.transform.norm": "cls.predictions.transform.LayerNorm",
    "head": "cls.predictions",
    "output": "cls.predictions.decoder",
    "transform.dense": "bert.pooler.dense",
    "score": "classifier",
    "classifier": "classifier",
}
# Names of norms in the first checkpoints, which were TensorFlow's.
RENAMED = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}
BERT = Family(
    BERT_SCHEMA, _bert_fields_from, _bert_config_to, BERT_NAMES, prefix="bert.", encoder=True, renamed=RENAMED,
    ignored=r"\.position_ids$|^cls\.seq_relationship\.",
)  # fmt: skip

ROBERTA_SCHEMA = BERT_SCHEMA | {"pad_token_id": integer(0, 2**20 - 1, 1)}


def _roberta_fields_from(config: dict) -> dict:
    """Positions begin after that of padding, which is its token's id."""
    first, rows = config["pad_token_id"] + 1, config["max_position_embeddings"]
    expect(rows > first, "max_position_embeddings", f"more than pad_token_id + 1, {first}", rows)
    return _bert_fields_from(config, context_length=rows - first, first_position=first, head_activation="gelu")


def _roberta_config_to(config: Any) -> dict:
    rows = config.context_length + config.first_position
    # transformers' defaults of the others name tokens that a smaller vocabulary does not have.
    tokens = {"pad_token_id": config.first_position - 1, "bos_token_id": None, "eos_token_id": None}
    return _bert_config_to(config) | tokens | {"max_position_embeddings": rows}


ROBERTA_NAMES = BERT_NAMES | {
    "head.transform.dense": "lm_head.dense",
    "head.transform.norm": "lm_head.layer_norm",
    "head": "lm_head",
    "output": "lm_head.decoder",
    "transform.dense": "classifier.dense",
    "score": "classifier.out_proj",
}
ROBERTA = Family(
    ROBERTA_SCHEMA, _roberta_fields_from, _roberta_config_to, ROBERTA_NAMES, prefix="roberta.", encoder=True, renamed=RENAMED,
    ignored=r"\.position_ids$",
)  # fmt: skip

DISTILBERT_ENTRIES = {  # its name of an entry of BERT's
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "dim": "hidden_size", "hidden_dim": "intermediate_size",
    "activation": "hidden_act", "dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob",
}  # fmt: skip
DISTILBERT_SCHEMA = (
    {name: field for name, field in BERT_SCHEMA.items() if name not in (*DISTILBERT_ENTRIES.values(), "type_vocab_size")}
    | {theirs: BERT_SCHEMA[name] for theirs, name in DISTILBERT_ENTRIES.items()}
    # Sinusoidal positions are stored as learned ones are.
    | {"sinusoidal_pos_embds": flag(False), "layer_norm_eps": only(1e-12, 1e-12)}
)


def _distilbert_fields_from(config: dict) -> dict:
    head_dim_of(config | {"head_dim": None}, "dim", "n_heads")  # whose errors name these entries
    named = config | {name: config[theirs] for theirs, name in DISTILBERT_ENTRIES.items()} | {"type_vocab_size": 0}
    return _bert_fields_from(named, pooler_activation="relu")


def _distilbert_config_to(config: Any) -> dict:
    theirs = {name: entry for entry, name in DISTILBERT_ENTRIES.items()}
    result = {theirs.get(name, name): value for name, value in _bert_config_to(config).items()}
    for entry in ("type_vocab_size", "layer_norm_eps"):
        del result[entry]
    return result


DISTILBERT_NAMES: dict[str, str | tuple[str, ...]] = {
    "token_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "blocks.{i}.attention.qkv": tuple(f"transformer.layer.{{i}}.attention.{x}_lin" for x in "qkv"),
    "blocks.{i}.attention.out": "transformer.layer.{i}.attention.out_lin",
    "blocks.{i}.attention_norm": "transformer.layer.{i}.sa_layer_norm",
    "blocks.{i}.mlp.up": "transformer.layer.{i}.ffn.lin1",
    "blocks.{i}.mlp.down": "transformer.layer.{i}.ffn.lin2",
    "blocks.{i}.mlp_norm": "transformer.layer.{i}.output_layer_norm",
    "head.transform.dense": "vocab_transform",
    "head.transform.norm": "vocab_layer_norm",
    "head": "vocab_projector",
    "output": "vocab_projector",
    "transform.dense": "pre_classifier",
    "score": "classifier",
    "classifier": "classifier",
}
DISTILBERT = Family(
    DISTILBERT_SCHEMA, _distilbert_fields_from, _distilbert_config_to, DISTILBERT_NAMES, prefix="distilbert.", encoder=True,
    ignored=r"\.position_ids$",
)  # fmt: skip
