"""Tiles of the Triton attention kernels: which fit, and on a GPU which are fastest. The tables in fastgpt/kernels come from it.

python -m benchmarks.sweep_tiles --minutes 9          on a GPU: times what fits, writes results/<machine>/tiles.json
python -m benchmarks.sweep_tiles --arch 90            anywhere: registers, spilled bytes and shared memory of each tile
python -m benchmarks.sweep_tiles --arch 90 --first    the largest tile that fits, of each table and head dim

On a GPU it ends when the minutes are over. What most models use comes first: heads of 128 and 64 in 16 bits, decoding before
forward before backward; of each table the tile that ships and those that differ little from it, and the others when all tables
have those. After every tile, the file has all that are timed so far, the command, and the tables that were not reached. It
goes under benchmarks/results, to be committed; with the variable FASTGPT_RESULTS under that folder. As many processes as there
are cores compile ahead.

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

import torch
import triton

from benchmarks.machine_code import compile_for, demanding, usage_of
from fastgpt.kernels import attention_backward as backward
from fastgpt.kernels import attention_decode as decode
from fastgpt.kernels import attention_forward as forward
from fastgpt.kernels.architecture import ARCHITECTURES, architecture
from fastgpt.kernels.attention_forward import Tile

TABLES = {"forward": forward.TILES, "rich forward": forward.RICH_TILES, **backward.TILES}
DECODE = "decode"  # the tile for few rows: queries of heads that share keys
RICH = {"alibi_ptr", "mask_ptr", "bias_ptr", "block_table_ptr", "k_scale_ptr", "seed_ptr"}
PASSES = {
    "_attention_forward": "forward", "_backward_keys": "keys", "_backward_queries": "queries", "_backward_bias": "queries",
}  # fmt: skip


def candidates():
    """Larger tiles first, then more stages, then fewer warps. Tiles of 16 rows are for fp32 and wide heads."""
    sizes = sorted(itertools.product((128, 64, 32, 16), repeat=2), key=lambda size: (-size[0] * size[1], -size[0]))
    return [Tile(m, n, warps, stages) for (m, n) in sizes for stages in (4, 3, 2, 1) for warps in (4, 8)]


def decode_candidates(ships: decode.Tile) -> list[decode.Tile]:
    sizes = itertools.product((16, 32, 64, 128), (128, 256, 512, 1024), (2, 4, 8), (2, 3, 4, 5))
    return [decode.Tile(ships.BLOCK_M, *size, ships.maxnreg) for size in sizes]


def tiles_of(table: str, key: tuple[int, int], arch: int) -> tuple[tuple, list]:
    """The tile that ships, and all that might."""
    if table == DECODE:
        ships = decode.TILES[key][1]
        return ships, decode_candidates(ships)
    return TABLES[table][key][ARCHITECTURES.index(arch)], candidates()


@functools.cache
def kernels_of(table: str, key: tuple[int, int], arch: int) -> list:
    """The kernels that decide whether a tile fits, as machine_code.demanding gives them."""
    chosen = []
    modules = [decode] if table == DECODE else [forward, backward]
    for configuration in demanding([kernel for module in modules for kernel in module.aot_configurations(arch)]):
        function, dtype, cache_dtype, constants, given = configuration
        if (constants["BLOCK_D"], dtype.itemsize) != key:
            continue
        if table == DECODE:
            fits_table = function.__name__ == "_attend_split" and constants["BLOCK_M"] == decode.TILES[key][1].BLOCK_M
        else:
            fits_table = ("rich " if RICH & set(given) else "") + PASSES[function.__name__] == table
        if fits_table:
            chosen.append(configuration)
    return chosen


def fit(tile, kernels: list, arch: int) -> tuple[bool, str]:
    """Whether a tile fits, and what its worst kernel takes."""
    worst = None
    for function, dtype, cache_dtype, constants, given in kernels:
        try:
            usage = usage_of(compile_for(arch, function, dtype, cache_dtype, constants | tile._asdict(), given))
        except Exception as error:  # what the compiler throws is not of one kind
            return False, f"{type(error).__name__} in the compiler"
        worst = usage if worst is None else max(worst, usage, key=lambda x: (x.spilled, x.registers))
        if usage.faults(arch):
            return False, ", ".join(usage.faults(arch))
    return True, f"{worst.registers} registers, {worst.shared // 1024} KiB"


def decode_seconds(key: tuple[int, int], tile: decode.Tile) -> float:
    """Median time of one query for each of 32 heads over 8,192 keys of 8 heads, 8 sequences, in a CUDA graph: more keys than
    a cache holds."""
    head_dim, size = key
    entry, decode.TILES[key] = decode.TILES[key], (decode.TILES[key][0], tile)
    decode._constants.cache_clear()
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
        decode.TILES[key] = entry
        decode._constants.cache_clear()


def seconds(table: str, key: tuple[int, int], tile, arch: int) -> float:
    """Median time of a causal pass over 8,192 tokens, or 2,048 in fp32, with this tile; of the backward, both passes."""
    if table == DECODE:
        return decode_seconds(key, tile)
    head_dim, size = key
    entry = TABLES[table][key]
    i = ARCHITECTURES.index(arch)
    TABLES[table][key] = (*entry[:i], tile, *entry[i + 1 :])
    forward._constants.cache_clear()
    backward._constants.cache_clear()
    tokens, dtype = (8192, torch.bfloat16) if size == 2 else (2048, torch.float32)
    q, k, v, dout = (torch.randn(2, 16, tokens, head_dim, device="cuda", dtype=dtype) for _ in range(4))
    options = {"scale": head_dim**-0.5}
    if table.startswith("rich"):
        options["softcap"] = 20.0
    try:
        out, lse = forward.attention_forward(q, k, v, **options)
        if "forward" in table:
            return triton.testing.do_bench(lambda: forward.attention_forward(q, k, v, **options), return_mode="median") / 1e3
        run = lambda: backward.attention_backward(dout, None, q, k, v, out, lse, **options)  # noqa: E731
        return triton.testing.do_bench(run, return_mode="median") / 1e3
    finally:
        TABLES[table][key] = entry
        forward._constants.cache_clear()
        backward._constants.cache_clear()


class Job(NamedTuple):
    """A tile to be timed: what is stored of it, a function of what to find out whether it fits, and one that times it."""

    row: dict
    fit: tuple  # function, argument, ...; for another process
    seconds: Callable[[], float]


def tables(asked: list[str] | None, head_dims: list[int] | None, sizes: list[int] | None) -> list[tuple[str, tuple[int, int]]]:
    """(table, (head dim, bytes of an element)): what most models use comes first."""
    usual, order = {128: 0, 64: 1, 256: 2, 32: 3, 16: 4}, [DECODE, *TABLES]
    chosen = [
        (table, key)
        for table, key in itertools.product(asked or order, forward.TILES)
        if key[0] in (head_dims or (key[0],)) and key[1] in (sizes or (key[1],))
    ]

    def rank(entry):
        table, (head_dim, size) = entry
        return size == 4, "rich" in table, usual[head_dim] > 1, order.index(table), usual[head_dim]

    return sorted(chosen, key=rank)


def distance(tile, other) -> float:
    """In how many doublings and stages two tiles differ."""
    sizes = zip(tile._replace(num_stages=1), other._replace(num_stages=1))
    return sum(abs(math.log2(a / b)) for a, b in sizes) + abs(tile.num_stages - other.num_stages)


def jobs_of(chosen: list, arch: int) -> list[Job]:
    """The most telling first."""
    jobs = []
    for place, (table, key) in enumerate(chosen):
        ships, tiles = tiles_of(table, key, arch)
        for tile in tiles:
            row = {"table": table, "head dim": key[0], "bytes": key[1], "tile": list(tile), "ships": tile == ships}
            job = Job(row, (fit_of, table, key, tile, arch), functools.partial(seconds, table, key, tile, arch))
            jobs.append(((distance(tile, ships) > 2, place, distance(tile, ships)), job))
    return [job for _, job in sorted(jobs, key=lambda ranked: ranked[0])]


def fit_of(table: str, key: tuple[int, int], tile, arch: int) -> tuple[bool, str]:
    return fit(tile, kernels_of(table, key, arch), arch)


def sweep(jobs: list[Job], minutes: float, store: Callable[[dict], object]) -> None:
    """Times tiles until the minutes are over. store: takes what there is so far."""

    def place(row):
        of_tile = ("tile", "ships", "fits", "seconds", "problem")
        return ", ".join(f"{name} {value}" for name, value in row.items() if name not in of_tile)

    end, results = time.monotonic() + 60 * minutes, []
    command = shlex.join(["python", "-m", "benchmarks.sweep_tiles", *sys.argv[1:]])
    unreached = dict.fromkeys(place(job.row) for job in jobs)
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
            unreached.pop(place(row), None)
            print(*row.values(), sep="\t", flush=True)
            with contextlib.redirect_stdout(None):
                store({"command": command, "not reached": list(unreached), "tiles": results})
            if time.monotonic() > end:
                break
        pool.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="compile for it instead of timing")
    parser.add_argument("--table", choices=(DECODE, *TABLES), action="append", help="default: all")
    parser.add_argument("--head-dim", type=int, choices=(16, 32, 64, 128, 256), action="append", help="default: all")
    parser.add_argument("--bytes", type=int, choices=(2, 4), action="append", help="of an element; default: both")
    parser.add_argument("--first", action="store_true", help="stop at the first that fits")
    parser.add_argument("--minutes", type=float, default=9.0, help="of timing; default: %(default)s")
    args = parser.parse_args()
    chosen = tables(args.table, args.head_dim, args.bytes)
    if args.arch is None:
        if not torch.cuda.is_available():
            parser.error("--arch: expected, as there is no GPU here to time on")
        from benchmarks.report import machine, store

        about, jobs = machine(), jobs_of(chosen, architecture(torch.device("cuda")))
        sweep(jobs, args.minutes, lambda result: store("tiles", result, about))
        return
    for table, key in chosen:
        kernels = kernels_of(table, key, args.arch)
        ships, tiles = tiles_of(table, key, args.arch)
        for tile in tiles:
            fits, what = fit(tile, kernels, args.arch)
            if fits or not args.first:
                print(table, *key, list(tile), tile == ships, what, sep="\t", flush=True)
            if fits and args.first:
                break


if __name__ == "__main__":
    main()
