"""Checkpoint folders in the format of transformers: `config.json` and safetensors, read strictly and written atomically."""

import contextlib
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastgpt import folders, schema
from fastgpt.checkpoints import quantized_folders
from fastgpt.checkpoints.families import (
    ARCHITECTURES,
    ENCODERS,
    FAMILIES,
    HEADS,
    architecture,
    family_of,
    model_type,
    without_head,
)
from fastgpt.checkpoints.families.family import Family, as_rows
from fastgpt.checkpoints.files import CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS, naming, read_json
from fastgpt.checkpoints.generation_config import generation_config, read_generation_config
from fastgpt.checkpoints.loading import DTYPES, Checkpoint, Stored, by_expert, load_weights, rows_of_parts
from fastgpt.checkpoints.safetensors_files import headers, weight_files
from fastgpt.checks import require_path, writing
from fastgpt.folders import replacing
from fastgpt.ops.quantized_weight import Packing, Quantization, QuantizedWeight

KINDS = {"GPT": "a decoder", "Encoder": "an encoder", "EncoderDecoder": "an encoder-decoder"}  # by the class that loads it


def read_config(folder: Path, head: str | None = None, loader: str | None = None) -> tuple[Family, dict, dict]:
    """The family of a checkpoint, its config.json, and the fields of GPTConfig, EncoderConfig or EncoderDecoderConfig for it.

    Args:
        head: the head that it must have, one of HEADS; None: a language model, or what is below one.
        loader: the class that is to load it, one of KINDS; None: any. An Encoder may be that of an encoder-decoder.

    Raises: FileNotFoundError; ValueError that names the file and the entry that is wrong.
    """
    path = folders.find(folder, CONFIG)
    if path is None:
        others = sorted(file.name for file in folder.glob("*.gguf"))
        found = f", found {others[0]}: a GGUF file is loaded by its own path" if others else ""
        if (folder / "adapter_config.json").is_file():
            found = ", found adapter_config.json: an adapter is loaded as lora, with the model that it was trained on"
        raise FileNotFoundError(f"model: expected {CONFIG} in the checkpoint folder {folder}{found}")
    config = read_json(path)
    with naming(path):
        types = [name for name in FAMILIES if model_type(name) == name]
        stored = schema.read({"model_type": schema.choice(types)}, config)["model_type"]
        name = _family_name(config, stored, loader)
        family = FAMILIES[name]
        if family.stacks and head is not None:
            raise ValueError(f"model_type: expected a decoder or an encoder, got {stored!r}, {KINDS[family.loader]}")
        if loader not in (None, family.loader):
            raise ValueError(f"model_type: expected {KINDS[loader]}, got {stored!r}, which fastgpt.{family.loader} loads")
        _check_architectures(config, name, head)
        quantized_folders.scheme(config)
        plain = {name: value for name, value in config.items() if name != quantized_folders.ENTRY}
        fields = family.config_from(plain)
        return family.for_mlp(bool(family.parts(fields)[0][1].get("gated"))), config, fields


def _architectures(config: dict) -> tuple[str, ...]:
    entries = {"architectures": schema.several(schema.text(), (), optional=True)}
    return schema.read(entries, config)["architectures"] or ()


def _family_name(config: dict, stored: str, loader: str | None) -> str:
    """The family of a stored model_type, which that of the encoder alone shares with an encoder-decoder."""
    if stored not in ENCODERS:
        return stored
    alone = ENCODERS[stored]
    is_alone = _architectures(config) == (ARCHITECTURES[alone] + "Model",)
    return alone if loader == "Encoder" or is_alone else stored


def _check_architectures(config: dict, family: str, head: str | None) -> None:
    accepted = without_head(family)  # of a decoder without an output matrix, that is the token embedding
    for stored in _architectures(config):
        if stored == architecture(family, head) or (stored in accepted and head is None):
            continue
        found = next((known for known in HEADS if stored == architecture(family, known)), None)
        own = FAMILIES[family].loader
        loader = own if stored == architecture(family) else None if found is None else HEADS[found]
        raise ValueError(
            f"architectures: expected the architecture {architecture(family, head)}, got {stored}"
            + (f", which fastgpt.{loader}.from_pretrained loads" if loader else "")
        )


def load(
    folder: Path, build: Callable[[dict, dict], Any], head: str | None = None, loader: str | None = None,
    *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, weights: str | Quantization | None = None,
) -> Any:  # fmt: skip
    """Loads the decoder, the encoder, both or the model with a head in a checkpoint folder, in evaluation mode.

    Args:
        head, loader: as in `read_config`.
        build, dtype, device, weights: as in `load_weights`.

    Raises: as `load_weights`; FileNotFoundError, OSError that names the file.
    """
    return load_weights(_read(folder, head, loader), build, head, dtype=dtype, device=device, weights=weights)


