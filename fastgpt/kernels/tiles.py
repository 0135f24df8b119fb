"""The tiles that the kernels work on, and the warps, stages and registers that they work with, all in one place.

A tile fits if no kernel that ships with it, of those under the most register pressure, spills or asks for more shared memory
than there is. Which of those that fit is fastest, that would tell on a GPU, where none has been timed:

    python -m benchmarks.sweep_tiles --arch 90 --first    the largest tile that fits, of each table and head dim
    python -m benchmarks.sweep_tiles --minutes 9          on a GPU: times what fits
    python -m benchmarks.machine_code --pairs             compiles what has every pair of choices, and counts those that fit
"""

import functools
from typing import NamedTuple

import triton

from fastgpt.kernels.architecture import ARCHITECTURES
from fastgpt.kernels.limits import cdiv

# ---- Attention of many queries, forward and backward


class Tile(NamedTuple):
    """What one program works on, and the warps and pipeline stages it works with."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys per step
    num_warps: int
    num_stages: int


# table -> (head dims as of `tile_key`, bytes per element) -> a tile for each of ARCHITECTURES; that of 80 also wherever tiles
# cannot be copied in bulk. The tables are a pass's: "forward"; "queries", for dq and a bias's gradient; "keys", for dk and dv.
# Those with extras leave registers for scores that are more than q·k · scale, and for keys in pages or 8 bits.
ATTENTION = {
    "forward": {
        (16, 2): (Tile(128, 64, 4, 3), *(Tile(128, 128, 8, 3),) * 2),
        (32, 2): (Tile(128, 64, 4, 3), *(Tile(128, 128, 8, 3),) * 2),
        (64, 2): (Tile(128, 64, 4, 4), *(Tile(128, 128, 8, 3),) * 2),
        (128, 2): (Tile(128, 64, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
        (256, 2): (Tile(64, 32, 8, 2), *(Tile(64, 64, 8, 2),) * 2),
        (16, 4): (Tile(64, 32, 4, 2),) * 3,
        (32, 4): (Tile(64, 64, 8, 2),) * 3,
        (64, 4): (Tile(32, 32, 8, 2),) * 3,
        (128, 4): (Tile(32, 16, 8, 3),) * 3,
        (256, 4): (Tile(16, 16, 8, 2),) * 3,
        (512, 2): (Tile(32, 16, 8, 2),) * 3,
        (512, 4): (Tile(16, 8, 8, 2),) * 3,
        (1024, 2): (Tile(16, 16, 8, 1),) * 3,
        (1024, 4): (Tile(16, 16, 8, 1),) * 3,  # bf16 in the interpreter; a GPU is not asked to
    },
    "with_extras forward": {
        (16, 2): (Tile(64, 32, 4, 2),) * 3,
        (32, 2): (Tile(64, 32, 4, 2),) * 3,
        (64, 2): (Tile(64, 32, 8, 2), *(Tile(64, 64, 8, 2),) * 2),
        (128, 2): (Tile(64, 32, 8, 2),) * 3,
        (256, 2): (Tile(32, 32, 8, 2), *(Tile(16, 32, 8, 1),) * 2),
        (16, 4): (Tile(32, 32, 8, 2),) * 3,
        (32, 4): (Tile(32, 32, 8, 2),) * 3,
        (64, 4): (Tile(32, 16, 8, 1),) * 3,
        (128, 4): (Tile(16, 16, 8, 2),) * 3,
        (256, 4): (Tile(16, 16, 8, 1),) * 3,
        (512, 2): (Tile(16, 16, 8, 2),) * 3,
        (512, 4): (Tile(16, 8, 8, 1),) * 3,
        (1024, 2): (Tile(16, 16, 8, 1),) * 3,
        (1024, 4): (Tile(16, 16, 8, 1),) * 3,  # bf16 in the interpreter; a GPU is not asked to
    },
    "keys": {
        (16, 2): (Tile(64, 64, 4, 2), Tile(32, 128, 8, 2), Tile(64, 128, 8, 2)),
        (32, 2): (Tile(64, 64, 4, 2), *(Tile(32, 128, 8, 2),) * 2),
        (64, 2): (Tile(64, 32, 8, 1), Tile(32, 128, 8, 2), Tile(64, 64, 8, 2)),
        (128, 2): (Tile(32, 32, 4, 1), Tile(32, 128, 8, 2), Tile(32, 64, 8, 1)),
        (256, 2): (Tile(32, 32, 8, 1),) * 3,
        (16, 4): (Tile(32, 64, 8, 2),) * 3,
        (32, 4): (Tile(32, 32, 8, 2),) * 3,
        (64, 4): (Tile(32, 32, 8, 1),) * 3,
        (128, 4): (Tile(16, 16, 8, 1),) * 3,
        (256, 4): (Tile(16, 16, 8, 1),) * 3,
    },
    "queries": {
        (16, 2): (Tile(64, 64, 4, 2), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        (32, 2): (Tile(64, 64, 4, 2), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        (64, 2): (Tile(64, 32, 8, 1), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
        (128, 2): (Tile(32, 32, 4, 1), *(Tile(128, 32, 8, 2),) * 2),
        (256, 2): (Tile(32, 16, 8, 1),) * 3,
        (16, 4): (Tile(64, 32, 8, 2),) * 3,
        (32, 4): (Tile(64, 32, 8, 1),) * 3,
        (64, 4): (Tile(32, 32, 8, 1),) * 3,
        (128, 4): (Tile(16, 16, 8, 1),) * 3,
        (256, 4): (Tile(16, 16, 8, 1),) * 3,
    },
    "with_extras keys": {
        (16, 2): (Tile(32, 32, 8, 1),) * 3,
        (32, 2): (Tile(16, 32, 8, 1), *(Tile(32, 32, 8, 1),) * 2),
        (64, 2): (Tile(32, 32, 8, 1),) * 3,
        (128, 2): (Tile(16, 32, 8, 1), *(Tile(32, 32, 8, 1),) * 2),
        (256, 2): (Tile(16, 16, 8, 1),) * 3,
        (16, 4): (Tile(32, 32, 8, 1),) * 3,
        (32, 4): (Tile(32, 32, 8, 1),) * 3,
        (64, 4): (Tile(32, 16, 8, 1),) * 3,
        (128, 4): (Tile(32, 16, 8, 1),) * 3,
        (256, 4): (Tile(16, 16, 8, 1),) * 3,
    },
    "with_extras queries": {
        (16, 2): (Tile(64, 32, 8, 1),) * 3,
        (32, 2): (Tile(64, 32, 8, 1),) * 3,
        (64, 2): (Tile(32, 32, 8, 1),) * 3,
        (128, 2): (Tile(32, 16, 8, 1),) * 3,
        (256, 2): (Tile(16, 16, 8, 1),) * 3,
        (16, 4): (Tile(64, 32, 8, 1),) * 3,
        (32, 4): (Tile(32, 32, 8, 1),) * 3,
        (64, 4): (Tile(32, 16, 8, 1),) * 3,
        (128, 4): (Tile(16, 16, 8, 1),) * 3,
        (256, 4): (Tile(16, 16, 8, 1),) * 3,
    },
}
# Where sequences have lengths of their own, and keys a window or queries no causal mask; and where head dims that do not fill
# their blocks are not copied in bulk, but by loads with masks. Both take registers, too.
ATTENTION["ragged forward"] = {
    **ATTENTION["forward"],
    (64, 2): (Tile(128, 32, 8, 3), *(Tile(128, 128, 8, 3),) * 2),
    (128, 2): (Tile(64, 64, 8, 3), *(Tile(128, 64, 8, 3),) * 2),
}
# Of packed sequences, the pass over the keys has fewer registers left, and fewer still with a causal mask.
ATTENTION["packed keys"] = {
    **ATTENTION["keys"],
    (64, 2): (Tile(64, 32, 8, 1), Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
    (128, 2): (Tile(32, 32, 4, 1), Tile(32, 64, 8, 2), Tile(32, 64, 8, 1)),
}
ATTENTION["packed causal keys"] = {
    **ATTENTION["packed keys"],
    (32, 2): (Tile(64, 64, 8, 2), *(Tile(32, 128, 8, 2),) * 2),
    (128, 2): (Tile(32, 32, 4, 1), Tile(16, 64, 8, 2), Tile(32, 64, 8, 1)),
}
DELTA_ROWS = 32  # of out and dout, whose products a program sums


def head_blocks(head_dim: int) -> tuple[int, int]:
    """(main, rest): the powers of two in which a kernel holds a head of q and k. 192 = 128 + 64 and 576 = 512 + 64 rather than
    the next power of two, where that is wide and the rest is less than half of it; else the rest is 0."""
    padded = padded_dim(head_dim)
    rest = padded_dim(head_dim - padded // 2)
    return (padded // 2, rest) if head_dim > 128 and rest < padded // 2 else (padded, 0)


def padded_dim(head_dim: int) -> int:
    """The power of two in which a kernel holds a head of v."""
    return max(16, triton.next_power_of_2(head_dim))


def tile_key(head_dim: int, v_dim: int, element_size: int) -> tuple[int, int]:
    """What tables of tiles are keyed by: a power of two for the head dims of k and v, 512 with a rest included, and bytes."""
    return max(min(padded_dim(head_dim), 512), padded_dim(v_dim)), element_size


def attention_tile(table: str, head_dim: int, v_dim: int, element_size: int, arch: int) -> Tile:
    """The tile of a table of ATTENTION for one of ARCHITECTURES."""
    return ATTENTION[table][tile_key(head_dim, v_dim, element_size)][ARCHITECTURES.index(arch)]


def forward_table(causal: bool, has_window: bool, with_extras: bool, ragged: bool, masked_columns: bool) -> str:
    """Which table a variant of the forward pass takes its tile from. masked_columns: as of the function of that name."""
    if with_extras:
        return "with_extras forward"
    return "ragged forward" if masked_columns or ragged and (has_window or not causal) else "forward"


def keys_table(causal: bool, with_extras: bool, packed: bool) -> str:
    """Likewise, of the backward pass over the keys."""
    if with_extras:
        return "with_extras keys"
    return f"packed {'causal ' if causal else ''}keys" if packed else "keys"


def masked_columns(head_dim: int, v_dim: int, arch: int) -> bool:
    """Whether the forward pass loads rows of q, k or v with a mask, as they do not fill their blocks: in bulk it does not."""
    return arch == 80 and (sum(head_blocks(head_dim)) > head_dim or padded_dim(v_dim) > v_dim)


# ---- Attention of few queries over a cache


class DecodeTile(NamedTuple):
    """What one program works on, and the warps, pipeline stages and registers it works with."""

    BLOCK_M: int  # rows: queries of the heads that share K and V
    BLOCK_N: int  # keys per step
    SPLIT: int  # keys per program, BLOCK_N times a power of two: at the most, see `keys_per_split`
    num_warps: int
    num_stages: int
    maxnreg: int  # registers a thread may use; left to itself, ptxas spills some for more programs at once


FEW_ROWS = 16  # up to this many rows, the second tile of a pair

# (head dims as of `tile_key`, bytes per element of q) -> tiles for (more than FEW_ROWS rows, up to FEW_ROWS).
# More rows leave more to combine, so they get longer splits. The same for every architecture, as memory sets the pace; but see
# `decode_tile`.
DECODE = {
    (16, 2): (DecodeTile(64, 64, 1024, 4, 3, 255), DecodeTile(16, 64, 256, 4, 3, 168)),
    (32, 2): (DecodeTile(64, 64, 1024, 4, 3, 255), DecodeTile(16, 64, 256, 4, 3, 168)),
    (64, 2): (DecodeTile(64, 64, 1024, 4, 3, 255), DecodeTile(16, 64, 256, 4, 4, 168)),
    (128, 2): (DecodeTile(64, 64, 1024, 8, 3, 255), DecodeTile(16, 64, 256, 4, 3, 255)),
    (256, 2): (DecodeTile(32, 32, 1024, 8, 3, 255), DecodeTile(16, 32, 256, 4, 3, 255)),
    (16, 4): (DecodeTile(32, 32, 1024, 4, 2, 255), DecodeTile(16, 32, 256, 4, 2, 168)),
    (32, 4): (DecodeTile(32, 32, 1024, 4, 2, 255), DecodeTile(16, 32, 256, 4, 2, 168)),
    (64, 4): (DecodeTile(32, 32, 1024, 8, 2, 255), DecodeTile(16, 32, 256, 4, 2, 255)),
    (128, 4): (DecodeTile(32, 16, 1024, 8, 2, 255), DecodeTile(16, 16, 256, 4, 2, 168)),
    (256, 4): (DecodeTile(32, 16, 1024, 8, 2, 255), DecodeTile(16, 16, 256, 8, 2, 255)),
    (512, 2): (DecodeTile(16, 32, 1024, 8, 2, 255), DecodeTile(16, 32, 256, 8, 2, 255)),
    (512, 4): (DecodeTile(8, 16, 1024, 8, 2, 255), DecodeTile(8, 16, 256, 8, 2, 255)),
    (1024, 2): (DecodeTile(16, 16, 1024, 8, 2, 255), DecodeTile(16, 16, 256, 8, 2, 255)),
    # bf16 in the interpreter; a GPU is not asked to
    (1024, 4): (DecodeTile(8, 16, 1024, 8, 1, 255), DecodeTile(8, 16, 256, 8, 1, 255)),
}
SHORTEST_SPLIT = 64  # keys that are worth a program of their own
IN_FLIGHT = 64  # registers of a thread that hold parts on their way, half of them where few are left


@functools.cache
def decode_tile(
    head_dim: int, v_dim: int, element_size: int, arch: int, is_8_bits: bool, few: bool, has_new_token: bool,
    has_mask_or_bias: bool,
) -> DecodeTile:  # fmt: skip
    """The tile of a variant for one of ARCHITECTURES: 8-bit keys and values, few rows, a token that joins the cache, a mask or
    a bias."""
    key = tile_key(head_dim, v_dim, element_size)
    tile = DECODE[key][few]
    if key[0] == 512:
        if arch >= 90:  # two tiles of K and V at once, one copied while the other is multiplied: up to 192 KiB
            tile = tile._replace(num_stages=3)
        elif element_size == 4 and has_mask_or_bias:  # hidden values pass through shared memory once more
            tile = tile._replace(BLOCK_N=8)
    # Rows of k held in two blocks and those of v in 256 numbers, as for head dim 160, take most registers.
    widest = head_blocks(head_dim)[1] > 0 and padded_dim(v_dim) == 256
    if widest and element_size == 4 and (has_mask_or_bias or is_8_bits):
        tile = tile._replace(BLOCK_M=16)
    if is_8_bits and element_size == 4:  # pipelined, Triton 3.9 decodes a key once per row, in too many registers; 32 keys too
        return tile._replace(BLOCK_N=8 if key[0] > 256 else 16, num_stages=1)
    if is_8_bits and (has_new_token or key[0] == 128 and not few):  # a token takes registers, too
        if not few:
            return tile._replace(BLOCK_N=32, num_warps=8)
        return tile._replace(maxnreg=255, num_warps=8 if widest else tile.num_warps)
    if has_mask_or_bias and not few:  # a mask and a bias of many rows, which are copied ahead, too, take shared memory
        return tile._replace(BLOCK_N=min(tile.BLOCK_N, 32))
    return tile


def parts_at_once(tile: DecodeTile, block_v: int, few: bool) -> int:
    """How many parts of splits a program has on their way when it adds them."""
    in_flight = IN_FLIGHT if few and tile.maxnreg == 255 else IN_FLIGHT // 2
    return max(1, min(8, in_flight * 32 * tile.num_warps // (tile.BLOCK_M * block_v)))


def keys_per_split(tile: DecodeTile, tiles: int, n_keys: int, n_multiprocessors: int) -> int:
    """The most keys, the tile's or those halved again and again, whose programs are as many as the multiprocessors; if none
    are, the fewest. Decided without a look at the device, and by few powers of two, as each is a kernel of its own.

    Args: tiles of rows, all that read other keys or hold other rows; n_keys that there are at most for each.
    """
    split = tile.SPLIT
    while split > max(SHORTEST_SPLIT, tile.BLOCK_N) and tiles * cdiv(n_keys, split) < n_multiprocessors:
        split //= 2
    return split


# ---- Linear layers of few rows


class LinearTile(NamedTuple):
    """What one program works on: rows of x, rows of the weight (if gated, half of them of the gate) and columns per step; and
    the warps and pipeline stages it works with."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# One row of x:
