"""Random arguments for each feature of moe, and of route."""

from typing import Any

import torch

from fastgpt.testing.draws import normal

# Feature -> names of its optional tensors, and other arguments.
FEATURES: dict[str, tuple[tuple[str, ...], dict]] = {
    "gated silu": ((), {}),
    "gated gelu_tanh": ((), {"activation": "gelu_tanh"}),
    "no gate": ((), {"activation": "relu", "gated": False}),
    "linear": ((), {"activation": None, "gated": False}),
    "biases": (("up_bias", "down_bias"), {"activation": "gelu"}),
    "residual": (("residual",), {}),
    "clamped": ((), {"activation": "swiglu_clamped"}),
    "everything": (("up_bias", "down_bias", "residual"), {"activation": "swiglu_clamped"}),
    "everything, no gate": (("up_bias", "down_bias", "residual"), {"activation": "silu", "gated": False}),
}
# Feature -> arguments of route, and whether there is a selection_bias.
ROUTES: dict[str, tuple[bool, dict[str, Any]]] = {
    "softmax": (False, {}),
    "sigmoid": (False, {"scoring": "sigmoid"}),
    "normalize": (False, {"normalize": True, "scale": 2.5}),
    "groups": (False, {"num_groups": 4, "top_groups": 2}),
    "everything": (
        True,
        {"scoring": "sigmoid", "num_groups": 4, "top_groups": 2, "group_score": "top2", "normalize": True, "scale": 2.5},
    ),
}


def call_of(
    feature: str, rows: int, dtype: torch.dtype, *, E: int = 8, K: int = 3, C: int = 40, I: int = 24, seed: int = 0
) -> dict:
    """Random arguments of `fastgpt.moe` that exercise a feature, the same on every machine.

    Args:
        feature: a key of FEATURES.
        rows: of x (rows, C), each with K of E experts.
        dtype: of x and the experts' weights.
        E, K, C, I: sizes.
        seed: of the random numbers.

    Returns: a dict of keyword arguments.
    Raises: KeyError for another feature.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return normal(shape, generator)

    names, options = FEATURES[feature]
    features = 2 * I if options.get("gated", True) else I
    weights, experts = random(rows, E).softmax(-1).topk(K)
    named = {
        "x": 2 * random(rows, C),  # beyond what is clamped
        "up": random(E, features, C) * (2 / C**0.5),
        "down": random(E, C, I) / I**0.5,
        "up_bias": random(E, features),
        "down_bias": random(E, C),
        "residual": random(rows, C),
    }
    call = {"experts": experts.int(), "weights": weights.float()}
    return call | {name: named[name].to(dtype) for name in ("x", "up", "down", *names)} | options


def route_call_of(feature: str, rows: int, E: int, K: int, dtype: torch.dtype, seed: int = 0) -> dict:
    """Random arguments of `fastgpt.route` that exercise a feature, the same on every machine.

    Args:
        feature: a key of ROUTES.
        rows, E: sizes of logits (rows, E); E is a multiple of 4, and at least 8.
        K: experts of a row, E / 2 at most.
        dtype: of the logits.
        seed: of the random numbers.

    Returns: a dict of keyword arguments.
    Raises: KeyError for another feature.
    """
    generator = torch.Generator().manual_seed(seed)
    biased, options = ROUTES[feature]
    call = {"logits": normal((rows, E), generator).to(dtype), "top_k": K}
    return call | ({"selection_bias": normal((E,), generator).float()} if biased else {}) | options


def in_float64(call: dict) -> dict:
    """Arguments of moe or route in float64, but indices of experts, for the oracle."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }
