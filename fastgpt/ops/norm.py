"""Layer norm and RMS norm, with an optional residual: contract, checks, reference, dispatch."""

import torch
import torch.nn.functional as F

from fastgpt.checks import (
    argument_error,
    require_choice,
    require_device,
    require_dtype,
    require_dtype_of,
    require_number,
    require_shape,
    require_tensor,
)
from fastgpt.ops.implementations import (
    INFERENCE_DTYPES,
    choose,
    explain_call,
    inference_unsupported_reason,
    triton_inference_unsupported_reason,
)
from fastgpt.ops.library import library, without_autograd

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KINDS = {"layer": False, "rms": True}


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-5,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Layer norm or RMS norm over the last dimension, optionally added to a residual.

        out = residual + (x - mean) / sqrt(variance + eps) · (weight + offset) + bias        kind "layer"
        out = residual + x / sqrt(mean of x^2 + eps) · (weight + offset) + bias              kind "rms"

    It is computed in at least fp32 and rounded once.

    Args:
        x: (..., C) fp16|bf16|fp32|fp64. If the last dimension is contiguous, x is not copied; other strides are free.
        weight: (C,). All tensors have the dtype of x (under autocast: any).
        bias: (C,).
        kind: "layer" or "rms".
        eps: added to the variance, or to the mean square.
        offset: added to the weight, in fp32: 1 for checkpoints that store weight - 1 (Gemma).
        residual: (..., C), strides as of x.
        impl: "cpp" (CPU), "triton" (CUDA) or "reference"; None picks the first that can serve the call; see
            `fastgpt.explain`.

    Returns: (..., C) contiguous, in the dtype of x. Calls that need gradients run the reference.
    Raises: TypeError (not a tensor or a number, dtype), ValueError (shape, device, kind, impl): argument, expected, got.
    Source: Layer Normalization (arXiv 1607.06450), Root Mean Square Layer Normalization (arXiv 1910.07467).

    >>> norm(torch.randn(2, 5, 768), torch.ones(768), kind="rms").shape
    torch.Size([2, 5, 768])
    """
    call = (x, weight, bias, residual)
    if type(eps) is not float or type(offset) is not float:  # PyTorch's dispatcher would accept True
        eps, offset = require_number("eps", eps, least=0), require_number("offset", offset)
    try:
        # The kernels check the rest, in C++ in a fraction of the time.
        if (impl in (None, "cpp") and inference_unsupported_reason(*call) is None) or (
            impl in (None, "triton") and triton_inference_unsupported_reason(*call) is None
        ):
            return _norm(x, weight, bias, residual, KINDS[kind], eps, offset)
    except Exception as error:
        _check(*call, kind, eps, offset)  # raises the error that names the argument
        raise argument_error(error)
    eps, offset = _check(*call, kind, eps, offset)
    choose("norm", IMPLEMENTATIONS, impl, *call)  # raises for an impl that cannot serve the call
    return norm_reference(x, weight, bias, kind=kind, eps=eps, offset=offset, residual=residual)


def norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-5,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """The reference for `fastgpt.norm` in plain PyTorch: on every device, differentiable. It takes the same arguments and
    ignores impl.

        out = residual + (x - mean) / sqrt(variance + eps) · (weight + offset) + bias        kind "layer"
        out = residual + x / sqrt(mean of x^2 + eps) · (weight + offset) + bias              kind "rms"

    Returns: (..., C) in the dtype of x.
    Raises: TypeError, ValueError as `fastgpt.norm`.
    """
    eps, offset = _check(x, weight, bias, residual, kind, eps, offset)
    dtype = x.dtype
    is_norm_only = not offset and residual is None and (bias is None or kind == "layer")
    if not is_norm_only or weight.dtype != dtype:  # PyTorch's norms round to dtype; the rest would round twice
        compute_dtype = torch.promote_types(dtype, torch.float32)
        x, weight = x.to(compute_dtype), weight.to(compute_dtype) + offset
        bias, residual = (None if tensor is None else tensor.to(compute_dtype) for tensor in (bias, residual))
    if kind == "layer":
        out = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    else:
        out = F.rms_norm(x, x.shape[-1:], weight, eps)
        out = out if bias is None else out + bias
    return (out if residual is None else out + residual).to(dtype)


def _check(x, weight, bias, residual, kind, eps, offset) -> tuple[float, float]:
    """Returns eps and offset as plain Python numbers; raises TypeError or ValueError that begins with the argument's name."""
    require_tensor("x", x)
    require_dtype("x", x, DTYPES)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., C), got a scalar")
    C = x.shape[-1]
    shapes = {
        "weight": (weight, (C,), "(C,)"),
        "bias": (bias, (C,), "(C,)"),
        "residual": (residual, tuple(x.shape), "(..., C)"),
    }
    for name, (tensor, shape, meaning) in shapes.items():
        if tensor is not None or name == "weight":
            require_tensor(name, tensor)
            require_shape(name, tensor, shape, meaning)
            require_dtype_of(name, tensor, x, DTYPES)
            require_device(name, tensor, x.device)
    require_choice("kind", kind, KINDS)
    return require_number("eps", eps, least=0), require_number("offset", offset)


def explain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-5,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    impl: str | None = None,
) -> dict[str, str]:
    """Implementation -> "chosen", "available", or why it refuses this call."""
    call = (x, weight, bias, residual)
    _check(*call, kind, eps, offset)
    return explain_call(IMPLEMENTATIONS, *call, impl=impl)


# In order of preference: the first that does not refuse serves the call.
IMPLEMENTATIONS = {
    "cpp": inference_unsupported_reason,
    "triton": triton_inference_unsupported_reason,
    "reference": lambda *call: None,
}

library.define(
    "norm(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, bool rms=False, float eps=1e-5, "
    "float offset=0.0) -> Tensor"
)

_norm = without_autograd(torch.ops.fastgpt.norm.default)


@torch.library.register_fake("fastgpt::norm", lib=library)
def _norm_fake(x, weight, bias=None, residual=None, rms=False, eps=1e-5, offset=0.0):
    _check(x, weight, bias, residual, "layer", eps, offset)
    return x.new_empty(x.shape)


def _norm_triton(x, weight, bias=None, residual=None, rms=False, eps=1e-5, offset=0.0):
    _check(x, weight, bias, residual, "layer", eps, offset)
    require_dtype("x", x, INFERENCE_DTYPES)
    from fastgpt.kernels.norm import norm  # Triton is imported only when a CUDA tensor needs it

    return norm(x, weight, bias, residual, rms, eps, offset)


library.impl("norm", _norm_triton, "CUDA")
