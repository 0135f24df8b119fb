"""Attention by an implementation, with its gradients, against the reference."""

import math
import warnings
from collections.abc import Callable

import torch

from fastgpt.ops import attention as ops
from fastgpt.ops.attention.call import varlen_arguments
from fastgpt.ops.attention.operators import attention_varlen_backward_triton, attention_varlen_forward_triton
from fastgpt.ops.attention.reference import varlen_reference_of
from fastgpt.testing import numerics
from fastgpt.testing.attention_features import inputs, options
from fastgpt.testing.draws import normal

DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
SHAPE = (2, 4, 2, 37, 70, 40)


class BlindSpot(UserWarning):
    """The inputs of a check cannot show some fault, whatever the function does."""


def check_attention(
    function: Callable,
    feature: str = "plain",
    *,
    shape: tuple = SHAPE,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    gradients: bool = True,
) -> None:
    """Holds a function to the numerics contract: its result and, by autograd, its gradients.

    What passes is right for inputs like these only. Where no inputs of this shape could show a fault that is common, a
    `BlindSpot` warns of it: choose another shape or, if the function takes no other, filter the warning. The default shape has
    none: it has several sequences, heads that share keys in groups, and other numbers of queries and keys.

    Args:
        function: takes q, k, v and, by name, the arguments that the feature needs, as `fastgpt.attention` defines them;
            returns out (B, H, T, D_v), or (out, lse).
        feature: one of attention_features.FEATURES.
        shape: B, H, H_kv, T, S, D of the random inputs; for v of another head dim (D, D_v) in place of D.
        dtype, device, seed: theirs.
        gradients: whether they are compared, too.

    Raises: AssertionError, which names the result.

    >>> def mine(q, k, v, window=None):
    ...     k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    ...     scores = q @ k.mT / q.shape[-1] ** 0.5
    ...     position = torch.arange(q.shape[2]).view(-1, 1) + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    ...     hidden = position < 0 if window is None else (position < 0) | (position >= window)
    ...     return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    >>> check_attention(mine)
    >>> check_attention(mine, "window", shape=(2, 8, 2, 5, 300, 64))
    >>> check_attention(mine, shape=(2, 4, 2, 5, 30, (192, 128)))
    """
    B, H, _, T, S, _ = shape
    chosen = options(feature, B, H, T, S, dtype, device)
    if unseen := blind_spots(shape, chosen):
        warnings.warn(f"shape: {shape} cannot show {'; nor '.join(unseen)}", BlindSpot, stacklevel=2)
    tensors = inputs(*shape, dtype=dtype, device=device, seed=seed)
    call = ops.Call(*tensors, **{"scale": tensors[0].shape[-1] ** -0.5} | chosen)

    def run(call, douts):
        leaves = _leaves(call)
        extra = {name: leaves[name] for name in ("bias", "sinks") if name in leaves}
        results = function(*(leaves[name] for name in "qkv"), **chosen | extra)
        results = results if isinstance(results, tuple) else (results,)
        named = dict(zip(("out", "lse"), results))
        if gradients:
            douts = [dout.to(x.dtype) for dout, x in zip(douts, results)]
            found = torch.autograd.grad(results, list(leaves.values()), douts, allow_unused=True)
            named |= {f"d{name}": x for name, x in zip(leaves, found)}
            if missing := [name for name, x in named.items() if x is None]:
                raise AssertionError(f"{feature}, {dtype}: {missing[0]}: no gradient")
        return {name: x.detach() for name, x in named.items()}

    douts = output_gradients(call)
    actual = run(call, douts)
    if "lse" not in actual:
        douts = douts[0], torch.zeros_like(douts[1])
    expected = yardsticks(call, douts=douts if gradients else None)
    for name, x in actual.items():
        numerics.check(x, expected[name], name=f"{feature}, {dtype}: {name}")