def _read(folder: Path, head: str | None, loader: str | None) -> Checkpoint:
    family, config, fields = read_config(folder, head, loader)
    defaults = {} if head else read_generation_config(folder)
    files = weight_files(folder)
    found, metadata = headers(files)
    with naming(folder / CONFIG):
        scheme = quantized_folders.scheme(config)
    matrices = list(found) if scheme is None else quantized_folders.matrices(found, scheme, metadata)
    part, of_decoder = family.parts(fields)[-1]
    first = of_decoder["num_layers"]
    further = range(first, first + family.further_layers(config))
    stored = by_expert(_by_name(matrices, family, part, further), family, fields.get("num_experts"))
    tied = _settle_output(stored, family, part, of_decoder, fields.get("share_embedding", bool(family.stacks)), head)
    of_decoder = of_decoder | {"tie_embeddings": tied, "output_bias": of_decoder.get("output_bias", False) and not tied}
    fields = fields | {"decoder": of_decoder} if family.stacks else of_decoder
    if family.encoder:
        _settle_bias(stored, family, tied)
        fields |= _settle_parts(stored, family, fields, head)
    path = next(iter(files)) if len(files) == 1 else folder
    return Checkpoint(path, folder / CONFIG, family, config, fields, stored, defaults)


def _by_name(found: Sequence[Stored], family: Family, part: str, unread: Sequence[int]) -> dict[str, Stored]:
    """Weights by their names with prefix; unread: layers of a part whose weights are left out."""
    stored = {}
    for weight in found:
        name = family.with_prefix(weight.name)
        layer = re.match(family.layer_pattern(part), name) if name is not None and unread else None
        if name is None or layer and int(layer[1]) in unread:
            continue
        if name in stored:
            raise ValueError(f"model: {weight.path}: {weight.name}: expected one weight of this name, got two")
        if weight.dtype not in DTYPES:
            raise ValueError(
                f"model: {weight.path}: {weight.name}: expected dtype {' or '.join(DTYPES)}, got {weight.dtype}, which no "
                f"{quantized_folders.ENTRY} in {CONFIG} explains"
            )
        stored[name] = weight
    return stored


def _settle_output(
    stored: dict[str, Stored], family: Family, part: str, fields: dict, shared: bool, head: str | None
) -> bool:  # fmt: skip
    """Whether the output matrix is tied to the token embedding; the stored weights take precedence over config.json.

    part, fields: of what has the output matrix, as of `Family.parts`. shared: whether its token embedding is the encoder's.
    """
    of_tokens = "encoder." if shared else part
    names = (f"{of_tokens}token_embedding.weight", f"{part}output.weight")
    (embedding,), (output,) = (family.checkpoint_names(name)[0] for name in names)
    tied = fields.get("tie_embeddings", True)
    if family.stacks and not tied and output not in stored and embedding in stored:  # transformers ties what is missing
        return True
    if head is not None:  # has no output matrix
        stored.pop(output, None)
        stored.pop(output.removesuffix("weight") + "bias", None)
        return True
    if not tied or output not in stored:
        return tied
    if embedding not in stored:
        stored[embedding] = stored.pop(output)
        return True
    if stored[output].equal(stored[embedding]):
        del stored[output]
        return True
    warnings.warn(
        f"{stored[output].path}: {stored[output].name} differs from the token embedding, though {CONFIG} says that they are "
        "tied: it is used as it is stored",
        stacklevel=5,
    )
    return False


def bias_names(family: Family) -> tuple[str, str]:
    """What the bias of an encoder's logits is called: where the output matrix is tied to the token embedding, and where not."""
    (tied,), (output,) = (family.checkpoint_names(name)[0] for name in ("head.bias", "output.weight"))
    return tied, output.removesuffix("weight") + "bias"


def _settle_bias(stored: dict[str, Stored], family: Family, tied: bool) -> None:
    """Leaves the bias of an encoder's logits, of which files may have two, the one that transformers adds."""
    name, name_of_untied = bias_names(family)
    bias = stored.pop(name_of_untied, None) if name != name_of_untied else None
    if bias is not None and (not tied or name not in stored):
        stored[name] = bias


def _settle_parts(stored: dict[str, Stored], family: Family, fields: dict, head: str | None) -> dict:
    """Which of its two parts an encoder has: those in the files. A model with a head has neither, and does not read them."""
    pooler, masked_head = (
        family.weights_of("pooler.dense"),
        family.weights_of("head", "head.transform.dense", "head.transform.norm"),
    )
    if head is None:
        return {"pooler": not pooler.isdisjoint(stored), "masked_head": not masked_head.isdisjoint(stored)}
    transforms = head == "ForSequenceClassification" or fields.get("pooler_activation", "tanh") is None
    for name in (pooler | masked_head) - (family.weights_of("transform.dense", "transform.norm") if transforms else set()):
        stored.pop(name, None)
    return {"pooler": False, "masked_head": False}


