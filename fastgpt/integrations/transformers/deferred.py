"""Tensors whose numbers are computed only if somebody asks for them."""

import torch
from torch.utils._pytree import tree_map_only

from fastgpt.ops.quantisation import dequantise


class Deferred(torch.Tensor):
    """Stands for a tensor of this shape and dtype, which `_compute` gives.

    Code that knows the subclass reads its fields, and the tensor is never made. Any other code may do with it what can be
    done with a tensor: the first operation on its numbers computes them.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # results of operations are ordinary tensors

    @staticmethod
    def __new__(cls, shape, dtype, device, **fields):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.__dict__.update(fields, _value=None)
        return self

    def __init__(self, *args, **fields): ...

    def value(self) -> torch.Tensor:
        if self._value is None:
            self.__dict__["_value"] = self._compute().contiguous()  # as the strides of the wrapper say
        return self._value

    def _compute(self) -> torch.Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.alias.default:  # x[:, :n], where that is all of it
            twin = torch.Tensor._make_wrapper_subclass(cls, args[0].shape, dtype=args[0].dtype, device=args[0].device)
            twin.__dict__ = args[0].__dict__  # computed once for both
            return twin
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs or {}))
        return operation(*args, **kwargs)


class EightBit(Deferred):
    """Keys or values (B, H_kv, S, D) stored as `codes` of that shape, int8 or float8_e4m3fn, and `scale` (B, H_kv, S)."""

    def _compute(self):
        return dequantise(self.codes, self.scale, self.dtype)
