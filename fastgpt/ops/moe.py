"""Mixtures of experts: routing and the experts' MLPs: contracts, checks, references, dispatch."""

import torch
import torch.nn.functional as F

from fastgpt.checks import (
    argument_error,
    is_autocasting,
    is_fake,
    require_choice,
    require_device,
    require_dtype,
    require_dtype_of,
    require_flag,
    require_integer,
    require_last_dim_contiguous,
    require_number,
    require_shape,
    require_tensor,
)
from fastgpt.ops.implementations import choose, explain_call, inference_unsupported_reason, triton_inference_unsupported_reason
from fastgpt.ops.library import library, without_autograd
from fastgpt.ops.linear import ACTIVATION_NUMBERS as OF_LINEAR
from fastgpt.ops.linear import DTYPES, MAX_ROWS_CPU, MAX_ROWS_CUDA, finish, linear
from fastgpt.ops.matrix_product import FASTEST, KERNEL
from fastgpt.ops.quantized_weight import Packing, QuantizedWeight

SCORINGS = {"softmax": False, "sigmoid": True}
GROUP_SCORES = {"max": False, "top2": True}
CLAMPED = "swiglu_clamped"
ALPHA, LIMIT = 1.702, 7.0  # of "swiglu_clamped"
ACTIVATION_NUMBERS = OF_LINEAR | {CLAMPED: len(OF_LINEAR)}


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    selection_bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    normalize: bool = False,
    scale: float = 1.0,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the experts of each token in a mixture of experts, and their weights.

        scores  = softmax(logits) over all E experts, or sigmoid(logits)
        choice  = scores + selection_bias
        experts = the top_k experts with the largest choice, the best first; of equal ones, that with the smaller index
        weights = scores[experts] · scale, or scores[experts] / sum(scores[experts]) · scale                         normalize

    It is computed in fp32 (fp64 for fp64). GPT-OSS's softmax over the chosen logits is "softmax" with `normalize`.

    Args:
        logits: (..., E) fp16|bf16|fp32|fp64 of the router. A NaN makes weights of its token NaN; which experts it then gets is
            not specified, but they exist.
        top_k: experts of a token.
        scoring: "softmax" or "sigmoid".
        selection_bias: (E,) fp32 (fp64 for fp64), added for choosing only.
        num_groups: the number of equal groups that the experts form, each of consecutive ones.
        top_groups: the number of groups with the best score, from which experts are chosen.
        group_score: of a group: "max", its largest choice (DeepSeek-V2), or "top2", the sum of its two largest (DeepSeek-V3).
        normalize: divide the weights of a token by their sum.
        scale: factor on the weights, a finite number of their dtype.
        impl: "cpp" (CPU), "triton" (CUDA) or "reference"; None picks the first that can serve the call; see
            `fastgpt.explain`.

    Returns: (experts, weights): (..., top_k) int32, and (..., top_k) fp32 (fp64 for fp64). Weights are differentiable.
    Raises: TypeError (not a tensor or a number, dtype), ValueError (shape, device, range, scoring, group_score, impl):
        argument, expected, got.
    Source: Mixtral (arXiv 2401.04088), DeepSeek-V3 (arXiv 2412.19437).

    >>> experts, weights = route(torch.tensor([0.0, 3.0, 2.0, 1.0]), 2, normalize=True)
    >>> experts
    tensor([1, 2], dtype=torch.int32)
    """
    options = (top_k, scoring, num_groups, top_groups, group_score, normalize, scale)
    if not (type(top_k) is type(num_groups) is type(top_groups) is int and type(normalize) is bool and type(scale) is float):
        _check_route(logits, selection_bias, *options)  # PyTorch's dispatcher would accept True for a number
        top_k, num_groups, top_groups, scale = int(top_k), int(num_groups), int(top_groups), float(scale)
    try:
        # The kernels check the rest, in C++ in a fraction of the time.
        if (impl in (None, "cpp") and _route_cpp_refuses(logits, selection_bias) is None) or (
            impl in (None, "triton") and _route_triton_refuses(logits, selection_bias) is None
        ):
            groups = num_groups, top_groups, GROUP_SCORES[group_score]
            return _route(logits, top_k, SCORINGS[scoring], selection_bias, *groups, normalize, scale)
    except Exception as error:
        _check_route(logits, selection_bias, *options)  # raises the error that names the argument
        raise argument_error(error)
    _check_route(logits, selection_bias, *options)
    choose("route", ROUTE_IMPLEMENTATIONS, impl, logits, selection_bias)  # raises for an impl that cannot serve the call
    return _route_reference(logits, selection_bias, *options)


def route_reference(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    selection_bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    normalize: bool = False,
    scale: float = 1.0,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference for `fastgpt.route` in plain PyTorch: on every device, differentiable. It takes the same arguments and
    ignores impl.

    Returns: (experts, weights): (..., top_k) int32, and (..., top_k) fp32 (fp64 for fp64).
    Raises: TypeError, ValueError as `fastgpt.route`.
    """
    options = (top_k, scoring, num_groups, top_groups, group_score, normalize, scale)
    _check_route(logits, selection_bias, *options)
    return _route_reference(logits, selection_bias, *options)


