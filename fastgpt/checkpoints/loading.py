"""Loading weights, whatever format they are stored in: names and shapes compared first, then chunk by chunk into the module."""

import contextlib
import math
import mmap
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from fastgpt import huge_pages
from fastgpt.checkpoints.families.family import OF_EXPERTS, Family, Fused, as_rows
from fastgpt.checkpoints.files import naming
from fastgpt.checks import from_torchrun, is_terminal, require_choice, shown
from fastgpt.ops.quantized_weight import BITS, Packing, Quantization, QuantizedWeight, quantize_to

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 32 << 20  # bytes of a file that are mapped at a time: mapped pages count as this process's memory
QUANTIZED_CHUNK = 1 << 20  # and of what is quantized, which may be transposed and, on a GPU, makes several copies of it
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

    def of_expert(self, expert: int, part: int, fused: Fused) -> "Stored":
        """One of the parts of an expert, of a tensor with a first dimension of experts."""
        raise NotImplementedError

    def chunks(self, size: int = CHUNK, multiple: int = 1) -> Iterator[slice]:
        """Slices of rows, each a multiple of so many, of at most `size` bytes."""
        step = size * self.shape[0] // max(1, self.numel * DTYPES[self.dtype].itemsize)
        step = max(1, step // multiple) * multiple
        return (slice(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step))

    def copy_to(self, target: torch.Tensor, shown: Callable[[int], object]) -> None:
        """shown: called with the bytes of each chunk."""
        for rows in self.chunks():
            part = target[rows].copy_(self.read(rows))
            self._require_finite(part)
            shown(part.nbytes)

    def quantize_to(self, target: torch.Tensor, packing: Packing, transposed: bool, shown: Callable[[int], object]) -> None:
        """As `copy_to`, of a matrix that is quantized into target, blocks (N, bytes).

        transposed: it is stored (C, N). Then groups of columns are rows here.
        """
        for rows in self.chunks(QUANTIZED_CHUNK, packing.group_size if transposed else 1):
            part = self.read(rows).to(target.device)
            self._require_finite(part)
            if transposed:
                part = _turned(part)
                of_part = target[:, packing.row_bytes(rows.start) : packing.row_bytes(rows.stop)]
            else:
                of_part = target[rows]
            try:
                quantize_to(of_part, part, packing)
            except ValueError as error:
                raise ValueError(f"weights: {self.name} cannot be quantized: {error}") from None
            shown(part.numel() * packing.block_bytes // packing.block)

    def _require_finite(self, part: torch.Tensor) -> None:
        # Not torch.aminmax, which copies transposed tensors.
        if not part.is_meta and not all(map(math.isfinite, (part.amin(), part.amax()))):
            raise ValueError(f"model: {self.path}: {self.name}: expected finite numbers in {part.dtype}, got NaN or infinity")

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


def _turned(x: torch.Tensor) -> torch.Tensor:
    """x.t().contiguous(). On a CPU in memory of its own, which goes back to the system: glibc 2.36 does not give the memory of an
    aligned tensor to the next one of its size, and what is freed between the weights would add up."""
    memory = torch.frombuffer(mmap.mmap(-1, x.nbytes), dtype=x.dtype) if x.is_cpu else x.new_empty(x.numel())
    return memory.view(x.shape[::-1]).copy_(x.t())


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a checkpoint say, before any weight is read.

    path: of the weights, for errors: a file, or the folder of several.
    config_path: of the file that says what `config` and `fields` do.
    config: as config.json has it; fields: GPTConfig's or EncoderConfig's.
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
    *, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    weights: str | Quantization | None = None,
) -> Any:  # fmt: skip
    """Builds the module of a checkpoint and loads its weights. It is returned in evaluation mode.

    Names and shapes are compared with the headers of the files before memory is allocated.

    Args:
        build: (the fields of its configuration, config.json) -> the module; called on the meta device.
        head: the module's, one of HEADS.
        dtype: of the weights; default: the one that most of the stored numbers have.
        weights: None: matrices as they are stored, quantized ones too if their blocks are served; "dequantized"; or how they
            are quantized: "int8", "int4" or a Quantization. dtype is that of the others.

    Raises: ValueError that names the file and what is wrong in it; TypeError, ValueError for dtype and device.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(f"dtype: expected {' or '.join(map(str, DTYPES.values()))} or None, got {shown(dtype)}")
    if weights is not None and not isinstance(weights, Quantization):
        require_choice("weights", weights, MATRICES)
        weights = Quantization(weights) if weights in BITS else weights
    if isinstance(weights, Quantization):
        require_choice("weights", weights.dtype, BITS)
    try:
        device = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: expected a device of this machine, got {shown(device)} ({reason})") from None
    family, fields, stored = checkpoint.family, checkpoint.fields, checkpoint.stored

    # The config may claim any number of layers: at most one that is not in the files is built, to name its missing weights.
    unbuilt = []  # of each part, its blocks that are not, and the name of the last one that is
    for part, of_part in family.parts(fields):
        held = {match[1] for name in stored if (match := re.match(family.layer_pattern(part), name))}
        built = min(of_part["num_layers"], len(held) + 1)
        unbuilt.append((of_part["num_layers"] - built, f"{part}blocks.{built - 1}."))
        of_part = of_part | {"num_layers": built}
        for name in ("windows", "rope_layers", "moe_layers"):
            if of_part.get(name) is not None:
                of_part[name] = of_part[name][:built]
        fields = fields | {part.removesuffix("."): of_part} if part else of_part
    with naming(checkpoint.config_path), torch.device("meta"):
        module = build(fields, checkpoint.config)
    expected = _expected(module, family, stored)
    for name in [name for name in stored.keys() - expected.keys() if name.endswith(".bias")]:
        # AutoGPTQ gave each quantized matrix a bias, whether the model has one or not.
        matrix = stored.get(name.removesuffix("bias") + "weight")
        if matrix is not None and matrix.is_linear and not stored[name].read(slice(None)).any():
            del stored[name]
    of_blocks = [
        count * len(family.checkpoint_names(name, _experts(module))[0])
        for count, last in unbuilt
        for name, _ in module.named_parameters()
        if name.removeprefix("model.").startswith(last)
    ]
    _require_match(checkpoint.path, stored, expected, sum(of_blocks))

    decoder = module.model if head else module
    decoder.checkpoint_config, decoder.generation_defaults = checkpoint.config, checkpoint.generation_defaults
    if dtype is None:
        numbers: Counter[str] = Counter()
        for weight in stored.values():
            numbers[weight.dtype] += weight.numel
        dtype = DTYPES[max(numbers, key=numbers.__getitem__)]
    if dtype is torch.float64 and isinstance(weights, Quantization):
        raise TypeError(f"dtype: expected fp32, fp16 or bf16 with weights={weights.dtype!r}, got {dtype}")
    if weights is None and dtype is not torch.float64:
        separate_parts(module, family, stored)
    _fill(module, family, stored, dtype, device, weights)
    return module.eval()


def _expected(module: torch.nn.Module, family: Family, stored: dict[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Name in the checkpoint -> shape in the checkpoint."""
    expected = {}
    for name, parameter in module.named_parameters():
        names, transposed = family.checkpoint_names(name, _experts(module))
        for part, rows in zip(names, rows_of_parts(module, name, len(names))):
            shape = (rows, *as_rows(name, parameter).shape[1:])
            expected[part] = shape[::-1] if transposed and not (part in stored and stored[part].is_linear) else shape
    return expected


def _experts(module: Any) -> int | None:
    return module.config.num_experts


def by_expert(stored: Mapping[str, Stored], family: Family, experts: int | None) -> dict[str, Stored]:
    """What is stored, with tensors of all experts as those of each, by their names with prefix.

    Raises: ValueError for one that is stored twice.
    """
    result = {}
    for name, tensor in stored.items():
        found = family.fused_as(name)
        if found is None or experts is None or tensor.shape[:1] != (experts,) or len(tensor.shape) < 2:
            parts = {name: tensor}
        else:
            fused, layer = found
            parts = {
                f"{family.prefix}{part.format(i=layer, e=e)}": tensor.of_expert(e, i, fused)
                for e in range(experts)
                for i, part in enumerate(fused.parts)
            }
        for part, one in parts.items():
            if part in result:
                raise ValueError(f"model: {tensor.path}: {tensor.name}: expected each weight once, got {part} as well")
            result[part] = one
    return result


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


def separate_parts(module: torch.nn.Module, family: Family, stored: dict[str, Stored]) -> None:
    """Makes a layer of a module on the meta device whose parts are stored in different blocks, such as values in more bits than
    queries and keys, an nn.ModuleList of a layer for each: nothing has to be dequantized to join them."""
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or not _is_matrix(layer, f"{name}.weight"):
            continue
        names, _ = family.checkpoint_names(f"{name}.weight")
        if len({stored[part].packing for part in names}) > 1:
            rows = rows_of_parts(module, f"{name}.weight", len(names))
            has_bias = layer.bias is not None
            parts = [torch.nn.Linear(layer.in_features, count, bias=has_bias, device="meta") for count in rows]
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, torch.nn.ModuleList(parts))


