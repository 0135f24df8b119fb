"""Types of blocks in GGUF files that `linear` multiplies with as they are stored: w = scale · q + minimum, with integers q of 2 to
8 bits, and scales and minima that are themselves stored in 4 to 8 bits, or of a table of 16 numbers.

Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

# Numbers that 4 bits stand for.
NONLINEAR = -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113
FLOAT4 = 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12  # E2M1, doubled

# Integers (n, columns), scales (n, groups) and minima (n, groups) or None, in fp32.
Unpacked = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class BlockType(NamedTuple):
    """How GGML stores a type of blocks.

    number, name: GGML's.
    columns, bytes: of a block.
    group_size: numbers that share a scale.
    minima: whether groups have a minimum.
    halves: where the bytes of the fp16 are that scales and minima are multiples of.
    unpack: (n, bytes) uint8 -> what they hold.
    """

    number: int
    name: str
    columns: int
    bytes: int
    group_size: int
    minima: bool
    halves: slice
    unpack: Callable[[torch.Tensor], Unpacked]


def dequantize(blocks: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """Rows of blocks (N, bytes) uint8 -> (N, columns) fp32."""
    q, scale, minimum = kind.unpack(blocks.reshape(-1, kind.bytes))
    w = q.view(len(q), -1, kind.group_size) * scale.unsqueeze(-1)
    return (w if minimum is None else w + minimum.unsqueeze(-1)).view(len(blocks), -1)


def _half(x: torch.Tensor) -> torch.Tensor:
    """(n, 2k) bytes -> (n, k) fp32."""
    return x.contiguous().view(torch.float16).float()


def _halves(x: torch.Tensor) -> torch.Tensor:
    """The lower halves of each row's bytes, and then the upper ones."""
    return torch.cat((x & 15, x >> 4), -1)


def _bits(x: torch.Tensor, count: int) -> torch.Tensor:
    """(n, k) bytes -> (n, 8 / count, k): `count` bits of each, the lowest ones first."""
    shifts = torch.arange(0, 8, count, device=x.device).unsqueeze(-1)
    return x.unsqueeze(1) >> shifts & 2**count - 1


def _looked_up(x: torch.Tensor, table: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.float32, device=x.device)[_halves(x).long()]


def _fifth_bits(x: torch.Tensor) -> torch.Tensor:
    """(n, 4) bytes -> (n, 32): 16 where a bit is set."""
    return _bits(x, 1).mT.flatten(1) << 4


def _q5_0(x):
    return (_halves(x[:, 6:]) | _fifth_bits(x[:, 2:6])).float() - 16, _half(x[:, :2]), None


def _q5_1(x):
    return (_halves(x[:, 8:]) | _fifth_bits(x[:, 4:8])).float(), _half(x[:, :2]), _half(x[:, 2:4])


def _q2_k(x):
    scales, d, least = x[:, :16], _half(x[:, 80:82]), _half(x[:, 82:84])
    q = torch.cat([_bits(part, 2).flatten(1) for part in x[:, 16:80].split(32, 1)], 1)
    return q.float(), d * (scales & 15), -(least * (scales >> 4))


def _q3_k(x):
    low = torch.cat([_bits(part, 2).flatten(1) for part in x[:, 32:96].split(32, 1)], 1)
    high = _bits(x[:, :32], 1).flatten(1)
    scales = _halves(x[:, 96:104]) | _bits(x[:, 104:108], 2).flatten(1) << 4
    return (low | high << 2).float() - 4, _half(x[:, 108:110]) * (scales.float() - 32), None


def _scales_and_minima(x):
    """Eight of 6 bits each, of Q4_K and Q5_K: (n, 16) bytes, the common factors first."""
    factors, a, b, c = _half(x[:, :4]), x[:, 4:8], x[:, 8:12], x[:, 12:16]
    scales = torch.cat((a & 63, c & 15 | a >> 6 << 4), 1)
    minima = torch.cat((b & 63, c >> 4 | b >> 6 << 4), 1)
    return factors[:, :1] * scales, -(factors[:, 1:] * minima)


def _q4_k(x):
    q = torch.cat([_halves(part) for part in x[:, 16:].split(32, 1)], 1)
    return q.float(), *_scales_and_minima(x)


def _q5_k(x):
    q = torch.cat([_halves(part) for part in x[:, 48:].split(32, 1)], 1)
    return (q | _bits(x[:, 16:48], 1).flatten(1) << 4).float(), *_scales_and_minima(x)


def _q6_k(x):
    low = torch.cat([_halves(part) for part in x[:, :128].split(64, 1)], 1)
    high = torch.cat([_bits(part, 2).flatten(1) for part in x[:, 128:192].split(32, 1)], 1)
    scales = x[:, 192:208].contiguous().view(torch.int8)
    return (low | high << 4).float() - 32, _half(x[:, 208:210]) * scales, None


def _iq4_nl(x):
    return _looked_up(x[:, 2:], NONLINEAR), _half(x[:, :2]), None


def _iq4_xs(x):
    q = torch.cat([_looked_up(part, NONLINEAR) for part in x[:, 8:].split(16, 1)], 1)
    low = _bits(x[:, 4:8], 4).mT.flatten(1)
    high = _bits(x[:, 2:4], 2).mT.flatten(1)
    return q, _half(x[:, :2]) * ((low | high << 4).float() - 32), None


def _mxfp4(x):
    exponent = x[:, :1].int()
    # 2^(exponent - 128), by its bits: the two smallest ones are subnormal.
    bits = torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), exponent - 1 << 23)
    return _looked_up(x[:, 1:], FLOAT4), bits.view(torch.float32), None


BLOCK_TYPES = {
    kind.number: kind
    for kind in (
        BlockType(6, "Q5_0", 32, 22, 32, False, slice(0, 2), _q5_0),
        BlockType(7, "Q5_1", 32, 24, 32, True, slice(0, 4), _q5_1),
        BlockType(10, "Q2_K", 256, 84, 16, True, slice(80, 84), _q2_k),
        BlockType(11, "Q3_K", 256, 110, 16, False, slice(108, 110), _q3_k),
        BlockType(12, "Q4_K", 256, 144, 32, True, slice(0, 4), _q4_k),
        BlockType(13, "Q5_K", 256, 176, 32, True, slice(0, 4), _q5_k),
        BlockType(14, "Q6_K", 256, 210, 16, False, slice(208, 210), _q6_k),
        BlockType(20, "IQ4_NL", 32, 18, 32, False, slice(0, 2), _iq4_nl),
        BlockType(23, "IQ4_XS", 256, 136, 32, False, slice(0, 2), _iq4_xs),
        BlockType(39, "MXFP4", 32, 17, 32, False, slice(0, 0), _mxfp4),
    )
}
