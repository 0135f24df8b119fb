"""Weights of 8 or 4 bits, in blocks that share a scale: `QuantizedWeight`, which `linear` takes in place of a tensor."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastgpt import huge_pages
from fastgpt.checks import (
    argument_error,
    is_fake,
    require_choice,
    require_dtype,
    require_flag,
    require_integer,
    require_tensor,
    shown,
)
from fastgpt.ops import gguf_blocks
from fastgpt.ops.gguf_blocks import BLOCK_TYPES
from fastgpt.ops.library import library, without_autograd

BITS = {"int8": 8, "int4": 4}
GROUP_SIZES = 32, 64, 128, None
AT_A_TIME = 1 << 16  # numbers that are quantized at a time, with some copies of them in fp32
UNIT = 32  # numbers that are packed together; a group is a multiple of it
DTYPES = torch.float32, torch.float16, torch.bfloat16
# How scales of 4 bits are fitted, without minima and with them: parts of the range to start from, outside of which numbers are
# clipped while the rest gets finer steps; and how often what fits the integers of a start best is taken next.
FITS = {False: ((1.0, 1.1, 0.93, 0.86), 1), True: ((1.0, 0.88), 3)}
MOST_OF_HALF, INFINITE_IN_HALF = (
    65504.0,
    65520.0,
)  # the largest finite number of fp16, and the least that rounds to its infinity


class Packing(NamedTuple):
    """How a row is stored: groups of `group_size` numbers, each an fp16 scale, an fp16 minimum if it has one, and integers q of
    `bits` bits; w = scale · q + minimum. Without minima q is signed; integers of 4 bits are stored plus 8. Of 32 integers of 4
    bits, byte i holds number i in its lower half and number i + 16 in its upper one, as GGUF's Q4_0 and Q4_1.

    block_type: 0, or a number in `gguf_blocks.BLOCK_TYPES`: blocks are stored as GGML does, whose integers have about `bits` bits.
    """

    bits: int
    group_size: int
    minima: bool
    block_type: int = 0

    @property
    def block(self) -> int:
        """Numbers of a block, the least that is stored apart: a group, if `block_type` is 0."""
        return BLOCK_TYPES[self.block_type].columns if self.block_type else self.group_size

    @property
    def block_bytes(self) -> int:
        return BLOCK_TYPES[self.block_type].bytes if self.block_type else self.header + self.group_size * self.bits // 8

    @property
    def header(self) -> int:
        """Bytes of a group before its integers, if `block_type` is 0."""
        return 4 if self.minima else 2

    def row_bytes(self, columns: int) -> int:
        return columns // self.block * self.block_bytes

    def require(self, columns: int) -> None:
        """Raises ValueError for a packing that does not exist, or does not fit so many columns."""
        if self.block_type:
            kind = BLOCK_TYPES.get(self.block_type)
            if kind is None or self.bits < 1 or (kind.group_size, kind.minima) != (self.group_size, self.minima):
                raise ValueError(
                    f"packing: expected a block_type of {', '.join(map(str, BLOCK_TYPES))}, as it is, or 0, got {self}"
                )
        elif self.bits not in BITS.values() or self.group_size < 1 or self.group_size % UNIT:
            raise ValueError(f"packing: expected 8 or 4 bits, and a group_size that is a multiple of {UNIT}, got {self}")
        if columns < 1 or columns % self.block:
            raise ValueError(f"columns: expected a positive multiple of {self.block}, got {columns}")

    def halves(self, blocks: torch.Tensor) -> torch.Tensor:
        """The fp16 that scales and minima are, or are multiples of, in rows of blocks (N, bytes) uint8."""
        where = BLOCK_TYPES[self.block_type].halves if self.block_type else slice(self.header)
        stored = blocks.view(len(blocks), blocks.shape[1] // self.block_bytes, self.block_bytes)[..., where].contiguous()
        return stored.view(torch.float16) if stored.numel() else stored.half()


GGUF_PACKINGS = {"Q8_0": Packing(8, 32, False), "Q4_0": Packing(4, 32, False), "Q4_1": Packing(4, 32, True)} | {
    kind.name: Packing(kind.bytes * 8 // kind.columns, kind.group_size, kind.minima, kind.number)
    for kind in BLOCK_TYPES.values()
}  # of GGUF's types


@dataclass(frozen=True)
class Quantization:
    """How a matrix is quantized: the arguments of `fastgpt.quantize`.

    Raises: TypeError, ValueError for a wrong one: argument, expected, got.
    """

    dtype: str = "int8"
    group_size: int | None = 32
    minima: bool = False

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, BITS)
        size = require_integer("group_size", self.group_size, optional=True)
        if size not in GROUP_SIZES:
            raise ValueError(f"group_size: expected one of {', '.join(map(repr, GROUP_SIZES))}, got {shown(size)}")
        object.__setattr__(self, "group_size", size)  # NumPy's integers as Python's
        require_flag("minima", self.minima)

    def packing(self, columns: int) -> Packing:
        """Of a matrix with so many columns. Raises ValueError if it has no whole number of groups."""
        size = columns if self.group_size is None else self.group_size
        if not columns or columns % UNIT or columns % size:
            raise ValueError(f"weight: expected a multiple of {max(UNIT, size)} columns, got {columns}")
        return Packing(BITS[self.dtype], size, self.minima)

    @property
    def of_vocabulary(self) -> "Quantization":
        """That of the token embedding and the output matrix in a model: never below 8 bits, since what is lost there costs the
        most: of SmolLM2 135M's loss in 4 bits, more than a third."""
        return replace(self, dtype="int8", minima=False) if self.dtype == "int4" else self


