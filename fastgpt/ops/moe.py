"""A mixture of experts: the MLPs of the experts that rows are routed to: contract, checks, reference, dispatch."""

import torch
import torch.nn.functional as F

from fastgpt.checks import (
    argument_error,
    is_fake,
    require_choice,
    require_device,
    require_dtype,
    require_dtype_of,
    require_flag,
    require_last_dim_contiguous,
    require_shape,
    require_tensor,
)
from fastgpt.ops.experts import ACTIVATION_NUMBERS, CLAMPED, activate, finished, number_of_experts, of_expert, require_experts
from fastgpt.ops.implementations import (
    INFERENCE_DTYPES,
    choose,
    explain_call,
    inference_unsupported_reason,
    triton_inference_unsupported_reason,
)
from fastgpt.ops.library import library, without_autograd
from fastgpt.ops.linear import DTYPES, MAX_ROWS_CPU, MAX_ROWS_CUDA
from fastgpt.ops.matrix_product import FASTEST, KERNEL
from fastgpt.ops.moe_grouped import moe_grouped
from fastgpt.ops.quantized_weight import Packing, QuantizedWeight


def moe(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str | None = "silu",
    gated: bool = True,
    residual: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """The MLPs of the experts that each token was routed to, weighted and summed.

        y   = up[e] x + up_bias[e]                                                    for each e = experts[k]
        h   = activation(y), or gated activation(y[:I]) · y[I:]
        out = residual + sum over k of weights[k] · (down[e] h + down_bias[e])

    A few tokens read only the weights of the experts they are routed to. Many are sorted by expert, and each expert multiplies
    its own at once. It is computed in fp32 and rounded once; but where experts have more than 64 tokens on average on a CPU, and
    more choices than experts on CUDA, h is rounded to the dtype of x, and on CPUs with bf16 instructions as in `fastgpt.linear`.
    There on a CPU, and in calls that need gradients, down[e] h + down_bias[e] is rounded to it, too, before it is weighted.

    Args:
        x: (..., C) fp16|bf16|fp32|fp64.
        experts: (..., K) int32|int64, as `fastgpt.route` returns them. One outside 0 to E - 1 is an error on a CPU, and adds
            nothing on CUDA.
        weights: (..., K) fp32 (fp64 for fp64 x).
        up: (E, 2I, C), the I rows of the gate first; (E, I, C) if not gated. The last dimension is contiguous. Or a
            `fastgpt.QuantizedWeight` (E · 2I, C) or (E · I, C), of which the experts' matrices lie one below the other. All tensors
            but experts and weights have the dtype of x (under autocast: any).
        down: (E, C, I), or a QuantizedWeight (E · C, I).
        up_bias: (E, 2I), or (E, I) if not gated.
        down_bias: (E, C).
        activation: None, "gelu_tanh", "gelu", "silu", "relu" as in `fastgpt.linear`; or "swiglu_clamped" (GPT-OSS), gated only:
            with gate = min(y[:I], 7) and u = clamp(y[I:], -7, 7), h = (u + 1) · gate · sigmoid(1.702 gate).
        gated: whether `up` has the rows of a gate.
        residual: (..., C).
        impl: "cpp" (CPU), "triton" (CUDA) or "reference"; None picks the first that can serve the call; see
            `fastgpt.explain`.

    Returns: (..., C) in the dtype of x. x, weights, up, down, biases and residual have gradients, which are zeros where x has no
        rows. On the meta device and in FakeTensorMode, only shapes are computed.
    Raises: TypeError (not a tensor, dtype), ValueError (shape, stride, device, range, activation, impl): argument, expected, got.
    Source: Mixtral (arXiv 2401.04088).

    >>> experts, weights = route(torch.randn(2, 5, 8), 2)
    >>> moe(torch.randn(2, 5, 64), experts, weights, torch.randn(8, 256, 64), torch.randn(8, 64, 128)).shape
    torch.Size([2, 5, 64])
    """
    call = (x, experts, weights, up, down, up_bias, down_bias, residual)
    if type(gated) is not bool:
        require_flag("gated", gated)  # PyTorch's dispatcher would accept a number
    try:
        if impl in (None, "cpp") and _moe_cpp_refuses(*call) is None:
            rest = up_bias, down_bias, residual, ACTIVATION_NUMBERS[activation], gated
            # The kernels check the rest, in C++ in a fraction of the time.
            if isinstance(up, QuantizedWeight) and isinstance(down, QuantizedWeight):  # both are, or neither
                if not _has_many_rows(x, experts, down) or torch.compiler.is_compiling() or torch.jit.is_tracing():
                    return _moe_quantized(x, experts, weights, *_packed(*call, activation, gated), *rest)
            elif not _has_many_rows(x, experts, down) or torch.compiler.is_compiling() or torch.jit.is_tracing():
                return _moe(x, experts, weights, up, down, *rest)
            _check_moe(*call, activation, gated)
            return moe_grouped(*call, activation, gated)
        if impl in (None, "triton") and _moe_triton_refuses(*call) is None:
            rest = up_bias, down_bias, residual, ACTIVATION_NUMBERS[activation], gated
            if isinstance(up, QuantizedWeight) and isinstance(down, QuantizedWeight):
                return _moe_quantized(x, experts, weights, *_packed(*call, activation, gated), *rest)
            return _moe(x, experts, weights, up, down, *rest)
    except Exception as error:
        _check_moe(*call, activation, gated)  # raises the error that names the argument
        raise argument_error(error)
    _check_moe(*call, activation, gated)
    choose("moe", MOE_IMPLEMENTATIONS, impl, *call)  # raises for an impl that cannot serve the call
    return (_moe_reference if impl == "reference" else moe_grouped)(*call, activation, gated)


def moe_reference(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str | None = "silu",
    gated: bool = True,
    residual: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """The reference for `fastgpt.moe` in plain PyTorch: on every device, differentiable. It takes the same arguments and ignores
    impl.

        out = residual + sum over k of weights[k] · (down[e] h + down_bias[e]),  h = activation(up[e] x + up_bias[e]),  e = experts[k]

    Returns: (..., C) in the dtype of x.
    Raises: TypeError, ValueError as `fastgpt.moe`.
    """
    call = (x, experts, weights, up, down, up_bias, down_bias, residual)
    _check_moe(*call, activation, gated)
    return _moe_reference(*call, activation, gated)


def _moe_reference(x, experts, weights, up, down, up_bias, down_bias, residual, activation, gated):
    if experts.is_meta or is_fake(experts):  # whose numbers say which experts there are
        return moe_grouped(x, experts, weights, up, down, up_bias, down_bias, residual, activation, gated)
    C, K = x.shape[-1], experts.shape[-1]
    E = number_of_experts(down, C)
    require_experts(experts, E)
    rows, experts, weights = x.reshape(-1, C), experts.reshape(-1, K), weights.reshape(-1, K)
    out = weights.new_zeros(rows.shape)  # in fp32 at least
    for e in experts.unique().tolist() or [0]:  # of no rows, that of an expert, so that their gradients are zeros
        if not 0 <= e < E:
            continue
        row, k = (experts == e).nonzero(as_tuple=True)
        y = F.linear(rows[row], *of_expert(up, up_bias, e, E, dequantized=True))
        y = F.linear(activate(y, activation, gated), *of_expert(down, down_bias, e, E, dequantized=True))
        out = out.index_add(0, row, weights[row, k, None] * y)
    return finished(out, x, residual)


def _has_many_rows(x, experts, down):
    """Whether experts have so many rows on average that PyTorch's product is faster than the kernel, for this dtype."""
    pairs, E = experts.numel(), number_of_experts(down, x.shape[-1])
    return pairs > MAX_ROWS_CPU * E and FASTEST.get(x.dtype) != KERNEL


def _packed(x, experts, weights, up, down, up_bias, down_bias, residual, activation, gated):
    """Quantized weights as the operator takes them, and the number of experts."""
    if up.fits != (x.dtype, x.shape[-1]) or down.dtype is not x.dtype:
        _check_moe(x, experts, weights, up, down, up_bias, down_bias, residual, activation, gated)
    return up.blocks, *up.packing, down.blocks, *down.packing, number_of_experts(down, x.shape[-1])


def _check_moe(x, experts, weights, up, down, up_bias, down_bias, residual, activation, gated):
    require_tensor("x", x)
    require_dtype("x", x, DTYPES)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., C), got a scalar")
    require_choice("activation", activation, ACTIVATION_NUMBERS)
    require_flag("gated", gated)
    if activation == CLAMPED and not gated:
        raise ValueError(f"gated: expected True for activation={CLAMPED!r}, got False")
    require_tensor("experts", experts)
    require_dtype("experts", experts, (torch.int32, torch.int64))
    K, C = experts.shape[-1] if experts.dim() else 0, x.shape[-1]
    if not K or experts.shape[:-1] != x.shape[:-1]:
        expected = f"({', '.join(map(str, (*x.shape[:-1], 'K')))})"
        raise ValueError(f"experts: expected shape {expected} (..., K) with the dimensions of x, got {tuple(experts.shape)}")
    require_device("experts", experts, x.device)
    require_tensor("weights", weights)
    require_shape("weights", weights, tuple(experts.shape), "(..., K)")
    require_dtype("weights", weights, (torch.promote_types(x.dtype, torch.float32),))
    require_device("weights", weights, x.device)
    for name, weight in (("up", up), ("down", down)):
        require_tensor(name, weight, 2 if isinstance(weight, QuantizedWeight) else 3)
    E, I = number_of_experts(down, C) if C else 0, down.shape[-1]
    if not E:
        raise ValueError(f"down: expected shape (E, {C}, I) with an expert at least, got {tuple(down.shape)}")
    rows, rows_name = (2 * I, "2I") if gated else (I, "I")
    sizes = {"up": (up, (rows, C), (rows_name, "C")), "down": (down, (C, I), ("C", "I"))}
    shapes = {
        name: (weight, (E * shape[0], shape[1]), f"(E · {meaning[0]}, {meaning[1]})")
        if isinstance(weight, QuantizedWeight)
        else (weight, (E, *shape), f"(E, {meaning[0]}, {meaning[1]})")
        for name, (weight, shape, meaning) in sizes.items()
    }
    shapes |= {
        "up_bias": (up_bias, (E, rows), f"(E, {rows_name})"),
        "down_bias": (down_bias, (E, C), "(E, C)"),
        "residual": (residual, tuple(x.shape), "(..., C)"),
    }
    for name, (tensor, shape, meaning) in shapes.items():
        if tensor is not None:
            require_tensor(name, tensor)
            require_shape(name, tensor, shape, meaning)
            require_dtype_of(name, tensor, x, DTYPES)
            require_device(name, tensor, x.device)
    for name, weight in (("up", up), ("down", down)):
        if not isinstance(weight, QuantizedWeight):
            require_last_dim_contiguous(name, weight)


def _activation_of(number):
    """The name of the activation with this number."""
    names = {number: name for name, number in ACTIVATION_NUMBERS.items()}
    if number not in names:
        raise ValueError(f"activation: expected a number from 0 to {max(names)}, got {number}")
    return names[number]


def explain(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *,
    up_bias: torch.Tensor | None = None, down_bias: torch.Tensor | None = None, activation: str | None = "silu",
    gated: bool = True, residual: torch.Tensor | None = None, impl: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """Implementation -> "chosen", "available", or why it refuses this call."""
    call = (x, experts, weights, up, down, up_bias, down_bias, residual)
    _check_moe(*call, activation, gated)
    return explain_call(MOE_IMPLEMENTATIONS, *call, impl=impl)


def _moe_cpp_refuses(x, experts, weights, up, down, up_bias, down_bias, residual):
    reason = inference_unsupported_reason(x, weights, up, down, up_bias, down_bias, residual)
    return _weights_refused(up, down) if reason is None else reason


def _moe_triton_refuses(x, experts, weights, up, down, up_bias, down_bias, residual):
    quantized = isinstance(up, QuantizedWeight) and isinstance(down, QuantizedWeight)
    matrices = (up.blocks, down.blocks) if quantized else (up, down)
    reason = triton_inference_unsupported_reason(x, weights, *matrices, up_bias, down_bias, residual)
    return _weights_refused_by_triton(up, down, x.numel() // max(x.shape[-1], 1)) if reason is None else reason


def _weights_refused(up, down):
    quantized = [isinstance(weight, QuantizedWeight) for weight in (up, down)]
    if any(quantized):
        return None if all(quantized) else "it takes both up and down quantized, or neither"
    return None if up.is_contiguous() and down.is_contiguous() else "it takes contiguous up and down"


def _weights_refused_by_triton(up, down, rows):
    if (reason := _weights_refused(up, down)) is not None or not isinstance(up, QuantizedWeight):
        return reason
    if up.packing.block_type or down.packing.block_type:
        return "it takes quantized weights in groups with an fp16 scale"
    return None if rows <= MAX_ROWS_CUDA else f"it multiplies up to {MAX_ROWS_CUDA} rows with quantized experts, and x has more"


# In order of preference: the first that does not refuse serves the call.
MOE_IMPLEMENTATIONS = {"cpp": _moe_cpp_refuses, "triton": _moe_triton_refuses, "reference": lambda *call: None}


def moe_waits(up: torch.Tensor, down: torch.Tensor, rows: int) -> str | None:
    """Why a call of `moe` on a GPU with these weights, of a dtype that kernels serve, and so many rows of x cannot be captured in a
    CUDA graph, or None."""
    reason = _weights_refused_by_triton(up, down, rows)
    return None if reason is None else f"the host reads how many rows each expert gets, as no kernel serves it: {reason}"


library.define(
    "moe(Tensor x, Tensor experts, Tensor weights, Tensor up, Tensor down, Tensor? up_bias=None, Tensor? down_bias=None, "
    "Tensor? residual=None, int activation=3, bool gated=True) -> Tensor"
)

library.define(
    "moe_quantized(Tensor x, Tensor experts, Tensor weights, Tensor up_blocks, int up_bits, int up_group_size, bool up_minima, "
    "int up_block_type, Tensor down_blocks, int down_bits, int down_group_size, bool down_minima, int down_block_type, "
    "int num_experts, Tensor? up_bias=None, Tensor? down_bias=None, Tensor? residual=None, int activation=3, bool gated=True) "
    "-> Tensor",
    "fastgpt.moe",
)

_moe = without_autograd(torch.ops.fastgpt.moe.default)
_moe_quantized = without_autograd(torch.ops.fastgpt.moe_quantized.default)


@torch.library.register_fake("fastgpt::moe", lib=library)
def _moe_fake(x, experts, weights, up, down, up_bias=None, down_bias=None, residual=None, activation=3, gated=True):
    _check_moe(x, experts, weights, up, down, up_bias, down_bias, residual, _activation_of(activation), gated)
    return x.new_empty(x.shape)


@torch.library.register_fake("fastgpt::moe_quantized", lib=library)
def _moe_quantized_fake(
    x, experts, weights, up_blocks, up_bits, up_group_size, up_minima, up_block_type,
    down_blocks, down_bits, down_group_size, down_minima, down_block_type, num_experts,
    up_bias=None, down_bias=None, residual=None, activation=3, gated=True,
):  # fmt: skip
    up, down = _unpacked(
        x, up_blocks, Packing(up_bits, up_group_size, up_minima, up_block_type),
        down_blocks, Packing(down_bits, down_group_size, down_minima, down_block_type), num_experts, gated,
    )  # fmt: skip
    _check_moe(x, experts, weights, up, down, up_bias, down_bias, residual, _activation_of(activation), gated)
    return x.new_empty(x.shape)


def _unpacked(x, up_blocks, up_packing, down_blocks, down_packing, num_experts, gated):
    """The quantized weights that the operator was called with."""
    require_tensor("x", x)
    require_tensor("up_blocks", up_blocks, 2)
    require_tensor("down_blocks", down_blocks, 2)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., C), got a scalar")
    if num_experts < 1:
        raise ValueError(f"num_experts: expected an integer >= 1, got {num_experts}")
    I = len(up_blocks) // num_experts // (2 if gated else 1)
    return (
        QuantizedWeight(up_blocks, up_packing, x.shape[-1], x.dtype),
        QuantizedWeight(down_blocks, down_packing, I, x.dtype),
    )


def _moe_triton(x, experts, weights, up, down, up_bias=None, down_bias=None, residual=None, activation=3, gated=True):
    _check_moe(x, experts, weights, up, down, up_bias, down_bias, residual, _activation_of(activation), gated)
    require_dtype("x", x, INFERENCE_DTYPES)
    for name, weight in (("up", up), ("down", down)):
        if not weight.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {weight.stride()}")
    from fastgpt.kernels.moe import moe  # Triton is imported only when a CUDA tensor needs it

    return moe(x, experts, weights, up, down, up_bias, down_bias, residual, activation, gated)


def _moe_quantized_triton(
    x, experts, weights, up_blocks, up_bits, up_group_size, up_minima, up_block_type,
    down_blocks, down_bits, down_group_size, down_minima, down_block_type, num_experts,
    up_bias=None, down_bias=None, residual=None, activation=3, gated=True,
):  # fmt: skip
    up_packing = Packing(up_bits, up_group_size, up_minima, up_block_type)
    down_packing = Packing(down_bits, down_group_size, down_minima, down_block_type)
    up, down = _unpacked(x, up_blocks, up_packing, down_blocks, down_packing, num_experts, gated)
    _check_moe(x, experts, weights, up, down, up_bias, down_bias, residual, _activation_of(activation), gated)
    require_dtype("x", x, INFERENCE_DTYPES)
    if (reason := _weights_refused_by_triton(up, down, x.numel() // x.shape[-1])) is not None:
        raise ValueError(f"x: expected what the kernel serves: {reason}")
    from fastgpt.kernels.moe_quantized import moe_quantized  # Triton is imported only when a CUDA tensor needs it

    packed = up_blocks, up_packing[:3], down_blocks, down_packing[:3], num_experts
    return moe_quantized(x, experts, weights, *packed, up_bias, down_bias, residual, activation, gated)


library.impl("moe", _moe_triton, "CUDA")
library.impl("moe_quantized", _moe_quantized_triton, "CUDA")
