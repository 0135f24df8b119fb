"""The features of norm, one by one and together, as arguments for tests and for benchmarks.numerics."""

import torch

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


def call_of(feature, shape, dtype):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    names, options = FEATURES[feature]
    C = shape[-1]
    named = {"x": random(*shape) + 1, "weight": random(C), "bias": random(C), "residual": random(*shape)}
    return {name: named[name].to(dtype) for name in ("x", "weight", *names)} | options
