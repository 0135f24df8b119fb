"""The features of linear, one by one and together, as arguments for tests and for benchmarks.numerics."""

import torch

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


def call_of(feature, rows, C, N, dtype):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

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
    """The same in several calls, of so many rows each."""
    x, residual = call["x"].split(rows), call["residual"].split(rows) if "residual" in call else None
    return [call | {"x": x[i]} | ({"residual": residual[i]} if residual else {}) for i in range(len(rows))]


def in_float64(call):
    return {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
