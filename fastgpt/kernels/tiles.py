"""Tile sizes of the kernels, and their warps, pipeline stages and registers, all in one place.

A tile fits if none of the kernels that ship with it, as far as compiled, spills registers or needs more shared memory than
there is. Which of the tiles that fit is fastest is not known yet: none has been timed on a GPU.

    python -m benchmarks.sweep_tiles --arch 90 --first    the largest tile that fits, for each table and head dim
    python -m benchmarks.sweep_tiles --minutes 9          on a GPU: times the tiles that fit
    python -m benchmarks.machine_code --pairs             compiles kernels that cover every pair of choices, and checks them
"""

import functools
from typing import NamedTuple

import triton

from fastgpt.kernels.architecture import ARCHITECTURES
from fastgpt.kernels.limits import cdiv

# ---- Attention of many queries, forward and backward


class Tile(NamedTuple):
    """The tile of one program, and its warps and pipeline stages."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys per step
    num_warps: int
    num_stages: int


# table -> (head dims as of `tile_key`, bytes per element) -> a tile for each of ARCHITECTURES; that of 80 also wherever tiles
# cannot be copied in bulk (TMA). A table per pass: "forward"; "queries", for dq and the gradient of a bias; "keys", for dk and
# dv. Tables with extras leave registers for features beyond scale q·k, and for keys in pages or 8 bits.
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
        (32, 2): (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(32, 32, 8, 1)),
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
# For sequences of different lengths with a window or without a causal mask; and for head dims that are not padded blocks where
# rows are not copied in bulk, but by masked loads. Both take registers, too.
ATTENTION["ragged forward"] = {
    **ATTENTION["forward"],
    (64, 2): (Tile(128, 32, 8, 3), *(Tile(128, 128, 8, 3),) * 2),
    (128, 2): (Tile(64, 64, 8, 3), *(Tile(128, 64, 8, 3),) * 2),
}
# With packed sequences, the pass over keys has fewer registers left, and fewer still with a causal mask.
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
DELTA_ROWS = 32  # rows of out and dout per program of the delta kernel


def head_blocks(head_dim: int) -> tuple[int, int]:
    """(main, rest): the powers of two to which a head dim of q and k is padded: 192 = 128 + 64 and 576 = 512 + 64 rather than
    the next power of two, if the head dim is above 128 and the rest is less than half of that; else the rest is 0."""
    padded = padded_dim(head_dim)
    rest = padded_dim(head_dim - padded // 2)
    return (padded // 2, rest) if head_dim > 128 and rest < padded // 2 else (padded, 0)


def padded_dim(head_dim: int) -> int:
    """The power of two to which a head dim of v is padded."""
    return max(16, triton.next_power_of_2(head_dim))


def tile_key(head_dim: int, v_dim: int, element_size: int) -> tuple[int, int]:
    """The key of the tables: a power of two for the head dims of k and v (512 also for 512 + rest), and bytes per element."""
    return max(min(padded_dim(head_dim), 512), padded_dim(v_dim)), element_size


def attention_tile(table: str, head_dim: int, v_dim: int, element_size: int, arch: int) -> Tile:
    """The tile of a table of ATTENTION for one of ARCHITECTURES."""
    return ATTENTION[table][tile_key(head_dim, v_dim, element_size)][ARCHITECTURES.index(arch)]


def forward_table(causal: bool, has_window: bool, with_extras: bool, ragged: bool, masked_columns: bool) -> str:
    """The table of the tile of a variant of the forward pass. masked_columns: from the function of that name."""
    if with_extras:
        return "with_extras forward"
    return "ragged forward" if masked_columns or ragged and (has_window or not causal) else "forward"


def keys_table(causal: bool, with_extras: bool, packed: bool) -> str:
    """Likewise, of the backward pass over the keys."""
    if with_extras:
        return "with_extras keys"
    return f"packed {'causal ' if causal else ''}keys" if packed else "keys"


def masked_columns(head_dim: int, v_dim: int, arch: int) -> bool:
    """Whether the forward pass masks columns of q, k or v that pad head dims; bulk copies (TMA) need no mask."""
    return arch == 80 and (sum(head_blocks(head_dim)) > head_dim or padded_dim(v_dim) > v_dim)


# ---- Attention of few queries over a cache


class DecodeTile(NamedTuple):
    """The tile of one program, and its warps, pipeline stages and registers."""

    BLOCK_M: int  # rows: queries of the heads that share K and V
    BLOCK_N: int  # keys per step
    SPLIT: int  # maximum number of keys per program, BLOCK_N times a power of two; see `keys_per_split`
    num_warps: int
    num_stages: int
    maxnreg: int  # registers per thread; without a limit of its own, ptxas spills some for higher occupancy


FEW_ROWS = 16  # up to this many rows, the second tile of a pair

# (head dims as of `tile_key`, bytes per element of q) -> tiles for (more than FEW_ROWS rows, up to FEW_ROWS).
# With more rows there is more to combine, so splits are longer. The same for every architecture, as decoding is bound by memory;
# but see `decode_tile`.
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
SHORTEST_SPLIT = 64  # minimum number of keys per program
IN_FLIGHT = 64  # registers per thread for partial results being loaded, half of them where few registers are left


@functools.cache
def decode_tile(
    head_dim: int, v_dim: int, element_size: int, arch: int, is_8_bits: bool, few: bool, has_new_token: bool,
    has_mask_or_bias: bool,
) -> DecodeTile:  # fmt: skip
    """The tile of a variant for one of ARCHITECTURES: 8-bit keys and values, few rows, a token that is appended to the cache, a
    mask or a bias."""
    key = tile_key(head_dim, v_dim, element_size)
    tile = DECODE[key][few]
    if key[0] == 512:
        if arch >= 90:  # two tiles of K and V in shared memory, one copied while the other is multiplied: up to 192 KiB
            tile = tile._replace(num_stages=3)
        elif element_size == 4 and has_mask_or_bias:  # masking values takes another trip through shared memory
            tile = tile._replace(BLOCK_N=8)
    # k in two blocks and v in a block of 256, as for head dim 160, take the most registers.
    widest = head_blocks(head_dim)[1] > 0 and padded_dim(v_dim) == 256
    if widest and element_size == 4 and (has_mask_or_bias or is_8_bits):
        tile = tile._replace(BLOCK_M=16)
    if is_8_bits and element_size == 4:  # pipelined, Triton 3.9 converts each key once per row, in too many registers
        return tile._replace(BLOCK_N=8 if key[0] > 256 else 16, num_stages=1)
    if is_8_bits and (has_new_token or key[0] == 128 and not few):  # appending a token takes registers, too
        if not few:
            return tile._replace(BLOCK_N=32, num_warps=8)
        return tile._replace(maxnreg=255, num_warps=8 if widest else tile.num_warps)
    if has_mask_or_bias and not few:  # mask and bias are pipelined, too: many rows of them take shared memory
        return tile._replace(BLOCK_N=min(tile.BLOCK_N, 32))
    return tile


def parts_at_once(tile: DecodeTile, block_v: int, few: bool) -> int:
    """How many partial results of splits a program loads at a time when it combines them."""
    in_flight = IN_FLIGHT if few and tile.maxnreg == 255 else IN_FLIGHT // 2
    return max(1, min(8, in_flight * 32 * tile.num_warps // (tile.BLOCK_M * block_v)))


def keys_per_split(tile: DecodeTile, tiles: int, n_keys: int, n_multiprocessors: int) -> int:
    """Keys per split: the tile's SPLIT, halved until there are at least as many programs as multiprocessors, or the minimum is
    reached. Lengths on the device are not read, and only powers of two are used, as each is a kernel of its own.

    Args: tiles: programs without splits; n_keys: maximum number of keys for each.
    """
    split = tile.SPLIT
    while split > max(SHORTEST_SPLIT, tile.BLOCK_N) and tiles * cdiv(n_keys, split) < n_multiprocessors:
        split //= 2
    return split


def splits(tile: DecodeTile, tiles: int, S: int, T: int, window: int | None, n_multiprocessors: int) -> tuple[int, int]:
    """Keys per split, and the number of splits of S keys.

    Args: tiles: programs without splits; T: queries; window: at most S.
    """
    n_visible = S if window is None else min(S, T + window - 1)  # most keys that any query sees
    split = keys_per_split(tile, tiles, n_visible, n_multiprocessors)
    n_splits = max(1, cdiv(S, split))
    return split, n_splits if window is None else min(n_splits, (n_visible - 2) // split + 2)


# ---- Linear layers of few rows


class LinearTile(NamedTuple):
    """The tile of one program: rows of x, rows of the weight (if gated, half of them of the gate) and columns per step; and its
    warps and pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# One row of x:
