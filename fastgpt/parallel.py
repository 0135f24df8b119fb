"""Tensor parallelism: processes that hold a part of each matrix of a decoder, and generate together.

    torch.distributed.init_process_group("gloo")  # "nccl" on GPUs; under torchrun
    model = tensor_parallel(GPT.from_pretrained(path))
    fastgpt.generate(model, ids, 20)  # in every process: each returns the same tokens

Every process computes some of the heads and some of the MLP's width; what their output matrices add to the residual stream
is summed over the processes, twice a layer. Embeddings and the output matrix are whole in each of them.
"""

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from fastgpt.model.decoder import GPT, MLP, Attention
from fastgpt.model.fusion import is_plain, plain
from fastgpt.ops.linear import linear


def tensor_parallel(model: GPT, mesh: DeviceMesh | None = None) -> GPT:
    """Divides a decoder, in place, among the processes of a one-dimensional mesh; default: all processes.

    Each of them calls this, with the same weights, and then everything that runs the model, with the same arguments. It can
    be run and not trained from then on.

    Raises: ValueError when heads, or the MLP's width, cannot be divided among so many processes, or a layer that is not
        plain (fastgpt/model/fusion.py: with an adapter, say) at all.
    """
    if mesh is None:
        mesh = init_device_mesh(model.token_embedding.weight.device.type, (torch.distributed.get_world_size(),))
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        if getattr(model.config, name) % mesh.size():
            raise ValueError(f"{name}: expected a multiple of {mesh.size()}, the processes, got {getattr(model.config, name)}")
    for name, layer in model.blocks.named_modules():
        if name.endswith((".qkv", ".out", ".up", ".down")) and not (isinstance(layer, nn.Linear) and is_plain(layer)):
            raise ValueError(f"model: expected plain layers to divide, got blocks.{name} of type {type(layer).__name__}")
    plan = {"blocks.*.attention": ByHeads(), "blocks.*.mlp": ByWidth()}
    if mesh.size() > 1:
        parallelize_module(model.requires_grad_(False), mesh, plan)  # in place
    return model


@plain(weights=2)
class SummedLinear(nn.Linear):
    """A layer whose columns the processes of `group` hold, each some of them: what they compute is added up."""

    @property
    def waits(self) -> bool:
        """Whether to call it waits for a GPU, as no CUDA graph can: only NCCL's sums do not."""
        return torch.distributed.get_backend(self.group) != "nccl"

    def forward(self, x):
        y = linear(x, self.weight)
        torch.distributed.all_reduce(y, group=self.group)
        return y if self.bias is None else y + self.bias


class ByHeads(ParallelStyle):
    def _apply(self, attention: Attention, mesh: DeviceMesh) -> Attention:  # type: ignore[override]
        heads = attention.num_heads, attention.num_kv_heads, attention.num_kv_heads
        keep_rows(attention.qkv, [n * attention.head_dim for n in heads], mesh)
        keep_columns(attention.out, mesh)
        attention.num_heads //= mesh.size()
        attention.num_kv_heads //= mesh.size()
        return attention


class ByWidth(ParallelStyle):
    def _apply(self, mlp: MLP, mesh: DeviceMesh) -> MLP:  # type: ignore[override]
        parts = 2 if mlp.gated else 1
        keep_rows(mlp.up, [mlp.up.out_features // parts] * parts, mesh)
        keep_columns(mlp.down, mesh)
        return mlp


def own(x: torch.Tensor, dim: int, mesh: DeviceMesh) -> torch.Tensor:
    """This process's share of x along a dimension."""
    return x.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def keep_rows(layer: nn.Linear, sizes: list[int], mesh: DeviceMesh) -> None:
    """Keeps this process's share of the rows of each part: of queries, keys, values; or of gate and up."""
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        if parameter is not None:
            kept = torch.cat([own(part, 0, mesh) for part in parameter.detach().split(sizes)])
            setattr(layer, name, nn.Parameter(kept, parameter.requires_grad))
    layer.out_features //= mesh.size()


def keep_columns(layer: nn.Linear, mesh: DeviceMesh) -> None:
    """Keeps this process's share of the columns. The bias is whole: it is added to the sum."""
    kept = own(layer.weight.detach(), 1, mesh).contiguous()
    layer.weight = nn.Parameter(kept, layer.weight.requires_grad)
    layer.in_features //= mesh.size()
    layer.group, layer.__class__ = mesh.get_group(), SummedLinear