class QuantizedWeight(torch.Tensor):
    """A matrix (N, C) stored in 8 or 4 bits a number, which `fastgpt.linear`, F.linear and nn.Linear take in place of a tensor.
    `fastgpt.quantize` makes it.

    To PyTorch it is a tensor of a floating-point dtype, that of the x it is multiplied with: `to(dtype)` changes only that,
    `to(device)`, `state_dict`, `torch.save` and copying keep it quantized. Indexed by F.embedding it gives rows; any other
    operation computes with `dequantize()`. Only another one can be copied into it. Nothing else is written to it, or to a view of
    it, such as w[0] or w.t(): that raises RuntimeError. It has no gradient of its own; x has.

    blocks: (N, bytes) uint8, all that is stored. Their numbers are not checked: a scale that is infinite or NaN makes numbers
        of its group so, and what is computed from them.
    packing: what they hold.
    """

    blocks: torch.Tensor
    packing: Packing
    fits: tuple[torch.dtype, int]  # dtype and number of columns, which as attributes of a subclass of tensors take microseconds

    @staticmethod
    def __new__(cls, blocks: torch.Tensor, packing: Packing, columns: int, dtype: torch.dtype = torch.float32):
        return torch.Tensor._make_wrapper_subclass(cls, (len(blocks), columns), dtype=dtype, device=blocks.device)

    def __init__(self, blocks: torch.Tensor, packing: Packing, columns: int, dtype: torch.dtype = torch.float32) -> None:
        packing = Packing(*packing)
        packing.require(columns)
        if blocks.dtype != torch.uint8 or blocks.shape[1:] != (packing.row_bytes(columns),) or not blocks.is_contiguous():
            raise ValueError(
                f"blocks: expected contiguous torch.uint8 of shape (N, {packing.row_bytes(columns)}) for {columns} columns, got "
                f"{blocks.dtype} of shape {tuple(blocks.shape)}"
            )
        self.blocks, self.packing, self.fits = blocks, packing, (dtype, columns)

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # a property of torch.Tensor, too
        """Bytes that are stored."""
        return self.blocks.nbytes

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The matrix (N, C) that it stands for, computed in fp32 and rounded to dtype (default: its own)."""
        return dequantize_blocks(self.blocks, self.packing, self.shape[1]).to(dtype or self.dtype)

    def with_blocks(self, blocks: torch.Tensor, dtype: torch.dtype | None = None) -> "QuantizedWeight":
        """One of the same layout."""
        return QuantizedWeight(blocks, self.packing, self.shape[1], dtype or self.dtype)

    def share_memory_(self) -> "QuantizedWeight":
        """Moves what is stored to shared memory."""
        self.blocks.share_memory_()
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        packing = self.packing
        minima = ", minima=True" if packing.minima else ""
        kind = f"int{packing.bits}, group_size={packing.group_size}{minima}"
        if packing.block_type:
            kind = BLOCK_TYPES[packing.block_type].name
        return f"QuantizedWeight({tuple(self.shape)}, {kind}, {self.nbytes} bytes, dtype={self.dtype}, device='{self.device}')"

    def __tensor_flatten__(self):
        return ["blocks"], (self.packing, self.shape[1], self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return QuantizedWeight(inner["blocks"], *context)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in FUNCTIONS:
            return FUNCTIONS[function](*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # super's would call plain results QuantizedWeight, too
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in KEEPING and isinstance(args[0], QuantizedWeight):
            return KEEPING[function](*args, **kwargs)
        return _computed(function, QuantizedWeight, QuantizedWeight.dequantize, args, kwargs)


class DequantizedView(torch.Tensor):
    """A view of a QuantizedWeight, which is one of a copy: it cannot be written, since that would be lost."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor):
        view = torch.Tensor._make_subclass(cls, numbers)
        view.numbers = numbers
        return view

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are what __torch_dispatch__ makes of them

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _computed(function, DequantizedView, lambda view: view.numbers, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DequantizedView({self.numbers})"

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        array = self.numbers.numpy(force=force)
        array.flags.writeable = False
        return array

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        return self.numbers.clone()

    def __reduce_ex__(self, protocol):
        return self.numbers.__reduce_ex__(protocol)


def _computed(function, kind, plain, args, kwargs):
    """function(*args, **kwargs) with plain(x) in place of each x of that kind. Raises RuntimeError if it writes to one."""
    tree = torch.utils._pytree
    schema = function._schema
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            written = args[i] if i < len(args) else kwargs.get(argument.name)
            if any(isinstance(x, kind) for x in tree.tree_leaves(written)):
                what = "a QuantizedWeight" if kind is QuantizedWeight else "a view of a QuantizedWeight"
                # Not TypeError, upon which Python would compute w += x as w = w + x.
                raise RuntimeError(
                    f"{function}: expected a tensor that can be written, got {what}: write to w.dequantize(), and quantize that; "
                    "restore(model, dequantize=True) makes such matrices of all weights that `optimize` has quantized"
                )
    args, kwargs = tree.tree_map_only(kind, plain, (args, kwargs))
    result = function(*args, **kwargs)
    if any(x.alias_info and not x.alias_info.is_write for x in schema.returns):
        # Under torch.compile it is a FakeTensor.
        result = tree.tree_map_only(torch.Tensor, lambda x: DequantizedView(x) if type(x) is torch.Tensor else x, result)
    return result


def quantize(
    weight: torch.Tensor, dtype: str = "int8", group_size: int | None = 32, *, minima: bool = False
) -> QuantizedWeight:
    """A weight in 8 or 4 bits a number, for `fastgpt.linear`.

        w ≈ scale · q                 q from -127 to 127, or from -8 to 7
        w ≈ scale · q + minimum       q from 0 to 255, or from 0 to 15                           minima

    Scales and minima, in fp16, are those of groups of consecutive columns; with 4 bits they are fitted for the least squared
    error. Groups of 32 are stored as GGUF's Q8_0, Q4_0 and Q4_1.

    Of a group of numbers that are finite in fp16, all dequantized ones are, too. The least positive number of fp16 is 6e-8: a
    group becomes zero if no number exceeds 4e-6 in magnitude with int8, or 2e-7 with int4, and its minimum if they differ by less
    than twice that. Just above, scales are coarse.

    Args:
        weight: (N, C) fp32|fp16|bf16, finite. On the meta device only its shape matters.
        dtype: "int8" or "int4".
        group_size: 32, 64 or 128 columns that share a scale, or None: a row. C is a multiple of it, and of 32.
        minima: whether groups have a minimum, which takes 16 bits more for each.

    Returns: (N, C) with the dtype of weight, on its device.
    Raises: TypeError (not a tensor, dtype), ValueError (shape, choice, numbers that are not finite or do not fit into fp16):
        argument, expected, got.

    >>> quantize(torch.randn(3072, 768), "int4", group_size=64)
    QuantizedWeight((3072, 768), int4, group_size=64, 1253376 bytes, dtype=torch.float32, device='cpu')
    """
    require_tensor("weight", weight, 2)
    require_dtype("weight", weight, DTYPES)
    packing = Quantization(dtype, group_size, minima).packing(weight.shape[1])
    blocks = huge_pages.empty((len(weight), packing.row_bytes(weight.shape[1])), dtype=torch.uint8, device=weight.device)
    quantize_to(blocks, weight.detach(), packing)
    return QuantizedWeight(blocks, packing, weight.shape[1], weight.dtype)


def quantize_to(blocks: torch.Tensor, weight: torch.Tensor, packing: Packing) -> None:
    """Quantizes a matrix (N, C) into rows of blocks (N, bytes) uint8.

    Raises: ValueError for numbers that are not finite or do not fit into fp16.
    """
    if weight.is_meta or not len(weight):
        return
    most = MOST_OF_HALF * (1 if packing.minima else 127 if packing.bits == 8 else 8)  # of what fp16 scales stand for
    plain = weight.is_cpu and type(weight) in (torch.Tensor, torch.nn.Parameter) and type(blocks) is torch.Tensor
    if plain or is_fake(weight):
        try:
            _quantize(blocks, weight, packing.bits, packing.group_size, packing.minima, most)
        except RuntimeError as error:
            raise argument_error(error) from None
        return
    rows = max(1, AT_A_TIME // weight.shape[1])
    for part, stored in zip(weight.split(rows), blocks.split(rows)):
        largest = part.abs().max().item()
        if not largest <= most:
            raise ValueError(f"weight: expected finite numbers of magnitude {most:.0f} at most, got {largest}")
        stored.copy_(reference_blocks(part.float(), packing))


def reference_blocks(weight: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Rows of blocks (N, bytes) uint8 of an fp32 matrix (N, C). The kernel for CPUs, csrc/linear/quantize_kernels.cpp, computes the
    same, but for the order of sums, after which the fit of a few groups in 10,000 ends with another grid."""
    groups = weight.reshape(len(weight), -1, packing.group_size)
    highest, lowest = groups.amax(-1), groups.amin(-1)
    scale, minimum = _fitted(groups, packing, highest, lowest)
    return pack(_rounded(groups, scale, minimum, packing), scale, minimum, packing)


def _fitted(groups, packing, highest, lowest):
    """fp16 scales and minima, (N, groups); no minima: None."""
    if packing.bits == 8 and not packing.minima:
        return _lowered((torch.maximum(highest, -lowest) / 127).half(), None, packing, highest, lowest), None
    if packing.bits == 8:
        minimum = lowest.half()
        return _lowered(((highest - lowest) / 255).half(), minimum, packing, highest, lowest), minimum
    best: Any = None
    # Without minima the number of largest magnitude is -8 · scale: a scale may be negative.
    extreme = torch.where(highest > -lowest, highest, lowest)
    parts, refinements = FITS[packing.minima]
    for part in parts:
        if packing.minima:
            middle, half = (highest + lowest) / 2, (highest - lowest) / 2 * part
            scale, minimum = (half / 7.5).half(), (middle - half).half()
        else:
            scale, minimum = (extreme * part / -8).half(), None
        scale = _lowered(scale, minimum, packing, highest, lowest)
        for last in (*[False] * refinements, True):
            q = _rounded(groups, scale, minimum, packing)
            error = (_dequantized(q, scale, minimum, packing) - groups).square_().sum(-1)
            error.masked_fill_(_overflows(scale, minimum, packing, highest, lowest), torch.inf)
            if best is None:
                best = error, scale, minimum
            else:
                better = error < best[0]
                kept = None if minimum is None else torch.where(better, minimum, best[2])
                best = torch.where(better, error, best[0]), torch.where(better, scale, best[1]), kept
            if not last:
                scale, minimum = _least_squares(groups, q, packing)
    return best[1:]


def _overflows(scale, minimum, packing, highest, lowest):
    """Whether a group of numbers that are finite in fp16 would have one that is not, dequantized: its highest or its lowest, since
    dequantized numbers are in the order of numbers. Where no number exceeds half of fp16's largest, no grid worth taking does."""
    ends = torch.stack([highest, lowest], -1)
    largest = ends.abs().amax(-1)
    found = _dequantized(_rounded(ends, scale, minimum, packing), scale, minimum, packing).abs().amax(-1)
    return (largest > MOST_OF_HALF / 2) & (largest <= MOST_OF_HALF) & (found >= INFINITE_IN_HALF)


def _lowered(scale, minimum, packing, highest, lowest):
    """Scales (N, groups) fp16 of the whole range, which were rounded up too far by less than a step of fp16: where a dequantized
    number would be infinite in fp16, the next one towards zero."""
    lower = (scale.view(torch.int16) - 1).view(torch.float16)
    return torch.where(_overflows(scale, minimum, packing, highest, lowest), lower, scale)


def _least_squares(groups, q, packing):
    """The fp16 scale and minimum with the least squared error for these integers."""
    if not packing.minima:
        q = q - 8
        return ((groups * q).sum(-1) / q.square().sum(-1).clamp_(min=1)).half(), None
    mean, of_q = groups.mean(-1, keepdim=True), q.mean(-1, keepdim=True)
    q = q - of_q
    scale = (q * (groups - mean)).sum(-1) / q.square().sum(-1).clamp_(min=1e-9)
    return scale.half(), (mean - scale.unsqueeze(-1) * of_q).squeeze(-1).half()


def _rounded(groups, scale, minimum, packing):
    """Integers as they are stored, in fp32: signed ones of 8 bits, those of 4 bits plus 8."""
    scale = scale.float().unsqueeze(-1)
    rest = groups if minimum is None else groups - minimum.float().unsqueeze(-1)
    q = torch.where(scale == 0, 0.0, rest / torch.where(scale == 0, 1.0, scale)).round()
    if packing.minima:
        return q.clamp_(0, 2**packing.bits - 1)
    return q.clamp_(-127, 127) if packing.bits == 8 else (q + 8).clamp_(0, 15)


def _dequantized(q, scale, minimum, packing):
    if packing.bits == 4 and minimum is None:
        q = q - 8
    w = q * scale.float().unsqueeze(-1)
    return w if minimum is None else w + minimum.float().unsqueeze(-1)


def pack(q: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None, packing: Packing) -> torch.Tensor:
    """Rows of blocks (N, bytes) uint8.

    Args:
        q: (N, groups, group_size), integers as they are stored: from -128 to 127 with 8 bits and no minima; else from 0 on.
        scale, minimum: (N, groups) fp16; no minima: None.
    """
    N, groups, size = q.shape
    if packing.bits == 8:
        integers = q.to(torch.uint8 if packing.minima else torch.int8).view(torch.uint8)
    else:
        halves = q.to(torch.uint8).view(N, groups, size // UNIT, 2, UNIT // 2)
        integers = (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(2)
    headers = [x.unsqueeze(-1).view(torch.uint8) for x in (scale, minimum) if x is not None]
    return torch.cat([*headers, integers], -1).view(N, -1)


def dequantize_blocks(blocks: torch.Tensor, packing: Packing, columns: int) -> torch.Tensor:
    """The matrix (N, columns) fp32 of rows of blocks (N, bytes) uint8."""
    if not len(blocks):
        return blocks.new_empty(0, columns, dtype=torch.float32)
    if packing.block_type:
        return gguf_blocks.dequantize(blocks, BLOCK_TYPES[packing.block_type])
    N, size = len(blocks), packing.group_size
    groups = blocks.view(N, columns // size, packing.block_bytes)
    scale, *minimum = (x.squeeze(-1) for x in packing.halves(blocks).split(1, -1))
    integers = groups[..., packing.header :]
    if packing.bits == 8:
        q = integers if packing.minima else integers.contiguous().view(torch.int8)
    else:
        pairs = integers.view(N, -1, size // UNIT, UNIT // 2)
        q = torch.stack((pairs & 15, pairs >> 4), -2).flatten(2)
    return _dequantized(q.float(), scale, minimum[0] if minimum else None, packing).view(N, columns)


def dequantized_product(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear(x, weight.dequantize(x.dtype), bias), with a gradient of x and of bias, for which the matrix is dequantized
    again instead of kept."""
    product = _DequantizedProduct.apply(x, weight.blocks, weight.packing)
    return product if bias is None else product + bias.to(product.dtype)


class _DequantizedProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, blocks, packing):
        return F.linear(x, _matrix(blocks, packing, x.dtype))

    @staticmethod
    def setup_context(context, inputs, output):
        _, blocks, context.packing = inputs
        context.save_for_backward(blocks)
        context.save_for_forward(blocks)

    @staticmethod
    def backward(context, dout):
        return dout @ _matrix(*context.saved_tensors, context.packing, dout.dtype), None, None

    @staticmethod
    def jvp(context, dx, *_):
        return F.linear(dx, _matrix(*context.saved_tensors, context.packing, dx.dtype))


def _matrix(blocks, packing, dtype):
    columns = blocks.shape[-1] // packing.block_bytes * packing.block
    return dequantize_blocks(blocks, packing, columns).to(dtype)


def _set_data(weight, value):
    """weight.data = value, which otherwise would set no more than shape and dtype."""
    if not isinstance(value, QuantizedWeight):
        raise RuntimeError(
            f"data: expected a QuantizedWeight, got {_kind(value)}: replace the parameter; or of a model that `optimize` has "
            "quantized, restore(model, dequantize=True) first"
        )
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(weight, value)  # type: ignore[attr-defined]  # a property of C
    weight.blocks, weight.packing, weight.fits = value.blocks, value.packing, value.fits


# PyTorch's functions -> what computes them if an argument is quantized. `linear` adds F.linear, which it replaces.
FUNCTIONS: dict[Callable, Callable] = {torch.Tensor.data.__set__: _set_data}  # type: ignore[attr-defined]  # as above

# Operations whose result is quantized as well, or that read only some rows.


def _to(weight, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    if dtype is not None and dtype not in (*DTYPES, torch.float64):
        return weight.dequantize().to(dtype=dtype, device=device)
    blocks = weight.blocks if device is None else weight.blocks.to(device, non_blocking=non_blocking)
    return weight.with_blocks(blocks.clone() if blocks is weight.blocks else blocks, dtype)


def _rows(weight, index, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    blocks = aten.embedding(weight.blocks, index.reshape(-1))  # which refuses what is no index
    rows = dequantize_blocks(blocks, weight.packing, weight.shape[1])
    return rows.to(weight.dtype).view(*index.shape, weight.shape[1])


def _copy(weight, source, non_blocking=False):
    if not isinstance(source, QuantizedWeight) or (source.packing, source.shape) != (weight.packing, weight.shape):
        raise TypeError(f"copy_: expected a QuantizedWeight like {weight}, got {_kind(source)}")
    weight.blocks.copy_(source.blocks, non_blocking)
    return weight


def _kind(source):
    return source if isinstance(source, QuantizedWeight) else f"a tensor of {source.dtype}"


aten = torch.ops.aten
KEEPING = {
    aten.detach.default: lambda weight: weight.with_blocks(weight.blocks.detach()),
    aten.alias.default: lambda weight: weight.with_blocks(weight.blocks),
    aten.clone.default: lambda weight, memory_format=None: weight.with_blocks(weight.blocks.clone()),
    aten._to_copy.default: _to,
    aten.copy_.default: _copy,
    aten.embedding.default: _rows,
}
torch.serialization.add_safe_globals([QuantizedWeight, Packing])

library.define(
    "quantize_(Tensor(a!) blocks, Tensor weight, int bits, int group_size, bool minima, float most) -> ()", "fastgpt.quantize"
)
_quantize = without_autograd(torch.ops.fastgpt.quantize_.default)


@torch.library.register_fake("fastgpt::quantize_", lib=library)
def _quantize_fake(blocks, weight, bits, group_size, minima, most):
    return None