def _fill(
    module: torch.nn.Module, family: Family, stored: dict[str, Stored], dtype: torch.dtype, device,
    weights: str | Quantization | None,
) -> None:  # fmt: skip
    """Loads the weights of a module on the meta device, chunk by chunk."""
    parameters = list(module.named_parameters())
    total = sum(parameter.numel() for _, parameter in parameters) * dtype.itemsize
    with _progress(total) as shown:
        for name, parameter in parameters:
            names, transposed = family.checkpoint_names(name, _experts(module))
            owner, _, attribute = name.rpartition(".")
            layer = module.get_submodule(owner)
            rows, columns = len(as_rows(name, parameter)), parameter.shape[-1]
            parts = list(zip((stored[part] for part in names), rows_of_parts(module, name, len(names))))
            packing = None
            if _is_matrix(layer, name) and isinstance(weights, Quantization):
                try:
                    of_vocabulary = name.endswith(("token_embedding.weight", "output.weight"))
                    packing = (weights.of_vocabulary if of_vocabulary else weights).packing(columns)
                except ValueError as error:
                    raise ValueError(f"weights: {name} cannot be quantized to {weights.dtype}: {error}") from None
            elif _is_matrix(layer, name) and weights is None and dtype is not torch.float64:
                as_stored, *others = {part.packing for part, _ in parts}
                packing = None if others else as_stored
            shape = parameter.shape if packing is None else (rows, packing.row_bytes(columns))
            kept = torch.promote_types(dtype, torch.float32) if is_kept_in_fp32(module.config, name) else dtype
            weight = huge_pages.empty(shape, dtype=kept if packing is None else torch.uint8, device=device)
            targets = (weight if packing else as_rows(name, weight)).split([count for _, count in parts])
            for (part, _), target in zip(parts, targets):
                turned = transposed and not part.is_linear
                if packing is None:
                    part.copy_to(target.t() if turned else target, shown)
                elif weights is None:
                    part.copy_blocks_to(target, packing, shown)
                else:
                    part.quantize_to(target, packing, turned, shown)
            order = family.row_order(name, module.config)  # type: ignore[arg-type]  # of a decoder, or a head on one
            if order is not None:
                weight.copy_(weight[order.to(weight.device)])
            if packing is not None:
                weight = QuantizedWeight(weight, packing, columns, dtype)
            setattr(layer, attribute, torch.nn.Parameter(weight, packing is None and parameter.requires_grad))


