"""Writes a decoder as a GGUF file, which llama.cpp and `fastgpt.checkpoints.gguf` read."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.checkpoints import gguf, gguf_file
from fastgpt.checkpoints.families import FAMILIES, family_of
from fastgpt.checkpoints.families.family import Family, as_rows
from fastgpt.checkpoints.gguf_architectures import ARCHITECTURES, NAMES, OF_ALL_EXPERTS
from fastgpt.checkpoints.gguf_config import ROPE_TENSORS
from fastgpt.checkpoints.gguf_tensors import GGUFTensor
from fastgpt.checkpoints.loading import rows_of_parts
from fastgpt.model.rope import Rope
from fastgpt.ops.quantized_weight import GGUF_PACKINGS, QuantizedWeight

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}  # of general.file_type, by the type of most matrices
UNLIKE = "general.file_type", "general.quantization_version", "general.alignment", "split."  # what a new file says by itself
TYPE_NAMES = {packing: name for name, packing in GGUF_PACKINGS.items()}
PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def metadata_of(file: gguf_file.GGUF) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What another file of the same model says, its tokenizer included, and the tensors that belong to its rotation."""
    kept = {name: value for name, value in file.metadata.items() if not name.startswith(UNLIKE)}
    name = f"{file.architecture}.attention"
    if ARCHITECTURES[file.architecture].latent:  # we do not write the absorbed form
        for x in ("key", "value"):
            if of_heads := kept.pop(f"{name}.{x}_length_mla", None):
                kept[f"{name}.{x}_length"] = of_heads
        kept[f"{name}.head_count_kv"] = kept[f"{name}.head_count"]
    rotation = {}
    for name in ROPE_TENSORS & file.tensors.keys():
        tensor = file.tensors[name]
        whole = GGUFTensor(tensor.path, name, tensor.type, tensor.shape, tensor).read(slice(None))
        rotation[name] = whole.float().numpy()
    return kept, rotation


