"""Folders of ours: X.weight (N, bytes) uint8, blocks of QuantizedWeight as they are in memory.

The file's metadata have the packing of each: "fastgpt.packings": {"X.weight": [bits, group_size, minima, block_type], ...}
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastgpt import schema
from fastgpt.checkpoints.loading import Stored
from fastgpt.checkpoints.quantized_folders.matrix import CHUNK, Scheme
from fastgpt.checkpoints.safetensors_files import SafetensorsTensor
from fastgpt.ops.quantized_weight import BITS, GGUF_PACKINGS, UNIT, Packing, dequantize_blocks

OWN, PACKINGS = "fastgpt", "fastgpt.packings"  # our quant_method, and the entry of metadata


def own_metadata(packings: Mapping[str, Packing]) -> dict[str, str]:
    """Of a safetensors file with blocks: name -> what they hold."""
    return {PACKINGS: json.dumps(packings)} if packings else {}


@dataclass(frozen=True)
class StoredBlocks(Stored):
    """A matrix (N, C) in blocks, as QuantizedWeight has them."""

    tensor: SafetensorsTensor
    blocks: Packing

    is_linear: ClassVar[bool] = True

    @property
    def packing(self) -> Packing:  # type: ignore[override]  # a constant there
        return self.blocks

    def read(self, rows: slice) -> torch.Tensor:
        parts = self.tensor.read(rows).split(max(1, CHUNK // 4 // self.shape[1]))
        return torch.cat([dequantize_blocks(part, self.packing, self.shape[1]) for part in parts])

    def read_blocks(self, rows: slice) -> torch.Tensor:
        return self.tensor.read(rows)


def matrices(found: Sequence[SafetensorsTensor], scheme: Scheme, metadata: Mapping[str, str]) -> list[Stored]:
    by_name = {tensor.name: tensor for tensor in found}
    result: dict[str, Stored] = dict(by_name)
    if PACKINGS not in metadata:
        return list(result.values())
    try:
        packings = schema.parse_json(metadata[PACKINGS].encode(), PACKINGS)
    except ValueError as error:
        raise ValueError(f"model: {found[0].path}: {error}") from None
    for name, stored in packings.items():
        if name not in by_name:
            raise ValueError(f"model: {found[0].path} lacks weights: {name}, whose packing its metadata have")
        tensor = by_name[name]
        packing = _packing(stored)
        if packing is None or len(tensor.shape) != 2 or tensor.dtype != "U8" or tensor.shape[1] % packing.block_bytes:
            raise ValueError(
                f"model: {tensor.path}: {name}: expected rows of blocks in U8, as their packing [bits, group_size, minima, block_type] says, got "
                f"shape {tensor.shape} of {tensor.dtype} and {stored!r:.100}"
            )
        shape = tensor.shape[0], tensor.shape[1] // packing.block_bytes * packing.block
        result[name] = StoredBlocks(tensor.path, name, scheme.dtype or "F32", shape, tensor, packing)
    return list(result.values())


def _packing(stored: Any) -> Packing | None:
    if not isinstance(stored, list) or list(map(type, stored)) != [int, int, bool, int]:
        return None
    packing = Packing(*stored)
    if packing.block_type:
        return packing if packing in GGUF_PACKINGS.values() else None
    served = packing.bits in BITS.values() and packing.group_size > 0 and packing.group_size % UNIT == 0
    return packing if served else None
