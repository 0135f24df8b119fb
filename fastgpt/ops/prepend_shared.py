"""Keys whose first dimensions all heads share, as in multi-head latent attention: contract, checks, reference, dispatch."""

import torch

from fastgpt.checks import argument_error, require_device, require_dtype, require_dtype_of, require_shape, require_tensor
from fastgpt.ops.implementations import choose, inference_unsupported_reason
from fastgpt.ops.library import library, without_autograd

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def prepend_shared(shared: torch.Tensor, x: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """Prepends to each head of a token dimensions that all of its heads share.

        out[b, t, h] = (shared[b, t], x[b, t, h])

    Args:
        shared: (B, T, R) fp16|bf16|fp32|fp64, last dimension contiguous, other strides free.
        x: (B, T, H, D) in the dtype of shared, likewise.
        impl: "cpp" (CPU) or "reference" (one launch on CUDA); None picks the first that can serve the call. They give the same
            bits.

    Returns: (B, T, H, R + D) contiguous. Calls that need gradients are served by the reference.
    Raises: TypeError (not a tensor, dtype), ValueError (shape, device, impl): argument, expected, got.
    """
    try:
        if impl in (None, "cpp") and _cpp_refuses(shared, x) is None:
            return _prepend_shared(shared, x)
    except Exception as error:
        _check(shared, x)  # raises the error that names the argument
        raise argument_error(error)
    _check(shared, x)
    choose("prepend_shared", IMPLEMENTATIONS, impl, shared, x)  # raises for an impl that cannot serve the call
    return prepend_shared_reference(shared, x)


def prepend_shared_reference(shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The reference for `prepend_shared` in plain PyTorch: on every device, differentiable."""
    _check(shared, x)
    return torch.cat([shared.unsqueeze(2).expand(-1, -1, x.shape[2], -1), x], -1)


def _check(shared, x):
    require_tensor("x", x, 4)
    require_dtype("x", x, DTYPES)
    require_tensor("shared", shared, 3)
    require_shape("shared", shared, (*x.shape[:2], shared.shape[2]), "(B, T, R) with the dimensions of x")
    require_dtype_of("shared", shared, x, DTYPES)
    require_device("shared", shared, x.device)


def _cpp_refuses(shared, x):
    reason = inference_unsupported_reason(x, shared)
    if reason is None and not (shared.stride(-1) == 1 and x.stride(-1) == 1):
        return "it takes tensors whose last dimension is contiguous"
    return reason


# In order of preference: the first that does not refuse serves the call.
IMPLEMENTATIONS = {"cpp": _cpp_refuses, "reference": lambda shared, x: None}

library.define("prepend_shared(Tensor shared, Tensor x) -> Tensor", "fastgpt.ops.prepend_shared.prepend_shared")
_prepend_shared = without_autograd(torch.ops.fastgpt.prepend_shared.default)


@torch.library.register_fake("fastgpt::prepend_shared", lib=library)
def _prepend_shared_fake(shared, x):
    _check(shared, x)
    return x.new_empty(*x.shape[:3], shared.shape[2] + x.shape[3])
