"""Experts of a mixture with the rows sorted by expert, each of which multiplies its own at once: for many rows, training and
torch.compile."""

import torch
from torch.autograd import forward_ad

from fastgpt.checks import is_autocasting, is_fake
from fastgpt.ops.experts import ACTIVATION_NUMBERS, CLAMPED, activate, finished, number_of_experts, of_expert, require_experts
from fastgpt.ops.library import library
from fastgpt.ops.linear import linear
from fastgpt.ops.quantized_weight import Packing, QuantizedWeight


def moe_grouped(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor,
    up_bias: torch.Tensor | None, down_bias: torch.Tensor | None, residual: torch.Tensor | None, activation: str | None, gated: bool,
) -> torch.Tensor:  # fmt: skip
    """`fastgpt.moe` with the rows sorted by expert, and each expert's multiplied at once by `linear`."""
    if torch.compiler.is_compiling() or experts.is_meta or is_fake(experts):
        if forward_ad._current_level >= 0:  # autograd of a registered operator would drop the tangents
            raise RuntimeError("moe: expected no forward-mode derivatives in torch.compile or of fake tensors, which have none")
        x_of_sum, biases = x, (up_bias, down_bias)
        if is_autocasting(x.device):  # which the operation would not notice
            dtype = torch.get_autocast_dtype(x.device.type)
            x_of_sum, up, down, *biases = (y if y is None else y.to(dtype) for y in (x, up, down, *biases))
        matrices = *_stored(up), *_stored(down), number_of_experts(down, x.shape[-1])
        out = torch.ops.fastgpt.moe_grouped(
            x_of_sum, experts, weights, *matrices, *biases, ACTIVATION_NUMBERS[activation], gated
        )
    else:
        out = grouped_sum(x, experts, weights, up, down, up_bias, down_bias, activation, gated)
    return finished(out, x, residual)


def grouped_sum(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor,
    up_bias: torch.Tensor | None, down_bias: torch.Tensor | None, activation: str | None, gated: bool,
) -> torch.Tensor:  # fmt: skip
    """The sum over the experts of each row (..., C), in the dtype of weights."""
    C, K = x.shape[-1], experts.shape[-1]
    E = number_of_experts(down, C)
    require_experts(experts, E)
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
            h = linear(part, *of_expert(up, up_bias, e, E), **fused)
            h = h if fused else activate(h, activation, gated)
            products.append(linear(h, *of_expert(down, down_bias, e, E)))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    if missing:
        products.append(x.new_zeros(missing, C))
        weights = weights.masked_fill((chosen == E).view(weights.shape), 0.0)
    y = torch.cat(products)[back].view(-1, K, C)
    return (weights.reshape(-1, K, 1) * y).sum(1).view(x.shape)


def _unbind(tensor):
    return tensor if tensor is None or isinstance(tensor, QuantizedWeight) else tensor.unbind()


def _stored(weight):
    """A weight as an argument of an operator: what it stores, and its packing, none if it is a plain tensor."""
    return (weight.blocks, [int(x) for x in weight.packing]) if isinstance(weight, QuantizedWeight) else (weight, [])


def _restored(stored, packing, dtype):
    if not packing:
        return stored
    bits, group_size, minima, block_type = packing
    kept = Packing(bits, group_size, bool(minima), block_type)
    return QuantizedWeight(stored, kept, stored.shape[1] // kept.block_bytes * kept.block, dtype)


# `grouped_sum` where it cannot be traced, as how many rows an expert gets is in the data; and the gradients of those of x,
# weights, up, down, up_bias and down_bias that need one.
ARGUMENTS = (
    "Tensor x, Tensor experts, Tensor weights, Tensor up, int[] up_packing, Tensor down, int[] down_packing, int num_experts, "
    "Tensor? up_bias, Tensor? down_bias, int activation, bool gated"
)
torch.library.Library.define(library, f"moe_grouped({ARGUMENTS}) -> Tensor")  # with derivatives, unlike the others
library.define(f"moe_grouped_backward(Tensor dout, {ARGUMENTS}, bool[] needed) -> Tensor[]", "fastgpt.moe")


def _grouped_call(x, experts, weights, up, up_packing, down, down_packing, num_experts, up_bias, down_bias, activation, gated):
    """Arguments of moe_grouped as those of `grouped_sum`."""
    up, down = _restored(up, up_packing, x.dtype), _restored(down, down_packing, x.dtype)
    return x, experts, weights, up, down, up_bias, down_bias, ACTIVATIONS_BY_NUMBER[activation], gated


def _grouped(*arguments):
    return grouped_sum(*_grouped_call(*arguments))


def _grouped_backward(dout, *arguments):
    *arguments, needed = arguments
    call = list(_grouped_call(*arguments))
    places = [i for i, need in zip(DIFFERENTIABLE, needed) if need]

    def of_leaves(*leaves):
        inner = list(call)
        for i, leaf in zip(places, leaves):
            inner[i] = leaf
        return grouped_sum(*inner)

    # Below autograd, where an operation is called, autograd would record nothing; a transform records by itself.
    _, gradients_of = torch.func.vjp(of_leaves, *(call[i] for i in places))
    return [gradient.contiguous() for gradient in gradients_of(dout)]


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


# Places of x, weights, up, down, up_bias and down_bias, among the arguments of grouped_sum and of the operator.
DIFFERENTIABLE, DIFFERENTIABLE_ARGUMENTS = (0, 2, 3, 4, 5, 6), (0, 2, 3, 5, 8, 9)
ACTIVATIONS_BY_NUMBER = {number: name for name, number in ACTIVATION_NUMBERS.items()}
library.impl("moe_grouped", _grouped, "CompositeExplicitAutograd")
library.impl("moe_grouped_backward", _grouped_backward, "CompositeExplicitAutograd")
torch.library.register_autograd("fastgpt::moe_grouped", _grouped_gradients, setup_context=_grouped_setup_context, lib=library)