def is_kept_in_fp32(config: Any, name: str) -> bool:
    """Whether a parameter is of a router that computes in fp32, whatever the dtype of the others."""
    return config.router_fp32 and name.endswith((".router.weight", ".router.bias", ".selection_bias"))


def _is_matrix(layer: torch.nn.Module, name: str) -> bool:
    """Whether this parameter is one of the matrices that are read for a token: not a bias, the weight of a norm, a router or a
    table of positions or types."""
    if (of_experts := OF_EXPERTS.fullmatch(name)) is not None:
        return of_experts[3] is None
    return (
        name.endswith(".weight")
        and isinstance(layer, (torch.nn.Linear, torch.nn.Embedding))
        and "position_embedding" not in name
        and not name.endswith((".router.weight", ".shared_gate.weight"))  # small, and the choice of experts depends on them
        and "type_embedding" not in name
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


def rows_of_parts(model: Any, name: str, parts: int) -> list[int]:
    """The number of rows of each part of a parameter in a checkpoint."""
    owner = getattr(model, name.partition(".")[0], None)  # the encoder or the decoder, of a model that has both
    config = getattr(owner, "config", model.config)
    rows = len(as_rows(name, model.get_parameter(name)))
    if parts == 3 and OF_EXPERTS.fullmatch(name) is None:  # queries, keys, values
        return [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    return [rows // parts] * parts
