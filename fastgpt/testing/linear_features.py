"""The features of linear, one by one and together, as random arguments."""

import torch

from fastgpt.testing.draws import normal

NORM = ("norm_weight", "norm_bias")
# Names of tensors, and other arguments.
FEATURES = {
    "plain": ((), {}),
    "bias": (("bias",), {}),
    "norm": (("norm_weight",), {}),
    "norm and bias": ((*NORM, "bias"), {}),
    "rms norm": (("norm_weight",), {"norm": "rms"}),
    "rms norm with offset": (("norm_weight",), {"norm": "rms", "norm_offset": 1.0}),
    "gelu_tanh": (("bias",), {"activation": "gelu_tanh"}),
    "gelu": (("bias",), {"activation": "gelu"}),
    "silu": (("bias",), {"activation": "silu"}),
    "relu": (("bias",), {"activation": "relu"}),
    "gated": ((), {"gated": True}),
    "gated silu": ((), {"gated": True, "activation": "silu"}),
    "residual": (("residual",), {}),
    "everything": (("bias", *NORM, "residual"), {"activation": "gelu_tanh"}),
    "everything, gated": (
        ("bias", *NORM, "residual"),
        {"norm": "rms", "norm_offset": 1.0, "gated": True, "activation": "gelu"},
    ),
}


def call_of(feature, rows, C, N, dtype, seed=0):
    """Random arguments of `linear`, by name: x (rows, C), weight (N, C) or, of a gate, (2N, C), and what the feature needs."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return normal(shape, generator)

    names, options = FEATURES[feature]
    of_weight = 2 * N if options.get("gated") else N
    named = {
        "x": random(rows, C) + 1,
        "weight": random(of_weight, C) / C**0.5,
        "bias": random(of_weight),
        "norm_weight": random(C),
        "norm_bias": random(C),
        "residual": random(rows, N),
    }
    return {name: named[name].to(dtype) for name in ("x", "weight", *names)} | options


def split(call, rows):
    """A call as several, of so many rows each."""
    x, residual = call["x"].split(rows), call["residual"].split(rows) if "residual" in call else None
    return [call | {"x": x[i]} | ({"residual": residual[i]} if residual else {}) for i in range(len(rows))]


def in_float64(call):
    """Arguments by name, of linear or norm, for the oracle."""
    return {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
