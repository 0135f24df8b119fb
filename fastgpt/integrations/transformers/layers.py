"""Linear layers and norms of a model that fastgpt's operations serve: their classes become subclasses with another forward.

A module keeps its identity, parameters, hooks and what else is set on it; isinstance and the name of its class are as before.
Which modules change, and when they change back, is in optimize.py.
"""

import functools
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._C import _is_any_autocast_enabled as _any_autocast_enabled
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from fastgpt.integrations.transformers.recording import note
from fastgpt.integrations.transformers.registration import register
from fastgpt.ops.derivatives import derivatives_possible
from fastgpt.ops.implementations import inference_unsupported_reason, triton_inference_unsupported_reason
from fastgpt.ops.library import without_autograd
from fastgpt.ops.linear import DTYPES, MAX_ROWS_CPU, linear
from fastgpt.ops.norm import norm
from fastgpt.ops.quantized_weight import QuantizedWeight

_linear = without_autograd(torch.ops.fastgpt.linear.default)
_linear_quantized = without_autograd(torch.ops.fastgpt.linear_quantized.default)
_norm = without_autograd(torch.ops.fastgpt.norm.default)
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch.jit.is_tracing
PLAIN = (torch.Tensor, nn.Parameter)  # tensors that the kernels take; other subclasses may override operations
PLAIN_OR_NONE = (*PLAIN, type(None))
# What the kernels raise for arguments that they do not take. PyTorch's function then raises its own error, or takes them.
REFUSED = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


class Served(nn.Module):
    """A module with fastgpt's forward; `served_class` makes its class.

    original: the class that it had.
    quantized: whether `optimize` has quantized its weight.
    """

    original: ClassVar[type[nn.Module]]
    quantized: ClassVar[bool]

    def __reduce_ex__(self, protocol):
        if "original" not in type(self).__dict__:  # a subclass of that class, such as parametrize makes
            return super().__reduce_ex__(protocol)
        return _empty, (self.original, self.quantized), self.__dict__  # the class is in no module, where pickle would look


def _empty(original: type[nn.Module], quantized: bool) -> nn.Module:
    """A module with nothing in it, which copying and unpickling fill."""
    register()  # in another process
    cls = served_class(original, quantized)
    return cls.__new__(cls)


@functools.cache
def served_class(original: type[nn.Module], quantized: bool = False) -> type[Served]:
    """The class for modules of class `original`. A quantized Conv1D becomes an nn.Linear."""
    base = nn.Linear if original is Conv1D and quantized else original
    fields: dict[str, Any] = {"original": original, "quantized": quantized}
    mixin: Any = {nn.Linear: Linear, Conv1D: TransposedLinear, NewGELUActivation: GELU}.get(base, Norm)
    if mixin is Norm:
        fields["kind"] = kind_of_norm(original)
    return type(base.__name__, (mixin, base), fields | {"__module__": base.__module__, "__doc__": base.__doc__})


class Linear(Served):
    """nn.Linear."""

    def forward(self, *args, **kwargs) -> torch.Tensor:
        weights = self._parameters
        weight = weights.get("weight")
        if weight is None or "bias" not in weights or kwargs or len(args) != 1:  # parametrized or pruned, for example
            note("linear: PyTorch")
            return super().forward(*args, **kwargs)
        return product(args[0], weight, weights["bias"])


class TransposedLinear(Served):
    """Conv1D, whose weight (C, N) is stored by columns, so that its transpose is what `linear` reads."""

    def forward(self, *args, **kwargs) -> torch.Tensor:
        weights = self._parameters
        weight = weights.get("weight")
        if type(weight) in PLAIN and "bias" in weights and not kwargs and len(args) == 1:
            transposed = weight.t()
            if transposed.is_contiguous():
                return product(args[0], transposed, weights["bias"])
        note("linear: PyTorch")
        return super().forward(*args, **kwargs)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear(x, weight, bias), with its results and errors, computed by `fastgpt.linear`."""
    quantized = type(weight) is QuantizedWeight
    if type(x) in PLAIN and (quantized or type(weight) in PLAIN) and type(bias) in PLAIN_OR_NONE and not _is_tracing():
        if _is_compiling():
            if quantized or _fits(x, weight):
                return linear(x, weight, bias)
        else:
            try:
                return _product(x, weight, bias, quantized)
            except REFUSED:
                pass
    note("linear: PyTorch")
    return F.linear(x, weight, bias)


def _product(x, weight, bias, quantized):
    few = 0 < x.numel() <= MAX_ROWS_CPU * x.shape[-1] and (not quantized or weight.fits == (x.dtype, x.shape[-1]))
    if few and x.is_cpu and not derivatives_possible() and not _any_autocast_enabled():
        # In decoding, without the checks in Python, in half the time for a small matrix: the kernel checks the rest.
        out = _linear_quantized(x, weight.blocks, *weight.packing, bias) if quantized else _linear(x, weight, bias)
        note("linear: cpp")
        return out
    out = linear(x, weight, bias)
    note(linear, x, weight, bias, prefix="linear: ")
    return out


def _fits(x, weight):
    """Whether `linear` takes these tensors: within torch.compile, an error cannot be caught."""
    return x.dtype in DTYPES and x.dim() > 0 and weight.dim() == 2 and weight.is_contiguous() and x.shape[-1] == weight.shape[1]


class GELU(Served):
    """NewGELUActivation, eight operations on a tensor, as PyTorch's one for the same function."""

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return F.gelu(*args, **kwargs, approximate="tanh")