def metadata_from(model: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a file says of a decoder, and the tensors that belong to its rotation.

    Raises: ValueError for a family that has no architecture there.
    """
    family = family_of(model.config, model.checkpoint_config.get("model_type"))
    names = {architecture.family or name: name for name, architecture in ARCHITECTURES.items()} | {
        "mistral": "llama",
        "mixtral": "llama",
        "olmo3": "olmo2",
        "deepseek_v2": "deepseek2",
    }
    if family not in names:
        raise ValueError(f"model: expected one of {', '.join(ARCHITECTURES)}, which GGUF files can hold, got {family}")
    name = names[family]
    stored = FAMILIES[family].config_to(model.config)
    config = model.config
    rotation: dict[str, np.ndarray] = {}
    entries: dict[str, Any] = {
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
    }
    if name == "gpt2":
        entries["attention.layer_norm_epsilon"] = config.norm_eps
    else:
        entries |= {
            "attention.head_count_kv": config.num_kv_heads,
            f"attention.layer_norm_{'rms_' * (config.norm == 'rms')}epsilon": config.norm_eps,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "vocab_size": config.vocab_size,
        }
        of_rotation, rotation = _rotation(config.rope, config.context_length)
        entries |= of_rotation
    if stored.get("sliding_window"):
        entries["attention.sliding_window"] = stored["sliding_window"]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if stored.get(key) is not None:
            entries[key] = stored[key]
    entries |= ARCHITECTURES[name].metadata(config)
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in entries.items()}, rotation


def _rotation(rope: Rope, context: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    entries: dict[str, Any] = {"rope.dimension_count": rope.dim, "rope.freq_base": float(rope.theta)}
    tensors = {}
    if rope.kind in ("linear", "yarn"):
        entries |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
    if rope.kind == "yarn":
        entries |= {
            "rope.scaling.original_context_length": rope.original_context,
            "rope.scaling.yarn_attn_factor": float(rope.attention_factor),
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
    elif rope.kind == "longrope":
        entries |= {
            "rope.scaling.original_context_length": rope.original_context,
            "rope.scaling.attn_factor": float(rope.attention_factor),
        }
        for name, factors in (("short", rope.short_factors), ("long", rope.long_factors)):
            tensors[f"rope_factors_{name}.weight"] = np.array(factors, np.float32)
    elif rope.kind == "llama3":
        tensors["rope_freqs.weight"] = (Rope(rope.dim, rope.theta).frequencies() / rope.frequencies()).numpy()
    return entries, tensors


def write(path: Path, model: Any, metadata: Mapping[str, Any], rotation: Mapping[str, np.ndarray]) -> None:
    """Writes a file, whose matrices in groups of 32 keep their blocks, as Q8_0, Q4_0 or Q4_1.

    Args:
        metadata, rotation: of `metadata_of` or `metadata_from`, and a tokenizer.

    Raises: ImportError without the package gguf; ValueError for matrices of other packings, or if the file would be read as
        another architecture; OSError.
    """
    package = gguf_file.import_gguf()
    name = metadata["general.architecture"]
    architecture = ARCHITECTURES[name]
    like = FAMILIES["mistral" if name == "llama" else architecture.family or name]
    names_here = {**NAMES, **architecture.names}
    family = Family(
        like.schema, like.fields_from, like.config_to, names_here, prefix="", ignored=r"$^", fused=OF_ALL_EXPERTS,
        row_orders=like.row_orders,
    )  # fmt: skip
    heads = {"q": model.config.num_heads, "k": model.config.num_kv_heads} if architecture.interleaved else {}
    tensors: dict[str, tuple[np.ndarray, str]] = {key: (value, "F32") for key, value in rotation.items()}
    for parameter, weight in model.named_parameters():
        names, _ = family.checkpoint_names(parameter, model.config.num_experts)
        if isinstance(weight, QuantizedWeight):
            if weight.packing not in TYPE_NAMES:
                raise ValueError(f"model: {parameter}: expected a packing of {', '.join(GGUF_PACKINGS)}, got {weight}")
            stored, kind = weight.blocks, TYPE_NAMES[weight.packing]
        else:
            is_matrix = weight.dim() >= 2 and not parameter.endswith(("_bias", ".router.weight", ".shared_gate.weight"))
            stored, kind = as_rows(parameter, weight.detach()), PLAIN[weight.dtype] if is_matrix else "F32"
            stored = stored if kind != "F32" else stored.float()
            stored = stored[0] if parameter.endswith(".shared_gate.weight") else stored
        if (order := family.row_order(parameter, model.config)) is not None:
            stored = stored[order.argsort()]
        for stored_as, part in zip(names, stored.split(_rows(model, parameter, names, stored))):
            if architecture.norm_offset and stored_as.endswith("norm.weight"):
                part = part + architecture.norm_offset
            if (key := stored_as.split(".")[-2].removeprefix("attn_")) in heads and stored_as.startswith("blk."):
                by_head, rotated = part.unflatten(0, (heads[key], -1)), model.config.rope.dim  # rotary pairs side by side
                pairs = by_head[:, :rotated].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
                part = torch.cat([pairs, by_head[:, rotated:]], 1).flatten(0, 1)
            part = part.contiguous()
            array = part.view(torch.uint8).numpy() if kind == "BF16" else part.numpy()
            tensors[stored_as] = array, kind
    tensors = _of_all_experts(tensors, family, model.config)
    kinds = [kind for _, kind in tensors.values() if kind in GGUF_PACKINGS]
    writer = package.GGUFWriter(path, name)
    if (most := max(GGUF_PACKINGS, key=kinds.count)) in FILE_TYPES:
        writer.add_file_type(FILE_TYPES[most] if kinds else 0)
    if kinds:
        writer.add_quantization_version(package.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, *_types(package.GGUFValueType, value))
    for tensor_name, (array, kind) in tensors.items():
        writer.add_tensor(tensor_name, array, raw_dtype=package.GGMLQuantizationType[kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    _require_same(path, model.config)


def _rows(model: Any, parameter: str, names: list[str], stored: torch.Tensor) -> list[int]:
    return [len(stored)] if len(names) == 1 else rows_of_parts(model, parameter, len(names))


def _of_all_experts(
    tensors: dict[str, tuple[np.ndarray, str]], family: Family, config: Any
) -> dict[str, tuple[np.ndarray, str]]:
    """Those of each expert in one tensor."""
    result = dict(tensors)
    for layer in range(config.num_layers):
        for pattern, fused in family.fused.items():
            names = [fused.parts[0].format(i=layer, e=e) for e in range(config.num_experts or 0)]
            if names and names[0] in tensors:
                arrays = [result.pop(name) for name in names]
                result[pattern.format(i=layer)] = np.stack([array for array, _ in arrays]), arrays[0][1]
    return result


def _types(kinds: Any, value: Any) -> tuple:
    """The types of a value, and of its elements."""
    if isinstance(value, list):
        return kinds.ARRAY, _types(kinds, value[0])[0] if value and type(value[0]) is not int else kinds.INT32
    if isinstance(value, bool):
        return (kinds.BOOL,)
    if isinstance(value, int):
        return (kinds.INT32 if value < 0 else kinds.UINT32 if value < 2**32 else kinds.UINT64,)
    return (kinds.FLOAT32 if isinstance(value, float) else kinds.STRING,)


def _require_same(path: Path, config: Any) -> None:
    """Raises ValueError if a file does not say all that the configuration does, such as windows of Qwen 2."""
    again = type(config)(**gguf.checkpoint(gguf_file.read(path)).fields)
    for name in config.__dataclass_fields__.keys() - {"dropout"}:  # which is for training
        ours, theirs = getattr(config, name), getattr(again, name)
        if name == "rope" and ours is not None and theirs is not None:
            same = ours.dim == theirs.dim and all(
                torch.allclose(ours.frequencies(long), theirs.frequencies(long), rtol=1e-5) for long in (False, True)
            )
        elif isinstance(ours, float) and isinstance(theirs, float):  # of 32 bits in the file
            same = math.isclose(ours, theirs, rel_tol=1e-6)
        else:
            same = ours == theirs
        if not same:
            raise ValueError(f"model: expected {name}={theirs!r}, which a GGUF file can say, got {ours!r}")
