"""A linear layer fused with norm, activation, gate, dropout and residual: contract, checks, reference, dispatch."""

import torch
import torch.nn.functional as F

from fastgpt.checks import (
    argument_error,
    require_choice,
    require_device,
    require_dtype,
    require_dtype_of,
    require_flag,
    require_last_dim_contiguous,
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
from fastgpt.ops.library import build_info, library, without_autograd
from fastgpt.ops.matrix_product import FASTEST, KERNEL, matrix_product
from fastgpt.ops.norm import KINDS, norm_reference
from fastgpt.ops.quantized_weight import BITS, FUNCTIONS, UNIT, Packing, QuantizedWeight, dequantized_product

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Up to this many rows of x the kernels are faster than other matrix products. Where they are faster with more, too, they compute
# kMostManyRows (csrc/linear/products_many_rows.h) at a time.
MAX_ROWS_CPU = 64 if build_info()["cpu_level"] in ("avx2", "avx512", "amx") else 32  # at most kMaxRows of csrc/linear/linear.h
# On a CPU, each row's result has the same bits for any number of rows between two of MAX_ROWS_CPU and these, which are kFewRows of
# csrc/linear/products_quantized.h, and rows below kLeast of products_amx.h and products_bf16_dot.h.
FEW_ROWS_QUANTIZED, FEW_ROWS_BF16 = 4, 8
MAX_ROWS_CUDA = 32
PANEL_BYTES = 16 << 20  # of dequantized weights at a time, which are multiplied with many rows of x
# Of quantized weights, and x in 16 bits. A kernel dequantizes them in registers; PyTorch moves 20 to 40 bytes for each before cuBLAS
# multiplies, which takes as long as an H100 multiplies it with 3,000 rows. If the kernel is half as fast as cuBLAS, both are even
# there, and at 1,000 rows if it is a quarter as fast. fp32, which tensor cores do not multiply, is left to cuBLAS.
MAX_ROWS_CUDA_QUANTIZED = 1024
ACTIVATIONS = {
    None: lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}
ACTIVATION_NUMBERS: dict[str | None, int] = {
    name: number for number, name in enumerate(ACTIVATIONS)
}  # the same in csrc/linear/linear.h


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: str = "layer",
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_offset: float = 0.0,
    activation: str | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    impl: str | None = None,
) -> torch.Tensor:
    """A linear layer, optionally with a norm before it, and activation, gate, dropout and residual after it.

        y = norm(x) weight^T + bias
        out = residual + dropout(activation(y))
        out = residual + dropout(activation(y[..., :N]) · y[..., N:])                        gated

    In decoding, the time is bound by reading the weight, which happens once. Up to 32 rows (the product of all dimensions of x but
    the last; 64 on CPUs with AVX2) are computed in fp32 and rounded once, on CUDA in one launch. More rows use PyTorch's matrix
    product, or on a CPU the fastest for the dtype. On CPUs with bf16 instructions, from 9 rows on, normalized x in bf16 is rounded
    before the product: to bf16, or with AMX to 16 significant bits. With weights of 4 bits without minima it is rounded to bf16 for
    up to 4 rows, too.

    Args:
        x: (..., C) fp16|bf16|fp32|fp64.
        weight: (N, C), last dimension contiguous; or a `fastgpt.QuantizedWeight`, whose product is computed in fp32 for as many
            rows, but on CPUs with bf16 instructions for up to 8 in bf16; for more in fp16 or bf16, its numbers are rounded to that
            dtype first, a part of the matrix at a time: on a CPU if PyTorch's product is the fastest, on CUDA up to 1024 rows,
            without a copy of the matrix. All tensors have the dtype of x (under autocast: any).
        bias: (N,).
        norm: "layer" or "rms", over the last dimension; see `fastgpt.norm`.
        norm_weight: (C,), weight of the norm; None: no norm.
        norm_bias: (C,), bias of the norm.
        norm_eps: added to the variance, or to the mean square.
        norm_offset: added to norm_weight.
        activation: None or
            "gelu_tanh"  y/2 · (1 + tanh(sqrt(2/pi) · (y + 0.044715 y^3)))
            "gelu"       y/2 · (1 + erf(y / sqrt(2)))
            "silu"       y / (1 + e^-y)
            "relu"       max(y, 0)
        gated: weight is (2N, C) and bias (2N,): the N rows of the gate come first.
        residual: (..., N).
        dropout_p: probability of zeroing an element; the others are divided by 1 - dropout_p.
        impl: "cpp" (CPU), "triton" (CUDA) or "reference"; None picks the first that can serve the call; see
            `fastgpt.explain`.

    Returns: (..., N) in the dtype of x. Calls that need gradients run the reference, with the same matrix product.
    Raises: TypeError (not a tensor or a number, dtype), ValueError (shape, stride, device, norm, activation, impl):
        argument, expected, got.

    >>> linear(torch.randn(1, 1, 768), torch.randn(3072, 768), norm_weight=torch.ones(768), activation="gelu_tanh").shape
    torch.Size([1, 1, 3072])
    """
    call = (x, weight, bias, norm_weight, norm_bias, residual, dropout_p)
    if (
        type(gated) is not bool
        or type(dropout_p) is not float
        or norm_weight is not None
        and not type(norm_eps) is type(norm_offset) is float
    ):
        # PyTorch's dispatcher would accept None for a flag and True for a number.
        require_flag("gated", gated)
        require_number("dropout_p", dropout_p, least=0, below=1)
        norm_eps, norm_offset = require_number("norm_eps", norm_eps, least=0), require_number("norm_offset", norm_offset)
    try:
        if impl in (None, "cpp") and _cpp_refuses(*call) is None:
            rms, number = KINDS[norm], ACTIVATION_NUMBERS[activation]
            # Each argument costs 0.1 us in the dispatcher: those of the norm are passed only if there is one.
            no_norm = norm_weight is None and norm_bias is None
            norm_arguments = () if no_norm else (norm_weight, norm_bias, rms, norm_eps, norm_offset)
            if no_norm and (norm_eps != 1e-5 or norm_offset != 0.0):  # the kernel does not see, and so not check, these
                _check(*call, norm, norm_eps, norm_offset, activation, gated)
            many = x.numel() > MAX_ROWS_CPU * x.shape[-1] and FASTEST.get(x.dtype) != KERNEL or not x.shape[-1]
            # The kernels check the rest in C++, in a fraction of the time.
            if isinstance(weight, QuantizedWeight):
                if weight.fits != (x.dtype, x.shape[-1]):
                    _check(*call, norm, norm_eps, norm_offset, activation, gated)
                if not many or torch.compiler.is_compiling() or torch.jit.is_tracing():  # whose graphs a loop would fill
                    return _linear_quantized(x, weight.blocks, *weight.packing, bias, residual, number, gated, *norm_arguments)
            elif not many:
                return _linear(x, weight, bias, residual, number, gated, *norm_arguments)
            # The matrix product checks shapes and dtypes, our kernels check the rest.
            require_tensor("x", x)
            require_tensor("weight", weight, 2)
            if x.dtype not in DTYPES or not x.shape[-1] or norm_weight is None and norm_bias is not None:
                _check(*call, norm, norm_eps, norm_offset, activation, gated)
            if norm_weight is not None:
                x = _norm(x, norm_weight, norm_bias, None, rms, norm_eps, norm_offset)
            return _linear_many_rows(x, weight, bias, residual, number, gated)
        if impl in (None, "triton") and _triton_refuses(*call) is None:
            norm_arguments = norm_weight, norm_bias, KINDS[norm], norm_eps, norm_offset
            if isinstance(weight, QuantizedWeight):
                if weight.fits != (x.dtype, x.shape[-1]):
                    _check(*call, norm, norm_eps, norm_offset, activation, gated)
                rest = bias, residual, ACTIVATION_NUMBERS[activation], gated, *norm_arguments
                return _linear_quantized(x, weight.blocks, *weight.packing, *rest)
            return _linear(x, weight, bias, residual, ACTIVATION_NUMBERS[activation], gated, *norm_arguments)
    except Exception as error:
        _check(*call, norm, norm_eps, norm_offset, activation, gated)  # raises the error that names the argument
        raise argument_error(error)
    _check(*call, norm, norm_eps, norm_offset, activation, gated)
    choose("linear", IMPLEMENTATIONS, impl, *call)  # raises for an impl that cannot serve the call
    if impl is None and norm_weight is not None and triton_inference_unsupported_reason(*call[:-1], weight=weight) is None:
        x, norm_weight, norm_bias = _norm(x, norm_weight, norm_bias, None, KINDS[norm], norm_eps, norm_offset), None, None
    if norm_weight is not None:
        x = norm_reference(x, norm_weight, norm_bias, kind=norm, eps=norm_eps, offset=norm_offset)
    product = dequantized_product if isinstance(weight, QuantizedWeight) else matrix_product if impl is None else F.linear
    y = product(x, weight, bias)
    return finish(y, activation=activation, gated=gated, residual=residual, dropout_p=dropout_p)


