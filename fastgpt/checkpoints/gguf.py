"""Decoders in GGUF files: how metadata maps to a family's config, and tensors to weights, dequantized as they are loaded."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt import schema
from fastgpt.checkpoints.families import FAMILIES
from fastgpt.checkpoints.families.family import Family, Fused
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
from fastgpt.checkpoints.files import naming
from fastgpt.checkpoints.gguf_file import GGUF, TensorInfo, import_gguf, read
from fastgpt.checkpoints.loading import DTYPES, Checkpoint, Stored, by_expert, load_weights
from fastgpt.model.rope import FACTOR, MAX_POSITIONS, ROPE_SCHEMA
from fastgpt.ops.quantized_weight import GGUF_PACKINGS, Packing, Quantization
from fastgpt.schema import Field, choice, flag, integer, number, only, unsupported

QUANTIZED = (  # types of blocks that are served
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S",
    "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip
SERVED = (*DTYPES, *QUANTIZED)
PIECE = 1 << 17  # numbers that are dequantized at a time: they and what they are computed from fit into a cache
ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}
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
    "olmo2": Architecture(optional_biases=True, schema={"attention.sliding_window": unsupported(0)}),  # OLMo 3 says so
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
    "gpt-oss": Architecture(
        {"blocks.{i}.mlp_norm": "blk.{i}.post_attention_norm"}, family="gpt_oss", schema=EXPERTS, config=_gpt_oss,
        metadata=_metadata_of_moe,
    ),
}  # fmt: skip
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


@dataclass(frozen=True)
class GGUFTensor(Stored):
    """A weight of a decoder.

    interleaved_heads: the number of heads whose first `rotated` rows are in pairs (2n, 2n + 1) in the file; 0: rows are as in the
        decoder.
    offset: what was added to it in the file.
    """

    info: TensorInfo
    interleaved_heads: int = 0
    rotated: int = 0
    offset: float = 0.0

    def read(self, rows: slice) -> torch.Tensor:
        values = dequantize(self._mapped()[self._order(rows)], self.info.type)
        values = values if self._by_row else values.flatten()[self._order(rows)]
        return values - self.offset if self.offset else values

    def of_expert(self, expert: int, part: int, fused: Fused) -> Stored:
        info, shape = self.info, self.shape[1:]
        one = info.nbytes // self.shape[0]
        own = replace(info, shape=shape, offset=info.offset + expert * one)
        return replace(self, info=own, shape=shape)

    @property
    def packing(self) -> Packing | None:  # type: ignore[override]  # a constant there
        return GGUF_PACKINGS.get(self.info.type) if len(self.shape) == 2 and not self.offset else None

    def read_blocks(self, rows: slice) -> torch.Tensor:
        return torch.from_numpy(np.array(self._mapped()[self._order(rows)]))

    def equal(self, other: Stored) -> bool:
        """Whether two matrices have equal blocks of one type."""
        if not isinstance(other, GGUFTensor) or (self.shape, self.info.type) != (other.shape, other.info.type):
            return False
        mine, theirs = self._mapped(), other._mapped()
        return all(np.array_equal(mine[rows], theirs[rows]) for rows in self.chunks())

    @property
    def _by_row(self) -> bool:
        """Whether a row is a whole number of blocks: those of a vector are single numbers."""
        return len(self.shape) > 1 or self.info.block == 1

    def _mapped(self) -> np.ndarray:
        """(rows, bytes of one) uint8, mapped for as long as it is used: mapped pages count as this process's memory."""
        rows = self.shape[0] if self._by_row else 1
        return np.memmap(self.path, np.uint8, "r", self.info.offset, (rows, self.info.nbytes // rows))

    def _order(self, rows: slice) -> np.ndarray | slice:
        """Where the rows of the decoder are in the file."""
        if not self._by_row:
            return slice(None)
        if not self.interleaved_heads:
            return rows
        heads = np.arange(self.shape[0]).reshape(self.interleaved_heads, -1)
        first, second, rest = heads[:, : self.rotated : 2], heads[:, 1 : self.rotated : 2], heads[:, self.rotated :]
        return np.concatenate([first, second, rest], 1).reshape(-1)[rows]


def dequantize(blocks: np.ndarray, type_name: str) -> torch.Tensor:
    """The numbers in the rows of a matrix of bytes: (R, bytes) uint8 -> (R, D), or (R,) for rows of one number.

    Args:
        type_name: of the blocks, one of SERVED. Quantized ones become float32.
    """
    rows = len(blocks)
    if type_name in DTYPES:
        values = torch.from_numpy(np.array(blocks)).view(DTYPES[type_name])
        return values.squeeze(-1) if values.shape[-1] == 1 else values
    package = import_gguf()
    kind = package.GGMLQuantizationType[type_name]
    block, block_bytes = package.constants.GGML_QUANT_SIZES[kind]
    blocks = np.ascontiguousarray(blocks).reshape(-1, block_bytes)
    numbers = np.empty((len(blocks), block), np.float32)
    with np.errstate(all="ignore"):  # numbers that are not finite are refused when they are stored
        for begin in range(0, len(blocks), PIECE // block):
            piece = slice(begin, begin + PIECE // block)
            numbers[piece] = package.quants.dequantize(blocks[piece].reshape(1, -1), kind).reshape(-1, block)
    return torch.from_numpy(numbers.reshape(rows, -1))


def load(
    path: str | Path, build: Callable[[dict, dict], Any],
    *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, weights: str | Quantization | None = None,
) -> Any:  # fmt: skip
    """Loads the decoder in a GGUF file, in evaluation mode.

    Args:
        build, dtype, device, weights: as in `load_weights`. Weights quantized in the file count as float32, which holds their numbers exactly.

    Raises: as `load_weights` and `gguf_file.read`; ValueError, naming it, for an architecture or a type that is not served.
    """
    return load_weights(checkpoint(read(path)), build, dtype=dtype, device=device, weights=weights)


def checkpoint(file: GGUF) -> Checkpoint:
    """How a file maps to a decoder.

    Raises: ValueError that names the file, and the entry or the tensor that is wrong.
    """
    name = file.architecture
    with naming(file.path):
        if name not in ARCHITECTURES:
            raise ValueError(
                f"general.architecture: expected {', '.join(ARCHITECTURES)}, got {name[:100]!r}, which is not served"
            )
        architecture, tensors = ARCHITECTURES[name], file.tensors
        for tensor in tensors.values():
            if tensor.type not in SERVED:
                raise ValueError(
                    f"{tensor.name}: expected the type {', '.join(SERVED)}, got {tensor.type}, which is not served"
                )
    if "token_embd.weight" not in tensors:  # whose rows are the vocabulary
        raise ValueError(f"model: {file.path} lacks weights: token_embd.weight")
    with naming(file.path):
        config = _config(file)
        like = FAMILIES[config["model_type"]]
        fields = like.config_from(config)
    names = {**NAMES, **architecture.names}
    if not architecture.interleaved and "blk.0.attn_qkv.weight" in tensors:
        names["blocks.{i}.attention.qkv"] = FUSED["blocks.{i}.attention.qkv"]
    if architecture.optional_biases:
        qkv = names["blocks.{i}.attention.qkv"]
        found = (
            ("qkv_bias", qkv if isinstance(qkv, str) else qkv[0]),
            ("out_bias", "blk.{i}.attn_output"),
            ("mlp_bias", "blk.{i}.ffn_down"),
        )
        fields |= {bias: f"{module.format(i=0)}.bias" in tensors for bias, module in found}
    family = Family(
        like.schema, like.fields_from, like.config_to, names, prefix="", ignored=r"$^", fused=OF_ALL_EXPERTS
    )  # fmt: skip
    heads = (
        {"q": fields["num_heads"], "k": fields.get("num_kv_heads") or fields["num_heads"]} if architecture.interleaved else {}
    )
    stored: dict[str, Stored] = {
        tensor.name: GGUFTensor(
            tensor.path,
            tensor.name,
            tensor.type if tensor.type in DTYPES else "F32",
            (1, *tensor.shape) if tensor.name.endswith("ffn_gate_inp_shexp.weight") else tensor.shape,
            tensor,
            _interleaved_heads(tensor, heads),
            fields["rope"].dim if heads else 0,
            architecture.norm_offset if tensor.name.endswith("norm.weight") else 0.0,
        )
        for tensor in tensors.values()
        if tensor.name not in ROPE_TENSORS
    }
    stored = by_expert(stored, family, fields.get("num_experts"))
    if "output.weight" in stored and stored["output.weight"].equal(stored["token_embd.weight"]):  # as some converters store it
        del stored["output.weight"]
    fields["tie_embeddings"] = config["tie_word_embeddings"] = "output.weight" not in stored
    ends = [config["eos_token_id"]] if isinstance(config["eos_token_id"], int) else config["eos_token_id"]
    return Checkpoint(file.path, file.path, family, config, fields, stored, {"eos": ends} if ends else {})


def _interleaved_heads(tensor: TensorInfo, heads: dict[str, int]) -> int:
    parts = tensor.name.split(".")
    found = heads.get(parts[2].removeprefix("attn_"), 0) if len(parts) == 4 and parts[2].startswith("attn_") else 0
    return found if found and tensor.shape[0] % (2 * found) == 0 else 0  # rows of another number are misshapen


def _config(file: GGUF) -> dict:
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
    if found["attention.value_length"] not in (None, head_dim):
        raise ValueError(
            f"{prefix}attention.value_length: expected {head_dim}, as of keys, got {found['attention.value_length']}"
        )
    rotated = found["rope.dimension_count"] or head_dim
    if rotated != head_dim and not architecture.partial or rotated > head_dim:
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
