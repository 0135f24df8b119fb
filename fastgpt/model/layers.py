"""The layers that a decoder's blocks are made of: norms, projections fused with what surrounds them, and the MLP."""

import torch
import torch.nn as nn

from fastgpt.model.config import GPTConfig
from fastgpt.model.evaluation_mode import is_training
from fastgpt.model.fusion import computes, plain
from fastgpt.ops.linear import finish, linear
from fastgpt.ops.norm import norm


@plain(weights=2)
class Norm(nn.Module):
    """Layer norm or RMS norm over the last dimension. Where a projection follows, `linear` computes both in one operation."""

    def __init__(self, config: GPTConfig, width: int, eps: float | None = None):
        super().__init__()
        self.kind, self.eps, self.offset = config.norm, config.norm_eps if eps is None else eps, config.norm_offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - self.offset))
        has_bias = self.kind == "layer" and config.norm_bias
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if has_bias else None)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return norm(x, self.weight, self.bias, kind=self.kind, eps=self.eps, offset=self.offset, residual=residual)

    def as_options(self) -> dict:
        """The arguments of `linear` that apply this norm to its input."""
        weights = self._parameters
        return {
            "norm": self.kind, "norm_weight": weights["weight"], "norm_bias": weights["bias"], "norm_eps": self.eps,
            "norm_offset": self.offset,
        }  # fmt: skip


def stream_norm(config: GPTConfig) -> Norm:
    """A norm of the residual stream, which is divided by residual_scale: so is eps, twice, and the result is the same."""
    return Norm(config, config.hidden_size, config.norm_eps / config.residual_scale**2)


def new_layer(cls: type[nn.Module], *sizes: int, **options) -> nn.Module:
    """An nn.Linear or nn.Embedding with uninitialized weights, which `GPT.initialize` draws: drawing them twice would add a
    second to loading. It is PyTorch's own class, which quantization, adapters and FSDP look for."""
    if cls is nn.Embedding:  # whose own initialization imports torch._dynamo on the meta device, which takes a second
        layer: nn.Module = nn.Embedding.from_pretrained(torch.empty(sizes, device="meta"), freeze=False)
    else:
        layer = cls(*sizes, device="meta", **options)
    for name, weight in list(layer.named_parameters()):  # not by to_empty, which cannot replace fake tensors
        setattr(layer, name, nn.Parameter(torch.empty_like(weight, device=torch.get_default_device())))
    return layer


def is_plain_lookup(embedding: nn.Module) -> bool:
    """Whether calling an embedding only gathers rows of its weight."""
    return computes(embedding, nn.Embedding.forward) and embedding.max_norm is None


def look_up(embedding: nn.Module, index: torch.Tensor) -> torch.Tensor:
    """embedding(index); in a decode step without nn.Embedding's Python code, which takes as long as the lookup itself."""
    if torch.is_grad_enabled() or not is_plain_lookup(embedding):
        return embedding(index)
    return torch.embedding(embedding._parameters["weight"], index)


def project(x: torch.Tensor, layer: nn.Module, norm: nn.Module | None = None, **options) -> torch.Tensor:
    """layer(norm(x)), or layer(x), followed by the activation, gate, residual and dropout in `options` (those of `linear`):
    in one operation where the modules are plain. A layer that was loaded in parts (`loading.separate_parts`) is a ModuleList."""
    if isinstance(layer, nn.ModuleList):
        x = x if norm is None else norm(x)
        return finish(torch.cat([project(x, part) for part in layer], -1), **options)
    if not computes(layer, nn.Linear.forward):
        return finish(layer(x if norm is None else norm(x)), **options)
    weights = layer._parameters  # layer.weight would search this dict, too, but slower
    weight, bias = weights["weight"], weights["bias"]
    if norm is None:
        return linear(x, weight, bias, **options)
    if not computes(norm, Norm.forward):
        return linear(norm(x), weight, bias, **options)
    return linear(x, weight, bias, **norm.as_options(), **options)


def add(x: torch.Tensor, y: torch.Tensor, layer: nn.Module, post_norm: nn.Module | None, dropout_p: float) -> torch.Tensor:
    """x + layer(y), or x + post_norm(layer(y))."""
    if post_norm is None:
        return project(y, layer, residual=x, dropout_p=dropout_p)
    y = project(y, layer, dropout_p=dropout_p)
    return post_norm(y, residual=x) if computes(post_norm, Norm.forward) else x + post_norm(y)


@plain(weights=0)
class MLP(nn.Module):
    """residual + down(activation(up(norm(x)))); if gated, the weight of `up` is (2I, C): the rows of the gate, then those of up."""

    def __init__(self, config: GPTConfig, size: int | None = None, post_norm: bool = True):
        """size: I; default: the config's. post_norm: whether it has one, if the model has."""
        super().__init__()
        size = config.intermediate_size if size is None else size
        self.dropout, self.activation, self.gated = config.dropout, config.activation, config.gated
        self.up = new_layer(nn.Linear, config.hidden_size, size * (2 if config.gated else 1), bias=config.mlp_bias)
        self.down = new_layer(nn.Linear, size, config.hidden_size, bias=config.mlp_bias)
        self.post_norm = Norm(config, config.hidden_size) if post_norm and config.post_norms else None

    def forward(self, x: torch.Tensor, norm: Norm | None, residual: torch.Tensor) -> torch.Tensor:
        """x, residual (B, T, C) -> (B, T, C)."""
        y = project(x, self.up, norm, activation=self.activation, gated=self.gated)  # (B, T, C) -> (B, T, I)
        return add(residual, y, self.down, self.post_norm, self.dropout if is_training(self) else 0.0)
