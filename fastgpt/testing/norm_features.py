"""The features of norm, one by one and together, as random arguments."""

import torch

from fastgpt.testing.draws import normal

# Names of tensors, and other arguments.
FEATURES = {
    "layer": ((), {}),
    "layer with bias": (("bias",), {}),
    "rms": ((), {"kind": "rms"}),
    "rms with bias": (("bias",), {"kind": "rms"}),
    "rms with offset": ((), {"kind": "rms", "offset": 1.0}),
    "residual": (("residual",), {"kind": "rms"}),
    "everything": (("bias", "residual"), {"kind": "layer", "offset": 1.0, "eps": 1e-6}),
    "everything, rms": (("bias", "residual"), {"kind": "rms", "offset": 1.0, "eps": 1e-6}),
}


def call_of(feature, shape, dtype, seed=0):
    """Random arguments of `norm`, by name: x of a shape (..., C), weight (C,), and what the feature needs."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return normal(shape, generator)

    names, options = FEATURES[feature]
    C = shape[-1]
    named = {"x": random(*shape) + 1, "weight": random(C), "bias": random(C), "residual": random(*shape)}
    return {name: named[name].to(dtype) for name in ("x", "weight", *names)} | options