def blind_spots(shape, options) -> list[str]:
    """The common faults that attention of inputs of this shape, with these arguments, cannot show."""
    B, H, H_kv, T, S, *_ = shape
    unseen = []
    if B == 1:
        unseen.append("keys of another sequence (one does: B > 1)")
    if H_kv == 1:
        unseen.append("keys of another head (what does: H > H_kv > 1)")
    elif H == H_kv:
        unseen.append("heads that share keys in another order than in groups of neighbors (what does: H > H_kv > 1)")
    positions = options.get("causal", True) or not options.keys().isdisjoint({"window", "alibi_slopes"})
    if positions and T == S and "kv_lengths" not in options:
        unseen.append("a mask aligned to the first key and not, as it should be, to the last (what does: T != S)")
    return unseen


def compare(call, run, packing=None):
    """Yields (name, actual, yardstick) of every result and gradient, as numerics.check takes them.

    Args:
        call: fastgpt.ops.attention.Call, with a scale.
        run: takes a call and the gradients (dout, dlse), returns name -> tensor: "out", "lse" and, if it has a backward,
            "dq", "dk", "dv", "dbias", "dsinks".
        packing: fastgpt.ops.attention.Packing of a call on packed sequences.
    """
    douts = output_gradients(call, packing)
    actual = run(call, douts)
    expected = yardsticks(call, packing, douts if "dq" in actual else None)
    for name in actual:
        yield name, actual[name], expected[name]


def output_gradients(call, packing=None):
    """Random (dout, dlse) for a call, dlse zero where a row sees no key."""
    generator = torch.Generator(call.q.device).manual_seed(2)
    rows = call.q.shape[:-1]
    shapes = (*rows, call.v.shape[-1]), rows
    dout, dlse = (normal(shape, generator) for shape in shapes)
    with torch.no_grad():
        fully_masked = reference(call, packing)["lse"] == -math.inf
    return dout.to(call.q.dtype), dlse.float().masked_fill(fully_masked, 0.0)


def yardsticks(call, packing=None, douts=None) -> dict[str, numerics.Yardstick]:
    """What the results of a call are held to and, given their gradients (dout, dlse), those of what is differentiable."""
    return numerics.simulate(lambda: reference(in_double(call), packing, douts), weights=call.q.dtype)


def reference(call, packing=None, douts=None) -> dict[str, torch.Tensor]:
    """The reference's results, and given their gradients those of what is differentiable."""
    leaves = _leaves(call)
    call = call._replace(**leaves)
    if packing is None:
        out, lse = ops.attention_reference(**call._asdict(), return_lse=True)
    else:
        out, lse = varlen_reference_of(call, packing)
    results = {"out": out, "lse": lse}
    if douts is not None:
        torch.autograd.backward((out, lse), tuple(dout.to(x.dtype) for dout, x in zip(douts, (out, lse))))
        results |= {f"d{name}": x.grad for name, x in leaves.items()}
    return {name: x.detach() for name, x in results.items()}


def _leaves(call) -> dict[str, torch.Tensor]:
    """What is differentiable, by name, detached."""
    tensors = {name: getattr(call, name) for name in DIFFERENTIABLE}
    return {name: x.detach().requires_grad_() for name, x in tensors.items() if x is not None and x.is_floating_point()}


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
        results |= {f"d{name}": x for name, x in zip(DIFFERENTIABLE, gradients) if getattr(call, name) is not None}
    return results


def run_cpp_packed(call, packing, douts) -> dict[str, torch.Tensor]:
    """The C++ kernels on packed sequences, forward and backward."""
    operations = torch.ops.fastgpt
    return _run_packed(operations.attention_varlen_forward, operations.attention_varlen_backward, call, packing, douts)


def run_triton_packed(call, packing, douts) -> dict[str, torch.Tensor]:
    """The Triton kernels on packed sequences, forward and backward."""
    return _run_packed(attention_varlen_forward_triton, attention_varlen_backward_triton, call, packing, douts)


def _run_packed(forward, backward, call, packing, douts):
    arguments = varlen_arguments(call)
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
