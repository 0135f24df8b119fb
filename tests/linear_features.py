"""The features of linear, one by one and together, as arguments for tests and for benchmarks.numerics."""

import torch


def tensors(rows, C, N, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    named = {
        "x": random(rows, C) + 1,
        "weight": random(N, C) / C**0.5,
        "bias": random(N),
        "norm_weight": random(C),
        "norm_bias": random(C),
        "residual": random(rows, N),
    }
    return {name: tensor.to(dtype) for name, tensor in named.items()}


FEATURES = {
    "plain": (),
    "bias": ("bias",),
    "norm": ("norm_weight",),
    "norm and bias": ("norm_weight", "norm_bias", "bias"),
    "gelu": ("bias", "activation"),
    "residual": ("residual",),
    "everything": ("bias", "norm_weight", "norm_bias", "activation", "residual"),
}


def call_of(feature, rows, C, N, dtype):
    named = tensors(rows, C, N, dtype) | {"activation": "gelu_tanh"}
    return {name: named[name] for name in ("x", "weight", *FEATURES[feature])}


def in_float64(call):
    return {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
