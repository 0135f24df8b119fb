"""Tiles of the Triton kernels: which fit, and on a GPU which are fastest. Those in fastgpt/kernels/tiles.py come from it.

python -m benchmarks.sweep_tiles --minutes 9          on a GPU: times what fits, writes results/<machine>/tiles.json
python -m benchmarks.sweep_tiles --arch 90            anywhere: registers, spilled bytes and shared memory of each tile
python -m benchmarks.sweep_tiles --arch 90 --first    the largest tile that fits, of each table and head dim
python -m benchmarks.sweep_tiles --table linear       likewise of products of few rows; --rows and --product choose some

On a GPU it ends when the minutes are over. What most models use comes first: 16 bits; products of one row, attention of heads
of 128 and 64 when decoding, forward, products of several rows, backward; of each table the tile that ships and those that
differ little from it, and the others when all tables have those. After every tile, the file has all that are timed so far, the
command, and the tables that were not reached. It goes under benchmarks/results, to be committed; with the variable
FASTGPT_RESULTS under that folder. As many processes as there are cores compile ahead.

A tile fits if no kernel that ships with it, of those under the most register pressure, spills or asks for more shared
memory than there is.
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from multiprocessing import get_context
from typing import NamedTuple
from unittest import mock

import torch
import triton

from benchmarks.machine_code import compile_for, demanding, usage_of
from benchmarks.shipped_kernels import PRODUCTS, shipped
from fastgpt.kernels import attention_backward as backward
from fastgpt.kernels import attention_decode as decode
from fastgpt.kernels import attention_forward as forward
from fastgpt.kernels import linear, tiles
from fastgpt.kernels.architecture import ARCHITECTURES, architecture
from fastgpt.kernels.launch import decided
from fastgpt.kernels.tiles import DecodeTile, LinearTile, Tile, forward_table, keys_table, linear_tile, masked_columns, tile_key

TABLES = tiles.ATTENTION
DECODE = "decode"  # the tile for few rows: queries of heads that share keys
# The most telling tables first.
ORDER = ["linear", DECODE, "forward", "linear of several rows", *(table for table in TABLES if table != "forward")]
OF_A_TILE = {"tile", "ships", "fits", "seconds", "problem"}  # of a row of results
EXTRAS = {"alibi_ptr", "mask_ptr", "bias_ptr", "block_table_ptr", "k_scale_ptr", "seed_ptr"}
PASSES = {
    "attention_forward_kernel": "forward", "backward_keys": "keys", "backward_queries": "queries", "backward_bias": "queries",
}  # fmt: skip


def candidates():
    """Larger tiles first, then more stages, then fewer warps. Tiles of 16 rows are for fp32 and wide heads."""
    sizes = sorted(itertools.product((128, 64, 32, 16), repeat=2), key=lambda size: (-size[0] * size[1], -size[0]))
    return [Tile(m, n, warps, stages) for (m, n) in sizes for stages in (4, 3, 2, 1) for warps in (4, 8)]


def decode_candidates(ships: DecodeTile) -> list[DecodeTile]:
    sizes = itertools.product((16, 32, 64, 128), (128, 256, 512, 1024), (2, 4, 8), (2, 3, 4, 5))
    return [DecodeTile(ships.BLOCK_M, *size, ships.maxnreg) for size in sizes]


def tiles_of(table: str, key: tuple[int, int], arch: int) -> tuple[tuple, list]:
    """The tile that ships, and all that might."""
    if table == DECODE:
        ships = tiles.DECODE[key][1]
        return ships, decode_candidates(ships)
    return TABLES[table][key][ARCHITECTURES.index(arch)], candidates()


@functools.cache
def kernels_of(table: str, key: tuple[int, int], arch: int) -> list:
    """The kernels that decide whether a tile fits, as machine_code.demanding gives them."""
    chosen = []
    modules = ["attention_decode"] if table == DECODE else ["attention_forward", "attention_backward"]
    for configuration in demanding(shipped(arch, modules)):
        function, dtype, cache_dtype, constants, given = configuration
        if "V_DIM" not in constants or tile_key(constants["HEAD_DIM"], constants["V_DIM"], dtype.itemsize) != key:
            continue
        if table == DECODE:
            fits_table = function.__name__ == "attend_split_kernel" and constants["BLOCK_M"] == tiles.DECODE[key][1].BLOCK_M
        else:
            fits_table = ("with_extras " if EXTRAS & set(given) else "") + PASSES.get(function.__name__, "") == table
        if function.__name__ == "backward_keys":
            fits_table = keys_table(constants["IS_CAUSAL"], bool(EXTRAS & set(given)), "cu_q_ptr" in given) == table
        if function.__name__ == "attention_forward_kernel" and not EXTRAS & set(given):
            flags = constants["IS_CAUSAL"], constants["HAS_WINDOW"], False, bool({"kv_lengths_ptr", "cu_q_ptr"} & set(given))
            of_arch = arch if "q_desc" in given else 80
            masked = masked_columns(constants["HEAD_DIM"], constants["V_DIM"], of_arch)
            fits_table = forward_table(*flags, masked) == table
        if fits_table:
            chosen.append(configuration)
    return chosen


def fit(tile, kernels: list, arch: int, replaced: dict | None = None) -> tuple[bool, str]:
    """Whether a tile fits, and what its worst kernel takes. `replaced`: constants that differ from those that ship."""
    replaced = tile._asdict() if replaced is None else replaced
    worst = None
    for function, dtype, cache_dtype, constants, given in kernels:
        try:
            usage = usage_of(compile_for(arch, function, dtype, cache_dtype, constants | replaced, given))
        except Exception as error:  # what the compiler throws is not of one kind
            return False, f"{type(error).__name__} in the compiler"
        worst = usage if worst is None else max(worst, usage, key=lambda x: (x.spilled, x.registers))
        if usage.faults(arch):
            return False, ", ".join(usage.faults(arch))
    return True, f"{worst.registers} registers, {worst.shared // 1024} KiB"


def decode_seconds(key: tuple[int, int], tile: DecodeTile) -> float:
    """Median time of one query for each of 32 heads over 8,192 keys of 8 heads, 8 sequences, in a CUDA graph: more keys than
    a cache holds."""
    head_dim, size = key
    entry, tiles.DECODE[key] = tiles.DECODE[key], (tiles.DECODE[key][0], tile)
    decided.cache_clear(), decode.kernel_constants.cache_clear(), tiles.decode_tile.cache_clear()
    dtype = torch.bfloat16 if size == 2 else torch.float32
    q = torch.randn(8, 32, 1, head_dim, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 8, 8, 8192, head_dim, device="cuda", dtype=dtype)
    options = {"causal": True, "scale": head_dim**-0.5, "kv_lengths": torch.full((8,), 8192, device="cuda", dtype=torch.int32)}

    def run():
        decode.attention_decode(q, k, v, **options)

    try:
        run()  # compiles
        return triton.testing.do_bench_cudagraph(run, return_mode="median") / 1e3
    finally:
        tiles.DECODE[key] = entry
        decided.cache_clear(), decode.kernel_constants.cache_clear(), tiles.decode_tile.cache_clear()


def seconds(table: str, key: tuple[int, int], tile, arch: int) -> float:
    """Median time of a pass over 8,192 tokens, or 2,048 in fp32, with this tile, causal unless the table's is not; of the
    backward, both passes."""
    if table == DECODE:
        return decode_seconds(key, tile)
    head_dim, size = key
    entry = TABLES[table][key]
    i = ARCHITECTURES.index(arch)
    TABLES[table][key] = (*entry[:i], tile, *entry[i + 1 :])
    decided.cache_clear(), forward.kernel_constants.cache_clear()
    backward.kernel_constants.cache_clear()
    tokens, dtype = (8192, torch.bfloat16) if size == 2 else (2048, torch.float32)
    q, k, v, dout = (torch.randn(2, 16, tokens, head_dim, device="cuda", dtype=dtype) for _ in range(4))
    options = {"scale": head_dim**-0.5, "causal": table != "packed keys"}
    if table.startswith("with_extras"):
        options["softcap"] = 20.0
    if table.startswith("packed"):
        q, k, v, dout = (x.transpose(1, 2).reshape(1, 2 * tokens, 16, head_dim).transpose(1, 2) for x in (q, k, v, dout))
        starts = torch.tensor([0, tokens, 2 * tokens], device="cuda", dtype=torch.int32)
        options |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": tokens}
    if table.startswith("ragged"):
        options |= {"kv_lengths": torch.full((2,), tokens, device="cuda", dtype=torch.int32), "window": tokens}
    try:
        out, lse = forward.attention_forward(q, k, v, **options)
        if "forward" in table:
            return triton.testing.do_bench(lambda: forward.attention_forward(q, k, v, **options), return_mode="median") / 1e3
        longest = {"max_seqlen_k": tokens} if table.startswith("packed") else {}
        run = lambda: backward.attention_backward(dout, None, q, k, v, out, lse, **options, **longest)  # noqa: E731
        return triton.testing.do_bench(run, return_mode="median") / 1e3
    finally:
        TABLES[table][key] = entry
        decided.cache_clear(), forward.kernel_constants.cache_clear()
        backward.kernel_constants.cache_clear()


def linear_candidates(rows: int, K: int, size: int, ships: LinearTile):
    """Tiles of a product of so many rows with so many columns of `size` bytes: that which ships first."""
    most = min(triton.next_power_of_2(K), 4096)
    if rows == 1:
        shapes = itertools.product((1,), (2, 4, 8, 16, 32), (256, 512, 1024, 2048, 4096), (2, 4, 8), (1,))
    else:
        shapes = itertools.product((ships.BLOCK_M,), (16, 32, 64, 128), (32, 64, 128, 256), (4, 8), (2, 3, 4, 5))
    fine = [
        x
        for x in (LinearTile(*shape) for shape in shapes)
        if x.BLOCK_K <= most and x.BLOCK_N * x.BLOCK_K * size <= 128 * x.num_warps * 32
    ]
    return [ships, *(tile for tile in fine if tile != ships)]


def linear_seconds(product: tuple, rows: int, dtype: torch.dtype, tile: LinearTile) -> float:
    """Time of a product in a CUDA graph that goes through weights which are together larger than the L2 cache."""
    weight_rows, K, activation, gated, given = product
    N = weight_rows // (2 if gated else 1)

    def random(*shape):
        return torch.randn(shape, device="cuda").to(dtype)

    sizes = {"norm_weight_ptr": (K,), "norm_bias_ptr": (K,), "bias_ptr": (weight_rows,), "residual_ptr": (rows, N)}
    tensors = {name.removesuffix("_ptr"): random(*sizes[name]) for name in given}
    weights = random(max(2, (256 << 20) // (weight_rows * K * dtype.itemsize)), weight_rows, K)
    x, options = random(rows, K), dict(activation=activation, gated=gated, rms="norm_bias_ptr" not in given)

    def run():
        for weight in weights:
            linear.linear(x, weight, **tensors, **options)

    decided.cache_clear()
    with mock.patch.object(linear, "linear_tile", lambda *shape: tile):
        run()  # compiles
        return triton.testing.do_bench_cudagraph(run, return_mode="median") / 1e3 / len(weights)


class Job(NamedTuple):
    """A tile to be timed.

    rank: what has a lower one tells more.
    row: what is stored of it.
    fit: a function, and its arguments, of what to find out whether it fits: for another process.
    seconds: times it.
    """

    rank: tuple
    row: dict
    fit: tuple
    seconds: Callable[[], float]


def distance(tile, other) -> float:
    """In how many doublings and stages two tiles differ."""
    sizes = zip(tile._replace(num_stages=1), other._replace(num_stages=1))
    return sum(abs(math.log2(a / b)) for a, b in sizes) + abs(tile.num_stages - other.num_stages)


def attention_jobs(tables: list[str], head_dims: list[int] | None, sizes: list[int] | None, arch: int) -> list[Job]:
    usual, jobs = (128, 64, 256, 32, 16), []
    for table, (head_dim, size) in itertools.product(tables, tiles.DECODE):
        if head_dim not in (head_dims or usual) or size not in (sizes or (2, 4)):
            continue
        ships, others = tiles_of(table, (head_dim, size), arch)
        table_rank = (
            size == 4,
            table.startswith(("with_extras", "ragged", "packed")),
            usual.index(head_dim) > 1,
            ORDER.index(table),
            usual.index(head_dim),
        )
        for tile in others:
            far, arguments = distance(tile, ships), (table, (head_dim, size), tile, arch)
            row = {"table": table, "head dim": head_dim, "bytes": size, "tile": list(tile), "ships": tile == ships}
            timing = functools.partial(seconds, *arguments)
            jobs.append(Job((far > 2, *table_rank, far), row, (fit_of, *arguments), timing))
    return jobs


def linear_jobs(products: list[int], rows: list[int], sizes: list[int] | None, arch: int) -> list[Job]:
    jobs = []
    for place, n, size in itertools.product(products, rows, sizes or (2, 4)):
        weight_rows, K, _, gated, given = product = PRODUCTS[place]
        dtype = torch.bfloat16 if size == 2 else torch.float32
        ships = linear_tile(n, weight_rows, K, size, "norm_weight_ptr" in given)
        for tile in linear_candidates(n, K, size, ships):
            far = distance(tile, ships)
            rank = far > 1, size == 4, False, False, ORDER.index("linear" if n == 1 else "linear of several rows"), place, far
            row = {"table": "linear", "weight": f"{weight_rows} x {K}", "gated": gated, "rows": n, "bytes": size}
            row |= {"tile": list(tile), "ships": tile == ships}
            timing = functools.partial(linear_seconds, product, n, dtype, tile)
            jobs.append(Job(rank, row, (fit_of_linear, place, n, size, tile, arch), timing))
    return jobs


def fit_of(table: str, key: tuple[int, int], tile, arch: int) -> tuple[bool, str]:
    return fit(tile, kernels_of(table, key, arch), arch)


def fit_of_linear(place: int, rows: int, size: int, tile: LinearTile, arch: int) -> tuple[bool, str]:
    _, K, activation, gated, given = PRODUCTS[place]
    dtype = torch.bfloat16 if size == 2 else torch.float32
    constants = linear.kernel_constants(tile, K, "norm_bias_ptr" not in given, activation, gated, 16 // size, arch >= 90)
    kernel = linear.one_row_kernel if rows == 1 else linear.several_rows_kernel
    return fit(tile, [(kernel, dtype, dtype, constants, given)], arch, replaced={})


def table_of(row: dict) -> str:
    """What a row of results is about, but for the tile."""
    return ", ".join(f"{name} {value}" for name, value in row.items() if name not in OF_A_TILE)


def sweep(jobs: list[Job], minutes: float, store: Callable[[dict], object]) -> None:
    """Times tiles, the most telling first, until the minutes are over. store: takes what there is so far."""
    jobs = sorted(jobs, key=lambda job: job.rank)
    end, results = time.monotonic() + 60 * minutes, []
    command = shlex.join(["python", "-m", "benchmarks.sweep_tiles", *sys.argv[1:]])
    unreached = dict.fromkeys(table_of(job.row) for job in jobs)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for job, fits in [(job, pool.submit(*job.fit)) for job in jobs]:
            try:
                well, what = fits.result(max(0.0, end - time.monotonic()))
            except TimeoutError:
                break
            row = job.row | {"fits": what}
            if well:
                try:
                    row["seconds"] = job.seconds()
                except Exception as error:  # one that fits and does not run is a finding, and others may run
                    row["problem"] = f"{type(error).__name__}: {error}".splitlines()[0]
            results.append(row)
            unreached.pop(table_of(row), None)
            print(*row.values(), sep="\t", flush=True)
            with contextlib.redirect_stdout(None):
                store({"command": command, "not reached": list(unreached), "tiles": results})
            if time.monotonic() > end:
                break
        pool.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="compile for it instead of timing")
    parser.add_argument("--table", choices=("linear", DECODE, *TABLES), action="append", help="default: all")
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 8), help="of linear's x; default: 1 8")
    parser.add_argument("--product", type=int, nargs="+", help="by place in shipped_kernels.py's PRODUCTS; default: all")
    parser.add_argument("--head-dim", type=int, choices=(16, 32, 64, 128, 256), action="append", help="default: all")
    parser.add_argument("--bytes", type=int, choices=(2, 4), action="append", help="of an element; default: both")
    parser.add_argument("--first", action="store_true", help="stop at the first that fits")
    parser.add_argument("--minutes", type=float, default=9.0, help="of timing; default: %(default)s")
    args = parser.parse_args()
    if args.arch is None and not torch.cuda.is_available():
        parser.error("--arch: expected, as there is no GPU here to time on")
    arch = args.arch or architecture(torch.device("cuda"))
    asked = args.table or ["linear", DECODE, *TABLES]
    jobs = attention_jobs([table for table in asked if table != "linear"], args.head_dim, args.bytes, arch)
    if "linear" in asked:
        jobs += linear_jobs(args.product or range(len(PRODUCTS)), args.rows, args.bytes, arch)
    if args.arch is None:
        from benchmarks.report import machine, store

        about = machine()
        sweep(jobs, args.minutes, lambda result: store("tiles", result, about))
        return
    for _, of_table in itertools.groupby(jobs, key=lambda job: table_of(job.row)):
        for job in of_table:
            function, *arguments = job.fit
            fits, what = function(*arguments)
            if fits or not args.first:
                print(*job.row.values(), what, sep="\t", flush=True)
            if fits and args.first:
                break


if __name__ == "__main__":
    main()
