"""Random arguments for each feature of linear, and for all of them together."""

import torch

from fastgpt.testing.draws import normal

NORM = ("norm_weight", "norm_bias")
# Feature -> names of its tensors, and other arguments.
FEATURES: dict[str, tuple[tuple[str, ...], dict]] = {
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


def call_of(feature: str, rows: int, C: int, N: int, dtype: torch.dtype, seed: int = 0) -> dict:
    """Random arguments of `fastgpt.linear` that exercise a feature, the same on every machine.

    Args:
        feature: a key of FEATURES.
        rows, C, N: sizes of x (rows, C) and weight (N, C), or (2N, C) with a gate.
        dtype: of the tensors.
        seed: of the random numbers.

    Returns: a dict of keyword arguments.
    Raises: KeyError for another feature.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return normal(shape, generator)

    names, options = FEATURES[feature]
    weight_rows = 2 * N if options.get("gated") else N
    named = {
        "x": random(rows, C) + 1,
        "weight": random(weight_rows, C) / C**0.5,
        "bias": random(weight_rows),
        "norm_weight": random(C),
        "norm_bias": random(C),
        "residual": random(rows, N),
    }
    return {name: named[name].to(dtype) for name in ("x", "weight", *names)} | options


def split(call: dict, rows: list[int]) -> list[dict]:
    """Splits a call into several; rows: the rows of each."""
    x, residual = call["x"].split(rows), call["residual"].split(rows) if "residual" in call else None
    return [call | {"x": x[i]} | ({"residual": residual[i]} if residual else {}) for i in range(len(rows))]


def in_float64(call: dict) -> dict:
    """Arguments of linear or norm in float64, for the oracle."""
    return {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