def contents(
    model: Any, head: str | None = None, entries: dict | None = None, dequantize: bool = False
) -> tuple[dict, dict[str, torch.Tensor], dict[str, str]]:
    """The contents that `write` saves: config.json, the weights by name, copied only if they are stored differently, and the
    metadata of their file."""
    name = family_of(model.config, model.checkpoint_config.get("model_type"))
    family = FAMILIES[name].for_mlp(getattr(getattr(model.config, "decoder", model.config), "gated", False))
    kept = model.checkpoint_config if model.checkpoint_config.get("model_type") == model_type(name) else {}
    config = {"model_type": model_type(name)} | family.config_to(model.config)
    if head is not None or not name.startswith("fastgpt"):
        is_base = head is None and family.encoder and not model.config.masked_head
        config["architectures"] = [ARCHITECTURES[name] + "Model" if is_base else architecture(name, head)]
    config |= {key: value for key, value in kept.items() if key.endswith("_token_id")}
    config |= entries or {}
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    weights: dict[str, torch.Tensor] = {}
    packings: dict[str, Packing] = {}
    for parameter, weight in model.named_parameters():
        if parameter.startswith(("model.output.", "model.head.", "model.pooler.")):  # of the model to which a head was added
            continue
        owner, _, kind = parameter.rpartition(".")
        if kind in ("lora_A", "lora_B"):
            continue  # it is in the weight
        if hasattr(layer := model.get_submodule(owner), "merged_weight") and kind == "weight":
            weight = layer.merged_weight()
        names, transposed = family.checkpoint_names(parameter, model.config.num_experts)
        rows = rows_of_parts(model, parameter, len(names))
        order = family.row_order(parameter, model.config)
        places = slice(None) if order is None else order.argsort().to(weight.device)
        if isinstance(weight, QuantizedWeight) and not dequantize:
            packings |= dict.fromkeys(names, weight.packing)
            weights |= zip(names, weight.blocks[places].split(rows))
            continue
        for stored_as, part in zip(names, as_rows(parameter, weight.detach())[places].split(rows)):
            weights[stored_as] = (part.t() if transposed else part).contiguous()
    if family.writes_fused and not packings:
        weights = joined(weights, family, model.config)
    if "head.bias" in dict(model.named_parameters()) and model.output is not None:
        name, name_of_untied = bias_names(family)
        weights[name_of_untied] = weights[name].clone()
    if packings:
        config[quantized_folders.ENTRY] = {"quant_method": quantized_folders.OWN}
    return config, weights, {"format": "pt"} | quantized_folders.own_metadata(packings)


def joined(weights: dict[str, torch.Tensor], family: Family, config: Any) -> dict[str, torch.Tensor]:
    """Weights by name, with those of each expert in tensors of all experts."""
    result = dict(weights)
    for layer in range(config.num_layers):
        for pattern, (parts, transposed, interleaved) in family.fused.items():
            names = [[f"{family.prefix}{part.format(i=layer, e=e)}" for part in parts] for e in range(config.num_experts or 0)]
            if not names or names[0][0] not in weights:
                continue
            experts = []
            for of_expert in names:
                found = [result.pop(name) for name in of_expert]
                whole = torch.stack(found, 1).flatten(0, 1) if interleaved else torch.cat(found)
                experts.append(whole.t() if transposed and whole.dim() == 2 else whole)
            result[family.prefix + pattern.format(i=layer)] = torch.stack(experts)
    return result


def write(
    model: Any, folder: str | Path, head: str | None = None, entries: dict | None = None,
    generation_defaults: dict | None = None, dequantize: bool = False,
) -> None:  # fmt: skip
    """Writes a checkpoint that `load` reads.

    head: the model's head, one of HEADS; entries: further ones of config.json; dequantize: quantized matrices become what they
        stand for.

    Raises: ValueError, naming what is wrong in the model or generation_defaults; OSError if the folder cannot be written to,
        which leaves it unchanged.
    """
    folder = require_path("folder", folder)
    generation = generation_config(generation_defaults or {})
    config, weights, metadata = contents(model, head, entries, dequantize)
    for name, weight in weights.items():
        if weight.is_meta:
            raise ValueError(f"model: expected weights, got {name} on the meta device, which has none")
    files = {CONFIG: json_text(config)} | ({GENERATION_CONFIG: json_text(generation)} if generation else {})
    with writing("folder", folder, "a folder"), folders.made(folder):
        for name in (*files, WEIGHTS):
            if (folder / name).is_dir():
                raise IsADirectoryError(f"{name} in it is a folder")
        # All are written before the first one replaces its predecessor.
        with contextlib.ExitStack() as written:
            for name, text in files.items():
                written.enter_context(replacing(folder / name)).write_text(text)
            save_file(weights, written.enter_context(replacing(folder / WEIGHTS)), metadata=metadata)
        # Files of the previous checkpoint.
        for name in {INDEX, GENERATION_CONFIG} - files.keys():
            (folder / name).unlink(missing_ok=True)


def json_text(config: dict) -> str:
    """The text of a JSON file of a checkpoint. Numbers of NumPy and PyTorch are accepted.

    Raises: ValueError for values that JSON does not have.
    """

    def plain(value):
        if getattr(value, "ndim", None) == 0:
            return value.item()
        raise TypeError(f"got {type(value).__name__} among them")

    try:
        return json.dumps(config, indent=2, default=plain, allow_nan=False) + "\n"
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG}: expected finite numbers, strings, lists and dicts, {error}") from None
