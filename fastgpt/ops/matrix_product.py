"""The product of many rows with a weight on a CPU, by the fastest of the ways that there are for a dtype.

The way follows from the CPU and is not timed at run time, so that equal machines give equal bits, busy or not. Measured with torch
2.13 at 65 to 512 rows, 576 to 3,072 columns (`python -m benchmarks linear` compares them):

* fp32 on AMD: oneDNN. MKL, which F.linear uses, takes AVX2 there: 0.7 to 0.9 of oneDNN on Zen 4, less than half on Zen 5. On
  Intel's CPUs F.linear is faster (1.1 times, Emerald Rapids).
* fp16: the kernel of `linear`. F.linear takes five times as long, unless the CPU has instructions for fp16.
* bf16: F.linear where the CPU multiplies bf16 itself, elsewhere the kernel, as F.linear takes three times as long.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch._C import _is_any_autocast_enabled as _any_autocast_enabled
from torch._C._functorch import is_legacy_batchedtensor

from fastgpt import _C
from fastgpt.ops.derivatives import transforms_active

KERNEL, ONEDNN, PYTORCH = "kernel", "oneDNN", "PyTorch"
LEAST_ROWS = 33  # for oneDNN's product


def _fastest(level: str, features: dict[str, bool], onednn: bool) -> dict[torch.dtype, str]:
    """dtype -> how the product of many rows is computed."""
    vectors = level in ("avx2", "avx512", "amx")
    kernel = KERNEL if vectors else PYTORCH
    multiplies_bf16 = features["avx512_bf16"] or level == "amx"
    return {
        torch.float32: ONEDNN if onednn and vectors and features["amd"] else PYTORCH,
        torch.float16: PYTORCH if features["avx512_fp16"] else kernel,
        torch.bfloat16: PYTORCH if multiplies_bf16 else kernel,
    }


_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_LEVEL = _C.build_info()["cpu_level"]
FASTEST = _fastest(_LEVEL, _C.cpu_features(), _onednn is not None)
# With AVX2, oneDNN's product with a transposed weight is slower than PyTorch's.
_TRANSPOSED = _LEVEL in ("avx512", "amx")


def matrix_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear(x, weight, bias) by oneDNN where that is faster; differentiable.

    Args:
        x: (..., C).
        weight: (N, C).
        bias: (N,) or None.

    Returns: (..., N).
    """
    if FASTEST.get(x.dtype) != ONEDNN or not _serves(x, weight, bias):
        return F.linear(x, weight, bias)
    derived = torch.is_grad_enabled() and any(other is not None and other.requires_grad for other in (x, weight, bias))
    product = (_Product.apply if derived else _product)(x.reshape(-1, x.shape[-1]), weight, bias)
    return product.view(*x.shape[:-1], len(weight))


def _product(x, weight, bias):
    return _onednn(x, weight, bias, "none", [], "")


def _serves(x, weight, bias) -> bool:
    """Whether oneDNN takes these arguments, and nothing is active that it would not know of. It does not check them itself."""
    C = x.shape[-1] if x.dim() else 0
    shapes = ((weight, (len(weight), C)), (bias, (len(weight),)))
    return (
        C > 0 < len(weight)
        and x.numel() >= LEAST_ROWS * C
        and _is_plain(x, x.dtype)
        and all(other is None or other.shape == shape and _is_plain(other, x.dtype) for other, shape in shapes)
        and (bias is None or bias.is_contiguous())  # oneDNN's product ignores its stride
        and torch._C._get_mkldnn_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not _any_autocast_enabled()
        and not transforms_active()
        and not is_legacy_batchedtensor(x)  # of a batched backward pass
    )


def _is_plain(x, dtype) -> bool:
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_cpu and x.dtype == dtype and x.layout == torch.strided


class _Product(torch.autograd.Function):
    """`_product` of x (R, C) with its derivatives, which can be differentiated in turn."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            (matrix_product(gradient, weight.t()) if _TRANSPOSED else gradient @ weight) if of_x else None,
            gradient.t() @ x if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )
