"""Quantized matrices in folders of transformers, as others write them: what config.json says of them, and how they are stored.

    w = scale · (q - zero)       q from 0 to 2^bits - 1; zero is 2^(bits - 1) if the quantization is symmetric

They become blocks of QuantizedWeight, w = scale · q + minimum, with the integers that are stored. Scales are rounded to fp16, which
holds those of GPTQ and AWQ exactly, and those in bf16 if they are not below 2^-14. A minimum, -scale · zero, is rounded to fp16,
too: by at most 1/128 of a step of 4 bits, or 1/8 of one of 8 bits.

Of a matrix X (N, C) with G groups of columns, these tensors are stored:

    gptq                 X.qweight (C·bits/32, N) int32, X.qzeros (G, N·bits/32) int32, X.scales (G, N), X.g_idx (C,) int32
    awq                  X.qweight (C, N/8) int32, X.qzeros (G, N/8) int32, X.scales (G, N)
    compressed-tensors   X.weight_packed (N, C·bits/32) int32, or X.weight (N, C) int8; X.weight_scale (N, G);
                         X.weight_zero_point (N, G) int8, or (N·bits/32, G) int32
    mxfp4                X_blocks (E, N, C/32, 16) uint8, X_scales (E, N, C/32) uint8: of all experts (GPT-OSS), numbers of 4 bits in
                         groups of 32 with a power of two, GGUF's MXFP4 with the halves of a byte side by side
    torchao              X._weight_qdata (N, C) int8, X._weight_scale (N, G), X._weight_zero_point (N, G) int8
    fastgpt              X.weight (N, bytes) uint8, blocks of QuantizedWeight as they are in memory; the file's metadata have the
                         packing of each: "fastgpt.packings": {"X.weight": [bits, group_size, minima, block_type], ...}

Sources: AutoGPTQ's and AutoAWQ's linear layers, compressed-tensors' compressors, torchao's Int8Tensor.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from fastgpt import schema
from fastgpt.checkpoints.families.family import Fused
from fastgpt.checkpoints.loading import DTYPES, Stored
from fastgpt.checkpoints.safetensors_files import ExpertTensor, SafetensorsTensor
from fastgpt.ops.quantized_weight import BITS, GGUF_PACKINGS, GROUP_SIZES, UNIT, Packing, dequantize_blocks, pack
from fastgpt.schema import Field, flag, only, unsupported

ENTRY = "quantization_config"  # of config.json
MXFP4 = "mxfp4"
OWN, PACKINGS = "fastgpt", "fastgpt.packings"  # our quant_method, and the entry of metadata
CHUNK = 1 << 20  # bytes of numbers, as of the model's dtype, that are read at a time, with some copies of them in fp32
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where columns 0 to 7 are among the eight numbers of an integer, from its lowest bits on
SAID = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in config.json


class Scheme(NamedTuple):
    """What config.json says of all quantized matrices.

    group_size: None: a row.
    one_less: zero points are stored less one.
    dtype: of the model, one of DTYPES; None: that of scales.
    """

    method: str
    bits: int
    group_size: int | None
    symmetric: bool
    one_less: bool
    dtype: str | None


class Numbers(NamedTuple):
    """Of some rows of a matrix: q (R, C) uint8, scale (R, G) and, if it is not symmetric, zero (R, G), of any dtype."""

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None


def scheme(config: dict) -> Scheme | None:
    """What config.json says of quantized matrices; None: there are none.

    Raises: ValueError, naming the entry, for a quantization that is not served.
    """
    entries = schema.read({ENTRY: schema.mapping(None, optional=True)}, config)[ENTRY]
    if entries is None:
        return None
    prefix = f"{ENTRY}."
    method = schema.read({"quant_method": schema.choice((*METHODS, MXFP4, OWN))}, entries, prefix)["quant_method"]
    said = schema.read({"dtype": Field(_any, None), "torch_dtype": Field(_any, None)}, config)
    dtype = next((name for name, word in SAID.items() if word in (said["dtype"], said["torch_dtype"])), None)
    if method in (MXFP4, OWN):
        return Scheme(method, 0, None, False, False, dtype)
    return METHODS[method].scheme(entries, prefix)._replace(method=method, dtype=dtype)


def _any(name, value):
    return value


def _number(choices: Sequence, default: Any = schema.REQUIRED) -> Field:
    """One of these numbers, or None where it is one of them."""

    def check(name, value):
        if isinstance(value, bool) or value not in choices:
            raise ValueError(f"{name}: expected {' or '.join(map(str, choices))}, got {value!r:.100}")
        return value

    return Field(check, default)


def own_metadata(packings: Mapping[str, Packing]) -> dict[str, str]:
    """Of a safetensors file with blocks: name -> what they hold."""
    return {PACKINGS: json.dumps(packings)} if packings else {}


def matrices(found: Sequence[SafetensorsTensor], scheme: Scheme, metadata: Mapping[str, str]) -> list[Stored]:
    """The tensors that are stored, each quantized matrix as one of them.

    Args:
        metadata: of the safetensors files.

    Raises: ValueError that names a tensor which is missing, misshapen or of another dtype.
    """
    if scheme.method == OWN:
        return _own_matrices(found, scheme, metadata)
    if scheme.method == MXFP4:
        return _mxfp4_matrices(found, scheme)
    method = METHODS[scheme.method]
    by_name = {tensor.name: tensor for tensor in found}
    result: dict[str, Stored] = dict(by_name)
    for tensor in found:
        for main in method.main:
            module = tensor.name.removesuffix(main)
            if module == tensor.name or module + method.scale not in by_name and tensor.dtype in DTYPES:
                continue
            parts = {suffix: by_name[module + suffix] for suffix in method.suffixes if module + suffix in by_name}
            for suffix in parts:
                result.pop(module + suffix, None)
            name = f"{module}.weight"
            if name in result and name != tensor.name:
                raise ValueError(f"model: {tensor.path}: {name}: expected one weight of this name, got {tensor.name} as well")
            result[name] = QuantizedMatrix.of(name, scheme, main, parts, tensor)
            break
    for name in result:
        if name.endswith(method.scale):
            missing = name.removesuffix(method.scale) + method.main[0]
            raise ValueError(f"model: {by_name[name].path} lacks weights: {missing}, of which it has {name}")
    return list(result.values())


@dataclass(frozen=True)
class QuantizedMatrix(Stored):
    """A matrix (N, C) of integers, which share scales in groups of columns.

    parts: the tensors that it is stored in, by what their names end with.
    """

    scheme: Scheme
    main: str
    parts: Mapping[str, SafetensorsTensor]
    group_size: int

    is_linear: ClassVar[bool] = True

    @classmethod
    def of(
        cls, name: str, scheme: Scheme, main: str, parts: Mapping[str, SafetensorsTensor], tensor: SafetensorsTensor
    ) -> "QuantizedMatrix":
        """Checks that all tensors of the matrix are there, with the shapes that belong together.

        Args:
            main, tensor: the tensor of integers, and what its name ends with.
        """
        method = METHODS[scheme.method]
        require_shapes = _Shapes(tensor, parts)
        N, C = method.shape(main, tensor, scheme)
        group_size = scheme.group_size or C
        if not C or C % group_size:
            raise ValueError(
                f"model: {tensor.path}: {tensor.name}: expected a multiple of {group_size} columns, the group_size, got {C}"
            )
        method.check(main, scheme, N, C, C // group_size, require_shapes)
        scale = parts[method.scale]
        if scale.dtype not in DTYPES:
            raise ValueError(f"model: {scale.path}: {scale.name}: expected dtype {' or '.join(DTYPES)}, got {scale.dtype}")
        return cls(tensor.path, name, scheme.dtype or scale.dtype, (N, C), scheme, main, parts, group_size)

    @property
    def packing(self) -> Packing | None:  # type: ignore[override]  # a constant there
        return None if self.group_size % UNIT else Packing(self.scheme.bits, self.group_size, not self.scheme.symmetric)

    def chunks(self, size: int = CHUNK, multiple: int = 1) -> Iterator[slice]:
        return super().chunks(min(size, CHUNK), UNIT)  # of whole integers of 32 bits

    def read(self, rows: slice) -> torch.Tensor:
        """(R, C) fp32."""
        q, scale, zero = self._numbers(rows)
        offset = 2.0 ** (self.scheme.bits - 1) if zero is None else zero.float().unsqueeze(-1)
        return ((q.float() - offset) * scale.float().unsqueeze(-1)).flatten(1)

    def read_blocks(self, rows: slice) -> torch.Tensor:
        packing = Packing(self.scheme.bits, self.group_size, not self.scheme.symmetric)
        q, scale, zero = self._numbers(rows)
        scale = scale.to(torch.float16)
        if zero is None:
            return pack(q if packing.bits == 4 else q.to(torch.int16) - 128, scale, None, packing)
        return pack(q, scale, (-scale.float() * zero.float()).to(torch.float16), packing)

    def _numbers(self, rows: slice) -> Numbers:
        """As `Numbers`, q in groups: (R, G, group size)."""
        q, scale, zero = METHODS[self.scheme.method].numbers(self, rows)
        if zero is not None and self.scheme.symmetric:
            middle = 2 ** (self.scheme.bits - 1)
            if (zero != middle).any():
                raise ValueError(
                    f"model: {self.path}: {self.name}: expected zero points in the middle, as a symmetric quantization has them"
                )
            zero = None
        return Numbers(q.view(len(q), -1, self.group_size), scale, zero)


class _Shapes:
    """Checks tensors of a matrix."""

    def __init__(self, tensor: SafetensorsTensor, parts: Mapping[str, SafetensorsTensor]):
        self.tensor, self.parts = tensor, parts

    def __call__(self, suffix: str, *shapes: tuple[int, ...], dtype: str | None = None) -> None:
        """Raises ValueError unless there is a tensor of one of these shapes, and of this dtype."""
        path, part = self.tensor.path, self.parts.get(suffix)
        if part is None:
            raise ValueError(f"model: {path} lacks weights: one that ends with {suffix} beside {self.tensor.name}")
        if part.shape not in shapes:
            raise ValueError(
                f"model: {path} has misshapen weights: {part.name}: expected shape {' or '.join(map(str, shapes))}, got {part.shape}"
            )
        if dtype is not None and part.dtype != dtype:
            raise ValueError(f"model: {path}: {part.name}: expected dtype {dtype}, got {part.dtype}")


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., n) int32 -> (..., n · 32 / bits) uint8, each integer's lowest bits first."""
    integers = words.contiguous().view(torch.uint8)
    return integers if bits == 8 else torch.stack((integers & 15, integers >> 4), -1).flatten(-2)


