"""The config.json that a folder would have of the model in a GGUF file."""

import math
from dataclasses import replace
from typing import Any

from fastgpt import schema
from fastgpt.checkpoints.families.fields import (
    EPSILON,
    HEADS_EACH,
    LAYERS,
    MAX_HEAD_DIM,
    MLP_WIDTH,
    POSITIONS,
    SCALE,
    WIDTH,
    maybe,
)
from fastgpt.checkpoints.families.rope import share_of
from fastgpt.checkpoints.gguf_architectures import ARCHITECTURES
from fastgpt.checkpoints.gguf_file import GGUF
from fastgpt.checkpoints.gguf_tensors import GGUFTensor
from fastgpt.checkpoints.loading import DTYPES
from fastgpt.model.rope import FACTOR, MAX_POSITIONS, ROPE_SCHEMA
from fastgpt.schema import choice, integer, number, only, unsupported

ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}
SIZES = {
    "block_count": LAYERS,
    "context_length": POSITIONS,
    "embedding_length": WIDTH,
    "feed_forward_length": MLP_WIDTH,
    "attention.head_count": HEADS_EACH,
}
NOT_SUPPORTED = {
    "expert_count": unsupported(0),
    "attention.causal": only(True, True),
    "use_parallel_residual": unsupported(),
    "rope.dimension_sections": unsupported([0, 0, 0, 0]),
    "attention.shared_kv_layers": unsupported(0),
    "rope.scaling.yarn_log_multiplier": unsupported(0.0),
} | {
    name: unsupported(0.0, 1.0)
    for name in ("logit_scale", "embedding_scale", "residual_scale", "attention.output_scale", "attention.temperature_scale")
} | {name: unsupported(0.0) for name in ("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias")}  # fmt: skip
GPT2_METADATA = SIZES | NOT_SUPPORTED | {"attention.layer_norm_epsilon": number(**EPSILON)}
HEAD_DIM = maybe(integer(1, MAX_HEAD_DIM), None)
METADATA = SIZES | NOT_SUPPORTED | {
    "attention.head_count_kv": maybe(HEADS_EACH, None),
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "attention.layer_norm_rms_epsilon": number(**EPSILON),
    "attention.sliding_window": integer(0, MAX_POSITIONS, None, optional=True),
    "attn_logit_softcapping": number(50.0, **SCALE),
    "final_logit_softcapping": number(30.0, **SCALE),
    "rope.dimension_count": HEAD_DIM,
    "rope.freq_base": replace(ROPE_SCHEMA["theta"], default=10000.0),
    "rope.scaling.type": choice(("none", "linear", "yarn", "longrope"), None),
    "rope.scaling.factor": number(None, least=0, most=FACTOR["most"], optional=True),
    "rope.scale_linear": number(None, least=0, most=FACTOR["most"], optional=True),
    "rope.scaling.original_context_length": integer(0, MAX_POSITIONS, None, optional=True),
    "rope.scaling.attn_factor": replace(ROPE_SCHEMA["attention_factor"], default=1.0),
    "rope.scaling.yarn_attn_factor": number(None, least=1e-3, most=1e3, optional=True),
    "rope.scaling.yarn_ext_factor": unsupported(1.0, -1.0),
    "rope.scaling.yarn_beta_fast": number(None, least=0, most=1e6, optional=True),
    "rope.scaling.yarn_beta_slow": number(None, least=0, most=1e6, optional=True),
}  # fmt: skip
TOKENS = {
    f"tokenizer.ggml.{name}_token_id": integer(-(2**31), 2**32 - 1, None, optional=True)
    for name in ("bos", "eos", "eot", "eom", "padding")
}


