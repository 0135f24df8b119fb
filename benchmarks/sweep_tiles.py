"""Tiles of the Triton kernels: which fit, and on a GPU which are fastest. The tables in fastgpt/kernels come from it.

python -m benchmarks.sweep_tiles                      on a GPU: times what fits, writes results/<machine>/tiles.json
python -m benchmarks.sweep_tiles --arch 90            anywhere: registers, spilled bytes and shared memory of each tile
python -m benchmarks.sweep_tiles --arch 90 --first    the largest tile that fits, of each table and head dim
python -m benchmarks.sweep_tiles --table linear       likewise of products of few rows; --rows and --product choose some

A tile fits if no kernel that ships with it, of those under the most register pressure, spills or asks for more shared
memory than there is.
"""

import argparse
import itertools
from unittest import mock

import torch
import triton

from benchmarks.machine_code import compile_for, demanding, usage_of
from fastgpt.kernels import attention_backward as backward
from fastgpt.kernels import attention_forward as forward
from fastgpt.kernels import linear
from fastgpt.kernels.architecture import ARCHITECTURES, architecture
from fastgpt.kernels.attention_forward import Tile

TABLES = {"forward": forward.TILES, "rich forward": forward.RICH_TILES, **backward.TILES}
RICH = {"alibi_ptr", "mask_ptr", "bias_ptr", "block_table_ptr", "k_scale_ptr", "seed_ptr"}
PASSES = {
    "_attention_forward": "forward", "_backward_keys": "keys", "_backward_queries": "queries", "_backward_bias": "queries",
}  # fmt: skip


def candidates():
    """Larger tiles first, then more stages, then fewer warps. Tiles of 16 rows are for fp32 and wide heads."""
    sizes = sorted(itertools.product((128, 64, 32, 16), repeat=2), key=lambda size: (-size[0] * size[1], -size[0]))
    return [Tile(m, n, warps, stages) for (m, n) in sizes for stages in (4, 3, 2, 1) for warps in (4, 8)]


def kernels_of(table: str, key: tuple[int, int], arch: int) -> list:
    """The kernels that decide whether a tile fits, as machine_code.demanding gives them."""
    chosen = []
    for configuration in demanding([*forward.aot_configurations(arch), *backward.aot_configurations(arch)]):
        function, dtype, _, constants, given = configuration
        rich = "rich " if RICH & set(given) else ""
        if (constants["BLOCK_D"], dtype.itemsize) == key and rich + PASSES[function.__name__] == table:
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


def seconds(table: str, key: tuple[int, int], tile: Tile, arch: int) -> float:
    """Median time of a causal pass over 8,192 tokens, or 2,048 in fp32, with this tile; of the backward, both passes."""
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


def linear_candidates(rows: int, K: int, size: int, ships: linear.Tile):
    """Tiles of a product of so many rows with so many columns of `size` bytes: that which ships first."""
    most = min(triton.next_power_of_2(K), 4096)
    if rows == 1:
        shapes = itertools.product((1,), (2, 4, 8, 16, 32), (256, 512, 1024, 2048, 4096), (2, 4, 8), (1,))
    else:
        shapes = itertools.product((ships.BLOCK_M,), (16, 32, 64, 128), (32, 64, 128, 256), (4, 8), (2, 3, 4, 5))
    tiles = [linear.Tile(*shape) for shape in shapes]
    fine = [x for x in tiles if x.BLOCK_K <= most and x.BLOCK_N * x.BLOCK_K * size <= 128 * x.num_warps * 32]
    return [ships, *(tile for tile in fine if tile != ships)]


def linear_seconds(product: tuple, rows: int, dtype: torch.dtype, tile: linear.Tile) -> float:
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

    with mock.patch.object(linear, "tile_of", lambda *shape: tile):
        run()  # compiles
        return triton.testing.do_bench_cudagraph(run, return_mode="median") / 1e3 / len(weights)


def sweep_linear(args, arch: int):
    """Yields a row of results for each tile."""
    for (i, product), rows, size in itertools.product(enumerate(linear.PRODUCTS), args.rows, args.bytes or (2, 4)):
        if i not in (args.product or (i,)):
            continue
        weight_rows, K, activation, gated, given = product
        dtype = torch.bfloat16 if size == 2 else torch.float32
        ships = linear.tile_of(rows, weight_rows, K, size, "norm_weight_ptr" in given)
        for tile in linear_candidates(rows, K, size, ships):
            constants = linear._constants(tile, K, "norm_bias_ptr" not in given, activation, gated, 16 // size)
            kernel = linear._one_row if rows == 1 else linear._several_rows
            fits, what = fit(tile, [(kernel, dtype, dtype, constants, given)], arch, replaced={})
            row = {"table": "linear", "weight": f"{weight_rows} x {K}", "gated": gated, "rows": rows, "bytes": size}
            row |= {"tile": list(tile), "ships": tile == ships, "fits": what}
            if fits and args.arch is None:
                row["seconds"] = linear_seconds(product, rows, dtype, tile)
            if fits or not args.first:
                yield row
            if fits and args.first:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="compile for it instead of timing")
    parser.add_argument("--table", choices=(*TABLES, "linear"), action="append", help="default: all")
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 8), help="of linear's x; default: 1 8")
    parser.add_argument("--product", type=int, nargs="+", help="by place in kernels/linear.py's PRODUCTS; default: all")
    parser.add_argument("--head-dim", type=int, choices=(16, 32, 64, 128, 256), action="append", help="default: all")
    parser.add_argument("--bytes", type=int, choices=(2, 4), action="append", help="of an element; default: both")
    parser.add_argument("--first", action="store_true", help="stop at the first that fits")
    args = parser.parse_args()
    if args.arch is None and not torch.cuda.is_available():
        parser.error("--arch: expected, as there is no GPU here to time on")
    arch = args.arch or architecture(torch.device("cuda"))
    results = []
    tables = args.table or (*TABLES, "linear")
    if "linear" in tables:
        for row in sweep_linear(args, arch):
            results.append(row)
            print(*row.values(), sep="\t", flush=True)
    for table, key in itertools.product((table for table in tables if table in TABLES), forward.TILES):
        if key[0] not in (args.head_dim or (key[0],)) or key[1] not in (args.bytes or (key[1],)):
            continue
        kernels = kernels_of(table, key, arch)
        ships = TABLES[table][key][ARCHITECTURES.index(arch)]
        for tile in candidates():
            fits, what = fit(tile, kernels, arch)
            row = {"table": table, "head dim": key[0], "bytes": key[1], "tile": list(tile), "ships": tile == ships, "fits": what}
            if fits and args.arch is None:
                row["seconds"] = seconds(table, key, tile, arch)
            if fits or not args.first:
                results.append(row)
                print(*row.values(), sep="\t", flush=True)
            if fits and args.first:
                break
    if args.arch is None:
        from benchmarks.report import store

        store("tiles", {"tiles": results})


if __name__ == "__main__":
    main()
