"""A matrix of integers that share scales in groups of columns, whichever method has made it, and what a method says of its own.

    w = scale · (q - zero)       q from 0 to 2^bits - 1; zero is 2^(bits - 1) if the quantization is symmetric

It becomes blocks of QuantizedWeight, w = scale · q + minimum, with the integers that are stored. Scales are rounded to fp16, which
holds those of GPTQ and AWQ exactly, and those in bf16 if they are not below 2^-14. A minimum, -scale · zero, is rounded to fp16,
too: by at most 1/128 of a step of 4 bits, or 1/8 of one of 8 bits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from fastgpt import schema
from fastgpt.checkpoints.loading import DTYPES, Stored
from fastgpt.checkpoints.safetensors_files import SafetensorsTensor
from fastgpt.ops.quantized_weight import UNIT, Packing, pack
from fastgpt.schema import Field

CHUNK = 1 << 20  # bytes of numbers, as of the model's dtype, that are read at a time, with some copies of them in fp32


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


class Shapes:
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
    check: Callable[[str, Scheme, int, int, int, Shapes], None]
    numbers: Callable[["QuantizedMatrix", slice], Numbers]

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (*self.main, self.scale, *self.others)


@dataclass(frozen=True)
class QuantizedMatrix(Stored):
    """A matrix (N, C) of integers, which share scales in groups of columns.

    parts: the tensors that it is stored in, by what their names end with.
    """

    method: Method
    scheme: Scheme
    main: str
    parts: Mapping[str, SafetensorsTensor]
    group_size: int

    is_linear: ClassVar[bool] = True

    @classmethod
    def of(
        cls,
        name: str,
        method: Method,
        scheme: Scheme,
        main: str,
        parts: Mapping[str, SafetensorsTensor],
        tensor: SafetensorsTensor,
    ) -> "QuantizedMatrix":
        """Checks that all tensors of the matrix are there, with the shapes that belong together.

        Args:
            main, tensor: the tensor of integers, and what its name ends with.
        """
        require_shapes = Shapes(tensor, parts)
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
        return cls(tensor.path, name, scheme.dtype or scale.dtype, (N, C), method, scheme, main, parts, group_size)

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
        q, scale, zero = self.method.numbers(self, rows)
        if zero is not None and self.scheme.symmetric:
            middle = 2 ** (self.scheme.bits - 1)
            if (zero != middle).any():
                raise ValueError(
                    f"model: {self.path}: {self.name}: expected zero points in the middle, as a symmetric quantization has them"
                )
            zero = None
        return Numbers(q.view(len(q), -1, self.group_size), scale, zero)


def matrices(found: Sequence[SafetensorsTensor], scheme: Scheme, method: Method) -> list[Stored]:
    """As `quantized_folders.matrices`, of a method."""
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
            result[name] = QuantizedMatrix.of(name, method, scheme, main, parts, tensor)
            break
    for name in result:
        if name.endswith(method.scale):
            missing = name.removesuffix(method.scale) + method.main[0]
            raise ValueError(f"model: {by_name[name].path} lacks weights: {missing}, of which it has {name}")
    return list(result.values())


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., n) int32 -> (..., n · 32 / bits) uint8, each integer's lowest bits first."""
    integers = words.contiguous().view(torch.uint8)
    return integers if bits == 8 else torch.stack((integers & 15, integers >> 4), -1).flatten(-2)


def words_of(rows: slice, per_word: int) -> slice:
    """The words that hold these rows."""
    return slice(rows.start // per_word, -(-rows.stop // per_word))


def one_of(choices: Sequence, default: Any = schema.REQUIRED) -> Field:
    """One of these numbers, or None where it is one of them."""

    def check(name, value):
        if isinstance(value, bool) or value not in choices:
            raise ValueError(f"{name}: expected {' or '.join(map(str, choices))}, got {value!r:.100}")
        return value

    return Field(check, default)


def group_size_of(stored: int | None) -> int | None:
    return None if stored == -1 else stored


def matrix_shape(tensor: SafetensorsTensor, dtype: str) -> tuple[int, int]:
    if len(tensor.shape) != 2 or tensor.dtype != dtype:
        raise ValueError(
            f"model: {tensor.path}: {tensor.name}: expected a matrix of {dtype}, got shape {tensor.shape} of {tensor.dtype}"
        )
    return tensor.shape[0], tensor.shape[1]


def from_signed(matrix: QuantizedMatrix, integers: torch.Tensor) -> torch.Tensor:
    """int8 -> from 0 on."""
    half = 2 ** (matrix.scheme.bits - 1)
    q = integers.to(torch.int16) + half
    if q.amin() < 0 or q.amax() >= 2 * half:
        raise ValueError(f"model: {matrix.path}: {matrix.name}: expected integers from {-half} to {half - 1}")
    return q.to(torch.uint8)