def config_of(file: GGUF) -> dict:
    """The config.json that a folder of the same model would have."""
    name, tensors = file.architecture, file.tensors
    known = schema.read(TOKENS, file.metadata)
    vocabulary = tensors["token_embd.weight"].shape[0]
    bos, eos, eot, eom, padding = (token if token is not None and 0 <= token < vocabulary else None for token in known.values())
    ends = sorted({token for token in (eos, eot, eom) if token is not None})
    config: dict[str, Any] = {
        "vocab_size": vocabulary,
        "bos_token_id": bos,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": padding,
    }
    prefix = f"{name}."
    stored = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    if name == "gpt2":
        found = schema.read(GPT2_METADATA, stored, prefix)
        return config | {
            "model_type": "gpt2",
            "n_positions": found["context_length"],
            "n_embd": found["embedding_length"],
            "n_layer": found["block_count"],
            "n_head": found["attention.head_count"],
            "n_inner": found["feed_forward_length"],
            "layer_norm_epsilon": found["attention.layer_norm_epsilon"],
        }
    architecture = ARCHITECTURES[name]
    found = schema.read(METADATA | dict(architecture.schema), stored, prefix)
    heads, window = found["attention.head_count"], found["attention.sliding_window"] or None
    head_dim = found["attention.key_length"] or max(1, found["embedding_length"] // heads)
    if found["attention.value_length"] not in (None, head_dim) and not architecture.latent:
        raise ValueError(
            f"{prefix}attention.value_length: expected {head_dim}, as of keys, got {found['attention.value_length']}"
        )
    rotated = found["rope.dimension_count"] or head_dim
    if rotated > head_dim or rotated != head_dim and not (architecture.partial or architecture.latent):
        raise ValueError(f"{prefix}rope.dimension_count: expected {head_dim}, all of a head's, got {rotated}")
    config |= {
        "model_type": architecture.family or name,
        "max_position_embeddings": found["context_length"],
        "hidden_size": found["embedding_length"],
        "num_hidden_layers": found["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": None if found["attention.head_count_kv"] == heads else found["attention.head_count_kv"],
        "head_dim": head_dim,
        "intermediate_size": found["feed_forward_length"],
        "rope_parameters": _rope(file, found, rotated),
    }
    if found["attention.layer_norm_rms_epsilon"] is not None:
        config["rms_norm_eps"] = found["attention.layer_norm_rms_epsilon"]
    if architecture.partial and (rotated != head_dim or name != "phi3"):
        config["rotary_pct" if name == "gptneox" else "partial_rotary_factor"] = share_of(rotated, head_dim)
    if name == "llama" and window:
        config |= {"model_type": "mistral", "sliding_window": window}
    if name == "phi3":
        config["sliding_window"] = window
        config["original_max_position_embeddings"] = found["rope.scaling.original_context_length"] or found["context_length"]
    if name == "gemma2":
        largest = found["block_count"] == 46  # its queries are scaled as if heads had hidden size / heads
        config |= {
            "query_pre_attn_scalar": found["embedding_length"] // heads if largest else head_dim,
            "attn_logit_softcapping": found["attn_logit_softcapping"],
            "final_logit_softcapping": found["final_logit_softcapping"],
            "sliding_window": window or 4096,
        }
    return config | architecture.config(found | {"head_dim": head_dim, "rope": config["rope_parameters"]}, tensors)


def _rope(file: GGUF, found: dict, rotated: int) -> dict:
    """`rope_parameters` of config.json."""
    rope: dict[str, Any] = {"rope_theta": found["rope.freq_base"], "rope_type": "default"}
    kind, factor = found["rope.scaling.type"], found["rope.scaling.factor"] or found["rope.scale_linear"]
    original, magnitude = (
        found["rope.scaling.original_context_length"] or found["context_length"],
        found["rope.scaling.attn_factor"],
    )
    short, long, both = (
        _rope_factors(file, f"rope_{name}.weight", rotated) for name in ("factors_short", "factors_long", "freqs")
    )
    where = f"{file.architecture}.rope.scaling.type"
    if kind == "yarn":
        if not factor:
            raise ValueError(f"{file.architecture}.rope.scaling.factor: expected a number > 0 for yarn, got {factor!r}")
        derived = 0.1 * math.log(max(factor, 1.0)) + 1.0
        # What converters write as yarn's factor is transformers' attention_factor, in place of the derived one.
        attention = found["rope.scaling.yarn_attn_factor"] or derived * magnitude
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": attention,
        }
        rope |= {f"beta_{x}": found[f"rope.scaling.yarn_beta_{x}"] for x in ("fast", "slow")}
    elif short or long or kind == "longrope":
        if not (short and long):
            missing = "rope_factors_long.weight" if short else "rope_factors_short.weight"
            raise ValueError(f"{where}: expected the tensor {missing} for longrope, got none")
        rope |= {"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": magnitude}
        rope |= {"original_max_position_embeddings": original, "factor": max(1.0, found["context_length"] / original)}
    elif both and any(x != 1 for x in both):
        # Factors on the wavelengths, of Llama 3 for example: longrope, whose factors are the same for all lengths.
        rope |= {"rope_type": "longrope", "short_factor": both, "long_factor": both, "attention_factor": magnitude}
        rope |= {"original_max_position_embeddings": max(2, found["context_length"]), "factor": 1.0}
    elif kind != "none" and factor not in (None, 1.0):
        rope |= {"rope_type": "linear", "factor": factor}
    if both and rope["rope_type"] in ("yarn", "linear"):
        raise ValueError(f"{where}: expected none beside the tensor rope_freqs.weight, got {rope['rope_type']!r}")
    if magnitude != 1 and rope["rope_type"] in ("default", "linear"):
        raise ValueError(f"{file.architecture}.rope.scaling.attn_factor: expected 1.0 for this rotation, got {magnitude!r}")
    return rope


def _rope_factors(file: GGUF, name: str, rotated: int) -> list[float] | None:
    """The numbers of a tensor with one for each rotary pair; None if there is no such tensor."""
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.shape != (rotated // 2,) or tensor.type not in DTYPES:
        raise ValueError(f"{name}: expected {rotated // 2} numbers in F32, got shape {tensor.shape} of {tensor.type}")
    return GGUFTensor(tensor.path, name, tensor.type, tensor.shape, tensor).read(slice(None)).tolist()
