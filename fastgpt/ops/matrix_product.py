"""The product of many rows and a weight on a CPU, by the fastest implementation for a dtype.

The choice depends on the CPU alone and is not timed at run time, so that equal machines give equal bits, busy or not. Measured with
torch 2.13 at 65 to 512 rows, 576 to 3,072 columns (`python -m benchmarks linear` compares them):

* fp32 on AMD: the kernel of `linear`. It has no derivatives: calls that need gradients take oneDNN. With AVX2, on Zen 3 with two
  threads, it is 1.00 to 1.31 times as fast as oneDNN (median 1.17) and 0.93 to 1.41 times as F.linear (1.12). With AVX-512, on
  Zen 4 with two threads, it reaches 86 to 94% of the peak from 128 rows on: 1.05 to 1.09 times oneDNN's speed there, 0.97 to 1.00
  at 512 rows, 0.87 to 0.97 at 65, which it pads to 80; and it computes norm, bias, activation and residual in the same pass. MKL,
  which F.linear uses, takes its AVX2 code there: 0.7 to 0.9 of oneDNN's speed on Zen 4, less than half on Zen 5.
* fp32 on Intel's CPUs: F.linear, 1.1 times as fast as oneDNN on Emerald Rapids.
* fp16: the kernel of `linear`. F.linear takes five times as long, unless the CPU has fp16 instructions.
* bf16: F.linear if the CPU has bf16 instructions, else the kernel, as F.linear takes three times as long.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch._C import _is_any_autocast_enabled as _any_autocast_enabled
from torch._C._functorch import is_legacy_batchedtensor

from fastgpt import _C
from fastgpt.ops.derivatives import transforms_active

KERNEL, ONEDNN, PYTORCH = "kernel", "oneDNN", "PyTorch"
MIN_ROWS_ONEDNN = 33  # of x; below, oneDNN is not used


def _fastest(level: str, features: dict[str, bool], onednn: bool, derivatives: bool = False) -> dict[torch.dtype, str]:
    """dtype -> the implementation of the product of many rows, or of those that have derivatives."""
    vectors = level in ("avx2", "avx512", "amx")
    kernel = KERNEL if vectors and not derivatives else PYTORCH
    multiplies_bf16 = features["avx512_bf16"] or level == "amx"
    of_amd = KERNEL if level in ("avx2", "avx512") and not derivatives else ONEDNN if onednn and vectors else PYTORCH
    return {
        torch.float32: of_amd if features["amd"] else PYTORCH,
        torch.float16: PYTORCH if features["avx512_fp16"] else kernel,
        torch.bfloat16: PYTORCH if multiplies_bf16 else kernel,
    }


_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_LEVEL = _C.build_info()["cpu_level"]
FASTEST = _fastest(_LEVEL, _C.cpu_features(), _onednn is not None)
_DIFFERENTIABLE = _fastest(_LEVEL, _C.cpu_features(), _onednn is not None, derivatives=True)
# With AVX2, oneDNN's product with a transposed weight is slower than PyTorch's.
_TRANSPOSED = _LEVEL in ("avx512", "amx")


def matrix_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear(x, weight, bias), by oneDNN if that is faster; differentiable.

    Args:
        x: (..., C).
        weight: (N, C).
        bias: (N,) or None.

    Returns: (..., N).
    """
    if _DIFFERENTIABLE.get(x.dtype) != ONEDNN or not _serves(x, weight, bias):
        return F.linear(x, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(other is not None and other.requires_grad for other in (x, weight, bias))
    product = (_Product.apply if needs_grad else _product)(x.reshape(-1, x.shape[-1]), weight, bias)
    return product.view(*x.shape[:-1], len(weight))


def _product(x, weight, bias):
    return _onednn(x, weight, bias, "none", [], "")


def _serves(x, weight, bias) -> bool:
    """Whether oneDNN's product takes these arguments, which it does not check, and no tracing or transform is active that it would
    bypass."""
    if torch.compiler.is_compiling():  # which cannot trace some of what follows
        return False
    C = x.shape[-1] if x.dim() else 0
    shapes = ((weight, (len(weight), C)), (bias, (len(weight),)))
    return (
        C > 0 < len(weight)
        and x.numel() >= MIN_ROWS_ONEDNN * C
        and _is_plain_tensor(x, x.dtype)
        and all(other is None or other.shape == shape and _is_plain_tensor(other, x.dtype) for other, shape in shapes)
        and (bias is None or bias.is_contiguous())  # oneDNN's product ignores its stride
        and torch._C._get_mkldnn_enabled()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not _any_autocast_enabled()
        and not transforms_active()
        and not is_legacy_batchedtensor(x)  # in a batched backward pass
    )


def _is_plain_tensor(x, dtype) -> bool:
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_cpu and x.dtype == dtype and x.layout == torch.strided


class _Product(torch.autograd.Function):
    """`_product` of x (R, C) with gradients, which are differentiable, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad
        return (
            (matrix_product(grad_output, weight.t()) if _TRANSPOSED else grad_output @ weight) if needs_dx else None,
            grad_output.t() @ x if needs_dweight else None,
            grad_output.sum(0) if needs_dbias else None,
        )
