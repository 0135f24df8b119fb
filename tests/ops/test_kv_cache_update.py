"""kv_cache_update: exact over random shapes, strides and positions; untouched slots keep their sentinel."""

import os
import subprocess
import sys

import pytest
import torch
from cache_updates import SENTINEL, WRITTEN, angles
from cpu_levels import lower_levels
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from fastgpt import (
    kv_cache_update,
    kv_cache_update_reference,
    rope_kv_cache_update,
    rope_kv_cache_update_reference,
)
from fastgpt.ops.kv_cache_update import rope_reference
from fastgpt.ops.quantization import dequantize, quantize
from fastgpt.testing import numerics

pytestmark = pytest.mark.threads

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def layouts(aligned):
    """How a (B, H, N, D) tensor lies in memory: a permutation of its first three dimensions, and padding of rows."""
    return st.tuples(st.permutations([0, 1, 2]), st.sampled_from([0, 8, 16] if aligned else [0, 1, 3]))


def laid_out(x, layout):
    """x with the same values in another memory layout; the last dimension stays contiguous."""
    order, padding = layout
    storage = sentinel((*(x.shape[i] for i in order), x.shape[3] + padding), x.dtype)
    view = storage[..., : x.shape[3]].permute(*(order.index(i) for i in range(3)), 3)
    return view.copy_(x)


def tokens(B, H, T, D, dtype):
    return torch.randn(B, H, T, D).to(dtype)


def sentinel(shape, dtype):
    """A tensor of a value that no update writes."""
    if dtype == torch.float8_e4m3fn:
        return torch.full(shape, 0x7F, dtype=torch.uint8).view(dtype)  # NaN
    return torch.full(shape, int(SENTINEL) if dtype == torch.int8 else SENTINEL, dtype=dtype)


def same(a, b):
    """Equal bit for bit, NaN included."""
    flat = (x.flatten().clone(memory_format=torch.contiguous_format) for x in (a, b))
    return a.shape == b.shape and torch.equal(*(x.view(torch.uint8) for x in flat))


