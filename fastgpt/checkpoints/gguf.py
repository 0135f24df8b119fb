"""Decoders in GGUF files: how metadata maps to a family's config, and tensors to weights, dequantized as they are loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoints.families import FAMILIES
from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.files import naming
from fastgpt.checkpoints.gguf_architectures import ARCHITECTURES, FUSED, NAMES, OF_ALL_EXPERTS
from fastgpt.checkpoints.gguf_config import ROPE_TENSORS, config_of
from fastgpt.checkpoints.gguf_file import GGUF, TensorInfo, read
from fastgpt.checkpoints.gguf_tensors import SERVED, GGUFTensor, join_keys_and_values
from fastgpt.checkpoints.loading import DTYPES, Checkpoint, Stored, by_expert, load_weights
from fastgpt.ops.quantized_weight import Quantization


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
        config = config_of(file)
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
        like.schema, like.fields_from, like.config_to, names, prefix="", ignored=r"$^", fused=OF_ALL_EXPERTS,
        row_orders=like.row_orders,
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
    if architecture.latent:
        H, C, D, D_v = (fields[name] for name in ("num_heads", "kv_rank", "head_dim", "v_head_dim"))
        stored = join_keys_and_values(stored, (H, C, D - fields["rope"].dim), (H, D_v, C))
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