PROGRAM_BYTES = 32 << 10  # of the weight per program
LEAST_PROGRAMS = 384
TILE_BYTES = 8 << 10  # of the weight, unless the program has a single tile
TILE_ROW_BYTES = 2 << 10  # 16 per thread, so that each thread holds the columns of x that it multiplies
MOST_ROWS, LEAST_ROWS = 8, 2  # of the weight per program
# Several rows of x:
PROGRAM_ROWS = {16384: 64, 8192: 32, 0: 16}  # minimum number of rows of the weight -> rows per program, for enough programs
SHORT_ROW_BYTES = 128  # of a tile; twice as many in tiles of few rows with 16 bits


@functools.cache
def linear_tile(n_rows: int, weight_rows: int, K: int, element_size: int, norm: bool) -> LinearTile:
    """The tile of a product of x (n_rows, K) and weight (weight_rows, K)."""
    if n_rows == 1:
        block_n = MOST_ROWS
        while block_n > LEAST_ROWS and (block_n * K * element_size > PROGRAM_BYTES or weight_rows < block_n * LEAST_PROGRAMS):
            block_n //= 2
        block_k = min(max(TILE_ROW_BYTES, TILE_BYTES // block_n) // element_size, max(16, triton.next_power_of_2(K)))
        while block_k * element_size > TILE_ROW_BYTES and 3 * cdiv(K, block_k) * block_k > 4 * K:  # a third would be padding
            block_k //= 2
        if K > block_k:
            block_n = min(block_n, TILE_BYTES // element_size // block_k)
        return LinearTile(1, block_n, block_k, 4, 1)
    block_n = next(rows for least, rows in PROGRAM_ROWS.items() if weight_rows >= least)
    block_m = max(16, triton.next_power_of_2(n_rows + 2 * norm))
    block_k = SHORT_ROW_BYTES // element_size * (2 if block_n < 64 and block_m < 32 and element_size == 2 else 1)
    return LinearTile(block_m, block_n, block_k, *((8, 3) if block_m == 64 else (4, 4)))


# ---- Mixtures of experts

GROUPED_ROWS = 16, 128  # of a tile of sorted rows, at least and at most


def expert_tile(weight_rows: int, K: int, element_size: int) -> LinearTile:
    """The tile of products of single rows with experts' matrices (.., K), of `weight_rows` rows in all that are read."""
    return linear_tile(1, max(weight_rows, 1), max(K, 1), element_size, False)


@functools.cache
def grouped_tile(pairs: int, experts: int, element_size: int) -> LinearTile:
    """The tile of products of rows sorted by expert: as many rows as an expert has on average, and up to twice as many."""
    least, most = GROUPED_ROWS
    if element_size == 4:  # which matrix units do not multiply
        return LinearTile(16, 32, 32, 4, 2)
    block_m = max(least, min(most, triton.next_power_of_2(cdiv(pairs, experts))))
    return LinearTile(block_m, 128, 64, 8 if block_m == most else 4, 3)


def route_tile(groups: int, size: int) -> dict:
    """The tile of a row's choice among experts in groups: reductions within a warp need no barrier."""
    block_g, block_s = triton.next_power_of_2(groups), triton.next_power_of_2(size)
    return dict(BLOCK_G=block_g, BLOCK_S=block_s, num_warps=1 if block_g * block_s <= 512 else 4, num_stages=1)


def sum_tile(C: int) -> dict:
    """The tile of the sum over a row's experts."""
    block_n = min(LONGEST_EMBEDDING, triton.next_power_of_2(C))
    return dict(BLOCK_N=block_n, num_warps=4 if block_n >= 512 else 1, num_stages=1)


class QuantizedTile(NamedTuple):
    """As LinearTile, of quantized weights, whose columns are counted in units of 32."""

    BLOCK_M: int
    BLOCK_N: int
    UNITS: int
    num_warps: int
    num_stages: int


MOST_FEW_ROWS = 32  # of x, whose products are rounded once; as many as linear_tile takes
SEVERAL_ROWS_SUMS = {2: 2048, 4: 1024}  # bytes per element of x -> sums over a unit's columns in a tile of several rows


@functools.cache
def quantized_tile(n_rows: int, weight_rows: int, K: int, bits: int, element_size: int) -> QuantizedTile:
    """The tile of a product of x (n_rows, K) and a quantized weight (weight_rows, K); element_size: bytes, of x."""
    if n_rows == 1:
        block_n = MOST_ROWS
        while block_n > LEAST_ROWS and (block_n * K * bits > 8 * PROGRAM_BYTES or weight_rows < block_n * LEAST_PROGRAMS):
            block_n //= 2
        block_n = min(block_n, weight_rows)
        return QuantizedTile(1, block_n, min(128 // bits, triton.next_power_of_2(K // 32)), 4, 1)
    if n_rows <= MOST_FEW_ROWS:
        # In fp32, which matrix units do not multiply, a tile of 32 rows would take too many registers.
        block_m = 16 if element_size == 4 else max(16, triton.next_power_of_2(n_rows))
        block_n = 32 if weight_rows >= 8192 and block_m == 16 and element_size == 2 else 16
        return QuantizedTile(block_m, block_n, SEVERAL_ROWS_SUMS[element_size] // (block_m * block_n), 2 * element_size, 1)
    return QuantizedTile(min(128, triton.next_power_of_2(n_rows)), 64, 2, 8, 3)


# ---- Norms, embeddings, cache updates: kernels over rows

LONGEST_NORM = 4096  # elements of a row that are loaded at a time
LEAST_NORM = 1024  # minimum number of elements per program, with many rows
LONGEST_EMBEDDING = 1024  # elements of a row per program
ADVANCED = 128  # sequences per program
UPDATED = 4096  # bytes of k per program, with several tokens: 16 per thread, twice
LONGEST_UPDATE = 1024  # elements of a row at a time; rows that are rotated or quantized are not longer
WIDEST_ACCESS = 16  # bytes


def norm_tile(C: int, many: bool) -> dict:
    """The tile of a norm over rows of C elements. Few rows get a program each."""
    block_c = min(triton.next_power_of_2(C), LONGEST_NORM)
    block_m = max(1, LEAST_NORM // block_c) if many else 1
    return dict(BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4 if block_m * block_c >= LEAST_NORM else 1, num_stages=1)


def embedding_tile(C: int) -> dict:
    """The tile of an embedding with rows of C elements: 16 bytes per thread, if they have 16 bits."""
    return dict(BLOCK_C=min(triton.next_power_of_2(C), LONGEST_EMBEDDING), num_warps=4, num_stages=1)


def update_tile(head_dim: int, v_dim: int, several: bool, element_size: int) -> dict:
    """The tile of a cache update with one token or several."""
    block_d, block_dv = (min(LONGEST_UPDATE, triton.next_power_of_2(max(1, dim))) for dim in (head_dim, v_dim))
    longest = max(block_d, block_dv)
    block_t = max(1, min(64, UPDATED // (longest * element_size))) if several else 1
    num_warps = max(1, min(4, block_t * longest * element_size // (32 * WIDEST_ACCESS)))
    return dict(BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_DV=block_dv, num_warps=num_warps, num_stages=1)