def _route_reference(logits, selection_bias, top_k, scoring, num_groups, top_groups, group_score, normalize, scale):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = logits.sigmoid() if SCORINGS[scoring] else logits.softmax(-1)  # (..., E)
    choice = scores.detach()
    if selection_bias is not None:
        choice = choice + selection_bias
    experts = _largest(choice, choice.shape[-1])
    if num_groups > top_groups:
        groups = choice.unflatten(-1, (num_groups, -1))  # (..., G, E / G)
        best = groups.topk(2, -1).values.sum(-1) if GROUP_SCORES[group_score] else groups.amax(-1)
        chosen = torch.zeros_like(best).scatter(-1, _largest(best, top_groups), 1.0)  # (..., G)
        of_experts = chosen.gather(-1, experts // groups.shape[-1])
        # A choice may be -inf: what is left out comes after it.
        experts = experts.gather(-1, _largest(of_experts, top_k))
    experts = experts[..., :top_k]
    weights = scores.gather(-1, experts)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts.int(), weights * scale


def _largest(x, k):
    """Indices of the k largest numbers of the last dimension, the largest first, and the first of equal ones."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :k]


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
            return _moe_grouped(*call, activation, gated)
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
    return (_moe_reference if impl == "reference" else _moe_grouped)(*call, activation, gated)


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
    C, K = x.shape[-1], experts.shape[-1]
    E = number_of_experts(down, C)
    _require_experts(experts, E)
    rows, experts, weights = x.reshape(-1, C), experts.reshape(-1, K), weights.reshape(-1, K)
    out = weights.new_zeros(rows.shape)  # in fp32 at least
    for e in experts.unique().tolist() or [0]:  # of no rows, that of an expert, so that their gradients are zeros
        if not 0 <= e < E:
            continue
        row, k = (experts == e).nonzero(as_tuple=True)
        y = F.linear(rows[row], *_of_expert(up, up_bias, e, E, dequantized=True))
        y = F.linear(_activate(y, activation, gated), *_of_expert(down, down_bias, e, E, dequantized=True))
        out = out.index_add(0, row, weights[row, k, None] * y)
    return _finished(out, x, residual)


def _moe_grouped(x, experts, weights, up, down, up_bias, down_bias, residual, activation, gated):
    """`_moe_reference` with the rows sorted by expert, and each expert's multiplied at once by `linear`."""
    if torch.compiler.is_compiling() or experts.is_meta or is_fake(experts):
        x_of_sum, biases = x, (up_bias, down_bias)
        if is_autocasting(x.device):  # which the operation would not notice
            dtype = torch.get_autocast_dtype(x.device.type)
            x_of_sum, up, down, *biases = (y if y is None else y.to(dtype) for y in (x, up, down, *biases))
        matrices = *_stored(up), *_stored(down), number_of_experts(down, x.shape[-1])
        out = torch.ops.fastgpt.moe_grouped(
            x_of_sum, experts, weights, *matrices, *biases, ACTIVATION_NUMBERS[activation], gated
        )
    else:
        out = _grouped_sum(x, experts, weights, up, down, up_bias, down_bias, activation, gated)
    return _finished(out, x, residual)


def _grouped_sum(x, experts, weights, up, down, up_bias, down_bias, activation, gated):
    """The sum over the experts of each row (..., C), in the dtype of weights."""
    C, K = x.shape[-1], experts.shape[-1]
    E = number_of_experts(down, C)
    _require_experts(experts, E)
    chosen = experts.flatten()
    chosen = torch.where((chosen >= 0) & (chosen < E), chosen, E)  # those that do not exist behind all others
    order = chosen.argsort(stable=True)  # (R · K,)
    *counts, missing = torch.bincount(chosen, minlength=E + 1).tolist()
    parts = x.reshape(-1, C)[order[: len(order) - missing] // K].split(counts)
    if torch.is_grad_enabled():  # the gradients of E slices would be E tensors of the whole size
        up, down, up_bias, down_bias = (_unbind(tensor) for tensor in (up, down, up_bias, down_bias))
    fused = {} if activation == CLAMPED else {"activation": activation, "gated": gated}
    products = []
    for e, part in enumerate(parts):
        if counts[e] or e == len(order) == 0:  # of no rows, that of an expert, so that their gradients are zeros
            h = linear(part, *_of_expert(up, up_bias, e, E), **fused)
            h = h if fused else _activate(h, activation, gated)
            products.append(linear(h, *_of_expert(down, down_bias, e, E)))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    if missing:
        products.append(x.new_zeros(missing, C))
        weights = weights.masked_fill((chosen == E).view(weights.shape), 0.0)
    y = torch.cat(products)[back].view(-1, K, C)
    return (weights.reshape(-1, K, 1) * y).sum(1).view(x.shape)


def _has_many_rows(x, experts, down):
    """Whether experts have so many rows on average that PyTorch's product is faster than the kernel, for this dtype."""
    pairs, E = experts.numel(), number_of_experts(down, x.shape[-1])
    return pairs > MAX_ROWS_CPU * E and FASTEST.get(x.dtype) != KERNEL


def _finished(out, x, residual):
    """residual + out, which is in fp32, in the dtype of x and as large."""
    out = out.view(x.shape)
    return (out if residual is None else residual + out).to(x.dtype)


def _activate(y, activation, gated):
    if activation != CLAMPED:
        return finish(y, activation=activation, gated=gated)
    gate, y = y.chunk(2, -1)
    gate = gate.clamp(max=LIMIT)
    return (y.clamp(-LIMIT, LIMIT) + 1) * (gate * torch.sigmoid(ALPHA * gate))


def _packed(x, experts, weights, up, down, up_bias, down_bias, residual, activation, gated):
    """Quantized weights as the operator takes them, and the number of experts."""
    if up.fits != (x.dtype, x.shape[-1]) or down.dtype is not x.dtype:
        _check_moe(x, experts, weights, up, down, up_bias, down_bias, residual, activation, gated)
    return up.blocks, *up.packing, down.blocks, *down.packing, number_of_experts(down, x.shape[-1])


def number_of_experts(down: torch.Tensor, C: int) -> int:
    """E of down (E, C, I), or of a QuantizedWeight (E · C, I)."""
    return down.shape[0] // C if isinstance(down, QuantizedWeight) else down.shape[0]


def _stored(weight):
    """A weight as an argument of an operator: what it stores, and its packing, none if it is a plain tensor."""
    return (weight.blocks, [int(x) for x in weight.packing]) if isinstance(weight, QuantizedWeight) else (weight, [])


def _restored(stored, packing, dtype):
    if not packing:
        return stored
    bits, group_size, minima, block_type = packing
    kept = Packing(bits, group_size, bool(minima), block_type)
    return QuantizedWeight(stored, kept, stored.shape[1] // kept.block_bytes * kept.block, dtype)


def _unbind(tensor):
    return tensor if tensor is None or isinstance(tensor, QuantizedWeight) else tensor.unbind()


def _of_expert(weight, bias, e, E, dequantized=False):
    """The matrix and the bias, or None, of expert e of E."""
    if isinstance(weight, QuantizedWeight):
        rows = weight.shape[0] // E
        weight = weight.with_blocks(weight.blocks[e * rows : (e + 1) * rows])
        weight = weight.dequantize() if dequantized else weight
    else:
        weight = weight[e]
    return weight, None if bias is None else bias[e]


def _require_experts(experts, E):
    if experts.is_cpu and experts.numel():
        least, most = (value.item() for value in experts.aminmax())
        if least < 0 or most >= E:
            raise ValueError(f"experts: expected indices from 0 to {E - 1}, got {least} to {most}")


def _check_route(logits, selection_bias, top_k, scoring, num_groups, top_groups, group_score, normalize, scale):
    require_tensor("logits", logits)
    require_dtype("logits", logits, DTYPES)
    if logits.dim() == 0:
        raise ValueError("logits: expected shape (..., E), got a scalar")
    E = logits.shape[-1]
    require_choice("scoring", scoring, SCORINGS)
    if selection_bias is not None:
        require_tensor("selection_bias", selection_bias)
        require_shape("selection_bias", selection_bias, (E,), "(E,)")
        require_dtype("selection_bias", selection_bias, (torch.promote_types(logits.dtype, torch.float32),))
        require_device("selection_bias", selection_bias, logits.device)
    require_choice("group_score", group_score, GROUP_SCORES)
    require_integer("num_groups", num_groups, least=1)
    require_integer("top_groups", top_groups, least=1, most=num_groups)
    size = E // num_groups
    if E % num_groups:
        raise ValueError(f"num_groups: expected a divisor of {E}, the number of experts, got {num_groups}")
    if num_groups > top_groups and GROUP_SCORES[group_score] and size < 2:
        raise ValueError(
            f"num_groups: expected groups of at least 2 experts for group_score='top2', got {num_groups} of {E} experts"
        )
    require_integer("top_k", top_k, least=1, most=top_groups * size)
    require_flag("normalize", normalize)
    largest = torch.finfo(torch.promote_types(logits.dtype, torch.float32)).max
    require_number("scale", scale, least=-largest, most=largest)


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


def explain_route(
    logits: torch.Tensor, top_k: int, *, scoring: str = "softmax", selection_bias: torch.Tensor | None = None,
    num_groups: int = 1, top_groups: int = 1, group_score: str = "max", normalize: bool = False, scale: float = 1.0,
    impl: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """Implementation -> "chosen", "available", or why it refuses this call."""
    _check_route(logits, selection_bias, top_k, scoring, num_groups, top_groups, group_score, normalize, scale)
    return explain_call(ROUTE_IMPLEMENTATIONS, logits, selection_bias, impl=impl)


def explain_moe(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *,
    up_bias: torch.Tensor | None = None, down_bias: torch.Tensor | None = None, activation: str | None = "silu",
    gated: bool = True, residual: torch.Tensor | None = None, impl: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """Implementation -> "chosen", "available", or why it refuses this call."""
    call = (x, experts, weights, up, down, up_bias, down_bias, residual)
    _check_moe(*call, activation, gated)
    return explain_call(MOE_IMPLEMENTATIONS, *call, impl=impl)


def _route_cpp_refuses(logits, selection_bias):
    return inference_unsupported_reason(logits, selection_bias)


def _route_triton_refuses(logits, selection_bias):
    return triton_inference_unsupported_reason(logits, selection_bias)


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
ROUTE_IMPLEMENTATIONS = {
    "cpp": _route_cpp_refuses,
    "triton": _route_triton_refuses,
    "reference": lambda logits, selection_bias: None,
}
MOE_IMPLEMENTATIONS = {"cpp": _moe_cpp_refuses, "triton": _moe_triton_refuses, "reference": lambda *call: None}


def moe_waits(up: torch.Tensor, down: torch.Tensor, rows: int) -> str | None:
    """Why a call of `moe` on a GPU with these weights, of a dtype that kernels serve, and so many rows of x cannot be captured in a
    CUDA graph, or None."""
    reason = _weights_refused_by_triton(up, down, rows)
    return None if reason is None else f"the host reads how many rows each expert gets, as no kernel serves it: {reason}"


library.define(
    "route(Tensor logits, int top_k, bool sigmoid=False, Tensor? selection_bias=None, int num_groups=1, int top_groups=1, "
    "bool top2=False, bool normalize=False, float scale=1.0) -> (Tensor, Tensor)"
)
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

# `_grouped_sum` where it cannot be traced, as how many rows an expert gets is in the data; and the gradients of those of x,
# weights, up, down, up_bias and down_bias that need one.
ARGUMENTS = (
    "Tensor x, Tensor experts, Tensor weights, Tensor up, int[] up_packing, Tensor down, int[] down_packing, int num_experts, "
    "Tensor? up_bias, Tensor? down_bias, int activation, bool gated"
)
torch.library.Library.define(library, f"moe_grouped({ARGUMENTS}) -> Tensor")  # with derivatives, unlike the others
library.define(f"moe_grouped_backward(Tensor dout, {ARGUMENTS}, bool[] needed) -> Tensor[]", "fastgpt.moe")

_route = without_autograd(torch.ops.fastgpt.route.default)
_moe = without_autograd(torch.ops.fastgpt.moe.default)
_moe_quantized = without_autograd(torch.ops.fastgpt.moe_quantized.default)


@torch.library.register_fake("fastgpt::route", lib=library)
def _route_fake(
    logits, top_k, sigmoid=False, selection_bias=None, num_groups=1, top_groups=1, top2=False, normalize=False, scale=1.0
):
    group_score = "top2" if top2 else "max"
    _check_route(logits, selection_bias, top_k, "softmax", num_groups, top_groups, group_score, normalize, scale)
    shape = (*logits.shape[:-1], top_k)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=dtype)


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


def _grouped_call(x, experts, weights, up, up_packing, down, down_packing, num_experts, up_bias, down_bias, activation, gated):
    """Arguments of moe_grouped as those of `_grouped_sum`."""
    up, down = _restored(up, up_packing, x.dtype), _restored(down, down_packing, x.dtype)
    return x, experts, weights, up, down, up_bias, down_bias, ACTIVATIONS_BY_NUMBER[activation], gated


def _grouped(*arguments):
    return _grouped_sum(*_grouped_call(*arguments))


def _grouped_backward(dout, *arguments):
    *arguments, needed = arguments
    call = list(_grouped_call(*arguments))
    leaves = [call[i].detach().requires_grad_() for i, need in zip(DIFFERENTIABLE, needed) if need]
    found = iter(leaves)
    for i, need in zip(DIFFERENTIABLE, needed):
        call[i] = next(found) if need else call[i]
    c, excluded = torch._C, torch._C._dispatch_tls_local_exclude_set()
    for key in (c.DispatchKey.AutogradCPU, c.DispatchKey.AutogradOther, c.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)  # with them, as in a TorchDispatchMode, nothing would be recorded
    with c._ForceDispatchKeyGuard(c._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        out = _grouped_sum(*call)
        gradients = torch.autograd.grad(out, leaves, dout, materialize_grads=True)
    return [gradient.contiguous() for gradient in gradients]


@torch.library.register_fake("fastgpt::moe_grouped", lib=library)
def _grouped_fake(x, experts, weights, *rest):
    return weights.new_empty(x.shape)


@torch.library.register_fake("fastgpt::moe_grouped_backward", lib=library)
def _grouped_backward_fake(dout, *arguments):
    *arguments, needed = arguments
    call = _grouped_call(*arguments)
    return [call[i].new_empty(call[i].shape) for i, need in zip(DIFFERENTIABLE, needed) if need]


def _grouped_setup_context(ctx, inputs, output):
    ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]
    ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in inputs))


def _grouped_gradients(ctx, dout):
    arguments = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others)]
    needed = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE_ARGUMENTS]
    found = iter(torch.ops.fastgpt.moe_grouped_backward(dout, *arguments, needed))
    gradients = [None] * len(arguments)
    for i, need in zip(DIFFERENTIABLE_ARGUMENTS, needed):
        gradients[i] = next(found) if need else None
    return tuple(gradients)


