"""Compares an implementation of attention, gradients included, with the reference."""

import math
import warnings
from collections.abc import Callable, Iterator

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
    """Warns that the inputs of a check cannot reveal a common fault, whatever the function computes."""


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
    """Checks a function against the numerics contract: its result and, by autograd, its gradients.

    Inputs are random, so a function that passes is right for inputs like these. If no inputs of this shape can reveal some
    common fault, a `BlindSpot` warning names it: choose another shape or, if the function does not support any, filter the
    warning. The default shape has no blind spots: several sequences, grouped-query heads, and more keys than queries.

    Args:
        function: takes q, k, v and the keyword arguments of the feature, as `fastgpt.attention` defines them; returns out
            (B, H, T, D_v), or (out, lse).
        feature: one of attention_features.FEATURES.
        shape: (B, H, H_kv, T, S, D) of the inputs; (D, D_v) in place of D if values have another head dim.
        dtype, device: of the inputs.
        seed: of the random numbers.
        gradients: whether to check gradients, too.

    Raises: AssertionError, naming the result, its error and the bound.

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
        warnings.warn(f"shape: {shape} cannot reveal {'; nor '.join(unseen)}", BlindSpot, stacklevel=2)
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


def blind_spots(shape: tuple, options: dict) -> list[str]:
    """The common faults that inputs of this shape, with these arguments, cannot reveal."""
    B, H, H_kv, T, S, *_ = shape
    unseen = []
    if B == 1:
        unseen.append("keys of another sequence (use B > 1)")
    if H_kv == 1:
        unseen.append("keys of another head (use H > H_kv > 1)")
    elif H == H_kv:
        unseen.append("key heads that are shared in another order than by groups of neighbors (use H > H_kv > 1)")
    positions = options.get("causal", True) or not options.keys().isdisjoint({"window", "alibi_slopes"})
    if positions and T == S and "kv_lengths" not in options:
        unseen.append("a mask aligned to the first key rather than the last (use T != S)")
    return unseen


def compare(
    call: ops.Call, run: Callable, packing: ops.Packing | None = None
) -> Iterator[tuple[str, torch.Tensor, numerics.Yardstick]]:
    """Yields (name, actual, yardstick) for every result and gradient, as numerics.check takes them.

    Args:
        call: a Call with a scale.
        run: (call, (dout, dlse)) -> tensors by name: "out", "lse" and, if it has a backward pass, "dq", "dk", "dv", "dbias",
            "dsinks".
        packing: the Packing of a call on packed sequences.
    """
    douts = output_gradients(call, packing)
    actual = run(call, douts)
    expected = yardsticks(call, packing, douts if "dq" in actual else None)
    for name in actual:
        yield name, actual[name], expected[name]


def output_gradients(call: ops.Call, packing: ops.Packing | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Random (dout, dlse) for a call; dlse is zero for queries that attend to no key."""
    generator = torch.Generator(call.q.device).manual_seed(2)
    rows = call.q.shape[:-1]
    shapes = (*rows, call.v.shape[-1]), rows
    dout, dlse = (normal(shape, generator) for shape in shapes)
    with torch.no_grad():
        fully_masked = reference(call, packing)["lse"] == -math.inf
    return dout.to(call.q.dtype), dlse.float().masked_fill(fully_masked, 0.0)


def yardsticks(
    call: ops.Call, packing: ops.Packing | None = None, douts: tuple[torch.Tensor, torch.Tensor] | None = None
) -> dict[str, numerics.Yardstick]:
    """Yardsticks for the results of a call and, given (dout, dlse), for its gradients."""
    return numerics.simulate(lambda: reference(in_double(call), packing, douts), weights=call.q.dtype)


def reference(
    call: ops.Call, packing: ops.Packing | None = None, douts: tuple[torch.Tensor, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The results of the reference and, given (dout, dlse), its gradients."""
    leaves = _leaves(call)
    call = call._replace(**leaves)  # type: ignore[arg-type]  # fields that are tensors
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
    """The differentiable tensors of a call by name, detached."""
    tensors = {name: getattr(call, name) for name in DIFFERENTIABLE}
    return {name: x.detach().requires_grad_() for name, x in tensors.items() if x is not None and x.is_floating_point()}


def in_double(call: ops.Call) -> ops.Call:
    """The call in float64, for the oracle. 8-bit keys and values are unchanged."""
    tensors = {name: getattr(call, name) for name in DIFFERENTIABLE}
    exact = ("k", "v") if call.k_scale is not None else ()
    return call._replace(**{name: x.double() for name, x in tensors.items() if x is not None and name not in exact})


def run_cpp(call: ops.Call, douts: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Runs the C++ kernels, forward and, if the call has one, backward."""
    out, lse = torch.ops.fastgpt.attention_forward(*call)
    results = {"out": out, "lse": lse}
    if call.block_table is None and call.k_scale is None:
        gradients = torch.ops.fastgpt.attention_backward(
            *douts, out, lse, call.bias is not None, *call[:12], call.dropout_p, call.dropout_seed
        )
        results |= {f"d{name}": x for name, x in zip(DIFFERENTIABLE, gradients) if getattr(call, name) is not None}
    return results


def run_cpp_packed(call: ops.Call, packing: ops.Packing, douts: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Runs the C++ kernels on packed sequences, forward and backward."""
    operations = torch.ops.fastgpt
    return _run_packed(operations.attention_varlen_forward, operations.attention_varlen_backward, call, packing, douts)


def run_triton_packed(
    call: ops.Call, packing: ops.Packing, douts: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Runs the Triton kernels on packed sequences, forward and backward."""
    return _run_packed(attention_varlen_forward_triton, attention_varlen_backward_triton, call, packing, douts)


def _run_packed(forward, backward, call, packing, douts):
    arguments = varlen_arguments(call)
    out, lse = forward(*packing, *arguments)
    gradients = backward(*douts, out, lse, *packing, *arguments)
    names = ("dq", "dk", "dv") if call.sinks is None else ("dq", "dk", "dv", "dsinks")
    return {"out": out, "lse": lse} | dict(zip(names, gradients))


def run_triton(call: ops.Call, douts: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Runs the Triton kernels, forward and backward."""
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