def _of(rows: slice, per_word: int) -> slice:
    """The words that hold these rows."""
    return slice(rows.start // per_word, -(-rows.stop // per_word))


# Ours


@dataclass(frozen=True)
class StoredBlocks(Stored):
    """A matrix (N, C) in blocks, as QuantizedWeight has them."""

    tensor: SafetensorsTensor
    blocks: Packing

    is_linear: ClassVar[bool] = True

    @property
    def packing(self) -> Packing:  # type: ignore[override]  # a constant there
        return self.blocks

    def read(self, rows: slice) -> torch.Tensor:
        parts = self.tensor.read(rows).split(max(1, CHUNK // 4 // self.shape[1]))
        return torch.cat([dequantize_blocks(part, self.packing, self.shape[1]) for part in parts])

    def read_blocks(self, rows: slice) -> torch.Tensor:
        return self.tensor.read(rows)


def _own_matrices(found: Sequence[SafetensorsTensor], scheme: Scheme, metadata: Mapping[str, str]) -> list[Stored]:
    by_name = {tensor.name: tensor for tensor in found}
    result: dict[str, Stored] = dict(by_name)
    if PACKINGS not in metadata:
        return list(result.values())
    try:
        packings = schema.parse_json(metadata[PACKINGS].encode(), PACKINGS)
    except ValueError as error:
        raise ValueError(f"model: {found[0].path}: {error}") from None
    for name, stored in packings.items():
        if name not in by_name:
            raise ValueError(f"model: {found[0].path} lacks weights: {name}, whose packing its metadata have")
        tensor = by_name[name]
        packing = _packing(stored)
        if packing is None or len(tensor.shape) != 2 or tensor.dtype != "U8" or tensor.shape[1] % packing.block_bytes:
            raise ValueError(
                f"model: {tensor.path}: {name}: expected rows of blocks in U8, as their packing [bits, group_size, minima, block_type] says, got "
                f"shape {tensor.shape} of {tensor.dtype} and {stored!r:.100}"
            )
        shape = tensor.shape[0], tensor.shape[1] // packing.block_bytes * packing.block
        result[name] = StoredBlocks(tensor.path, name, scheme.dtype or "F32", shape, tensor, packing)
    return list(result.values())


def _packing(stored: Any) -> Packing | None:
    if not isinstance(stored, list) or list(map(type, stored)) != [int, int, bool, int]:
        return None
    packing = Packing(*stored)
    if packing.block_type:
        return packing if packing in GGUF_PACKINGS.values() else None
    served = packing.bits in BITS.values() and packing.group_size > 0 and packing.group_size % UNIT == 0
    return packing if served else None


# Experts in MXFP4


@dataclass(frozen=True)
class Mxfp4Experts(Stored):
    """The matrices of all experts, (E, N, C)."""

    blocks: SafetensorsTensor
    scales: SafetensorsTensor

    def of_expert(self, expert: int, part: int, fused: Fused) -> Stored:
        shape: tuple[int, ...] = (self.shape[1] // len(fused.parts), self.shape[2])
        if self.shape[1] % len(fused.parts):
            shape = self.shape[1:]  # misshapen, which an error will say
        return Mxfp4Matrix(self.path, self.name, self.dtype, shape, self, expert, part, fused)


@dataclass(frozen=True)
class Mxfp4Matrix(Stored):
    """A part of an expert's matrix, whose blocks become those of GGUF."""

    whole: Mxfp4Experts
    expert: int
    part: int
    fused: Fused

    is_linear: ClassVar[bool] = True
    packing: ClassVar[Packing] = GGUF_PACKINGS["MXFP4"]

    def read(self, rows: slice) -> torch.Tensor:
        return dequantize_blocks(self.read_blocks(rows), self.packing, self.shape[1])

    def read_blocks(self, rows: slice) -> torch.Tensor:
        blocks, scales = (
            ExpertTensor(
                self.path, tensor.name, "U8", self.shape, self.expert, self.part, self.fused._replace(transposed=False)
            )
            .read(rows)
            .contiguous()
            for tensor in (self.whole.blocks, self.whole.scales)
        )  # (R, G, 16), (R, G)
        q = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)  # (R, G, 32)
        return torch.cat([scales[..., None], q[..., :16] | q[..., 16:] << 4], -1).flatten(1)


def _mxfp4_matrices(found: Sequence[SafetensorsTensor], scheme: Scheme) -> list[Stored]:
    by_name = {tensor.name: tensor for tensor in found}
    result: dict[str, Stored] = dict(by_name)
    for name, blocks in by_name.items():
        module = name.removesuffix("_blocks")
        if module == name:
            continue
        scales = result.pop(f"{module}_scales", None)
        del result[name]
        shape = blocks.shape
        if len(shape) != 4 or shape[3] != 16 or blocks.dtype != "U8":
            raise ValueError(
                f"model: {blocks.path}: {name}: expected shape (E, N, C/32, 16) of U8, got {shape} of {blocks.dtype}"
            )
        if scales is None or scales.shape != shape[:3] or scales.dtype != "U8":
            got = "none" if scales is None else f"{scales.shape} of {scales.dtype}"
            raise ValueError(f"model: {blocks.path}: {module}_scales: expected shape {shape[:3]} of U8, got {got}")
        whole = (*shape[:2], shape[2] * 32)
        result[module] = Mxfp4Experts(blocks.path, module, scheme.dtype or "BF16", whole, blocks, by_name[f"{module}_scales"])
    return list(result.values())


# GPTQ


def _gptq_scheme(entries: dict, prefix: str) -> Scheme:
    read = schema.read(
        {
            "bits": _number((4, 8)),
            "group_size": _number((32, 64, 128, -1)),
            "sym": flag(True),
            "desc_act": flag(False),  # g_idx says whether the columns are in another order
            "checkpoint_format": schema.choice(("gptq", "gptq_v2"), "gptq"),
            "format": schema.choice(("gptq", "gptq_v2"), "gptq"),
            "is_marlin_format": unsupported(),
            "dynamic": Field(_no_rules, None),
            "lm_head": flag(False),
        },
        entries,
        prefix,
    )
    newer = "gptq_v2" in (read["checkpoint_format"], read["format"])
    return Scheme("", read["bits"], _group(read["group_size"]), read["sym"], not newer, None)


def _no_rules(name, value):
    if value:
        raise ValueError(f"{name}: expected no rules for single modules, since they are not supported, got {value!r:.100}")
    return value


def _group(stored: int | None) -> int | None:
    return None if stored == -1 else stored


def _gptq_shape(main: str, tensor: SafetensorsTensor, scheme: Scheme) -> tuple[int, int]:
    rows, columns = _two(tensor, "I32")
    return columns, rows * 32 // scheme.bits


def _two(tensor: SafetensorsTensor, dtype: str) -> tuple[int, int]:
    if len(tensor.shape) != 2 or tensor.dtype != dtype:
        raise ValueError(
            f"model: {tensor.path}: {tensor.name}: expected a matrix of {dtype}, got shape {tensor.shape} of {tensor.dtype}"
        )
    return tensor.shape[0], tensor.shape[1]


def _gptq_check(main: str, scheme: Scheme, N: int, C: int, G: int, require: _Shapes) -> None:
    require(".scales", (G, N))
    require(".qzeros", (G, N * scheme.bits // 32), dtype="I32")
    if ".g_idx" not in require.parts:
        return
    require(".g_idx", (C,), dtype="I32")
    tensor = require.parts[".g_idx"]
    if not torch.equal(tensor.read(slice(None)).long(), torch.arange(C) // (C // G)):
        raise ValueError(
            f"model: {tensor.path}: {tensor.name}: expected groups of consecutive columns, got another order, which desc_act (act-order) "
            "makes: it is not supported"
        )


def _gptq_numbers(matrix: QuantizedMatrix, rows: slice) -> Numbers:
    parts, bits = matrix.parts, matrix.scheme.bits
    q = _unpacked(parts[".qweight"].read_columns(rows).t(), bits)
    zero = _unpacked(parts[".qzeros"].read_columns(_of(rows, 32 // bits)), bits).t().to(torch.int16)
    return Numbers(q, parts[".scales"].read_columns(rows).t(), zero + 1 if matrix.scheme.one_less else zero)


# AWQ


def _awq_scheme(entries: dict, prefix: str) -> Scheme:
    lower = {key: value.lower() if isinstance(value, str) else value for key, value in entries.items()}
    read = schema.read(
        {
            "bits": _number((4,)),
            "group_size": _number((32, 64, 128, -1)),
            "zero_point": only(True, True),
            "version": only("gemm", "gemm"),
            "format": only("gemm", "gemm"),
        },
        lower,
        prefix,
    )
    return Scheme("", read["bits"], _group(read["group_size"]), False, False, None)


def _awq_shape(main: str, tensor: SafetensorsTensor, scheme: Scheme) -> tuple[int, int]:
    rows, columns = _two(tensor, "I32")
    return columns * 8, rows


def _awq_check(main: str, scheme: Scheme, N: int, C: int, G: int, require: _Shapes) -> None:
    require(".scales", (G, N))
    require(".qzeros", (G, N // 8), dtype="I32")


def _awq_numbers(matrix: QuantizedMatrix, rows: slice) -> Numbers:
    def unpacked(suffix):
        numbers = _unpacked(matrix.parts[suffix].read_columns(_of(rows, 8)), 4)
        return numbers.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).t()

    return Numbers(unpacked(".qweight").contiguous(), matrix.parts[".scales"].read_columns(rows).t(), unpacked(".qzeros"))


# compressed-tensors


def _compressed_scheme(entries: dict, prefix: str) -> Scheme:
    formats = "pack-quantized", "int-quantized", "naive-quantized"
    read = schema.read(
        {
            "format": schema.choice((*formats, "mixed-precision")),
            "config_groups": schema.mapping(),
            "kv_cache_scheme": unsupported(),
            "sparsity_config": Field(_dense, None),
            "transform_config": Field(_dense, None),
            "quantization_status": schema.choice(("compressed",), "compressed"),
        },
        entries,
        prefix,
    )
    prefix += "config_groups"
    groups = read["config_groups"]
    if len(groups) != 1:
        raise ValueError(f"{prefix}: expected one group of modules, got {', '.join(groups) or 'none'}")
    ((name, group),) = groups.items()
    group = schema.read({name: schema.mapping()}, groups, f"{prefix}.")[name]
    prefix += f".{name}."
    weights = schema.read(
        {
            "weights": schema.mapping(),
            "input_activations": unsupported(),
            "output_activations": unsupported(),
            "format": schema.choice((None, *formats), None),
        },
        group,
        prefix,
    )["weights"]
    found = schema.read(
        {
            "num_bits": _number((4, 8)),
            "type": only("int", "int"),
            "symmetric": flag(True),
            "strategy": schema.choice(("group", "channel")),
            "group_size": _number((*GROUP_SIZES, -1), None),
            "dynamic": only(False, False),
            "actorder": schema.choice((None, "weight", "static"), None),
        },
        weights,
        f"{prefix}weights.",
    )
    if found["strategy"] == "group" and found["group_size"] in (None, -1):
        raise ValueError(f"{prefix}weights.group_size: expected 32, 64 or 128, got {found['group_size']!r}")
    group_size = found["group_size"] if found["strategy"] == "group" else None
    return Scheme("", found["num_bits"], group_size, found["symmetric"], False, None)


def _dense(name, value):
    if value and not (isinstance(value, dict) and value.get("format") == "dense"):
        raise ValueError(f"{name}: expected none, since it is not supported, got {value!r:.100}")
    return value


def _compressed_shape(main: str, tensor: SafetensorsTensor, scheme: Scheme) -> tuple[int, int]:
    if main == ".weight":
        return _two(tensor, "I8")
    rows, columns = _two(tensor, "I32")
    return rows, columns * 32 // scheme.bits


def _compressed_check(main: str, scheme: Scheme, N: int, C: int, G: int, require: _Shapes) -> None:
    require(".weight_scale", (N, G))
    if ".weight_shape" in require.parts:
        require(".weight_shape", (2,))
        tensor = require.parts[".weight_shape"]
        if (stored := tensor.read(slice(None)).tolist()) != [N, C]:
            raise ValueError(
                f"model: {tensor.path}: {tensor.name}: expected {[N, C]}, as of {require.tensor.name}, got {stored}"
            )
    if ".weight_g_idx" in require.parts:
        name = require.parts[".weight_g_idx"].name
        raise ValueError(
            f"model: {require.tensor.path}: {name}: expected none, since groups in another order are not supported"
        )
    if scheme.symmetric and ".weight_zero_point" not in require.parts:
        return
    packed = require.parts.get(".weight_zero_point")
    is_packed = packed is not None and packed.dtype == "I32"
    require(".weight_zero_point", (-(-N * scheme.bits // 32), G) if is_packed else (N, G), dtype="I32" if is_packed else "I8")


def _compressed_numbers(matrix: QuantizedMatrix, rows: slice) -> Numbers:
    parts, bits = matrix.parts, matrix.scheme.bits
    half = 2 ** (bits - 1)
    if matrix.main == ".weight":
        q = _from_signed(matrix, parts[".weight"].read(rows))
    else:
        q = _unpacked(parts[".weight_packed"].read(rows), bits)
    zero = None
    if (stored := parts.get(".weight_zero_point")) is not None:
        if stored.dtype == "I8":
            zero = stored.read(rows).to(torch.int16) + half
        else:
            zero = _unpacked(stored.read(_of(rows, 32 // bits)).t(), bits).t()[: rows.stop - rows.start]
    return Numbers(q, parts[".weight_scale"].read(rows), zero)


def _from_signed(matrix: QuantizedMatrix, integers: torch.Tensor) -> torch.Tensor:
    """int8 -> from 0 on."""
    half = 2 ** (matrix.scheme.bits - 1)
    q = integers.to(torch.int16) + half
    if q.amin() < 0 or q.amax() >= 2 * half:
        raise ValueError(f"model: {matrix.path}: {matrix.name}: expected integers from {-half} to {half - 1}")
    return q.to(torch.uint8)


# torchao


def _torchao_scheme(entries: dict, prefix: str) -> Scheme:
    kinds = schema.read({"quant_type": schema.mapping()}, entries, prefix)["quant_type"]
    prefix += "quant_type."
    kind = schema.read({"default": schema.mapping()}, kinds, prefix, closed=True)["default"]
    prefix += "default."
    data = schema.read({"_type": only("Int8WeightOnlyConfig"), "_data": schema.mapping()}, kind, prefix)["_data"]
    group_size = schema.read({"group_size": _number(GROUP_SIZES, None)}, data, f"{prefix}_data.")["group_size"]
    granularity = data.get("granularity")
    if isinstance(granularity, dict) and granularity.get("_type") == "PerGroup":
        data = schema.read({"_data": schema.mapping()}, granularity, f"{prefix}_data.granularity.")["_data"]
        sizes = {"group_size": _number(GROUP_SIZES[:-1])}
        group_size = schema.read(sizes, data, f"{prefix}_data.granularity._data.")["group_size"]
    return Scheme("", 8, group_size, True, False, None)


def _torchao_shape(main: str, tensor: SafetensorsTensor, scheme: Scheme) -> tuple[int, int]:
    return _two(tensor, "I8")


def _torchao_check(main: str, scheme: Scheme, N: int, C: int, G: int, require: _Shapes) -> None:
    require("._weight_scale", (N, G))
    if "._weight_zero_point" in require.parts:
        require("._weight_zero_point", (N, G), dtype="I8")


def _torchao_numbers(matrix: QuantizedMatrix, rows: slice) -> Numbers:
    zero = matrix.parts.get("._weight_zero_point")
    return Numbers(
        _from_signed(matrix, matrix.parts["._weight_qdata"].read(rows)),
        matrix.parts["._weight_scale"].read(rows),
        None if zero is None else zero.read(rows).to(torch.int16) + 128,
    )


class Method(NamedTuple):
    """A quant_method.

    scheme: (entries of quantization_config, prefix of their names) -> the scheme.
    main: what the name of the tensor of integers can end with; scale: of the scales; others: of the other tensors.
    shape: (what its name ends with, that tensor, scheme) -> (N, C).
    check: (what its name ends with, scheme, N, C, groups, checks) -> None: of the other tensors of a matrix.
    numbers: (matrix, rows) -> what is stored.
    """

    scheme: Callable[[dict, str], Scheme]
    main: tuple[str, ...]
    scale: str
    others: tuple[str, ...]
    shape: Callable[[str, SafetensorsTensor, Scheme], tuple[int, int]]
    check: Callable[[str, Scheme, int, int, int, _Shapes], None]
    numbers: Callable[[QuantizedMatrix, slice], Numbers]

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (*self.main, self.scale, *self.others)


METHODS = {
    "gptq": Method(_gptq_scheme, (".qweight",), ".scales", (".qzeros", ".g_idx"), _gptq_shape, _gptq_check, _gptq_numbers),
    "awq": Method(_awq_scheme, (".qweight",), ".scales", (".qzeros",), _awq_shape, _awq_check, _awq_numbers),
    "compressed-tensors": Method(
        _compressed_scheme, (".weight_packed", ".weight"), ".weight_scale",
        (".weight_zero_point", ".weight_shape", ".weight_g_idx"), _compressed_shape, _compressed_check, _compressed_numbers,
    ),
    "torchao": Method(
        _torchao_scheme, ("._weight_qdata",), "._weight_scale", ("._weight_zero_point",), _torchao_shape, _torchao_check,
        _torchao_numbers,
    ),
}  # fmt: skip