def _linear_function(input, weight, bias=None):  # noqa: A002  # F.linear's name
    """F.linear, of which an argument is a QuantizedWeight."""
    if isinstance(weight, QuantizedWeight) and not isinstance(input, QuantizedWeight):
        return linear(input, weight, bias)
    return F.linear(*(x.dequantize() if isinstance(x, QuantizedWeight) else x for x in (input, weight, bias)))


FUNCTIONS[F.linear] = _linear_function


def _linear_many_rows(x, weight, bias, residual, activation, gated):
    """The matrix product, then one pass for bias, activation, gate and residual."""
    product = (_quantized_product if isinstance(weight, QuantizedWeight) else matrix_product)(x, weight)
    if gated:
        return _gate(product, bias, residual, activation)
    if bias is not None or activation or residual is not None:
        _finish(product, bias, residual, activation)
    return product


def _quantized_product(x, weight):
    """The matrix product with weights that are dequantized a panel at a time, so that there is no copy of a large matrix. Smaller
    panels are slower: PyTorch's product needs large ones."""
    N, C = weight.shape
    rows = x.reshape(-1, C)
    out = x.new_empty(len(rows), N)
    step = min(N, max(64, PANEL_BYTES // (C * x.itemsize) // 16 * 16))
    panel = x.new_empty(step, C)
    for columns, blocks in zip(out.split(step, 1), weight.blocks.split(step)):
        part = panel[: len(blocks)]
        _dequantize(part, blocks, *weight.packing)
        columns.copy_(matrix_product(rows, part))
    return out.view(*x.shape[:-1], N)


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: str = "layer",
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_offset: float = 0.0,
    activation: str | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    impl: str | None = None,
) -> torch.Tensor:
    """The reference for `fastgpt.linear` in plain PyTorch: on every device, differentiable. It takes the same arguments and
    ignores impl.

        y = norm(x) weight^T + bias;  out = residual + dropout(activation(y)), or gated with activation(y[..., :N]) · y[..., N:]

    Returns: (..., N) in the dtype of x.
    Raises: TypeError, ValueError as `fastgpt.linear`.
    """
    _check(x, weight, bias, norm_weight, norm_bias, residual, dropout_p, norm, norm_eps, norm_offset, activation, gated)
    if norm_weight is not None:
        x = norm_reference(x, norm_weight, norm_bias, kind=norm, eps=norm_eps, offset=norm_offset)
    product = dequantized_product if isinstance(weight, QuantizedWeight) else F.linear
    return finish(product(x, weight, bias), activation=activation, gated=gated, residual=residual, dropout_p=dropout_p)


def finish(
    y: torch.Tensor,
    *,
    activation: str | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Activation, gate, dropout and residual of `linear`, in plain PyTorch."""
    activate = ACTIVATIONS[activation]
    if gated:
        gate, y = y.chunk(2, -1)
        y = activate(gate) * y
    else:
        y = activate(y)
    if dropout_p > 0:
        y = F.dropout(y, float(dropout_p))
    return y if residual is None else residual + y


def _check(
    x, weight, bias, norm_weight, norm_bias, residual, dropout_p, norm, norm_eps, norm_offset, activation, gated
):  # fmt: skip
    require_tensor("x", x)
    require_dtype("x", x, DTYPES)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., C), got a scalar")
    require_tensor("weight", weight, 2)
    require_flag("gated", gated)
    rows, C = weight.shape[0], x.shape[-1]
    if gated and rows % 2:
        raise ValueError(f"weight: expected an even number of rows (2N, C) with a gate, got {tuple(weight.shape)}")
    N, rows_name = (rows // 2, "2N") if gated else (rows, "N")
    shapes = {
        "weight": (weight, (rows, C), f"({rows_name}, C)"),
        "bias": (bias, (rows,), f"({rows_name},)"),
        "norm_weight": (norm_weight, (C,), "(C,)"),
        "norm_bias": (norm_bias, (C,), "(C,)"),
        "residual": (residual, (*x.shape[:-1], N), "(..., N)"),
    }
    for name, (tensor, shape, meaning) in shapes.items():
        if tensor is not None:
            require_tensor(name, tensor)
            require_shape(name, tensor, shape, meaning)
            require_dtype_of(name, tensor, x, DTYPES)
            require_device(name, tensor, x.device)
    require_last_dim_contiguous("weight", weight)
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias: expected None without norm_weight, got a tensor")
    require_choice("norm", norm, KINDS)
    require_number("norm_eps", norm_eps, least=0)
    require_number("norm_offset", norm_offset)
    require_choice("activation", activation, ACTIVATIONS)
    require_number("dropout_p", dropout_p, least=0, below=1)


def explain(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, norm: str = "layer",
    norm_weight: torch.Tensor | None = None, norm_bias: torch.Tensor | None = None, norm_eps: float = 1e-5,
    norm_offset: float = 0.0, activation: str | None = None, gated: bool = False, residual: torch.Tensor | None = None,
    dropout_p: float = 0.0, impl: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """Implementation -> "chosen", "available", or why it refuses this call."""
    call = (x, weight, bias, norm_weight, norm_bias, residual, dropout_p)
    _check(*call, norm, norm_eps, norm_offset, activation, gated)
    return explain_call(IMPLEMENTATIONS, *call, impl=impl)


def _cpp_refuses(x, weight, bias, norm_weight, norm_bias, residual, dropout_p):
    reason = inference_unsupported_reason(x, weight, bias, norm_weight, norm_bias, residual)
    if reason is not None:
        return reason
    if dropout_p != 0:
        return "it has no dropout"
    if not isinstance(weight, QuantizedWeight) and not weight.is_contiguous():
        return "it takes a contiguous weight"
    return None


def _triton_refuses(x, weight, bias, norm_weight, norm_bias, residual, dropout_p):
    reason = triton_inference_unsupported_reason(x, weight, bias, norm_weight, norm_bias, residual, weight=weight)
    is_quantized = isinstance(weight, QuantizedWeight)
    if reason is None and x.numel() == 0:
        reason = "x is empty"
    elif reason is None and x.numel() > (most := _most_rows_cuda(x.dtype, is_quantized)) * x.shape[-1]:
        reason = f"it multiplies up to {most} rows, and x has more"
    elif reason is None and dropout_p != 0:
        reason = "it has no dropout"
    elif reason is None and is_quantized and weight.packing.block_type:
        reason = "it takes quantized weights in groups with an fp16 scale"
    elif reason is None and not (is_quantized or weight.is_contiguous()):
        reason = "it takes a contiguous weight"
    return reason


def _most_rows_cuda(dtype: torch.dtype, is_quantized: bool) -> int:
    return MAX_ROWS_CUDA_QUANTIZED if is_quantized and dtype.itemsize == 2 else MAX_ROWS_CUDA


# In order of preference: the first that does not refuse serves the call.
IMPLEMENTATIONS = {"cpp": _cpp_refuses, "triton": _triton_refuses, "reference": lambda *call: None}

library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, int activation=0, bool gated=False, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, bool rms=False, float norm_eps=1e-5, float norm_offset=0.0) -> Tensor"
)
# Bias, activation and residual after a matrix product: in place, or not in place with a gate, which halves the width.
library.define(
    "linear_finish_(Tensor(a!) out, Tensor? bias=None, Tensor? residual=None, int activation=0) -> ()", "fastgpt.linear"
)
library.define(
    "linear_gate(Tensor product, Tensor? bias=None, Tensor? residual=None, int activation=0) -> Tensor", "fastgpt.linear"
)

library.define(
    "linear_quantized(Tensor x, Tensor blocks, int bits, int group_size, bool minima, int block_type, Tensor? bias=None, Tensor? residual=None, "
    "int activation=0, bool gated=False, Tensor? norm_weight=None, Tensor? norm_bias=None, bool rms=False, "
    "float norm_eps=1e-5, float norm_offset=0.0) -> Tensor",
    "fastgpt.linear",
)

library.define(
    "linear_dequantize_(Tensor(a!) out, Tensor blocks, int bits, int group_size, bool minima, int block_type) -> ()",
    "fastgpt.linear",
)

_linear = without_autograd(torch.ops.fastgpt.linear.default)
_linear_quantized = without_autograd(torch.ops.fastgpt.linear_quantized.default)
_dequantize = without_autograd(torch.ops.fastgpt.linear_dequantize_.default)
_finish = without_autograd(torch.ops.fastgpt.linear_finish_.default)
_gate = without_autograd(torch.ops.fastgpt.linear_gate.default)
_norm = without_autograd(torch.ops.fastgpt.norm.default)


@torch.library.register_fake("fastgpt::linear", lib=library)
def _linear_fake(
    x, weight, bias=None, residual=None, activation=0, gated=False,
    norm_weight=None, norm_bias=None, rms=False, norm_eps=1e-5, norm_offset=0.0,
):  # fmt: skip
    _check(x, weight, bias, norm_weight, norm_bias, residual, 0.0, "layer", norm_eps, norm_offset, None, gated)
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2 if gated else weight.shape[0])


@torch.library.register_fake("fastgpt::linear_dequantize_", lib=library)
def _linear_dequantize_fake(out, blocks, bits, group_size, minima, block_type):
    return None


@torch.library.register_fake("fastgpt::linear_quantized", lib=library)
def _linear_quantized_fake(
    x, blocks, bits, group_size, minima, block_type, bias=None, residual=None, activation=0, gated=False,
    norm_weight=None, norm_bias=None, rms=False, norm_eps=1e-5, norm_offset=0.0,
):  # fmt: skip
    weight = _quantized_weight(x, blocks, bits, group_size, minima, block_type)
    _check(x, weight, bias, norm_weight, norm_bias, residual, 0.0, "layer", norm_eps, norm_offset, None, gated)
    return x.new_empty(*x.shape[:-1], len(blocks) // 2 if gated else len(blocks))


def _quantized_weight(x, blocks, bits, group_size, minima, block_type):
    require_tensor("x", x)
    require_tensor("blocks", blocks, 2)
    if not block_type:
        if bits not in BITS.values():
            raise ValueError(f"bits: expected 8 or 4, got {bits}")
        if group_size <= 0 or group_size % UNIT:
            raise ValueError(f"group_size: expected a multiple of {UNIT}, got {group_size}")
    columns = x.shape[-1] if x.dim() else 0
    packing = Packing(bits, group_size, minima, block_type)
    if not columns or columns % packing.block:
        raise ValueError(f"x: expected a positive multiple of {packing.block} columns, got {columns}")
    return QuantizedWeight(blocks, packing, columns, x.dtype)


def _linear_triton(
    x, weight, bias=None, residual=None, activation=0, gated=False,
    norm_weight=None, norm_bias=None, rms=False, norm_eps=1e-5, norm_offset=0.0,
):  # fmt: skip
    _check(x, weight, bias, norm_weight, norm_bias, residual, 0.0, "layer", norm_eps, norm_offset, None, gated)
    _check_triton(x, activation, MAX_ROWS_CUDA)
    if not weight.is_contiguous():
        raise ValueError(f"weight: expected a contiguous tensor, got strides {weight.stride()}")
    from fastgpt.kernels.linear import linear  # Triton is imported only when a CUDA tensor needs it

    return linear(x, weight, bias, residual, activation, gated, norm_weight, norm_bias, rms, norm_eps, norm_offset)


def _linear_quantized_triton(
    x, blocks, bits, group_size, minima, block_type, bias=None, residual=None, activation=0, gated=False,
    norm_weight=None, norm_bias=None, rms=False, norm_eps=1e-5, norm_offset=0.0,
):  # fmt: skip
    weight = _quantized_weight(x, blocks, bits, group_size, minima, block_type)
    _check(x, weight, bias, norm_weight, norm_bias, residual, 0.0, "layer", norm_eps, norm_offset, None, gated)
    if block_type:
        raise ValueError(f"block_type: expected 0, got {block_type}")
    _check_triton(x, activation, _most_rows_cuda(x.dtype, is_quantized=True))
    from fastgpt.kernels.linear_quantized import linear_quantized  # Triton is imported only when a CUDA tensor needs it

    rest = bias, residual, activation, gated, norm_weight, norm_bias, rms, norm_eps, norm_offset
    return linear_quantized(x, blocks, bits, group_size, minima, *rest)


def _check_triton(x, activation, most_rows):
    require_dtype("x", x, INFERENCE_DTYPES)
    if not x.numel() or x.numel() > most_rows * x.shape[-1]:
        raise ValueError(f"x: expected from 1 to {most_rows} rows, got shape {tuple(x.shape)}")
    if activation not in ACTIVATION_NUMBERS.values():
        raise ValueError(f"activation: expected a number from 0 to {max(ACTIVATION_NUMBERS.values())}, got {activation}")


library.impl("linear", _linear_triton, "CUDA")
library.impl("linear_quantized", _linear_quantized_triton, "CUDA")


@torch.library.register_fake("fastgpt::linear_finish_", lib=library)
def _finish_fake(out, bias=None, residual=None, activation=0):
    _check_finish("out", out, bias, residual, out.shape)


@torch.library.register_fake("fastgpt::linear_gate", lib=library)
def _gate_fake(product, bias=None, residual=None, activation=0):
    _check_finish("product", product, bias, residual, (*product.shape[:-1], product.shape[-1] // 2))
    return product.new_empty(*product.shape[:-1], product.shape[-1] // 2)


def _check_finish(name, product, bias, residual, shape):
    require_tensor(name, product)
    for other, tensor, expected in (("bias", bias, tuple(product.shape[-1:])), ("residual", residual, tuple(shape))):
        if tensor is not None:
            require_dtype(other, tensor, (product.dtype,))
            require_shape(other, tensor, expected, f"to match {name}")
            require_device(other, tensor, product.device)