class Kind(NamedTuple):
    """What a norm computes: arguments of `fastgpt.norm`, and the attribute that holds its eps."""

    kind: str
    eps: str
    offset: float = 0.0


class Norm(Served):
    """nn.LayerNorm, or one of transformers' norms. Where gradients are needed, its class computes it."""

    kind: ClassVar[Kind]

    def forward(self, *args, **kwargs) -> torch.Tensor:
        weights = self._parameters
        weight, bias = weights.get("weight"), weights.get("bias")
        kind, name, offset = self.kind
        x, eps = args[0] if len(args) == 1 and not kwargs else None, self.__dict__.get(name)
        if (
            type(x) in PLAIN and type(weight) in PLAIN and type(bias) in PLAIN_OR_NONE and eps is not None and not _is_tracing()
        ):  # fmt: skip
            if _is_compiling():
                if x.dtype == weight.dtype and x.dtype in DTYPES and x.dim() > 0 and x.shape[-1:] == weight.shape:
                    return norm(x, weight, bias, kind=kind, eps=eps, offset=offset)
            elif (inference_unsupported_reason if x.is_cpu else triton_inference_unsupported_reason)(x, weight, bias) is None:
                try:
                    out = _norm(x, weight, bias, None, kind == "rms", eps, offset)
                except REFUSED:
                    pass
                else:
                    note("norm: cpp" if x.is_cpu else "norm: triton")
                    return out if x.is_contiguous() else _as_strided_like(x, out)
        note("norm: PyTorch")
        return super().forward(*args, **kwargs)


def _as_strided_like(x, out):
    """out (contiguous) with the strides that operations on each element of x would give it."""
    like = torch.empty_like(x)
    return out if like.stride() == out.stride() else like.copy_(out)


def is_served(cls: type[nn.Module]) -> bool:
    """Whether there is a served class for modules of this one."""
    return cls in (nn.Linear, Conv1D, NewGELUActivation) or kind_of_norm(cls) is not None


def kind_of_norm(cls: type[nn.Module]) -> Kind | None:
    """What a class of norms computes, if it is known. Most families of transformers have an RMS norm of their own, a copy of one
    of a few: we know those by their code."""
    if cls in (nn.LayerNorm, nn.RMSNorm):
        return Kind("layer" if cls is nn.LayerNorm else "rms", "eps")
    code = _code(cls)
    return None if code is None else _known_norms().get(code)


@functools.cache
def _known_norms() -> dict[tuple, Kind]:
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    # In fp16 and bf16 some of them round twice, before the weight and after it; `norm` rounds once.
    kinds = {
        LlamaRMSNorm: Kind("rms", "variance_epsilon"),
        Olmo2RMSNorm: Kind("rms", "variance_epsilon"),
        T5LayerNorm: Kind("rms", "variance_epsilon"),
        Llama4TextRMSNorm: Kind("rms", "eps"),
        GemmaRMSNorm: Kind("rms", "eps", offset=1.0),
        CohereLayerNorm: Kind("layer", "variance_epsilon"),
    }
    return {code: kind for cls, kind in kinds.items() if (code := _code(cls)) is not None}


def _code(cls: type) -> tuple | None:
    """What the forward of a direct subclass of nn.Module does, without where it is written; equal for copies of a class."""
    if cls.__bases__ != (nn.Module,) or "forward" not in cls.__dict__ or "__call__" in cls.__dict__:
        return None
    functions = [cls.__dict__[name] for name in ("forward", "_norm") if name in cls.__dict__]
    codes = [getattr(function, "__code__", None) for function in functions]
    if None in codes:
        return None
    return tuple((code.co_code, code.co_names, code.co_consts, code.co_argcount, bool(code.co_freevars)) for code in codes)