PROGRAM_BYTES = 32 << 10  # of the weight that a program reads
LEAST_PROGRAMS = 384
TILE_BYTES = 8 << 10  # of the weight, unless the tile is a program's only one
TILE_ROW_BYTES = 2 << 10  # 16 a thread, so that each thread has the columns of x that it multiplies with
MOST_ROWS, LEAST_ROWS = 8, 2  # of the weight, a program
# Several rows of x:
PROGRAM_ROWS = {16384: 64, 8192: 32, 0: 16}  # at least so many rows of the weight -> rows a program, for enough programs
SHORT_ROW_BYTES = 128  # of a tile, twice as many where tiles of 16 bits have few rows


@functools.cache
def linear_tile(n_rows: int, weight_rows: int, K: int, element_size: int, norm: bool) -> LinearTile:
    """The tile of a product of x (n_rows, K) and weight (weight_rows, K)."""
    if n_rows == 1:
        block_n = MOST_ROWS
        while block_n > LEAST_ROWS and (block_n * K * element_size > PROGRAM_BYTES or weight_rows < block_n * LEAST_PROGRAMS):
            block_n //= 2
        block_k = min(max(TILE_ROW_BYTES, TILE_BYTES // block_n) // element_size, max(16, triton.next_power_of_2(K)))
        while block_k * element_size > TILE_ROW_BYTES and 3 * cdiv(K, block_k) * block_k > 4 * K:  # a third more than there is
            block_k //= 2
        if K > block_k:
            block_n = min(block_n, TILE_BYTES // element_size // block_k)
        return LinearTile(1, block_n, block_k, 4, 1)
    block_n = next(rows for least, rows in PROGRAM_ROWS.items() if weight_rows >= least)
    block_m = max(16, triton.next_power_of_2(n_rows + 2 * norm))
    block_k = SHORT_ROW_BYTES // element_size * (2 if block_n < 64 and block_m < 32 and element_size == 2 else 1)
    return LinearTile(block_m, block_n, block_k, *((8, 3) if block_m == 64 else (4, 4)))


# ---- Norms, embeddings, the cache's update: rows of numbers

LONGEST_NORM = 4096  # numbers of a row that are read at a time
LEAST_NORM = 1024  # numbers that a program normalizes at least, if there are so many
LONGEST_EMBEDDING = 1024  # numbers of a row that a program writes
ADVANCED = 128  # sequences whose lengths a program advances
UPDATED = 4096  # bytes of k that a program stores, of several tokens: 16 a thread, twice
LONGEST_UPDATE = 1024  # numbers of a row at a time; rows that are rotated or quantized are no longer
WIDEST_ACCESS = 16  # bytes


def norm_tile(C: int, many: bool) -> dict:
    """Of rows of C numbers. Few rows get a program each."""
    block_c = min(triton.next_power_of_2(C), LONGEST_NORM)
    block_m = max(1, LEAST_NORM // block_c) if many else 1
    return dict(BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4 if block_m * block_c >= LEAST_NORM else 1, num_stages=1)


def embedding_tile(C: int) -> dict:
    """Of rows of C numbers: 16 bytes a thread, of 16-bit numbers."""
    return dict(BLOCK_C=min(triton.next_power_of_2(C), LONGEST_EMBEDDING), num_warps=4, num_stages=1)


def update_tile(head_dim: int, v_dim: int, several: bool, element_size: int) -> dict:
    """Of one token, or several, that join the cache."""
    block_d, block_dv = (min(LONGEST_UPDATE, triton.next_power_of_2(max(1, dim))) for dim in (head_dim, v_dim))
    longest = max(block_d, block_dv)
    block_t = max(1, min(64, UPDATED // (longest * element_size))) if several else 1
    num_warps = max(1, min(4, block_t * longest * element_size // (32 * WIDEST_ACCESS)))
    return dict(BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_DV=block_dv, num_warps=num_warps, num_stages=1)
