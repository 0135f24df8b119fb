"""The experts of a mixture: their matrices, the activations that their MLPs may have, the checks that all ways to compute them share."""

import torch

from fastgpt.ops.linear import ACTIVATION_NUMBERS as OF_LINEAR
from fastgpt.ops.linear import finish
from fastgpt.ops.quantized_weight import QuantizedWeight

CLAMPED = "swiglu_clamped"
ALPHA, LIMIT = 1.702, 7.0  # of "swiglu_clamped"
ACTIVATION_NUMBERS: dict[str | None, int] = OF_LINEAR | {CLAMPED: len(OF_LINEAR)}


def number_of_experts(down: torch.Tensor, C: int) -> int:
    """E of down (E, C, I), or of a QuantizedWeight (E · C, I)."""
    return down.shape[0] // C if isinstance(down, QuantizedWeight) else down.shape[0]


def of_expert(weight, bias, e, E, dequantized=False):
    """The matrix and the bias, or None, of expert e of E."""
    if isinstance(weight, QuantizedWeight):
        rows = weight.shape[0] // E
        weight = weight.with_blocks(weight.blocks[e * rows : (e + 1) * rows])
        weight = weight.dequantize() if dequantized else weight
    else:
        weight = weight[e]
    return weight, None if bias is None else bias[e]


def require_experts(experts, E):
    if experts.is_cpu and experts.numel():
        least, most = (value.item() for value in experts.aminmax())
        if least < 0 or most >= E:
            raise ValueError(f"experts: expected indices from 0 to {E - 1}, got {least} to {most}")


def activate(y, activation, gated):
    if activation != CLAMPED:
        return finish(y, activation=activation, gated=gated)
    gate, y = y.chunk(2, -1)
    gate = gate.clamp(max=LIMIT)
    return (y.clamp(-LIMIT, LIMIT) + 1) * (gate * torch.sigmoid(ALPHA * gate))


def finished(out, x, residual):
    """residual + out, which is in fp32, in the dtype of x and as large."""
    out = out.view(x.shape)
    return (out if residual is None else residual + out).to(x.dtype)
