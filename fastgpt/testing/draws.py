"""Random numbers that are bit-identical on every machine."""

from collections.abc import Sequence

import torch


def normal(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Normally distributed float64 numbers on the generator's device, rounded to multiples of 2^-20.

    torch.randn differs in the last bits between instruction sets, so that rounding its numbers to bf16 would occasionally give
    others.
    """
    x = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return (x * 2**20).round() / 2**20
