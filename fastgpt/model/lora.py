"""LoRA: low-rank adapters of a decoder's linear layers, trained in place of the weights, which may be quantized.

    y = x W^T + bias + alpha / rank · (x A^T) B^T        A (rank, C), B (N, rank)

Source: LoRA (arXiv 2106.09685); on quantized weights, QLoRA (arXiv 2305.14314).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn

from fastgpt.ops.linear import linear
from fastgpt.ops.quantized_weight import QuantizedWeight

TARGETS = ("qkv", "out", "up", "down")  # all linear layers of the blocks


class Adapter(NamedTuple):
    """A is (rank, C), B (N, rank): scale · B A is added to a weight (N, C)."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float

    @property
    def update(self) -> torch.Tensor:
        return self.scale * (self.B.float() @ self.A.float())


class LoRALinear(nn.Linear):
    """An nn.Linear with an adapter beside its weight. `attach` makes one of an nn.Linear."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias) + self.lora_scale * linear(linear(x, self.lora_A), self.lora_B)

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.lora_A.detach(), self.lora_B.detach(), self.lora_scale)

    def merged_weight(self) -> torch.Tensor:
        """The matrix (N, C) that weight and adapter stand for, in the dtype of the weight."""
        return (self.weight.detach().float() + self.adapter.update).to(self.weight.dtype)


def attach(layer: nn.Linear, adapter: Adapter) -> None:
    """Makes an nn.Linear a LoRALinear, in place."""
    layer.__class__, layer.lora_scale = LoRALinear, adapter.scale
    weight = layer.weight
    for name, matrix in (("lora_A", adapter.A), ("lora_B", adapter.B)):
        layer.register_parameter(name, nn.Parameter(matrix.to(weight.device, weight.dtype)))


def add_adapters(model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = TARGETS) -> None:
    """Adds adapters to a decoder, in place, and freezes all else. They change nothing before they are trained: A is drawn as
    nn.Linear draws its weight, B is zero.

    Args:
        rank: at most the rows and the columns of each.
        targets: names of the linear layers in a block that get one, of TARGETS. In latent attention, qkv are those that make
            queries, keys and values.

    Raises: ValueError that begins with the setting's name, `lora` or `lora_targets`. Nothing has changed then.
    """
    if model.config.num_experts is not None and {"up", "down"} & {*targets}:
        raise ValueError(
            f"lora_targets: expected qkv,out for a model with experts, whose matrices get no adapters, got {','.join(targets)}: "
            "lora_targets='qkv,out' adapts the attention alone"
        )
    layers = {
        name: layer for name, layer in model.blocks.named_modules() if isinstance(layer, nn.Linear) and _target(name) in targets
    }
    if not layers:
        raise ValueError(f"lora_targets: expected linear layers of the model, got {','.join(targets)}, of which it has none")
    smallest = min(layers, key=lambda name: min(layers[name].weight.shape))
    if rank > min(shape := tuple(layers[smallest].weight.shape)):
        raise ValueError(f"lora: expected a rank of at most {min(shape)}, as blocks.{smallest} is {shape}, got {rank}")
    model.requires_grad_(False)
    for layer in layers.values():
        bound = 1 / math.sqrt(layer.in_features)
        A = torch.empty(rank, layer.in_features, device=layer.weight.device).uniform_(-bound, bound)
        attach(layer, Adapter(A, torch.zeros(layer.out_features, rank), alpha / rank))


def _target(name: str) -> str:
    """Which of TARGETS a linear layer in a block counts as, or a part of one."""
    return "qkv" if ".latent." in name else name.rstrip(".0123456789").rpartition(".")[2]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear))


@torch.no_grad()
def apply_adapters(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Applies trained adapters to a decoder, in place: added to weights that are not quantized, and beside those that are.

    adapters: by the names of their layers.
    """
    for name, adapter in adapters.items():
        layer = model.get_submodule(name)
        if isinstance(layer.weight, QuantizedWeight):
            attach(layer, adapter)
        else:
            layer.weight.add_(adapter.update.to(layer.weight.device, layer.weight.dtype))
