"""Random arguments for each feature of norm, and for all of them together."""

import torch

from fastgpt.testing.draws import normal

# Feature -> names of its tensors, and other arguments.
FEATURES: dict[str, tuple[tuple[str, ...], dict]] = {
    "layer": ((), {}),
    "layer with bias": (("bias",), {}),
    "rms": ((), {"kind": "rms"}),
    "rms with bias": (("bias",), {"kind": "rms"}),
    "rms with offset": ((), {"kind": "rms", "offset": 1.0}),
    "residual": (("residual",), {"kind": "rms"}),
    "everything": (("bias", "residual"), {"kind": "layer", "offset": 1.0, "eps": 1e-6}),
    "everything, rms": (("bias", "residual"), {"kind": "rms", "offset": 1.0, "eps": 1e-6}),
}


def call_of(feature: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> dict:
    """Random arguments of `fastgpt.norm` that exercise a feature, the same on every machine.

    Args:
        feature: a key of FEATURES.
        shape: of x, (..., C).
        dtype: of the tensors.
        seed: of the random numbers.

    Returns: a dict of keyword arguments.
    Raises: KeyError for another feature.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return normal(shape, generator)

    names, options = FEATURES[feature]
    C = shape[-1]
    named = {"x": random(*shape) + 1, "weight": random(C), "bias": random(C), "residual": random(*shape)}
    return {name: named[name].to(dtype) for name in ("x", "weight", *names)} | options
