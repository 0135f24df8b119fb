"""attention_with_kv_cache: what it stores is exact, what it returns is the attention over that. See interpreter.py."""

import math
from unittest import mock

import pytest
import torch
from cache_updates import angles, differing, on
from models import random_ids, random_model

import fastgpt
from fastgpt import attention_with_kv_cache, attention_with_kv_cache_reference, kv_cache_update, rope_kv_cache_update
from fastgpt.cache import base
from fastgpt.model.rope import Rope
from fastgpt.ops import attention_with_kv_cache as ops
from fastgpt.ops.attention import attention, attention_reference
from fastgpt.ops.kv_cache_update import kv_cache_update_reference, rope_kv_cache_update_reference, rope_reference
from fastgpt.ops.quantization import quantize

triton = pytest.importorskip("triton")

from interpreter import DEVICE, INTERPRETED, passed, runs_kernel, starts_the_interpreter  # noqa: E402

from fastgpt.kernels import attention_decode as kernel  # noqa: E402
from fastgpt.kernels import tiles  # noqa: E402
from fastgpt.testing.attention_features import paged  # noqa: E402
from fastgpt.testing.numerics import check  # noqa: E402

pytestmark = pytest.mark.threads

B, H, H_KV, S, D = 3, 6, 2, 100, 64
UPDATE = ("k", "v", "k_cache", "v_cache", "positions", "slots", "block_table", "k_scale", "v_scale")
ROTATION = ("cos", "sin", "interleaved")
# (dtype of the cache, page, whether slots are those of a ring)
KINDS = {
    "contiguous": (None, None, False),
    "ring": (None, None, True),
    "pages": (None, 16, False),
    "int8": (torch.int8, None, False),
    "fp8": (torch.float8_e4m3fn, None, False),
    "int8 in pages": (torch.int8, 16, False),
    "fp8 in a ring": (torch.float8_e4m3fn, None, True),
}
ROTATIONS = {"not rotated": None, "rotated": (D // 2, False), "some dimensions": (12, False), "interleaved": (20, True)}
FEATURES = {
    "plain": {},
    "window": {"window": 40},
    "all": {
        "window": 70, "softcap": 3.0, "alibi_slopes": 0.5 ** torch.arange(1.0, H + 1), "sinks": torch.linspace(-2.0, 3.0, H),
        "scale": 0.2,
    },
}  # fmt: skip


def example(
    kind="contiguous", rotation="rotated", feature="plain", dtype=torch.float16, lengths=(S, 33, 1), head_dim=D, size=S
):
    """Arguments on the CPU. Slots that no token has, and those that the new ones get, hold NaN, or a scale that is NaN."""
    torch.manual_seed(0)
    cache_dtype, page, is_ring = KINDS[kind]
    B = len(lengths)
    q, k, v = torch.randn(B, 1, H + 2 * H_KV, head_dim).to(dtype).transpose(1, 2).split((H, H_KV, H_KV), dim=1)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    arguments = {"q": q, "k": k, "v": v, "kv_lengths": lengths, "positions": lengths.unsqueeze(1) - 1}
    slots = arguments["positions"]
    if is_ring:  # full, for every other sequence
        lengths[::2] = size
        positions = lengths.unsqueeze(1).long() - 1
        positions[::2] += size + 8
        arguments |= {"positions": positions, "causal": False}
        slots = arguments["slots"] = (arguments["positions"] % size).int()
    hidden = torch.arange(size) >= lengths.unsqueeze(1)
    for b, slot in enumerate(slots.flatten().tolist()):
        hidden[b, slot] |= slot >= 0
    for name in ("k", "v"):
        x = torch.randn(B, H_KV, size, head_dim).to(dtype)
        stored = {f"{name}_cache": x}
        if cache_dtype is None:
            x.transpose(1, 2)[hidden] = math.nan
        else:
            x, scale = quantize(x, cache_dtype)
            scale.transpose(1, 2)[hidden] = math.nan
            stored = {f"{name}_cache": x, f"{name}_scale": scale}
        if page:
            for part, x in stored.items():
                pool, arguments["block_table"] = paged(x.view(torch.int8) if x.itemsize == 1 else x, page)
                stored[part] = pool.view(x.dtype)
        arguments |= stored
    if ROTATIONS[rotation] is not None:
        pairs, interleaved = ROTATIONS[rotation]
        cos, sin = angles(3 * size + 8, pairs)
        arguments |= {"cos": cos, "sin": sin, "interleaved": interleaved}
    return arguments | FEATURES[feature]


def two_steps(arguments, update, rope, attend, **options):
    """The same by two operations: q as it attends, and the attention over the cache."""
    given = {name: arguments.get(name) for name in UPDATE}
    rotation = {name: arguments[name] for name in ROTATION if name in arguments}
    q = arguments["q"]
    if rotation:
        q = rope(q, **given, **rotation)
    else:
        slots = given.pop("slots")
        update(**given | {"positions": given["positions"] if slots is None else slots})
    rest = {name: x for name, x in arguments.items() if name not in (*UPDATE, *ROTATION, "q", "counters")}
    rest |= {name: arguments.get(name) for name in ("block_table", "k_scale", "v_scale")}
    return q, rest, attend(q, arguments["k_cache"], arguments["v_cache"], **rest, **options)


def run_kernel(arguments, counters=None):
    """(out, lse) of the Triton kernel, on any device."""
    x = dict(arguments)
    positions, slots, scale = x.pop("positions"), x.pop("slots", None), x.pop("scale", None)
    return ops._attention_with_kv_cache_triton(
        *(x.pop(name) for name in ("q", "k", "v", "k_cache", "v_cache")), positions if slots is None else slots, counters,
        x.pop("causal", True), arguments["q"].shape[-1] ** -0.5 if scale is None else scale,
        positions if "cos" in x else None, **x,
    )  # fmt: skip


def assert_parity(arguments, counters=None):
    """Runs the kernel and holds it to the contract; returns (out, lse)."""
    expected = on("cpu", arguments)
    actual = on(DEVICE, arguments)
    out, lse = run_kernel(actual, counters)
    q, options, _ = two_steps(
        expected, kv_cache_update_reference, rope_kv_cache_update_reference, attention_reference, return_lse=True
    )
    assert not differing(actual, expected)
    caches = [x if x.itemsize == 1 else x.double() for x in (expected["k_cache"], expected["v_cache"])]

    def reference():
        exact = q.double()
        if q.dtype == torch.float32 and "cos" in expected:  # what rotation errs by is a part of it; of 16 bits q is rounded
            cos, sin = (expected[name].double() for name in ("cos", "sin"))
            interleaved = expected.get("interleaved", False)
            exact = rope_reference(expected["q"].double(), expected["positions"], cos, sin, interleaved=interleaved)
        return attention_reference(exact, *caches, **options, return_lse=True)

    assert out.dtype == q.dtype and out.transpose(1, 2).is_contiguous()
    check((out, lse), reference, weights=q.dtype)
    return out, lse


@pytest.fixture
def short_splits(monkeypatch):
    """Splits of 32 keys in steps of 16; in the interpreter they are added in groups of two."""
    smaller = {key: [tile._replace(BLOCK_N=16, SPLIT=32) for tile in pair] for key, pair in tiles.DECODE.items()}
    monkeypatch.setattr(tiles, "DECODE", smaller)
    if INTERPRETED:  # compiled kernels have the constant in them
        monkeypatch.setattr(kernel, "GROUP", kernel.tl.constexpr(2))
    kernel.kernel_constants.cache_clear(), tiles.decode_tile.cache_clear()
    yield
    kernel.kernel_constants.cache_clear(), tiles.decode_tile.cache_clear()


# The kernel

COMBINATIONS = [
    ("not rotated", "window", torch.float16), ("rotated", "all", torch.float32), ("some dimensions", "plain", torch.float16),
    ("interleaved", "plain", torch.float32),
]  # fmt: skip
# Every third one in the interpreter's time, all of them elsewhere and with the exhaustive tests.
CASES = [
    pytest.param(kind, *combination, marks=[pytest.mark.exhaustive] if INTERPRETED and (i + j) % 3 else [])
    for i, kind in enumerate(KINDS)
    for j, combination in enumerate(COMBINATIONS)
    if not (KINDS[kind][2] and combination[1] in ("window", "all"))  # a ring is the window
]


@runs_kernel
@pytest.mark.parametrize("kind, rotation, feature, dtype", CASES, ids=str)
def test_parity(kind, rotation, feature, dtype, short_splits):
    counters = torch.zeros(100, dtype=torch.int32, device=DEVICE)
    assert_parity(example(kind, rotation, feature, dtype), counters)
    assert not counters.any()


@runs_kernel
@pytest.mark.parametrize("size", (1, 40, 192, 256))  # 192 is held as 128 + 64
def test_parity_of_head_dims(size, short_splits):
    for dtype in (torch.float16, torch.float32):
        head_dim = 16 // dtype.itemsize if size == 1 else size
        kind = "int8" if (size, dtype) == (192, torch.float16) else "contiguous"
        arguments = example(kind, "not rotated", "plain", dtype, lengths=(50, 3), head_dim=head_dim, size=50)
        cos, sin = angles(50, head_dim // 2)
        assert_parity(arguments | {"cos": cos, "sin": sin, "interleaved": size == 40})


@runs_kernel
def test_tokens_that_are_not_stored(short_splits):
    """Without a slot, past the cache, without an angle, on a page that is not there: attended is what the cache holds."""
    arguments = example("pages", "rotated", lengths=(70, 40, 33, 0, 5))
    for name in ("k_cache", "v_cache"):
        arguments[name].nan_to_num_(1.0)
    arguments["cos"], arguments["sin"] = arguments["cos"][:69], arguments["sin"][:69]
    arguments["slots"] = torch.tensor([[69], [-1], [7 * 16], [0], [4]])
    arguments["block_table"][4, 0] = -1
    actual = on(DEVICE, arguments)
    out, lse = run_kernel(actual)
    stored = arguments | {"slots": torch.tensor([[-1], [-1], [-1], [0], [-1]])}
    stored["block_table"][4, 0] = 0  # as the kernels clamp it
    q, options, _ = two_steps(
        stored, kv_cache_update_reference, lambda q, **rest: fastgpt.rope_kv_cache_update_reference(
            q, **rest | {"positions": rest["positions"].masked_fill(rest["positions"] >= 69, -1)}),
        attention_reference, return_lse=True,
    )  # fmt: skip
    assert not differing(actual, stored)
    wide = [x.double() for x in (q, stored["k_cache"], stored["v_cache"])]
    check(out, lambda: attention_reference(*wide, **options), weights=q.dtype)
    assert (lse[3] == -math.inf).all() and not out[3].any()


@runs_kernel
@pytest.mark.parametrize("rows", (False, True), ids=("zero", "not finite"))
@pytest.mark.parametrize("cache_dtype", ("int8", "fp8"))
def test_rows_that_cannot_be_quantized(cache_dtype, rows, short_splits):
    arguments = example(cache_dtype, "not rotated", lengths=(40, 40, 40), size=40)
    for name in ("k", "v"):
        arguments[name] = arguments[name].clone()
        arguments[name][0] = math.inf if rows else 0.0
        arguments[name][1, :, :, 3] = math.nan if rows else 0.0
    actual, expected = on(DEVICE, arguments), on("cpu", arguments)
    out, _ = run_kernel(actual)
    kv_cache_update_reference(**{name: expected[name] for name in UPDATE if name in expected})
    assert not [name for name in differing(actual, expected) if "scale" not in name]
    for name in ("k_scale", "v_scale"):
        assert torch.equal(actual[name].cpu().nan_to_num(-1.0), expected[name].nan_to_num(-1.0))
    assert out[2].isfinite().all() and out[:2].isnan().any() == rows


@runs_kernel
def test_neither_batch_nor_capacity_nor_a_run_changes_a_bit(short_splits):
    arguments = example(lengths=(S, 33, 70))
    together = run_kernel(on(DEVICE, arguments))
    for b, length in enumerate((S, 33, 70)):
        one = {
            name: x[b : b + 1] if isinstance(x, torch.Tensor) and name not in ROTATION else x for name, x in arguments.items()
        }
        for capacity in (length, S):
            cut = {name: one[name][:, :, :capacity].contiguous() for name in ("k_cache", "v_cache")}
            for actual, expected in zip(run_kernel(on(DEVICE, one | cut)), together, strict=True):
                assert torch.equal(actual, expected[b : b + 1])


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU all decoding is by the kernel: tests/kernels/test_gpu.py")
@torch.inference_mode()
@pytest.mark.parametrize(
    "options",
    [{"window": 9}, {"kind": "sliding", "window": 9}, {"kind": "paged", "page_size": 4, "cache_dtype": torch.int8}],
    ids=str,
)
def test_a_decoder_by_the_kernel(options, short_splits):
    """What a decoder asks of it, for a batch of sequences of different lengths, is within the contract at every step."""
    model = random_model(layers=1, num_kv_heads=2, position="rotary", rope=Rope(dim=16))
    ids = random_ids(model, 3, 39)
    filled = model.new_cache(3, **options)
    model(ids[:, :35], cache=filled, new=[35, 2, 30])
    calls = []

    def by_the_kernel(q, k, v, k_cache, v_cache, positions, cos, sin, counters, **rest):
        calls.append(counters)
        arguments = {
            "q": q,
            "k": k,
            "v": v,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "positions": positions,
            "cos": cos,
            "sin": sin,
        }
        assert_parity(arguments | rest)  # on copies of the caches
        return run_kernel(arguments | rest, counters)[0]

    for i in range(35, 37):
        with mock.patch.object(base, "attention_with_kv_cache", by_the_kernel):
            model(ids[:, i : i + 1], cache=filled)
    assert len(calls) == 2 and not any(counters.any() for counters in calls)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["not exhaustive", pytest.param("exhaustive", marks=pytest.mark.exhaustive)])
@starts_the_interpreter
def test_under_the_interpreter(which):
    assert passed(__file__, which) >= len(CASES) // 2


# On a GPU, at sizes at which programs run at the same time


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, head_dim, dtype",
    [
        *((kind, 128, torch.bfloat16) for kind in KINDS),
        *((kind, *rest) for kind in ("contiguous", "int8 in pages") for rest in ((64, torch.float16), (80, torch.float32))),
    ],
    ids=str,
)
def test_parity_at_size(kind, head_dim, dtype):
    arguments = example(
        kind, "rotated" if head_dim > 64 else "interleaved", "plain", dtype, (9000, 33, 257, 5000), head_dim, 9000
    )
    counters = torch.zeros(100, dtype=torch.int32, device=DEVICE)
    assert fastgpt.explain(attention_with_kv_cache, **on(DEVICE, arguments))["triton"] == "chosen"
    assert_parity(arguments, counters)
    assert not counters.any()


def filled(seed, B=2, capacity=9000):
    """A half full cache of B sequences on the GPU, new tokens, and what else a step takes."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    q, k, v = (torch.randn(B, heads, 1, 64, generator=generator, device=DEVICE).half() for heads in (8, 2, 2))
    caches = torch.randn(2, B, 2, capacity, 64, generator=generator, device=DEVICE).half()
    cos, sin = (x.to(DEVICE) for x in angles(capacity, 32))
    lengths = torch.tensor([4000 + 37 * b for b in range(B)], dtype=torch.int32, device=DEVICE)
    counters = torch.zeros(100, dtype=torch.int32, device=DEVICE)
    return {
        "q": q, "k": k, "v": v, "k_cache": caches[0], "v_cache": caches[1], "positions": lengths.unsqueeze(1) - 1, "cos": cos,
        "sin": sin, "kv_lengths": lengths, "counters": counters,
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("has_counters", (True, False))
def test_replays_of_a_cuda_graph_advance(has_counters):
    actual = filled(0)
    if not has_counters:
        actual["counters"] = None
    expected = on(DEVICE, actual)
    attention_with_kv_cache(**on(DEVICE, actual), impl="triton")  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_with_kv_cache(**actual, impl="triton")
    generator = torch.Generator(DEVICE).manual_seed(1)
    for step in range(300):
        for x in ("q", "k", "v"):
            actual[x].normal_(generator=generator)
            expected[x].copy_(actual[x])
        graph.replay()
        assert torch.equal(attention_with_kv_cache(**expected, impl="triton"), out)
        if step % 50 == 0:  # the cache holds the token already, so storing it again changes nothing
            assert not differing(actual, on("cpu", expected))
            assert_parity({name: x for name, x in expected.items() if name != "counters"}, expected["counters"])
        for arguments in (actual, expected):
            arguments["positions"] += 1
            arguments["kv_lengths"] += 1
    assert not has_counters or not actual["counters"].any()


@pytest.mark.gpu
def test_results_are_bitwise_reproducible():
    arguments = filled(0, B=8)
    first = attention_with_kv_cache(**arguments, impl="triton", return_lse=True)
    for _ in range(100):
        for again, expected in zip(attention_with_kv_cache(**arguments, impl="triton", return_lse=True), first, strict=True):
            assert torch.equal(again, expected)


@pytest.mark.gpu
def test_two_streams_at_once():
    both = [filled(seed) for seed in (0, 1)]
    expected = [attention_with_kv_cache(**arguments, impl="triton") for arguments in both]
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(200):
        for stream, arguments, outs in zip(streams, both, results):
            with torch.cuda.stream(stream):
                outs.append(attention_with_kv_cache(**arguments, impl="triton"))
    torch.cuda.synchronize()
    for outs, wanted in zip(results, expected):
        assert all(torch.equal(out, wanted) for out in outs)


# The operation

if not INTERPRETED:

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("rotation", ("not rotated", "interleaved"))
    @pytest.mark.parametrize("has_bias", (False, True))
    def test_it_is_the_two_operations(kind, rotation, has_bias):
        arguments = example(kind, rotation, "plain", torch.float32)
        if has_bias:
            pages = arguments["block_table"].shape[1] if "block_table" in arguments else 1
            arguments["bias"] = torch.randn(B, H, 1, pages * arguments["k_cache"].shape[2])
        actual, expected, plain = (on("cpu", arguments) for _ in range(3))
        out, lse = attention_with_kv_cache(**actual, return_lse=True)
        _, _, (wanted, wanted_lse) = two_steps(expected, kv_cache_update, rope_kv_cache_update, attention, return_lse=True)
        assert not differing(actual, expected) and torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
        torch.testing.assert_close(attention_with_kv_cache_reference(**plain), out)
        assert not differing(actual, plain)
        named = on("cpu", arguments)
        assert torch.equal(attention_with_kv_cache(**named, impl="unfused"), out)

    def test_several_tokens():
        k, q = torch.randn(1, 2, 3, 8), torch.randn(1, 4, 3, 8)
        caches = torch.zeros(2, 1, 2, 5, 8)
        out = attention_with_kv_cache(
            q, k, k, *caches, torch.tensor([[0, 1, 2]]), kv_lengths=torch.tensor([3], dtype=torch.int32)
        )
        assert torch.equal(out, attention(q, k, k))

    def test_opcheck():
        arguments = example("int8 in pages", "rotated", "plain", torch.float32)
        x = {name: arguments.pop(name) for name in ("q", "k", "v", "k_cache", "v_cache", "positions")}
        positions = x.pop("positions")
        for name in ("k_scale", "v_scale"):
            arguments[name] = arguments[name].nan_to_num(0.0)
        counters = torch.zeros(8, dtype=torch.int32)
        call = (*x.values(), positions, counters, True, 0.125, positions)
        torch.library.opcheck(torch.ops.fastgpt.attention_with_kv_cache.default, call, arguments)

    def test_explain():
        arguments = example()
        reasons = fastgpt.explain(attention_with_kv_cache, **arguments)
        assert reasons == {
            "triton": "it runs on CUDA tensors, and q is on cpu", "unfused": "chosen", "reference": "available"
        }  # fmt: skip
        with pytest.raises(ValueError, match="impl='triton' cannot serve this call: it runs on CUDA tensors"):
            attention_with_kv_cache(**arguments, impl="triton")

    BAD = {
        "q": ({"q": torch.zeros(B, 5, 1, D).half()}, ValueError, "k: expected a number of heads that divides the 5 heads of q"),
        "text": ({"q": "text"}, TypeError, "q: expected a torch.Tensor, got str"),
        "k": ({"k": None}, TypeError, "k: expected a torch.Tensor, got NoneType"),
        "position": ({"positions": torch.tensor([[S], [0], [0]])}, ValueError, "positions: expected values below"),
        "sin": ({"sin": None}, TypeError, "sin: expected a torch.Tensor"),
        "cos": ({"cos": None}, TypeError, "cos: expected a torch.Tensor"),
        "softcap": ({"softcap": -1.0}, ValueError, "softcap: expected a finite number >= 1.17"),
        "lengths": ({"kv_lengths": torch.zeros(2, dtype=torch.int32)}, ValueError, "kv_lengths: expected shape"),
        "device": ({"kv_lengths": torch.ones(B, dtype=torch.int32, device="meta")}, ValueError, "kv_lengths: expected device"),
        "sinks": ({"sinks": torch.ones(H, device="meta")}, ValueError, "sinks: expected device cpu, got meta"),
        "bias": ({"bias": torch.zeros(2, H, 1, S)}, ValueError, "bias: expected a shape"),
        "scale": ({"k_scale": torch.zeros(B, H_KV, S)}, ValueError, "k_scale: expected None"),
    }

    @pytest.mark.parametrize("case", BAD)
    def test_errors(case):
        change, error, message = BAD[case]
        arguments = example()
        before = on("cpu", arguments)
        arguments |= change
        with pytest.raises(error, match=message):
            attention_with_kv_cache(**arguments)
        assert not [
            name for name in ("k_cache", "v_cache") if not torch.equal(*(x[name].nan_to_num(9.0) for x in (arguments, before)))
        ]
