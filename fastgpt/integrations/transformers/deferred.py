"""Tensors whose values are computed lazily, on first access."""

import torch
from torch.utils._pytree import tree_map_only

from fastgpt.ops.quantization import dequantize

_METADATA = frozenset(
    getattr(torch.Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "ndim", "layout", "is_cpu", "is_cuda", "is_meta", "is_nested", "is_quantized", "is_sparse",
        "itemsize", "nbytes", "requires_grad",
    )
) | frozenset(
    getattr(torch.Tensor, name)
    for name in (
        "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous", "is_floating_point",
        "is_complex", "is_inference", "get_device", "storage_offset", "__len__", "__hash__",
    )
)  # fmt: skip
# These return the tensor itself if there is nothing to convert.
_RETURNS_ITSELF = frozenset(getattr(torch.Tensor, name) for name in ("to", "type", "bool", "cpu", "cuda", "contiguous"))


class Deferred(torch.Tensor):
    """A lazy tensor of a known shape and dtype, whose values `_compute` returns.

    Code that knows the subclass reads its fields while `untouched` is True, so the values are never computed. Any other code
    sees an ordinary tensor, whose values are computed at the first access. From then on the fields are no longer valid, since
    the values may have been changed in place, also through a view.
    """

    untouched: bool
    _value: torch.Tensor | None

    @staticmethod
    def __new__(cls, shape, dtype, device, **fields):
        with torch.inference_mode(False):
            self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.__dict__.update(fields, untouched=True, _value=None)
        return self

    def __init__(self, *args, **fields): ...

    def value(self) -> torch.Tensor:
        """The values as an ordinary tensor, which the caller must not change."""
        if self._value is None:
            self.__dict__["_value"] = self._compute().contiguous()  # as the strides of the wrapper say
        return self._value

    def _handed_out(self) -> torch.Tensor:
        self.__dict__["untouched"] = False
        return self.value()

    def _compute(self) -> torch.Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _METADATA or function in _RETURNS_ITSELF and args[0].untouched:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function is torch.Tensor.__getitem__ and _covers(args[1], args[0].shape):
            return args[0]
        args, kwargs = tree_map_only(Deferred, Deferred._handed_out, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):  # for callers in C++
        args, kwargs = tree_map_only(Deferred, Deferred._handed_out, (args, kwargs or {}))
        return operation(*args, **kwargs)


def _covers(index, shape) -> bool:
    """Whether x[index] is all of x, such as x[:, :, :, :n] of n columns."""
    index = index if isinstance(index, tuple) else (index,)
    return len(index) <= len(shape) and all(
        isinstance(part, slice) and part.indices(size) == (0, size, 1) for part, size in zip(index, shape)
    )


class EightBit(Deferred):
    """Keys or values (B, H_kv, S, D) stored as `codes` of that shape, int8 or float8_e4m3fn, and `scale` (B, H_kv, S)."""

    codes: torch.Tensor
    scale: torch.Tensor

    def _compute(self):
        return dequantize(self.codes, self.scale, self.dtype)
