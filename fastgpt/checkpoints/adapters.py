"""LoRA adapters in the format of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

import math
import re
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastgpt import folders, schema
from fastgpt.checkpoints.families import FAMILIES, family_of
from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.hub import resolve
from fastgpt.checkpoints.loading import DTYPES, rows_of_parts
from fastgpt.checkpoints.transformers_format import json_text
from fastgpt.folders import replacing
from fastgpt.model.lora import Adapter, adapted_layers

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's own modules around the model
SCHEMA = {
    "peft_type": schema.only("LORA"),
    "lora_alpha": schema.number(8, least=0),
    "use_rslora": schema.flag(False),
    "base_model_name_or_path": schema.text("", optional=True),
    "bias": schema.unsupported("none"),
    "init_lora_weights": schema.unsupported(True, False, "gaussian", "eva", "orthogonal"),  # others change the weights of the model
    **{
        name: schema.unsupported({}, [])
        for name in (
            "use_dora", "lora_bias", "alpha_pattern", "modules_to_save", "layer_replication", "trainable_token_indices",
            "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
        )
    },
}  # fmt: skip


def write(model: Any, folder: Path, alpha: float, base: str | None) -> None:
    """Writes the adapters of a decoder, for PEFT or `read`. Files are written atomically.

    Args:
        alpha: the adapters' scale times their rank.
        base: where the model is whose adapters they are, which PEFT loads.
    """
    family, weights, targets, rank = _family(model), {}, set(), 0
    for name, layer in adapted_layers(model):
        names, _ = family.checkpoint_names(f"{name}.weight")
        rank = len(layer.lora_A)
        rows = rows_of_parts(model, f"{name}.weight", len(names))
        order, lora_B = family.row_order(f"{name}.weight", model.config), layer.lora_B.detach()
        lora_B = lora_B if order is None else lora_B[order.argsort().to(lora_B.device)]
        for part, B in zip(names, lora_B.split(rows)):  # those of a fused layer have the same A
            module = part.removesuffix(".weight")
            targets.add(re.sub(r".*\.\d+\.", "", module))
            weights[f"{PREFIX}{module}.lora_A.weight"] = layer.lora_A.detach().clone()
            weights[f"{PREFIX}{module}.lora_B.weight"] = B.contiguous()
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": bool(family.transposed),
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
    }
    with ExitStack() as written:  # all before the first one replaces its predecessor
        written.enter_context(replacing(folder / ADAPTER_CONFIG)).write_text(json_text(config))
        save_file(weights, written.enter_context(replacing(folder / ADAPTER_WEIGHTS)), metadata={"format": "pt"})


def read(path: str | Path, model: Any, base: str | Path) -> dict[str, Adapter]:
    """The adapters in a folder, or of an id on the Hugging Face Hub, by the names of the decoder's layers.

    Adapters of layers that are one in the decoder, such as those of queries, keys and values, become one.

    Args:
        base: where the model is from. A warning says so if they were trained on one of another name.

    Raises: FileNotFoundError; ValueError that names the file and what is wrong in it, or does not fit the model.
    """
    folder = resolve(path, argument="lora")
    files = {name: folders.find(folder, name, "lora") for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    for name, file in files.items():
        if file is None:
            raise FileNotFoundError(f"lora: expected {name}, as PEFT saves it, in the folder {folder}")
    try:
        config = schema.read(SCHEMA, schema.read_json(files[ADAPTER_CONFIG]))  # type: ignore[arg-type]  # not None
    except ValueError as error:
        raise ValueError(f"lora: {files[ADAPTER_CONFIG]}: {error}") from None
    try:
        stored = load_file(files[ADAPTER_WEIGHTS])  # type: ignore[arg-type]  # not None
    except SafetensorError as error:
        raise ValueError(f"lora: {files[ADAPTER_WEIGHTS]} is damaged: {error}") from error
    try:
        adapters = _adapters(stored, config, model)
    except ValueError as error:
        raise ValueError(f"lora: {files[ADAPTER_WEIGHTS]}: {error}") from None
    trained_on = config["base_model_name_or_path"]
    if trained_on and _name(trained_on) != _name(base):
        warnings.warn(f"lora: {folder} was trained on {trained_on}, and is applied to {base}", stacklevel=3)
    return adapters


def _name(base: str | Path) -> str:
    """What identifies a model wherever it is: the last part of its path or id."""
    path = Path(base)
    if path.parent.name == "snapshots":  # in the Hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return path.parents[1].name.rpartition("--")[2].lower()
    return path.name.lower()


def _family(model: Any) -> Family:
    return FAMILIES[family_of(model.config, model.checkpoint_config.get("model_type"))]


def _adapters(stored: dict[str, torch.Tensor], config: dict, model: Any) -> dict[str, Adapter]:
    family = _family(model)
    matrices: dict[str, dict[str, torch.Tensor]] = {}  # by the name of a weight in the checkpoint: A and B
    for key, matrix in stored.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        name = family.with_prefix(f"{match[1]}.weight") if match else None
        if match is None or name is None:
            raise ValueError(f"expected adapters of linear layers, {PREFIX}MODULE.lora_A.weight and lora_B, got {key}")
        if matrix.dtype not in DTYPES.values() or not matrix.isfinite().all():
            raise ValueError(f"{key}: expected finite numbers in {' or '.join(DTYPES)}, got {matrix.dtype} or NaN or infinity")
        matrices.setdefault(name, {})[match[2]] = matrix.float()
    adapters = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        names, _ = family.checkpoint_names(f"{name}.weight")
        found = [matrices.pop(part, None) for part in names]
        if any(found):
            rows = rows_of_parts(model, f"{name}.weight", len(names))
            adapter, order = (
                _joined(names, found, rows, layer.in_features, config),
                family.row_order(f"{name}.weight", model.config),
            )
            adapters[name] = adapter if order is None else Adapter(adapter.A, adapter.B[order], adapter.scale)
    if tied := matrices.keys() & family.checkpoint_names("output.weight")[0]:
        raise ValueError(
            f"expected adapters of layers in the model's blocks, got one of {min(tied)}: the output matrix of this model is its "
            "token embedding (tie_word_embeddings), which would change, too"
        )
    if matrices:
        raise ValueError(f"expected adapters of this model's linear layers, got one of {min(matrices)}")
    if not adapters:
        raise ValueError("expected at least one adapter, got none")
    return adapters


def _joined(names: list[str], found: list[dict | None], rows: list[int], columns: int, config: dict) -> Adapter:
    """One adapter of those of parts of a layer, of which some may have none."""
    parts = []  # A, and B times its scale
    for name, pair, count in zip(names, found, rows):
        if pair is None:
            parts.append((torch.zeros(0, columns), torch.zeros(count, 0)))
            continue
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{name}: expected lora_A and lora_B, got lora_{min(pair)} alone")
        A, B = pair["A"], pair["B"]
        if A.dim() != 2 or A.shape != (len(A), columns) or not len(A) or B.shape != (count, len(A)):
            raise ValueError(
                f"{name}: expected lora_A of shape (rank, {columns}) and lora_B of shape ({count}, rank), got "
                f"{tuple(A.shape)} and {tuple(B.shape)}"
            )
        rank = math.sqrt(len(A)) if config["use_rslora"] else len(A)
        parts.append((A, B * (config["lora_alpha"] / rank)))
    first = parts[0][0]
    if all(torch.equal(A, first) for A, _ in parts):
        return Adapter(first, torch.cat([B for _, B in parts]), 1.0)
    return Adapter(torch.cat([A for A, _ in parts]), torch.block_diag(*(B for _, B in parts)), 1.0)
