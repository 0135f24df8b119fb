"""One call of attention by an implementation, beside the reference: what tests and benchmarks.numerics compare."""

import math

import torch
from fastgpt.testing.numerics import BACKWARD, FORWARD

from fastgpt.ops import attention as ops

DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")

# Of a tensor with fewer numbers, one draw says little of how much its computation errs: over 40 draws of a gradient of
# two sinks the kernel's and the reference's errors were 2.9e-7 and 2.8e-7 in the mean square, and yet twice the larger
# of the kernel's two was more than three times the larger of the reference's.
FEW = 16


def compare(call, run, packing=None):
    """Yields (name, actual, oracle, low precision, k) of every result and gradient, as numerics.check takes them.

    Args:
        call: fastgpt.ops.attention.Call, with a scale.
        run: takes a call and the gradients (dout, dlse), returns name -> tensor: "out", "lse" and, if it has a backward,
            "dq", "dk", "dv", "dbias", "dsinks".
        packing: fastgpt.ops.attention.Packing of a call on packed sequences.

    A gradient of fewer than FEW numbers is a stack of several, each of other dout.
    """
    generator = torch.Generator(call.q.device).manual_seed(2)
    with torch.no_grad():
        blind = reference(call, packing)["lse"] == -math.inf

    def draw():
        dout, dlse = (torch.randn(shape, generator=generator, device=call.q.device) for shape in (call.q.shape, blind.shape))
        douts = dout.to(call.q.dtype), dlse.masked_fill(blind, 0.0)
        actual = run(call, douts)
        if "dq" not in actual:
            douts = None
        return actual, reference(in_double(call), packing, douts), reference(call, packing, douts)

    first = draw()
    more = []
    few = [name for name, x in first[0].items() if name.startswith("d") and 0 < x.numel() < FEW]
    if few:
        more = [draw() for _ in range(-(-FEW // min(first[0][name].numel() for name in few)) - 1)]
    for name in first[0]:
        draws = [first, *more] if name in few else [first]
        k = BACKWARD if name.startswith("d") else FORWARD
        yield name, *(torch.stack([results[name] for results in column]) for column in zip(*draws)), k


def reference(call, packing=None, douts=None) -> dict[str, torch.Tensor]:
    """The reference's results, and given their gradients those of what is differentiable."""
    leaves = {name: getattr(call, name) for name in DIFFERENTIABLE}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items() if x is not None and x.is_floating_point()}
    call = call._replace(**leaves)
    if packing is None:
        out, lse = ops.attention_reference(**call._asdict(), return_lse=True)
    else:
        out, lse = ops._varlen_reference(call, packing)
    results = {"out": out, "lse": lse}
    if douts is not None:
        torch.autograd.backward((out, lse), tuple(dout.to(x.dtype) for dout, x in zip(douts, (out, lse))))
        results |= {f"d{name}": x.grad for name, x in leaves.items()}
    return {name: x.detach() for name, x in results.items()}


def in_double(call):
    """The same call for the oracle. 8-bit keys are what they are."""
    tensors = {name: getattr(call, name) for name in DIFFERENTIABLE}
    exact = ("k", "v") if call.k_scale is not None else ()
    return call._replace(**{name: x.double() for name, x in tensors.items() if x is not None and name not in exact})


def run_cpp(call, douts) -> dict[str, torch.Tensor]:
    """The C++ kernels, forward and, of what has one, backward."""
    out, lse = torch.ops.fastgpt.attention_forward(*call)
    results = {"out": out, "lse": lse}
    if call.block_table is None and call.k_scale is None:
        gradients = torch.ops.fastgpt.attention_backward(
            *douts, out, lse, call.bias is not None, *call[:12], call.dropout_p, call.dropout_seed
        )
        results |= {
            f"d{name}": x for name, x in zip(DIFFERENTIABLE, gradients) if getattr(call, name) is not None
        }
    return results


def run_cpp_packed(call, packing, douts) -> dict[str, torch.Tensor]:
    """The same on packed sequences."""
    operations = torch.ops.fastgpt
    return _run_packed(operations.attention_varlen_forward, operations.attention_varlen_backward, call, packing, douts)


def run_triton_packed(call, packing, douts) -> dict[str, torch.Tensor]:
    """The same by the Triton kernels."""
    return _run_packed(ops._attention_varlen_forward_triton, ops._attention_varlen_backward_triton, call, packing, douts)


def _run_packed(forward, backward, call, packing, douts):
    arguments = ops._varlen_arguments(call)
    out, lse = forward(*packing, *arguments)
    gradients = backward(*douts, out, lse, *packing, *arguments)
    names = ("dq", "dk", "dv") if call.sinks is None else ("dq", "dk", "dv", "dsinks")
    return {"out": out, "lse": lse} | dict(zip(names, gradients))


def run_triton(call, douts) -> dict[str, torch.Tensor]:
    """The Triton kernels, forward and backward."""
    from fastgpt.kernels.attention_backward import attention_backward
    from fastgpt.kernels.attention_forward import attention_forward

    arguments = call._asdict()
    q, k, v = (arguments.pop(name) for name in "qkv")
    out, lse = attention_forward(q, k, v, **arguments)
    for name in ("block_table", "k_scale", "v_scale"):
        del arguments[name]
    gradients = attention_backward(*douts, q, k, v, out, lse, **arguments, needs_dbias=call.bias is not None)
    gradients = {f"d{name}": x for name, x in zip(DIFFERENTIABLE, gradients) if x is not None}
    return {"out": out, "lse": lse} | gradients
