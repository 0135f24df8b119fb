"""Tensors of GGUF files: rows in the decoder's order, as numbers or as the blocks that are stored."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastgpt.checkpoints.families.family import Fused
from fastgpt.checkpoints.gguf_file import TensorInfo, import_gguf
from fastgpt.checkpoints.loading import DTYPES, Stored
from fastgpt.ops.quantized_weight import GGUF_PACKINGS, Packing

QUANTIZED = (  # types of blocks that are served
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S",
    "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip
SERVED = (*DTYPES, *QUANTIZED)
PIECE = 1 << 17  # numbers that are dequantized at a time: they and what they are computed from fit into a cache


@dataclass(frozen=True)
class GGUFTensor(Stored):
    """A weight of a decoder.

    interleaved_heads: the number of heads whose first `rotated` rows are in pairs (2n, 2n + 1) in the file; 0: rows are as in the
        decoder.
    offset: what was added to it in the file.
    """

    info: TensorInfo
    interleaved_heads: int = 0
    rotated: int = 0
    offset: float = 0.0

    def read(self, rows: slice) -> torch.Tensor:
        values = dequantize(self._mapped()[self._order(rows)], self.info.type)
        values = values if self._by_row else values.flatten()[self._order(rows)]
        return values - self.offset if self.offset else values

    def of_expert(self, expert: int, part: int, fused: Fused) -> Stored:
        info, shape = self.info, self.shape[1:]
        one = info.nbytes // self.shape[0]
        own = replace(info, shape=shape, offset=info.offset + expert * one)
        return replace(self, info=own, shape=shape)

    @property
    def packing(self) -> Packing | None:  # type: ignore[override]  # a constant there
        return GGUF_PACKINGS.get(self.info.type) if len(self.shape) == 2 and not self.offset else None

    def read_blocks(self, rows: slice) -> torch.Tensor:
        return torch.from_numpy(np.array(self._mapped()[self._order(rows)]))

    def equal(self, other: Stored) -> bool:
        """Whether two matrices have equal blocks of one type."""
        if not isinstance(other, GGUFTensor) or (self.shape, self.info.type) != (other.shape, other.info.type):
            return False
        mine, theirs = self._mapped(), other._mapped()
        return all(np.array_equal(mine[rows], theirs[rows]) for rows in self.chunks())

    @property
    def _by_row(self) -> bool:
        """Whether a row is a whole number of blocks: those of a vector are single numbers."""
        return len(self.shape) > 1 or self.info.block == 1

    def _mapped(self) -> np.ndarray:
        """(rows, bytes of one) uint8, mapped for as long as it is used: mapped pages count as this process's memory."""
        rows = self.shape[0] if self._by_row else 1
        return np.memmap(self.path, np.uint8, "r", self.info.offset, (rows, self.info.nbytes // rows))

    def _order(self, rows: slice) -> np.ndarray | slice:
        """Where the rows of the decoder are in the file."""
        if not self._by_row:
            return slice(None)
        if not self.interleaved_heads:
            return rows
        heads = np.arange(self.shape[0]).reshape(self.interleaved_heads, -1)
        first, second, rest = heads[:, : self.rotated : 2], heads[:, 1 : self.rotated : 2], heads[:, self.rotated :]
        return np.concatenate([first, second, rest], 1).reshape(-1)[rows]


@dataclass(frozen=True)
class KeysAndValues(Stored):
    """`attn_kv_b`, (H (N + D_v), C), of a file for the absorbed form of latent attention: it has keys' part of each head
    transposed, of which blocks are along the other dimension. So both are dequantized.

    keys: (H, C, N); values: (H, D_v, C).
    """

    keys: GGUFTensor
    values: GGUFTensor

    def read(self, rows: slice) -> torch.Tensor:
        begin, end, _ = rows.indices(self.shape[0])
        each = self.shape[0] // self.keys.shape[0]
        heads = slice(begin // each, -(-end // each))
        keys, values = (tensor.read(heads).unflatten(1, tensor.shape[1:]) for tensor in (self.keys, self.values))
        return torch.cat([keys.mT, values], 1).flatten(0, 1)[begin - heads.start * each :][: end - begin]


def join_keys_and_values(stored: Mapping[str, Stored], keys: tuple, values: tuple) -> dict[str, Stored]:
    """What is stored, with `attn_k_b` and `attn_v_b` of each layer as `attn_kv_b`; files that have that as well have them twice.
    Only those of these shapes are joined: keys (H, C, N), values (H, D_v, C)."""
    result = dict(stored)
    for name, k in stored.items():
        v = stored.get(name.replace("attn_k_b", "attn_v_b"))
        joined = name.replace("attn_k_b", "attn_kv_b")
        if not (name.endswith(".attn_k_b.weight") and isinstance(k, GGUFTensor) and isinstance(v, GGUFTensor)):
            continue
        if joined in stored or (k.shape, v.shape) == (keys, values):
            del result[k.name], result[v.name]
        if joined not in stored and (k.shape, v.shape) == (keys, values):
            shape = keys[0] * (keys[2] + values[1]), keys[1]
            result[joined] = KeysAndValues(k.path, joined, k.dtype if k.dtype == v.dtype else "F32", shape, k, v)
    return result


def dequantize(blocks: np.ndarray, type_name: str) -> torch.Tensor:
    """The numbers in the rows of a matrix of bytes: (R, bytes) uint8 -> (R, D), or (R,) for rows of one number.

    Args:
        type_name: of the blocks, one of SERVED. Quantized ones become float32.
    """
    rows = len(blocks)
    if type_name in DTYPES:
        values = torch.from_numpy(np.array(blocks)).view(DTYPES[type_name])
        return values.squeeze(-1) if values.shape[-1] == 1 else values
    package = import_gguf()
    kind = package.GGMLQuantizationType[type_name]
    block, block_bytes = package.constants.GGML_QUANT_SIZES[kind]
    blocks = np.ascontiguousarray(blocks).reshape(-1, block_bytes)
    numbers = np.empty((len(blocks), block), np.float32)
    with np.errstate(all="ignore"):  # numbers that are not finite are refused when they are stored
        for begin in range(0, len(blocks), PIECE // block):
            piece = slice(begin, begin + PIECE // block)
            numbers[piece] = package.quants.dequantize(blocks[piece].reshape(1, -1), kind).reshape(-1, block)
    return torch.from_numpy(numbers.reshape(rows, -1))
