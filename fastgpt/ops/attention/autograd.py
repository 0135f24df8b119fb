"""The backward pass of attention: the backward operations, or the reference for double backward and forward mode."""

from typing import Any

import torch

from fastgpt.ops.attention import operators
from fastgpt.ops.attention.call import Call, Packing, varlen_arguments
from fastgpt.ops.attention.reference import attention_reference, varlen_reference_of
from fastgpt.ops.derivatives import transforms_active


class FusedAttention(torch.autograd.Function):
    """The forward and backward operations as an autograd function, with gradients for q, k, v, sinks and bias.

    Its arguments are the fields of a Call, and a Packing or None.
    """

    @staticmethod
    def forward(ctx: Any, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
        *arguments, packing = arguments
        call = Call(*arguments)
        if packing is None:
            out, lse = operators.attention_forward(*call)
        else:
            out, lse = operators.attention_varlen_forward(*packing, *varlen_arguments(call))
        fields = call._asdict() | ({} if packing is None else packing._asdict())
        tensors = {name: x for name, x in fields.items() if isinstance(x, torch.Tensor)}
        ctx.fields, ctx.names, ctx.is_packed = fields | dict.fromkeys(tensors), list(tensors), packing is not None
        ctx.save_for_backward(out, lse, *tensors.values())
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor) -> tuple:
        out, lse, *tensors = ctx.saved_tensors
        fields = ctx.fields | dict(zip(ctx.names, tensors))
        call = Call(*map(fields.get, Call._fields))
        packing = Packing(*map(fields.get, Packing._fields)) if ctx.is_packed else None
        needed = dict(zip(Call._fields, ctx.needs_input_grad))
        if _is_differentiated():
            gradients = _reference_gradients(call, packing, needed, dout, dlse)
        else:
            gradients = _kernel_gradients(call, packing, needed, dout, dlse, out, lse)
        return *(gradients[name] if need else None for name, need in needed.items()), None


def _kernel_gradients(call: Call, packing: Packing | None, needed: dict[str, bool], dout, dlse, out, lse) -> dict:
    dout = _kernel_dout(dout, out)
    if packing is None:
        *grads, dbias, dsinks = operators.attention_backward(
            dout, dlse, out, lse, needed["bias"], *call[:12], call.dropout_p, call.dropout_seed
        )
    else:
        *grads, dsinks = operators.attention_varlen_backward(dout, dlse, out, lse, *packing, *varlen_arguments(call))
        dbias = None
    return dict(zip(("q", "k", "v"), grads)) | {"bias": dbias, "sinks": dsinks}


def _is_differentiated() -> bool:
    """Whether the backward pass itself is differentiated or transformed: create_graph, forward mode, vmap over gradients."""
    return torch.is_grad_enabled() or transforms_active()


def _reference_gradients(call: Call, packing: Packing | None, needed: dict[str, bool], dout, dlse) -> dict:
    """The needed gradients, computed by the reference, so that they are differentiable. The kernels' out and lse, which
    are constants to autograd, are not used."""
    with torch.enable_grad():
        # Aliases, so that each argument has its own gradient if two of them are the same tensor.
        leaves = {name: x.view_as(x) for name, x in call._asdict().items() if needed[name]}
        call = call._replace(**leaves)
        if packing is None:
            results = attention_reference(**call._asdict(), return_lse=True)
        else:
            results = varlen_reference_of(call, packing)
    # Only gradients that exist, of results that depend on a leaf: lse does not depend on v.
    pairs = [(x, gradient) for x, gradient in zip(results, (dout, dlse)) if gradient is not None and x.requires_grad]
    outputs, douts = zip(*pairs) if pairs else ((), ())
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), douts, create_graph=torch.is_grad_enabled(), materialize_grads=True
    )
    return dict(zip(leaves, gradients))


def _kernel_dout(dout, out):
    """The gradient of `out` as the kernels take it; None stands for zeros."""
    if dout is None:
        return torch.zeros_like(out)
    return dout if dout.stride(-1) == 1 else dout.contiguous()


def savable(arguments: Any) -> Any:
    """Clones inference tensors among the arguments, which autograd cannot save; they have no gradients."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return arguments
    copies = {name: x.clone() for name, x in arguments._asdict().items() if isinstance(x, torch.Tensor) and x.is_inference()}
    return arguments._replace(**copies) if copies else arguments
