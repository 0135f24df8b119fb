"""The sweep of tiles keeps to its time limit, begins with what matters most, and stores each result as it comes."""

import concurrent.futures

import pytest

pytest.importorskip("triton")

from benchmarks import sweep_tiles  # noqa: E402
from benchmarks.sweep_tiles import TABLES, Tile, tiles  # noqa: E402


class Here:
    """Instead of a pool of processes."""

    def __init__(self, *_, **__): ...

    __enter__ = lambda self: self  # noqa: E731
    __exit__ = shutdown = lambda self, *_, **__: None  # noqa: E731

    def submit(self, function, *arguments):
        future = concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def swept(monkeypatch):
    """What is stored, time after time, by a sweep in which a tile takes so many seconds of a clock that stands still else."""
    now = 0.0

    def seconds(table, key, tile, arch):
        nonlocal now
        now += 1.0
        if tile.num_stages == 1:
            raise RuntimeError("out of resources\nand more of it")
        return 0.001 * tile.num_warps

    monkeypatch.setattr(sweep_tiles, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(sweep_tiles.time, "monotonic", lambda: now)
    monkeypatch.setattr(sweep_tiles, "fit_of", lambda table, key, tile, arch: (tile.BLOCK_M > 16, "so many registers"))
    monkeypatch.setattr(sweep_tiles, "fit_of_linear", lambda *_: (True, "so many registers"))
    monkeypatch.setattr(sweep_tiles, "seconds", seconds)
    monkeypatch.setattr(sweep_tiles, "linear_seconds", lambda product, rows, dtype, tile: seconds(None, None, tile, 90))
    monkeypatch.setattr(sweep_tiles.sys, "argv", ["sweep", "--minutes", "1"])

    def swept(minutes, tables=(sweep_tiles.DECODE, *TABLES), head_dims=None, sizes=None, products=range(3)):
        stored, jobs = [], sweep_tiles.attention_jobs(tables, head_dims, sizes, 90)
        jobs += sweep_tiles.linear_jobs(products, (1, 8), sizes, 90)
        sweep_tiles.sweep(jobs, minutes, lambda result: stored.append({**result, "tiles": result["tiles"].copy()}))
        return stored

    return swept


@pytest.mark.slow
def test_partial_results_are_stored_incrementally(swept):
    stored = swept(1)
    assert [len(result["tiles"]) for result in stored] == list(range(1, len(stored) + 1))
    timed = [row for row in stored[-1]["tiles"] if "seconds" in row or "problem" in row]
    assert 60 <= len(timed) <= 61  # of one second each
    assert stored[-1]["command"] == "python -m benchmarks.sweep_tiles --minutes 1"
    assert "table with_extras forward, head dim 16, bytes 4" in stored[-1]["not reached"]
    assert "table decode, head dim 128, bytes 2" not in stored[-1]["not reached"]
    assert {row["problem"] for row in timed if row["tile"][-1] == 1} == {"RuntimeError: out of resources"}


@pytest.mark.slow
def test_the_most_telling_come_first(swept):
    rows = swept(60)[-1]["tiles"]
    assert (rows[0]["table"], rows[0]["rows"], rows[0]["bytes"], rows[0]["ships"]) == ("linear", 1, 2, True)
    near = [(row["table"], row.get("rows", row.get("head dim"))) for row in rows if row["ships"] and row["bytes"] == 2]
    expected = {"linear": [("linear", 1)] * 3, "linear of 8": [("linear", 8)] * 3}
    order = ("linear", "decode", "forward", "linear of 8", "keys", "queries")
    assert near[:14] == [entry for table in order for entry in expected.get(table, [(table, 128), (table, 64)])]
    firsts = {}
    for row in rows:
        firsts.setdefault(sweep_tiles.table_of(row), row)
    assert all(row["ships"] for row in firsts.values())
    keys = [key for table in [*TABLES.values(), tiles.DECODE] for key in table if key[0] <= 256]  # the rest few models have
    assert len(firsts) == len(keys) + 3 * 2 * 2


def test_a_named_kernel_is_swept_completely(swept):
    rows = swept(60, ["forward"], [64], [2], [])[-1]["tiles"]
    assert len(rows) == len({tuple(row["tile"]) for row in rows}) == len(sweep_tiles.candidates())
    assert sweep_tiles.distance(Tile(128, 64, 4, 3), Tile(64, 128, 8, 1)) == 5