def draw_update(data, min_dim=1):
    """Random arguments of kv_cache_update, as a dict."""
    B, H, T, S = (data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 3), (0, 9), (1, 12)))
    aligned = data.draw(st.booleans())  # as wide accesses want it
    dims = st.sampled_from([16, 32, 64, 80, 96, 128, 256]) if aligned else st.integers(min_dim, 80)
    D = data.draw(dims)
    D_v = data.draw(st.just(D) | dims)
    dtype = data.draw(st.sampled_from(DTYPES))
    cache_dtype = data.draw(st.sampled_from([dtype, torch.int8, torch.float8_e4m3fn]))
    index = data.draw(st.sampled_from([torch.int32, torch.int64]))
    page = data.draw(st.none() | st.integers(1, 5))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))

    first, rows, block_table = B, S, None
    if page:
        pages = -(-S // page)
        first, rows, S = B * pages + 2, page, pages * page
        block_table = torch.randperm(first)[: B * pages].view(B, pages).int()  # every sequence has pages of its own
        if data.draw(st.booleans()):
            block_table = block_table.mT.contiguous().mT
    # Numbers of very different size, zeros among them.
    size = 10.0 ** torch.randint(-6, 4, (B, H, T, 1)) * (torch.rand(B, H, T, 1) < 0.9)
    k, v = (laid_out(tokens(B, H, T, x, torch.float32).mul(size).to(dtype), data.draw(layouts(aligned))) for x in (D, D_v))
    caches = [laid_out(sentinel((first, H, rows, x), cache_dtype), data.draw(layouts(aligned))) for x in (D, D_v)]
    scales = [None, None]
    if cache_dtype != dtype:
        scales = [laid_out(torch.full((first, H, rows, 1), SENTINEL), data.draw(layouts(aligned)))[..., 0] for _ in range(2)]
    # Distinct slots within a row, and some tokens skipped.
    slots = torch.stack([torch.randperm(max(S, T))[:T] for _ in range(B)])
    positions = slots.masked_fill((slots >= S) | (torch.rand(B, T) < 0.2), -1).to(index)
    if data.draw(st.booleans()):
        positions = positions.mT.contiguous().mT
    arguments = {"k": k, "v": v, "k_cache": caches[0], "v_cache": caches[1], "positions": positions}
    return arguments | {"block_table": block_table, "k_scale": scales[0], "v_scale": scales[1]}


def with_copies(arguments):
    """The same arguments with a copy of what is written."""
    return arguments | {name: x if x is None else x.clone() for name, x in arguments.items() if name in WRITTEN}


def assert_same_cache(actual, expected, before, slots):
    """Every slot, and that only those named by `slots` (B, T) differ from `before`."""
    for name in WRITTEN:
        if actual[name] is None:
            continue
        assert same(actual[name], expected[name]), name
        cache, unwritten = actual[name], before[name]
        touched = torch.zeros(cache.shape[0], cache.shape[2], dtype=torch.bool)
        for b, row in enumerate(slots.tolist()):
            for slot in row:
                if slot >= 0 and actual["block_table"] is not None:
                    touched[actual["block_table"][b, slot // cache.shape[2]], slot % cache.shape[2]] = True
                elif slot >= 0:
                    touched[b, slot] = True
        assert same(cache.transpose(1, 2)[~touched], unwritten.transpose(1, 2)[~touched]), name


@pytest.mark.slow
@settings(max_examples=250)
@given(st.data())
def test_exact(data):
    actual = draw_update(data)
    expected, before = with_copies(actual), with_copies(actual)
    kv_cache_update_reference(**expected)
    kv_cache_update(**actual)
    assert_same_cache(actual, expected, before, actual["positions"])


@pytest.mark.slow
@settings(max_examples=250)
@given(st.data())
def test_rope_exact(data):
    actual = draw_update(data, min_dim=2)
    B, H_kv, T, D = actual["k"].shape
    aligned = D % 16 == 0
    q = laid_out(tokens(B, H_kv * data.draw(st.integers(1, 3)), T, D, actual["k"].dtype), data.draw(layouts(aligned)))
    rotation = {"interleaved": data.draw(st.booleans())}
    pairs = st.sampled_from([D // 4, D // 2]) if aligned else st.integers(1, D // 2)
    rotation["cos"], rotation["sin"] = angles(70, data.draw(pairs))
    slots = actual["positions"]
    elsewhere = {}
    if data.draw(st.booleans()):  # stored elsewhere than at the position
        elsewhere["slots"] = slots
        actual["positions"] = torch.randint(-1, 50, (B, T)).to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    expected, before = with_copies(actual), with_copies(actual)
    expected_q = rope_kv_cache_update_reference(q, **expected, **rotation, **elsewhere)
    actual_q = rope_kv_cache_update(q, **actual, **rotation, **elsewhere)
    assert_same_cache(actual, expected, before, slots)
    assert same(actual_q, expected_q) and (T == 0 or actual_q.is_contiguous())
    # Rotated first and stored afterwards, it is the same cache.
    apart = with_copies(before)
    k = rope_reference(before["k"], before["positions"], **rotation)
    kv_cache_update(**apart | {"k": k, "positions": slots})
    assert_same_cache(actual, apart, before, slots)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_meets_the_numerics_contract(dtype, interleaved):
    """Against float64: the rotation is what it says, by a rotation matrix rather than by the reference's formula."""
    torch.manual_seed(0)
    q, positions = tokens(2, 4, 7, 40, dtype), torch.randint(0, 500, (2, 7))
    cos, sin = angles(500, 12)  # of the first 24 dimensions
    matrix = torch.eye(40, dtype=torch.float64).repeat(2, 7, 1, 1)  # (B, T, D, D)
    for n in range(12):
        i, j = (2 * n, 2 * n + 1) if interleaved else (n, n + 12)
        c, s = cos[positions, n].double(), sin[positions, n].double()
        matrix[:, :, i, i], matrix[:, :, j, j], matrix[:, :, i, j], matrix[:, :, j, i] = c, c, -s, s
    cache = torch.zeros(2, 4, 500, 40, dtype=dtype)
    actual = rope_kv_cache_update(q, q, q, cache, cache.clone(), positions, cos, sin, interleaved=interleaved)
    numerics.check(actual, lambda: torch.einsum("btij,bhtj->bhti", matrix, q.double()))
    assert same(cache[torch.arange(2)[:, None], :, positions].transpose(1, 2), actual)  # keys are rotated likewise


def test_quantization_of_every_half():
    """Each fp16 number, among rows of its own size and of larger ones."""
    x = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    x = x[x.isfinite()].float().view(-1, 8)
    x = torch.cat([x, x * 1.7, x.flip(0) + x], 1).view(1, 1, -1, 24)
    positions = torch.arange(x.shape[2]).unsqueeze(0)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        caches = torch.empty(2, *x.shape, dtype=dtype)
        scales = torch.empty(2, *x.shape[:3])
        kv_cache_update(x, -x, *caches, positions, k_scale=scales[0], v_scale=scales[1])
        for cache, scale, source in zip(caches, scales, (x, -x), strict=True):
            values, expected = quantize(source, dtype)
            assert same(cache, values) and same(scale, expected)
            # Half a step of int8; half a unit of the mantissa's last place, or of the smallest subnormal, of e4m3.
            error = (dequantize(cache, scale).double() - source.double()).abs()
            step = scale.unsqueeze(-1).double()
            bound = step / 2 if dtype == torch.int8 else torch.maximum(source.double().abs() / 16, step * 2**-10)
            assert (error <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_that_cannot_be_quantized(dtype):
    """NaN and infinity are seen by whoever reads the row; what is too small is zero."""
    x = torch.ones(1, 1, 5, 8)
    x[0, 0, 0, 3], x[0, 0, 1, 0], x[0, 0, 2], x[0, 0, 3] = torch.nan, -torch.inf, 0.0, 1e-31
    cache, scale = torch.zeros(1, 1, 5, 8, dtype=dtype), torch.zeros(1, 1, 5)
    kv_cache_update(x, x, cache, cache.clone(), torch.arange(5)[None], k_scale=scale, v_scale=scale.clone())
    read = dequantize(cache, scale)[0, 0]
    assert read[:2].isnan().all() and (read[2:4] == 0).all() and (read[4] == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("level", lower_levels())
def test_lower_cpu_levels(level):
    """The tests of exactness again, in a process that is forced to a lower instruction set."""
    selected = "exact or every_half or contract"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", selected, "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"FASTGPT_CPU_LEVEL": level}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt_and_then_single_tokens(dtype):
    k, v = tokens(2, 3, 40, 64, dtype), tokens(2, 3, 40, 64, dtype)
    k_cache, v_cache = (torch.full((2, 3, 50, 64), SENTINEL, dtype=dtype) for _ in range(2))
    positions = torch.arange(40, dtype=torch.int32).expand(2, 40)
    kv_cache_update(k[:, :, :37], v[:, :, :37], k_cache, v_cache, positions[:, :37])
    for t in range(37, 40):
        kv_cache_update(k[:, :, t : t + 1], v[:, :, t : t + 1], k_cache, v_cache, positions[:, t : t + 1])
    assert torch.equal(k_cache[:, :, :40], k) and torch.equal(v_cache[:, :, :40], v)
    assert (k_cache[:, :, 40:] == SENTINEL).all() and (v_cache[:, :, 40:] == SENTINEL).all()


def test_large_update_in_parallel():
    k, v = tokens(2, 8, 2000, 64, torch.float32), tokens(2, 8, 2000, 64, torch.float32)
    caches = [torch.full((2, 8, 2100, 64), SENTINEL) for _ in range(2)]
    positions = torch.stack([torch.randperm(2100)[:2000] for _ in range(2)])
    expected = [cache.clone() for cache in caches]
    kv_cache_update(k, v, *caches, positions)
    kv_cache_update_reference(k, v, *expected, positions)
    assert all(map(torch.equal, caches, expected))


def test_last_write_wins_for_duplicate_slots():
    k = torch.arange(3.0).view(1, 1, 3, 1)
    cache = torch.full((2, 1, 1, 4, 1), SENTINEL)
    kv_cache_update(k, k, *cache, torch.tensor([[2, 2, 2]]))
    assert cache[0].flatten().tolist() == [SENTINEL, SENTINEL, 2.0, SENTINEL]


@pytest.mark.slow
def test_opcheck():
    k, v = tokens(1, 2, 3, 4, torch.float32), tokens(1, 2, 3, 4, torch.float32)
    positions, table = torch.tensor([[0, -1, 4]]), torch.tensor([[2, 0]], dtype=torch.int32)
    plain = (torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), positions)
    paged = (torch.zeros(3, 2, 3, 4, dtype=torch.int8), torch.zeros(3, 2, 3, 4, dtype=torch.int8), positions)
    options = (table, torch.zeros(3, 2, 3), torch.zeros(3, 2, 3))
    torch.library.opcheck(torch.ops.fastgpt.kv_cache_update.default, (k, v, *plain))
    torch.library.opcheck(torch.ops.fastgpt.kv_cache_update.default, (k, v, *paged, *options))
    q = tokens(1, 4, 3, 4, torch.float32)
    torch.library.opcheck(torch.ops.fastgpt.rope_kv_cache_update.default, (q, k, v, *plain, *angles(5, 2)))
    torch.library.opcheck(
        torch.ops.fastgpt.rope_kv_cache_update.default, (q, k, v, *paged, *angles(5, 2), positions, True, *options)
    )


def test_explain():
    k, positions = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, dtype=torch.int32)
    for reasons in (
        fastgpt.explain(kv_cache_update, k, k, k.clone(), k.clone(), positions),
        fastgpt.explain(rope_kv_cache_update, k, k, k, k.clone(), k.clone(), positions, *angles(1, 2)),
    ):
        assert reasons["cpp"] == "chosen" and reasons["reference"] == "available"
        assert list(reasons) == ["cpp", "cuda", "triton", "reference"]
        assert reasons["cuda"] == reasons["triton"] == "it runs on CUDA tensors, and k is on cpu"


def test_a_named_implementation_does_not_fall_back():
    k, cache = torch.ones(1, 1, 1, 4), torch.zeros(2, 1, 1, 1, 4)
    kv_cache_update(k, k, *cache, torch.zeros(1, 1, dtype=torch.int32), impl="reference")
    assert (cache == 1).all()
    for impl in ("cuda", "triton"):
        with pytest.raises(ValueError, match=f"impl='{impl}' cannot serve this call: it runs on CUDA tensors"):
            kv_cache_update(k, k, *cache, torch.zeros(1, 1, dtype=torch.int32), impl=impl)
        with pytest.raises(ValueError, match=f"impl='{impl}' cannot serve this call: it runs on CUDA tensors"):
            rope_kv_cache_update(k, k, k, *cache, torch.zeros(1, 1, dtype=torch.int32), *angles(1, 2), impl=impl)
    with pytest.raises(ValueError, match="impl='cpp' cannot serve this call: it takes fp32, fp16 and bf16"):
        kv_cache_update(*[k.double()] * 4, torch.zeros(1, 1, dtype=torch.int32), impl="cpp")


def test_rope_reference_gradients():
    x = torch.randn(2, 3, 4, 10, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 3], [-1, -1, 5, 9]])
    cos, sin = (table.double() for table in angles(9, 4))
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(lambda x: rope_reference(x, positions, cos, sin, interleaved=interleaved), x)


# Errors: each names the argument, and nothing is written.

X = torch.ones(2, 3, 2, 8)
CACHE = (2, 3, 5, 8)
POSITIONS = torch.tensor([[0, 1], [2, 3]])
SCALE = torch.zeros(CACHE[:3])
TABLE = torch.zeros(2, 2, dtype=torch.int32) + torch.tensor([[0], [1]], dtype=torch.int32)

BAD = {
    "not a tensor": ({"k": None}, TypeError, "k: expected a torch.Tensor, got NoneType"),
    "dimensions": ({"v": X[0]}, ValueError, "v: expected 4 dimensions"),
    "dtype": ({"k": X.int()}, TypeError, "k: expected dtype .* got torch.int32"),
    "mixed dtypes": ({"v": X.half()}, TypeError, "v: expected dtype torch.float32, got torch.float16"),
    "cache dtype": ({"k_cache": torch.zeros(CACHE).half()}, TypeError, "k_cache: expected dtype torch.float32 or .*int8"),
    "cache dtypes": ({"v_cache": torch.zeros(CACHE).half()}, TypeError, "v_cache: expected dtype torch.float32, got"),
    "heads": ({"k_cache": torch.zeros(2, 4, 5, 8)}, ValueError, r"k_cache: expected shape \(2, 3, 5, 8\)"),
    "head dim": ({"k_cache": torch.zeros(2, 3, 5, 9)}, ValueError, r"k_cache: expected shape \(2, 3, 5, 8\)"),
    "capacities": ({"v_cache": torch.zeros(2, 3, 6, 8)}, ValueError, r"v_cache: expected shape \(2, 3, 5, 8\)"),
    "v": ({"v": X[:, :, :1]}, ValueError, r"v: expected shape \(2, 3, 2, 8\) .*, got \(2, 3, 1, 8\)"),
    "device": ({"k_cache": torch.zeros(CACHE, device="meta")}, ValueError, "k_cache: expected device cpu, got meta"),
    "stride": ({"k": torch.ones(2, 3, 8, 2).mT}, ValueError, "k: expected a contiguous last dimension"),
    "cache stride": ({"k_cache": torch.ones(2, 3, 8, 5).mT}, ValueError, "k_cache: expected a contiguous last dimension"),
    "positions shape": ({"positions": POSITIONS[:, :1]}, ValueError, r"positions: expected shape \(2, 2\) \(B, T\)"),
    "positions dtype": ({"positions": POSITIONS.float()}, TypeError, "positions: expected dtype torch.int32 or"),
    "position": (
        {"positions": torch.tensor([[0, 1], [2, 5]])},
        ValueError,
        "positions: expected values below the cache's capacity of 5, got 5",
    ),
    "no scale": (
        {"k_cache": torch.zeros(CACHE).char(), "v_cache": torch.zeros(CACHE).char(), "v_scale": SCALE},
        ValueError,
        "k_scale: expected a scale for a cache of torch.int8, got None",
    ),
    "scale not taken": ({"v_scale": SCALE}, ValueError, "v_scale: expected None for a cache of torch.float32"),
    "scale shape": (
        {"k_cache": torch.zeros(CACHE).char(), "v_cache": torch.zeros(CACHE).char(), "k_scale": SCALE, "v_scale": SCALE[:1]},
        ValueError,
        r"v_scale: expected shape \(2, 3, 5\) \(B, H_kv, S\) to match k_cache, got \(1, 3, 5\)",
    ),
    "scale dtype": (
        {"k_cache": torch.zeros(CACHE).char(), "v_cache": torch.zeros(CACHE).char(), "k_scale": SCALE.half()},
        TypeError,
        "k_scale: expected dtype torch.float32",
    ),
    "table dtype": ({"block_table": TABLE.long()}, TypeError, "block_table: expected dtype torch.int32"),
    "table shape": ({"block_table": TABLE[:1]}, ValueError, r"block_table: expected shape \(2, 2\) \(B, pages\)"),
    "table dimensions": ({"block_table": TABLE[0]}, ValueError, "block_table: expected 2 dimensions"),
    "page": ({"block_table": TABLE + 1}, ValueError, "block_table: expected pages from 0 to 1, got 2"),
    "page below 0": ({"block_table": TABLE - 1}, ValueError, "block_table: expected pages from 0 to 1, got -1"),
    "position past the table": (
        {"block_table": TABLE[:, :1], "positions": torch.tensor([[0, 1], [2, 5]])},
        ValueError,
        "positions: expected values below the cache's capacity of 5, got 5",
    ),
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("case", BAD)
def test_errors(case, impl):
    change, error, message = BAD[case]
    arguments = {"k": X, "v": X, "k_cache": torch.zeros(CACHE), "v_cache": torch.zeros(CACHE), "positions": POSITIONS}
    arguments |= change
    written = [x for name, x in arguments.items() if name in WRITTEN and x.device.type == "cpu"]
    before = [x.clone() for x in written]
    with pytest.raises(error, match=message):
        kv_cache_update(**arguments, impl=impl)
    rotation = {"q": X, "cos": torch.ones(9, 4), "sin": torch.ones(9, 4)}
    with pytest.raises(error, match=message):
        rope_kv_cache_update(**arguments, **rotation, impl=impl)
    assert all(map(torch.equal, written, before))


ANGLES = torch.ones(6, 4)

BAD_ROTATION = {
    "q": ({"q": X[0]}, ValueError, "q: expected 4 dimensions"),
    "q dtype": ({"q": X.half()}, TypeError, "q: expected dtype torch.float32, got torch.float16"),
    "q shape": ({"q": X[:, :, :1]}, ValueError, r"q: expected shape \(2, 3, 2, 8\) \(B, H, T, D\) to match k"),
    "q stride": ({"q": torch.ones(2, 3, 8, 2).mT}, ValueError, "q: expected a contiguous last dimension"),
    "q device": ({"q": X.to("meta")}, ValueError, "q: expected device cpu, got meta"),
    "cos": ({"cos": None}, TypeError, "cos: expected a torch.Tensor, got NoneType"),
    "cos columns": ({"cos": torch.ones(6, 5)}, ValueError, r"cos: expected from 1 to D / 2 = 4 columns, got .*\(6, 5\)"),
    "cos dtype": ({"cos": ANGLES.half()}, TypeError, "cos: expected dtype torch.float32, got torch.float16"),
    "sin shape": ({"sin": ANGLES[:5]}, ValueError, r"sin: expected shape \(6, 4\) to match cos, got \(5, 4\)"),
    "sin stride": ({"sin": torch.ones(4, 6).mT}, ValueError, "sin: expected a contiguous last dimension"),
    "angle": ({"cos": ANGLES[:3], "sin": ANGLES[:3]}, ValueError, "positions: expected values below the 3 rows of cos, got 3"),
    "slots shape": ({"slots": POSITIONS[:1]}, ValueError, r"slots: expected shape \(2, 2\)"),
    "slot": ({"slots": POSITIONS + 2}, ValueError, "slots: expected values below the cache's capacity of 5, got 5"),
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("case", BAD_ROTATION)
def test_rotation_errors(case, impl):
    change, error, message = BAD_ROTATION[case]
    caches = torch.full((2, *CACHE), SENTINEL)
    arguments = {"q": X, "k": X, "v": X, "k_cache": caches[0], "v_cache": caches[1], "positions": POSITIONS}
    with pytest.raises(error, match=message):
        rope_kv_cache_update(**arguments | {"cos": ANGLES, "sin": ANGLES} | change, impl=impl)
    assert (caches == SENTINEL).all()


def test_last_write_wins_in_the_reference_on_any_number_of_threads():
    T = 3000
    k, threads = torch.arange(T * 64.0).view(1, 1, T, 64), torch.get_num_threads()
    positions = torch.arange(T).view(1, T) % 7
    try:
        torch.set_num_threads(3)
        for impl in ("reference", "cpp"):
            caches = torch.zeros(2, 1, 1, 7, 64)
            kv_cache_update(k, k, *caches, positions, impl=impl)
            last = [max(t for t in range(T - 7, T) if t % 7 == slot) for slot in range(7)]
            assert torch.equal(caches[0, 0, 0], k[0, 0, last]) and torch.equal(caches[1], caches[0])
    finally:
        torch.set_num_threads(threads)


def writers(q, k, v, k_cache, v_cache):
    """Each operation that writes to a cache, called with these: name -> call."""
    positions, angles = torch.arange(k.shape[2])[None], torch.ones(8, k.shape[3] // 2)
    return {
        "update": lambda: kv_cache_update(k, v, k_cache, v_cache, positions),
        "rope": lambda: rope_kv_cache_update(q, k, v, k_cache, v_cache, positions, angles, 0 * angles),
        "attention": lambda: fastgpt.attention_with_kv_cache(q, k, v, k_cache, v_cache, positions),
    }


WRITERS = ["update", "rope", "attention"]


def without_gradients():
    with torch.no_grad():
        return torch.zeros(2, 1, 2, 8, 16).select(0, 0), torch.zeros(2, 1, 2, 8, 16).select(0, 1)


def inference():
    with torch.inference_mode():
        return torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16)


UNWRITABLE = {
    "unpacked": (lambda: torch.zeros(2, 1, 2, 8, 16), "one of several views"),
    "split": (lambda: torch.zeros(1, 2, 8, 32).split(16, dim=-1), "one of several views"),
    "made without gradients": (without_gradients, "a view made under torch.no_grad"),
    "made in inference mode": (inference, "a tensor made in inference mode"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("case", UNWRITABLE)
def test_views_that_autograd_does_not_let_be_written(case, writer):
    make, message = UNWRITABLE[case]
    for name in ("k", "v"):
        k_cache, v_cache = make()
        q, k, v = torch.randn(3, 1, 2, 6, 16).unbind()
        {"k": k, "v": v}[name].requires_grad_()
        call = writers(q, k, v, k_cache, v_cache)[writer]
        with pytest.raises(
            ValueError, match=f"^{name}_cache: expected a tensor that autograd allows in-place .*, got {message}"
        ):
            call()
        assert not k_cache.any() and not v_cache.any()
        with torch.no_grad():
            call()
        assert torch.equal(v_cache[:, :, :6], v)


ANOTHER_PYTORCH = """
import torch
del torch._C._autograd._get_creation_meta, torch._C._autograd.CreationMeta
import fastgpt
k, v, k_cache, v_cache = torch.randn(1, 2, 6, 16, requires_grad=True), torch.randn(1, 2, 6, 16), *torch.zeros(2, 1, 2, 8, 16)
try:
    fastgpt.kv_cache_update(k, v, k_cache, v_cache, torch.arange(6)[None])
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_pytorch_that_does_not_tell_how_views_were_made():
    """Its name for that is not public. The package loads, and the write is refused in PyTorch's words."""
    result = subprocess.run([sys.executable, "-c", ANOTHER_PYTORCH], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("k_cache: expected a tensor that allows in-place writes, got: ")


def test_caches_that_are_parts_of_one_tensor_carry_gradients():
    q, k, v, dk, dv = torch.randn(5, 1, 2, 6, 16).unbind()
    k.requires_grad_(), v.requires_grad_()
    whole = torch.zeros(2, 1, 2, 8, 16)
    kv_cache_update(k, v, whole[0], whole[1], torch.arange(6)[None])
    (whole[0, :, :, :6] * dk + whole[1, :, :, :6] * dv).sum().backward()
    assert torch.equal(k.grad, dk) and torch.equal(v.grad, dv)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("negated", ["new", "k_cache", "v_cache", "caches", "all"])
def test_views_that_negate(negated, writer):
    """The imaginary part of a conjugate is one."""
    new, caches = torch.randn(3, 1, 2, 6, 16), torch.randn(2, 1, 2, 8, 16)

    def run(given):
        q, k, v = (torch._neg_view(-x) if given in ("new", "all") else x for x in new)
        k_cache, v_cache = (
            torch._neg_view(-x) if given in ("caches", "all", name) else x.clone()
            for name, x in zip(("k_cache", "v_cache"), caches)
        )
        out = writers(q, k, v, k_cache, v_cache)[writer]()
        return [x.resolve_neg() for x in (out, k_cache, v_cache) if x is not None]

    for actual, expected in zip(run(negated), run(None), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("mapped", ["k", "v"])
def test_a_cache_that_is_the_same_for_all_of_vmap(mapped, writer):
    q, k, v = torch.randn(3, 1, 2, 6, 16).unbind()
    k_cache, v_cache = torch.zeros(2, 1, 2, 8, 16).unbind()

    def one(x):
        writers(q, x if mapped == "k" else k, x if mapped == "v" else v, k_cache, v_cache)[writer]()
        return x

    with pytest.raises(ValueError, match=f"^{mapped}_cache: expected a tensor that allows in-place writes, got"):
        torch.func.vmap(one)(torch.stack([k, v]))
    assert not k_cache.any() and not v_cache.any()
