"""Checkpoint folders in the format of transformers: `config.json` and safetensors, read strictly and written atomically."""

import contextlib
import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastgpt import folders, huge_pages, schema
from fastgpt.checkpoints.families import ARCHITECTURES, FAMILIES, HEADS, architecture, family_of
from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.files import CONFIG, GENERATION_CONFIG, INDEX, STATE, WEIGHTS, naming, read_json
from fastgpt.checkpoints.generation_config import generation_config, read_generation_config
from fastgpt.checks import from_torchrun, is_terminal, require_choice, require_path, writing
from fastgpt.folders import replacing
from fastgpt.ops.quantized_weight import BITS, Packing, QuantizedWeight, quantize

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 32 << 20  # bytes of a file that are mapped at a time: mapped pages count as this process's memory
MATRICES = (*BITS, "dequantized")  # how matrices can be loaded that are not to be as they are stored
SHOW_PROGRESS = 1 << 30  # bytes of weights from which on a progress bar is shown: reading them takes a second or more


def read_config(folder: Path, head: str | None = None) -> tuple[Family, dict, dict]:
    """The family of a checkpoint, its config.json, and GPTConfig's fields for it.

    head: the head that it must have, one of HEADS; None: a language model.

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
        model_type = schema.read({"model_type": schema.choice(FAMILIES)}, config)["model_type"]
        _check_architectures(config, model_type, head)
        return FAMILIES[model_type], config, FAMILIES[model_type].config_from(config)


def _check_architectures(config: dict, model_type: str, head: str | None) -> None:
    entries = {"architectures": schema.several(schema.text(), (), optional=True)}
    base = ARCHITECTURES[model_type] + "Model"  # without an output matrix: the token embedding is used
    for stored in schema.read(entries, config)["architectures"] or ():
        if stored == architecture(model_type, head) or (stored == base and head is None):
            continue
        found = next((known for known in HEADS if stored == architecture(model_type, known)), None)
        loader = "GPT" if stored == architecture(model_type) else None if found is None else HEADS[found]
        raise ValueError(
            f"architectures: expected the architecture {architecture(model_type, head)}, got {stored}"
            + (f", which fastgpt.{loader} loads" if loader else "")
        )


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file; those of other formats derive from it."""

    path: Path
    name: str
    dtype: str  # one of DTYPES: what `read` gives
    shape: tuple[int, ...]

    packing: ClassVar[Packing | None] = None  # of a matrix that `read_blocks` gives as it is stored

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, rows: slice) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:  # opened for each chunk, so that its pages are unmapped afterwards
            return file.get_slice(self.name)[rows]

    def chunks(self) -> Iterator[slice]:
        """Slices of rows of at most CHUNK bytes."""
        step = max(1, CHUNK * self.shape[0] // max(1, self.numel * DTYPES[self.dtype].itemsize))
        return (slice(start, start + step) for start in range(0, self.shape[0], step))

    def copy_to(self, target: torch.Tensor, shown: Callable[[int], object]) -> None:
        """shown: called with the bytes of each chunk."""
        for rows in self.chunks():
            part = target[rows].copy_(self.read(rows))
            # Not torch.aminmax, which copies transposed tensors.
            if not part.is_meta and not all(map(math.isfinite, (part.amin(), part.amax()))):
                raise ValueError(
                    f"model: {self.path}: {self.name}: expected finite numbers in {target.dtype}, got NaN or infinity"
                )
            shown(part.nbytes)

    def read_blocks(self, rows: slice) -> torch.Tensor:
        """(R, bytes) uint8, of a tensor with a packing."""
        raise NotImplementedError

    def copy_blocks_to(self, target: torch.Tensor, packing: Packing, shown: Callable[[int], object]) -> None:
        """As `copy_to`, of blocks, whose packing is `self.packing`."""
        for rows in self.chunks():
            part = target[rows].copy_(self.read_blocks(rows))
            if not part.is_meta and not packing.halves(part).isfinite().all():
                raise ValueError(f"model: {self.path}: {self.name}: expected finite scales, got NaN or infinity")
            shown(part.nbytes)

    def equal(self, other: "Stored") -> bool:
        """Whether two matrices have equal values."""
        if self.shape != other.shape or len(self.shape) != 2:
            return False
        dtype = torch.promote_types(DTYPES[self.dtype], DTYPES[other.dtype])
        return all(torch.equal(self.read(rows).to(dtype), other.read(rows).to(dtype)) for rows in self.chunks())


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a checkpoint say, before any weight is read.

    path: of the weights, for errors: a file, or the folder of several.
    config_path: of the file that says what `config` and `fields` do.
    config: as config.json has it; fields: GPTConfig's.
    stored: the weights by their names with prefix.
    """

    path: Path
    config_path: Path
    family: Family
    config: dict
    fields: dict
    stored: dict[str, Stored]
    generation_defaults: dict


def load(
    folder: Path, build: Callable[[dict, dict], Any], head: str | None = None,
    *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, weights: str | None = None,
) -> Any:  # fmt: skip
    """Loads the decoder or the model with a head in a checkpoint folder, in evaluation mode.

    Args:
        head: as in `read_config`.
        build, dtype, device, weights: as in `load_weights`.

    Raises: as `load_weights`; FileNotFoundError, OSError that names the file.
    """
    return load_weights(_read(folder, head), build, head, dtype=dtype, device=device, weights=weights)


def _read(folder: Path, head: str | None) -> Checkpoint:
    family, config, fields = read_config(folder, head)
    defaults = {} if head else read_generation_config(folder)
    files = _weight_files(folder)
    stored = _by_name(_headers(files), family)
    fields = fields | {"tie_embeddings": _settle_output(stored, family, fields, head)}
    path = next(iter(files)) if len(files) == 1 else folder
    return Checkpoint(path, folder / CONFIG, family, config, fields, stored, defaults)


def load_weights(
    checkpoint: Checkpoint, build: Callable[[dict, dict], Any], head: str | None = None,
    *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, weights: str | None = None,
) -> Any:  # fmt: skip
    """Builds the module of a checkpoint and loads its weights. It is returned in evaluation mode.

    Names and shapes are compared with the headers of the files before memory is allocated.

    Args:
        build: (GPTConfig's fields, config.json) -> the module; called on the meta device.
        head: the module's, one of HEADS.
        dtype: of the weights; default: the one that most of the stored numbers have.
        weights: None: matrices as they are stored, quantized ones too if their blocks are served; "dequantized"; or "int8" or
            "int4": they are quantized. dtype is that of the others.

    Raises: ValueError that names the file and what is wrong in it; TypeError, ValueError for dtype and device.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(f"dtype: expected {' or '.join(map(str, DTYPES.values()))} or None, got {dtype!r}")
    if weights is not None:
        require_choice("weights", weights, MATRICES)
        if dtype is torch.float64 and weights in BITS:
            raise TypeError(f"dtype: expected fp32, fp16 or bf16 with weights={weights!r}, got {dtype}")
    try:
        device = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: expected a device of this machine, got {device!r} ({reason})") from None
    family, fields, stored = checkpoint.family, checkpoint.fields, checkpoint.stored

    # The config may claim any number of layers: at most one that is not in the files is built, to name its missing weights.
    layers = fields["num_layers"]
    held = {match[1] for name in stored if (match := re.match(family.layer_pattern, name))}
    built = min(layers, len(held) + 1)
    fields = fields | {"num_layers": built}
    if fields.get("windows") is not None:
        fields["windows"] = fields["windows"][:built]
    with naming(checkpoint.config_path), torch.device("meta"):
        module = build(fields, checkpoint.config)
    expected = _expected(module, family)
    of_last = sum(f".{built - 1}." in name for name in expected)
    _require_match(checkpoint.path, stored, expected, (layers - built) * of_last)

    decoder = module.model if head else module
    decoder.checkpoint_config, decoder.generation_defaults = checkpoint.config, checkpoint.generation_defaults
    if dtype is None:
        numbers: Counter[str] = Counter()
        for part in stored.values():
            numbers[part.dtype] += part.numel
        dtype = DTYPES[max(numbers, key=numbers.__getitem__)]
    _fill(module, family, stored, dtype, device, weights)
    return module.eval()


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a checkpoint, and the names of the weights in each according to the index."""
    path, index = folders.find(folder, WEIGHTS), folders.find(folder, INDEX)
    if path is not None:
        return {path: []}
    if index is None:
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
        found = f", found {others[0]}: only safetensors are read, which transformers' save_pretrained writes" if others else ""
        if others == [STATE]:
            found = f", found {STATE}: the training run there has saved no weights yet"
        raise FileNotFoundError(f"model: expected {WEIGHTS} or {INDEX} in the checkpoint folder {folder}{found}")
    content = read_json(index)
    with naming(index):
        shards = schema.read({"weight_map": schema.mapping()}, content)["weight_map"]
        for name, shard in shards.items():
            if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\0]{1,200}\.safetensors", shard):
                raise ValueError(
                    f"weight_map.{name}: expected the plain name of a .safetensors file in this folder, got {shard!r}"
                )
        if not shards:
            raise ValueError("weight_map: expected at least one weight, got none")
    files = {}
    for shard in sorted(set(shards.values())):
        path = folders.find(folder, shard)
        if path is None:
            raise FileNotFoundError(f"model: expected {shard} in the checkpoint folder {folder}, which {INDEX} names")
        files[path] = [name for name, entry in shards.items() if entry == shard]
    return files


def _headers(files: dict[Path, list[str]]) -> list[Stored]:
    found = []
    for path, listed in files.items():
        with open(path, "rb") as file:
            try:
                with safe_open(path, framework="pt"):  # checks the header, and that the tensors fill the file
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(f"model: {path} is damaged: {error}") from error
            header = file.read(int.from_bytes(file.read(8), "little"))
        try:
            tensors = schema.parse_json(header, path)
        except ValueError as error:
            raise ValueError(f"model: {error}") from None
        tensors.pop("__metadata__", None)
        for name in listed:
            if name not in tensors:
                raise ValueError(f"model: {path} lacks weights: {name}, which {INDEX} says is in it")
        found += [Stored(path, name, entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()]
    return found


def _by_name(found: list[Stored], family: Family) -> dict[str, Stored]:
    """Weights by their names with prefix."""
    stored = {}
    for part in found:
        name = family.with_prefix(part.name)
        if name is None:
            continue
        if name in stored:
            raise ValueError(f"model: {part.path}: {part.name}: expected one weight of this name, got two")
        if part.dtype not in DTYPES:
            raise ValueError(
                f"model: {part.path}: {part.name}: expected dtype {' or '.join(DTYPES)}, got {part.dtype}: quantized weights "
                "are not supported"
            )
        stored[name] = part
    return stored


def _settle_output(stored: dict[str, Stored], family: Family, fields: dict, head: str | None) -> bool:
    """Whether the output matrix is tied to the token embedding; the stored weights take precedence over config.json."""
    (embedding,), (output,) = (family.checkpoint_names(f"{name}.weight")[0] for name in ("token_embedding", "output"))
    tied = fields.get("tie_embeddings", True)
    if head is not None:  # has no output matrix
        stored.pop(output, None)
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


def _expected(module: torch.nn.Module, family: Family) -> dict[str, tuple[int, ...]]:
    """Name in the checkpoint -> shape in the checkpoint."""
    expected = {}
    for name, parameter in module.named_parameters():
        names, transposed = family.checkpoint_names(name)
        for part, rows in zip(names, part_rows(module, name, len(names))):
            shape = (rows, *parameter.shape[1:])
            expected[part] = shape[::-1] if transposed else shape
    return expected


def _require_match(path: Path, stored: dict[str, Stored], expected: dict[str, tuple[int, ...]], unbuilt: int) -> None:
    """Raises ValueError for missing, unexpected or misshapen weights; unbuilt: number of missing ones not in `expected`."""
    problems = []
    lacking = sorted(expected.keys() - stored.keys())
    shapes = [
        f"{stored[name].name}: expected shape {shape}, got {stored[name].shape}"
        for name, shape in sorted(expected.items())
        if name in stored and stored[name].shape != shape
    ]
    for what, names, more in (
        ("lacks weights", lacking, unbuilt),
        ("has unexpected weights", sorted(stored.keys() - expected.keys()), 0),
        ("has misshapen weights", shapes, 0),
    ):
        more += max(0, len(names) - 5)
        if names:
            problems.append(f"{what}: {', '.join(names[:5])}" + (f" and {more:,} more" if more else ""))
    if problems:
        raise ValueError(f"model: {path} {'; '.join(problems)}")


def _fill(
    module: torch.nn.Module, family: Family, stored: dict[str, Stored], dtype: torch.dtype, device, weights: str | None
) -> None:
    """Loads the weights of a module on the meta device, chunk by chunk."""
    parameters = list(module.named_parameters())
    total = sum(parameter.numel() for _, parameter in parameters) * dtype.itemsize
    with _progress(total) as shown:
        for name, parameter in parameters:
            names, transposed = family.checkpoint_names(name)
            owner, _, attribute = name.rpartition(".")
            layer = module.get_submodule(owner)
            is_matrix = _is_matrix(layer, name)
            packing, *others = {stored[part].packing for part in names}
            rows, columns = parameter.shape[0], parameter.shape[-1]
            if is_matrix and weights is None and packing and not others and dtype is not torch.float64:
                blocks = huge_pages.empty((rows, packing.row_bytes(columns)), dtype=torch.uint8, device=device)
                for part, target in zip(names, blocks.split(part_rows(module, name, len(names)))):
                    stored[part].copy_blocks_to(target, packing, shown)
                weight: torch.Tensor = QuantizedWeight(blocks, packing, columns, dtype)
            else:
                weight = huge_pages.empty(parameter.shape, dtype=dtype, device=device)
                for part, target in zip(names, weight.split(part_rows(module, name, len(names)))):
                    stored[part].copy_to(target.t() if transposed else target, shown)
            if is_matrix and weights in BITS:
                try:
                    weight = quantize(weight, weights)
                except ValueError as error:
                    raise ValueError(f"weights: {name} cannot be quantized to {weights}: {error}") from None
            setattr(layer, attribute, torch.nn.Parameter(weight, requires_grad=not isinstance(weight, QuantizedWeight)))


def _is_matrix(layer: torch.nn.Module, name: str) -> bool:
    """Whether all of this parameter is read for a token: not a bias, the weight of a norm or a table of positions."""
    return (
        name.endswith(".weight")
        and isinstance(layer, (torch.nn.Linear, torch.nn.Embedding))
        and "position_embedding" not in name
    )


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr if it is a terminal and there is much to load; of several processes, only the first shows it."""
    if total < SHOW_PROGRESS or not is_terminal(sys.stderr) or from_torchrun("RANK"):
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="loading", unit="B", unit_scale=True) as bar:
        yield bar.update


def part_rows(model: Any, name: str, parts: int) -> list[int]:
    """The number of rows of each part of a parameter in a checkpoint."""
    rows, config = model.get_parameter(name).shape[0], model.config
    if parts == 3:  # queries, keys, values
        return [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    return [rows // parts] * parts


def contents(model: Any, head: str | None = None, entries: dict | None = None) -> tuple[dict, dict[str, torch.Tensor]]:
    """The contents that `write` saves: config.json, and the weights by name, copied only if they are stored differently."""
    name = family_of(model.config, model.checkpoint_config.get("model_type"))
    family = FAMILIES[name]
    kept = model.checkpoint_config if model.checkpoint_config.get("model_type") == name else {}
    config = {"model_type": name} | family.config_to(model.config)
    if name != "fastgpt" or head is not None:
        config["architectures"] = [architecture(name, head)]
    config |= {key: value for key, value in kept.items() if key.endswith("_token_id")}
    config |= entries or {}
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    weights = {}
    for parameter, weight in model.named_parameters():
        if parameter == "model.output.weight":  # of the language model to which a head was added
            continue
        owner, _, kind = parameter.rpartition(".")
        if kind in ("lora_A", "lora_B"):
            continue  # it is in the weight
        if hasattr(layer := model.get_submodule(owner), "merged_weight") and kind == "weight":
            weight = layer.merged_weight()
        names, transposed = family.checkpoint_names(parameter)
        for stored_as, part in zip(names, weight.detach().split(part_rows(model, parameter, len(names)))):
            weights[stored_as] = (part.t() if transposed else part).contiguous()
    return config, weights


def write(
    model: Any, folder: str | Path, head: str | None = None, entries: dict | None = None,
    generation_defaults: dict | None = None,
) -> None:  # fmt: skip
    """Writes a checkpoint that `load` reads.

    head: the model's head, one of HEADS; entries: further ones of config.json.

    Raises: ValueError, naming what is wrong in the model or generation_defaults; OSError if the folder cannot be written to,
        which leaves it unchanged.
    """
    folder = require_path("folder", folder)
    generation = generation_config(generation_defaults or {})
    config, weights = contents(model, head, entries)
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
            save_file(weights, written.enter_context(replacing(folder / WEIGHTS)), metadata={"format": "pt"})
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
