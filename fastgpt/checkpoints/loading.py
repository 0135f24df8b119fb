"""Loading weights, whatever format they are stored in: names and shapes compared first, then chunk by chunk into the module."""

import contextlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from fastgpt import huge_pages
from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.files import naming
from fastgpt.checks import from_torchrun, is_terminal, require_choice
from fastgpt.ops.quantized_weight import BITS, Packing, QuantizedWeight, quantize

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 32 << 20  # bytes of a file that are mapped at a time: mapped pages count as this process's memory
MATRICES = (*BITS, "dequantized")  # how matrices can be loaded that are not to be as they are stored
SHOW_PROGRESS = 1 << 30  # bytes of weights from which on a progress bar is shown: reading them takes a second or more


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; each format derives from it."""

    path: Path
    name: str
    dtype: str  # one of DTYPES: what a model has that is all stored like this
    shape: tuple[int, ...]

    packing: ClassVar[Packing | None] = None  # of a matrix that `read_blocks` gives as it is stored
    is_linear: ClassVar[bool] = False  # (N, C), as nn.Linear has it, though the family's matrices are transposed

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, rows: slice) -> torch.Tensor:
        raise NotImplementedError

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
    expected = _expected(module, family, stored)
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


def _expected(module: torch.nn.Module, family: Family, stored: dict[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Name in the checkpoint -> shape in the checkpoint."""
    expected = {}
    for name, parameter in module.named_parameters():
        names, transposed = family.checkpoint_names(name)
        for part, rows in zip(names, rows_of_parts(module, name, len(names))):
            shape = (rows, *parameter.shape[1:])
            expected[part] = shape[::-1] if transposed and not (part in stored and stored[part].is_linear) else shape
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
                for part, target in zip(names, blocks.split(rows_of_parts(module, name, len(names)))):
                    stored[part].copy_blocks_to(target, packing, shown)
                weight: torch.Tensor = QuantizedWeight(blocks, packing, columns, dtype)
            else:
                weight = huge_pages.empty(parameter.shape, dtype=dtype, device=device)
                for part, target in zip(names, weight.split(rows_of_parts(module, name, len(names)))):
                    stored[part].copy_to(target.t() if transposed and not stored[part].is_linear else target, shown)
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


def rows_of_parts(model, name: str, parts: int) -> list[int]:
    """The number of rows of each part of a parameter in a checkpoint."""
    rows, config = model.get_parameter(name).shape[0], model.config
    if parts == 3:  # queries, keys, values
        return [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    return [rows // parts] * parts
