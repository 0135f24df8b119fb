"""Tensor parallelism: each process holds a shard of every matrix of a decoder, and all generate together.

    torch.distributed.init_process_group("gloo")  # "nccl" on GPUs; under torchrun
    model = tensor_parallel(GPT.from_pretrained(path))
    fastgpt.generate(model, ids, 20)  # in every process: each returns the same tokens

Each process computes some of the heads and a part of the MLP's hidden features. An all-reduce sums the outputs of both over the
processes, two per layer. Embeddings and the output matrix are replicated.
"""

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from fastgpt.model.decoder import GPT, Attention
from fastgpt.model.fusion import is_plain, plain
from fastgpt.model.inputs import require_decoder
from fastgpt.model.layers import MLP
from fastgpt.ops.linear import linear
from fastgpt.ops.quantized_weight import QuantizedWeight


def tensor_parallel(model: GPT, mesh: DeviceMesh | None = None) -> GPT:
    """Shards a decoder, in place, over the processes of a one-dimensional mesh.

    Every process must call this with the same weights, and then run the model with the same arguments. A sharded model can
    generate, but cannot be trained.

    Args:
        model: the decoder.
        mesh: by default all processes of the default process group.

    Returns: the model.
    Raises: ValueError if heads or the MLP's width are not divisible by the number of processes, if a layer is not plain
        (fastgpt/model/fusion.py): with an adapter, for example; if a weight is quantized; or for a model with experts, sinks,
        latent attention or relative positions.
    """
    require_decoder(model)
    if mesh is None:
        mesh = init_device_mesh(model.token_embedding.weight.device.type, (torch.distributed.get_world_size(),))
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        if getattr(model.config, name) % mesh.size():
            raise ValueError(
                f"{name}: expected a multiple of {mesh.size()}, the number of processes, got {getattr(model.config, name)}"
            )
    if model.config.num_experts is not None:
        raise ValueError(
            f"model: expected an MLP in each layer, got num_experts={model.config.num_experts}, which are not sharded"
        )
    if model.config.kv_rank is not None:
        raise ValueError(
            f"model: expected attention without latents, got kv_rank={model.config.kv_rank}, which are not sharded"
        )
    if model.config.position == "relative":
        raise ValueError("model: expected no bias by positions, got position='relative', whose table is not sharded")
    if model.config.attention_sinks:
        raise ValueError("model: expected attention without sinks, got attention_sinks=True, which are not sharded")
    if model.config.qk_norm and not model.config.qk_norm_per_head:
        raise ValueError(
            "model: expected norms of each head, got qk_norm_per_head=False: all heads of a token, which are sharded"
        )
    for name, layer in model.blocks.named_modules():
        if name.endswith((".qkv", ".out", ".up", ".down")) and not (isinstance(layer, nn.Linear) and is_plain(layer)):
            raise ValueError(f"model: expected plain layers, got blocks.{name} of type {type(layer).__name__}")
        if isinstance(layer, nn.Linear) and isinstance(layer.weight, QuantizedWeight):
            raise ValueError(f"model: expected weights that are not quantized, got blocks.{name}.weight: {layer.weight}")
    plan = {"blocks.*.attention": ShardHeads(), "blocks.*.mlp": ShardMLP()}
    if mesh.size() > 1:
        parallelize_module(model.requires_grad_(False), mesh, plan)  # in place
    return model


@plain(weights=2)
class RowParallelLinear(nn.Linear):
    """A row-parallel linear layer: its input features are sharded over the processes of `group`, and an all-reduce sums the partial
    outputs."""

    @property
    def waits(self) -> bool:
        """Whether a call waits for the device, so that a CUDA graph cannot capture it: with any backend but NCCL."""
        return torch.distributed.get_backend(self.group) != "nccl"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(x, self.weight)
        torch.distributed.all_reduce(y, group=self.group)
        return y if self.bias is None else y + self.bias


class ShardHeads(ParallelStyle):
    """Shards attention by heads."""

    def _apply(self, attention: Attention, mesh: DeviceMesh) -> Attention:  # type: ignore[override]
        heads = attention.num_heads, attention.num_kv_heads, attention.num_kv_heads
        keep_rows(attention.qkv, [n * attention.head_dim for n in heads], mesh)
        keep_columns(attention.out, mesh)
        attention.num_heads //= mesh.size()
        attention.num_kv_heads //= mesh.size()
        return attention


class ShardMLP(ParallelStyle):
    """Shards an MLP by its hidden features."""

    def _apply(self, mlp: MLP, mesh: DeviceMesh) -> MLP:  # type: ignore[override]
        parts = 2 if mlp.gated else 1
        keep_rows(mlp.up, [mlp.up.out_features // parts] * parts, mesh)
        keep_columns(mlp.down, mesh)
        return mlp


def local_shard(x: torch.Tensor, dim: int, mesh: DeviceMesh) -> torch.Tensor:
    """The shard of x along a dimension that this process holds."""
    return x.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def keep_rows(layer: nn.Linear, sizes: list[int], mesh: DeviceMesh) -> None:
    """Keeps this process's rows of each part of a weight: of queries, keys and values, or of gate and up. sizes: their rows."""
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        if parameter is not None:
            shards = torch.cat([local_shard(part, 0, mesh) for part in parameter.detach().split(sizes)])
            setattr(layer, name, nn.Parameter(shards, parameter.requires_grad))
    layer.out_features //= mesh.size()


def keep_columns(layer: nn.Linear, mesh: DeviceMesh) -> None:
    """Keeps this process's columns of a weight. The bias is replicated, and added after the all-reduce."""
    shard = local_shard(layer.weight.detach(), 1, mesh).contiguous()
    layer.weight = nn.Parameter(shard, layer.weight.requires_grad)
    layer.in_features //= mesh.size()
    layer.group, layer.__class__ = mesh.get_group(), RowParallelLinear
