"""Experts in MXFP4 (GPT-OSS): numbers of 4 bits in groups of 32 with a power of two.

X_blocks (E, N, C/32, 16) uint8, X_scales (E, N, C/32) uint8: of all experts, GGUF's MXFP4 with the halves of a byte side by side
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fastgpt.checkpoints.families.family import Fused
from fastgpt.checkpoints.loading import Stored
from fastgpt.checkpoints.quantized_folders.matrix import Scheme
from fastgpt.checkpoints.safetensors_files import ExpertTensor, SafetensorsTensor
from fastgpt.ops.quantized_weight import GGUF_PACKINGS, Packing, dequantize_blocks

MXFP4 = "mxfp4"  # the quant_method


@dataclass(frozen=True)
class Mxfp4Experts(Stored):
    """The matrices of all experts, (E, N, C)."""

    blocks: SafetensorsTensor
    scales: SafetensorsTensor

    def of_expert(self, expert: int, part: int, fused: Fused) -> Stored:
        shape: tuple[int, ...] = (self.shape[1] // len(fused.parts), self.shape[2])
        if self.shape[1] % len(fused.parts):
            shape = self.shape[1:]  # misshapen, which an error will say
        return Mxfp4Matrix(self.path, self.name, self.dtype, shape, self, expert, part, fused)


@dataclass(frozen=True)
class Mxfp4Matrix(Stored):
    """A part of an expert's matrix, whose blocks become those of GGUF."""

    whole: Mxfp4Experts
    expert: int
    part: int
    fused: Fused

    is_linear: ClassVar[bool] = True
    packing: ClassVar[Packing] = GGUF_PACKINGS["MXFP4"]

    def read(self, rows: slice) -> torch.Tensor:
        return dequantize_blocks(self.read_blocks(rows), self.packing, self.shape[1])

    def read_blocks(self, rows: slice) -> torch.Tensor:
        blocks, scales = (
            ExpertTensor(
                self.path, tensor.name, "U8", self.shape, self.expert, self.part, self.fused._replace(transposed=False)
            )
            .read(rows)
            .contiguous()
            for tensor in (self.whole.blocks, self.whole.scales)
        )  # (R, G, 16), (R, G)
        q = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)  # (R, G, 32)
        return torch.cat([scales[..., None], q[..., :16] | q[..., 16:] << 4], -1).flatten(1)


def matrices(found: Sequence[SafetensorsTensor], scheme: Scheme) -> list[Stored]:
    by_name = {tensor.name: tensor for tensor in found}
    result: dict[str, Stored] = dict(by_name)
    for name, blocks in by_name.items():
        module = name.removesuffix("_blocks")
        if module == name:
            continue
        scales = result.pop(f"{module}_scales", None)
        del result[name]
        shape = blocks.shape
        if len(shape) != 4 or shape[3] != 16 or blocks.dtype != "U8":
            raise ValueError(
                f"model: {blocks.path}: {name}: expected shape (E, N, C/32, 16) of U8, got {shape} of {blocks.dtype}"
            )
        if scales is None or scales.shape != shape[:3] or scales.dtype != "U8":
            got = "none" if scales is None else f"{scales.shape} of {scales.dtype}"
            raise ValueError(f"model: {blocks.path}: {module}_scales: expected shape {shape[:3]} of U8, got {got}")
        whole = (*shape[:2], shape[2] * 32)
        result[module] = Mxfp4Experts(blocks.path, module, scheme.dtype or "BF16", whole, blocks, by_name[f"{module}_scales"])
    return list(result.values())
