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


def of_expert(
    weight: torch.Tensor, bias: torch.Tensor | None, e: int, E: int, dequantized: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The matrix and the bias, or None, of expert e of E."""
    if isinstance(weight, QuantizedWeight):
        rows = weight.shape[0] // E
        weight = weight.with_blocks(weight.blocks[e * rows : (e + 1) * rows])
        weight = weight.dequantize() if dequantized else weight
    else:
        weight = weight[e]
    return weight, None if bias is None else bias[e]


def require_experts(experts: torch.Tensor, E: int) -> None:
    """Raises ValueError for indices of experts that are not below E, on a CPU: on a GPU nobody waits for them."""
    if experts.is_cpu and experts.numel():
        least, most = (value.item() for value in experts.aminmax())
        if least < 0 or most >= E:
            raise ValueError(f"experts: expected indices from 0 to {E - 1}, got {least} to {most}")


def activate(y: torch.Tensor, activation: str | None, gated: bool) -> torch.Tensor:
    """The activation of an expert's product (..., 2I) or (..., I): (..., I)."""
    if activation != CLAMPED:
        return finish(y, activation=activation, gated=gated)
    gate, y = y.chunk(2, -1)
    gate = gate.clamp(max=LIMIT)
    return (y.clamp(-LIMIT, LIMIT) + 1) * (gate * torch.sigmoid(ALPHA * gate))


def finished(out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """residual + out, which is in fp32, in the dtype of x and as large."""
    out = out.view(x.shape)
    return (out if residual is None else residual + out).to(x.dtype)