# Places of x, weights, up, down, up_bias and down_bias, among the arguments of _grouped_sum and of the operator.
DIFFERENTIABLE, DIFFERENTIABLE_ARGUMENTS = (0, 2, 3, 4, 5, 6), (0, 2, 3, 5, 8, 9)
ACTIVATIONS_BY_NUMBER = {number: name for name, number in ACTIVATION_NUMBERS.items()}
library.impl("moe_grouped", _grouped, "CompositeExplicitAutograd")
library.impl("moe_grouped_backward", _grouped_backward, "CompositeExplicitAutograd")
torch.library.register_autograd("fastgpt::moe_grouped", _grouped_gradients, setup_context=_grouped_setup_context, lib=library)


def _route_triton(
    logits, top_k, sigmoid=False, selection_bias=None, num_groups=1, top_groups=1, top2=False, normalize=False, scale=1.0
):
    group_score = "top2" if top2 else "max"
    _check_route(logits, selection_bias, top_k, "softmax", num_groups, top_groups, group_score, normalize, scale)
    from fastgpt.kernels.moe import route  # Triton is imported only when a CUDA tensor needs it

    return route(logits, top_k, sigmoid, selection_bias, num_groups, top_groups, top2, normalize, scale)


def _moe_triton(x, experts, weights, up, down, up_bias=None, down_bias=None, residual=None, activation=3, gated=True):
    _check_moe(x, experts, weights, up, down, up_bias, down_bias, residual, _activation_of(activation), gated)
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
    if (reason := _weights_refused_by_triton(up, down, x.numel() // x.shape[-1])) is not None:
        raise ValueError(f"x: expected what the kernel serves: {reason}")
    from fastgpt.kernels.moe_quantized import moe_quantized  # Triton is imported only when a CUDA tensor needs it

    packed = up_blocks, up_packing[:3], down_blocks, down_packing[:3], num_experts
    return moe_quantized(x, experts, weights, *packed, up_bias, down_bias, residual, activation, gated)


library.impl("route", _route_triton, "CUDA")
library.impl("moe", _moe_triton, "CUDA")
library.impl("moe_quantized", _moe_quantized_triton, "CUDA")
