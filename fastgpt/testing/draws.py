"""Random numbers that are the same, to the bit, on every machine."""

import torch


def normal(shape, generator: torch.Generator) -> torch.Tensor:
    """Normally distributed numbers in float64, on the generator's device, multiples of 2^-20.

    PyTorch's own differ in their last bits from one instruction set to another; whoever rounds them to bf16 gets another
    number now and then.
    """
    x = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return (x * 2**20).round() / 2**20
